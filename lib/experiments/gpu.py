"""What a GPU does with the trainings of the grid: whether it agrees with the CPU, and how fast it is.

`make gpu` measures for some minutes and writes tables; with `--sweep MINUTES` it then trains runs of a grid,
packed into one file for `make sweep`.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lib.experiments import build, data
from lib.experiments.archive import pack
from lib.experiments.build import Config, load_images, make_training, total_steps
from lib.experiments.config import MNIST_SIDE, ConfigError, RunConfig
from lib.experiments.method import METHOD_VERSION
from lib.experiments.profiles import GRID, grid
from lib.experiments.provenance import write_with_provenance
from lib.experiments.records import is_stored
from lib.experiments.runs import stacks, train_stack
from lib.experiments.store import RESULTS
from lib.training import History, generator

STEPS, WARM_STEPS = 12, 3
"""Optimizer steps of a timing, and those at its start that do not count: they record the solves."""

PROFILED_STEPS = 3
"""Of these, at the end, the time that the GPU computes is measured, which slows them down."""

AGREEMENT_STEPS = 5
"""Optimizer steps after which losses are compared with those of the CPU."""

Row = dict[str, Any]
Case = tuple[str, str]

CASES: list[Case] = list(product(GRID["task"], GRID["model"]))


def has_data() -> bool:
    """Whether MNIST need not be fetched, which takes a network and NumPy."""
    return (data.DATA / "MNIST" / "raw").is_dir()


def some_images(config: Config) -> dict[str, Tensor]:
    """A configuration's images, or random ones in [-1, 1] where there are no data: they take as long."""
    if has_data():
        return load_images(config)
    assert isinstance(config, RunConfig)
    draws = generator(config.seed, "images")
    counts = {"train": config.train_images, "test": config.test_images}
    shape = (1, config.size, config.size)
    return {split: 2 * torch.rand(count, *shape, generator=draws) - 1 for split, count in counts.items()}


def stack_of(case: Case, members: int, **values: Any) -> list[RunConfig]:
    """Members with ReLU at even distances over the noise levels, steps and weights of the paper's grid."""
    task, model = case
    values = {"test_images": values["batch_size"], "epochs": 1, "time_budget": 1e6} | values
    group = grid("paper", task=task, model=model, sigma="relu", **values)
    return [group[(2 * k + 1) * len(group) // (2 * members)] for k in range(members)]


def agreement(case: Case, device: torch.device, **values: Any) -> Row:
    """Largest relative differences of a stack's losses after a few steps.

    The device is compared with the CPU, in float32 and with TF32.
    """
    configs = stack_of(case, 5, train_images=AGREEMENT_STEPS * values["batch_size"], **values)

    def trained(where: torch.device, precision: str = "float32") -> list[History]:
        return make_training([c.model_copy(update={"precision": precision}) for c in configs], where).run()

    def apart(members: Sequence[History], others: Sequence[History], name: str) -> float:
        pairs = [(a.rows[-1][name], b.rows[-1][name]) for a, b in zip(members, others, strict=True)]
        return max((abs(a - b) / abs(b) for a, b in pairs), default=0.0)

    reference, here = trained(torch.device("cpu")), trained(device)
    row: Row = {"task": case[0], "model": case[1]}
    row |= {"train loss, from CPU": apart(here, reference, "train_loss")}
    row |= {"test loss, from CPU": apart(here, reference, "test_loss")}
    if device.type == "cuda":
        row |= {"test loss, TF32 from CPU": apart(trained(device, "tf32"), reference, "test_loss")}
    return row


def timing(case: Case, stack: int, precision: str, device: torch.device, **values: Any) -> Row:
    """Milliseconds of an optimizer step and of an evaluation's batch, share of computing, GB of memory."""
    values = {"train_images": STEPS * values["batch_size"], "precision": precision} | values
    configs, begins, ends = stack_of(case, stack, **values), list[float](), list[float]()
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)

    def on_step() -> None:
        if cuda:
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())
        if cuda and len(ends) == STEPS - PROFILED_STEPS:
            profiler.start()
        begins.append(time.perf_counter())

    members = make_training(configs, device).run(on_step=on_step)
    row: Row = {"task": case[0], "model": case[1], "stack": stack, "precision": precision}
    spans = [end - begin for begin, end in zip(begins, ends[1:], strict=False)]
    if len(spans) < STEPS - 1:
        return row
    row["ms"] = 1e3 * statistics.median(spans[WARM_STEPS - 1 : STEPS - PROFILED_STEPS - 1])
    last = [member.rows[-1] for member in members if len(member.rows) == 2]
    row |= {f"{name} steps": _mean(h[f"{name}_steps"] for h in last) for name in ("forward", "backward")}
    if cuda:
        profiler.stop()
        computed = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6
        row["GPU computes"] = computed / sum(spans[-PROFILED_STEPS:])
        row["GB"] = torch.cuda.max_memory_allocated(device) / 1e9
    return row


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean([*values] or [float("nan")])


def hours(rows: Iterable[Row]) -> float:
    """Of the `paper` grid, in stacks as these, an evaluation's batch taken for half a training step."""
    whole = 0.0
    for row in rows:
        config = RunConfig(task=row["task"], model=row["model"])
        batches = (config.epochs + 1) * config.test_images / config.batch_size
        runs = len(grid("paper", task=row["task"], model=row["model"]))
        whole += row["ms"] / 3.6e6 * (total_steps(config) + batches / 2) * runs / row["stack"]
    return whole


def table(rows: Sequence[Row]) -> bytes:
    """As CSV, with three digits."""
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(
        {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in row.items()}
        for row in rows
    )
    return text.getvalue().encode()


class _Over(BaseException):
    """The time is over; what was trained is kept as when a training is stopped."""


def sweep(profile: str, minutes: float, device: torch.device, out: Path) -> str:
    """Train runs of a grid for some minutes, one stack after the other, and pack those that ended."""
    configs, until = grid(profile), time.monotonic() + 60 * minutes
    if not has_data():
        raise data.DataError(f"{data.DATA / 'MNIST' / 'raw'} is not there: a sweep needs it brought along")
    results = out / "store"

    def report(steps: int, ended: tuple[str, ...]) -> None:
        if time.monotonic() > until:
            raise _Over

    try:
        for stack in stacks([config for config in configs if not is_stored(config, results)], device):
            train_stack(stack, results, report)
    except _Over:
        pass
    path = out / f"{profile}.zip"
    count = pack(path, configs, results)
    how = f'make sweep PROFILE={profile} ARGS="--take {path}"'
    return f"{count} of {len(configs)} runs of {profile} are trained: {how}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS / "bench", help="folder of the tables")
    parser.add_argument("--stacks", type=int, nargs="+", default=[1, 8, 90], help="sizes that are timed")
    parser.add_argument("--size", type=int, default=28, help="side of the images")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=7.0, help="of measuring, at most")
    parser.add_argument("--sweep", type=float, default=0.0, metavar="MINUTES", help="of training behind it")
    parser.add_argument("--profile", default="quick", help="whose grid is trained")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("device: got 'cuda', allowed: cpu, for torch sees no GPU here", file=sys.stderr)
        return 2
    with patch.object(build, "load_images", some_images):
        measure(options, device)
    try:
        if options.sweep > 0:
            print(sweep(options.profile, options.sweep, device, options.out))
    except (ConfigError, data.DataError) as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 1
    return 0


def measure(options: argparse.Namespace, device: torch.device) -> None:
    """Print and write both tables, of as many cases as there is time for."""
    until = time.monotonic() + 60 * options.minutes
    values = {"size": options.size, "batch_size": options.batch}
    largest, precisions = max(options.stacks), ["float32"] + ["tf32"] * (device.type == "cuda")
    todo = [(case, largest, precision) for precision in precisions for case in CASES]
    todo += [(case, stack, "float32") for stack in options.stacks if stack != largest for case in CASES]
    agreed, timed = list[Row](), list[Row]()
    for case, stack, precision in todo:
        if time.monotonic() < until:
            timed.append(timing(case, stack, precision, device, **values))
            print(timed[-1], flush=True)
    for case in CASES:
        if time.monotonic() < until:
            agreed.append(agreement(case, device, **values))
            print(agreed[-1], flush=True)
    left = len(todo) + len(CASES) - len(timed) - len(agreed)
    said: Row = {"images": f"{options.size}x{options.size}, batch {options.batch}", "left out": left}
    for precision in precisions:
        rows = [
            row for row in timed if (row["stack"], row["precision"]) == (largest, precision) and "ms" in row
        ]
        as_in_paper = (options.size, options.batch) == (MNIST_SIDE, RunConfig().batch_size)
        if as_in_paper and len(rows) == len(CASES) and all("ms" in row for row in rows):
            said[f"hours of paper, {precision}"] = round(hours(rows), 2)
    print(said)
    named = [{"device": _name(device), "method": METHOD_VERSION} | row for row in timed]
    files = {"stacks_gpu.csv": table(named), "agreement_gpu.csv": table(agreed)}
    for path in write_with_provenance(options.out, files, said, "stacks_gpu_provenance.json", device):
        print(path)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    sys.exit(main())
