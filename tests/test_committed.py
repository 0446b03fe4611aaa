"""Committed runs and tables: what is drawn without training, whose it is, and what must not happen to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from lib.experiments import runs, sweep
from lib.experiments.config import ConfigError, FacesConfig, RunConfig
from lib.experiments.data import DataError
from lib.experiments.profiles import grid, profile_config
from lib.experiments.provenance import PROVENANCE, write_with_provenance
from lib.experiments.runs import (
    COMMITTED,
    Run,
    find_histories,
    find_runs,
    get_run,
    get_runs,
    keep_history,
    keep_run,
    learned_start,
)
from lib.experiments.store import RESULTS, DamagedFile
from lib.experiments.sweep import NOT_RUN, get_sweep, load_table
from lib.figures.reconstructions import check_stored_losses, get_runs_of_seeds, later_seeds, seed_by_seed
from lib.pages import explore, notebooks

DIGITS = profile_config(
    "smoke", "denoising", size=7, train_images=50, test_images=20, batch_size=25, model="deq"
)
KERNELS = FacesConfig(epochs=1, reduction=8, train_images=1, test_images=1, filter_size=3, max_steps=5)
FROM_KERNELS = KERNELS.model_copy(update={"task": "deblurring", "blur": 3, "initial": KERNELS})
SMALL: dict[str, Any] = {"task": "denoising", "solver": "plain", "size": 7, "train_images": 50}
SMALL |= {"test_images": 20, "batch_size": 25}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, Run]]:
    """A store with a run on digits, two on photographs, and a small grid."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "workers", lambda device: 1)
        get_sweep("smoke", folder, **SMALL)
        configs: list[Any] = [DIGITS, KERNELS, FROM_KERNELS]
        return folder, dict(zip(configs, get_runs(configs, folder), strict=True))


@pytest.fixture
def clone(trained: tuple[Path, dict[Any, Run]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository's results in which those runs are committed, and where nothing can be trained."""
    reference = tmp_path / "reference"
    for run in trained[1].values():
        keep_run(run.key, reference / "overnight" / "runs", trained[0])
    monkeypatch.setattr(runs, "REFERENCE", reference)
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    monkeypatch.setattr(notebooks, "RESULTS", tmp_path)
    monkeypatch.setattr(runs, "Trainer", None)
    return tmp_path


@pytest.mark.parametrize("config", [DIGITS, KERNELS, FROM_KERNELS], ids=["digits", "kernels", "from kernels"])
def test_a_committed_run_is_drawn_without_training(
    config: Any, trained: tuple[Path, dict[Any, Run]], clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it was trained, digits' weights to eight bits; by later versions of the code too, whose it is not;
    nothing is stored."""
    original = trained[1][config]
    monkeypatch.setattr(runs, "code_version", lambda: "of another day")
    (run,) = get_runs([config], train=False)
    assert (run.key, run.status, run.config) == (original.key, original.status, config)
    assert run.provenance == original.provenance
    pd.testing.assert_frame_equal(run.history, original.history)
    for name, weight in original.weights.items():
        assert run.weights[name].dtype == torch.float32
        error = (run.weights[name] - weight).abs()
        assert (error <= (2**-8 * weight.abs() + 2**-25 if config is DIGITS else 0)).all()
    assert not (clone / "runs").exists()


def test_kernels_that_a_run_starts_from_are_committed_too(
    trained: tuple[Path, dict[Any, Run]], clone: Path
) -> None:
    start = learned_start(FROM_KERNELS, train=False)
    assert start is not None
    assert torch.equal(start["A"], trained[1][KERNELS].weights["A"])


def test_a_stored_run_comes_first(trained: tuple[Path, dict[Any, Run]], clone: Path) -> None:
    """Its weights are whole."""
    (found,) = find_runs([DIGITS], trained[0])
    assert found is not None
    assert torch.equal(found.weights["A"], trained[1][DIGITS].weights["A"])


def test_some_are_stored_some_committed_and_some_missing(
    trained: tuple[Path, dict[Any, Run]], clone: Path
) -> None:
    """Each comes in its own place, and a configuration that is asked for twice comes twice."""
    missing = DIGITS.model_copy(update={"epochs": 3})
    key = trained[1][FROM_KERNELS].key
    shutil.copytree(trained[0] / "runs" / key, clone / "runs" / key)
    (clone / "reference" / "overnight" / "runs" / f"{key}.zip").unlink()
    found = find_runs([FROM_KERNELS, missing, DIGITS, KERNELS, DIGITS])
    expected = [FROM_KERNELS, None, DIGITS, KERNELS, DIGITS]
    assert [run and (run.config, run.key) for run in found] == [
        config and (config, trained[1][config].key) for config in expected
    ]


def test_what_is_neither_stored_nor_committed_is_told(clone: Path) -> None:
    """In one line, before any work."""
    with pytest.raises(ConfigError, match=r"^train: got False, allowed: True, for deq denoising of 3 epochs"):
        get_run(DIGITS.model_copy(update={"epochs": 3}), train=False)


def test_a_committed_run_is_never_taken_for_a_trained_one(clone: Path) -> None:
    """With training allowed it is trained: here that fails."""
    with pytest.raises(TypeError, match="not callable"):
        get_run(DIGITS)


def test_a_damaged_committed_run_is_named(trained: tuple[Path, dict[Any, Run]], clone: Path) -> None:
    """Wherever a bit is wrong, or the end is missing."""
    path = clone / "reference" / "overnight" / "runs" / f"{trained[1][DIGITS].key}.zip"
    whole = path.read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (0, 100, len(whole) // 2, -2)]
    for content in (*flipped, whole[:-100], b""):
        path.write_bytes(content)
        with pytest.raises(DamagedFile, match=f"^{path}: its content does not match its checksum$"):
            find_runs([DIGITS])


def test_a_history_is_committed_without_weights(
    trained: tuple[Path, dict[Any, Run]], clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands for its run where nothing needs weights, also for later versions of the code; what is stored
    comes first."""
    original = trained[1][DIGITS]
    folder = clone / "reference" / "overnight" / "runs"
    (folder / f"{original.key}.zip").unlink()
    keep_history(original.key, folder, trained[0])
    assert find_histories([DIGITS], trained[0])[0].weights
    monkeypatch.setattr(runs, "code_version", lambda: "of another day")
    (history,) = find_histories([DIGITS])
    assert (history.key, history.status, history.weights) == (original.key, original.status, {})
    assert (history.config, history.provenance) == (DIGITS, original.provenance)
    pd.testing.assert_frame_equal(history.history, original.history)
    assert find_runs([DIGITS]) == [None]
    assert find_histories([KERNELS])[0].weights
    assert find_histories([DIGITS.model_copy(update={"epochs": 3}), DIGITS])[0] is None
    path = folder / f"{original.key}.json"
    whole = path.read_text()
    for content in (whole.replace("completed", "diverged"), whole[:-100], "", "[]"):
        path.write_text(content)
        with pytest.raises(DamagedFile, match=f"^{path}: "):
            find_histories([DIGITS])


def test_the_seeds_after_the_first_need_no_weights(
    trained: tuple[Path, dict[Any, Run]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both models are trained for each seed, or found; a run that did not complete has no PSNR."""
    small = {"size": 7, "train_images": 50, "test_images": 20, "batch_size": 25, "seed": 3}
    first, of_seeds = get_runs_of_seeds("smoke", "denoising", 2, tmp_path, **small)
    assert [[run.config.seed for run in same] for same in of_seeds.values()] == [[3, 4], [3, 4]]
    assert {model: same[0].key for model, same in of_seeds.items()} == {m: r.key for m, r in first.items()}
    table = seed_by_seed(of_seeds)
    assert table.index.tolist() == [3, 4]
    for model, same in of_seeds.items():
        assert table[model].tolist() == [run.history["test_psnr"].iloc[-1] for run in same]
    assert table["ahead"].tolist() == (table["deq"] - table["bilevel"]).tolist()
    later = later_seeds(of_seeds)
    assert {name: run.config.seed for name, run in later.items()} == {"bilevel, seed 4": 4, "deq, seed 4": 4}
    monkeypatch.setattr(runs, "REFERENCE", tmp_path / "reference")
    kept = tmp_path / "reference" / "overnight" / "runs"
    for run in first.values():
        keep_run(run.key, kept, tmp_path)
    for run in later.values():
        keep_history(run.key, kept, tmp_path)
    shutil.rmtree(tmp_path / "runs")
    _, drawn = get_runs_of_seeds("smoke", "denoising", 2, tmp_path, train=False, **small)
    pd.testing.assert_frame_equal(seed_by_seed(drawn), table)
    assert table["reason"].tolist() == ["", ""]
    lost = replace(of_seeds["deq"][1], status="diverged", reason="the loss is not finite")
    partial = seed_by_seed(of_seeds | {"deq": [of_seeds["deq"][0], lost]})
    assert partial["deq"].isna().tolist() == partial["ahead"].isna().tolist() == [False, True]
    assert partial["reason"].tolist() == ["", "deq diverged: the loss is not finite"]
    (kept / f"{of_seeds['deq'][1].key}.json").unlink()
    _, drawn = get_runs_of_seeds("smoke", "denoising", 2, tmp_path, train=False, **small)
    assert seed_by_seed(drawn)["reason"].tolist() == ["", "deq not run"]
    assert seed_by_seed(drawn)["deq"].isna().tolist() == [False, True]
    assert list(later_seeds(drawn)) == ["bilevel, seed 4"]
    (kept / f"{first['deq'].key}.zip").unlink()
    with pytest.raises(
        ConfigError, match=r"^train: got False, allowed: True, for deq denoising of .*, seed 3"
    ):
        get_runs_of_seeds("smoke", "denoising", 2, tmp_path, train=False, **small)


@pytest.fixture
def table(trained: tuple[Path, dict[Any, Run]], clone: Path, monkeypatch: pytest.MonkeyPatch) -> sweep.Sweep:
    """The sweep as it was trained; its table is committed as that of the smoke profile."""
    monkeypatch.setitem(COMMITTED, "smoke", "reference/smoke")
    original = get_sweep("smoke", trained[0], train=False, **SMALL)
    shutil.copytree(trained[0] / "runs", clone / "runs")
    explore.collect("smoke", **SMALL)
    shutil.rmtree(clone / "runs")
    return original


def test_a_committed_table_gives_the_sweep(table: sweep.Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows, epochs and machines, by later versions of the code too, which are not named as theirs;
    what it lacks is not run."""
    assert set(table.runs["status"]) == {"completed", "diverged"}
    trained_by = runs.code_version()
    monkeypatch.setattr(runs, "code_version", lambda: "of another day")
    monkeypatch.setattr("lib.experiments.provenance.code_version", lambda: "of another day")
    drawn = get_sweep("smoke", train=False, **SMALL)
    pd.testing.assert_frame_equal(drawn.runs[explore.KEPT], table.runs[explore.KEPT])
    pd.testing.assert_frame_equal(drawn.epochs[explore.HISTORY], table.epochs[explore.HISTORY])
    assert drawn.provenance["trained_on"] == table.provenance["trained_on"]
    assert drawn.provenance["trained_by"] == [trained_by]
    wider = get_sweep("smoke", train=False, **SMALL | {"gamma": (0.1, 1.0)})
    assert wider.runs.groupby("gamma")["status"].agg(lambda s: (s == NOT_RUN).all()).tolist() == [True, False]


def test_a_sweep_of_which_nothing_is_there_is_told(clone: Path) -> None:
    """In one line, and no table is written."""
    with pytest.raises(DataError, match=r"^no smoke run is stored or committed; `make sweep PROFILE=smoke`"):
        get_sweep("smoke", train=False, **SMALL)
    assert not (clone / "smoke").exists()


def test_without_weights_no_loss_is_checked(table: sweep.Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    """And how many is said."""
    check_stored_losses(get_sweep("smoke", train=False, **SMALL).runs, train=False)
    assert capsys.readouterr().out.endswith("not checked: 2 runs of which no weights are stored here\n")


def made(clone: Path, name: str, keys: list[str], alone: Sequence[str] = ()) -> None:
    files = {f"{name}.png": b"a picture", f"{name}.pdf": b"a large one", f"{name}.csv": b"numbers"}
    origin = {"runs": dict.fromkeys(keys), "histories": dict.fromkeys(alone)}
    write_with_provenance(clone / "overnight" / name, files, origin)


def test_what_was_made_is_kept_with_its_runs(trained: tuple[Path, dict[Any, Run]], clone: Path) -> None:
    """Picture, numbers and provenance, and the runs that some committed figure has, no others."""
    first, second, third = (run.key for run in trained[1].values())
    shutil.copytree(trained[0] / "runs", clone / "runs")
    committed = clone / "reference" / "overnight"
    made(clone, "fig02", [first])
    made(clone, "fig03", [first, second])
    notebooks.keep("fig02", "overnight")
    notebooks.keep("fig03", "overnight")
    assert sorted(path.name for path in (committed / "fig02").iterdir()) == [
        "fig02.csv",
        "fig02.png",
        PROVENANCE,
    ]
    assert sorted(path.stem for path in (committed / "runs").iterdir()) == sorted([first, second])
    made(clone, "fig03", [third])
    notebooks.keep("fig03", "overnight")
    assert sorted(path.stem for path in (committed / "runs").iterdir()) == sorted([first, third])
    made(clone, "fig03", [third], [first, second])
    notebooks.keep("fig03", "overnight")
    names = {f"{first}.zip", f"{second}.json", f"{third}.zip"}
    assert {path.name for path in (committed / "runs").iterdir()} == names
    made(clone, "fig03", [second])
    notebooks.keep("fig03", "overnight")
    assert {path.name for path in (committed / "runs").iterdir()} == {f"{first}.zip", f"{second}.zip"}
    with pytest.raises(ConfigError, match=r"^it has not been made: make fig04 PROFILE=overnight makes it"):
        notebooks.keep("fig04", "overnight")
    with pytest.raises(ConfigError, match=r"^profile: got 'paper', allowed: quick, overnight"):
        notebooks.keep("fig02", "paper")


FOLDER = RESULTS / COMMITTED["overnight"]


def test_what_is_committed_is_small_and_whole() -> None:
    """15 MB at most; each run that a figure was made of is there, and only those."""
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 15e6
    origins = [json.loads(path.read_bytes()) for path in FOLDER.glob(f"fig*/{PROVENANCE}")]
    whole, alone = ({k for origin in origins for k in origin.get(kind, ())} for kind in ("runs", "histories"))
    needed = {f"{key}.zip" for key in whole} | {f"{key}.json" for key in alone - whole}
    assert {path.name for path in FOLDER.glob("runs/*")} == needed


@pytest.mark.parametrize("name", [name for name in notebooks.names() if (FOLDER / name).is_dir()])
def test_a_committed_figure_is_of_the_profile(name: str) -> None:
    """Its runs are those that the profile has today, under whatever version of the code."""
    origin = json.loads((FOLDER / name / PROVENANCE).read_bytes())
    assert (origin["figure"], origin["profile"]) == (name, "overnight")
    for key, told in (origin.get("runs", {}) | origin.get("histories", {})).items():
        values = {field: told[field] for field in told if field not in ("name", "status", "converged")}
        kind = RunConfig if told["dataset"] == "mnist" else FacesConfig
        (run,) = find_histories([kind(**values)])
        assert (run.key, run.status) == (key, told["status"])


def test_the_committed_table_is_of_the_profile() -> None:
    """Every configuration of it is one of the grid's."""
    if sweep.table_folder("overnight").is_dir():
        configs = set(grid("overnight"))
        rows = load_table("overnight").runs.to_dict("records")
        assert {sweep.row_config(row) for row in rows} <= configs
