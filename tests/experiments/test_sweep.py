"""The sweep: a row for every configuration, missing runs, stacks, plans, status and commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from lib.experiments import __main__ as command
from lib.experiments import plan, records, runs, sweep
from lib.experiments.__main__ import main
from lib.experiments.build import shared
from lib.experiments.config import ConfigError, FacesConfig, RunConfig
from lib.experiments.data import DataError
from lib.experiments.plan import STACK_NUMBERS, duration, stack_size, stacks
from lib.experiments.processes import workers
from lib.experiments.profiles import grid
from lib.experiments.records import load_run, run_folder, run_key
from lib.experiments.store import REPOSITORY
from lib.experiments.sweep import NOT_RUN, Sweep, get_sweep, load_sweep, status

TINY: dict[str, Any] = {
    "task": ["inpainting", "denoising"],
    "solver": "plain",
    "initial": "independent",
    "time_budget": [3600.0, 1e-6],
    "train_images": 20,
    "test_images": 10,
    "batch_size": 10,
}
"""Some diverge, because the step 2.1 is too long for plain iteration, and some run out of time."""
CONFIGS = grid("smoke", **TINY)
ARGUMENTS = ["--profile", "smoke", *(text for name in TINY for text in ("-p", name, str(TINY[name])))]
FILES = ["sweep_epochs.csv", "sweep_epochs.parquet", "sweep_provenance.json"]
FILES += ["sweep_runs.csv", "sweep_runs.parquet"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sweep]:
    """A store with the tiny sweep, and the sweep."""
    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "workers", lambda device: 1)
        return results, get_sweep("smoke", results, **TINY)


@pytest.fixture
def results(tmp_path: Path, trained: tuple[Path, Sweep], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the store in place of the repository's, without training."""
    copy = shutil.copytree(trained[0], tmp_path / "results")
    for module in (records, sweep):
        monkeypatch.setattr(module, "RESULTS", copy)
    monkeypatch.setattr(runs, "_train_stacks", None)
    return copy


def expected_status(config: RunConfig) -> str:
    if config.tau > 2:
        return "diverged"
    return "completed" if config.time_budget > 1 else "out of time"


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_every_configuration_has_a_row(trained: tuple[Path, Sweep]) -> None:
    """A row has parameters, key, status, reason and the metrics of the last epoch."""
    results, swept = trained
    assert swept.runs["key"].tolist() == [run_key(config) for config in CONFIGS]
    assert [sweep.row_config(row) for row in swept.runs.to_dict("records")] == CONFIGS
    assert swept.runs["status"].tolist() == [expected_status(config) for config in CONFIGS]
    assert (swept.runs["reason"] == "").tolist() == (swept.runs["status"] == "completed").tolist()
    assert (swept.runs["seconds"] > 0).all()
    for row, config in zip(swept.runs.to_dict("records"), CONFIGS, strict=True):
        run = load_run(config, results)
        assert run is not None
        epochs = swept.epochs[swept.epochs["key"] == run.key].drop(columns="key").reset_index(drop=True)
        assert row["seconds"] == run.provenance["seconds"]
        assert row["epochs_finished"] == max([*epochs["epoch"], 0])
        if not run.history.empty:
            pd.testing.assert_frame_equal(epochs[list(run.history)], run.history)
        for name in set(run.history) - {"epoch", "seconds"}:
            assert row[name] == run.history[name].iloc[-1]


def test_tables_and_provenance_are_restored(trained: tuple[Path, Sweep]) -> None:
    """Parquet and CSV restore the tables to the last bit."""
    folder, swept = trained[0] / "smoke", trained[1]
    assert sorted(path.name for path in folder.iterdir()) == FILES
    for name, table in (("sweep_runs", swept.runs), ("sweep_epochs", swept.epochs)):
        pd.testing.assert_frame_equal(pd.read_parquet(folder / f"{name}.parquet"), table, check_exact=True)
        text = pd.read_csv(folder / f"{name}.csv", dtype={"key": str})
        if "reason" in text:
            text["reason"] = text["reason"].fillna("")
        # CSV does not keep the type of an empty column.
        text[table.columns[table.isna().all()]] = None
        pd.testing.assert_frame_equal(text, table, check_exact=True)
    provenance = json.loads((folder / "sweep_provenance.json").read_text())
    axes = {"model", "task", "tau", "start", "adjoint", "time_budget"}
    assert provenance["axes"].keys() == axes
    expected = dict(CONFIGS[0])
    assert provenance["shared"] == {name: expected[name] for name in expected if name not in axes}
    assert provenance["statuses"] == {"completed": 4, "diverged": 8, "out of time": 4}
    assert len(provenance["trained_on"]) == 1
    assert provenance["sha256"].keys() == set(FILES) - {"sweep_provenance.json"}


def test_stored_sweep_is_not_retrained(trained: tuple[Path, Sweep], results: Path) -> None:
    again = get_sweep("smoke", **TINY)
    pd.testing.assert_frame_equal(again.runs, trained[1].runs)
    assert again.provenance == trained[1].provenance
    with pytest.raises(TypeError):
        get_sweep("smoke", **TINY | {"seed": 1})


def test_missing_runs_are_marked_without_training(
    trained: tuple[Path, Sweep], results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged record is set aside, and its run counts as missing."""
    shutil.rmtree(run_folder(CONFIGS[-1], results))
    path = run_folder(CONFIGS[0], results) / "run.json"
    path.write_bytes(path.read_bytes().replace(b'"epoch": 0', b'"epoch": 7'))
    swept = get_sweep("smoke", train=False, **TINY)
    assert error_line(capsys).startswith(f"set aside {path} as ")
    lost = swept.runs["status"] == NOT_RUN
    assert lost.tolist() == [True, *[False] * (len(CONFIGS) - 2), True]
    assert swept.runs.loc[lost, ["seconds", "test_loss", "test_psnr"]].isna().all(axis=None)
    assert not swept.epochs["key"].isin(swept.runs.loc[lost, "key"]).any()
    pd.testing.assert_frame_equal(swept.runs[~lost], trained[1].runs[~lost.to_numpy()])


def test_sweep_without_runs_has_all_rows(tmp_path: Path) -> None:
    """`get_sweep` names the command that trains it."""
    swept = load_sweep("smoke", CONFIGS, tmp_path)
    sweep.write_tables(swept, tmp_path)
    assert pd.read_parquet(tmp_path / "smoke" / "sweep_runs.parquet")["status"].eq(NOT_RUN).all()
    assert pd.read_parquet(tmp_path / "smoke" / "sweep_epochs.parquet").empty
    table = status(CONFIGS, tmp_path)
    assert (table["not run"] == table["all"]).all()
    assert not (tmp_path / "runs").exists()
    with pytest.raises(
        DataError, match=r"^no smoke run is stored or committed; run `make sweep PROFILE=smoke`"
    ):
        get_sweep("smoke", tmp_path, train=False, **TINY)


def test_status_counts_every_configuration(results: Path) -> None:
    """A checkpoint without a record counts as in progress."""
    place = ("inpainting", "deq")
    unfinished, untouched = (c for c in CONFIGS if (c.task, c.model) == place and c.tau < 2)
    folder = run_folder(unfinished, results)
    (folder / "run.json").rename(folder / "checkpoint.pt")
    shutil.rmtree(run_folder(untouched, results))
    table = status(CONFIGS, results)
    assert table.columns.tolist() == ["completed", "diverged", "out of time", "in progress", "not run", "all"]
    assert table.loc[place].tolist() == [0, 2, 0, 1, 1, 4]
    assert table.loc[("denoising", "bilevel")].tolist() == [1, 2, 1, 0, 0, 4]
    assert table.loc[("all", "")].tolist() == [3, 8, 3, 1, 1, 16]


def test_stacks_are_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stack has equal shared parameters and similar steps; the groups alternate."""
    monkeypatch.setattr(plan, "stack_size", lambda config, device: 7)
    configs = grid("paper", task="denoising", initial="independent")
    groups = stacks(iter(configs), torch.device("cpu"))
    assert sorted(run_key(config) for group in groups for config in group) == sorted(map(run_key, configs))
    assert {len(group) for group in groups} == {6, 7}
    assert all(len({shared(config) for config in group}) == 1 for group in groups)
    assert len({shared(group[0]) for group in groups[:6]}) == 6
    first = [config.tau for group in groups[::6] for config in group]
    assert first == sorted(first)


def test_stack_size_follows_device_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with less memory takes fewer members, but at least one."""
    config = RunConfig(size=14, batch_size=20)
    assert stack_size(config, torch.device("cpu")) == STACK_NUMBERS["cpu"] // (20 * 14**2)
    sizes = []
    for free in (0, 2**30, 2**40):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        sizes.append(stack_size(config, torch.device("cuda")))
    assert sizes == [1, 2**30 // plan.NUMBER_BYTES // (20 * 14**2), STACK_NUMBERS["cuda"] // (20 * 14**2)]
    assert stack_size(FacesConfig(optimizer="lbfgs"), torch.device("cpu")) == 1


def test_plan_counts_remaining_runs(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs and seconds for each task and model, limited by the time budgets."""
    missing = [c for c in CONFIGS if (c.model, c.task, c.tau) == ("bilevel", "denoising", 0.5)]
    for config in missing:
        shutil.rmtree(run_folder(config, results))
    late = [config for config in missing if config.time_budget < 1]
    table = plan.plan(late)
    assert table["runs"].to_dict() == {("denoising", "bilevel"): 1}
    assert table["time"].tolist() == [1e-6 / workers(torch.device("cpu"))]
    assert main(["plan", *ARGUMENTS]) == 0
    assert "2 of 16 runs are left, on " in capsys.readouterr().out
    command.print_plan([config for config in CONFIGS if config not in missing])
    assert capsys.readouterr().out == "all 14 runs are done\n"


def test_durations_have_units() -> None:
    assert [duration(s) for s in (0.6, 99, 100, 12_240)] == ["1 s", "99 s", "2 min", "3.4 h"]


def test_command_prints_tables_and_status(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(results / "smoke")
    assert main(["run", *ARGUMENTS]) == 0
    *paths, counts = capsys.readouterr().out.splitlines()
    assert sorted(paths) == [str(results / "smoke" / name) for name in FILES]
    assert sorted(counts.split(", ")) == ["4 completed", "4 out of time", "8 diverged"]
    assert main(["status", *ARGUMENTS, "-p", "seed", "[0, 1]", "-p", "tau", "None"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["all", "4", "8", "4", "0", "16", "32"]


def test_interrupted_command_writes_tables(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(configs: list[RunConfig], *args: object) -> None:
        shutil.rmtree(run_folder(configs[0], results))
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train_runs", interrupted)
    assert main(["run", *ARGUMENTS]) == 130
    printed = capsys.readouterr()
    assert "1 not run" in printed.out
    assert printed.err == "interrupted; run the same command again to resume\n"


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["run", "--profile", "smok"], "`profile` "),
        (["status", "-p", "tau", "[]"], "`tau` "),
        (["plan", "-p", "lambda", "1.0"], "`lambda` "),
        (["train", "-p", "profile", "quick"], "`profile` "),
        (["train", "-p", "noise", "-1e-5"], "`noise` must be a number of at least 0, got -1e-05."),
        (["train", "-p"], "`-p` must have a value: -p NAME VALUE."),
        (["train", "-p", "noise", "--profile", "quick"], "`noise` must have a value: -p NAME VALUE."),
        (["train", "-p", "noise=0.5", "-p", "tau", "1"], "`noise=0.5` must have a value: -p NAME VALUE."),
        (["train", "-p", "dataset", "my", "scans"], "`dataset` must be one value; quote it: 'my scans'."),
        (["run", "--job", "minutes"], "`minutes` must have a value: --job NAME VALUE."),
        (["run", "--profil"], "argument --profile: expected one argument"),
    ],
)
def test_invalid_arguments_are_rejected_in_one_line(
    arguments: list[str], start: str, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert error_line(capsys).startswith(start)


def test_failure_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("the first line\nand the second")

    monkeypatch.setattr(command, "train_runs", fail)
    assert main(["run", *ARGUMENTS]) == 1
    assert error_line(capsys) == "the first line and the second"


@pytest.mark.parametrize("sent", [signal.SIGINT, None])
def test_abandoned_command_prints_at_most_one_line(sent: int | None) -> None:
    """The command gets Ctrl-C in its first second, or its output is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    arguments = ["-m", "lib.experiments", "status", "--profile", "smoke"]
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=REPOSITORY, stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    if sent:
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(sent)
    assert process.communicate()[1] in ("", "interrupted; run the same command again to resume\n")


def test_train_command_trains_one_configuration(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Train digits, or photographs if `dataset` is given; None is an accepted value."""
    values = ["-p", "size", "7", "-p", "train_images", "20", "-p", "batch_size", "20", "-p", "model", "deq"]
    monkeypatch.undo()
    monkeypatch.setattr(records, "RESULTS", results)
    assert main(["train", "--profile", "smoke", *values]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"run {Path(printed[-1]).name}: deq, denoising, mnist"
    assert "completed" in printed
    assert (Path(printed[-1]) / "run.json").exists()
    config = command.one_config("quick", [("dataset", "faces"), ("patience", "none"), ("filters", "5")])
    assert (config.dataset, config.patience, config.task) == ("faces", None, "denoising")
    searched = [("dataset", "faces"), ("optimizer", "lbfgs"), ("learning_rate", "0.1")]
    with pytest.raises(ConfigError, match=r"^`learning_rate` must be left out"):
        command.one_config("quick", searched)


def test_record_of_another_configuration_is_set_aside(
    trained: tuple[Path, Sweep], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    for config in (CONFIGS[0], CONFIGS[-1]):
        shutil.copytree(run_folder(config, trained[0]), run_folder(config, here))
    (run_folder(CONFIGS[0], here) / "run.json").replace(run_folder(CONFIGS[-1], here) / "run.json")
    assert load_run(CONFIGS[-1], here) is None
    assert "it belongs to another configuration" in error_line(capsys)
