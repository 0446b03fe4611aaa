"""Stacks of runs that train together, and the estimated time of a sweep on this machine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest

import pandas as pd
import torch
from tqdm import tqdm

from lib.experiments.build import Config, image_shape, make_training, shared, total_steps
from lib.experiments.config import FacesConfig, RunConfig
from lib.experiments.processes import default_device, workers

STACK_NUMBERS = {"cpu": 2**16, "cuda": 2**24}
"""Largest size of the iterate of a stack. On a CPU a larger one leaves the cache: with 100 images of 28x28 a
stack of 64 is up to twice slower than its members alone (`results/bench/`)."""

NUMBER_BYTES = 2000
"""Free memory of an accelerator per number: twice that of solvers, weights and moments."""

TIMED_STEPS = 2
"""Number of optimizer steps that are timed per kind of run."""


def stack_size(config: Config, device: torch.device) -> int:
    """Return the number of configurations per stack; one with L-BFGS."""
    if isinstance(config, FacesConfig) and config.optimizer == "lbfgs":
        return 1
    numbers = STACK_NUMBERS[device.type]
    if device.type == "cuda":
        numbers = min(numbers, torch.cuda.mem_get_info(device)[0] // NUMBER_BYTES)
    height, width = image_shape(config)
    return max(1, numbers // (config.batch_size * height * width))


def stacks(configs: Iterable[Config], device: torch.device) -> list[list[Config]]:
    """Group configurations into stacks, as large as the device allows.

    Members have similar step sizes, because these need similar numbers of solver steps. The kinds of runs
    alternate, so that the first stacks are a sample of the sweep.
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


def plan(configs: Sequence[RunConfig]) -> pd.DataFrame:
    """Estimate the time of trainings on this machine from two optimizer steps per kind of run.

    The weights of these steps are untrained; later solves may need fewer or more steps.

    Returns:
        `runs` and `time`, the seconds of all runs on all processes, for each `task` and `model`.
    """
    device, rows = default_device(), []
    kinds: dict[Config, list[list[Config]]] = {}
    for stack in stacks(configs, device):
        kinds.setdefault(shared(stack[0]), []).append(stack)
    for config, group in tqdm(kinds.items(), desc="calibration", leave=False):
        runs, seconds = sum(map(len, group)), _seconds_per_run(group[len(group) // 2], device)
        wall = runs * min(seconds, config.time_budget) / workers(device)
        rows.append((config.task, config.model, runs, wall))
    table = pd.DataFrame(rows, columns=["task", "model", "runs", "time"])
    return table.groupby(["task", "model"], sort=False).sum()


def _seconds_per_run(stack: Sequence[Config], device: torch.device) -> float:
    """Estimate the time of a training in a stack; an image costs half as much in an evaluation."""
    config = stack[0]
    images = min(config.train_images, TIMED_STEPS * config.batch_size)
    changes = {"train_images": images, "test_images": 1, "epochs": 1, "time_budget": 1e6}
    histories = make_training([c.model_copy(update=changes) for c in stack], device).run()
    # A member that diverges before it is trained has one row or none.
    spent = sum(history.seconds - history.rows[0]["seconds"] for history in histories if history.rows)
    per_step = spent / len(stack) / math.ceil(images / config.batch_size)
    evaluations = (config.epochs + 1) * config.test_images / config.batch_size / 2
    return per_step * (total_steps(config) + evaluations)


def duration(seconds: float) -> str:
    """Return a time with its unit: 40 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
