"""The figures' notebooks: parameters, failures that change nothing, files with provenance."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError
from PIL import Image

from lib.experiments.config import ConfigError
from lib.experiments.profiles import PROFILES
from lib.pages import notebooks, parameters

EVERY = sorted(notebooks.names())

NAMES = [name for name in EVERY if name.startswith("fig")]

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
    seeds = {"seed": 1} | ({"our_seeds": 1} if "our_seeds" in parameters.types(name) else {})
    folder = notebooks.run(name, "smoke", seeds, tmp_path)
    assert folder == tmp_path / "smoke" / name
    with Image.open(folder / f"{name}.png") as picture:
        assert picture.width > 1000
    assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert not pd.read_csv(folder / f"{name}.csv").empty
    executed = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    assert any("seed = 1" in cell.source for cell in executed.cells)
    provenance = json.loads((folder / "provenance.json").read_text())
    decides = any("questions = " in cell.source for cell in cells(name))
    assert ("questions.json" in provenance["sha256"]) == decides
    shared = [provenance["shared"]] if "shared" in provenance else provenance["runs"].values()
    assert {values["seed"] for values in shared} == {1}
    for file, digest in provenance["sha256"].items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("name", "models"),
    [("fig02", ["bilevel", "deq"]), ("fig08", ["bilevel 11x11", "DEQ 11x11", "bilevel 3x3", "DEQ 3x3"])],
)
def test_each_seed_of_a_table_is_in_its_provenance(name: str, models: list[str], tmp_path: Path) -> None:
    """So that it is committed with its figure."""
    chosen = {"seed": 4, "seeds": 2} | ({"our_seeds": 1} if name == "fig08" else {})
    provenance = json.loads((notebooks.run(name, "smoke", chosen, tmp_path) / "provenance.json").read_text())
    runs = [*provenance["runs"].values(), *provenance.get("histories", {}).values()]
    found = [(run["name"], run["seed"]) for run in runs if "ours" not in run["name"]]
    assert sorted(found) == sorted(pair for model in models for pair in ((model, 4), (f"{model}, seed 5", 5)))


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


def test_a_photograph_of_ones_own_is_reconstructed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a path that looks like anything but one, into a picture of its size where the command says."""
    photograph = tmp_path / "a: 'b' #2.png"
    Image.new("RGB", (30, 40), (90, 120, 60)).save(photograph)
    asked = ["-p", "image", str(photograph), "-p", "noise", "None", "-p", "results", str(tmp_path / "007")]
    assert notebooks.main(["run", "reconstruct", *asked]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1].rpartition("  (")[0])
    assert folder == tmp_path / "007" / "reconstruct" / photograph.stem / "denoising-deq-8-noise-0.1"
    assert {path.name for path in folder.iterdir()} == {
        "figure.png",
        "reconstruct.ipynb",
        "reconstruction.png",
    }
    with Image.open(folder / "reconstruction.png") as picture:
        assert (picture.mode, picture.size) == ("L", (30, 40))


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Takes the place of figure 2's notebook: its parameters, a given cell, and a kernel not there."""
    book = nbformat.read(notebooks.notebook_path("fig02"), as_version=4)
    parameters = next(cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    book.metadata["kernelspec"]["name"] = "conda-env-imaging"
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path / "nbs")
    (tmp_path / "nbs").mkdir()

    def write(source: str) -> None:
        book.cells = [parameters, nbformat.v4.new_code_cell(source)]
        nbformat.write(book, tmp_path / "nbs" / "fig02.ipynb")

    return write


def test_failure_leaves_the_old_result(small: Callable[[str], None], tmp_path: Path) -> None:
    """A notebook that fails changes nothing in its folder; the failed copy stays until it succeeds."""
    small("print(digits)")
    folder = notebooks.run("fig02", "smoke", {}, tmp_path)
    executed = nbformat.read(folder / "fig02.ipynb", as_version=4)
    assert executed.metadata["papermill"]["input_path"].endswith("fig02.ipynb"), "the notebook is in it twice"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    small("digits / 0")
    with pytest.raises(PapermillExecutionError):
        notebooks.run("fig02", "smoke", {}, tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert (folder.parent / "fig02.failed.ipynb").exists()
    small("print(digits)")
    notebooks.run("fig02", "smoke", {}, tmp_path)
    assert not (folder.parent / "fig02.failed.ipynb").exists()


def test_the_kernel_is_this_python(
    small: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Whatever the notebook names and a user has installed; no warning, and texts arrive as they are."""
    theirs = tmp_path / "jupyter" / "kernels" / "python3"
    theirs.mkdir(parents=True)
    (theirs / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "", "language": ""}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    small("import sys; print(sys.executable, sys.argv[0], results)")
    results = tmp_path / "{a} 'b' \"c\" \\d #é"
    notebooks.run("fig02", "smoke", {}, results)
    out, err = capfd.readouterr()
    assert out.startswith(f"{sys.executable} ")
    assert out.endswith(f"ipykernel_launcher.py {results}\n")
    assert err == ""


PARAMETERS = [
    (name, parameter) for name in EVERY for parameter in notebooks.defaults(notebooks.notebook_path(name))
]

NONSENSE: list[Any] = [-1, -0.5, math.nan, math.inf, 1j, 10**400, "", "\n", "no such\x07", b"x", [], [[]], {}]
"""What no parameter can be."""


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*arguments: object, **options: object) -> None:
        raise AssertionError("a kernel is started")

    monkeypatch.setattr(papermill, "execute_notebook", started)


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_is_declared(name: str, no_kernel: None, tmp_path: Path) -> None:
    """By the names of the notebook's own cell; its values pass in each profile, its next cell checks them,
    but for those of the mathematics alone."""
    known = notebooks.defaults(notebooks.notebook_path(name))
    assert known.keys() == parameters.types(name).keys()
    for profile in PROFILES:
        notebooks.require(name, profile, {})
    if known and name not in ("first_steps", "your_own"):
        code = [cell.source for cell in cells(name) if cell.cell_type == "code"]
        assert f'check("{name}", globals())' in code[1]
    with pytest.raises(AssertionError, match="a kernel is started"):
        notebooks.run(name, "smoke", {}, tmp_path)


def test_only_notebooks_are_declared() -> None:
    assert parameters.DECLARED.keys() <= set(EVERY)


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS)
def test_nonsense_is_refused(name: str, parameter: str, tmp_path: Path, no_kernel: None) -> None:
    """In one line that names the parameter, before a kernel starts; in a notebook opened by hand as well."""
    path = notebooks.notebook_path(name)
    for value in NONSENSE:
        with pytest.raises(ConfigError) as refusal:
            notebooks.run(name, "smoke", {parameter: value}, tmp_path)
        message = str(refusal.value)
        assert message.startswith(f"{parameter}: got "), message
        assert message.isprintable()
        with pytest.raises(ConfigError) as again:
            parameters.check(
                name, notebooks.defaults(path) | {"profile": "smoke", "In": []} | {parameter: value}
            )
        assert str(again.value) == message
    others = notebooks.defaults(path)
    del others[parameter]
    with pytest.raises(ConfigError, match=f"^{parameter}: it is missing$"):
        parameters.check(name, others)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("fig02", ["gama", "1.0"], "gama: no such parameter, allowed: profile, noise, "),
        ("fig02", ["digits", "101"], "digits: got 101, allowed: at most the 100 test images"),
        ("fig02", ["digits", "eight"], "digits: got 'eight', allowed: a valid integer"),
        ("fig02", ["seed", "None"], "seed: got 'None', allowed: a valid integer"),
        ("fig02", ["sigma", "yes"], "sigma: got 'yes', allowed: 'relu', "),
        ("fig02", ["noise", "1e9"], "noise: got 1000000000.0, allowed: at most 10"),
        ("fig04", ["seeds", "0"], "seeds: got 0, allowed: greater than or equal to 1"),
        ("fig05", ["train", "1"], "train: got '1', allowed: a valid boolean"),
        ("fig06", ["tau", "[0.1, -1]"], "tau: got -1.0, allowed: greater than 0"),
        ("fig07", ["image", "2"], "image: got 2, allowed: 0 to 1"),
        ("fig07", ["iterations", "[]"], "iterations: got an empty list, allowed: one value or more"),
        ("fig07", ["filters", "0"], "filters: got 0, "),
        ("fig08", ["initial", "denoising"], "initial: got 'denoising', allowed: 'first', "),
        ("fig09", ["shown", "[0, 2]"], "shown: got 2, allowed: 0 to 1"),
        ("fig13", ["initial", "third"], "initial: got 'third', allowed: 'first', "),
        ("fig17", ["shown", "[30]"], "shown: got 30, allowed: 0 to 29"),
        ("reconstruct", ["task", "inpainting"], "task: got 'inpainting', allowed: 'denoising' or "),
        (
            "reconstruct",
            ["run", "mine"],
            "run: got 'mine', allowed: the key of a run, which make train prints",
        ),
        ("evaluate", ["run", "[]"], "run: got an empty list, allowed: one value or more"),
        ("evaluate", ["largest", "3"], "largest: got 3, allowed: greater than or equal to 7"),
        ("tomography", ["image", "10"], "image: got 10, allowed: 0 to 9"),
        ("reconstruct", ["clean", "maybe"], "clean: got 'maybe', allowed: a valid boolean"),
        (
            "scaling",
            ["sides", "[4, 2]"],
            "sides: got [4, 2], allowed: each number larger than the one before",
        ),
        ("theory", ["filter_size", "4"], "filter_size: got 4, allowed: an odd number"),
        ("fig99", [], "notebook: got 'fig99', allowed: "),
    ],
)
def test_the_command_refuses_before_any_work(
    name: str, arguments: list[str], said: str, no_kernel: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a notebook before this one would take a while; the line says what is allowed."""
    given = ["-p", *arguments] if arguments else []
    assert notebooks.main(["run", name, "--profile", "smoke", *given]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{name}: {said}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("fig08", {"dataset": "nowhere"}, "dataset: got 'nowhere'"),
        ("reconstruct", {"image": "nowhere.png"}, "nowhere.png cannot be read"),
        ("reconstruct", {"run": "0" * 20}, "run: got '0+', allowed: the key of a run in "),
        ("evaluate", {"dataset": "nowhere"}, "dataset: got 'nowhere'"),
        ("evaluate", {"noise": 0.1, "sigma": 25}, "sigma: got 25 beside noise = 0.1, allowed: one of "),
    ],
)
def test_files_that_are_not_there_are_refused(
    name: str, given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """By the first cell, in one line, and nothing is trained."""
    with pytest.raises(ConfigError, match=said) as refusal:
        notebooks.run(name, "smoke", given, tmp_path)
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.glob("runs/*"))


def test_a_figure_that_cannot_be_made_keeps_no_other_from_being_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is told in its line, and make sees that one was missing."""

    def run(name: str, *arguments: object) -> Path:
        if name == "fig03":
            raise ConfigError("train: got False, allowed: True")
        return Path(name)

    monkeypatch.setattr(notebooks, "run", run)
    given = ["--profile", "overnight", "-p", "train", "False"]
    assert notebooks.main(["run", "fig02", "fig03", "fig04", *given]) == 2
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["fig02", "fig04"]
    assert err == "fig03: train: got False, allowed: True\n"


def test_the_figure_that_takes_longest_is_begun_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is trained, so that no core waits for it in the end; the others keep their order."""
    begun: list[str] = []
    monkeypatch.setattr(notebooks, "run", lambda name, *arguments: Path(begun.append(name) or name))
    monkeypatch.setattr(notebooks, "threads_with_cores", lambda count: ThreadPoolExecutor(1))
    assert notebooks.LONGEST in NAMES
    assert notebooks.main(["run", *NAMES, "-p", "train", "False"]) == 0
    assert begun == [notebooks.LONGEST, *(name for name in NAMES if name != notebooks.LONGEST)]


def test_unknown_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="profile: got 'huge', allowed: smoke, quick, overnight, paper"):
        notebooks.run("fig02", "huge", {}, tmp_path)


def test_exit_status_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """make sees a failure, with one line that says which figure and why."""
    assert notebooks.main(["run", "fig02", "--profile", "huge"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("fig02: profile: got 'huge'")
    assert "\n" not in said
