"""The notebooks: parameters, written files, and failures without side effects."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from papermill.exceptions import PapermillExecutionError
from PIL import Image

from lib.experiments.config import ConfigError
from lib.experiments.profiles import ARMS, PROFILES
from lib.pages import notebooks

FIGURES = [name for name in notebooks.PAGES if name.startswith("fig")]

SMOKE_FIGURES = ["fig01", "fig02", "fig05", "fig06", "fig07", "fig08", "fig09", "fig13", "fig17"]
"""Figures that are executed here; the others differ from them in values alone."""


def cells(name: str) -> list[Any]:
    return list(nbformat.read(notebooks.notebook_path(name), as_version=4).cells)


@pytest.mark.parametrize("name", FIGURES)
def test_figure_notebook_has_all_parts(name: str) -> None:
    """A title, one cell of parameters, their table, a picture, results, and no error."""
    page = cells(name)
    assert page[0].source.startswith(f"# Figure {int(name[3:])}")
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in page) == 1
    assert any("_table(" in cell.source for cell in page if cell.cell_type == "code")
    assert any(cell.source.startswith("## Results") for cell in page)
    outputs = [output for cell in page if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(output.output_type != "error" for output in outputs)


@pytest.mark.parametrize("profile", PROFILES)
def test_parameters_are_valid_and_described(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in notebooks.PAGES:
        notebooks.require(name, profile, {})
        known = notebooks.cell_parameters(name)
        assert all(field.description for key, (_, field) in known.items() if key == "train")
    assert notebooks.main(["run", "fig03", "--profile", profile, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("noise", "float <= 10, >= 0", "standard deviation", "digits"))


@pytest.mark.parametrize("name", SMOKE_FIGURES)
def test_figure_writes_its_files(name: str, tmp_path: Path) -> None:
    """The smoke profile writes picture, PDF, numbers, executed notebook and provenance."""
    ours = {"our_seeds": 1} if "our_seeds" in notebooks.cell_parameters(name) else {}
    folder = notebooks.run(name, "smoke", {"seed": 1} | ours, tmp_path)
    assert folder == tmp_path / "smoke" / name
    with Image.open(folder / f"{name}.png") as picture:
        assert picture.width > 1000
    assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert not pd.read_csv(folder / f"{name}.csv").empty
    assert (folder / f"{name}.ipynb").exists()
    provenance = json.loads((folder / "provenance.json").read_text())
    shared = [provenance["shared"]] if "shared" in provenance else provenance["runs"].values()
    assert {values["seed"] for values in shared} == {1}
    for file, digest in provenance["sha256"].items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("name", ["bsd68", "free_c", "hypergradients", "scaling", "tomography", "weight"])
def test_notebook_writes_its_files(name: str, tmp_path: Path) -> None:
    folder = notebooks.run(name, "smoke", {}, tmp_path)
    assert {path.suffix for path in folder.iterdir()} >= {".ipynb", ".png", ".csv"}


def test_bsd68_accepts_own_folders(tmp_path: Path) -> None:
    """Train on the pieces and test on the images of two folders."""
    for name, count, side in (("train", 36, 20), ("test", 2, 24)):
        (tmp_path / name).mkdir()
        for i in range(count):
            ramp = np.add.outer(np.arange(side), (i + 1) * np.arange(side)) % 256
            Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / name / f"{i}.png")
    folders = {"train_folder": str(tmp_path / "train"), "dataset": str(tmp_path / "test")}
    tiny = {"filters": 2, "filter_size": 3, "pieces": 4, "side": 16, "epochs": 1, "short_epochs": 1}
    folder = notebooks.run("bsd68", "smoke", folders | tiny, tmp_path)
    assert pd.read_csv(folder / "bsd68.csv")["image"].nunique() == 2
    kernels = json.loads((folder / "weakly-convex-deq-25.json").read_text())
    assert np.shape(kernels["C"]) == (2, 3, 3)


def test_list_is_an_axis_of_grid(tmp_path: Path) -> None:
    chosen = {"task": "denoising", "noise": [0.1, 0.5], "tau": 0.5}
    folder = notebooks.run("fig05", "smoke", chosen, tmp_path)
    assert pd.read_csv(folder / "fig05.csv")["noise"].tolist() == [0.1] * 3 + [0.5] * 3
    runs = pd.read_parquet(tmp_path / "smoke" / "sweep_runs.parquet")
    assert (len(runs), set(runs["task"]), set(runs["tau"])) == (6, {"denoising"}, {0.5})


def test_provenance_lists_every_seed(tmp_path: Path) -> None:
    """A run is committed only if the provenance of its figure lists it."""
    folder = notebooks.run("fig02", "smoke", {"seed": 4, "seeds": 2}, tmp_path)
    provenance = json.loads((folder / "provenance.json").read_text())
    runs = [*provenance["runs"].values(), *provenance.get("histories", {}).values()]
    assert sorted((run["model"], run["seed"]) for run in runs) == sorted(
        (arm["model"], seed) for arm in ARMS.values() for seed in (4, 5)
    )


def test_photograph_is_reconstructed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The path has special characters, and the picture the size of the photograph."""
    photograph = tmp_path / "a: 'b' #2.png"
    Image.new("RGB", (30, 40), (90, 120, 60)).save(photograph)
    asked = ["-p", "image", str(photograph), "-p", "noise", "None", "-p", "results", str(tmp_path / "007")]
    assert notebooks.main(["run", "reconstruct", *asked]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1].rpartition("  (")[0])
    assert folder.is_relative_to(tmp_path / "007" / "reconstruct")
    assert {path.name for path in folder.iterdir()} >= {"reconstruct.ipynb", "reconstruction.png"}
    with Image.open(folder / "reconstruction.png") as picture:
        assert (picture.mode, picture.size) == ("L", (30, 40))


def test_failure_keeps_old_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed notebook changes nothing in its folder; its copy stays until the notebook succeeds."""
    page = nbformat.read(notebooks.notebook_path("fig02"), as_version=4)
    parameters = next(cell for cell in page.cells if "parameters" in cell.metadata.get("tags", []))
    page.metadata["kernelspec"]["name"] = "conda-env-imaging"
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)

    def run(source: str) -> Path:
        page.cells = [parameters, nbformat.v4.new_code_cell(source)]
        nbformat.write(page, tmp_path / "fig02_mnist_denoising.ipynb")
        return notebooks.run("fig02", "smoke", {}, tmp_path / "results")

    folder = run("print(digits)")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(PapermillExecutionError):
        run("digits / 0")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (folder.parent / "fig02.failed.ipynb").exists()
    run("print(digits)")
    assert not (folder.parent / "fig02.failed.ipynb").exists()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("fig99", [], "`notebook` must be one of "),
        ("fig02", ["digits", "x"], "`digits` must be an integer, got 'x'."),
        ("fig02", ["noise", "-1"], "`noise` must be a number of at least 0, got -1."),
        ("fig02", ["nois", "1"], "`nois` is not a parameter; choose from profile, "),
        ("fig02", ["model", "deq"], "`model` is not a parameter; choose from profile, "),
        ("fig01", ["tau", "[0.1, x]"], "`tau` must be a number, got 'x'."),
        ("fig09", ["filter_size", "4"], "`filter_size` must be an odd number, got 4."),
        ("fig02", ["results", "/proc/x"], "`results` /proc/x cannot be created"),
        ("reconstruct", ["clean", "maybe"], "`clean` must be True or False, got 'maybe'."),
    ],
)
def test_invalid_arguments_are_rejected_before_execution(
    name: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(notebooks, "run", None)
    options = ["-p", *arguments] if arguments else []
    assert notebooks.main(["run", name, "--profile", "smoke", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{name}: {message}")
    assert error.count("\n") == 1


def test_invalid_notebook_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path)
    path = tmp_path / "fig03_mnist_inpainting.ipynb"
    path.write_text("<<<<<<< HEAD")
    assert notebooks.main(["run", "fig03"]) == 2
    assert capsys.readouterr().err.startswith(f"fig03: {path} is not a valid notebook")


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("fig08", {"dataset": "nowhere"}, "`dataset` must be .*, got 'nowhere'"),
        ("fig08", {"image": 9}, "`image` must be a number from 0 to 1, got 9."),
        ("reconstruct", {"run": "0" * 20}, "`run` must be the key of a run in .*, got '0+'"),
    ],
)
def test_invalid_parameters_are_rejected_before_training(
    name: str, chosen: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        notebooks.run(name, "smoke", chosen, tmp_path)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("runs/*"))


def test_interrupt_cancels_remaining_notebooks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def run(name: str, *arguments: object) -> Path:
        started.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(notebooks, "run", run)
    assert notebooks.main(["run", "fig02", "fig03", "--profile", "smoke"]) == 130
    assert started == ["fig02"]
    assert capsys.readouterr().err == "interrupted; run the same command again to resume\n"


def test_failed_figure_does_not_stop_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, *arguments: object) -> Path:
        if name == "fig03":
            raise ConfigError("`train` must be True.")
        return Path(name)

    monkeypatch.setattr(notebooks, "run", run)
    options = ["--profile", "overnight", "-p", "train", "False"]
    assert notebooks.main(["run", "fig02", "fig03", "fig04", *options]) == 2
    out, error = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["fig02", "fig04"]
    assert error == "fig03: `train` must be True.\n"
