"""Figures of a sweep: what they show is the sweep's numbers, and what is missing is said."""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from lib.experiments import sweep as sweeps
from lib.experiments.config import RunConfig
from lib.experiments.profiles import grid
from lib.experiments.runs import Run, code_version, get_run
from lib.experiments.sweep import Sweep, get_sweep, load_sweep
from lib.figures import comparison
from lib.figures.grid import LOWEST_LOSS, best_runs_figure, epochs_figure, loss_figure
from lib.figures.reconstructions import (
    SPREAD,
    Reconstructions,
    check_stored_losses,
    keeps_loss,
    reconstruction_figure,
)
from lib.figures.style import MODEL_COLORS, save, sweep_budget
from lib.models import MODELS
from lib.operators import TASKS

NOISES, TAUS = (0.0, 0.1, 0.5), (0.1, 0.5, 0.9, 1.1)
VALUES: dict[str, Any] = {"noise": NOISES, "tau": TAUS, "gamma": 0.1, "sigma": "relu"}
VALUES |= {"epochs": 4, "train_images": 20_000}
CONFIGS = grid("quick", **VALUES)

pytestmark = pytest.mark.usefixtures("drawing")

Record = dict[str, Any] | None
Draw = Callable[[Sweep], Figure]

DRAWINGS: dict[str, Draw] = {
    "losses": loss_figure,
    "best runs": best_runs_figure,
    "epochs": lambda sweep: epochs_figure(sweep, 3.0),
}


def record(*losses: float, status: str = "completed", pace: float = 1.0, steps: float = 5.0) -> Record:
    """A stored run with these test losses after its epochs, each of which took `pace` seconds."""
    history = []
    for epoch, loss in enumerate(losses):
        row = {"epoch": epoch, "seconds": epoch * pace, "test_loss": loss, "test_psnr": 10.0}
        row |= {"test_steps": steps, "test_residual": 1e-3, "test_unconverged": 0.0}
        if epoch:
            row |= {"train_loss": loss, "forward_steps": steps + epoch, "backward_steps": 2 * steps + epoch}
        history.append(row)
    provenance = {"seconds": len(losses) * pace, "environment": {"accelerator": "none"}, "code": "here"}
    return {"status": status, "reason": "", "history": history, "provenance": provenance}


def make_sweep(records: dict[RunConfig, Record], profile: str = "quick") -> Sweep:
    """The sweep of stored runs that were never trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "read_record", lambda config, results=None: records[config])
        return load_sweep(profile, list(records))


def mixed() -> dict[RunConfig, Record]:
    """Runs of all sorts: most are kept, and some dropped, diverged, late or missing."""
    rng = np.random.default_rng(0)
    records: dict[RunConfig, Record] = {}
    for i, config in enumerate(CONFIGS):
        loss = float(rng.uniform(0.05, 0.45))
        pace = float(rng.choice([0.5, 1.0, 2.0]))
        kept = record(0.9, 3 * loss, 2 * loss, 1.5 * loss, loss, pace=pace, steps=float(rng.uniform(3, 9)))
        records[config] = kept
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
COMPLETE = make_sweep(
    {config: record(0.9, 0.5, 0.4, 0.3, 0.01 * (i % 9 + 1)) for i, config in enumerate(CONFIGS)}
)


def everywhere(stored: Record) -> Sweep:
    """All configurations with the same end."""
    return make_sweep(dict.fromkeys(CONFIGS, stored))


def only(**values: Any) -> Sweep:
    """The part of the mixed sweep whose configurations have these values."""
    records = {
        config: stored
        for config, stored in mixed().items()
        if all(getattr(config, name) == value for name, value in values.items())
    }
    return make_sweep(records)


SMALL = only(noise=0.1)

DEGENERATE: dict[str, Callable[[], Sweep]] = {
    "all diverged at once": lambda: everywhere(record(status="diverged")),
    "all diverged later": lambda: everywhere(record(0.9, 0.4, status="diverged")),
    "all late": lambda: everywhere(record(0.4, status="out of time")),
    "all dropped": lambda: everywhere(record(0.9, 0.8, 0.7)),
    "none run": lambda: everywhere(None),
    "one task": lambda: only(task="inpainting"),
    "one model": lambda: only(model="deq"),
    "one noise level": lambda: only(noise=0.1),
    "one run": lambda: make_sweep({CONFIGS[0]: record(0.9, 0.4)}),
    "equal losses": lambda: everywhere(record(0.9, 0.4)),
    "a loss of zero": lambda: everywhere(record(0.9, 0.0)),
}


def texts(drawn: Figure | Axes) -> list[str]:
    return [text.get_text() for text in drawn.findobj(plt.Text) if text.get_text()]


def bar_heights(axes: Axes) -> dict[str, float]:
    """Total height of the bars of each colour."""
    heights = dict.fromkeys(map(MODEL_COLORS.get, MODELS), 0.0)
    for patch in axes.patches:
        heights[to_hex(patch.get_facecolor())] += patch.get_height()
    return {model: heights[MODEL_COLORS[model]] for model in MODELS}


def counted(axes: Axes, name: str) -> list[int]:
    """The numbers that stand in the line of this name, from left to right."""
    (label,) = (text for text in axes.texts if text.get_text() == name)
    line = [text for text in axes.texts if text.get_position()[1] == label.get_position()[1]]
    line.remove(label)
    return [int(text.get_text()) for text in sorted(line, key=lambda text: text.get_position()[0])]


def assert_same_files(first: Path, second: Path) -> None:
    for name in ("fig.png", "fig.pdf", "fig.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_the_losses_are_counted_under_their_boxes(threshold: float) -> None:
    """The kept, dropped and diverged runs of each task and model, late and missing ones, left to right."""
    left, _ = loss_figure(MIXED, threshold).axes
    ends = comparison.outcome(MIXED.runs, threshold)
    for name in ("kept", "dropped", "diverged", "no epoch", "not run"):
        expected = [
            int(((MIXED.runs["task"] == task) & (MIXED.runs["model"] == model) & (ends == name)).sum())
            for task, model in product(TASKS, MODELS)
        ]
        assert counted(left, name) == expected
        assert sum(expected) > 0
    assert [text.get_text() for text in left.get_xticklabels()] == list(TASKS)


def test_what_did_not_happen_is_not_counted() -> None:
    """A complete sweep has no line for missing runs, and says zero where none was dropped or diverged."""
    left, _ = loss_figure(COMPLETE).axes
    assert counted(left, "kept") == [12] * 6
    assert counted(left, "dropped") == counted(left, "diverged") == [0] * 6
    assert not {"not run", "no epoch"} & set(texts(left))


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_the_boxes_are_of_the_kept_runs(threshold: float) -> None:
    """The box of each task and model has the quartiles and the range of the kept losses, no others."""
    left, _ = loss_figure(MIXED, threshold).axes
    kept = MIXED.runs[(MIXED.runs["status"] == "completed") & (MIXED.runs["test_loss"] <= threshold)]
    expected = {
        (task, model): np.quantile(losses, [0, 0.25, 0.5, 0.75, 1])
        for (task, model), losses in kept.groupby(["task", "model"])["test_loss"]
    }
    assert len(expected) == 6
    lines = [left.lines[k : k + 6] for k in range(0, len(left.lines), 6)]
    boxes = iter(zip(left.patches, lines, strict=True))
    for model, (i, task) in product(MODELS, enumerate(TASKS)):
        patch, (*whiskers, _, _, median, fliers) = next(boxes)
        box = patch.get_path().get_extents()
        ends = np.concatenate([line.get_ydata() for line in (*whiskers, fliers)])
        drawn = (ends.min(), box.y0, median.get_ydata()[0], box.y1, ends.max())
        assert drawn == pytest.approx(expected[task, model])
        assert (box.x0 + box.x1) / 2 == pytest.approx(i, abs=0.2)
        assert ((box.x0 + box.x1) / 2 < i) == (model == MODELS[0])


def test_the_differences_are_those_of_the_pairs() -> None:
    """A point per pair of kept runs, and per task the median with its interval and the number of pairs."""
    _, right = loss_figure(MIXED).axes
    pairs = comparison.paired(comparison.kept_runs(MIXED.runs), "test_loss")
    points = [c for c in right.collections if isinstance(c, PathCollection)]
    drawn = np.concatenate([np.asarray(c.get_offsets()) for c in points if len(c.get_offsets())])
    for i, task in enumerate(TASKS):
        differences = pairs.loc[pairs["task"] == task, "difference"].to_numpy()
        assert len(differences) > 2
        near = drawn[np.abs(drawn[:, 1] - i) < 0.4, 0]
        assert np.allclose(np.sort(near), np.sort(differences))
        test = comparison.paired_test(differences)
        assert f"{len(differences)} pairs, median {test['median']:+.2g}" in texts(right)
        (bar,) = (bar for bar in right.containers if bar.lines[0].get_ydata()[0] == i)
        assert bar.lines[0].get_xdata()[0] == test["median"]
        ((start, end),) = bar.lines[2][0].get_segments()
        assert (start[0], end[0]) == pytest.approx((test["low"], test["high"]))


def test_the_best_runs_are_drawn_epoch_by_epoch() -> None:
    """Each panel has the history of the best run of each model, in its colour, on a logarithmic axis."""
    fig = best_runs_figure(MIXED)
    panels = fig.axes
    assert len(panels) == len(NOISES) * len(TASKS)
    best = comparison.best_runs(MIXED.runs)
    for axes, (noise, task) in zip(panels, product(NOISES, TASKS), strict=True):
        assert axes.get_yscale() == "log"
        here = best[(best["noise"] == noise) & (best["task"] == task)]
        assert len(here) == len(axes.lines) == 2
        lines = {line.get_color(): line for line in axes.lines}
        for key, model in zip(here["key"], here["model"], strict=True):
            history = MIXED.epochs[MIXED.epochs["key"] == key]
            assert list(lines[MODEL_COLORS[model]].get_xdata()) == [0, 1, 2, 3, 4]
            assert list(lines[MODEL_COLORS[model]].get_ydata()) == history["test_loss"].tolist()
    assert [axes.get_title() for axes in panels[:3]] == list(TASKS)
    assert [axes.get_ylabel().split()[1] for axes in panels[::3]] == ["0", "0.1", "0.5"]
    legend = panels[0].get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == {"bilevel", "DEQ"}


def test_of_several_seeds_the_median_is_drawn_within_its_range() -> None:
    """A line per model, and a band from the lowest to the highest loss of the seeds in each epoch."""
    seeded = {
        config.model_copy(update={"seed": seed}): rows for config, rows in mixed().items() for seed in (0, 1)
    }
    shifted: dict[RunConfig, Record] = {}
    for config, stored in seeded.items():
        shifted[config] = copy.deepcopy(stored)
        for row in [] if stored is None else shifted[config]["history"]:
            row["test_loss"] *= 1 + config.seed
    one, two = best_runs_figure(MIXED).axes, best_runs_figure(make_sweep(shifted)).axes
    for alone, several in zip(one, two, strict=True):
        assert len(alone.collections) == 0
        assert len(several.lines) == len(several.collections) == 2
        for line, median, band in zip(alone.lines, several.lines, several.collections, strict=True):
            single = np.asarray(line.get_ydata())
            np.testing.assert_allclose(np.asarray(median.get_ydata()), 1.5 * single)
            heights = band.get_paths()[0].vertices[:, 1]
            assert heights.min() == pytest.approx(single.min())
            assert heights.max() == pytest.approx(2 * single.max())


def test_a_panel_without_a_run_says_so() -> None:
    """Where no run has ended there is a remark in the place of lines."""
    records = {
        config: record(status="diverged") if config.noise == 0.1 else stored
        for config, stored in mixed().items()
    }
    panels = best_runs_figure(make_sweep(records)).axes
    for axes, (noise, _) in zip(panels, product(NOISES, TASKS), strict=True):
        remarks = [text for text in texts(axes) if text.startswith("no run")]
        assert len(remarks) == (noise == 0.1)
        assert len(axes.lines) == (0 if noise == 0.1 else 2)


def test_a_loss_of_zero_is_drawn_at_the_lowest() -> None:
    """A logarithmic axis has no place for it; its labels are then powers of ten alone."""
    records = copy.deepcopy({config: stored for config, stored in mixed().items() if stored is not None})
    for config, stored in records.items():
        for row in stored["history"][1:] if config.noise == 0 else []:
            row["test_loss"] = 0.0
    fig = best_runs_figure(make_sweep(records))
    fig.draw_without_rendering()
    for axes, (noise, _) in zip(fig.axes, product(NOISES, TASKS), strict=True):
        lowest = min(min(line.get_ydata()) for line in axes.lines)
        assert (lowest == LOWEST_LOSS) == (noise == 0)
        minor = [label.get_text() for label in axes.get_yticklabels(minor=True)]
        assert any(minor) == (noise > 0)


@pytest.mark.parametrize("names", [["none"], ["NVIDIA H200"], ["none", "NVIDIA H200", "none"]])
def test_the_histograms_say_what_was_timed(names: list[str]) -> None:
    """Seconds are those of a processor, which the line below names."""
    machines = [{"accelerator": name} for name in names]
    sweep = replace(MIXED, provenance=MIXED.provenance | {"trained_on": machines})
    line = next(text for text in texts(epochs_figure(sweep, 3.0)) if text.startswith("MNIST"))
    named = " and ".join(sorted("CPU" if name == "none" else name for name in set(names)))
    assert " ".join(line.split()) == f"{budget(sweep)}; timed on {named}"


@pytest.mark.parametrize("seconds", [0.4, 3.0, 100.0])
def test_the_histograms_count_the_kept_runs(seconds: float) -> None:
    """The bars of each task and model add up to its kept runs, each at the epochs that it finished."""
    panels = epochs_figure(MIXED, seconds).axes
    within = comparison.epochs_within(MIXED, seconds)
    for axes, task in zip(panels, TASKS, strict=False):
        here = within[within["task"] == task]
        assert bar_heights(axes) == here["model"].value_counts().to_dict()
        for patch in axes.patches:
            near = round(patch.get_x() + patch.get_width() / 2)
            model = next(m for m in MODELS if MODEL_COLORS[m] == to_hex(patch.get_facecolor()))
            count = ((here["model"] == model) & (here["epochs_within"] == near)).sum()
            assert patch.get_height() == count
        assert axes.get_title() == task
        assert f"{seconds:g} s" in axes.get_xlabel()


def test_the_solver_steps_are_medians_over_the_runs() -> None:
    """A line per model and direction through the median steps of each epoch, within its middle half."""
    panels = epochs_figure(MIXED, 3.0).axes[len(TASKS) :]
    kept = comparison.kept_runs(MIXED.runs)[["key", "task", "model"]]
    epochs = MIXED.epochs[MIXED.epochs["epoch"] > 0].merge(kept, on="key")
    for axes, task in zip(panels, TASKS, strict=True):
        drawn = {line.get_label(): line for line in axes.lines}
        assert len(drawn) == 4
        for model, name in zip(MODELS, ("bilevel", "DEQ"), strict=True):
            here = epochs[(epochs["task"] == task) & (epochs["model"] == model)]
            for direction in ("forward", "backward"):
                line = drawn[f"{name}, {direction}"]
                assert line.get_color() == MODEL_COLORS[model]
                assert list(line.get_xdata()) == [1, 2, 3, 4]
                medians = [np.median(here.loc[here["epoch"] == e, f"{direction}_steps"]) for e in range(1, 5)]
                assert np.allclose(line.get_ydata(), medians)
        for axis in panels[1:]:
            assert axis.get_ylim() == panels[0].get_ylim()


def budget(sweep: Sweep) -> str:
    return sweep_budget(sweep.profile, sweep.provenance)


def test_the_budget_of_a_sweep() -> None:
    """Data, profile, configurations, images and epochs; missing runs are named, if there are any."""
    line = budget(MIXED)
    missing = int((MIXED.runs["status"] == "not run").sum())
    assert missing > 0
    for part in ("MNIST 14x14", "profile quick", "72 configurations", "20,000 training images", "4 epochs"):
        assert part in line
    assert "100 test images" in line
    assert line.endswith(f"{missing} configurations not run")
    assert "not run" not in budget(COMPLETE)
    assert "profile paper" in budget(replace(COMPLETE, profile="paper"))
    several = make_sweep({c: record(0.9) for c in grid("smoke", epochs=[2, 5])}, "smoke")
    assert "2 or 5 epochs" in budget(several)


@pytest.mark.parametrize(("name", "case"), list(product(DRAWINGS, DEGENERATE)))
def test_a_figure_of_little_is_drawn(name: str, case: str) -> None:
    """A sweep that lacks runs, tasks or a model makes a picture with its budget, and no warning."""
    sweep = DEGENERATE[case]()
    fig = DRAWINGS[name](sweep)
    said = [" ".join(text.split()) for text in texts(fig)]
    timed = name == "epochs" and sweep.provenance["trained_on"]
    assert budget(sweep) + ("; timed on CPU" if timed else "") in said
    fig.draw_without_rendering()


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_saved_figure_has_its_numbers_and_its_provenance(name: str, tmp_path: Path) -> None:
    """PNG, PDF and CSV with their digests, the same each time, and the sweep's axes, counts and code."""
    table = comparison.outcome_table(SMALL.runs)
    fig = DRAWINGS[name](SMALL)
    folder = save("fig", fig, table, SMALL, "quick", tmp_path)
    assert folder == tmp_path / "quick" / "fig"
    files = {"fig.png", "fig.pdf", "fig.csv"}
    assert {path.name for path in folder.iterdir()} == files | {"provenance.json"}
    provenance = json.loads((folder / "provenance.json").read_text())
    assert set(provenance["sha256"]) == files
    for file, digest in provenance["sha256"].items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest
    assert (provenance["figure"], provenance["profile"]) == ("fig", "quick")
    assert provenance["code"] == code_version()
    for part in ("axes", "shared", "statuses", "data"):
        assert provenance[part] == json.loads(json.dumps(SMALL.provenance[part]))
    assert sum(provenance["statuses"].values()) == len(SMALL.runs)
    assert (folder / "fig.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "fig.pdf").read_bytes().startswith(b"%PDF")
    with (folder / "fig.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["task", "model", *comparison.OUTCOMES]
    assert [[int(number) for number in row[2:]] for row in rows[1:]] == table.to_numpy().tolist()
    assert_same_files(folder, save("fig", fig, table, SMALL, "quick", tmp_path / "again"))


def test_questions_are_kept_with_the_figure(tmp_path: Path) -> None:
    """Question, answer, numbers and rule, sealed in the provenance; no file where nothing is asked."""
    fig, table = loss_figure(SMALL), SMALL.runs
    questions = [comparison.Question("is it so?", comparison.YES, "3 pairs", "count them")]
    folder = save("fig", fig, table, SMALL, "quick", tmp_path, questions)
    content = (folder / "questions.json").read_bytes()
    kept = {"question": "is it so?", "answer": "yes", "numbers": "3 pairs", "rule": "count them"}
    assert json.loads(content) == [kept]
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["sha256"]["questions.json"] == hashlib.sha256(content).hexdigest()
    assert not (save("none", fig, table, SMALL, "quick", tmp_path) / "questions.json").exists()


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_figure_is_drawn_the_same_each_time(name: str, tmp_path: Path) -> None:
    """Drawn anew it has the same bytes again, as picture and as PDF."""
    folders = [save("fig", DRAWINGS[name](SMALL), SMALL.runs, SMALL, "quick", tmp_path / p) for p in "ab"]
    assert_same_files(*folders)


def test_stored_losses_are_recomputed_from_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights of one run per task and model give its test loss, if its solves converged."""
    small = {"task": "denoising", "tau": 0.5, "train_images": 20, "test_images": 10, "batch_size": 10}
    for config in grid("smoke", **small):
        get_run(config, tmp_path)
    runs = get_sweep("smoke", tmp_path, train=False, **small).runs
    assert not runs["test_unconverged"].any()
    check_stored_losses(runs, tmp_path)
    assert len(capsys.readouterr().out.splitlines()) == 1
    for row, factor in product(runs.index, (0.5, 1.5)):
        changed = runs.copy()
        changed.loc[row, "test_loss"] *= factor
        with pytest.raises(AssertionError, match=r"stored 0\.\d"):
            check_stored_losses(changed, tmp_path)
        changed.loc[row, "test_unconverged"] = 0.1
        check_stored_losses(changed, tmp_path)


@given(
    loss=st.floats(0, 4),
    tol=st.sampled_from([1e-3, 1e-5]),
    apart=st.floats(0, 1.5).filter(lambda apart: abs(apart - 1) > 1e-3),
)
def test_a_loss_is_kept_as_exactly_as_solves_define_it(loss: float, tol: float, apart: float) -> None:
    """Images up to `SPREAD` tolerances apart; any loss where not all solves converged, then or now."""
    mse = (math.sqrt(loss) + apart * SPREAD * tol) ** 2
    run = Run("key", RunConfig(tol=tol), "completed", "", pd.DataFrame(), {}, {})
    nothing = torch.zeros(1)
    for unconverged in (0.0, 0.01):
        table = pd.DataFrame({"mse": [mse], "unconverged": [unconverged]}, index=["deq"])
        result = Reconstructions({"deq": run}, nothing, nothing, {}, {}, table)
        assert keeps_loss(result, "deq", loss, 0.0) == (apart < 1 or unconverged > 0)
        assert keeps_loss(result, "deq", loss, 0.01)


# matplotlib hands torch's tensors to NumPy in a way that NumPy will not take for ever.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_reconstructions_stand_in_the_column_of_their_model() -> None:
    """A block of columns per model, bilevel first: its own images under its own name and numbers."""
    generator = torch.Generator().manual_seed(0)
    truth, observed, *images = torch.rand(6, 5, 7, 7, generator=generator) * 2 - 1
    configs = {model: RunConfig(model=model, size=7) for model in MODELS}
    runs = {
        model: Run("key", config, "completed", "", pd.DataFrame(), {}, {})
        for model, config in configs.items()
    }
    outputs, forwarded = (
        dict(zip(MODELS, images[:2], strict=True)),
        dict(zip(MODELS, images[2:], strict=True)),
    )
    table = pd.DataFrame(
        {"psnr": [10.0, 20.0, 30.0], "ssim": [0.1, 0.2, 0.3]}, index=["input", "bilevel", "deq"]
    )
    shown = Reconstructions(runs, truth, observed, outputs, forwarded, table)
    fig = reconstruction_figure(shown, ["truth", "input", "K output", "output"], "quick", count=3)
    grid = np.array(fig.axes).reshape(4, 2)
    assert [axes.get_title().partition(" (")[0] for axes in grid[0]] == [
        "bilevel: 20.0 dB, SSIM 0.20",
        "DEQ: 30.0 dB, SSIM 0.30",
    ]
    assert [axes.get_ylabel() for axes in grid[:, 0]] == ["truth", "input", "$K$ output", "output"]
    for column, model in zip(grid.T, MODELS, strict=True):
        for axes, row in zip(column, (truth, observed, forwarded[model], outputs[model]), strict=True):
            strip = np.concatenate(list(row[:3].numpy()), axis=1)
            assert np.array_equal(np.asarray(axes.images[0].get_array()), strip)
            assert axes.images[0].get_clim() == (-1, 1)
