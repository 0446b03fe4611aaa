"""Jobs of a cluster: the tables of an ordinary sweep, whatever is killed or left alone on the way."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from lib.experiments import cluster, runs, sweep
from lib.experiments.__main__ import main
from lib.experiments.cluster import LocalJobs, Share, SlurmJobs, job_options, train_on_cluster
from lib.experiments.config import ConfigError, RunConfig
from lib.experiments.profiles import grid
from lib.experiments.runs import code_version, get_run, is_stored, run_folder, run_key
from lib.experiments.store import REPOSITORY, read_sealed
from lib.experiments.sweep import get_sweep
from lib.experiments.trainer import shared

VALUES: dict[str, Any] = {"task": "denoising", "epochs": 3}
ARGUMENTS = ["--profile", "smoke", *(text for name in VALUES for text in ("-p", name, str(VALUES[name])))]
"""Two stacks, one of each model."""

LOCAL = ["run", *ARGUMENTS, "--cluster", "local", "--job", "jobs", "2"]
CONFIGS = grid("smoke", **VALUES)

COMMAND = """
import sys
from pathlib import Path
from lib.experiments import __main__, cluster, runs, sweep

class Held(cluster.Share):
    def __call__(share):
        import time
        from pathlib import Path
        from lib.experiments import runs

        class Waiting(runs.Trainer):
            def train(self, on_epoch, on_step):
                def then(trainer):
                    on_epoch(trainer)
                    for member in self.members:
                        Path(share.results, f"waiting {runs.run_key(member.config)}").touch()
                    while Path(share.results, "hold").exists():
                        time.sleep(0.01)
                return super().train(then, on_step)

        runs.Trainer = Waiting
        super().__call__()

cluster.Share = Held
cluster.RESULTS = runs.RESULTS = sweep.RESULTS = Path(sys.argv[1])
sys.exit(__main__.main(sys.argv[2:]))
"""
"""The command, whose jobs wait behind their first checkpoint while there is a file `hold`."""


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with the sweep that one process trained."""
    results = tmp_path_factory.mktemp("ordinary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "workers", lambda device: 2)
        get_sweep("smoke", results, **VALUES)
    return results


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder in the place of the repository's results."""
    for module in (cluster, runs, sweep):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Programs in the place of Slurm's: jobs are taken, get the number 7 and are over at once."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("srun", "squeue", "scontrol"):
        program(programs / name, "exit 0")
    program(programs / "sbatch", f"cp $1 {tmp_path}/script; echo Submitted batch job 7")
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setattr(SlurmJobs, "look_seconds", 0.0)
    return programs


def program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@contextmanager
def command(results: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The command with two local jobs, held, in a session of its own; what is left is killed in the end."""
    (results / "hold").touch()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(results), *LOCAL, *more],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with process:
            process.kill()
        for trainer in trainers(results):
            trainer.kill()


def trainers(results: Path) -> list[psutil.Process]:
    """The training processes of local jobs, which a controller each has started."""
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if "submitit.core._submit" in line and line[-1].startswith(str(results)):
            found.append(process)
    return found


def wait_for(condition: Callable[[], object], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def recorded(folder: Path) -> dict[int, set[str]]:
    """The keys of the runs of each local job of a submission, by the number of its controlling process."""
    return {int(id): set(keys) for id, keys in json.loads(read_sealed(folder / "jobs")).items()}


def in_the_middle(config: RunConfig, results: Path) -> psutil.Process:
    """The process that trains a run, as soon as it waits."""
    wait_for((results / f"waiting {run_key(config)}").exists)
    (folder,) = submissions(results)
    wait_for((folder / "jobs").exists)
    (number,) = (id for id, keys in recorded(folder).items() if run_key(config) in keys)
    (process,) = (trainer for trainer in trainers(results) if trainer.ppid() == number)
    return process


def last_line(told: str) -> str:
    """What stays on a terminal, where the bar overwrites itself."""
    return told.splitlines()[-1].strip()


def submissions(results: Path) -> list[Path]:
    return sorted(path for path in (results / "jobs").iterdir() if path.is_dir())


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


def assert_same_tables(one: Path, other: Path) -> None:
    """The files are the same to the byte, but for the seconds."""
    for name in ("sweep_runs.csv", "sweep_epochs.csv"):
        first, second = (
            pd.read_csv(results / "smoke" / name, dtype=str).drop(columns="seconds").to_csv()
            for results in (one, other)
        )
        assert first == second


def test_a_killed_and_a_preempted_job_are_resumed(tmp_path: Path, ordinary: Path) -> None:
    """After kill -9 of one job the other one, which was preempted, goes on; the command says what to do, and
    the same command trains the rest: the tables are those of an ordinary sweep."""
    with command(tmp_path) as process:
        in_the_middle(CONFIGS[0], tmp_path).kill()
        in_the_middle(CONFIGS[-1], tmp_path).send_signal(signal.SIGUSR2)
        (tmp_path / "hold").unlink()
        told = process.communicate()[1]
    assert process.returncode == 1
    line = last_line(told)
    assert line.startswith("sweep: 1 of 2 jobs ended before their runs; ")
    (folder,) = submissions(tmp_path)
    assert f"(its log is {folder}/" in line
    assert line.endswith("run again to resume them")
    # One job has stored its two runs, having been queued again, and the other one has left checkpoints.
    assert sum(is_stored(config, tmp_path) for config in CONFIGS) == 2
    assert sum((run_folder(config, tmp_path) / "checkpoint.pt").exists() for config in CONFIGS) == 2
    assert "Requeued job" in "".join(path.read_text() for path in folder.glob("*.out"))
    before = {config: (run_folder(config, tmp_path) / "run.json") for config in CONFIGS}
    times = {path: path.stat().st_mtime_ns for path in before.values() if path.exists()}
    with command(tmp_path) as process:
        (tmp_path / "hold").unlink()
        assert process.communicate()[0].endswith("4 completed\n")
    assert process.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert_same_tables(tmp_path, ordinary)
    # The files of jobs that are over went when the next ones were submitted.
    assert folder not in submissions(tmp_path)
    assert len(submissions(tmp_path)) == 1


def test_interrupted_jobs_go_on_and_are_followed(
    repository: Path, ordinary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends the command, not the jobs; the same command then follows them and submits nothing."""
    with command(repository) as process:
        in_the_middle(CONFIGS[0], repository)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait() == 130
        monkeypatch.setattr(cluster, "_submit", None)
        (repository / "hold").unlink()
        assert main(LOCAL) == 0
        # Its pipes are those of its jobs, too.
        line = last_line(process.communicate()[1])
    (folder,) = submissions(repository)
    assert line.startswith("the jobs go on: ")
    cancelled = line.partition("`kill")[2].partition("` cancels them")[0]
    assert {int(id) for id in cancelled.split()} == recorded(folder).keys()
    assert capsys.readouterr().out.endswith("4 completed\n")
    assert_same_tables(repository, ordinary)
    # What the jobs are told to do is a pickle.
    for path in (folder, folder.parent):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_jobs_can_be_cancelled(tmp_path: Path) -> None:
    """`kill` with the numbers that the command gives ends jobs of this machine, with their training."""
    with command(tmp_path, "--job", "jobs", "1") as process:
        trainer = in_the_middle(CONFIGS[0], tmp_path)
        os.kill(trainer.ppid(), signal.SIGTERM)
        assert "1 of 1 jobs ended" in last_line(process.communicate()[1])
        wait_for(lambda: not trainers(tmp_path))
    assert not any(is_stored(config, tmp_path) for config in CONFIGS)


def test_nothing_is_submitted_for_what_is_stored(ordinary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither data nor Slurm are needed then, and no folder for jobs is made."""
    monkeypatch.setattr(cluster, "_submit", None)
    monkeypatch.setenv("PATH", "")
    train_on_cluster(CONFIGS, SlurmJobs(), ordinary)
    assert not (ordinary / "jobs").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--cluster", "sge"], "cluster: got 'sge', allowed: none, local, slurm"),
        (["--job", "jobs", "2"], "jobs: allowed with CLUSTER=local or CLUSTER=slurm only"),
        (["--cluster", "local", "--job", "minutes", "9"], "minutes: no such parameter, allowed: jobs"),
        (["--cluster", "local", "--job", "jobs", "0"], "jobs: got '0', allowed: greater than or equal to 1"),
        (["--cluster", "slurm", "--job", "jobs", "many"], "jobs: got 'many', allowed: a valid integer"),
        (["--cluster", "slurm", "--job", "memory", "nan"], "memory: got 'nan', allowed: "),
        (
            ["--cluster", "slurm", "--job", "partition", "a\n#SBATCH -w b"],
            "partition: got 'a\\n#SBATCH -w b', ",
        ),
        (["--cluster", "slurm", "--job", "q\nos", "a"], "'q\\nos': no such parameter, allowed: jobs, "),
    ],
)
def test_a_bad_option_is_one_line(
    arguments: list[str], named: str, slurm: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused with exit status 2 before any work."""
    assert main(["run", *ARGUMENTS, *arguments]) == 2
    assert error_line(capsys).startswith(f"sweep: {named}")
    assert list(repository.iterdir()) == [slurm]


def test_a_machine_without_slurm_or_locks_is_refused(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line says what to install or to use; without `flock` two jobs could train one run."""

    def missing(*args: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(cluster, "load_images", lambda config: None)
    monkeypatch.setattr("fcntl.flock", missing)
    monkeypatch.setenv("PATH", "")
    assert main(["run", *ARGUMENTS, "--cluster", "slurm"]) == 2
    assert "sbatch is missing; install slurm-client, or use CLUSTER=local" in error_line(capsys)
    assert list(repository.iterdir()) == []
    assert main(LOCAL) == 2
    assert error_line(capsys).startswith(
        f"sweep: results: got {repository / 'jobs'} (Function not implemented), "
    )
    assert submissions(repository) == []


def test_the_script_for_slurm_says_what_was_asked_for(
    slurm: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Partition, time, memory and an array of jobs that may be queued again; those without runs are told,
    with the last line of the log of one."""
    options = {"partition": "long", "minutes": "30", "memory": "2.5", "account": "17", "constraint": "a&b"}
    pairs = [text for pair in options.items() for text in ("--job", *pair)]
    assert main(["run", *ARGUMENTS, "--cluster", "slurm", *pairs]) == 1
    (folder,) = submissions(repository)
    assert last_line(capsys.readouterr().err) == (
        "sweep: 2 of 2 jobs ended before their runs; the first one, 7_0, said 'nothing: it was killed' "
        f"(its log is {folder / '7_0_0_log.err'}); run again to resume them"
    )
    program(
        slurm / "squeue",
        f'for f in {repository}/jobs/slurm-*/; do printf "a\\nlost\\n\\n" > $f/7_0_0_log.err; done',
    )
    assert main(["run", *ARGUMENTS, "--cluster", "slurm", *pairs]) == 1
    assert "the first one, 7_0, said 'lost' (" in last_line(capsys.readouterr().err)
    script = (repository / "script").read_text().splitlines()
    flags = (
        "partition=long time=30 mem=2560MB account=17 constraint='a&b' array=0-1%2 cpus-per-task=1 requeue"
    )
    assert {f"#SBATCH --{flag}" for flag in flags.split()} <= set(script)
    assert not any("gpus" in line or "qos" in line for line in script)
    assert "export CUDA_VISIBLE_DEVICES=" in script


def test_jobs_that_slurm_refuses_are_told_in_one_line(
    slurm: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `sbatch` says is printed once, and nothing is left."""
    program(slurm / "sbatch", "echo 'sbatch: error: one' >&2; echo 'sbatch: error: two' >&2; exit 1")
    assert main(["run", *ARGUMENTS, "--cluster", "slurm"]) == 1
    assert error_line(capsys) == "sweep: sbatch: error: one sbatch: error: two"
    assert submissions(repository) == []


def test_queued_jobs_are_not_submitted_again(
    slurm: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the queue are followed, and only the other runs are submitted."""
    followed = []
    monkeypatch.setattr(cluster, "_follow", lambda configs, jobs, *rest: followed.append(jobs))
    train_on_cluster(CONFIGS[:2], SlurmJobs(), repository)
    program(slurm / "squeue", "echo 7; echo 8_1")
    program(slurm / "sbatch", "echo Submitted batch job 9")
    train_on_cluster(CONFIGS, SlurmJobs(), repository)
    first, both = followed
    assert [job.id for job in first] == ["7"]
    assert [job.id for job in both] == ["7", "9"]
    assert both[0] == first[0]
    assert both[1].keys == {run_key(config) for config in CONFIGS[2:]}
    assert len(submissions(repository)) == 2
    # When Slurm does not answer, its jobs are taken for running.
    program(slurm / "squeue", "echo 'no   contact' >&2; exit 1")
    assert SlurmJobs().unfinished(both) == {"7", "9"}
    assert error_line(capsys) == "squeue does not answer: no contact"


def test_a_variable_of_slurm_survives_and_those_of_a_job_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """From within a job, jobs are submitted as from outside, to the Slurm that the site chose."""
    monkeypatch.setenv("SLURM_CONF", "/somewhere")
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    with cluster._no_job():
        assert os.environ["SLURM_CONF"] == "/somewhere"
        assert "SLURM_JOB_ID" not in os.environ
    assert (os.environ["SLURM_CONF"], os.environ["SLURM_JOB_ID"]) == ("/somewhere", "3")


def test_a_share_is_plain_and_of_one_code(tmp_path: Path) -> None:
    """It is JSON, queued again as it is, and refuses to train for other code than it was asked of."""
    share = Share(tuple(config.model_dump() for config in CONFIGS), str(tmp_path), "0" * 16)
    assert json.loads(json.dumps(asdict(share)))["configs"] == [config.model_dump() for config in CONFIGS]
    assert [RunConfig(**values) for values in share.configs] == CONFIGS
    assert share.checkpoint().function is share
    assert code_version() != share.code
    with pytest.raises(
        RuntimeError, match=r"^the code of lib was changed after this job was submitted; run again$"
    ):
        share()
    assert list(tmp_path.iterdir()) == []


def test_jobs_with_an_accelerator_get_whole_groups(slurm: Path) -> None:
    """On a CPU a stack is small; the machine with the accelerator divides what it gets by its own memory."""
    configs = grid("smoke", task="denoising", noise=[0.1 * k for k in range(40)], batch_size=60, size=14)
    groups = SlurmJobs(gpus=1).groups(configs)
    assert [{shared(config) for config in group} for group in groups] == [
        {shared(group[0])} for group in groups
    ]
    assert [len(group) for group in groups] == [80, 80]
    assert len(SlurmJobs().groups(configs)) > 2
    assert job_options("slurm", [("gpus", "1")]) == SlurmJobs(gpus=1)
    with pytest.raises(ConfigError, match=r"^qos: got '--wrap', allowed: letters, digits and "):
        job_options("slurm", [("qos", "--wrap")])
    assert job_options("none", []) is None
    assert job_options("local", []) == LocalJobs()


def test_another_process_is_no_job(tmp_path: Path) -> None:
    """A number that a former job had may belong to any process now."""
    assert not cluster._is_process(os.getpid(), tmp_path)
    with subprocess.Popen(["sleep", "60"]) as other:
        wait_for(lambda: cluster._is_process(other.pid, Path("60")))
        assert not cluster._is_process(other.pid, tmp_path)
        other.kill()
        wait_for(lambda: psutil.Process(other.pid).status() == psutil.STATUS_ZOMBIE)
        assert not cluster._is_process(other.pid, Path("60"))
    assert not cluster._is_process(other.pid, Path("60"))


def test_runs_that_another_process_trains_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs that found all runs busy have ended; the command waits until the runs are stored, or free."""
    asked: list[RunConfig] = []

    def locked(config: RunConfig, results: Path) -> bool:
        asked.append(config)
        if len(asked) > 8:
            get_run(config, results)
        return True

    monkeypatch.setattr(runs, "is_locked", locked)
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.01)
    cluster._follow(CONFIGS[:1], [], LocalJobs(), tmp_path)
    assert len(asked) == 9
