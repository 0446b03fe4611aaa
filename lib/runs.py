"""Runs: trained once, stored under a key of all that can change their result, loaded ever after."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock
from IPython.display import clear_output
from torch import Tensor
from tqdm import tqdm

from lib.config import RunConfig
from lib.data import FACES_FILES, MNIST_FILES
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
from lib.training import Trainer, make_operator

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
        "threads": torch.get_num_threads(),
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

    def model(self) -> FixedPointModel:
        """The trained model."""
        c, w = self.config, self.weights
        return build_model(
            c.model,
            make_operator(c),
            (w["A"], w["b"], w.get("C", w["A"])),
            c.sigma,
            tau=c.tau,
            lam=c.lam,
            gamma=c.gamma,
        )


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar with the time that is left; it leaves no trace in a notebook's output.

    Args:
        what: its label.
        total: steps until it is full.

    Yields:
        A function that advances the bar by a number of steps.
    """
    interval = 0.2 if sys.stderr.isatty() else 5.0
    with tqdm(desc=what, total=total, mininterval=interval, leave=False) as bar:
        yield bar.update
    if "ipykernel" in sys.modules:
        clear_output()


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def get_run(config: RunConfig, results: Path | str | None = None) -> Run:
    """The run of a configuration: loaded if it is stored, else trained, resuming where it was killed.

    Two processes that ask for the same run do the work once: the second one waits and loads.

    Args:
        config: what to train.
        results: folder of the results, with the runs in `runs/`; the repository's when None.

    Returns:
        The `Run`; one that diverged or ran out of time is a run with that status and its reason.

    Raises:
        DataError: the data cannot be had.
    """
    folder = Path(results or RESULTS) / "runs" / run_key(config)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        return _load(folder, config) or _train(folder, config)


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
        weights = torch.load(io.BytesIO(read_sealed(weights_path)), weights_only=True)
    except (OSError, DamagedFile) as error:
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


def _train(folder: Path, config: RunConfig) -> Run:
    device = default_device()
    checkpoint_path = folder / "checkpoint.pt"
    checkpoint = None
    if checkpoint_path.exists():
        try:
            checkpoint = read_sealed(checkpoint_path)
        except DamagedFile as error:
            set_aside(checkpoint_path, str(error))
    trainer = Trainer([config], device, checkpoint)
    with progress(f"{config.model} {config.task}", config.epochs * trainer.steps_per_epoch) as advance:
        advance(trainer.epoch * trainer.steps_per_epoch)
        (member,) = trainer.train(
            on_epoch=lambda t: write_sealed(checkpoint_path, t.checkpoint()),
            on_step=lambda: advance(1),
        )
    buffer = io.BytesIO()
    torch.save(member.weights, buffer)
    write_sealed(folder / "weights.pt", buffer.getvalue())
    record = {
        "config": config.model_dump(),
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
