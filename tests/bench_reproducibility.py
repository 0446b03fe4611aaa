"""Which digits hold on another machine: the same trainings with other roundings (`make bench`).

Machines differ in the vector instructions of their processor, which change the order of sums, and in their
cores. Both can be imitated on one machine. Trainings take one thread whatever the machine has; what a second
one would change is measured all the same.
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

from lib.experiments.config import FacesConfig, RunConfig
from lib.experiments.profiles import faces_config, grid, profile_config
from lib.experiments.store import REPOSITORY
from lib.experiments.trainer import Trainer, shared
from lib.models import MODELS

MACHINES: dict[str, dict[str, str]] = {
    "this one": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "no AVX": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "two threads": {"OMP_NUM_THREADS": "2"},
}
"""What the environment of a process says of its machine."""

FIGURES = {"denoising": (0.1, "relu"), "inpainting": (1.0, "softshrink"), "deblurring": (0.5, "softshrink")}
"""Weight and activation of figures 2 to 4."""

METRICS = ("test_loss", "test_psnr", "test_steps", "test_unconverged")


def configurations() -> dict[str, list[RunConfig] | list[FacesConfig]]:
    """By what they are: a part of the grid, some of figure 8, and those of figures 2 to 4."""
    shown = [
        profile_config("quick", task, model=model, tau=0.5, gamma=gamma, sigma=sigma)
        for task, (gamma, sigma) in FIGURES.items()
        for model in MODELS
    ]
    # Without a time budget, which a busy machine would spend.
    part = grid("quick", noise=0.1, gamma=[0.1, 1.0], tau=[0.1, 0.9], time_budget=1e6)
    photographs = [faces_config("quick", "denoising", model=model) for model in MODELS]
    return {"grid": part, "figure 8": photographs, "figures 2 to 4": shown}


def train(machine: str) -> None:
    """Body of a process: train everything, and print a line of JSON for each run."""
    if machine == "two threads":
        # The training asks for one thread; here it gets two.
        torch.set_num_threads(2)
        torch.set_num_threads = lambda threads: None
    for kind, configs in configurations().items():
        for _, stack in groupby(configs, shared):
            for member in Trainer(list(stack)).train():
                config = member.config
                row = {"kind": kind, "task": config.task, "model": config.model}
                row |= {name: getattr(config, name, "") for name in ("tau", "gamma", "sigma")}
                last = member.history[-1] if member.history else {}
                row |= {"machine": machine, "status": member.status}
                print(json.dumps(row | {name: last.get(name) for name in METRICS}), flush=True)


def trained_on(machine: str) -> list[dict[str, object]]:
    process = subprocess.run(
        [sys.executable, __file__, machine],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | MACHINES[machine],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in process.stdout.splitlines()]


def spread(runs: pd.DataFrame) -> pd.DataFrame:
    """The largest difference to this machine within each kind, task and model, over its runs.

    Returns:
        Rows by kind, task, model and machine: PSNR in dB, the loss relatively, steps, the share of
        unconverged samples, and how many runs ended differently.
    """
    index = ["kind", "task", "model", "tau", "gamma", "sigma"]
    here = runs[runs["machine"] == "this one"].set_index(index)
    tables = {}
    for machine in list(MACHINES)[1:]:
        there = runs[runs["machine"] == machine].set_index(index)
        differences = (there[list(METRICS)] - here[list(METRICS)]).abs()
        differences["test_loss"] /= here["test_loss"]
        differences["other ends"] = (there["status"] != here["status"]).astype(int)
        kinds = differences.groupby(["kind", "task", "model"])
        tables[machine] = kinds.agg(dict.fromkeys(METRICS, "max") | {"other ends": "sum"})
    return (
        pd.concat(tables, names=["machine"]).reorder_levels(["kind", "task", "model", "machine"]).sort_index()
    )


def main() -> int:
    if len(sys.argv) > 1:
        train(sys.argv[1])
        return 0
    with ThreadPoolExecutor(2) as pool:
        rows = [
            row for trained in tqdm(pool.map(trained_on, MACHINES), total=len(MACHINES)) for row in trained
        ]
    runs = pd.DataFrame(rows)
    table = spread(runs)
    capability = torch.backends.cpu.get_cpu_capability()
    save("reproducibility", table, machines=MACHINES, runs=len(runs) // len(MACHINES), capability=capability)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
