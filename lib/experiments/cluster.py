"""The sweep as jobs of a cluster: its stacks of runs are trained by Slurm, or by processes that stay.

submitit starts the jobs. They store what they train in the same `results/runs/` as any other training, and
resume from its checkpoints: a job that is killed, preempted or out of its time loses one epoch at most.

`results/` and `data/` are on a file system that all machines share. While a run is trained, its folder is
locked with `flock`, which has to be known to all of them: NFS 4, or NFS 3 with its lock daemon (not mounted
with `nolock` or `local_lock`), Lustre mounted with `flock`. The lock of a process that is killed, so that its
job is queued again, is free at once; that of a machine that is gone when the file server has given it up.
"""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import psutil
import submitit
import torch
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from submitit.helpers import DelayedSubmission, clean_env
from tqdm import tqdm

from lib.experiments.config import ConfigError, RunConfig, shown
from lib.experiments.problem import Config, load_images
from lib.experiments.runs import (
    POLL_SECONDS,
    code_version,
    default_device,
    interrupts_ignored,
    is_locked,
    is_stored,
    read_record,
    run_key,
    stacks,
    train_stack,
    workers,
)
from lib.experiments.store import RESULTS, read_sealed, write_sealed
from lib.experiments.trainer import DIVERGED, OUT_OF_TIME, shared

REQUEUES = 20
"""How often a job that came to its time limit is queued again; one that was preempted always is."""

SLURM_COMMANDS = ("sbatch", "srun", "squeue", "scontrol")

# No blanks, quotes or line ends: it becomes a line of a script.
Name = Annotated[str, Field(pattern=r"^[\w.,:&|*\[\]()][\w.,:&|*\[\]()-]*\z", max_length=200)]


@dataclass(frozen=True)
class Job:
    """A job that was submitted.

    Attributes:
        id: its number in the cluster, `123_4` in an array, or that of its process.
        folder: of the submission.
        log: where its standard error goes.
        keys: of the runs that it trains.
    """

    id: str
    folder: Path
    log: Path
    keys: frozenset[str]


class LocalJobs(BaseModel):
    """Jobs that are processes of this machine, and go on without the one that started them.

    Attributes:
        jobs: how many share the runs at most; one per core, or one for the accelerator, when None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    cluster: ClassVar[str] = "local"
    cancel: ClassVar[str] = "kill"
    look_seconds: ClassVar[float] = 1.0

    jobs: Annotated[int, Field(ge=1, le=1000)] | None = None

    @property
    def place(self) -> str:
        """Where the ids of the jobs mean something."""
        return f"{self.cluster} {platform.node()}"

    @property
    def most(self) -> int:
        return self.jobs or workers(default_device())

    def require(self) -> None:
        """Refuse a machine that cannot start such jobs."""

    def groups(self, configs: Sequence[RunConfig]) -> list[list[Config]]:
        """Configurations that are trained in one job, the groups taking turns."""
        return stacks(configs, default_device())

    def parameters(self, count: int) -> dict[str, Any]:
        """What submitit is told of `count` jobs: here no time limit, whose unit is a minute."""
        accelerators = 1 if default_device().type == "cuda" else 0
        return {"timeout_min": 365 * 24 * 60, "gpus_per_node": accelerators}

    def unfinished(self, jobs: Iterable[Job]) -> set[str]:
        """The ids of those jobs that run or will run."""
        return {job.id for job in jobs if _is_process(int(job.id), job.folder)}


class SlurmJobs(LocalJobs):
    """Jobs of Slurm, one core or one accelerator each.

    Attributes:
        jobs: how many share the runs at most, each being an element of one array; 256 when None.
        minutes: time limit of a job, after which it is queued again and goes on.
        partition, account, qos, constraint: as `sbatch` takes them.
        memory: GB of a job.
        gpus: accelerators of a job, 0 or 1.
    """

    cluster: ClassVar[str] = "slurm"
    cancel: ClassVar[str] = "scancel"
    # Slurm does not like to be asked often, and a shared file system shows new files late: two looks in a
    # row have to miss a job until its runs are missed.
    look_seconds: ClassVar[float] = 30.0

    minutes: Annotated[int, Field(ge=5, le=100_000)] = 120
    partition: Name | None = None
    account: Name | None = None
    qos: Name | None = None
    constraint: Name | None = None
    memory: Annotated[float, Field(gt=0, le=10_000)] | None = None
    gpus: Annotated[int, Field(ge=0, le=1)] = 0

    @property
    def place(self) -> str:
        return self.cluster

    @property
    def most(self) -> int:
        return self.jobs or 256

    def require(self) -> None:
        missing = [command for command in SLURM_COMMANDS if shutil.which(command) is None]
        if missing:
            raise ConfigError(
                f"cluster: got 'slurm', allowed: on a machine with Slurm's commands, but {missing[0]} is "
                "missing; install slurm-client, or use CLUSTER=local"
            )

    def groups(self, configs: Sequence[RunConfig]) -> list[list[Config]]:
        if not self.gpus:
            return stacks(configs, torch.device("cpu"))
        # Only the machine with the accelerator knows its memory; it divides a group into stacks that fit.
        groups: dict[Config, list[Config]] = {}
        for config in configs:
            groups.setdefault(shared(config), []).append(config)
        return list(groups.values())

    def parameters(self, count: int) -> dict[str, Any]:
        return {
            "name": "sweep",
            "timeout_min": self.minutes,
            "nodes": 1,
            "tasks_per_node": 1,
            "cpus_per_task": 1,
            "gpus_per_node": self.gpus or None,
            "mem_gb": self.memory,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_qos": self.qos,
            "slurm_constraint": self.constraint,
            "slurm_array_parallelism": count,
            "slurm_additional_parameters": {"requeue": True},
            # A node may have accelerators that the job was not given.
            "slurm_setup": None if self.gpus else ["export CUDA_VISIBLE_DEVICES="],
        }

    def unfinished(self, jobs: Iterable[Job]) -> set[str]:
        # Not by submitit, which asks Slurm's accounting: not every cluster has one.
        command = ["squeue", "--me", "--all", "--array", "--noheader", "--format=%i"]
        asked = subprocess.run(command, capture_output=True, text=True)
        if asked.returncode:
            tqdm.write(f"squeue does not answer: {' '.join(asked.stderr.split())}", file=sys.stderr)
            return {job.id for job in jobs}
        return {job.id for job in jobs} & set(asked.stdout.split())


CLUSTERS: dict[str, type[LocalJobs]] = {"local": LocalJobs, "slurm": SlurmJobs}


def job_options(cluster: str, pairs: Sequence[Sequence[str]]) -> LocalJobs | None:
    """Where to train and how, from a command line; None stands for this process.

    Raises:
        ConfigError: the cluster or the name of an option is unknown, or a value is refused.
    """
    if cluster == "none" and pairs:
        name, value = pairs[0]
        raise ConfigError(f"{shown(name)}: got {shown(value)}, allowed: with CLUSTER=local or slurm only")
    if cluster == "none":
        return None
    if cluster not in CLUSTERS:
        raise ConfigError(f"cluster: got {shown(cluster)}, allowed: none, {', '.join(CLUSTERS)}")
    kind = CLUSTERS[cluster]
    try:
        return kind.model_validate({pair[0]: pair[1] for pair in pairs})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        option = shown(problem["loc"][0])
        if problem["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            raise ConfigError(f"{option}: no such option of {cluster} jobs, allowed: {known}") from None
        allowed = problem["msg"].removeprefix("Input should be ")
        if problem["type"] == "string_pattern_mismatch":
            allowed = "letters, digits and .,:&|*[]()_-"
        raise ConfigError(f"{option}: got {shown(problem['input'])}, allowed: {allowed}") from None


@dataclass(frozen=True)
class Share:
    """What one job trains; started again, it goes on. submitit pickles it, so it holds plain values alone.

    Attributes:
        configs: parameters of its configurations.
        results: folder of the results.
        code: the `code_version` that its runs are asked of.
    """

    configs: tuple[dict[str, Any], ...]
    results: str
    code: str

    def __call__(self) -> None:
        if code_version() != self.code:
            raise RuntimeError("the code of lib was changed after this job was submitted; run again")
        if submitit.JobEnvironment().cluster == "local":
            # submitit ignores it in favour of Slurm's other signals, and nothing else would end the job.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        configs = [RunConfig(**values) for values in self.configs]
        for stack in stacks(configs, default_device()):
            train_stack(stack, self.results, lambda progress: None)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit queues when the job is preempted or out of time: the same; the store has the rest."""
        return DelayedSubmission(self)


def train_on_cluster(
    configs: Sequence[RunConfig], options: LocalJobs, results: Path | str | None = None
) -> None:
    """Train all configurations that are not stored yet as jobs, and wait for them.

    Runs that an earlier submission is training, or has in the queue, are not submitted again.

    Args:
        configs: what to train.
        options: of the jobs.
        results: folder of the results, with the runs in `runs/`; the repository's when None.

    Raises:
        ConfigError: this machine or the file system cannot be used so.
        DataError: the data cannot be had.
        RuntimeError: the jobs were refused, or ended before their runs; the message says how.
        KeyboardInterrupt: with a message, since the jobs go on.
    """
    results = Path(results or RESULTS).absolute()
    waiting = [config for config in configs if not is_stored(config, results)]
    if not waiting:
        return
    options.require()
    # Here, where data that are missing are reported once; the machines of the jobs may have no network.
    load_images(waiting[0])
    # For this user alone, since a job does whatever the pickles in here say.
    folder = results / "jobs"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        held = FileLock(folder / "lock", fallback_to_soft=False).acquire()
    except OSError as error:
        raise ConfigError(
            f"results: got {folder} ({error.strerror}), allowed: on a file system where flock works"
        ) from None
    with held:
        jobs = _submitted(folder, options)
        taken = frozenset[str]().union(*(job.keys for job in jobs))
        left = [config for config in waiting if run_key(config) not in taken]
        jobs += _submit(left, options, results, folder) if left else []
    jobs = [job for job in jobs if any(run_key(config) in job.keys for config in waiting)]
    try:
        _follow(configs, jobs, options, results)
    except KeyboardInterrupt:
        ids = dict.fromkeys(job.id.partition("_")[0] for job in jobs if job.id in options.unfinished(jobs))
        raise KeyboardInterrupt(
            "the jobs go on: the same command follows them, make sweep-status counts their runs, and "
            f"`{' '.join([options.cancel, *ids])}` cancels them"
        ) from None


def _submitted(folder: Path, options: LocalJobs) -> list[Job]:
    """The unfinished jobs of earlier submissions; the files of those that are over are removed."""
    jobs = []
    for path in sorted(folder.glob("*/jobs")):
        stored = json.loads(read_sealed(path))
        if stored["place"] == options.place:
            for id, job in stored["jobs"].items():
                jobs.append(Job(id, path.parent, Path(job["log"]), frozenset(job["keys"])))
    unfinished = options.unfinished(jobs)
    alive = [job for job in jobs if job.id in unfinished]
    for over in {job.folder for job in jobs} - {job.folder for job in alive}:
        # A shared file system may hold on to a file that was open until just now.
        shutil.rmtree(over, ignore_errors=True)
    return alive


def _submit(configs: Sequence[RunConfig], options: LocalJobs, results: Path, folder: Path) -> list[Job]:
    groups = options.groups(configs)
    count = min(options.most, len(groups))
    shares = [[config for group in groups[k::count] for config in group] for k in range(count)]
    own = Path(tempfile.mkdtemp(prefix=f"{options.cluster}-", dir=folder))
    try:
        executor = submitit.AutoExecutor(own, cluster=options.cluster, slurm_max_num_timeout=REQUEUES)
        executor.update_parameters(**options.parameters(count))
        # Ctrl-C ends the command that waits, not jobs of this machine. The error has what sbatch prints, too.
        with interrupts_ignored(), _no_job(), redirect_stderr(io.StringIO()):
            with executor.batch():
                submitted = [
                    executor.submit(Share(tuple(c.model_dump() for c in share), str(results), code_version()))
                    for share in shares
                ]
            jobs = [
                Job(job.job_id, own, job.paths.stderr, frozenset(map(run_key, share)))
                for job, share in zip(submitted, shares, strict=True)
            ]
            records = {job.id: {"log": str(job.log), "keys": sorted(job.keys)} for job in jobs}
            stored = json.dumps({"place": options.place, "jobs": records}, indent=1)
            write_sealed(own / "jobs", stored.encode())
    except BaseException:
        shutil.rmtree(own)
        raise
    return jobs


@contextmanager
def _no_job() -> Iterator[None]:
    """An environment without the variables of a job that this process may be in, but with Slurm's own."""
    kept = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    with clean_env():
        os.environ.update(kept)
        yield


def _follow(configs: Sequence[RunConfig], jobs: Sequence[Job], options: LocalJobs, results: Path) -> None:
    """Wait until all runs are stored, or no job and no other process trains those that are not."""
    ended: Counter[str] = Counter()
    left = {run_key(config): config for config in configs}
    earlier = recent = {job.id for job in jobs}
    looked = time.monotonic()
    interval = 0.2 if sys.stderr.isatty() else 5.0
    with tqdm(desc="sweep", total=len(configs), mininterval=interval, unit="run", leave=False) as bar:
        while True:
            before = ended.total()
            for key, config in list(left.items()):
                record = read_record(config, results)
                if record is not None:
                    ended[record["status"]] += 1
                    del left[key]
            bar.set_postfix_str(
                f"runs {ended.total()}/{len(configs)}, diverged {ended[DIVERGED]}, "
                f"out of time {ended[OUT_OF_TIME]}, jobs {len(recent)}",
                refresh=False,
            )
            bar.update(ended.total() - before)
            if not left:
                return
            busy = any(job.id in earlier | recent and job.keys & left.keys() for job in jobs)
            if not busy and not all(is_locked(config, results) for config in left.values()):
                raise RuntimeError(_failure(jobs, left.keys()))
            time.sleep(min(POLL_SECONDS, options.look_seconds))
            if time.monotonic() - looked >= options.look_seconds:
                earlier, recent, looked = recent, options.unfinished(jobs), time.monotonic()


def _failure(jobs: Sequence[Job], left: Iterable[str]) -> str:
    """Which jobs ended before their runs, what the first one said and what to do."""
    lost = [job for job in jobs if not job.keys.isdisjoint(left)]
    log = lost[0].log
    said = log.read_text(errors="replace").split("\n") if log.exists() else []
    last = next((line.strip() for line in reversed(said) if line.strip()), "nothing: it was killed")
    return (
        f"{len(lost)} of {len(jobs)} jobs ended before their runs; the first one, {lost[0].id}, said "
        f"{shown(last)} (its log is {log}); run again to resume them"
    )


def _is_process(pid: int, folder: Path) -> bool:
    """Whether a process is that of a job of a folder, and not another one with the number of a former job."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and str(folder) in process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
