"""Committed evidence: size, completeness, the runs of the profile, and figures without training."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import reference as references

from lib.experiments import records, runs
from lib.experiments.config import ConfigError, FacesConfig, RunConfig
from lib.experiments.profiles import grid, profile_config
from lib.experiments.provenance import PROVENANCE, write_with_provenance
from lib.experiments.records import COMMITTED, Run
from lib.experiments.runs import find_runs, get_run
from lib.experiments.store import REPOSITORY, RESULTS
from lib.experiments.sweep import load_table, row_config
from lib.pages import notebooks

FOLDER = RESULTS / COMMITTED["overnight"]
TINY = {"size": 7, "epochs": 1, "train_images": 50, "test_images": 20, "batch_size": 25}


def test_committed_evidence_is_small_and_complete() -> None:
    """The folder has at most 15 MB and exactly the runs that the figures need."""
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15e6
    origins = [json.loads(path.read_bytes()) for path in FOLDER.glob(f"*/{PROVENANCE}")]
    whole, alone = ({k for origin in origins for k in origin.get(kind, ())} for kind in ("runs", "histories"))
    needed = {f"{key}.zip" for key in whole} | {f"{key}.json" for key in alone - whole}
    assert {path.name for path in FOLDER.glob("runs/*")} == needed


@pytest.mark.parametrize("name", [name for name in notebooks.PAGES if (FOLDER / name).is_dir()])
def test_committed_figure_has_runs_of_profile(name: str) -> None:
    """Compare its keys and statuses with the runs of its configurations."""
    origin = json.loads((FOLDER / name / PROVENANCE).read_bytes())
    assert (origin["figure"], origin["profile"]) == (name, "overnight")
    for key, entry in (origin.get("runs", {}) | origin.get("histories", {})).items():
        values = {field: entry[field] for field in entry if field not in ("name", "status", "converged")}
        kind = RunConfig if entry["dataset"] == "mnist" else FacesConfig
        (run,) = find_runs([kind(**values)], weights=False)
        assert run is not None
        assert (run.key, run.status) == (key, entry["status"])


def test_committed_table_has_configurations_of_profile() -> None:
    table = load_table("overnight").runs.to_dict("records")
    assert {row_config(row) for row in table} == set(grid("overnight"))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Two runs in a store of their own, whose figures can be committed."""
    stored = [
        get_run(profile_config("smoke", "denoising", model=m, **TINY), tmp_path) for m in ("deq", "bilevel")
    ]
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(runs, "REFERENCE", tmp_path / "reference")
    return stored


def test_keep_copies_figure_with_its_runs(store: list[Run], tmp_path: Path) -> None:
    """Copy picture, numbers, provenance and the runs of committed figures alone, and load these runs."""
    keep = runpy.run_path(str(REPOSITORY / ".ci" / "keep.py"))["keep"]
    keys = [run.key for run in store]
    files = {"fig02.png": b"a picture", "fig02.pdf": b"a large one", "fig02.csv": b"numbers"}
    committed = tmp_path / "reference" / "overnight"
    for names, histories, expected in (
        (keys[:1], keys[1:], [f"{keys[0]}.zip", f"{keys[1]}.json"]),
        (keys[1:], [], [f"{keys[1]}.zip"]),
    ):
        origin = {"runs": dict.fromkeys(names), "histories": dict.fromkeys(histories)}
        write_with_provenance(tmp_path / "overnight" / "fig02", files, origin)
        keep("fig02", "overnight", tmp_path)
        assert {path.name for path in (committed / "fig02").iterdir()} == {
            "fig02.csv",
            "fig02.png",
            PROVENANCE,
        }
        assert {path.name for path in (committed / "runs").iterdir()} == set(expected)
    shutil.rmtree(tmp_path / "runs")
    run = get_run(store[1].config, train=False)
    pd.testing.assert_frame_equal(run.history, store[1].history)
    with pytest.raises(ConfigError, match="train"):
        get_run(store[0].config, train=False)


QUALITY = pd.DataFrame(
    {"psnr": [20.0, 25.0], "steps": [3.0, 4.0]}, index=pd.Index(["input", "deq"], name="image")
)


@pytest.mark.parametrize(
    ("psnr", "converged", "differs"),
    [(0.05, True, False), (0.5, True, True), (0.5, False, False), (np.nan, False, True)],
)
def test_reference_detects_differences_of_converged_solves(
    psnr: float, converged: bool, differs: bool, tmp_path: Path
) -> None:
    """`reference.py` accepts 0.1 dB, and no missing number."""
    for folder, shift in (("made", psnr), ("reference", 0.0)):
        table = QUALITY.assign(psnr=QUALITY["psnr"] + [0.0, shift])
        origin = {"figure": "fig02", "runs": {"key": {"name": "deq", "converged": converged}}}
        write_with_provenance(tmp_path / folder, {"fig02.csv": table.to_csv().encode()}, origin)
    lines = references.figure_differences(tmp_path / "made", tmp_path / "reference")
    assert [line.startswith("deq: psnr") for line in lines] == [True] * differs
