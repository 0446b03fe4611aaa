"""Comparison of a GPU with the CPU: agreement of losses, and times of stacks of the grid (`make gpu`).

The measurement takes some minutes and writes tables. With `--sweep MINUTES` runs of a grid are then trained
and packed into one file for `make sweep`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from zipfile import ZipFile

import pandas as pd
import torch
from benches import timed_training

from lib.experiments.build import make_training
from lib.experiments.command import Parser, command
from lib.experiments.config import MNIST_SIDE, ConfigError, RunConfig, require_name, require_range
from lib.experiments.plan import stacks
from lib.experiments.processes import default_device
from lib.experiments.profiles import GRID, PROFILES, grid
from lib.experiments.provenance import write_with_provenance
from lib.experiments.records import is_stored, run_folder
from lib.experiments.runs import train_stack
from lib.experiments.store import RESULTS, absolute
from lib.training import COMPLETED

STEPS, WARM_STEPS = 12, 3
"""Optimizer steps of a timing, and ignored steps at its start."""

AGREEMENT_STEPS, AGREEMENT_MEMBERS = 5, 5
"""Optimizer steps before losses are compared with those of the CPU, and members of that stack."""

CASES = list(product(GRID["task"], GRID["model"]))


def stack_of(task: str, model: str, members: int, steps: int, **values: Any) -> list[RunConfig]:
    """Return members at even distances over the noise levels, steps and weights of the paper's grid."""
    values |= {"train_images": steps * values["batch_size"], "test_images": values["batch_size"]}
    values |= {"task": task, "model": model, "sigma": "relu", "initial": "independent"}
    group = grid("paper", epochs=1, time_budget=1e6, **values)
    return [group[(2 * k + 1) * len(group) // (2 * members)] for k in range(members)]


def agreement(task: str, model: str, device: torch.device, **values: Any) -> dict[str, Any]:
    """Return the largest relative differences of a stack's losses from those of the CPU."""
    configs = stack_of(task, model, AGREEMENT_MEMBERS, AGREEMENT_STEPS, **values)

    def losses(where: str | torch.device, precision: str = "float32") -> pd.DataFrame:
        same = [config.model_copy(update={"precision": precision}) for config in configs]
        last = [(member.rows or [{}])[-1] for member in make_training(same, where).run()]
        return pd.DataFrame(last).reindex(columns=["train_loss", "test_loss"])

    reference, row = losses("cpu"), {"task": task, "model": model}
    for precision in ("float32", "tf32") if device.type == "cuda" else ("float32",):
        apart = ((losses(device, precision) - reference).abs() / reference).max()
        row |= {f"{name}, {precision} from CPU": value for name, value in apart.items()}
    return row


def timing(
    task: str, model: str, stack: int, precision: str, device: torch.device, **values: Any
) -> dict[str, Any]:
    """Return a stack's milliseconds per optimizer step, mean solver steps and GB of memory."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    members, seconds = timed_training(
        stack_of(task, model, stack, STEPS, precision=precision, **values), device
    )
    row: dict[str, Any] = {"task": task, "model": model, "stack": stack, "precision": precision}
    row["ms"] = 1e3 * pd.Series(seconds[WARM_STEPS - 1 :], dtype=float).median()
    last = pd.DataFrame([member.rows[-1] for member in members if member.status == COMPLETED])
    row |= {name: last[name].mean() for name in ("forward_steps", "backward_steps") if name in last}
    return row | ({"GB": torch.cuda.max_memory_allocated(device) / 1e9} if cuda else {})


def measure(device: torch.device, out: Path, sizes: Sequence[int] = (1, 8, 90), **values: Any) -> None:
    """Print and write both tables, for stacks of some sizes."""
    cuda = device.type == "cuda"
    kinds = [(size, "float32") for size in sizes] + ([(max(sizes), "tf32")] if cuda else [])
    timed = pd.DataFrame([timing(*case, *kind, device, **values) for kind in kinds for case in CASES])
    timed.insert(0, "device", torch.cuda.get_device_name(device) if cuda else "CPU")
    agreed = pd.DataFrame([agreement(*case, device, **values) for case in CASES])
    files = {}
    for name, table in (("stacks_gpu.csv", timed), ("agreement_gpu.csv", agreed)):
        print(table.to_string(index=False, float_format="{:.3g}".format))
        files[name] = table.to_csv(index=False, float_format="%.3g").encode()
    for path in write_with_provenance(out, files, values, "stacks_gpu_provenance.json", device):
        print(path)


def sweep(profile: str, minutes: float, device: torch.device, out: Path) -> str:
    """Train runs of a grid for some minutes, one stack after the other, and pack those that ended."""
    configs, until = grid(profile), time.monotonic() + 60 * minutes

    def report(steps: int, ended: tuple[str, ...]) -> None:
        if time.monotonic() > until:
            raise TimeoutError

    with suppress(TimeoutError):
        for stack in stacks([config for config in configs if not is_stored(config, out / "store")], device):
            train_stack(stack, out / "store", report)
    path = out / f"{profile}.zip"
    ended = [run_folder(c, out / "store") for c in configs if is_stored(c, out / "store")]
    with ZipFile(path, "w") as archive:
        # A folder with a record holds a complete run, so the record comes last.
        for folder, name in product(ended, ("weights.pt", "run.json")):
            archive.write(folder / name, f"{folder.name}/{name}")
    how = f"python -m zipfile -e {path} results/runs"
    return f"{len(ended)} of {len(configs)} runs of {profile} are trained: {how}"


@command
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="make gpu", description=__doc__)
    parser.add_argument("--out", default=str(RESULTS / "bench"), help="folder of the tables")
    parser.add_argument(
        "--sweep", type=float, default=0.0, metavar="MINUTES", help="train the grid afterwards"
    )
    parser.add_argument("--profile", default="quick", help="profile of the grid")
    options = parser.parse(arguments)
    require_range("sweep", options.sweep, 0)
    require_name("profile", options.profile, PROFILES)
    device, out = default_device(), absolute(options.out)
    out.mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=out).close()
    if device.type != "cuda":
        raise ConfigError("`make gpu` requires a GPU that torch can use.")
    measure(device, out, size=MNIST_SIDE, batch_size=RunConfig().batch_size)
    if options.sweep > 0:
        print(sweep(options.profile, options.sweep, device, out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
