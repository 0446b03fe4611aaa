"""What a stack gains: optimizer steps per second and configuration for stacks of growing size (`make bench`).

A stack's members are spread over the steps, weights and noise levels of the paper's grid. A stack of one is
each of four of them alone. All sizes are timed in one process, in turns, on one thread of the CPU or on the
accelerator.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import pairwise

import pandas as pd
import torch
from tqdm import tqdm

from lib.config import GRID, RunConfig, grid
from lib.runs import default_device, environment
from lib.store import RESULTS, write_atomic
from lib.training import Trainer

ALONE, ROUNDS = 4, 3
SHAPES = {"14x14, batch 20": ("quick", 6), "28x28, batch 100": ("paper", 2)}
"""Images and batch of these profiles' sweeps, and the optimizer steps of one round."""


def members(profile: str, task: str, model: str, steps: int) -> list[RunConfig]:
    """The paper's 90 configurations of a task and model with ReLU, of one epoch of a few steps."""
    shape = grid(profile)[0]
    values = {"train_images": steps * shape.batch_size, "test_images": 1, "epochs": 1, "sigma": "relu"}
    return grid(profile, task=task, model=model, tau=GRID["tau"], **values)


def seconds_per_step(stack: Sequence[RunConfig], device: torch.device) -> list[float]:
    """Times of the optimizer steps of a stack, without the first one."""
    times: list[float] = []
    Trainer(stack, device).train(on_step=lambda: times.append(time.perf_counter()))
    return [after - before for before, after in pairwise(times)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 8, 16, 64])
    options = parser.parse_args()
    device = default_device()
    cases = [
        (shape, task, model, size)
        for _ in range(ROUNDS)
        for shape in SHAPES
        for task in GRID["task"]
        for model in GRID["model"]
        for size in options.sizes
    ]
    rows = []
    for shape, task, model, size in tqdm(cases, desc="bench"):
        profile, steps = SHAPES[shape]
        group = members(profile, task, model, steps)
        chosen = group[:: max(1, len(group) // size)][:size]
        stacks = [[c] for c in group[:: len(group) // ALONE][:ALONE]] if size == 1 else [chosen]
        for stack in stacks:
            for seconds in seconds_per_step(stack, device):
                case = {"images": shape, "task": task, "model": model, "stack": size}
                rows.append(case | {"ms": 1e3 * seconds / len(stack)})
    times = pd.DataFrame(rows).groupby(["images", "task", "model", "stack"], sort=False)["ms"]
    table = times.agg(median="median", low=lambda t: t.quantile(0.25), high=lambda t: t.quantile(0.75))
    table["steps per second"] = 1e3 / table["median"]
    print("milliseconds per optimizer step and configuration (median, middle half)")
    print(table.to_string(float_format="{:.3g}".format))
    folder = RESULTS / "bench"
    write_atomic(folder / "stacks.csv", table.round(3).to_csv().encode())
    write_atomic(folder / "stacks_provenance.json", json.dumps(environment(device), indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
