"""What is compared exactly is the same on every machine, and what is not is compared within tolerances."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lib.experiments.problem import make_operator, observe

from lib.experiments import problem
from lib.experiments.config import RunConfig
from lib.experiments.profiles import faces_config
from lib.experiments.runs import Run, code_version
from lib.experiments.store import REPOSITORY, RESULTS
from lib.experiments.sweep import Sweep
from lib.figures import comparison, evaluation, photographs, reconstructions
from lib.figures.reconstructions import Reconstructions
from lib.models import MODELS
from lib.regularizer import GRADIENT_NORM

NOTEBOOKS = sorted((REPOSITORY / "nbs").glob("*.ipynb"))
FIGURE_MODULES = sorted((REPOSITORY / "lib" / "figures").glob("*.py"))

DISPLAYED = {
    "save_kernels": "returns nothing",
    "set_num_threads": "returns nothing",
    "Image": "pictures are not compared",
    "picture": "pictures are not compared",
    "axes": "the levels of a committed table",
}
"""What a compared cell may end with, beside checks and the name of what was written, and why."""


# ------------------------------------------------------------------------------- the rule, in the notebooks


def called(node: ast.AST) -> str:
    """The last name of what is called, or nothing."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "?")


def compared_findings(source: str) -> list[str]:
    """What a cell whose output is compared prints or shows that is no check.

    A check is a function whose name begins so. Constants may be printed, and whether two tensors are the same
    to rounding.
    """
    if "NBVAL_IGNORE_OUTPUT" in source:
        return []
    found = []
    for node in ast.walk(ast.parse(source)):
        name = called(node)
        if isinstance(node, ast.Call) and name.startswith(("print", "display")):
            exact = (isinstance(a, ast.Constant) or called(a) == "allclose" for a in node.args)
            found += [] if node.args and all(exact) else [ast.unparse(node)]
        if isinstance(node, ast.Expr):
            name = called(node.value)
            variables = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            written = variables == {"folder"} or getattr(node.value, "attr", "") == "name"
            if not (written or name in DISPLAYED or name == "print" or name.startswith("check")):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_compared_cells_show_checks_alone(path: Path) -> None:
    """Findings stand in cells with `# NBVAL_IGNORE_OUTPUT`."""
    cells = nbformat.read(path, as_version=4).cells
    found = [line for c in cells if c.cell_type == "code" for line in compared_findings(c.source)]
    assert found == []


@pytest.mark.parametrize(
    "finding",
    [
        "print(round(result.table.psnr['deq']))",
        "comparison.print_answers(questions)",
        "for name in runs:\n    print(f'{name}: better')",
        "result.table.round(1)",
        "result.table",
        "runs",
        "display(table)",
        "'all' if table.unconverged.max() == 0 else 'some'",
    ],
)
def test_a_finding_in_a_compared_cell_is_noticed(finding: str) -> None:
    """Beside checks as well; not where the output is ignored."""
    for source in (finding, f"comparison.check_sweep(sweep)\n{finding}"):
        assert compared_findings(source) != []
        assert compared_findings(f"# NBVAL_IGNORE_OUTPUT\n{source}") == []


def printing(path: Path) -> set[str]:
    """The functions of a module that print."""
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    return {f.name for f in functions if any(called(node) == "print" for node in ast.walk(f))}


def test_what_prints_says_so() -> None:
    """By its name, so that the cells that call it can be told apart."""
    names = set().union(*map(printing, FIGURE_MODULES))
    assert names >= {"check_sweep", "print_answers"}
    assert {name for name in names if not name.startswith(("check", "print_"))} == set()


# ------------------------------------------------------------------------------- the rule, in what checks say


@dataclass
class Machine:
    """A processor: where solves converge, numbers move within the measured spread, elsewhere they are any."""

    draw: Callable[[st.SearchStrategy[Any]], Any] | None = None

    def any(self, here: Any, strategy: st.SearchStrategy[Any]) -> Any:
        """What depends on roundings."""
        return here if self.draw is None else self.draw(strategy)

    def near(self, value: float) -> float:
        return value * self.any(1.0, st.floats(1 - 0.0063, 1 + 0.0063))

    def unconverged(self) -> float:
        return float(self.any(0.0, st.just(0.0) | st.floats(0, 1)))

    def number(self, value: float, settled: bool) -> float:
        return self.near(value) if settled else float(self.any(value, st.floats(0, 1e3)))

    def status(self, settled: bool) -> str:
        statuses = st.sampled_from(["completed", "diverged", "out of time"])
        return "completed" if settled else str(self.any("completed", statuses))


def trained(machine: Machine, config: RunConfig, weights: dict[str, Any]) -> tuple[Run, dict[str, float]]:
    """A run, trained on one machine, and the row of its reconstructions on another one."""
    shares = [machine.unconverged() for _ in range(2)]
    settled = max(shares) == 0
    history = pd.DataFrame([{"test_loss": machine.number(0.1, settled), "test_unconverged": shares[0]}])
    run = Run(config.model, config, machine.status(settled), "", history, weights, {})
    loss = machine.near(history["test_loss"][0]) if settled else machine.number(0.1, False)
    return run, {"psnr": machine.number(16.0, settled), "mse": loss, "unconverged": shares[1]}


def check_reconstructions(machine: Machine) -> None:
    configs = [RunConfig(model=model, size=7, test_images=20, noise=0.1) for model in MODELS]
    zero = torch.zeros(1)
    pairs = [trained(machine, c, {"A": zero} | ({"C": zero} if c.model == "deq" else {})) for c in configs]
    truth = torch.zeros(20, 1, 7, 7)
    f = observe(make_operator(configs[0]), truth, torch.tensor(0.1), problem.test_noise(configs[0]))
    table = pd.DataFrame([row for _, row in pairs], index=MODELS)
    runs = dict(zip(MODELS, (run for run, _ in pairs), strict=True))
    images = Reconstructions(runs, truth[:, 0], f[:, 0], {}, {}, table)
    reconstructions.check_reconstructions(images)


def check_stored_losses(machine: Machine) -> None:
    pairs = [trained(machine, RunConfig(model=model), {}) for model in MODELS]
    by_config = {run.config: (run, row) for run, row in pairs}
    rows = [run.config.model_dump() | run.history.iloc[-1].to_dict() for run, _ in pairs]

    def found(runs: dict[str, Run]) -> Any:
        ((key, run),) = runs.items()
        table = pd.DataFrame([by_config[run.config][1]], index=[key])
        return Reconstructions(runs, torch.zeros(1), torch.zeros(1), {}, {}, table)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reconstructions, "get_runs", lambda configs, results: [by_config[c][0] for c in configs]
        )
        patch.setattr(reconstructions, "reconstruct", found)
        reconstructions.check_stored_losses(pd.DataFrame(rows))


def check_sweep(machine: Machine) -> None:
    configs = [RunConfig(model=model, noise=noise) for model in MODELS for noise in (0.1, 0.5)]
    runs, epochs = [], []
    for key, config in enumerate(configs):
        settled = machine.unconverged() == 0
        losses = [machine.number(loss, settled) for loss in (0.5, 0.3)]
        epochs += [{"key": str(key), "epoch": epoch, "test_loss": loss} for epoch, loss in enumerate(losses)]
        row = {"key": str(key), "status": machine.status(settled), "epochs_finished": 1}
        runs.append(config.model_dump() | row | {"test_loss": losses[-1]})
    comparison.check_sweep(Sweep("smoke", pd.DataFrame(runs), pd.DataFrame(epochs), {}))


def check_kernels(machine: Machine) -> None:
    fresh = faces_config("smoke", "denoising", model="deq")
    nested = faces_config("smoke", "deblurring", model="deq", initial="denoising")
    tied = faces_config("smoke", "denoising", model="bilevel")
    for config in (fresh, nested, tied):
        distances = [float(machine.any(0.5, st.floats(0, 10))) for _ in range(2)]
        distances[0] *= config is nested
        table = pd.DataFrame(
            {"||A - C|| / ||A||": distances if config is not tied else 0.0}, ["before", "after"]
        )
        for name in ("A", "C"):
            table[f"norm of {name}"] = [machine.near(GRADIENT_NORM) for _ in range(2)]
        weights = {"A": torch.ones(1)} | ({} if config is tied else {"C": torch.ones(1)})
        photographs.check_kernels(Run("key", config, "completed", "", pd.DataFrame(), weights, {}), table)


def check_weights(machine: Machine) -> None:
    config = faces_config("smoke", "inpainting", model="bilevel")
    history = pd.DataFrame([{"test_loss": machine.number(0.1, False)}])
    run = Run("key", config, machine.status(False), "", history, {"A": torch.ones(1)}, {})
    reconstructions.check_weights({"naive": run})


def check_evaluation(machine: Machine) -> None:
    found = [evaluation.Picture("a", Path("a.png"), 64, (40, 50), "L", "")]
    weights = evaluation.WeightChoice(0.1, {evaluation.TV: machine.near(0.06), "DEQ": machine.near(20.0)})
    row = {"height": 40, "width": 50, "psnr input": 26.02 + machine.any(0.0, st.floats(-1e-3, 1e-3))}
    row |= {"psnr DEQ": machine.number(30.0, False)}
    table = pd.DataFrame(row, pd.Index(["a"], name="image"))
    evaluation.check_evaluation(table, found, weights, "denoising")


CHECKS = (check_reconstructions, check_stored_losses, check_sweep, check_kernels)
CHECKS += (check_weights, check_evaluation)


def assert_the_same_everywhere(said: Callable[[Machine], str]) -> None:
    """A check says the same on this machine and on others; it fails on none."""
    here = said(Machine())

    @settings(settings.get_profile("unshrunk"))
    @given(data=st.data())
    def elsewhere(data: st.DataObject) -> None:
        assert said(Machine(data.draw)) == here

    elsewhere()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_check_says_the_same_everywhere(
    check: Callable[[Machine], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def said(machine: Machine) -> str:
        check(machine)
        return capsys.readouterr().out

    assert said(Machine())
    assert_the_same_everywhere(said)


def test_every_check_is_among_them() -> None:
    """All functions of the figures that a compared cell may call and that print."""
    names = {name for path in FIGURE_MODULES for name in printing(path) if name.startswith("check")}
    assert names == {check.__name__ for check in CHECKS}


PLANTED: dict[str, Callable[[Run, dict[str, float]], str]] = {
    "half decibels": lambda run, row: f"{round(2 * row['psnr'])}",
    "convergence": lambda run, row: "all" if row["unconverged"] == 0 else "some",
    "the status": lambda run, row: run.status,
    "a loss to the bit": lambda run, row: str(abs(row["mse"] - run.history["test_loss"][0]) <= 1e-6),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_finding_does_not_say_the_same(name: str) -> None:
    with pytest.raises(AssertionError):
        assert_the_same_everywhere(lambda machine: PLANTED[name](*trained(machine, RunConfig(), {})))


# --------------------------------------------------------------------------- numbers, beside the reference


def test_the_tolerances_cover_the_measured_spread() -> None:
    """By the factor that they state, and not much more."""
    spread = pd.read_csv(RESULTS / "bench" / "reproducibility.csv")
    settled = spread[(spread["model"] == "bilevel") | (spread["task"] == "denoising")]
    for column, tolerance in (("test_loss", reference.LOSS), ("test_psnr", reference.PSNR)):
        assert 1 <= tolerance / (reference.FACTOR * settled[column].max()) < 1.2


def write_figure(folder: Path, table: pd.DataFrame, **record: Any) -> Path:
    folder.mkdir()
    table.to_csv(folder / "fig.csv")
    names = {"bilevel": True, "deq": False}
    runs = {n: {"name": n, "noise": 0.1, "status": "completed", "converged": c} for n, c in names.items()}
    kept = {"figure": "fig", "runs": runs, "code": code_version()} | record
    (folder / "provenance.json").write_text(json.dumps(kept))
    questions = [{"question": "is it so?", "rule": "count", "answer": "yes", "numbers": "3"}]
    (folder / "questions.json").write_text(json.dumps(questions))
    return folder


QUALITY = pd.DataFrame(
    {"psnr": [10.0, 16.0, 15.0, 17.0], "mse": [0.25, 0.1, 0.13, 0.09], "unconverged": [np.nan, 0, 1, 0.6]},
    index=pd.Index(["input", "bilevel", "deq", "other"], name="image"),
).assign(steps=[np.nan, 5.0, 20.0, 9.0])
NUDGES = {"psnr": 0.005, "mse": 0.015, "steps": 9.0}
"""A relative change of each column that is within its tolerance, and three times of which is not."""


@pytest.mark.parametrize("row", QUALITY.index)
@pytest.mark.parametrize("column", ["psnr", "mse", "steps"])
def test_numbers_hold_where_solves_converged(row: str, column: str, tmp_path: Path) -> None:
    """Within the tolerance, by the run of the row or its own solves; of others it is enough to be finite."""
    there = write_figure(tmp_path / "there", QUALITY)
    for factor in (0, 1, 3):
        table = QUALITY.copy()
        table.loc[row, column] *= 1 + factor * NUDGES[column]
        here = write_figure(tmp_path / f"{factor}", table)
        wrong = factor == 3 and column != "steps" and row in ("input", "bilevel")
        found = reference.figure_differences(here, there)
        assert len(found) == wrong
        assert all(line.startswith(f"{row}: {column} ") for line in found)
    table.loc[row, column] = np.nan
    found = reference.figure_differences(write_figure(tmp_path / "lost", table), there)
    assert len(found) == (not pd.isna(QUALITY.loc[row, column]))


@pytest.mark.parametrize(
    "other", [QUALITY.iloc[:3], QUALITY.iloc[::-1], QUALITY.drop(columns="mse"), QUALITY.assign(ssim=0.5)]
)
def test_rows_and_columns_are_the_same(other: pd.DataFrame, tmp_path: Path) -> None:
    here, there = write_figure(tmp_path / "a", other), write_figure(tmp_path / "b", QUALITY)
    assert len(reference.figure_differences(here, there)) == 1


@pytest.mark.parametrize("converged", [True, False])
def test_photographs_are_compared_where_ours_converged(converged: bool, tmp_path: Path) -> None:
    """Photograph by photograph, and whatever became of other runs."""
    kept = {"name": "DEQ, ours", "status": "completed", "converged": converged}
    others = {"name": "deq", "status": "completed", "converged": False}
    folders = [write_figure(tmp_path / n, QUALITY, runs={"a": kept, "b": others}) for n in ("made", "there")]
    table = pd.DataFrame({"seed": [0, 0], "photograph": [1, 2], "psnr DEQ, ours": [31.0, 32.0]})
    for folder in folders:
        table.to_csv(folder / reference.OURS, index=False)
    assert reference.figure_differences(*folders) == []
    table.assign(**{"psnr DEQ, ours": [31.0, 32.2]}).to_csv(folders[0] / reference.OURS, index=False)
    found = reference.figure_differences(*folders)
    assert found == (["0, 2: psnr DEQ, ours 32.2, reference 32.0"] if converged else [])


@pytest.mark.parametrize(("optimizer", "apart"), [("adam", 0.15), ("lbfgs", 0.15), ("lbfgs", 0.65)])
def test_what_a_line_search_trained_may_be_farther_away(optimizer: str, apart: float, tmp_path: Path) -> None:
    """By its factor, and no other row."""
    runs = {"a": {"name": "bilevel", "optimizer": optimizer, "status": "completed", "converged": True}}
    far = QUALITY.assign(psnr=QUALITY["psnr"] + np.array([0, apart, 0, 0]))
    here, there = (write_figure(tmp_path / n, t, runs=runs) for n, t in (("a", far), ("b", QUALITY)))
    found = reference.figure_differences(here, there)
    assert len(found) == (apart > 0.1 * (reference.SEARCH if optimizer == "lbfgs" else 1))
    other = QUALITY.assign(psnr=QUALITY["psnr"] + np.array([0.15, 0, 0, 0]))
    other.to_csv(here / "fig.csv")
    assert len(reference.figure_differences(here, there)) == 1


@pytest.mark.parametrize("converged", [True, False])
def test_kernels_are_those_of_their_run(converged: bool, tmp_path: Path) -> None:
    """The run's solves decide on both rows."""
    runs = {"key": {"name": "DEQ", "status": "completed", "converged": converged}}
    table = pd.DataFrame({"||A - C|| / ||A||": [0.0, 0.3]}, pd.Index(["before", "after"], name="kernels"))
    here, there = (write_figure(tmp_path / n, table + a, runs=runs) for n, a in (("a", 0.02), ("b", 0)))
    assert len(reference.figure_differences(here, there)) == 2 * converged


@pytest.mark.parametrize(("part", "same"), [("numbers", True), ("question", False), ("answer", False)])
def test_questions_are_the_same_but_for_their_numbers(part: str, same: bool, tmp_path: Path) -> None:
    here, there = (write_figure(tmp_path / name, QUALITY) for name in "ab")
    questions = json.loads((here / "questions.json").read_text())
    questions[0][part] = "other"
    (here / "questions.json").write_text(json.dumps(questions))
    assert (reference.figure_differences(here, there) == []) == same


def test_what_was_made_otherwise_is_not_compared() -> None:
    """By another version of the code, with another parameter, or on other axes; statuses do not matter."""
    run = {"name": "deq", "noise": 0.1, "status": "completed", "converged": True}
    made = {"runs": {"key": run}, "code": code_version()}
    assert reference.incomparable(made, made | {"code": "another"}) == ""
    assert reference.incomparable(made | {"runs": {"other": run | {"status": "diverged"}}}, made) == ""
    assert "code" in reference.incomparable(made | {"code": "another"}, made)
    assert "parameters" in reference.incomparable(made | {"runs": {"key": run | {"noise": 0.5}}}, made)
    assert "parameters" in reference.incomparable(made | {"settings": {"angles": 5}}, made)
    swept = {"axes": {"noise": [0.1, 0.5]}, "shared": {"tau": 0.5}, "code": code_version()}
    assert reference.incomparable(swept, swept) == ""
    assert "parameters" in reference.incomparable(swept | {"shared": {"tau": 0.9}}, swept)


def test_runs_of_the_grid_are_compared_one_by_one() -> None:
    """Losses of the runs whose solves converged in the reference, whatever the order and the keys."""
    configs = [RunConfig(noise=noise) for noise in (0.1, 0.5, 1.0)]
    runs = pd.DataFrame([c.model_dump() | {"key": str(i), "test_loss": 0.2} for i, c in enumerate(configs)])
    epochs = pd.DataFrame({"key": ["0", "1", "1", "2"], "test_unconverged": [0.0, 0.0, 0.08, 0.5]})
    shuffled = runs.assign(key=list("abc")).iloc[::-1]
    assert reference.grid_differences(shuffled, runs, epochs) == []
    for row, wrong in ((0, True), (1, True), (2, False)):
        other = shuffled.copy()
        other.loc[row, "test_loss"] *= 1.03
        assert len(reference.grid_differences(other, runs, epochs)) == wrong
    assert reference.grid_differences(runs.iloc[1:], runs, epochs) != []
    assert reference.grid_differences(runs.assign(tau=0.3), runs, epochs) != []
