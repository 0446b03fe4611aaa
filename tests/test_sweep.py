"""The sweep: every configuration a row, whatever became of it, nothing trained twice, and what is left."""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import sys
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from cases import TINY

from lib.experiments import __main__ as command
from lib.experiments import runs, sweep, trainer
from lib.experiments.__main__ import main
from lib.experiments.config import ConfigError, RunConfig
from lib.experiments.data import MNIST_FILES, DataError
from lib.experiments.profiles import grid
from lib.experiments.runs import code_version, get_run, run_folder, run_key
from lib.experiments.sweep import Sweep, duration, get_sweep, plan, status
from lib.experiments.trainer import Trainer

CONFIGS = grid("smoke", **TINY)
ARGUMENTS = [text for name, value in TINY.items() for text in ("-p", name, str(value))]
FILES = ["sweep_epochs.csv", "sweep_epochs.parquet", "sweep_provenance.json"]
FILES += ["sweep_runs.csv", "sweep_runs.parquet"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sweep, bytes]:
    """Results with the tiny sweep, the sweep, and the record of its first run, stored before the others."""
    results = tmp_path_factory.mktemp("results")
    get_run(CONFIGS[0], results)
    record = (run_folder(CONFIGS[0], results) / "run.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "workers", lambda device: 1)
        return results, get_sweep("smoke", results, **TINY), record


@pytest.fixture
def results(tmp_path: Path, trained: tuple[Path, Sweep, bytes]) -> Path:
    """A copy of the results with the tiny sweep, to be changed."""
    return shutil.copytree(trained[0], tmp_path / "results")


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither this process nor one that it starts can train."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a run was trained that should not have been")

    monkeypatch.setattr(runs, "Trainer", refuse)
    monkeypatch.setattr(sweep, "Trainer", refuse)
    monkeypatch.setattr(runs, "in_processes", refuse)


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, results: Path) -> Path:
    """The copied results in the place of the repository's."""
    monkeypatch.setattr(runs, "RESULTS", results)
    monkeypatch.setattr(sweep, "RESULTS", results)
    return results


def stored_files(results: Path) -> dict[Path, tuple[bytes, int]]:
    """All files of the store of runs, with their content and their time of change."""
    files = (path for path in (results / "runs").rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def expected_status(config: RunConfig) -> str:
    if config.tau > 2:
        return "diverged"
    return "completed" if config.time_budget > 1 else "out of time"


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_every_configuration_is_a_row(trained: tuple[Path, Sweep, bytes]) -> None:
    """The table has the grid's configurations in the grid's order, each with its parameters and its key."""
    _, swept, _ = trained
    assert swept.profile == "smoke"
    assert swept.runs["key"].tolist() == [run_key(config) for config in CONFIGS]
    assert swept.runs["key"].is_unique
    parameters = swept.runs[list(RunConfig.model_fields)].to_dict("records")
    assert [RunConfig(**values) for values in parameters] == CONFIGS


def test_every_row_says_how_its_run_ended(trained: tuple[Path, Sweep, bytes]) -> None:
    """Completed, diverged and out of time, the last two with a reason, and the epochs each came to."""
    _, swept, _ = trained
    assert swept.runs["status"].tolist() == [expected_status(config) for config in CONFIGS]
    by_status = swept.runs.groupby("status")
    assert set(by_status.groups) == {"completed", "diverged", "out of time"}
    completed, diverged, late = map(by_status.get_group, ("completed", "diverged", "out of time"))
    assert set(completed["reason"]) == {""}
    assert set(completed["epochs_finished"]) == {2}
    assert diverged["reason"].str.match(r"test loss .* above 1000 after epoch 0").all()
    assert set(late["reason"]) == {"time budget of 1e-06 s spent in epoch 1"}
    assert set(late["epochs_finished"]) == set(diverged["epochs_finished"]) == {0}
    assert completed["test_loss"].notna().all()
    assert late["test_loss"].notna().all()
    assert late["train_loss"].isna().all()
    assert diverged["test_loss"].isna().all()
    assert (swept.runs["seconds"] > 0).all()


def test_a_row_has_the_last_epochs_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the lowest loss, nor the first one, where the loss goes down and up again."""
    history = [
        {"epoch": epoch, "seconds": float(epoch), "test_loss": loss, "test_psnr": 10 - loss}
        for epoch, loss in enumerate((0.9, 0.2, 0.4))
    ]
    record = {"status": "completed", "reason": "", "history": history}
    record |= {"provenance": {"seconds": 2.5, "environment": {}, "code": "here"}}
    monkeypatch.setattr(sweep, "read_record", lambda config, results: record)
    (row,) = sweep.load_sweep("smoke", CONFIGS[:1]).runs.to_dict("records")
    assert (row["test_loss"], row["test_psnr"], row["epochs_finished"]) == (0.4, 9.6, 2)
    assert row["seconds"] == 2.5


def test_every_epoch_is_a_row(trained: tuple[Path, Sweep, bytes], no_training: None) -> None:
    """The epochs of each run are its history, and its row ends with the metrics of the last one."""
    results, swept, _ = trained
    count = 0
    for row, config in zip(swept.runs.to_dict("records"), CONFIGS, strict=True):
        run = get_run(config, results)
        epochs = swept.epochs[swept.epochs["key"] == run.key].drop(columns="key").reset_index(drop=True)
        assert len(epochs) == len(run.history)
        assert row["seconds"] == run.provenance["seconds"]
        count += len(epochs)
        if not run.history.empty:
            pd.testing.assert_frame_equal(epochs[list(run.history)], run.history)
            last = run.history.iloc[-1].to_dict()
            assert last.pop("epoch") == row["epochs_finished"]
            del last["seconds"]
            assert {name: row[name] for name in last} == last
        assert epochs.drop(columns=list(run.history)).isna().all(axis=None)
    assert count == len(swept.epochs) == 4 * 3 + 4 * 1


def test_both_tables_can_be_read_back(trained: tuple[Path, Sweep, bytes]) -> None:
    """Parquet and CSV hold the tables to the last bit of every number, in the folder of the profile."""
    results, swept, _ = trained
    folder = results / "smoke"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    for name, table in (("sweep_runs", swept.runs), ("sweep_epochs", swept.epochs)):
        pd.testing.assert_frame_equal(pd.read_parquet(folder / f"{name}.parquet"), table, check_exact=True)
        text = pd.read_csv(folder / f"{name}.csv", dtype={"key": str})
        if "reason" in text:
            text["reason"] = text["reason"].fillna("")
        # What is None in every row has no type in a text.
        text[table.columns[table.isna().all()]] = None
        pd.testing.assert_frame_equal(text, table, check_exact=True)


def test_the_provenance_says_where_the_tables_come_from(trained: tuple[Path, Sweep, bytes]) -> None:
    """Axes and shared values together are all parameters; the digests are those of the files beside it."""
    results, swept, _ = trained
    folder = results / "smoke"
    provenance = json.loads((folder / "sweep_provenance.json").read_text())
    assert provenance["profile"] == "smoke"
    axes = {name: set(values) for name, values in provenance["axes"].items()}
    assert axes == {
        "model": {"deq", "bilevel"},
        "task": {"inpainting", "denoising"},
        "tau": {0.5, 2.1},
        "start": {"data", "zero"},
        "adjoint": {"solved", "neumann"},
        "time_budget": {3600.0, 1e-6},
    }
    expected = CONFIGS[0].model_dump()
    assert provenance["shared"] == {name: expected[name] for name in expected if name not in axes}
    assert all(type(provenance["shared"][name]) is type(expected[name]) for name in provenance["shared"])
    assert provenance["statuses"] == {"completed": 4, "diverged": 8, "out of time": 4}
    assert provenance["data"] == {"mnist": MNIST_FILES}
    assert provenance["code"] == code_version()
    assert provenance["training_seconds"] == pytest.approx(swept.runs["seconds"].sum())
    (environment,) = provenance["trained_on"]
    assert environment["packages"]["torch"]
    assert set(provenance["sha256"]) == set(FILES) - {"sweep_provenance.json"}
    for name, digest in provenance["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_what_is_stored_is_not_trained_again(
    trained: tuple[Path, Sweep, bytes], results: Path, no_training: None
) -> None:
    """A run stored before the sweep is taken as it is, and so is the whole sweep the second time."""
    _, swept, record = trained
    assert (run_folder(CONFIGS[0], results) / "run.json").read_bytes() == record
    before = stored_files(results)
    again = get_sweep("smoke", results, **TINY)
    assert stored_files(results) == before
    pd.testing.assert_frame_equal(again.runs, swept.runs)
    pd.testing.assert_frame_equal(again.epochs, swept.epochs)
    assert again.provenance == swept.provenance


def test_what_is_missing_is_asked_for(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default the whole grid is handed to the training, which leaves out what is stored."""
    asked = []
    monkeypatch.setattr(sweep, "train_runs", lambda configs, where: asked.append((list(configs), where)))
    get_sweep("smoke", results, **TINY)
    assert asked == [(CONFIGS, results)]


def test_without_training_the_missing_are_marked(
    trained: tuple[Path, Sweep, bytes], results: Path, no_training: None
) -> None:
    """A run that is not stored is a row `not run` without numbers; the others are as they were."""
    missing = [CONFIGS[0], CONFIGS[-1]]
    for config in missing:
        shutil.rmtree(run_folder(config, results))
    before = stored_files(results)
    swept = get_sweep("smoke", results, train=False, **TINY)
    assert stored_files(results) == before
    lost = swept.runs["key"].isin([run_key(config) for config in missing])
    assert lost.sum() == 2
    assert set(swept.runs.loc[lost, "status"]) == {"not run"}
    assert set(swept.runs.loc[lost, "epochs_finished"]) == {0}
    assert swept.runs.loc[lost, ["seconds", "test_loss", "test_psnr"]].isna().all(axis=None)
    assert not swept.epochs["key"].isin(swept.runs.loc[lost, "key"]).any()
    pd.testing.assert_frame_equal(swept.runs[~lost], trained[1].runs[~lost.to_numpy()])
    assert swept.provenance["statuses"]["not run"] == 2


def test_a_sweep_of_nothing_is_a_table_too(tmp_path: Path, no_training: None) -> None:
    """Without any run the tables have their rows and columns, and can be written and read."""
    swept = sweep.load_sweep("smoke", CONFIGS, tmp_path)
    sweep.write_tables(swept, tmp_path)
    assert set(swept.runs["status"]) == {"not run"}
    assert len(swept.runs) == len(CONFIGS)
    assert swept.epochs.empty
    assert swept.provenance["statuses"] == {"not run": len(CONFIGS)}
    assert swept.provenance["training_seconds"] == 0
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "smoke" / "sweep_runs.parquet"), swept.runs)
    assert pd.read_parquet(tmp_path / "smoke" / "sweep_epochs.parquet").empty
    assert not (tmp_path / "runs").exists()


def test_a_damaged_record_is_not_tabulated(
    results: Path, no_training: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A record with a changed number is set aside, and its run is one that is missing."""
    path = run_folder(CONFIGS[0], results) / "run.json"
    path.write_bytes(path.read_bytes().replace(b'"epoch": 0', b'"epoch": 7'))
    swept = get_sweep("smoke", results, train=False, **TINY)
    assert swept.runs["status"].tolist()[0] == "not run"
    assert "not run" not in swept.runs["status"].tolist()[1:]
    assert error_line(capsys).startswith(f"set aside {path} as ")


@pytest.mark.parametrize(
    ("profile", "values", "named"),
    [
        ("smok", {}, "profile"),
        ("smoke", {"tau": [0.5, -1.0]}, "tau"),
        ("smoke", {"tau": []}, "tau"),
        ("smoke", {"taus": 0.5}, "taus"),
    ],
)
def test_a_bad_sweep_is_refused_before_any_work(
    tmp_path: Path, no_training: None, profile: str, values: dict[str, Any], named: str
) -> None:
    """The line names the parameter, and nothing is written."""
    with pytest.raises(ConfigError, match=rf"^{named}: ") as caught:
        get_sweep(profile, tmp_path, **values)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_status_counts_every_configuration(results: Path, no_training: None) -> None:
    """Each is counted once under its state, with sums; a checkpoint without a record is in progress."""
    place = ("inpainting", "deq")
    here = [config for config in CONFIGS if (config.task, config.model) == place]
    unfinished, untouched = (config for config in here if config.tau < 2)
    folder = run_folder(unfinished, results)
    (folder / "run.json").rename(folder / "checkpoint.pt")
    shutil.rmtree(run_folder(untouched, results))
    before = stored_files(results)
    table = status(CONFIGS, results)
    assert stored_files(results) == before
    assert table.columns.tolist() == ["completed", "diverged", "out of time", "in progress", "not run", "all"]
    assert table.loc[place].tolist() == [0, 2, 0, 1, 1, 4]
    assert table.loc[("denoising", "bilevel")].tolist() == [1, 2, 1, 0, 0, 4]
    assert table.loc[("all", "")].tolist() == [3, 8, 3, 1, 1, 16]
    assert len(table) == 5
    assert table.drop(index="all").sum().tolist() == table.loc[("all", "")].tolist()


def test_the_status_of_nothing(tmp_path: Path) -> None:
    """In an empty store all is `not run`, and asking creates nothing."""
    table = status(CONFIGS, tmp_path)
    assert (table["not run"] == table["all"]).all()
    assert table.loc[("all", ""), "all"] == len(CONFIGS)
    assert list(tmp_path.iterdir()) == []


SOLVABLE = TINY | {"task": "denoising", "solver": "anderson", "time_budget": 3600.0, "max_steps": 5}


def test_the_plan_is_of_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and positive seconds of each task and model, shared by the processes; nothing is stored."""
    monkeypatch.setattr(sweep, "workers", lambda device: 4)
    configs = grid("smoke", **SOLVABLE)
    table = plan(configs, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert table["runs"].to_dict() == {("denoising", "deq"): 2, ("denoising", "bilevel"): 2}
    assert (table["seconds per run"] > 0).all()
    assert table["wall"].tolist() == pytest.approx((table["runs"] * table["seconds per run"] / 4).tolist())
    weights = {
        model: 2 * 4 * runs.weight_count(RunConfig(**configs[0].model_dump() | {"model": model}))
        for model in ("deq", "bilevel")
    }
    rows = 2 * sweep.ROW_BYTES * (configs[0].epochs + 1)
    assert table["stored"].tolist() == pytest.approx([(bytes + rows) / 1e9 for bytes in weights.values()])
    members = [runs.member_bytes(config, torch.device("cpu")) for config in configs[::2]]
    assert table["memory"].tolist() == pytest.approx([2 * bytes / 1e9 for bytes in members])


def test_the_plan_tries_stacks_of_the_size_that_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is trained alone takes the time that it takes alone, however many there are."""
    sizes: list[int] = []

    class Noted(Trainer):
        def __init__(self, configs: Sequence[RunConfig], *arguments: Any) -> None:
            super().__init__(configs, *arguments)
            sizes.append(len(configs))

    monkeypatch.setattr(sweep, "Trainer", Noted)
    configs = grid("smoke", **SOLVABLE | {"model": "deq", "noise": [0.01 * k for k in range(10)]})
    for size in (1, 3, 90):
        monkeypatch.setattr(runs, "stack_size", lambda config, device, size=size: size)
        sizes.clear()
        plan(configs, tmp_path)
        trained = sorted(map(len, runs.stacks(configs, torch.device("cpu"))))
        assert set(sizes) <= set(trained)
        assert 8 <= sum(sizes) <= max(8 + trained[-1], len(configs))


def test_the_plan_grows_with_the_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks evenly a thousand times the epochs take about a thousand times as long, but
    no longer than the time budget."""
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=count().__next__))
    values = SOLVABLE | {"model": "deq", "time_budget": 1e6, "test_images": 1}
    short = plan(grid("smoke", **values), tmp_path)["wall"].sum()
    long = plan(grid("smoke", **values | {"epochs": 2000}), tmp_path)["wall"].sum()
    assert 900 * short < long <= 1000 * short
    capped = plan(grid("smoke", **values | {"epochs": 2000, "time_budget": 0.01}), tmp_path)
    assert capped["seconds per run"].tolist() == [pytest.approx(0.01)]


def test_the_plan_leaves_out_what_is_done(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the missing runs are tried and counted; when none is missing the plan is empty."""
    missing = [c for c in CONFIGS if c.model == "bilevel" and c.task == "denoising" and c.time_budget > 1]
    for config in missing:
        shutil.rmtree(run_folder(config, repository))
    before = stored_files(repository)
    assert plan(CONFIGS, repository)["runs"].to_dict() == {("denoising", "bilevel"): 2}
    capsys.readouterr()
    command.print_plan(CONFIGS)
    assert "2 of 16 runs are left, in 1 stacks on " in capsys.readouterr().out
    assert stored_files(repository) == before
    done = [config for config in CONFIGS if config not in missing]
    assert plan(done, repository).empty
    monkeypatch.setattr(sweep, "Trainer", None)
    command.print_plan(done)
    assert capsys.readouterr().out == "all 14 runs are done\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.6, "1 s"),
        (40, "40 s"),
        (99, "99 s"),
        (100, "2 min"),
        (720, "12 min"),
        (5940, "99 min"),
        (6000, "1.7 h"),
        (12_240, "3.4 h"),
        (360_000, "100.0 h"),
    ],
)
def test_a_time_for_people(seconds: float, text: str) -> None:
    """Seconds below two minutes, minutes below two hours, then hours."""
    assert duration(seconds) == text


def test_run_writes_the_tables(
    repository: Path,
    trained: tuple[Path, Sweep, bytes],
    no_training: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command names the files that it wrote and says how the runs ended."""
    shutil.rmtree(repository / "smoke")
    assert main(["run", "--profile", "smoke", *ARGUMENTS]) == 0
    printed = capsys.readouterr()
    *paths, counts = printed.out.splitlines()
    assert sorted(paths) == [str(repository / "smoke" / name) for name in FILES]
    assert sorted(counts.split(", ")) == ["4 completed", "4 out of time", "8 diverged"]
    assert printed.err == ""
    read = pd.read_parquet(repository / "smoke" / "sweep_runs.parquet")
    pd.testing.assert_frame_equal(read, trained[1].runs)


def test_an_interrupted_run_writes_the_tables(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After Ctrl-C the tables are of what is there, a line says so, and the exit status is the shell's."""

    def interrupted(configs: list[RunConfig], *args: object) -> None:
        shutil.rmtree(run_folder(configs[0], repository))
        raise KeyboardInterrupt

    shutil.rmtree(repository / "smoke")
    monkeypatch.setattr(command, "train_runs", interrupted)
    assert main(["run", "--profile", "smoke", *ARGUMENTS]) == 130
    printed = capsys.readouterr()
    assert "1 not run" in printed.out
    assert len(printed.err.splitlines()) == 1
    read = pd.read_parquet(repository / "smoke" / "sweep_runs.parquet")
    assert read["status"].tolist() == ["not run", *map(expected_status, CONFIGS[1:])]
    assert sorted(path.name for path in (repository / "smoke").iterdir()) == FILES


def test_status_and_plan_print_what_is_done(
    repository: Path, no_training: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are of the grid that was asked for, values , and write nothing."""
    before = stored_files(repository)
    assert main(["status", "--profile", "smoke", *ARGUMENTS]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].split() == ["all", "4", "8", "4", "0", "0", "16"]
    assert main(["plan", "--profile", "smoke", *ARGUMENTS]) == 0
    assert capsys.readouterr().out == "all 16 runs are done\n"
    assert (
        main(["status", "--profile", "smoke", *ARGUMENTS, "-p", "seed", "[0, 1]", "-p", "tau", "null"]) == 0
    )
    assert capsys.readouterr().out.splitlines()[-1].split() == ["all", "4", "8", "4", "0", "16", "32"]
    assert stored_files(repository) == before


@pytest.mark.parametrize("command", ["run", "status", "plan"])
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--profile", "smok"], "profile"),
        (["-p", "tau", "-1.0"], "tau"),
        (["-p", "tau", "[]"], "tau"),
        (["-p", "tau", "[0.1, .nan]"], "tau"),
        (["-p", "tau", "{a: 1}"], "tau"),
        (["-p", "tau", "a\nb"], "tau"),
        (["-p", "epochs", "2.5"], "epochs"),
        (["-p", "lambda", "1.0"], "lambda"),
    ],
)
def test_a_bad_value_is_told_in_one_line(
    command: str,
    arguments: list[str],
    named: str,
    repository: Path,
    no_training: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every command refuses it with exit status 2 before any work."""
    before = sorted(repository.rglob("*"))
    assert main([command, *arguments]) == 2
    assert error_line(capsys).startswith(f"sweep: {named}: ")
    assert sorted(repository.rglob("*")) == before


@pytest.mark.parametrize("error", [DataError, RuntimeError])
def test_a_failed_training_is_told_in_one_line(
    error: type[Exception],
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What stops the training is told without a traceback, with exit status 1."""

    def failing(*args: object) -> None:
        raise error("the first line\nand the second")

    monkeypatch.setattr(command, "train_runs", failing)
    assert main(["run", "--profile", "smoke", *ARGUMENTS]) == 1
    assert error_line(capsys) == "sweep: the first line and the second"


def test_the_command_ends_with_its_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a script, too: exit status 2, one line, and nothing on standard output."""
    monkeypatch.setattr(
        sys, "argv", [command.__file__, "run", "--profile", "smoke", "-p", "noise", "[0.1, -1]"]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(command.__file__, run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "sweep: noise: got -1, allowed: greater than or equal to 0\n")
