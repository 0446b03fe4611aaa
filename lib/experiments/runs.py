"""Runs: loaded from the store, or trained in stacks with one process per core, and resumable."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import active_children, get_context
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
from filelock import FileLock, Timeout
from IPython.display import clear_output
from tqdm import tqdm

from lib.experiments.build import (
    Config,
    Weights,
    load_images,
    make_operator,
    make_training,
    require_device,
    total_steps,
)
from lib.experiments.config import ConfigError
from lib.experiments.data import notice
from lib.experiments.plan import stacks
from lib.experiments.processes import default_device, interrupts_blocked, workers
from lib.experiments.records import (
    REFERENCE,
    Run,
    is_stored,
    load_kept_run,
    load_run,
    read_checkpoint,
    read_record,
    run_folder,
    store_run,
    write_checkpoint,
)
from lib.experiments.store import Results
from lib.training import DIVERGED, OUT_OF_TIME, Training

CHECKPOINT_SECONDS = 60.0
"""Time between two checkpoints of a stack."""

REPORT_SECONDS = 0.2
"""Time between two reads of the progress of the training processes."""

Report = Callable[[int, tuple[str, ...]], object]
"""Called with the number of optimizer steps and the statuses of ended runs since the last call."""


def get_runs(configs: Sequence[Config], results: Results = None, train: bool = True) -> list[Run]:
    """Return the runs of configurations in their order; missing runs are trained.

    Runs that diverged or ran out of time are returned with that status and a reason.

    Args:
        train: False takes only stored or committed runs.

    Raises:
        ConfigError: `train` is False, and a run is neither stored nor committed.
        DataError: the data are missing or unusable.
    """
    if train:
        train_runs([config for config in configs if load_run(config, results) is None], results)
    runs = []
    for config, run in zip(configs, find_runs(configs, results), strict=True):
        if run is None:
            what = f"{config.model} {config.task} of {config.epochs} epochs, seed {config.seed}"
            raise ConfigError(f"`train` must be True to train {what}: it is neither stored nor committed.")
        runs.append(run)
    return runs


def get_run(config: Config, results: Results = None, train: bool = True) -> Run:
    """Return the run of one configuration (see `get_runs`)."""
    return get_runs([config], results, train)[0]


def find_runs(configs: Sequence[Config], results: Results = None, weights: bool = True) -> list[Run | None]:
    """Return the stored or else committed runs of configurations; None for missing ones.

    Committed runs may be of another version of the method (see their provenance).

    Args:
        weights: False also takes committed runs without weights.
    """
    runs = {config: load_run(config, results) for config in configs}
    for path in sorted(REFERENCE.glob(f"*/runs/*{'.zip' if weights else ''}")):
        missing = [config for config, run in runs.items() if run is None]
        if missing and (run := load_kept_run(path, missing)):
            runs[run.config] = run
    return [runs[config] for config in configs]


def learned_start(config: Config, results: Results = None, train: bool = True) -> Weights | None:
    """Return the weights of the initial run of a configuration, or None."""
    initial = config.initial
    return None if isinstance(initial, str) else get_run(initial, results, train).weights


def outcome(ended: Counter[str], count: int) -> str:
    """Return the numbers of ended runs by status for a progress bar."""
    diverged, late = ended[DIVERGED], ended[OUT_OF_TIME]
    return f"runs {ended.total()}/{count}, diverged {diverged}, out of time {late}"


def train_runs(configs: Sequence[Config], results: Results = None) -> None:
    """Train all configurations that are not stored yet, in stacks, with one process per core.

    Wait for runs that another process is training. An error or an interrupt stops all trainings; the next
    call resumes them from checkpoints. Scripts need the usual `if __name__ == "__main__"`.

    Raises:
        ConfigError: the device cannot train a configuration.
        DataError: the data are missing or unusable.
        RuntimeError: a training failed.
    """
    ended = Counter(record["status"] for config in configs if (record := read_record(config, results)))
    waiting = [config for config in configs if not is_stored(config, results)]
    if not waiting:
        return
    starts = (config.initial for config in waiting)
    train_runs([initial for initial in starts if not isinstance(initial, str)], results)
    # Report missing data and inconsistent values before any training.
    for config in {config.dataset: config for config in waiting}.values():
        load_images(config)
    for config in waiting:
        require_device(config, default_device())
        make_operator(config)
    steps = sum(total_steps(config) for config in waiting)
    interval = 0.2 if sys.stderr.isatty() else 5.0
    with tqdm(desc="training", total=steps, mininterval=interval, smoothing=0, leave=False) as bar:

        def report(steps: int, statuses: tuple[str, ...]) -> None:
            ended.update(statuses)
            bar.set_postfix_str(outcome(ended, len(configs)), refresh=False)
            bar.update(steps)

        while waiting:
            before = len(waiting)
            _train_stacks(stacks(waiting, default_device()), results, report)
            waiting = [config for config in waiting if not is_stored(config, results)]
            if len(waiting) == before:
                bar.set_postfix_str(f"{before} runs are being trained by another process")
                with FileLock(run_folder(waiting[0], results) / "lock"):
                    continue
    if "ipykernel" in sys.modules:
        clear_output()
        notice.cache_clear()


def _train_stacks(todo: Sequence[list[Config]], results: Results, report: Report) -> None:
    """Train stacks in `workers` processes."""
    count = min(workers(default_device()), len(todo))
    if count == 1:
        for stack in todo:
            train_stack(stack, results, report)
        return
    spawn, others = get_context("spawn"), active_children()
    reports: SimpleQueue[tuple[int, tuple[str, ...]]] = spawn.SimpleQueue()
    with ProcessPoolExecutor(count, spawn, _start_worker, (reports,)) as pool:
        try:
            with interrupts_blocked():
                left = {pool.submit(_train_in_worker, stack, results) for stack in todo}
                # The pool detects the death only of processes that started before the last submission.
                pool.submit(int)
            while left:
                ended, left = wait(left, timeout=REPORT_SECONDS)
                while not reports.empty():
                    report(*reports.get())
                for future in ended:
                    future.result()
        except BrokenProcessPool:
            raise RuntimeError("a training process was killed; run again to resume it") from None
        finally:
            for process in set(active_children()).difference(others):
                process.terminate()


_reports: SimpleQueue[tuple[int, tuple[str, ...]]]


def _start_worker(reports: SimpleQueue[tuple[int, tuple[str, ...]]]) -> None:
    """Initialize a training process."""
    global _reports
    _reports = reports
    torch.set_num_threads(1)


def _train_in_worker(stack: list[Config], results: Results) -> None:
    train_stack(stack, results, lambda *progress: _reports.put(progress))


def train_stack(configs: Sequence[Config], results: Results, report: Report) -> None:
    """Train and store the configurations of a stack that no other process has stored or is training.

    Those with checkpoints of the same epoch train together.
    """
    by_epoch: dict[int, list[tuple[Config, dict[str, Any]]]] = {}
    with ExitStack() as locks:
        for config in configs:
            folder = run_folder(config, results)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                locks.enter_context(FileLock(folder / "lock", timeout=0))
            except Timeout:
                continue
            if not is_stored(config, results):
                state = read_checkpoint(config, results) or {"epoch": 0}
                by_epoch.setdefault(state["epoch"], []).append((config, state))
        for epoch, pairs in sorted(by_epoch.items()):
            members, states = zip(*pairs, strict=True)
            training = make_training(members, default_device(), learned_start(members[0], results))
            if epoch:
                training.restore(states)
            _run(training, members, results, report)


def _run(training: Training, configs: Sequence[Config], results: Results, report: Report) -> None:
    """Run a training, store members that end, and write checkpoints of the others."""
    written, counted = -math.inf, 0

    def tell(*ended: str) -> None:
        nonlocal counted
        done = sum(training.steps if member.status else training.step for member in training.members)
        report(done - counted, ended)
        counted = done

    def keep(training: Training) -> None:
        nonlocal written
        ended = []
        for config, member in zip(configs, training.members, strict=True):
            if member.status and not is_stored(config, results):
                store_run(config, member, results)
                ended.append(member.status)
        if training.epoch < training.epochs and time.monotonic() - written >= CHECKPOINT_SECONDS:
            for index in training.alive:
                write_checkpoint(configs[index], training.checkpoint(index), results)
            written = time.monotonic()
        tell(*ended)

    training.run(on_epoch=keep, on_step=tell)
    keep(training)
