"""Runs: trained once, stored under a key of all that can change their result, loaded ever after."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock
from IPython.display import clear_output
from torch import Tensor
from tqdm import tqdm

from lib.config import RunConfig
from lib.data import FACES_FILES, MNIST_FILES, mnist
from lib.models import FixedPointModel, build_model
from lib.store import (
    REPOSITORY,
    RESULTS,
    DamagedFile,
    read_sealed,
    set_aside,
    write_atomic,
    write_sealed,
)
from lib.training import Trainer, make_operator, steps_per_epoch

DATA_DIGESTS = {"mnist": MNIST_FILES, "faces": FACES_FILES}

RESULT_MODULES = (
    "data",
    "implicit",
    "models",
    "operators",
    "regularizer",
    "solvers",
    "training",
)
"""Modules of `lib` that can change the result of a run."""


@cache
def code_version() -> str:
    """Digest of the code that can change a run's result: its syntax trees, without docstrings."""
    digest = hashlib.sha256(f"torch {version('torch').partition('+')[0]}".encode())
    for module in RESULT_MODULES:
        tree = ast.parse((REPOSITORY / "lib" / f"{module}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                node.body = [part for part in node.body if not _is_docstring(part)]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:16]


def _is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def run_key(config: RunConfig) -> str:
    """Key of a run: a digest of its configuration, its data and the code that can change its result."""
    identity = {
        "config": config.model_dump(),
        "data": DATA_DIGESTS[config.dataset],
        "code": code_version(),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def environment(device: torch.device | str) -> dict[str, Any]:
    """Versions and machine that a result was made with."""
    packages = ("torch", "torchvision", "numpy", "pandas", "matplotlib")
    device = torch.device(device)
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "accelerator": accelerator,
    }


@dataclass(frozen=True)
class Run:
    """A stored training run.

    Attributes:
        key: its key in the store.
        config: its configuration.
        status: `completed`, `diverged` or `out of time`.
        reason: why it did not complete.
        history: a row per epoch, epoch 0 being the untrained model; columns `epoch`, `seconds`,
            `train_loss`, `test_loss`, `test_psnr` (dB) and, for the solves `forward`, `backward`
            (training) and `test`, the means of `_steps` and `_residual` and the share `_unconverged`.
        weights: `A`, `b` and, for a DEQ, `C`.
        provenance: data digests, code version, environment and seconds.
    """

    key: str
    config: RunConfig
    status: str
    reason: str
    history: pd.DataFrame
    weights: dict[str, Tensor]
    provenance: dict[str, Any]

    def model(self, stacked: bool = False) -> FixedPointModel:
        """The trained model; `stacked` gives it the leading dimension that it was trained with."""
        c = self.config
        w = {name: weight[None] if stacked else weight for name, weight in self.weights.items()}
        numbers = {
            name: torch.tensor([value] if stacked else value)
            for name, value in (("tau", c.tau), ("lam", c.lam), ("gamma", c.gamma))
        }
        weights = (w["A"], w["b"], w.get("C", w["A"]))
        return build_model(c.model, make_operator(c), weights, c.sigma, **numbers)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def get_runs(configs: Sequence[RunConfig], results: Path | str | None = None) -> list[Run]:
    """The runs of some configurations, trained at the same time: one process per core.

    Args:
        configs: what to train.
        results: folder of the results, with the runs in `runs/`; the repository's when None.

    Returns:
        The runs, in the order of the configurations.

    Raises:
        RuntimeError: a training failed; the message says how.
    """
    store = Path(results or RESULTS) / "runs"
    waiting = [config for config in configs if not (store / run_key(config) / "run.json").exists()]
    if waiting:
        mnist("test", 1)  # here, where a missing download is reported once
        _train_in_processes(waiting, results)
    return [get_run(config, results) for config in configs]


def get_run(
    config: RunConfig,
    results: Path | str | None = None,
    on_step: Callable[[], object] = lambda: None,
) -> Run:
    """The run of a configuration: loaded if it is stored, else trained, resuming where it was killed.

    Two processes that ask for the same run do the work once: the second one waits and loads.

    Args:
        config: what to train.
        results: folder of the results, with the runs in `runs/`; the repository's when None.
        on_step: called after each optimizer step.

    Returns:
        The `Run`; one that diverged or ran out of time is a run with that status and its reason.

    Raises:
        DataError: the data cannot be had.
    """
    folder = Path(results or RESULTS) / "runs" / run_key(config)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        return _load(folder, config) or _train(folder, config, on_step)


def _train_in_processes(configs: Sequence[RunConfig], results: Path | str | None) -> None:
    """Train each configuration in a process of its own, at most one per core at a time.

    The results are left in the store. When one fails or this process is interrupted, all are stopped;
    what they trained until their last epoch is resumed next time.
    """
    context = multiprocessing.get_context("spawn")
    reports = context.SimpleQueue()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting = list(configs)
    running: list[SpawnProcess] = []
    what = ", ".join(f"{config.model} {config.task}" for config in configs)
    total = sum(config.epochs * steps_per_epoch(config) for config in configs)
    # The bar goes to the terminal or, in a notebook, into an output that is cleared in the end.
    interval = 0.2 if sys.stderr.isatty() else 5.0
    try:
        with tqdm(desc=what, total=total, mininterval=interval, leave=False) as bar:
            while waiting or running:
                while waiting and len(running) < cores:
                    arguments = (waiting.pop(0), results, reports)
                    process = context.Process(target=_train_and_report, args=arguments, daemon=True)
                    process.start()
                    running.append(process)
                multiprocessing.connection.wait([p.sentinel for p in running], timeout=0.2)
                while not reports.empty():
                    report = reports.get()
                    if isinstance(report, str):
                        raise RuntimeError(report)
                    bar.update(report)
                if any(process.exitcode for process in running):
                    raise RuntimeError(
                        "a training process was killed; run again to resume it (a script that calls "
                        'get_runs needs `if __name__ == "__main__":`)'
                    )
                running = [process for process in running if process.is_alive()]
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()
    if "ipykernel" in sys.modules:
        clear_output()


def _train_and_report(config: RunConfig, results: Path | str | None, reports: SimpleQueue[int | str]) -> None:
    """Body of a training process: puts 1 for each step, or a line that says why it failed."""
    parent = multiprocessing.parent_process()

    def on_step() -> None:
        if parent is not None and not parent.is_alive():
            sys.exit("the process that asked for this training is gone")
        reports.put(1)

    try:
        get_run(config, results, on_step)
    except Exception as error:
        reports.put(f"{config.model} {config.task}: {type(error).__name__}: {error}")


def _load(folder: Path, config: RunConfig) -> Run | None:
    record_path, weights_path = folder / "run.json", folder / "weights.pt"
    if not record_path.exists():
        return None
    try:
        stored = json.loads(record_path.read_bytes())
        record = stored["run"]
        if stored["sha256"] != _digest(record):
            raise DamagedFile(f"{record_path}: its content does not match its checksum")
        if record["config"] != config.model_dump():
            raise DamagedFile(f"{record_path}: it belongs to another configuration")
    except (ValueError, KeyError, TypeError, DamagedFile) as error:
        set_aside(record_path, str(error))
        return None
    try:
        content = read_sealed(weights_path)
        if record["weights"] != hashlib.sha256(content).hexdigest():
            raise DamagedFile(f"{weights_path}: it belongs to another run")
        weights = torch.load(io.BytesIO(content), weights_only=True)
    except (OSError, KeyError, DamagedFile) as error:
        set_aside(record_path, f"its weights cannot be used ({error})")
        return None
    return Run(
        key=folder.name,
        config=config,
        status=record["status"],
        reason=record["reason"],
        history=pd.DataFrame(record["history"]),
        weights=weights,
        provenance=record["provenance"],
    )


def _train(folder: Path, config: RunConfig, on_step: Callable[[], object]) -> Run:
    device = default_device()
    checkpoint_path = folder / "checkpoint.pt"
    checkpoint = None
    if checkpoint_path.exists():
        try:
            checkpoint = read_sealed(checkpoint_path)
        except DamagedFile as error:
            set_aside(checkpoint_path, str(error))
    trainer = Trainer([config], device, checkpoint)
    (member,) = trainer.train(
        on_epoch=lambda t: write_sealed(checkpoint_path, t.checkpoint()), on_step=on_step
    )
    buffer = io.BytesIO()
    torch.save(member.weights, buffer)
    write_sealed(folder / "weights.pt", buffer.getvalue())
    record = {
        "config": config.model_dump(),
        "weights": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "status": member.status,
        "reason": member.reason,
        "history": [
            {name: value if math.isfinite(value) else None for name, value in row.items()}
            for row in member.history
        ],
        "provenance": {
            "data": DATA_DIGESTS[config.dataset],
            "code": code_version(),
            "environment": environment(device),
            "seconds": trainer.seconds,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    }
    stored = json.dumps({"sha256": _digest(record), "run": record}, indent=1)
    write_atomic(folder / "run.json", stored.encode())
    checkpoint_path.unlink(missing_ok=True)
    run = _load(folder, config)
    if run is None:
        raise DamagedFile(f"{folder}: the run that was just written cannot be read; check the disk")
    return run


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
