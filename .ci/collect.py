"""Write the explorer's table: a trained sweep with some reconstructions, for use without runs and data.

`python .ci/collect.py --profile quick` makes the table from the stored runs, else from the committed table;
`nbs/explore.ipynb` shows it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lib.experiments.build import solve
from lib.experiments.command import Parser, command
from lib.experiments.config import parse_parameters
from lib.experiments.data import DataError
from lib.experiments.profiles import grid
from lib.experiments.provenance import write_with_provenance
from lib.experiments.records import read_record
from lib.experiments.runs import get_run
from lib.experiments.store import Results
from lib.experiments.sweep import NOT_RUN, TABLES, load_sweep, load_table, table_folder
from lib.figures.reconstructions import test_data
from lib.training import COMPLETED

OBSERVED_BY = ["task", "noise", "seed", "size", "test_images"]
"""Runs with the same values of these parameters share their data `f`."""

DIGITS, GREYS = 4, 32
"""Number of test images per run, and number of grey levels. `truth`, `input` (`f`) and `output` (`u*`, None
if the run did not complete) are strips of them in bytes, row by row, 0 for -1 and 255 for 1."""


def collect(profile: str, /, results: Results = None, **values: Any) -> Path:
    """Write a profile's table from the stored and committed runs; damaged weights are trained again.

    Args:
        profile: name of the profile.
        values: parameters and axes that override the profile's (see `lib.experiments.profiles.grid`).

    Returns:
        The folder with the table.

    Raises:
        ConfigError: a value is invalid.
        DataError: no run is stored or committed.
    """
    configs = grid(profile, **values)
    sweep = load_sweep(profile, configs, results, committed=True)
    if (sweep.runs["status"] == NOT_RUN).all():
        raise DataError(f"no {profile} run is stored or committed; run `make sweep PROFILE={profile}`")
    by_key = dict(zip(sweep.runs["key"], configs, strict=True))
    stored = {key for key, config in by_key.items() if read_record(config, results)}
    borrowed = (sweep.runs["status"] != NOT_RUN) & ~sweep.runs["key"].isin(stored)
    shown = load_table(profile).runs.set_index("key")["output"] if borrowed.any() else {}
    strips = []
    for _, group in tqdm(sweep.runs.groupby(OBSERVED_BY), desc="reconstructions", leave=False):
        config = by_key[group["key"].iloc[0]]
        truth, f = (images[:DIGITS] for images in test_data(config))
        for key, state in zip(group["key"], group["status"], strict=True):
            output = None if key in stored else shown.get(key)
            if key in stored and state == COMPLETED:
                run = get_run(by_key[key], results)
                with torch.no_grad():
                    output = _strip(solve(run.model(), f, run.config).value)
            strips.append((key, _strip(truth), _strip(f), output))
    shown_digits = pd.DataFrame(strips, columns=["key", "truth", "input", "output"])
    frames = (sweep.runs.merge(shown_digits), sweep.epochs)
    contents = [frame.to_parquet(index=False, compression="zstd") for frame in frames]
    folder = table_folder(profile, results)
    write_with_provenance(folder, dict(zip(TABLES, contents, strict=True)), sweep.provenance)
    return folder


def _strip(images: Tensor) -> bytes:
    """Return images `(N, 1, H, W)` side by side as bytes."""
    strip = torch.cat(list(images[:, 0]), dim=-1).clamp(-1, 1)
    levels = ((strip + 1) / 2 * (GREYS - 1)).round() / (GREYS - 1)
    return (levels * 255).round().to(torch.uint8).numpy().tobytes()


@command
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--profile", default="quick")
    options = parser.parse(arguments, "-p")
    print(collect(options.profile, **parse_parameters(options.p)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
