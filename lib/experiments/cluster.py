"""The sweep as jobs of a cluster: its stacks of runs are trained by Slurm, or by processes that stay.

submitit starts the jobs. They store what they train in the same `results/runs/` as any other training, and
resume from its checkpoints: a job that is killed loses a minute or an epoch at most, one that is preempted,
cancelled or out of its time the epoch that it is in.

`results/` and `data/` are on a file system that all machines share. While a run is trained, its folder is
locked with `flock`, which all of them have to know: NFS 4, NFS 3 with its lock daemon, Lustre mounted with
`flock`. The lock of a process that is killed is free at once; that of a machine that is gone when the file
server has given it up.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
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
from typing import Annotated, Any, ClassVar, NamedTuple

import psutil
import submitit
import torch
from filelock import FileLock
from pydantic import AfterValidator, ConfigDict, Field
from submitit.core.utils import JobPaths
from submitit.helpers import Checkpointable, clean_env
from tqdm import tqdm

from lib.experiments import records, runs
from lib.experiments.build import Config, load_images, shared
from lib.experiments.config import Checked, ConfigError, RunConfig, named, require_name, shown
from lib.experiments.method import METHOD_VERSION
from lib.experiments.processes import default_device, interrupts_blocked, workers
from lib.experiments.store import RESULTS, Results, read_sealed, write_sealed
from lib.training import DIVERGED, OUT_OF_TIME

REQUEUES = 20
"""How often a job that came to its time limit is queued again; one that was preempted always is."""


def _word(text: str) -> str:
    """It becomes a part of a line of a script."""
    if not re.fullmatch(r"[\w.,:&|*\[\]()][\w.,:&|*\[\]()-]{0,199}", text):
        raise ValueError("letters, digits and .,:&|*[]()_-")
    return text


Word = Annotated[str, AfterValidator(_word)]
Jobs = Annotated[int, Field(ge=1, le=1000)]


class ClusterJob(NamedTuple):
    """A job that was submitted: its `id` (`123_4` in an array of Slurm, the number of a process here), the
    folder of the submission, and the keys of the runs that it trains."""

    id: str
    folder: Path
    keys: frozenset[str]


class LocalJobs(Checked):
    """Jobs that are processes of this machine, and go on without the one that started them.

    Attributes:
        place: where the ids of the jobs mean something.
        jobs: how many share the runs at most; one per core, or one for the accelerator.
    """

    # The values come from a command line.
    model_config = ConfigDict(strict=False)
    cluster: ClassVar[str] = "local"
    cancel: ClassVar[str] = "kill"
    look_seconds: ClassVar[float] = 1.0
    place: ClassVar[str] = f"local-{platform.node()}"

    jobs: Jobs = Field(default_factory=lambda: workers(default_device()))

    def groups(self, configs: Sequence[RunConfig]) -> list[list[Config]]:
        """Configurations that are trained in one job, the groups taking turns."""
        return runs.stacks(configs, default_device())

    def parameters(self, count: int) -> dict[str, Any]:
        """What submitit is told of `count` jobs: here no time limit, whose unit is a minute."""
        accelerators = 1 if default_device().type == "cuda" else 0
        return {"timeout_min": 365 * 24 * 60, "gpus_per_node": accelerators}

    def unfinished(self, jobs: Iterable[ClusterJob]) -> set[str]:
        """The ids of those jobs that run or will run."""
        return {job.id for job in jobs if _is_process(int(job.id), job.folder)}


class SlurmJobs(LocalJobs):
    """Jobs of Slurm, one core or one accelerator each.

    Attributes:
        jobs: how many share the runs at most, each being an element of one array.
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
    place: ClassVar[str] = "slurm"

    jobs: Jobs = 256
    minutes: Annotated[int, Field(ge=5, le=100_000, serialization_alias="timeout_min")] = 120
    partition: Word | None = Field(None, serialization_alias="slurm_partition")
    account: Word | None = Field(None, serialization_alias="slurm_account")
    qos: Word | None = Field(None, serialization_alias="slurm_qos")
    constraint: Word | None = Field(None, serialization_alias="slurm_constraint")
    memory: Annotated[float, Field(gt=0, le=10_000)] | None = Field(None, serialization_alias="mem_gb")
    gpus: Annotated[int, Field(ge=0, le=1, serialization_alias="gpus_per_node")] = 0

    def groups(self, configs: Sequence[RunConfig]) -> list[list[Config]]:
        if not self.gpus:
            return runs.stacks(configs, torch.device("cpu"))
        # Only the machine with the accelerator knows its memory; it divides a group into stacks that fit.
        groups: dict[Config, list[Config]] = {}
        for config in configs:
            groups.setdefault(shared(config), []).append(config)
        return list(groups.values())

    def parameters(self, count: int) -> dict[str, Any]:
        return {
            **self.model_dump(by_alias=True, exclude={"jobs"}),
            "name": "sweep",
            "nodes": 1,
            "tasks_per_node": 1,
            "cpus_per_task": 1,
            "gpus_per_node": self.gpus or None,
            "slurm_array_parallelism": count,
            "slurm_additional_parameters": {"requeue": True},
            # A node may have accelerators that the job was not given.
            "slurm_setup": None if self.gpus else ["export CUDA_VISIBLE_DEVICES="],
        }

    def unfinished(self, jobs: Iterable[ClusterJob]) -> set[str]:
        # Not by submitit, which asks Slurm's accounting: not every cluster has one.
        command = ["squeue", "--me", "--all", "--array", "--noheader", "--format=%i"]
        asked = subprocess.run(command, capture_output=True, text=True)
        if asked.returncode:
            tqdm.write(f"squeue does not answer: {' '.join(asked.stderr.split())}", file=sys.stderr)
            return {job.id for job in jobs}
        return {job.id for job in jobs} & set(asked.stdout.split())


CLUSTERS: dict[str, type[LocalJobs]] = {"local": LocalJobs, "slurm": SlurmJobs}


def job_options(cluster: str, pairs: Sequence[tuple[str, str]]) -> LocalJobs | None:
    """Where to train and how, from a command line; None stands for this process.

    Raises:
        ConfigError: the cluster or the name of an option is unknown, or a value is refused.
    """
    if cluster == "none":
        if pairs:
            raise ConfigError(f"{named(pairs[0][0])}: allowed with CLUSTER=local or CLUSTER=slurm only")
        return None
    require_name("cluster", cluster, ("none", *CLUSTERS))
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise ConfigError(
            "cluster: got 'slurm', allowed: on a machine with Slurm's commands, but sbatch is missing; "
            "install slurm-client, or use CLUSTER=local"
        )
    return CLUSTERS[cluster](**dict[str, Any](pairs))


@dataclass(frozen=True)
class Share(Checkpointable):
    """What one job trains; started again, when it was preempted or out of its time, it goes on.

    submitit pickles it, so it holds plain values alone: parameters of its configurations, the folder of the
    results, and the version of the method that its runs are asked of.
    """

    configs: tuple[dict[str, Any], ...]
    results: str
    method: int

    def __call__(self) -> None:
        if self.method != METHOD_VERSION:
            raise RuntimeError("the method was changed after this job was submitted; run again")
        if submitit.JobEnvironment().cluster == "local":
            # submitit ignores it in favour of Slurm's other signals, and nothing else would end the job.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        configs = [RunConfig(**values) for values in self.configs]
        for stack in runs.stacks(configs, default_device()):
            runs.train_stack(stack, self.results, lambda steps, ended: None)


def train_on_cluster(configs: Sequence[RunConfig], options: LocalJobs, results: Results = None) -> None:
    """Train all configurations that are not stored yet as jobs, and wait for them.

    Runs that an earlier submission is training, or has in the queue, are not submitted again.

    Args:
        configs: what to train.
        options: of the jobs.

    Raises:
        ConfigError: this machine or the file system cannot be used so.
        DataError: the data cannot be had.
        RuntimeError: the jobs were refused, or ended before their runs; the message says how.
        KeyboardInterrupt: with a message, since the jobs go on.
    """
    results = Path(results or RESULTS).absolute()
    waiting = [config for config in configs if not records.is_stored(config, results)]
    if not waiting:
        return
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
        left = [config for config in waiting if records.run_key(config) not in taken]
        jobs += _submit(left, options, results, folder) if left else []
    jobs = [job for job in jobs if any(records.run_key(config) in job.keys for config in waiting)]
    try:
        _follow(configs, jobs, options, results)
    except KeyboardInterrupt:
        ids = dict.fromkeys(job.id.partition("_")[0] for job in jobs if job.id in options.unfinished(jobs))
        raise KeyboardInterrupt(
            "the jobs go on: the same command follows them, make sweep-status counts their runs, and "
            f"`{' '.join([options.cancel, *ids])}` cancels them"
        ) from None


def _submitted(folder: Path, options: LocalJobs) -> list[ClusterJob]:
    """The unfinished jobs of earlier submissions; the files of those that are over are removed."""
    jobs = [
        ClusterJob(id, path.parent, frozenset(keys))
        for path in sorted(folder.glob(f"{options.place}-*/jobs"))
        for id, keys in json.loads(read_sealed(path)).items()
    ]
    unfinished = options.unfinished(jobs)
    alive = [job for job in jobs if job.id in unfinished]
    for over in {job.folder for job in jobs} - {job.folder for job in alive}:
        # A shared file system may hold on to a file that was open until just now.
        shutil.rmtree(over, ignore_errors=True)
    return alive


def _submit(
    configs: Sequence[RunConfig], options: LocalJobs, results: Path, folder: Path
) -> list[ClusterJob]:
    groups = options.groups(configs)
    count = min(options.jobs, len(groups))
    shares = [[config for group in groups[k::count] for config in group] for k in range(count)]
    own = Path(tempfile.mkdtemp(prefix=f"{options.place}-", dir=folder))
    try:
        executor = submitit.AutoExecutor(own, cluster=options.cluster, slurm_max_num_timeout=REQUEUES)
        executor.update_parameters(**options.parameters(count))
        values = [tuple(config.model_dump() for config in share) for share in shares]
        tasks = [Share(own_values, str(results), METHOD_VERSION) for own_values in values]
        # Ctrl-C ends the command that waits, not jobs of this machine. The error has what sbatch prints, too.
        with interrupts_blocked(), _no_job(), redirect_stderr(io.StringIO()):
            ids = [job.job_id for job in executor.submit_array(tasks)]
            keys = [[records.run_key(config) for config in share] for share in shares]
            write_sealed(own / "jobs", json.dumps(dict(zip(ids, keys, strict=True))).encode())
    except BaseException:
        shutil.rmtree(own)
        raise
    return [ClusterJob(id, own, frozenset(some)) for id, some in zip(ids, keys, strict=True)]


@contextmanager
def _no_job() -> Iterator[None]:
    """An environment without the variables of a job that this process may be in, but with Slurm's own."""
    kept = {name: value for name, value in os.environ.items() if name == "SLURM_CONF"}
    with clean_env():
        os.environ.update(kept)
        yield


def _follow(
    configs: Sequence[RunConfig], jobs: Sequence[ClusterJob], options: LocalJobs, results: Path
) -> None:
    """Wait until all runs are stored, or no job and no other process trains those that are not."""
    ended: Counter[str] = Counter()
    left = {records.run_key(config): config for config in configs}
    earlier = recent = {job.id for job in jobs}
    looked = time.monotonic()
    interval = 0.2 if sys.stderr.isatty() else 5.0
    with tqdm(desc="sweep", total=len(configs), mininterval=interval, unit="run", leave=False) as bar:
        while True:
            for key, config in list(left.items()):
                record = records.read_record(config, results)
                if record is not None:
                    ended[record["status"]] += 1
                    del left[key]
            bar.set_postfix_str(
                f"runs {ended.total()}/{len(configs)}, diverged {ended[DIVERGED]}, "
                f"out of time {ended[OUT_OF_TIME]}, jobs {len(recent)}",
                refresh=False,
            )
            bar.update(ended.total() - bar.n)
            if not left:
                return
            busy = any(job.id in earlier | recent and job.keys & left.keys() for job in jobs)
            if not busy and not all(runs.is_locked(config, results) for config in left.values()):
                raise RuntimeError(_failure(jobs, left.keys()))
            time.sleep(min(runs.POLL_SECONDS, options.look_seconds))
            if time.monotonic() - looked >= options.look_seconds:
                earlier, recent, looked = recent, options.unfinished(jobs), time.monotonic()


def _failure(jobs: Sequence[ClusterJob], left: Iterable[str]) -> str:
    """Which jobs ended before their runs, what the first one said and what to do."""
    lost = [job for job in jobs if not job.keys.isdisjoint(left)]
    log = Path(JobPaths(lost[0].folder, lost[0].id).stderr)
    said = log.read_text(errors="replace").strip() if log.exists() else ""
    last = said.splitlines()[-1] if said else "nothing: it was killed"
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
