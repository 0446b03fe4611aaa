"""Figures of the grid: arms, histories and solver steps of its runs."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator

from lib.experiments.sweep import NOT_RUN
from lib.figures.style import ARM_COLORS, ARM_NAMES, arm_line

LOWEST_LOSS = 1e-12
"""Smallest loss on a logarithmic axis."""

CROWDED = 1e4
"""Ratio of the limits of an axis above which only powers of ten are labelled."""


def arm_names(runs: pd.DataFrame) -> dict[str, str]:
    """Return the names of the arms of a sweep, marked if not run."""
    trained = set(runs["arm"][runs["status"] != NOT_RUN])
    shown = [arm for arm in ARM_NAMES if (runs["arm"] == arm).any()]
    return {arm: ARM_NAMES[arm] + ("" if arm in trained else ", not run") for arm in shown}


def draw_histories(axes: Axes, runs: pd.DataFrame, epochs: pd.DataFrame) -> None:
    """Draw the median test loss of each arm after each epoch, and the range over several seeds."""

    def minor_label(y: float, position: float) -> str:
        low, high = axes.get_ylim()
        return f"{y:g}" if high < CROWDED * low else ""

    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter(minor_label)
    axes.tick_params(axis="y", which="both", labelsize=6.5)
    axes.grid(alpha=0.3, linewidth=0.5)
    if runs.empty:
        axes.text(0.5, 0.5, "no run ended", ha="center", size=8, transform=axes.transAxes)
    for arm, group in runs.groupby("arm"):
        rows = epochs[epochs["key"].isin(group["key"])]
        histories = rows["test_loss"].clip(lower=LOWEST_LOSS).groupby(rows["epoch"])
        median = histories.median()
        if len(group) > 1:
            spread: Any = {"color": ARM_COLORS[str(arm)], "alpha": 0.2, "linewidth": 0}
            axes.fill_between(median.index, histories.min(), histories.max(), **spread)
        axes.plot(median.index, median, label=ARM_NAMES[str(arm)], **arm_line(str(arm)))


def draw_solver_steps(axes: Axes, epochs: pd.DataFrame) -> None:
    """Draw the mean solver steps of each epoch: the median over the runs, and their middle half."""
    for arm in ARM_NAMES:
        steps = epochs[epochs["arm"] == arm].groupby("epoch")
        for direction, line in (("forward", "-"), ("backward", ":")) if len(steps) else ():
            low, median, high = (steps[f"{direction}_steps"].quantile(q) for q in (0.25, 0.5, 0.75))
            axes.fill_between(median.index, low, high, color=ARM_COLORS[arm], alpha=0.15, linewidth=0)
            style = arm_line(arm) | {"linestyle": line, "label": f"{ARM_NAMES[arm]}, {direction}"}
            axes.plot(median.index, median, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_xlabel("epoch")
