"""The sweep as cluster jobs: submission, resumption, options, and the script for Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest

from lib.experiments import cluster, records, sweep
from lib.experiments.__main__ import main
from lib.experiments.cluster import Jobs, Share, job_options, train_on_cluster
from lib.experiments.config import ConfigError
from lib.experiments.profiles import grid
from lib.experiments.records import is_stored, run_folder
from lib.experiments.store import REPOSITORY

# Local jobs outlive the objects that started them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

VALUES: dict[str, Any] = {"task": "denoising", "initial": "independent", "epochs": 200}
CONFIGS = grid("smoke", **VALUES)
"""Two stacks, one of each model."""
RUN = ["run", "--profile", "smoke", *(text for name in VALUES for text in ("-p", name, str(VALUES[name])))]
LOCAL = [*RUN, "--cluster", "local", "--job", "jobs", "2"]

COMMAND = """
import sys
from pathlib import Path
from lib.experiments import __main__, cluster, records, sweep
cluster.RESULTS = records.RESULTS = sweep.RESULTS = Path(sys.argv[1])
sys.exit(__main__.main(sys.argv[2:]))
"""


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the repository's results."""
    for module in (cluster, records, sweep):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Stubs of Slurm's programs: jobs get the number 7 and end at once."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("srun", "squeue", "scontrol"):
        program(programs / name, "exit 0")
    program(programs / "sbatch", f"cp $1 {tmp_path}/script; echo Submitted batch job 7")
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setitem(cluster.LOOK_SECONDS, "slurm", 0.0)
    return programs


def program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def jobs_of(results: Path) -> list[psutil.Process]:
    """Return the training processes of local jobs."""
    lines = {process: process.info["cmdline"] or [""] for process in psutil.process_iter(["cmdline"])}
    return [p for p, line in lines.items() if "submitit.core._submit" in line and str(results) in line[-1]]


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def command(results: Path) -> Iterator[subprocess.Popen[str]]:
    """Run the command in its own session, and yield it once both jobs have a checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(results), *LOCAL],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            wait_for(lambda: all((run_folder(c, results) / "checkpoint.pt").exists() for c in CONFIGS))
            yield process
        finally:
            process.kill()
            for job in jobs_of(results):
                job.kill()


def test_jobs_are_followed_cancelled_and_resumed(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends the command, not the jobs. The same command then follows the remaining jobs without
    submitting, and later resumes the runs of a cancelled job."""
    with command(results) as process:
        cancelled, suspended = jobs_of(results)
        left = suspended.ppid()
        suspended.suspend()
        (folder,) = (results / "jobs").glob("local-*")
        os.kill(cancelled.ppid(), signal.SIGTERM)
        wait_for(lambda: jobs_of(results) == [suspended])
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait() == 130
        following = Thread(target=lambda: (time.sleep(1), suspended.resume()))
        following.start()
        assert main(LOCAL) == 1
        following.join()
        error = process.communicate()[1]
    last = error.splitlines()[-1].strip()
    assert last.startswith("the jobs go on: ")
    assert str(left) in last.partition("`kill ")[2].partition("` cancels them")[0].split()
    assert list((results / "jobs").glob("local-*")) == [folder]
    assert folder.stat().st_mode & 0o777 == 0o700
    last = capsys.readouterr().err.splitlines()[-1].strip()
    assert last == f"2 runs are left by jobs that ended (logs: {folder}); run again"
    stored = [run_folder(config, results) / "run.json" for config in CONFIGS if is_stored(config, results)]
    times = [path.stat().st_mtime_ns for path in stored]
    assert main(LOCAL) == 0
    assert capsys.readouterr().out.endswith("4 completed\n")
    assert [path.stat().st_mtime_ns for path in stored] == times
    before = sorted((results / "jobs").iterdir())
    train_on_cluster(CONFIGS, Jobs(cluster="local"), results)
    assert sorted((results / "jobs").iterdir()) == before


def test_preempted_job_is_requeued_unchanged(tmp_path: Path) -> None:
    share = Share(list(CONFIGS), tmp_path)
    assert share.checkpoint().function is share


@pytest.mark.parametrize(
    ("cluster", "pairs", "message"),
    [
        ("sge", [], "`cluster` must be one of none, local, slurm, got 'sge'"),
        ("none", [("jobs", "2")], "`jobs` is not an option of jobs with CLUSTER=none"),
        ("local", [("minutes", "9")], "`minutes` is not an option of jobs with CLUSTER=local"),
        ("local", [("jobs", "0")], "`jobs` must be a number of at least 1, got '0'"),
        ("slurm", [("jobs", "many")], "`jobs` must be an integer, got 'many'"),
        ("slurm", [("gpus", "2")], "`gpus` must be a number of at most 1, got '2'"),
    ],
)
def test_invalid_job_options_are_rejected(cluster: str, pairs: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        job_options(cluster, pairs)


def test_valid_job_options_are_parsed() -> None:
    assert job_options("none", []) is None
    assert job_options("local", []) == Jobs(cluster="local")
    assert job_options("slurm", [("gpus", "1"), ("memory", "2.5")]) == Jobs(
        cluster="slurm", gpus=1, memory=2.5
    )


def test_slurm_script_has_options(slurm: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script requests the options and an array of jobs that may be requeued."""
    options = {"partition": "long", "minutes": "30", "memory": "2.5", "account": "17"}
    pairs = [text for pair in options.items() for text in ("--job", *pair)]
    assert main([*RUN, "--cluster", "slurm", *pairs]) == 1
    assert capsys.readouterr().err.splitlines()[-1].strip().startswith("4 runs are left by jobs ")
    script = (results / "script").read_text().splitlines()
    (folder,) = (results / "jobs").iterdir()
    flags = "partition=long time=30 mem=2560MB account=17 array=0-1%2 cpus-per-task=1 requeue"
    expected = {f"#SBATCH --{flag}" for flag in [f"job-name={folder.name}", *flags.split()]}
    assert expected <= set(script)
    assert not any("gpus" in line or "qos" in line for line in script)
    assert "export CUDA_VISIBLE_DEVICES=" in script


def test_queued_jobs_are_not_resubmitted(slurm: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of the same sweep are followed; without an answer of Slurm they count as queued."""
    monkeypatch.setattr(cluster, "_follow", lambda *arguments: None)
    program(slurm / "squeue", f'echo "$@" > {results}/asked; echo 7_0 7_1')
    train_on_cluster(CONFIGS, Jobs(cluster="slurm"), results)
    program(slurm / "squeue", "exit 1")
    train_on_cluster(CONFIGS, Jobs(cluster="slurm"), results)
    assert not (results / "script").exists()
    (folder,) = (results / "jobs").iterdir()
    assert f"--name={folder.name}" in (results / "asked").read_text()


def test_error_of_slurm_is_reported(slurm: Path, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program(slurm / "sbatch", "echo 'sbatch: error: no' >&2; exit 1")
    assert main([*RUN, "--cluster", "slurm"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "sbatch: error: no"
