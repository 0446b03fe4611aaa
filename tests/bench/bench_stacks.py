"""Optimizer steps per second and configuration for stacks of several sizes (`make bench`).

The members of a stack are spread over the noise levels, steps and weights of the paper's grid. A stack of one
is the mean of four separate members. All sizes alternate in one process, on the default device.
"""

from __future__ import annotations

from itertools import product

import pandas as pd
from benches import save, timed_training
from tqdm import tqdm

from lib.experiments.config import RunConfig
from lib.experiments.processes import default_device
from lib.experiments.profiles import GRID, grid

ALONE = 4

PROFILES = {"quick": (6, 3, (1, 8, 16, 64)), "paper": (2, 1, (1, 8, 64))}
"""Optimizer steps of a training, rounds and stack sizes, by the profile of images and batches."""


def members(profile: str, task: str, model: str, steps: int, count: int) -> list[RunConfig]:
    """Return evenly spaced configurations of the paper's 90 for a task and model with ReLU."""
    images = {"train_images": steps * grid(profile)[0].batch_size, "test_images": 1}
    values = images | {"task": task, "model": model, "tau": GRID["tau"], "initial": "independent"}
    group = grid(profile, epochs=1, sigma="relu", **values)
    return [group[k * len(group) // count] for k in range(count)]


def main() -> None:
    for profile, (steps, rounds, sizes) in PROFILES.items():
        rows = []
        cases = list(product(range(rounds), GRID["task"], GRID["model"], sizes))
        for _, task, model, size in tqdm(cases, desc=f"stacks of {profile}"):
            configs = members(profile, task, model, steps, ALONE if size == 1 else size)
            stacks = [[config] for config in configs] if size == 1 else [configs]
            seconds = [timed_training(stack, default_device())[1] for stack in stacks]
            ms = [1e3 * sum(step) / len(configs) for step in zip(*seconds, strict=True)]
            rows += [{"task": task, "model": model, "stack": size, "ms": value} for value in ms]
        times = pd.DataFrame(rows).groupby(["task", "model", "stack"], sort=False)["ms"]
        table = times.agg(median="median", low=lambda t: t.quantile(0.25), high=lambda t: t.quantile(0.75))
        table["steps per second"] = 1e3 / table["median"]
        shape = grid(profile)[0]
        images = f"{shape.size}x{shape.size}, batch {shape.batch_size}"
        save(f"stacks_{profile}", table, device=default_device(), images=images)


if __name__ == "__main__":
    main()
