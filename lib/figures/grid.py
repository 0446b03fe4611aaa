"""Figures of the grid: losses as boxes and in pairs, histories and solver steps of runs."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator

from lib.experiments.config import MODELS, TASKS
from lib.experiments.sweep import Sweep
from lib.figures import comparison
from lib.figures.comparison import LOSS_THRESHOLD
from lib.figures.style import MODEL_COLORS, MODEL_NAMES, STYLE, TEXT_WIDTH, model_line, note, sweep_budget

LOWEST_LOSS = 1e-12
"""Smallest loss on a logarithmic axis."""

CROWDED = 1e4
"""Ratio of an axis's ends above which only powers of ten are labelled."""

MODEL_OFFSETS = {"bilevel": -0.175, "deq": 0.175}


def model_patches() -> list[Patch]:
    """Return the entries of a legend that names both models by their colours."""
    return [Patch(facecolor=MODEL_COLORS[model], edgecolor="k", label=MODEL_NAMES[model]) for model in MODELS]


def loss_figure(sweep: Sweep, threshold: float = LOSS_THRESHOLD) -> Figure:
    """Draw boxplots of the final test losses up to a threshold, and the paired differences."""
    kept = comparison.kept_runs(sweep.runs, threshold)
    with plt.rc_context(STYLE):
        fig, (left, right) = plt.subplots(1, 2, figsize=(TEXT_WIDTH, 3.4), width_ratios=(1.25, 1))
        fig.subplots_adjust(left=0.09, right=0.99, top=0.92, bottom=0.31, wspace=0.3)
        for model, offset in MODEL_OFFSETS.items():
            losses = [kept["test_loss"][(kept["task"] == t) & (kept["model"] == model)] for t in TASKS]
            box: Any = {"boxprops": {"facecolor": MODEL_COLORS[model]}, "patch_artist": True, "widths": 0.32}
            box |= {"medianprops": {"color": "k"}, "flierprops": {"markersize": 2}}
            left.boxplot(losses, positions=[i + offset for i in range(len(TASKS))], **box)
        # Above what may be drawn.
        left.legend(handles=model_patches(), frameon=False, loc="upper left", ncols=2)
        left.set_xticks(range(len(TASKS)), TASKS)
        left.set(ylabel="final test loss", ylim=(-0.02 * threshold, 1.15 * threshold))
        left.set_title(f"runs with a final test loss up to {threshold:g}")
        _write_counts(left, comparison.outcome_table(sweep.runs, threshold))
        _draw_differences(right, comparison.paired(kept, "test_loss"))
        note(fig, sweep_budget(sweep.profile, sweep.provenance))
    return fig


def _write_counts(axes: Axes, outcomes: pd.DataFrame) -> None:
    """Write the number of runs with each outcome under the boxes."""
    shown = [name for name in comparison.OUTCOMES if name in comparison.OUTCOMES[:3] or outcomes[name].any()]
    counts = outcomes.to_dict("index")
    line = 0.062
    for row, name in enumerate(shown):
        text: Any = {"y": -0.06 - line * row, "size": 7, "va": "center"}
        text["transform"] = axes.get_xaxis_transform()
        axes.text(x=-0.55, s=name, ha="right", **text)
        for i, task in enumerate(TASKS):
            for model, offset in MODEL_OFFSETS.items():
                if (task, model) in counts:
                    axes.text(x=i + offset, s=str(counts[task, model][name]), ha="center", **text)
    axes.tick_params(axis="x", length=0, pad=7 + 10.5 * len(shown))
    axes.set_xlim(-0.5, len(TASKS) - 0.5)


def _draw_differences(axes: Axes, pairs: pd.DataFrame) -> None:
    """Draw each pair's difference, and per task the median with its interval."""
    axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    jitter = np.random.default_rng(0)
    for i, task in enumerate(TASKS):
        differences = pairs.loc[pairs["task"] == task, "difference"].to_numpy()
        heights = i + jitter.uniform(-0.2, 0.2, len(differences))
        axes.scatter(differences, heights, s=4, color="0.55", linewidth=0, zorder=1)
        test = comparison.paired_test(differences)
        if test["pairs"]:
            spread = [[test["median"] - test["low"]], [test["high"] - test["median"]]]
            bar: Any = {"fmt": "D", "color": "k", "markersize": 3.5, "capsize": 3, "linewidth": 1.2}
            axes.errorbar(test["median"], i, xerr=spread, zorder=3, **bar)
        label = f"{test['pairs']:.0f} pairs, median {test['median']:+.2g}"
        text = axes.text(0.98, i - 0.33, label, size=7, ha="right", transform=axes.get_yaxis_transform())
        # The line at zero must not run through it.
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.set_xscale("symlog", linthresh=0.01, linscale=0.6)
    axes.set(ylabel="", xlabel="bilevel minus DEQ (right of 0: the DEQ is better)")
    axes.set_yticks(range(len(TASKS)), TASKS)
    axes.set_ylim(len(TASKS) - 0.5, -0.6)
    axes.set_title("the same configuration, both kept")


def draw_histories(axes: Axes, runs: pd.DataFrame, epochs: pd.DataFrame) -> None:
    """Draw the median test loss of each model's runs after each epoch, and the range of several seeds."""

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
    for model, group in runs.groupby("model"):
        rows = epochs[epochs["key"].isin(group["key"])]
        histories = rows["test_loss"].clip(lower=LOWEST_LOSS).groupby(rows["epoch"])
        median = histories.median()
        if len(group) > 1:
            spread: Any = {"color": MODEL_COLORS[str(model)], "alpha": 0.2, "linewidth": 0}
            axes.fill_between(median.index, histories.min(), histories.max(), **spread)
        axes.plot(median.index, median, label=MODEL_NAMES[str(model)], **model_line(str(model)))


def draw_solver_steps(axes: Axes, epochs: pd.DataFrame) -> None:
    """Draw the mean solver steps of each epoch: the median over the runs, and their middle half."""
    for model in MODELS:
        steps = epochs[epochs["model"] == model].groupby("epoch")
        for direction, line, marker in (("forward", "-", "o"), ("backward", ":", "s")):
            low, median, high = (steps[f"{direction}_steps"].quantile(q) for q in (0.25, 0.5, 0.75))
            style: Any = {"color": MODEL_COLORS[model]}
            axes.fill_between(median.index, low, high, alpha=0.15, linewidth=0, **style)
            style |= {"marker": marker, "markersize": 2.5, "linewidth": 1.2}
            axes.plot(median.index, median, line, label=f"{MODEL_NAMES[model]}, {direction}", **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_xlabel("epoch")
