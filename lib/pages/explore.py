"""A sweep to walk through: everything about one selection of its parameters in one picture.

`python -m lib.pages.explore collect --profile quick` takes the tables and some reconstructions of a trained
sweep out of the store of runs; the explorer then needs neither runs nor data.
"""

from __future__ import annotations

import argparse
import io
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Image
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from lib.experiments.build import load_images, make_operator, test_noise
from lib.experiments.config import ConfigError, RunConfig, parse_parameters, shown
from lib.experiments.data import DataError
from lib.experiments.profiles import grid
from lib.experiments.provenance import write_with_provenance
from lib.experiments.records import Run
from lib.experiments.runs import get_run
from lib.experiments.store import Results
from lib.experiments.sweep import NOT_RUN, TABLES, Sweep, load_sweep, load_table, row_config, table_folder
from lib.figures.comparison import PAIRED
from lib.figures.grid import draw_histories, draw_solver_steps
from lib.figures.reconstructions import keeps_loss, reconstruct
from lib.figures.style import MODEL_NAMES, STYLE, TEXT_WIDTH, budget, note
from lib.training import COMPLETED, observe

AXES = ("task", "noise", "sigma", "gamma", "tau")
"""What is chosen from, beside whatever else a sweep varies."""

OBSERVED_BY = ("task", "noise", "seed", "test_images")
"""Runs that agree in these have the same data `f`."""

DIGITS = 4

KEPT = ["key", *RunConfig.model_fields, "status", "reason", "epochs_finished", "test_loss", "test_psnr"]
KEPT += ["seconds"]
"""What is kept of each run, beside the first test images: `truth`, `input` (`f`) and `output` (`u*`; None
where the run did not complete), as the bytes of a strip of `DIGITS`, row by row, 0 for -1 and 255 for 1."""

HISTORY = ["key", "epoch", "seconds", "test_loss", "test_psnr", "forward_steps", "backward_steps"]
HISTORY += ["forward_unconverged", "backward_unconverged", "test_unconverged"]
"""What is kept of each epoch."""


def collect(profile: str, /, results: Results = None, **values: Any) -> Path:
    """Make a profile's table from the stored runs; only one whose weights are damaged is trained anew.

    Each run that completed reconstructs the whole test set, and its loss is compared with the stored one.

    Args:
        profile: name of the profile.
        values: parameters and axes that replace the profile's (see `lib.experiments.profiles.grid`).

    Returns:
        The folder with the table.

    Raises:
        ConfigError: a value is refused.
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
    """The first images `(N, H, W)` beside each other."""
    strip = torch.cat(list(images[:DIGITS]), dim=-1).clamp(-1, 1)
    return ((strip + 1) * 127.5).round().to(torch.uint8).numpy().tobytes()


def write_table(table: Sweep, results: Results = None) -> None:
    """Write a sweep's tables, with the images of its runs, and where they come from beside them."""
    frames = (table.runs[[*KEPT, "truth", "input", "output"]], table.epochs.reindex(columns=HISTORY))
    contents = [frame.to_parquet(index=False, compression="zstd") for frame in frames]
    folder = table_folder(table.profile, results)
    write_with_provenance(folder, dict(zip(TABLES, contents, strict=True)), table.provenance)


def axes(table: Sweep) -> dict[str, list[Any]]:
    """What can be chosen: the levels of `AXES`, and of whatever else varies in a task."""
    within = table.runs.groupby("task")[list(PAIRED)].nunique().max()
    names = dict.fromkeys([*AXES, *(name for name in PAIRED if within[name] > 1)])
    levels = {name: table.runs[name].unique().tolist() for name in names}
    return {name: v if isinstance(v[0], str) else sorted(v) for name, v in levels.items()}


def select(table: Sweep, **values: Any) -> dict[str, Any]:
    """A level of every axis: the given ones, and the first one where None or nothing is given.

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


def panel(table: Sweep, **selection: Any) -> Figure:
    """All about one selection: test losses, solver steps, and test digits as both models reconstruct them.

    The figure is none of pyplot's: nothing has to close it, and a notebook does not show it unasked.

    Args:
        table: where it comes from, as it was loaded.
        selection: levels of the table's axes; the first one of an axis that is left out or None.

    Raises:
        ConfigError: there is no such axis, or it has no such level.
    """
    chosen = pd.Series(select(table, **selection))
    rows = table.runs[(table.runs[chosen.index] == chosen).all(axis="columns")].sort_values("model")
    epochs = table.epochs.merge(rows[["key", "model"]], on="key")
    first = rows.iloc[0].to_dict()
    config = row_config(first)
    with plt.rc_context(STYLE):
        fig = Figure(figsize=(TEXT_WIDTH, 3.6))
        place: Any = {"top": 0.97, "bottom": 0.18}
        left = fig.add_gridspec(2, 1, left=0.115, right=0.47, hspace=0.1, **place)
        losses, steps = left.subplots(squeeze=False, sharex=True)[:, 0]
        draw_histories(losses, rows, epochs)
        losses.set(ylabel="test loss")
        losses.legend(losses.lines, [_ending(row) for _, row in rows.iterrows()], frameon=False)
        draw_solver_steps(steps, epochs[epochs["epoch"] > 0])
        # On one scale whatever the selection, so that two pictures can be compared; below 1 is the legend.
        steps.set(ylabel="solver steps", yscale="log", ylim=(0.15, 1.8 * config.max_steps))
        steps.set_xlim(-0.05 * config.epochs, 1.05 * config.epochs)
        steps.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        steps.axhline(config.max_steps, color="0.6", linewidth=0.8, zorder=0)
        steps.legend(frameon=False, ncols=2, loc="lower right")
        fig.align_ylabels([losses, steps])
        strips = [("truth", first["truth"], ""), ("input", first["input"], "")]
        for _, row in rows.iterrows():
            said = ": ".join(filter(None, (row["status"], row["reason"])))
            strips.append((MODEL_NAMES[row["model"]], row["output"], said))
        right = fig.add_gridspec(len(strips), 1, left=0.545, right=0.995, hspace=0.05, **place)
        for ax, (name, strip, said) in zip(right.subplots(squeeze=False)[:, 0], strips, strict=True):
            ax.set(xticks=[], yticks=[])
            ax.set_ylabel(name, rotation=0, ha="right", va="center")
            pixels = np.frombuffer(strip or first["truth"], np.uint8).reshape(config.size, -1)
            image = ax.imshow(pixels, cmap="gray", vmin=0, vmax=255)
            if strip is None:
                # It has given its axes their shape.
                image.remove()
                ax.text(0.5, 0.5, textwrap.fill(said, 40), ha="center", va="center", transform=ax.transAxes)
        note(fig, budget(Run(first["key"], config, first["status"], "", epochs, {}, {}), table.profile))
    return fig


def _ending(row: pd.Series) -> str:
    last = f"{row['test_loss']:.4f} ({row['test_psnr']:.1f} dB)"
    return f"{MODEL_NAMES[row['model']]}: {last if row['status'] == COMPLETED else row['status']}"


def picture(table: Sweep, **selection: Any) -> bytes:
    """The `panel` of a selection as PNG, for screens."""
    buffer = io.BytesIO()
    with plt.rc_context(STYLE):
        panel(table, **selection).savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def explorer(table: Sweep, **selection: Any) -> widgets.interactive:
    """Controls for every axis of a table, over the `panel` of what they select.

    Words have a menu, numbers a slider, which waits until it is let go.

    Args:
        table, selection: see `panel`; the selection is the first one.

    Raises:
        ConfigError: there is no such axis, or it has no such level.
    """
    first, slider = select(table, **selection), partial(widgets.SelectionSlider, continuous_update=False)
    controls = {}
    for name, levels in axes(table).items():
        control = widgets.Dropdown if isinstance(levels[0], str) else slider
        controls[name] = control(options=levels, value=first[name], description=name)
    return widgets.interactive(lambda **chosen: Image(picture(table, **chosen), width=900), **controls)


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
