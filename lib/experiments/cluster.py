"""The sweep as jobs of Slurm, or as processes of this machine that outlive the command.

Jobs store what they train in the same `results/runs/` as any other training, and resume from its checkpoints.
"""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import psutil
import submitit
import torch
from filelock import FileLock
from pydantic import ConfigDict, Field
from submitit.helpers import Checkpointable, clean_env
from tqdm import tqdm

from lib.experiments.build import Config, load_images
from lib.experiments.config import Checked, ConfigError, RunConfig, named, require_name
from lib.experiments.plan import stacks
from lib.experiments.processes import default_device, interrupts_blocked, workers
from lib.experiments.records import is_stored, read_record, run_key
from lib.experiments.runs import outcome, train_stack
from lib.experiments.store import RESULTS, Results, write_atomic


@dataclass(frozen=True)
class Submission:
    """Jobs that were submitted together: their folder, their ids, and the keys of their runs."""

    folder: Path
    ids: list[str]
    keys: list[str]


class LocalJobs(Checked):
    """Jobs that are processes of this machine, and go on without the one that started them.

    Attributes:
        jobs: how many share the runs at most.
    """

    # The values come from a command line.
    model_config = ConfigDict(strict=False)
    cluster: ClassVar[str] = "local"
    cancel: ClassVar[str] = "kill"
    look_seconds: ClassVar[float] = 1.0

    jobs: Annotated[int, Field(ge=1, le=1000)] = Field(default_factory=lambda: workers(default_device()))

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of submitit; local jobs have a year."""
        return {"timeout_min": 365 * 24 * 60, "gpus_per_node": int(default_device().type == "cuda")}

    def unfinished(self, jobs: Submission) -> list[str]:
        """Return the ids of those jobs that run or will run."""
        # The number of a process that has ended may be given to another one.
        commands = {str(process.pid): process.info["cmdline"] for process in psutil.process_iter(["cmdline"])}
        return [id for id in jobs.ids if str(jobs.folder) in (commands.get(id) or ())]


class SlurmJobs(LocalJobs):
    """Jobs of Slurm, elements of one array, with one core or one accelerator each.

    Attributes:
        minutes: time limit of a job, after which it is queued again.
        partition, account, qos, constraint: as `sbatch` takes them.
        memory, gpus: GB and accelerators of a job.
    """

    cluster: ClassVar[str] = "slurm"
    cancel: ClassVar[str] = "scancel"
    look_seconds: ClassVar[float] = 30.0

    jobs: Annotated[int, Field(ge=1, le=1000)] = 256
    minutes: Annotated[int, Field(ge=5, le=100_000, serialization_alias="timeout_min")] = 120
    partition: str | None = Field(None, serialization_alias="slurm_partition")
    account: str | None = Field(None, serialization_alias="slurm_account")
    qos: str | None = Field(None, serialization_alias="slurm_qos")
    constraint: str | None = Field(None, serialization_alias="slurm_constraint")
    memory: Annotated[float, Field(gt=0, le=10_000)] | None = Field(None, serialization_alias="mem_gb")
    gpus: Annotated[int, Field(ge=0, le=1, serialization_alias="gpus_per_node")] = 0

    def parameters(self) -> dict[str, Any]:
        return {
            **self.model_dump(by_alias=True, exclude={"jobs"}),
            "name": "sweep",
            "cpus_per_task": 1,
            "gpus_per_node": self.gpus or None,
            "slurm_array_parallelism": self.jobs,
            "slurm_additional_parameters": {"requeue": True},
            # A node may have accelerators that the job was not given.
            "slurm_setup": None if self.gpus else ["export CUDA_VISIBLE_DEVICES="],
        }

    def unfinished(self, jobs: Submission) -> list[str]:
        # submitit would ask Slurm's accounting, which not every cluster has.
        command = ["squeue", "--me", "--all", "--array", "--noheader", "--format=%i"]
        queue = subprocess.run(command, capture_output=True, text=True)
        return [id for id in jobs.ids if queue.returncode or id in queue.stdout.split()]


def job_options(cluster: str, pairs: Sequence[tuple[str, str]]) -> LocalJobs | None:
    """Return the options of jobs from a command line; None stands for this process."""
    require_name("cluster", cluster, ("none", "local", "slurm"))
    if cluster != "none":
        return (SlurmJobs if cluster == "slurm" else LocalJobs)(**dict[str, Any](pairs))
    if pairs:
        raise ConfigError(f"{named(pairs[0][0])}: allowed with CLUSTER=local or CLUSTER=slurm only")
    return None


@dataclass(frozen=True)
class Share(Checkpointable):
    """What one job trains; submitted again when it was preempted or reached its time limit, it goes on."""

    configs: list[Config]
    results: Path

    def __call__(self) -> None:
        if submitit.JobEnvironment().cluster == "local":
            # submitit ignores this signal, which cancels a local job.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for stack in stacks(self.configs, default_device()):
            train_stack(stack, self.results, lambda steps, ended: None)


def train_on_cluster(configs: Sequence[RunConfig], options: LocalJobs, results: Results = None) -> None:
    """Train all configurations that are not stored yet as jobs, and wait for them.

    Runs of unfinished jobs of an earlier submission are not submitted again.

    Raises:
        RuntimeError: the jobs were refused, or ended before their runs.
    """
    results = Path(results or RESULTS).absolute()
    waiting = {run_key(config): config for config in configs if not is_stored(config, results)}
    if not waiting:
        return
    # The machines of the jobs may have no network.
    load_images(next(iter(waiting.values())))
    folder = results / "jobs"
    # For this user alone, since a job executes the pickles in here.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        paths = sorted(folder.glob(f"{options.cluster}-*/jobs.json"))
        earlier = [Submission(path.parent, **json.loads(path.read_bytes())) for path in paths]
        submissions = [jobs for jobs in earlier if options.unfinished(jobs)]
        taken = {key for jobs in submissions for key in jobs.keys}
        left = [config for key, config in waiting.items() if key not in taken]
        submissions = [jobs for jobs in submissions if not waiting.keys().isdisjoint(jobs.keys)]
        submissions += [_submit(left, options, results, folder)] if left else []
    try:
        _follow(configs, submissions, options, results)
    except KeyboardInterrupt:
        ids = [id.partition("_")[0] for jobs in submissions for id in options.unfinished(jobs)]
        raise KeyboardInterrupt(
            "the jobs go on: the same command follows them, make sweep-status counts their runs, and "
            f"`{' '.join([options.cancel, *dict.fromkeys(ids)])}` cancels them"
        ) from None


def _submit(configs: Sequence[Config], options: LocalJobs, results: Path, folder: Path) -> Submission:
    groups = stacks(configs, torch.device("cpu"))
    count = min(options.jobs, len(groups))
    shares = [[config for group in groups[k::count] for config in group] for k in range(count)]
    own = Path(tempfile.mkdtemp(prefix=f"{options.cluster}-", dir=folder))
    # A job that was preempted is queued again however often, and one that reached its time limit 20 times.
    executor = submitit.AutoExecutor(own, cluster=options.cluster, slurm_max_num_timeout=20)
    executor.update_parameters(**options.parameters())
    # Ctrl-C ends the command that waits, not jobs of this machine.
    with interrupts_blocked(), clean_env():
        jobs = executor.submit_array([Share(share, results) for share in shares])
    content = {"ids": [job.job_id for job in jobs], "keys": [run_key(config) for config in configs]}
    write_atomic(own / "jobs.json", json.dumps(content).encode())
    return Submission(own, **content)


def _follow(
    configs: Sequence[RunConfig], submissions: Sequence[Submission], options: LocalJobs, results: Path
) -> None:
    """Wait until all runs are stored, or all jobs have ended."""
    idle = 0
    with tqdm(desc="sweep", total=len(configs), unit="run", leave=False) as bar:
        while True:
            busy = sum(len(options.unfinished(jobs)) for jobs in submissions)
            records = [record for config in configs if (record := read_record(config, results))]
            ended, left = Counter(record["status"] for record in records), len(configs) - len(records)
            bar.set_postfix_str(f"{outcome(ended, len(configs))}, jobs {busy}", refresh=False)
            bar.update(len(records) - bar.n)
            if not left:
                return
            idle = 0 if busy else idle + 1
            # A shared file system shows a new file late.
            if idle == 2:
                logs = ", ".join(str(jobs.folder) for jobs in submissions)
                raise RuntimeError(f"{left} runs are left by jobs that ended (logs: {logs}); run again")
            time.sleep(options.look_seconds)
