"""Curves of the grid: drawn numbers are those of the sweep, and missing arms are named."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from lib.experiments import sweep as sweeps
from lib.experiments.config import RunConfig
from lib.experiments.profiles import grid
from lib.experiments.sweep import NOT_RUN, Sweep, load_sweep
from lib.figures import comparison
from lib.figures.grid import LOWEST_LOSS, arm_names, draw_histories, draw_solver_steps
from lib.figures.style import ARM_COLORS, ARM_NAMES

NOISES = (0.0, 0.1, 0.5)
CONFIGS = grid("quick", noise=NOISES, tau=(0.1, 0.5, 0.9, 1.1), gamma=0.1, sigma="relu", epochs=4)

pytestmark = pytest.mark.usefixtures("drawing")

Record = dict[str, Any] | None


def record(*losses: float, status: str = "completed", pace: float = 1.0, steps: float = 5.0) -> Record:
    """A stored run with these test losses after its epochs of `pace` seconds."""
    history = []
    for epoch, loss in enumerate(losses):
        row = {"epoch": epoch, "seconds": epoch * pace, "test_loss": loss, "test_psnr": 10.0}
        if epoch:
            row |= {"forward_steps": steps + epoch, "backward_steps": 2 * steps + epoch}
        history.append(row)
    provenance = {"seconds": len(losses) * pace, "environment": {"accelerator": "none"}, "method": 1}
    return {"status": status, "reason": "", "history": history, "provenance": provenance}


def make_sweep(records: dict[RunConfig, Record]) -> Sweep:
    """A sweep of records without training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "read_record", lambda config, results=None: records[config])
        return load_sweep("quick", list(records))


def mixed() -> dict[RunConfig, Record]:
    """Runs of all outcomes: most are kept, others dropped, diverged, late or missing."""
    rng = np.random.default_rng(0)
    records: dict[RunConfig, Record] = {}
    for i, config in enumerate(CONFIGS):
        loss, pace = float(rng.uniform(0.05, 0.45)), float(rng.choice([0.5, 1.0, 2.0]))
        records[config] = record(0.9, 3 * loss, 2 * loss, loss, loss, pace=pace, steps=rng.uniform(3, 9))
        if i % 7 == 1:
            records[config] = record(0.9, 0.8, 0.8, 0.7, 0.6)
        elif i % 9 == 2:
            records[config] = record(status="diverged")
        elif i % 11 == 3:
            records[config] = record(0.9, status="out of time")
        elif i % 13 == 4:
            records[config] = None
    return records


MIXED = make_sweep(mixed())


def test_histories_are_drawn_as_median_and_range() -> None:
    """One seed or two; a loss of zero is drawn at `LOWEST_LOSS`."""
    keys = MIXED.runs.loc[comparison.outcome(MIXED.runs) == "kept", "key"].iloc[:2]
    runs = pd.DataFrame({"key": keys, "arm": "deq"})
    epochs = MIXED.epochs[MIXED.epochs["key"].isin(keys)].copy()
    epochs.loc[epochs["epoch"] == 4, "test_loss"] = 0.0
    losses = epochs.pivot(index="epoch", columns="key", values="test_loss").clip(lower=LOWEST_LOSS)
    for count in (1, 2):
        _, axes = plt.subplots()
        draw_histories(axes, runs.iloc[:count], epochs)
        (line,) = axes.lines
        drawn = losses[keys.iloc[:count]]
        assert line.get_color() == ARM_COLORS["deq"]
        np.testing.assert_allclose(np.asarray(line.get_ydata()), drawn.median(axis=1))
        assert len(axes.collections) == count - 1
        for band in axes.collections:
            heights = band.get_paths()[0].vertices[:, 1]
            assert (heights.min(), heights.max()) == (drawn.min(axis=None), drawn.max(axis=None))


def test_solver_steps_are_drawn_as_medians() -> None:
    """Medians per epoch, arm and direction; an arm without runs has no line and is named as not run."""
    epochs = MIXED.epochs[MIXED.epochs["epoch"] > 0].merge(MIXED.runs[["key", "arm"]], on="key")
    _, (every_arm, two) = plt.subplots(1, 2)
    draw_solver_steps(every_arm, epochs)
    drawn = {line.get_label(): np.asarray(line.get_ydata()) for line in every_arm.lines}
    for arm, name in ARM_NAMES.items():
        rows = epochs[epochs["arm"] == arm].groupby("epoch")
        for direction in ("forward", "backward"):
            np.testing.assert_allclose(drawn[f"{name}, {direction}"], rows[f"{direction}_steps"].median())
    draw_solver_steps(two, epochs[epochs["arm"] != "deq tied"])
    assert len(two.lines) == 4
    status = MIXED.runs["status"].mask(MIXED.runs["arm"] == "deq tied", NOT_RUN)
    assert arm_names(MIXED.runs) == ARM_NAMES
    assert arm_names(MIXED.runs.assign(status=status))["deq tied"] == f"{ARM_NAMES['deq tied']}, not run"
