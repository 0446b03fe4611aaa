"""After the notebooks: what they made here beside what is committed, as exactly as it holds on any machine.

    pytest --nbval nbs tests/reference.py

A notebook's compared outputs are exact facts; its numbers are compared here. Those of trainings whose solves
converged agree within tolerances. The others depend on roundings: they are there, and finite. Figures of the
grid are functions of its runs, which are compared one by one.
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

FACTOR = 3.0
"""Tolerances over the largest spread in `results/bench/reproducibility.csv` where solves converge (bilevel
learning, and denoising): 0.031 dB and 0.63 % of the loss."""

LOSS, PSNR, SSIM = 0.02, 0.1, 0.01

TOLERANCES = {
    "test_loss": (LOSS, 1e-6),
    "mse": (LOSS, 1e-6),
    "psnr": (0.0, PSNR),
    "ssim": (0.0, SSIM),
    "norm of": (0.01, 0.0),
    "||A - C||": (0.0, 0.01),
    "unconverged": (0.0, 0.05),
}
"""Relative and absolute one of the columns whose names begin so; others are not compared. A mean squared
error is known to the square of the solver's tolerance, 0.001."""

SEARCH = 6.0
"""Factor of these tolerances for what L-BFGS trained: stopped after some iterations, its line searches are at
other points on other machines. Without AVX deblurring ended up to 0.14 dB away, and a photograph 0.39 dB."""

PAGES = ("evaluate", "tomography", "weight")
"""Beside the figures those with numbers that are the same everywhere."""

OURS = "photographs.csv"
"""Beside a figure, ours and total variation photograph by photograph."""

LABELS = ("image", "kernels", "task", "model", "noise", "seed", "photograph")
"""Columns that say which row it is."""


def provenance(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "provenance.json").read_bytes())
    return content


def parameters(record: dict[str, Any]) -> dict[str, Any]:
    """What a figure was made with, by its provenance."""
    if "runs" not in record:
        return {"grid": record["axes"] | record["shared"]}
    runs = {
        run["name"]: {name: value for name, value in run.items() if name not in ("status", "converged")}
        for run in record["runs"].values()
    }
    return runs | {"settings": record.get("settings")}


def incomparable(here: dict[str, Any], there: dict[str, Any]) -> str:
    """Why what was made cannot be compared with the reference, by the provenance of both; else nothing."""
    if here["method"] != METHOD_VERSION:
        return "made by another version of the method"
    return "" if parameters(here) == parameters(there) else "made with other parameters"


def differences(
    made: pd.DataFrame, reference: pd.DataFrame, held: pd.Series[bool], factor: pd.Series[float] | float = 1.0
) -> list[str]:
    """What of a table is not as in the reference.

    Args:
        made, reference: the tables.
        held: the rows whose numbers hold.
        factor: of the tolerances.
    """
    labels = [name for name in LABELS if name in reference]
    if list(made) != list(reference) or not made[labels].equals(reference[labels]):
        return [f"other rows or columns: {made[labels].to_dict('list')}, {list(made)}"]
    found = []
    for column in reference.select_dtypes("number").columns.difference(labels):
        here, there = made[column], reference[column]
        of_column = (both for name, both in TOLERANCES.items() if column.startswith(name))
        relative, absolute = next(of_column, (0.0, np.inf))
        far = held & ((here - there).abs() > factor * (relative * there.abs() + absolute))
        for row in reference.index[far | (there.notna() & ~np.isfinite(here.astype(float)))]:
            place = ", ".join(str(value) for value in reference.loc[row, labels])
            found.append(f"{place}: {column} {here[row]}, reference {there[row]}")
    return found


def figure_differences(made: Path, reference: Path) -> list[str]:
    """What of a figure's table and questions is not as in the reference, of the folders of both."""
    name = f"{provenance(reference)['figure']}.csv"
    here, there = (pd.read_csv(folder / name) for folder in (made, reference))
    records = provenance(reference).get("runs", {}).values()
    runs = {run["name"]: run["converged"] for run in records}
    searched = {run["name"] for run in records if run.get("optimizer") == "lbfgs"}
    factor: pd.Series[float] | float = SEARCH if searched else 1.0
    if "image" in there:
        named = there["task"] + ", " + there["image"] if "task" in there else there["image"]
        held = pd.Series([runs.get(name, True) for name in named], there.index, dtype=bool)
        factor = named.isin(searched).map({True: SEARCH, False: 1.0})
        if "unconverged" in there:
            held &= ~(there["unconverged"] >= 0.05)
    else:
        held = pd.Series(bool(runs) and all(runs.values()), there.index)
    found = differences(here, there, held, factor)
    if (reference / OURS).exists():
        here, there = (pd.read_csv(folder / OURS) for folder in (made, reference))
        own = all(converged for run, converged in runs.items() if ", ours" in run)
        found += differences(here, there, pd.Series(own, there.index), SEARCH if searched else 1.0)
    if (reference / "questions.json").exists():
        questions, expected = (json.loads((f / "questions.json").read_bytes()) for f in (made, reference))
        asked, known = ([(q["question"], q["rule"]) for q in some] for some in (questions, expected))
        if asked != known or not {question["answer"] for question in questions} <= set(ANSWERS):
            found.append(f"other questions: {questions}")
    return found


def grid_differences(
    runs: pd.DataFrame, reference: pd.DataFrame, reference_epochs: pd.DataFrame
) -> list[str]:
    """What of the grid's runs is not as in the reference: losses of those whose solves converged there."""
    names = [name for name in RunConfig.model_fields if name in reference]
    runs, reference = (table.sort_values(names, ignore_index=True) for table in (runs, reference))
    if not runs[names].equals(reference[names]):
        return ["other configurations"]
    kept = {key: has_converged(rows) for key, rows in reference_epochs.groupby("key")}
    columns = ["task", "model", "noise", "test_loss"]
    return differences(runs[columns], reference[columns], reference["key"].map(kept).fillna(False))


@pytest.mark.parametrize("name", [*sorted(path.name for path in REFERENCE.glob("fig*")), *PAGES])
def test_a_figure_is_that_of_the_reference(name: str) -> None:
    """Its table, within the tolerances, and its questions."""
    if not (MADE / name / "provenance.json").exists():
        pytest.skip(f"{name} was not made")
    if reason := incomparable(provenance(MADE / name), provenance(REFERENCE / name)):
        pytest.skip(f"{name}: {reason}")
    assert figure_differences(MADE / name, REFERENCE / name) == []


def test_the_grid_is_that_of_the_reference() -> None:
    """Run by run; its figures are functions of them."""
    if not (MADE / "sweep_provenance.json").exists():
        pytest.skip("the grid was not made")
    here = json.loads((MADE / "sweep_provenance.json").read_bytes())
    if reason := incomparable(here, provenance(REFERENCE / "sweep")):
        pytest.skip(f"the grid: {reason}")
    runs, epochs = (pd.read_parquet(REFERENCE / "sweep" / f"{name}.parquet") for name in ("runs", "epochs"))
    assert "test_unconverged" in epochs, "`python .ci/collect.py` makes the reference anew"
    assert grid_differences(pd.read_parquet(MADE / "sweep_runs.parquet"), runs, epochs) == []
