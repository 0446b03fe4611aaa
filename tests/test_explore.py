"""The explorer: its table is the store's, its pictures are the table's, the controls choose among them."""

from __future__ import annotations

import io
import shutil
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from cases import TINY
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from lib.experiments import problem, runs
from lib.experiments import sweep as sweeps
from lib.experiments.config import ConfigError, RunConfig
from lib.experiments.data import DataError
from lib.experiments.problem import load_images, make_operator
from lib.experiments.profiles import grid
from lib.experiments.runs import get_run, run_key
from lib.experiments.store import DamagedFile
from lib.experiments.sweep import Sweep, get_sweep, load_sweep, load_table, table_folder
from lib.figures.reconstructions import reconstruct
from lib.figures.style import MODEL_COLORS
from lib.models import MODELS
from lib.pages import explore, notebooks
from lib.pages.explore import axes, collect, explorer, main, panel, select, write_table

VALUES: dict[str, Any] = {
    "task": ["inpainting", "denoising"],
    "noise": [0.1, 0.5],
    "sigma": ["relu", "identity"],
    "gamma": [0.1, 1.0],
    "tau": [0.5, 0.1],
}
CONFIGS = grid("quick", **VALUES)
REASON = "training loss nan above 1000 in epoch 1, step 3"


def record(config: RunConfig) -> dict[str, Any] | None:
    """A made-up run: most complete, and some diverged at once or later, ran out of time or are missing."""
    number = CONFIGS.index(config)
    rng = np.random.default_rng(number)
    history: list[dict[str, Any]] = []
    for epoch in range(4):
        row = {"epoch": epoch, "seconds": 0.5 * epoch, "test_loss": rng.uniform(0.1, 0.4)}
        row |= {"test_psnr": rng.uniform(10, 20)}
        if epoch:
            row |= {"forward_steps": rng.uniform(3, 50), "backward_steps": rng.uniform(3, 50)}
        history.append(row)
    status, reason = "completed", ""
    if config.noise == 0.5 and config.gamma == 1.0:
        status, reason = ("diverged", REASON) if config.tau == 0.5 else ("out of time", "time budget spent")
        history = history[:1] if config.sigma == "relu" else []
    if config.noise == 0.5 and config.gamma == 0.1 and config.tau == 0.5 and config.model == "deq":
        return None
    provenance = {"seconds": 2.0, "environment": {"accelerator": "none"}, "code": "here"}
    return {"status": status, "reason": reason, "history": history, "provenance": provenance}


def made_up(configs: list[RunConfig]) -> Sweep:
    """A table of runs that were never trained, with random images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "read_record", lambda config, results=None: record(config))
        sweep = load_sweep("quick", configs)
    rng = np.random.default_rng(0)
    for name in ("truth", "input", "output"):
        sweep.runs[name] = [rng.bytes(14 * 56) for _ in configs]
    sweep.runs.loc[sweep.runs["status"] != "completed", "output"] = None
    return sweep


TABLE = made_up(CONFIGS)
SELECTIONS = [dict(zip(VALUES, levels, strict=True)) for levels in product(*VALUES.values())]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results with the made-up table."""
    write_table(TABLE, tmp_path)
    return tmp_path


def config_of(selection: dict[str, Any], model: str) -> RunConfig:
    """The configuration of a selection, found without the table."""
    wanted = selection | {"model": model}
    (found,) = (c for c in CONFIGS if all(getattr(c, name) == value for name, value in wanted.items()))
    return found


@cache
def drawn(number: int) -> Figure:
    """The panel of a selection."""
    return panel(TABLE, **SELECTIONS[number])


def texts(ax: Axes) -> str:
    return " ".join(" ".join(text.get_text() for text in ax.texts).split())


def drawn_lines(axes: Axes) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Points of the models' lines, by colour and style, without those that are missing."""
    lines = {}
    for line in axes.lines:
        if to_hex(line.get_color()) in MODEL_COLORS.values():
            points = np.array(line.get_xydata(), float)
            key = (to_hex(line.get_color()), str(line.get_linestyle()))
            lines[key] = [(x, y) for x, y in points.tolist() if not np.isnan(y)]
    return lines


def test_what_is_written_is_what_is_loaded(results: Path) -> None:
    """Tables, images and provenance come back as they were, without the columns that are left out."""
    table = load_table("quick", results)
    pd.testing.assert_frame_equal(table.runs, TABLE.runs[list(table.runs)], check_dtype=False)
    pd.testing.assert_frame_equal(table.epochs, TABLE.epochs.reindex(columns=table.epochs.columns))
    assert (table.profile, set(table.provenance["sha256"])) == ("quick", set(sweeps.TABLES))
    assert table.provenance["code"] == runs.code_version()
    assert TABLE.provenance.items() <= table.provenance.items()


def test_axes_are_the_tables_levels() -> None:
    """Words in the order of the grid, numbers by size; the first of each is the default selection."""
    expected = {name: v if isinstance(v[0], str) else sorted(v) for name, v in VALUES.items()}
    assert axes(TABLE) == expected
    assert select(TABLE) == {name: levels[0] for name, levels in expected.items()}
    assert select(TABLE, tau=0.5, noise=None)["tau"] == 0.5


@pytest.mark.parametrize("number", range(len(SELECTIONS)))
def test_a_panel_is_the_tables_numbers_and_images(number: int) -> None:
    """Losses and solver steps of both models, each in its colour, epoch by epoch; truth, input and both
    reconstructions, or what became of the run."""
    selection = SELECTIONS[number]
    losses, steps = drawn(number).axes[:2]
    for model in MODELS:
        stored = record(config_of(selection, model)) or {"history": []}
        history = stored["history"]
        color = MODEL_COLORS[model]
        (points,) = [points for (own, _), points in drawn_lines(losses).items() if own == color]
        assert points == [(row["epoch"], row["test_loss"]) for row in history]
        for direction, style in (("forward", "-"), ("backward", ":")):
            expected = [(row["epoch"], row[f"{direction}_steps"]) for row in history[1:]]
            assert drawn_lines(steps)[color, style] == expected
    strips = drawn(number).axes[2:]
    assert [ax.get_ylabel() for ax in strips] == ["truth", "input", "bilevel", "DEQ"]
    rows = TABLE.runs.set_index("key").loc[[run_key(config_of(selection, model)) for model in MODELS]]
    images = [rows["truth"].iloc[0], rows["input"].iloc[0], *rows["output"]]
    for ax, image in zip(strips, images, strict=True):
        assert [np.asarray(shown.get_array()).tobytes() for shown in ax.images] == [image] * (
            image is not None
        )
    for ax, (_, row) in zip(strips[2:], rows.iterrows(), strict=True):
        said = f"{row['status']}: {row['reason']}" if row["reason"] else row["status"]
        assert texts(ax) == ("" if row["status"] == "completed" else said)


def test_picture_says_where_it_is_from() -> None:
    """Data, selection, profile and budget in the line below."""
    fig = panel(TABLE, task="denoising", noise=0.5, gamma=0.1, tau=0.5, sigma="identity")
    said = " ".join(fig.texts[-1].get_text().split())
    assert "MNIST 14x14, denoising, noise 0.5" in said
    assert "identity; profile quick: 320 training images, 5 epochs; 100 test images" in said


def test_a_table_of_one_model_is_drawn() -> None:
    """There is then one reconstruction."""
    table = made_up([config for config in CONFIGS if config.model == "deq"])
    assert [ax.get_ylabel() for ax in panel(table).axes[2:]] == ["truth", "input", "DEQ"]


@pytest.mark.parametrize("name", list(VALUES))
def test_each_control_changes_the_picture(name: str) -> None:
    """It starts at the given selection and draws what is chosen, and the old picture comes back."""
    first = {"task": "denoising", "noise": 0.1, "sigma": "relu", "gamma": 0.1, "tau": 0.1}
    chooser = explorer(TABLE, **first)
    controls = {control.description: control for control in chooser.children[:-1]}
    assert {own: control.value for own, control in controls.items()} == first
    before = chooser.result.data
    assert before == explore.picture(TABLE, **first)
    with Image.open(io.BytesIO(before)) as decoded:
        assert decoded.width > 900
    (other,) = (level for level in VALUES[name] if level != first[name])
    controls[name].value = other
    assert chooser.result.data == explore.picture(TABLE, **first | {name: other}) != before
    controls[name].value = first[name]
    assert chooser.result.data == before


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ({"noise": 0.3}, "noise: got 0.3, allowed: 0.1, 0.5"),
        ({"task": "sharpening"}, "task: got 'sharpening', allowed: inpainting, denoising"),
        ({"tau": [0.1]}, r"tau: got \[0.1\], allowed: 0.1, 0.5"),
        ({"sigm": "relu"}, "sigm: no such parameter, allowed: task, noise, sigma, gamma, tau"),
    ],
)
def test_unknown_selections_are_refused(selection: dict[str, Any], said: str) -> None:
    for use in (panel, explorer):
        with pytest.raises(ConfigError, match=f"^{said}$"):
            use(TABLE, **selection)


@pytest.mark.parametrize("name", ["provenance.json", *sweeps.TABLES])
def test_a_damaged_or_missing_file_is_told(name: str, results: Path) -> None:
    """One byte is enough; the line names the file, and the command that makes it."""
    path = table_folder("quick", results) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 128
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match=f"^{path}: it (is not the file|does not list)"):
        load_table("quick", results)
    path.unlink()
    with pytest.raises(DataError, match=f"^{path} is missing; .* collect --profile quick") as told:
        load_table("quick", results)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("content", ["[]", '{"sha256": 3}', '{"sha256": {}}'])
def test_damaged_provenance_is_refused(content: str, results: Path) -> None:
    path = table_folder("quick", results) / "provenance.json"
    path.write_text(content)
    with pytest.raises(DamagedFile, match=f"^{path}: it does not list the table's checksums$"):
        load_table("quick", results)


def test_an_unknown_profile_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^profile: got 'huge', allowed: smoke, quick, overnight, paper$"):
        load_table("huge")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with a tiny sweep."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "workers", lambda device: 1)
        get_sweep("smoke", folder, **TINY)
    return folder


@pytest.fixture
def store(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of these results in the place of the repository's, with which nothing can be trained."""
    folder: Path = shutil.copytree(trained, tmp_path / "store")
    for module in (runs, sweeps):
        monkeypatch.setattr(module, "RESULTS", folder)
    monkeypatch.setattr(runs, "Trainer", None)
    return folder


def assert_shown(strip: bytes, images: torch.Tensor) -> None:
    """The bytes are the first four of the images `(N, H, W)`, as well as 256 shades can show them."""
    height, width = images.shape[1:]
    pixels = torch.frombuffer(bytearray(strip), dtype=torch.uint8).reshape(height, 4, width).movedim(1, 0)
    assert (pixels / 255 * 2 - 1 - images[:4].clamp(-1, 1)).abs().max() <= 1.001 / 255


def test_what_is_collected_is_the_stores(store: Path) -> None:
    """Both tables; truth, data and fixed points of the first test digits, which failed runs have not; what
    else the sweep varies can be chosen too."""
    assert collect("smoke", **TINY) == store / "smoke" / "sweep"
    table, configs = load_table("smoke"), grid("smoke", **TINY)
    sweep = load_sweep("smoke", configs)
    pd.testing.assert_frame_equal(table.runs[explore.KEPT], sweep.runs[explore.KEPT], check_dtype=False)
    pd.testing.assert_frame_equal(table.epochs, sweep.epochs[explore.HISTORY])
    assert set(table.runs["status"]) == {"completed", "diverged", "out of time"}
    assert ((table.runs["status"] == "completed") == table.runs["output"].notna()).all()
    rows = table.runs.set_index("key")
    for config in configs:
        truth, row = load_images(config)["test"], rows.loc[run_key(config)]
        f = make_operator(config).forward(truth) + config.noise * problem.test_noise(config)
        assert_shown(row["truth"], truth[:, 0])
        assert_shown(row["input"], f[:, 0])
        if row["status"] == "completed":
            assert_shown(row["output"], reconstruct({"": get_run(config, store)}).outputs[""])
    assert axes(table)["time_budget"] == [1e-6, 3600.0]
    late = panel(table, time_budget=1e-6, tau=0.5)
    assert [texts(ax) for ax in late.axes[4:]] == ["out of time: time budget of 1e-06 s spent in epoch 1"] * 2
    assert all(ax.images for ax in panel(table, time_budget=3600.0, tau=0.5).axes[2:])


def test_weights_of_another_loss_are_not_collected(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose weights do not give its stored loss ends the collection, and nothing is written."""

    def altered(*args: Any) -> sweeps.Sweep:
        sweep = load_sweep(*args)
        sweep.runs["test_loss"] *= 1.5
        return sweep

    monkeypatch.setattr(explore, "load_sweep", altered)
    with pytest.raises(RuntimeError, match="its weights give the test loss"):
        collect("smoke", **TINY)
    assert not table_folder("smoke").exists()


def test_the_command_makes_the_table(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It names the folder and counts the runs."""
    arguments = [text for name, value in TINY.items() for text in ("-p", name, str(value))]
    assert main(["collect", "--profile", "smoke", *arguments]) == 0
    folder, _, counts = capsys.readouterr().out.strip().partition(": ")
    assert folder == str(store / "smoke" / "sweep")
    assert sorted(counts.split(", ")) == ["4 completed", "4 out of time", "8 diverged"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--profile", "huge"], 2, "explore: profile: got 'huge', allowed: smoke, quick, overnight, paper"),
        (["-p", "tau", "-1.0"], 2, "explore: tau: got -1.0, allowed: greater than 0"),
        (
            ["-p", "size", "[14, 28]"],
            2,
            "explore: size: got [14, 28], allowed: one size for all images of a table",
        ),
        ([], 1, "explore: no quick run is stored; `make sweep PROFILE=quick` trains them"),
    ],
)
def test_the_command_tells_what_is_wrong(
    arguments: list[str], code: int, said: str, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, and no table is written."""
    assert main(["collect", *arguments]) == code
    assert capsys.readouterr().err == f"{said}\n"
    assert not table_folder("quick").exists()


def test_the_notebook_runs_on_a_table(results: Path) -> None:
    """Controls, picture and checks of the table that it is given, from the given selection on."""
    chosen = {"task": "inpainting", "noise": 0.5, "sigma": "identity", "gamma": 0.1, "tau": 0.5}
    folder = notebooks.run("explore", "quick", chosen, results)
    book = nbformat.read(folder / "explore.ipynb", as_version=4)
    outputs = [out.get("data", {}) for cell in book.cells for out in cell.get("outputs", [])]
    assert sum("image/png" in data for data in outputs) == 1
    assert sum("application/vnd.jupyter.widget-view+json" in data for data in outputs) == 1
    assert any("'tau': [0.1, 0.5]" in data.get("text/plain", "") for data in outputs)
    state = book.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"].values()
    indices = {w["state"]["description"]: w["state"]["index"] for w in state if "index" in w["state"]}
    assert indices == {name: axes(TABLE)[name].index(value) for name, value in chosen.items()}
