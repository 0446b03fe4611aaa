"""Sweeps as jobs of Slurm, or as local processes that outlive the command.

Jobs store runs in the same `results/runs/` as any other training, and resume from its checkpoints.
"""

from __future__ import annotations

import hashlib
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import submitit
import torch
from pydantic import ConfigDict, Field
from submitit.helpers import Checkpointable, clean_env
from tqdm import tqdm

from lib.experiments.build import Config, load_images
from lib.experiments.config import Checked, ConfigError, RunConfig, named, require_name
from lib.experiments.plan import stacks
from lib.experiments.processes import default_device, interrupts_blocked, workers
from lib.experiments.records import is_stored, read_record, run_key
from lib.experiments.runs import outcome, train_stack
from lib.experiments.store import RESULTS, Results

LOOK_SECONDS = {"local": 1.0, "slurm": 30.0}
"""Seconds between two checks of the jobs."""


class Jobs(Checked):
    """Options of jobs: elements of one array of Slurm, or local processes.

    Attributes:
        cluster: local or slurm.
        jobs: maximum number of jobs that run at once.
        minutes: time limit of a job, after which it is queued again.
        partition, account, qos, constraint: as `sbatch` takes them.
        memory, gpus: GB and number of accelerators of a job.
    """

    # The values come from a command line.
    model_config = ConfigDict(strict=False)

    cluster: Literal["local", "slurm"]
    jobs: Annotated[int, Field(ge=1, le=1000)] = Field(
        default_factory=lambda values: 256 if values["cluster"] == "slurm" else workers(default_device())
    )
    minutes: Annotated[int, Field(ge=5, le=100_000, serialization_alias="timeout_min")] = 120
    partition: str | None = Field(None, serialization_alias="slurm_partition")
    account: str | None = Field(None, serialization_alias="slurm_account")
    qos: str | None = Field(None, serialization_alias="slurm_qos")
    constraint: str | None = Field(None, serialization_alias="slurm_constraint")
    memory: Annotated[float, Field(gt=0, le=10_000)] | None = Field(None, serialization_alias="mem_gb")
    gpus: Annotated[int, Field(ge=0, le=1, serialization_alias="gpus_per_node")] = 0

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of submitit; the time limit of local jobs is a year."""
        if self.cluster == "local":
            return {"timeout_min": 365 * 24 * 60, "gpus_per_node": int(default_device().type == "cuda")}
        return {
            **self.model_dump(by_alias=True, exclude={"cluster", "jobs"}),
            "cpus_per_task": 1,
            "gpus_per_node": self.gpus or None,
            "slurm_array_parallelism": self.jobs,
            "slurm_additional_parameters": {"requeue": True},
            # A node may have accelerators that the job did not request.
            "slurm_setup": None if self.gpus else ["export CUDA_VISIBLE_DEVICES="],
        }


def unfinished(folder: Path) -> list[str]:
    """Return the ids of running and queued jobs of a folder."""
    if folder.name.startswith("local-"):
        command = ["submitit.local._local", str(folder)]
        lines = {process.pid: process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])}
        return [str(pid) for pid, line in lines.items() if line[-2:] == command]
    # submitit queries the accounting of Slurm, which not every cluster has.
    command = ["squeue", "--me", "--all", "--array", "--noheader", "--format=%i", f"--name={folder.name}"]
    queue = subprocess.run(command, capture_output=True, text=True)
    return ["unknown"] if queue.returncode else queue.stdout.split()


def job_options(cluster: str, pairs: Sequence[tuple[str, str]]) -> Jobs | None:
    """Return the options of jobs from a command line, or None for this process."""
    require_name("cluster", cluster, ("none", "local", "slurm"))
    for name in dict(pairs):
        if cluster == "none" or (cluster == "local" and name != "jobs"):
            raise ConfigError(f"`{named(name)}` is not an option of jobs with CLUSTER={cluster}.")
    return None if cluster == "none" else Jobs(**dict[str, Any](pairs) | {"cluster": cluster})


@dataclass(frozen=True)
class Share(Checkpointable):
    """Configurations of one job, which resumes after preemption or its time limit."""

    configs: list[Config]
    results: Path

    def __call__(self) -> None:
        if submitit.JobEnvironment().cluster == "local":
            # Let SIGTERM cancel a local job; submitit ignores it.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for stack in stacks(self.configs, default_device()):
            train_stack(stack, self.results, lambda steps, ended: None)


def train_on_cluster(configs: Sequence[RunConfig], options: Jobs, results: Results = None) -> None:
    """Train all configurations that are not stored yet as jobs, and wait for them.

    Unfinished jobs of the same configurations are followed, and no others are submitted.

    Raises:
        RuntimeError: the jobs were refused, or ended before their runs.
    """
    results = Path(results or RESULTS).absolute()
    waiting = [config for config in configs if not is_stored(config, results)]
    if not waiting:
        return
    # The machines of the jobs may have no network.
    load_images(waiting[0])
    digest = hashlib.sha256("".join(sorted(map(run_key, configs))).encode()).hexdigest()[:20]
    folder = results / "jobs" / f"{options.cluster}-{digest}"
    # Private, because jobs execute the pickles in this folder.
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not unfinished(folder):
        _submit(waiting, options, results, folder)
    try:
        _follow(configs, options, results, folder)
    except KeyboardInterrupt:
        slurm, ids = options.cluster == "slurm", " ".join(unfinished(folder))
        command = f"scancel --name={folder.name}" if slurm else f"kill {ids}"
        raise KeyboardInterrupt(
            "the jobs go on: the same command follows them, make sweep-status counts their runs, and "
            f"`{command}` cancels them"
        ) from None


def _submit(configs: Sequence[Config], options: Jobs, results: Path, folder: Path) -> None:
    groups = stacks(configs, torch.device("cpu"))
    count = min(options.jobs, len(groups))
    shares = [[config for group in groups[k::count] for config in group] for k in range(count)]
    # Preempted jobs are always queued again, those at their time limit 20 times.
    executor = submitit.AutoExecutor(folder, cluster=options.cluster, slurm_max_num_timeout=20)
    executor.update_parameters(name=folder.name, **options.parameters())
    # Ctrl-C ends the command that waits, not jobs of this machine.
    with interrupts_blocked(), clean_env():
        executor.submit_array([Share(share, results) for share in shares])


def _follow(configs: Sequence[RunConfig], options: Jobs, results: Path, folder: Path) -> None:
    """Wait until all runs are stored, or all jobs have ended."""
    idle = 0
    with tqdm(desc="sweep", total=len(configs), unit="run", leave=False) as bar:
        while True:
            busy = len(unfinished(folder))
            records = [record for config in configs if (record := read_record(config, results))]
            ended, left = Counter(record["status"] for record in records), len(configs) - len(records)
            bar.set_postfix_str(f"{outcome(ended, len(configs))}, jobs {busy}", refresh=False)
            bar.update(len(records) - bar.n)
            if not left:
                return
            idle = 0 if busy else idle + 1
            # New files may appear late on a shared file system.
            if idle == 2:
                raise RuntimeError(f"{left} runs are left by jobs that ended (logs: {folder}); run again")
            time.sleep(LOOK_SECONDS[options.cluster])
