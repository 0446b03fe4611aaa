"""Comparison of the notebooks' numbers on this machine with the committed reference.

    pytest --nbval nbs tests/reference.py

nbval compares exact outputs, this module compares numbers. Trainings whose solves converged must agree within
tolerances. The others depend on rounding errors and must have finite values. Figures of the grid are
functions of its runs, which are compared one by one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lib.experiments.config import RunConfig
from lib.experiments.method import METHOD_VERSION
from lib.experiments.records import REFERENCE
from lib.experiments.store import RESULTS
from lib.figures.comparison import ANSWERS, has_converged

MADE = RESULTS / "quick"

LOSS, PSNR, SSIM = 0.02, 0.1, 0.01
"""The first two are about three times the largest spread in `results/bench/reproducibility.csv` where solves
converge (bilevel learning, and denoising): 0.63 % of the loss and 0.031 dB."""

TOLERANCES = {
    "test_loss": (LOSS, 1e-6),
    "mse": (LOSS, 1e-6),
    "psnr": (0.0, PSNR),
    "ssim": (0.0, SSIM),
    "norm of": (0.01, 0.0),
    "||A - C||": (0.0, 0.01),
    "unconverged": (0.0, 0.05),
}
"""Relative and absolute tolerance by the start of a column's name; other columns are not compared. A mean
squared error is known to the square of the solver's tolerance, 0.001."""

SEARCH = 6.0
"""Factor of these tolerances for trainings by L-BFGS, whose line searches stop at other points on other
machines. Without AVX, deblurring differed by up to 0.14 dB, and one photograph by 0.39 dB."""

PAGES = ("evaluate", "tomography", "weight")
"""Notebooks other than figures whose numbers agree on all machines."""

OURS = "photographs.csv"
"""Table of our setting and total variation for each photograph of a figure."""

LABELS = ("image", "kernels", "task", "model", "noise", "seed", "photograph")
"""Columns that identify a row."""


def provenance(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "provenance.json").read_bytes())
    return content


def parameters(record: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a figure from its provenance."""
    if "runs" not in record:
        return {"grid": record["axes"] | record["shared"]}
    runs = {
        run["name"]: {name: value for name, value in run.items() if name not in ("status", "converged")}
        for run in record["runs"].values()
    }
    return runs | {"settings": record.get("settings")}


def incomparable(here: dict[str, Any], there: dict[str, Any]) -> str:
    """Return why the provenances cannot be compared, or an empty string."""
    if here["method"] != METHOD_VERSION:
        return "made by another version of the method"
    return "" if parameters(here) == parameters(there) else "made with other parameters"


def differences(
    made: pd.DataFrame, reference: pd.DataFrame, mask: pd.Series[bool], factor: pd.Series[float] | float = 1.0
) -> list[str]:
    """Return a line for each value of a table that differs from the reference.

    Args:
        made, reference: tables.
        mask: rows whose numbers are compared.
        factor: factor of the tolerances.
    """
    labels = [name for name in LABELS if name in reference]
    if list(made) != list(reference) or not made[labels].equals(reference[labels]):
        return [f"other rows or columns: {made[labels].to_dict('list')}, {list(made)}"]
    lines = []
    for column in reference.select_dtypes("number").columns.difference(labels):
        here, there = made[column], reference[column]
        of_column = (both for name, both in TOLERANCES.items() if column.startswith(name))
        relative, absolute = next(of_column, (0.0, np.inf))
        far = mask & ((here - there).abs() > factor * (relative * there.abs() + absolute))
        for row in reference.index[far | (there.notna() & ~np.isfinite(here.astype(float)))]:
            place = ", ".join(str(value) for value in reference.loc[row, labels])
            lines.append(f"{place}: {column} {here[row]}, reference {there[row]}")
    return lines


def figure_differences(made: Path, reference: Path) -> list[str]:
    """Return the differences of a figure's tables and questions from the reference, both in folders."""
    name = f"{provenance(reference)['figure']}.csv"
    here, there = (pd.read_csv(folder / name) for folder in (made, reference))
    records = provenance(reference).get("runs", {}).values()
    runs = {run["name"]: run["converged"] for run in records}
    searched = {run["name"] for run in records if run.get("optimizer") == "lbfgs"}
    factor: pd.Series[float] | float = SEARCH if searched else 1.0
    if "image" in there:
        named = there["task"] + ", " + there["image"] if "task" in there else there["image"]
        compared = pd.Series([runs.get(name, True) for name in named], there.index, dtype=bool)
        factor = named.isin(searched).map({True: SEARCH, False: 1.0})
        if "unconverged" in there:
            compared &= ~(there["unconverged"] >= 0.05)
    else:
        compared = pd.Series(bool(runs) and all(runs.values()), there.index)
    lines = differences(here, there, compared, factor)
    if (reference / OURS).exists():
        here, there = (pd.read_csv(folder / OURS) for folder in (made, reference))
        own = all(converged for run, converged in runs.items() if ", ours" in run)
        lines += differences(here, there, pd.Series(own, there.index), SEARCH if searched else 1.0)
    if (reference / "questions.json").exists():
        questions, expected = (json.loads((f / "questions.json").read_bytes()) for f in (made, reference))
        asked, known = ([(q["question"], q["rule"]) for q in some] for some in (questions, expected))
        if asked != known or not {question["answer"] for question in questions} <= set(ANSWERS):
            lines.append(f"other questions: {questions}")
    return lines


def grid_differences(
    runs: pd.DataFrame, reference: pd.DataFrame, reference_epochs: pd.DataFrame
) -> list[str]:
    """Return the differences of the grid's losses from the reference, where its solves converged."""
    names = [name for name in RunConfig.model_fields if name in reference]
    runs, reference = (table.sort_values(names, ignore_index=True) for table in (runs, reference))
    if not runs[names].equals(reference[names]):
        return ["other configurations"]
    converged = {key: has_converged(rows) for key, rows in reference_epochs.groupby("key")}
    columns = ["task", "model", "noise", "test_loss"]
    return differences(runs[columns], reference[columns], reference["key"].map(converged).fillna(False))


@pytest.mark.parametrize("name", [*sorted(path.name for path in REFERENCE.glob("fig*")), *PAGES])
def test_figure_matches_reference(name: str) -> None:
    """Compare the table within the tolerances, and the questions."""
    if not (MADE / name / "provenance.json").exists():
        pytest.skip(f"{name} has no results")
    if reason := incomparable(provenance(MADE / name), provenance(REFERENCE / name)):
        pytest.skip(f"{name}: {reason}")
    assert figure_differences(MADE / name, REFERENCE / name) == []


def test_grid_matches_reference() -> None:
    """Compare the runs one by one."""
    if not (MADE / "sweep_provenance.json").exists():
        pytest.skip("the grid has no results")
    here = json.loads((MADE / "sweep_provenance.json").read_bytes())
    if reason := incomparable(here, provenance(REFERENCE / "sweep")):
        pytest.skip(f"the grid: {reason}")
    runs, epochs = (pd.read_parquet(REFERENCE / "sweep" / f"{name}.parquet") for name in ("runs", "epochs"))
    assert "test_unconverged" in epochs, "run `python .ci/collect.py` to update the reference"
    assert grid_differences(pd.read_parquet(MADE / "sweep_runs.parquet"), runs, epochs) == []
