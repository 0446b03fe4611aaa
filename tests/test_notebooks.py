"""The figures' notebooks: parameters, failures that change nothing, files with provenance."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from papermill.exceptions import PapermillExecutionError
from PIL import Image

from lib.experiments.config import ConfigError
from lib.pages import notebooks

NAMES = sorted(path.stem.partition("_")[0] for path in notebooks.NOTEBOOKS.glob("fig*.ipynb"))


SMOKED = [name for name in NAMES if name not in ("fig10", "fig11", "fig12", "fig14", "fig15", "fig16")]
"""The notebooks of kernels differ from each other in a task, a model and a size."""


def cells(name: str) -> list[Any]:
    return list(nbformat.read(notebooks.notebook_path(name), as_version=4).cells)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_reads_as_a_page(name: str) -> None:
    """A title, one cell of parameters, stored outputs without an error, and a reading at the end."""
    book = cells(name)
    assert book[0].cell_type == "markdown"
    assert book[0].source.startswith(f"# Figure {int(name[3:])}")
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in book) == 1
    assert any(cell.source.startswith("## What one sees") for cell in book)
    outputs = [out for cell in book if cell.cell_type == "code" for out in cell.outputs]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    assert all(out.output_type != "error" for out in outputs)


@pytest.mark.parametrize("name", SMOKED)
def test_notebook_makes_its_files(name: str, tmp_path: Path) -> None:
    """The smoke profile writes picture, PDF, numbers, executed notebook and provenance."""
    folder = notebooks.run(name, "smoke", {"seed": 1}, tmp_path)
    assert folder == tmp_path / "smoke" / name
    with Image.open(folder / f"{name}.png") as picture:
        assert picture.width > 1000
    assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert not pd.read_csv(folder / f"{name}.csv").empty
    executed = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    assert any("seed = 1" in cell.source for cell in executed.cells)
    provenance = json.loads((folder / "provenance.json").read_text())
    decides = any("claims = " in cell.source for cell in cells(name))
    assert ("claims.json" in provenance["sha256"]) == decides
    shared = [provenance["shared"]] if "shared" in provenance else provenance["runs"].values()
    assert {values["seed"] for values in shared} == {1}
    for file, digest in provenance["sha256"].items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest


def test_sweep_notebook_takes_other_axes(tmp_path: Path) -> None:
    """A list makes an axis wider, a single value narrower, and what was trained is all in the tables."""
    chosen = {"task": "denoising", "noise": [0.1, 0.5], "tau": 0.5}
    folder = notebooks.run("fig05", "smoke", chosen, tmp_path)
    best = pd.read_csv(folder / "fig05.csv")
    assert list(best[["noise", "model"]].itertuples(index=False, name=None)) == [
        (0.1, "bilevel"),
        (0.1, "deq"),
        (0.5, "bilevel"),
        (0.5, "deq"),
    ]
    runs = pd.read_parquet(tmp_path / "smoke" / "sweep_runs.parquet")
    assert (len(runs), set(runs["task"]), set(runs["tau"])) == (4, {"denoising"}, {0.5})


def test_a_photograph_of_ones_own_is_reconstructed(tmp_path: Path) -> None:
    """From a path, with the committed kernels, into a picture of its size."""
    Image.new("RGB", (30, 40), (90, 120, 60)).save(tmp_path / "photo.png")
    notebooks.run("reconstruct", "smoke", {"image": str(tmp_path / "photo.png")}, tmp_path)
    with Image.open(tmp_path / "reconstruct" / "reconstruction.png") as picture:
        assert (picture.mode, picture.size) == ("L", (30, 40))


def test_failure_leaves_the_old_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A notebook that fails changes nothing in its folder; the failed copy stays until it succeeds."""
    folder = notebooks.run("fig02", "smoke", {}, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(PapermillExecutionError):
        notebooks.run("fig02", "smoke", {"digits": "eight"}, tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (folder.parent / "fig02.failed.ipynb").exists()
    notebooks.run("fig02", "smoke", {}, tmp_path)
    assert not (folder.parent / "fig02.failed.ipynb").exists()


@pytest.mark.parametrize(
    ("name", "parameters", "said"),
    [
        ("fig02", {"gama": 1.0}, "gama: no such parameter"),
        ("fig02", {"gamma": -1.0}, "gamma: got -1.0"),
        ("fig01", {"threshold": "half"}, "threshold: got 'half'"),
        ("fig05", {"train": "no"}, "train: got 'no'"),
        ("fig06", {"seconds": 0}, "seconds: got 0"),
        ("fig06", {"tau": [0.1, -1]}, "tau: got -1"),
        ("fig07", {"filters": 0}, "filters: got 0"),
        ("fig08", {"dataset": "nowhere"}, "dataset: got 'nowhere'"),
        ("fig13", {"initial": "third"}, "initial: got 'third'"),
        ("reconstruct", {"task": "inpainting"}, "task, model, filters: got inpainting"),
        ("reconstruct", {"image": "nowhere.png"}, "nowhere.png cannot be read"),
        ("fig99", {}, "notebook: got 'fig99'"),
    ],
)
def test_bad_parameters_are_refused(name: str, parameters: dict[str, Any], said: str, tmp_path: Path) -> None:
    """A parameter that does not exist or makes no sense gets one line, and nothing is trained."""
    with pytest.raises(ConfigError, match=said) as refusal:
        notebooks.run(name, "smoke", parameters, tmp_path)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("runs/*"))


def test_unknown_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="profile: got 'huge', allowed: smoke, quick, paper"):
        notebooks.run("fig02", "huge", {}, tmp_path)


def test_exit_status_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """make sees a failure, with one line that says which figure and why."""
    assert notebooks.main(["run", "fig02", "--profile", "huge"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("fig02: profile: got 'huge'")
    assert "\n" not in said
