"""A sweep to walk through: everything about one selection of its parameters in one picture.

`python -m lib.pages.explore collect --profile quick` takes the tables and some reconstructions of a trained
sweep out of the store of runs; the explorer then needs neither runs nor data.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Image
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lib.experiments.config import ConfigError, RunConfig, parse_parameters, require_name, shown
from lib.experiments.data import DataError
from lib.experiments.problem import load_images, make_operator, observe, test_noise
from lib.experiments.profiles import SWEEPS, grid
from lib.experiments.provenance import PROVENANCE, read_described, write_with_provenance
from lib.experiments.runs import Run, get_run
from lib.experiments.store import RESULTS, DamagedFile
from lib.experiments.sweep import NOT_RUN, Sweep, load_sweep
from lib.experiments.trainer import COMPLETED
from lib.figures.comparison import PAIRED
from lib.figures.grid import draw_histories, draw_solver_steps
from lib.figures.reconstructions import keeps_loss, reconstruct
from lib.figures.style import MODEL_NAMES, STYLE, TEXT_WIDTH, budget, note

Pixels = NDArray[np.uint8]

AXES = ("task", "noise", "sigma", "gamma", "tau")
"""What is chosen from, beside whatever else a sweep varies."""

OBSERVED_BY = ("task", "noise", "seed", "test_images")
"""Runs that agree in these have the same data `f`."""

DIGITS = 4

IMAGES = "reconstructions.npz"
FILES = ("runs.parquet", "epochs.parquet", IMAGES)

HISTORY = ["key", "epoch", "seconds", "test_loss", "test_psnr", "forward_steps", "backward_steps"]
HISTORY += ["forward_unconverged", "backward_unconverged", "test_unconverged"]
"""What is kept of each epoch."""


@dataclass(frozen=True)
class Table:
    """A sweep's tables and the first test images as its runs reconstruct them.

    Images are `(N, H, W)` of bytes, 0 for -1 and 255 for 1.

    Attributes:
        sweep: its tables; of the epochs the columns `HISTORY`.
        truth: `u`.
        inputs: `f = K u + noise` of each run, by its key.
        outputs: the fixed point `u*` of each run that completed, by its key.
    """

    sweep: Sweep
    truth: Pixels
    inputs: dict[str, Pixels]
    outputs: dict[str, Pixels]

    def axes(self) -> dict[str, list[Any]]:
        """What can be chosen: the levels of `AXES`, and of whatever else varies in a task."""
        runs = self.sweep.runs
        within = runs.groupby("task")[list(PAIRED)].nunique().max()
        others = [name for name in PAIRED if name not in AXES and within[name] > 1]
        levels = {name: runs[name].unique().tolist() for name in (*AXES, *others)}
        return {name: v if isinstance(v[0], str) else sorted(v) for name, v in levels.items()}

    def select(self, **values: Any) -> dict[str, Any]:
        """A level of every axis: the given ones, and the first one where None or nothing is given.

        Raises:
            ConfigError: there is no such axis, or it has no such level.
        """
        axes = self.axes()
        for name, value in values.items():
            if name not in axes:
                raise ConfigError(f"{name}: no such parameter, allowed: {', '.join(axes)}")
            if value is not None and value not in axes[name]:
                levels = ", ".join(str(level) for level in axes[name])
                raise ConfigError(f"{name}: got {shown(value)}, allowed: {levels}")
        chosen = {name: value for name, value in values.items() if value is not None}
        return {name: chosen.get(name, levels[0]) for name, levels in axes.items()}

    def pair(self, **values: Any) -> pd.DataFrame:
        """The rows of both models with a selection, as far as they are there.

        Raises:
            ConfigError: as `select`.
        """
        runs, selection = self.sweep.runs, self.select(**values)
        chosen = runs[(runs[list(selection)] == pd.Series(selection)).all(axis="columns")]
        return chosen.sort_values("model")


def table_folder(profile: str, results: Path | str | None = None) -> Path:
    """Where a profile's table is: that of the default profile is committed."""
    return Path(results or RESULTS) / ("reference" if profile == "quick" else profile) / "sweep"


def collect(profile: str, /, results: Path | str | None = None, **values: Any) -> Path:
    """Make a profile's table from the stored runs; only one whose weights are damaged is trained anew.

    Each run that completed reconstructs the whole test set, and its loss is compared with the stored one.

    Args:
        profile: name of the profile.
        results: folder of the results, with the runs in `runs/`; the repository's when None.
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
        raise DataError(
            f"no run of the profile {profile} is stored; `make sweep PROFILE={profile}` trains them"
        )
    table = _with_images(sweep, configs, results)
    folder = table_folder(profile, results)
    write_table(table, folder)
    return folder


def _with_images(sweep: Sweep, configs: list[RunConfig], results: Path | str | None) -> Table:
    inputs: dict[str, Pixels] = {}
    outputs: dict[str, Pixels] = {}
    by_key = dict(zip(sweep.runs["key"], configs, strict=True))
    truth = load_images(configs[0])["test"]
    for _, group in tqdm(sweep.runs.groupby(list(OBSERVED_BY)), desc="reconstructions", leave=False):
        config = by_key[group["key"].iloc[0]]
        images = load_images(config)["test"]
        f = observe(make_operator(config), images, torch.tensor(config.noise), test_noise(config))
        inputs |= dict.fromkeys(group["key"], _bytes(f[:DIGITS, 0]))
        completed = group[group["status"] == COMPLETED]
        if completed.empty:
            continue
        result = reconstruct({key: get_run(by_key[key], results) for key in completed["key"]})
        for row in completed.to_dict("records"):
            key, loss = row["key"], row["test_loss"]
            if not keeps_loss(result, key, loss, row["test_unconverged"]):
                mse = result.table.mse[key]
                raise RuntimeError(f"run {key}: its weights give the test loss {mse}, stored is {loss}")
            outputs[key] = _bytes(result.outputs[key][:DIGITS])
    return Table(sweep, _bytes(truth[:DIGITS, 0]), inputs, outputs)


def _bytes(images: Tensor) -> Pixels:
    pixels: Pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
    return pixels


def write_table(table: Table, folder: Path) -> None:
    """Write a table's files, and where they come from beside them, to a folder."""
    runs = table.sweep.runs
    completed = runs.loc[runs["status"] == COMPLETED, "key"]
    arrays = {
        "truth": table.truth,
        "inputs": np.stack([table.inputs[key] for key in runs["key"]]),
        "outputs": np.array([table.outputs[key] for key in completed], np.uint8),
    }
    kept = ["key", *RunConfig.model_fields, "status", "reason", "epochs_finished", "test_loss", "test_psnr"]
    frames = {
        "runs.parquet": runs[[*kept, "seconds"]],
        "epochs.parquet": table.sweep.epochs.reindex(columns=HISTORY),
    }
    files = {name: frame.to_parquet(index=False, compression="zstd") for name, frame in frames.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_with_provenance(folder, files | {IMAGES: buffer.getvalue()}, table.sweep.provenance)


def load(profile: str = "quick", results: Path | str | None = None) -> Table:
    """A profile's table.

    Args:
        profile: name of the profile.
        results: folder of the results; the repository's when None.

    Raises:
        ConfigError: the profile is unknown.
        DataError: its table is not there.
        DamagedFile: a file is not what `collect` wrote.
    """
    require_name("profile", profile, SWEEPS)
    folder = table_folder(profile, results)
    try:
        provenance = json.loads((folder / PROVENANCE).read_bytes())
        files = {name: io.BytesIO(read_described(folder / name, provenance)) for name in FILES}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{error.filename} is missing; `python -m lib.pages.explore collect --profile {profile}` makes "
            "it from a trained sweep"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedFile(f"{folder / PROVENANCE}: it does not list the table's checksums") from None
    runs, epochs = (pd.read_parquet(files[name]) for name in FILES[:2])
    arrays = np.load(files[IMAGES], allow_pickle=False)
    completed = runs.loc[runs["status"] == COMPLETED, "key"]
    return Table(
        sweep=Sweep(profile, runs, epochs, provenance),
        truth=arrays["truth"],
        inputs=dict(zip(runs["key"], arrays["inputs"], strict=True)),
        outputs=dict(zip(completed, arrays["outputs"], strict=True)),
    )


def panel(table: Table, **selection: Any) -> Figure:
    """All about one selection: test losses, solver steps, and test digits as both models reconstruct them.

    The figure is none of pyplot's: nothing has to close it, and a notebook does not show it unasked.

    Args:
        table: where it comes from.
        selection: levels of the table's axes; the first one of an axis that is left out or None.

    Raises:
        ConfigError: there is no such axis, or it has no such level.
    """
    rows = table.pair(**selection)
    epochs = table.sweep.epochs.merge(rows[["key", "model"]], on="key")
    first = rows.iloc[0].to_dict()
    config = RunConfig(**{name: first[name] for name in RunConfig.model_fields})
    with plt.rc_context(STYLE):
        fig = Figure(figsize=(TEXT_WIDTH, 3.6))
        place: Any = {"top": 0.97, "bottom": 0.18}
        left = fig.add_gridspec(2, 1, left=0.115, right=0.47, hspace=0.1, **place)
        losses, steps = left.subplots(squeeze=False, sharex=True)[:, 0]
        draw_histories(losses, rows, epochs)
        losses.set(ylabel="test loss")
        losses.legend(losses.lines, [_ending(row) for _, row in rows.iterrows()], frameon=False)
        draw_solver_steps(steps, epochs[epochs["epoch"] > 0])
        # On one scale whatever the selection, so that two pictures can be compared.
        steps.set(ylabel="solver steps", yscale="log", ylim=(1, 1.8 * config.max_steps))
        steps.set_xlim(-0.05 * config.epochs, 1.05 * config.epochs)
        steps.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        steps.axhline(config.max_steps, color="0.6", linewidth=0.8, zorder=0)
        steps.legend(frameon=False, ncols=2, loc="lower right")
        fig.align_ylabels([losses, steps])
        strips = [("truth", table.truth, ""), ("input", table.inputs[first["key"]], "")]
        for _, row in rows.iterrows():
            said = f"{row['status']}: {row['reason']}" if row["reason"] else row["status"]
            strips.append((MODEL_NAMES[row["model"]], table.outputs.get(row["key"], table.truth), said))
        right = fig.add_gridspec(len(strips), 1, left=0.545, right=0.995, hspace=0.05, **place)
        for axes, (name, images, said) in zip(right.subplots(squeeze=False)[:, 0], strips, strict=True):
            axes.set(xticks=[], yticks=[])
            axes.set_ylabel(name, rotation=0, ha="right", va="center")
            strip = axes.imshow(np.concatenate(list(images), axis=-1), cmap="gray", vmin=0, vmax=255)
            if said not in ("", COMPLETED):
                strip.remove()
                place = {"ha": "center", "va": "center", "transform": axes.transAxes}
                axes.text(0.5, 0.5, textwrap.fill(said, 40), **place)
        note(fig, budget(Run(first["key"], config, first["status"], "", epochs, {}, {}), table.sweep.profile))
    return fig


def _ending(row: pd.Series) -> str:
    last = f"{row['test_loss']:.4f} ({row['test_psnr']:.1f} dB)"
    return f"{MODEL_NAMES[row['model']]}: {last if row['status'] == COMPLETED else row['status']}"


def picture(table: Table, **selection: Any) -> bytes:
    """The `panel` of a selection as PNG, for screens."""
    fig = panel(table, **selection)
    buffer = io.BytesIO()
    with plt.rc_context(STYLE):
        fig.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def explorer(table: Table, **selection: Any) -> widgets.interactive:
    """Controls for every axis of a table, over the `panel` of what they select.

    Args:
        table: where it comes from.
        selection: what is selected first; see `panel`.

    Raises:
        ConfigError: there is no such axis, or it has no such level.
    """
    first = table.select(**selection)
    controls = {name: _control(name, levels, first[name]) for name, levels in table.axes().items()}
    return widgets.interactive(lambda **chosen: Image(picture(table, **chosen), width=900), **controls)


def _control(name: str, levels: list[Any], value: Any) -> widgets.Widget:
    """A menu of words or a slider over numbers, which waits until it is let go."""
    settings = {"options": levels, "value": value, "description": name}
    if isinstance(value, str):
        return widgets.Dropdown(**settings)
    return widgets.SelectionSlider(**settings, continuous_update=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.pages.explore", description=__doc__)
    parser.add_argument("command", choices=["collect"])
    parser.add_argument("--profile", default="quick")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    options = parser.parse_args(arguments)
    try:
        folder = collect(options.profile, **parse_parameters(options.p))
        statuses = load(options.profile).sweep.provenance["statuses"]
    except (ConfigError, RuntimeError) as error:
        print(f"explore: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print(f"{folder}: {', '.join(f'{count} {status}' for status, count in statuses.items())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
