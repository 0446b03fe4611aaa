"""The explorer's table: a trained sweep with some reconstructions, without runs and data.

`python -m lib.pages.explore collect --profile quick` makes it from the stored runs, and `nbs/explore.ipynb`
shows it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from lib.experiments.build import load_images, make_operator, test_noise
from lib.experiments.config import ConfigError, RunConfig, parse_parameters, shown
from lib.experiments.data import DataError
from lib.experiments.profiles import grid
from lib.experiments.provenance import write_with_provenance
from lib.experiments.runs import get_run
from lib.experiments.store import Results
from lib.experiments.sweep import NOT_RUN, TABLES, Sweep, load_sweep, load_table, table_folder
from lib.figures.comparison import PAIRED
from lib.figures.reconstructions import keeps_loss, reconstruct
from lib.training import COMPLETED, observe

AXES = ("task", "noise", "sigma", "gamma", "tau")
"""Parameters to choose from, besides others that a sweep varies."""

OBSERVED_BY = ("task", "noise", "seed", "test_images")
"""Runs with the same values of these parameters share their data `f`."""

DIGITS = 4

KEPT = ["key", *RunConfig.model_fields, "status", "reason", "epochs_finished", "test_loss", "test_psnr"]
KEPT += ["seconds"]
"""Columns of a run in the table, besides the first test images: `truth`, `input` (`f`) and `output` (`u*`;
None if the run did not complete), each a strip of `DIGITS` in bytes, row by row, 0 for -1 and 255 for 1."""

HISTORY = ["key", "epoch", "seconds", "test_loss", "test_psnr", "forward_steps", "backward_steps"]
HISTORY += ["forward_unconverged", "backward_unconverged", "test_unconverged"]
"""Columns of an epoch in the table."""


def collect(profile: str, /, results: Results = None, **values: Any) -> Path:
    """Make a profile's table from the stored runs; a run with damaged weights is trained again.

    Each completed run reconstructs the test set, and its loss is compared with the stored one.

    Args:
        profile: name of the profile.
        values: replace the profile's parameters and axes (see `lib.experiments.profiles.grid`).

    Returns:
        The folder with the table.

    Raises:
        ConfigError: a value is invalid.
        DataError: no run is stored.
        RuntimeError: a run's weights do not give its test loss.
    """
    configs = grid(profile, **values)
    sizes = sorted({config.size for config in configs})
    if len(sizes) > 1:
        raise ConfigError(f"size: got {sizes}, allowed: one size for all images of a table")
    sweep = load_sweep(profile, configs, results)
    if (sweep.runs["status"] == NOT_RUN).all():
        raise DataError(f"no {profile} run is stored; `make sweep PROFILE={profile}` trains them")
    by_key = dict(zip(sweep.runs["key"], configs, strict=True))
    images = []
    for _, group in tqdm(sweep.runs.groupby(list(OBSERVED_BY)), desc="reconstructions", leave=False):
        config = by_key[group["key"].iloc[0]]
        truth = load_images(config)["test"]
        f = observe(make_operator(config), truth, torch.tensor(config.noise), test_noise(config))
        completed = group[group["status"] == COMPLETED]
        runs = {key: get_run(by_key[key], results) for key in completed["key"]}
        result = reconstruct(runs) if runs else None
        for row in completed.to_dict("records"):
            key, loss = row["key"], row["test_loss"]
            if result and not keeps_loss(result, key, loss, row["test_unconverged"]):
                mse = result.table.mse[key]
                raise RuntimeError(f"run {key}: its weights give the test loss {mse}, stored is {loss}")
        for key in group["key"]:
            output = _strip(result.outputs[key]) if result and key in runs else None
            images.append((key, _strip(truth[:, 0]), _strip(f[:, 0]), output))
    strips = pd.DataFrame(images, columns=["key", "truth", "input", "output"])
    write_table(Sweep(profile, sweep.runs.merge(strips), sweep.epochs, sweep.provenance), results)
    return table_folder(profile, results)


def _strip(images: Tensor) -> bytes:
    """Return the first images `(N, H, W)` side by side as bytes."""
    strip = torch.cat(list(images[:DIGITS]), dim=-1).clamp(-1, 1)
    return ((strip + 1) * 127.5).round().to(torch.uint8).numpy().tobytes()


def write_table(table: Sweep, results: Results = None) -> None:
    """Write a sweep's tables, the images of its runs and their provenance."""
    frames = (table.runs[[*KEPT, "truth", "input", "output"]], table.epochs.reindex(columns=HISTORY))
    contents = [frame.to_parquet(index=False, compression="zstd") for frame in frames]
    folder = table_folder(table.profile, results)
    write_with_provenance(folder, dict(zip(TABLES, contents, strict=True)), table.provenance)


def axes(table: Sweep) -> dict[str, list[Any]]:
    """Return the levels of `AXES` and of all other parameters that vary within a task."""
    within = table.runs.groupby("task")[list(PAIRED)].nunique().max()
    names = dict.fromkeys([*AXES, *(name for name in PAIRED if within[name] > 1)])
    levels = {name: table.runs[name].unique().tolist() for name in names}
    return {name: v if isinstance(v[0], str) else sorted(v) for name, v in levels.items()}


def select(table: Sweep, **values: Any) -> dict[str, Any]:
    """Return a level of every axis: the requested one, or the first one if that is None or absent.

    Raises:
        ConfigError: there is no such axis, or it has no such level.
    """
    known = axes(table)
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"{name}: no such parameter, allowed: {', '.join(known)}")
        if value is not None and value not in known[name]:
            raise ConfigError(f"{name}: got {shown(value)}, allowed: {', '.join(map(str, known[name]))}")
    return {name: own[0] if values.get(name) is None else values[name] for name, own in known.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.pages.explore", description=__doc__)
    parser.add_argument("command", choices=["collect"])
    parser.add_argument("--profile", default="quick")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    options = parser.parse_args(arguments)
    try:
        folder = collect(options.profile, **parse_parameters(options.p))
        statuses = load_table(options.profile).provenance["statuses"]
    except (ConfigError, RuntimeError) as error:
        print(f"explore: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(f"{folder}: {', '.join(f'{count} {status}' for status, count in statuses.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
