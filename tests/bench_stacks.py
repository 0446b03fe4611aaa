"""What a stack gains: optimizer steps per second and configuration for stacks of growing size (`make bench`).

A stack's members are spread over the noise levels, steps and weights of the paper's grid. A stack of one is
the mean of four of them, each alone. All sizes are timed in one process, in turns, on one thread of the CPU
or on the accelerator.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import pairwise

import pandas as pd
import torch
from benches import save
from tqdm import tqdm

from lib.experiments.config import RunConfig
from lib.experiments.profiles import GRID, grid
from lib.experiments.processes import default_device
from lib.experiments.trainer import Trainer

ALONE = 4
STEPS = {"quick": 6, "paper": 2}
"""Optimizer steps of one round with the images and the batch of a profile's sweep."""


def members(profile: str, task: str, model: str, steps: int) -> list[RunConfig]:
    """The paper's 90 configurations of a task and model with ReLU, of one epoch of a few steps."""
    shape = grid(profile)[0]
    values = {"train_images": steps * shape.batch_size, "test_images": 1, "epochs": 1, "sigma": "relu"}
    return grid(profile, task=task, model=model, tau=GRID["tau"], **values)


def spread(group: Sequence[RunConfig], count: int) -> list[RunConfig]:
    """Members of a group at even distances."""
    return [group[k * len(group) // count] for k in range(count)]


def seconds_per_step(stack: Sequence[RunConfig], device: torch.device) -> list[float]:
    """Times of the optimizer steps of a stack, without the first one."""
    times: list[float] = []
    Trainer(stack, device).train(on_step=lambda: times.append(time.perf_counter()))
    return [after - before for before, after in pairwise(times)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", choices=STEPS, default="quick", help="whose images and batch")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 8, 16, 64], help="of the stacks")
    parser.add_argument("--rounds", type=int, default=3, help="times that each size is timed")
    options = parser.parse_args()
    device = default_device()
    cases = [
        (task, model, size)
        for _ in range(options.rounds)
        for task in GRID["task"]
        for model in GRID["model"]
        for size in options.sizes
    ]
    rows = []
    for task, model, size in tqdm(cases, desc="bench"):
        group = members(options.profile, task, model, STEPS[options.profile])
        stacks = [[config] for config in spread(group, ALONE)] if size == 1 else [spread(group, size)]
        count = sum(len(stack) for stack in stacks)
        for step in zip(*(seconds_per_step(stack, device) for stack in stacks), strict=True):
            rows.append({"task": task, "model": model, "stack": size, "ms": 1e3 * sum(step) / count})
    times = pd.DataFrame(rows).groupby(["task", "model", "stack"], sort=False)["ms"]
    table = times.agg(median="median", low=lambda t: t.quantile(0.25), high=lambda t: t.quantile(0.75))
    table["steps per second"] = 1e3 / table["median"]
    shape = grid(options.profile)[0]
    images = f"{shape.size}x{shape.size}, batch {shape.batch_size}"
    print(f"{images}: milliseconds per optimizer step and configuration (median, middle half)")
    save(f"stacks_{options.profile}", table, device=device, images=images)
    return 0


if __name__ == "__main__":
    sys.exit(main())
