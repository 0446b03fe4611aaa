"""Differences between machines: the same trainings with other rounding errors (`make bench`).

Machines differ in the vector instructions of their processor, which change the order of sums, and in their
cores. Both are imitated on one machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import pandas as pd
import torch
from benches import save
from tqdm import tqdm

from lib.experiments.build import Config, make_training, shared
from lib.experiments.config import MODELS
from lib.experiments.profiles import faces_config, grid, profile_config
from lib.experiments.store import REPOSITORY

HERE = "this one"
MACHINES: dict[str, dict[str, str]] = {
    HERE: {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "no AVX": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "two threads": {"OMP_NUM_THREADS": "2"},
}
"""Environment variables of a process that imitates a machine."""

FIGURES = {"denoising": (0.1, "relu"), "inpainting": (1.0, "softshrink"), "deblurring": (0.5, "softshrink")}
"""Weight and activation of figures 2 to 4."""

METRICS = ["test_loss", "test_psnr", "test_steps", "test_unconverged"]


def configurations() -> dict[str, list[Config]]:
    """Return the configurations of a part of the grid and of some figures."""
    figures: list[Config] = [
        profile_config("quick", task, model=model, tau=0.5, gamma=gamma, sigma=sigma)
        for task, (gamma, sigma) in FIGURES.items()
        for model in MODELS
    ]
    # A busy machine would spend a time budget.
    axes = {"noise": 0.1, "gamma": [0.1, 1.0], "tau": [0.1, 0.9], "initial": "independent"}
    part: list[Config] = [*grid("quick", time_budget=1e6, **axes)]
    photographs: list[Config] = [faces_config("quick", "denoising", model=model) for model in MODELS]
    return {"grid": part, "figure 8": photographs, "figures 2 to 4": figures}


def train(machine: str) -> None:
    """Train all configurations in this process, and print a line of JSON for each run."""
    if machine == "two threads":
        # A training sets one thread.
        torch.set_num_threads(2)
        torch.set_num_threads = lambda threads: None
    for kind, configs in configurations().items():
        for stack in (list(group) for _, group in groupby(configs, shared)):
            for config, member in zip(stack, make_training(stack).run(), strict=True):
                row = {"kind": kind, "task": config.task, "model": config.model, "machine": machine}
                row |= {"config": config.model_dump_json(), "status": member.status}
                last = member.rows[-1] if member.rows else {}
                print(json.dumps(row | {name: last.get(name) for name in METRICS}), flush=True)


def trained_on(machine: str) -> pd.DataFrame:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | MACHINES[machine]
    command = [sys.executable, __file__, machine]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return pd.DataFrame([json.loads(line) for line in output.splitlines()])


def spread(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the largest differences from this machine, by kind, task, model and machine.

    Differences are relative for the loss, and absolute for PSNR in dB, steps and the share of unconverged
    images. The last column counts runs with another status.
    """
    merged = runs.merge(runs[runs["machine"] == HERE], on=["kind", "config"], suffixes=("", " here"))
    table = merged[["kind", "task", "model", "machine"]].copy()
    for name in METRICS:
        table[name] = (merged[name] - merged[f"{name} here"]).abs()
    table["test_loss"] /= merged["test_loss here"]
    table["other ends"] = (merged["status"] != merged["status here"]).astype(int)
    kinds = table[table["machine"] != HERE].groupby(["kind", "task", "model", "machine"])
    return kinds.agg(dict.fromkeys(METRICS, "max") | {"other ends": "sum"})


def main() -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = pd.concat(tqdm(pool.map(trained_on, MACHINES), total=len(MACHINES)))
    capability = torch.backends.cpu.get_cpu_capability()
    count = len(runs) // len(MACHINES)
    save("reproducibility", spread(runs), machines=MACHINES, runs=count, capability=capability)


if __name__ == "__main__":
    train(sys.argv[1]) if len(sys.argv) > 1 else main()
