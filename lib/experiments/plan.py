"""Which runs train together, and how long the rest of a sweep will take on this machine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import pandas as pd
import psutil
import torch
from tqdm import tqdm

from lib.experiments.build import Config, image_shape, make_training, shared, total_steps
from lib.experiments.config import FacesConfig, RunConfig
from lib.experiments.processes import default_device, workers
from lib.experiments.records import is_stored
from lib.experiments.store import Results
from lib.training import TEST_BATCH, History

STACK_NUMBERS = {"cpu": 2**16, "cuda": 2**24}
"""Largest size of the iterate of a whole stack. On a CPU a larger one leaves the cache, and its members wait
for each other: with 100 images of 28x28 a stack of 64 is up to twice slower than its members alone
(`results/bench/`). An accelerator needs millions of numbers to be busy.
"""

SOLVER_BUFFERS, EXPERT_BUFFERS = 12, 4
"""Batch-sized buffers per solve and per expert, for the memory estimate."""

TRIED_STEPS, TRIED_MEMBERS = 2, 8
"""Calibration: time two optimizer steps on at least eight configurations per group."""

ROW_BYTES = 500
"""Size of an epoch in a record."""


def weight_count(config: Config) -> int:
    """Return how many numbers a configuration learns; kernels are few and count as none."""
    if isinstance(config, FacesConfig):
        return 0
    n = config.size**2
    return n * n * (2 if config.model == "deq" else 1) + n


def member_bytes(config: Config) -> int:
    """Return the memory that a configuration takes in a stack.

    These are its weights, their gradient and Adam's two moments and, per image of a batch, the solver's
    history and the iterates of a step.
    """
    height, width = image_shape(config)
    experts = config.filters if isinstance(config, FacesConfig) else 1
    buffers = 2 * config.memory + SOLVER_BUFFERS + EXPERT_BUFFERS * experts
    images = max(config.batch_size, min(TEST_BATCH, config.test_images))
    return 4 * 4 * weight_count(config) + 4 * images * height * width * buffers


def stack_size(config: Config, device: torch.device) -> int:
    """Return how many configurations like this one to train together.

    Half of the device's free memory is filled, as far as `STACK_NUMBERS` allows. L-BFGS trains one at a time.
    """
    if isinstance(config, FacesConfig) and config.optimizer == "lbfgs":
        return 1
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // workers(device)
    height, width = image_shape(config)
    largest = STACK_NUMBERS[device.type] // (config.batch_size * height * width)
    return max(1, min(largest, free // 2 // member_bytes(config)))


def stacks(configs: Iterable[Config], device: torch.device) -> list[list[Config]]:
    """Return configurations in groups that train together, as large as the device allows.

    Members with similar steps stay together, since they need similar numbers of solver steps. The groups take
    turns, so that a sweep's first minutes are a sample of all of it.
    """
    groups: dict[Config, list[Config]] = {}
    for config in configs:
        groups.setdefault(shared(config), []).append(config)
    chunks = []
    for group in groups.values():
        group.sort(key=lambda c: (c.tau, c.gamma, c.noise))
        count = math.ceil(len(group) / stack_size(group[0], device))
        chunks.append([group[k * len(group) // count : (k + 1) * len(group) // count] for k in range(count)])
    return [stack for turn in zip_longest(*chunks) for stack in turn if stack]


def plan(configs: Sequence[RunConfig], results: Results = None) -> pd.DataFrame:
    """Return what is left to train, and how long it will take here, from a few steps of every kind of run.

    These steps are those of stacks as they will be trained, with untrained weights, whose solves may need
    fewer or more steps than later ones. An evaluation counts as half a training step per image.

    Returns:
        A row per task and model: runs left, seconds per run, the seconds of all on all processes, the GB that
        they will store, and the GB of memory that a stack takes.
    """
    device, rows = default_device(), []
    groups: dict[RunConfig, list[RunConfig]] = {}
    for config in configs:
        if not is_stored(config, results):
            groups.setdefault(shared(config), []).append(config)
    for group in tqdm(groups.values(), desc="calibration", leave=False):
        trained, first = stacks(group, device), group[0]
        stored = 4 * weight_count(first) + ROW_BYTES * (first.epochs + 1)
        row: dict[str, Any] = {"task": first.task, "model": first.model, "runs": len(group)}
        row |= {"wall": len(group) * min(_seconds_per_run(trained, device), first.time_budget)}
        row |= {"stored": len(group) * stored / 1e9}
        rows.append(row | {"memory": max(map(len, trained)) * member_bytes(first) / 1e9})
    table = pd.DataFrame(rows, columns=["task", "model", "runs", "wall", "stored", "memory"])
    sums = table.groupby(["task", "model"], sort=False).agg(
        {"runs": "sum", "wall": "sum", "stored": "sum", "memory": "max"}
    )
    sums.insert(1, "seconds per run", sums["wall"] / sums["runs"])
    sums["wall"] /= workers(device)
    return sums


def _seconds_per_run(trained: Sequence[list[Config]], device: torch.device) -> float:
    """Return the time of a training, measured on a few of its stacks."""
    count = math.ceil(TRIED_MEMBERS / len(trained[0]))
    tried = trained[:: max(1, len(trained) // count)][:count]
    config = trained[0][0]
    images = min(config.train_images, TRIED_STEPS * config.batch_size)
    changes = {"train_images": images, "test_images": 1, "epochs": 1, "time_budget": 1e6}
    members = list[History]()
    for stack in tried:
        members += make_training([c.model_copy(update=changes) for c in stack], device).run()
    # A member that diverges before it is trained has one row or none.
    spent = [m.seconds - m.rows[0]["seconds"] for m in members if m.rows]
    per_step = sum(spent) / len(members) / math.ceil(images / config.batch_size)
    evaluations = (config.epochs + 1) * config.test_images / config.batch_size / 2
    return per_step * (total_steps(config) + evaluations)


def duration(seconds: float) -> str:
    """Return a time with its unit: 40 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
