"""Figures of a sweep: the drawn numbers are the sweep's, and missing runs are named."""

from __future__ import annotations

from itertools import product
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from lib.experiments import sweep as sweeps
from lib.experiments.config import MODELS, TASKS, RunConfig
from lib.experiments.profiles import grid
from lib.experiments.sweep import Sweep, load_sweep
from lib.figures import comparison
from lib.figures.grid import LOWEST_LOSS, draw_histories, draw_solver_steps, loss_figure
from lib.figures.style import MODEL_COLORS, sweep_budget

NOISES = (0.0, 0.1, 0.5)
CONFIGS = grid("quick", noise=NOISES, tau=(0.1, 0.5, 0.9, 1.1), gamma=0.1, sigma="relu", epochs=4)

pytestmark = pytest.mark.usefixtures("drawing")

Record = dict[str, Any] | None


def record(*losses: float, status: str = "completed", pace: float = 1.0, steps: float = 5.0) -> Record:
    """A stored run with these test losses after its epochs, each of which took `pace` seconds."""
    history = []
    for epoch, loss in enumerate(losses):
        row = {"epoch": epoch, "seconds": epoch * pace, "test_loss": loss, "test_psnr": 10.0}
        if epoch:
            row |= {"forward_steps": steps + epoch, "backward_steps": 2 * steps + epoch}
        history.append(row)
    provenance = {"seconds": len(losses) * pace, "environment": {"accelerator": "none"}, "method": 1}
    return {"status": status, "reason": "", "history": history, "provenance": provenance}


def make_sweep(records: dict[RunConfig, Record]) -> Sweep:
    """The sweep of stored runs that were never trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "read_record", lambda config, results=None: records[config])
        return load_sweep("quick", list(records))


def mixed() -> dict[RunConfig, Record]:
    """Runs of all sorts: most are kept, and some dropped, diverged, late or missing."""
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


def texts(drawn: Figure | Axes) -> list[str]:
    return [" ".join(text.get_text().split()) for text in drawn.findobj(plt.Text) if text.get_text()]


def counts(axes: Axes, name: str) -> list[int]:
    """The numbers in the line of this name, from left to right."""
    (label,) = (text for text in axes.texts if text.get_text() == name)
    line = [text for text in axes.texts if text.get_position()[1] == label.get_position()[1]]
    line.remove(label)
    return [int(text.get_text()) for text in sorted(line, key=lambda text: text.get_position()[0])]


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_boxes_and_counts_of_losses(threshold: float) -> None:
    """Quartiles and range of the kept losses of each task and model, over the number of each outcome."""
    left, _ = loss_figure(MIXED, threshold).axes
    runs = MIXED.runs.assign(outcome=comparison.outcome(MIXED.runs, threshold))
    groups = {
        (task, model): runs[(runs["task"] == task) & (runs["model"] == model)]
        for task, model in product(TASKS, MODELS)
    }
    for name in comparison.OUTCOMES:
        expected = [int((groups[both]["outcome"] == name).sum()) for both in product(TASKS, MODELS)]
        assert counts(left, name) == expected
    lines = [left.lines[k : k + 6] for k in range(0, len(left.lines), 6)]
    for (model, task), patch, (*whiskers, _, _, median, fliers) in zip(
        product(MODELS, TASKS), left.patches, lines, strict=True
    ):
        box = patch.get_path().get_extents()
        ends = np.concatenate([line.get_ydata() for line in (*whiskers, fliers)])
        drawn = (ends.min(), box.y0, median.get_ydata()[0], box.y1, ends.max())
        kept = groups[task, model].query("outcome == 'kept'")["test_loss"]
        assert drawn == pytest.approx(np.quantile(kept, [0, 0.25, 0.5, 0.75, 1]))


def test_differences_are_those_of_the_pairs() -> None:
    """A point per pair of kept runs, and per task the median with its interval."""
    _, right = loss_figure(MIXED).axes
    pairs = comparison.paired(comparison.kept_runs(MIXED.runs), "test_loss")
    points = [c for c in right.collections if isinstance(c, PathCollection)]
    drawn = np.concatenate([np.asarray(c.get_offsets()) for c in points if len(c.get_offsets())])
    for i, task in enumerate(TASKS):
        differences = pairs.loc[pairs["task"] == task, "difference"].to_numpy()
        near = drawn[np.abs(drawn[:, 1] - i) < 0.4, 0]
        assert np.allclose(np.sort(near), np.sort(differences))
        test = comparison.paired_test(differences)
        assert f"{len(differences)} pairs, median {test['median']:+.2g}" in texts(right)
        (bar,) = (bar for bar in right.containers if bar.lines[0].get_ydata()[0] == i)
        ((start, end),) = bar.lines[2][0].get_segments()
        assert (start[0], end[0]) == pytest.approx((test["low"], test["high"]))


def test_histories_are_medians_within_their_range() -> None:
    """Of one seed or two; a loss of zero is drawn at the lowest one."""
    keys = MIXED.runs.loc[comparison.outcome(MIXED.runs) == "kept", "key"].iloc[:2]
    runs = pd.DataFrame({"key": keys, "model": "deq"})
    epochs = MIXED.epochs[MIXED.epochs["key"].isin(keys)].copy()
    epochs.loc[epochs["epoch"] == 4, "test_loss"] = 0.0
    losses = epochs.pivot(index="epoch", columns="key", values="test_loss").clip(lower=LOWEST_LOSS)
    for count in (1, 2):
        _, axes = plt.subplots()
        draw_histories(axes, runs.iloc[:count], epochs)
        (line,) = axes.lines
        drawn = losses[keys.iloc[:count]]
        assert line.get_color() == MODEL_COLORS["deq"]
        np.testing.assert_allclose(np.asarray(line.get_ydata()), drawn.median(axis=1))
        assert len(axes.collections) == count - 1
        for band in axes.collections:
            heights = band.get_paths()[0].vertices[:, 1]
            assert (heights.min(), heights.max()) == (drawn.min(axis=None), drawn.max(axis=None))


def test_solver_steps_are_medians() -> None:
    """Of each epoch, model and direction."""
    epochs = MIXED.epochs[MIXED.epochs["epoch"] > 0].merge(MIXED.runs[["key", "model"]], on="key")
    _, axes = plt.subplots()
    draw_solver_steps(axes, epochs)
    drawn = {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}
    for model, name in zip(MODELS, ("bilevel", "DEQ"), strict=True):
        rows = epochs[epochs["model"] == model].groupby("epoch")
        for direction in ("forward", "backward"):
            np.testing.assert_allclose(drawn[f"{name}, {direction}"], rows[f"{direction}_steps"].median())


DEGENERATE: dict[str, dict[RunConfig, Record]] = {
    "all diverged": dict.fromkeys(CONFIGS, record(status="diverged")),
    "all dropped": dict.fromkeys(CONFIGS, record(0.9, 0.8, 0.7)),
    "none run": dict.fromkeys(CONFIGS),
    "one task": {config: rows for config, rows in mixed().items() if config.task == "inpainting"},
    "one model": {config: rows for config, rows in mixed().items() if config.model == "deq"},
    "one run": {CONFIGS[0]: record(0.9, 0.4)},
    "equal losses": dict.fromkeys(CONFIGS, record(0.9, 0.4)),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_figure_of_little_is_drawn(case: str) -> None:
    """A sweep that lacks runs, tasks or a model is drawn with its budget, and without a warning."""
    sweep = make_sweep(DEGENERATE[case])
    fig = loss_figure(sweep)
    assert sweep_budget(sweep.profile, sweep.provenance) in texts(fig)
    fig.draw_without_rendering()
    fig, axes = plt.subplots()
    draw_solver_steps(axes, sweep.epochs.merge(sweep.runs[["key", "model"]], on="key"))
    fig.draw_without_rendering()
