"""A sweep to walk through: everything about one selection of its parameters in one picture.

`python -m lib.pages.explore collect --profile quick` takes the tables and some reconstructions of a trained
sweep out of the store of runs; the explorer then needs neither runs nor data.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from lib.experiments.config import ConfigError, RunConfig, parse_parameters, shown
from lib.experiments.data import DataError
from lib.experiments.problem import load_images, make_operator, observe, test_noise
from lib.experiments.profiles import SWEEPS, grid
from lib.experiments.runs import Run, default_device, environment, get_run
from lib.experiments.store import RESULTS, DamagedFile, write_atomic
from lib.experiments.sweep import NOT_RUN, Sweep, load_sweep
from lib.experiments.trainer import COMPLETED
from lib.figures.comparison import PAIRED
from lib.figures.reconstructions import reconstruct
from lib.figures.style import MODEL_COLORS, MODEL_LINES, MODEL_NAMES, STYLE, TEXT_WIDTH, budget, note
from lib.models import MODELS

Pixels = NDArray[np.uint8]

AXES = ("task", "noise", "sigma", "gamma", "tau")
"""What is chosen from, beside whatever else a sweep varies."""

OBSERVED_BY = ("task", "noise", "seed", "test_images")
"""Runs that agree in these have the same data `f`."""

DIGITS = 4

FILES = ("runs.parquet", "epochs.parquet", "reconstructions.npz")

HISTORY = ["key", "epoch", "seconds", "test_loss", "test_psnr", "forward_steps", "backward_steps"]
"""What is kept of each epoch."""

DIRECTION_LINES: dict[str, Any] = {"forward": "-", "backward": ":"}
LABEL = (-0.225, 0.5)
"""Place of the vertical axes' labels, in parts of the axes."""


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

    def pair(self, **values: Any) -> dict[str, Run]:
        """The runs of each model with a selection, without their weights.

        Raises:
            ConfigError: as `select`.
        """
        runs, epochs = self.sweep.runs, self.sweep.epochs
        selection = self.select(**values)
        chosen = runs[(runs[list(selection)] == pd.Series(selection)).all(axis="columns")]
        rows = {row["model"]: row for row in chosen.to_dict("records")}
        return {
            model: Run(
                key=rows[model]["key"],
                config=RunConfig(**{name: rows[model][name] for name in RunConfig.model_fields}),
                status=rows[model]["status"],
                reason=rows[model]["reason"],
                history=epochs[epochs["key"] == rows[model]["key"]].drop(columns="key"),
                weights={},
                provenance={},
            )
            for model in MODELS
            if model in rows
        }


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
        for key, stored in zip(completed["key"], completed["test_loss"], strict=True):
            mse = result.table.mse[key]
            if abs(mse - stored) > 1e-6 * stored:
                raise RuntimeError(f"run {key}: its weights give the test loss {mse}, stored is {stored}")
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
    frames = {"runs.parquet": runs[[*kept, "seconds"]], "epochs.parquet": table.sweep.epochs[HISTORY]}
    files = {}
    for name, frame in frames.items():
        buffer = io.BytesIO()
        frame.to_parquet(buffer, index=False, compression="zstd")
        files[name] = buffer.getvalue()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    files["reconstructions.npz"] = buffer.getvalue()
    provenance = table.sweep.provenance | {
        "environment": environment(default_device()),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    files["provenance.json"] = json.dumps(provenance, indent=1, default=float).encode()
    for name, content in files.items():
        write_atomic(folder / name, content)


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
    if profile not in SWEEPS:
        raise ConfigError(f"profile: got {shown(profile)}, allowed: {', '.join(SWEEPS)}")
    folder = table_folder(profile, results)
    try:
        provenance = json.loads((folder / "provenance.json").read_bytes())
        contents = {}
        for name in FILES:
            content = (folder / name).read_bytes()
            if hashlib.sha256(content).hexdigest() != provenance["sha256"][name]:
                raise DamagedFile(f"{folder / name}: its content does not match its checksum")
            contents[name] = io.BytesIO(content)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{error.filename} is missing; `python -m lib.pages.explore collect --profile {profile}` makes "
            "it from a trained sweep"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise DamagedFile(f"{folder / 'provenance.json'}: it does not list the table's checksums") from None
    runs = pd.read_parquet(contents["runs.parquet"])
    epochs = pd.read_parquet(contents["epochs.parquet"])
    arrays = np.load(contents["reconstructions.npz"], allow_pickle=False)
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
    runs = table.pair(**selection)
    run = next(iter(runs.values()))
    with plt.rc_context(STYLE):
        fig = Figure(figsize=(TEXT_WIDTH, 3.6))
        place: dict[str, Any] = {"top": 0.97, "bottom": 0.18}
        left = fig.add_gridspec(2, 1, left=0.115, right=0.47, hspace=0.1, **place)
        losses = fig.add_subplot(left[0])
        _draw_losses(losses, runs)
        losses.tick_params(labelbottom=False)
        _draw_steps(fig.add_subplot(left[1], sharex=losses), runs)
        right = fig.add_gridspec(2 + len(runs), 1, left=0.545, right=0.995, hspace=0.05, **place)
        _draw_images(fig.add_subplot(right[0]), "truth", table.truth)
        _draw_images(fig.add_subplot(right[1]), "input", table.inputs[run.key])
        for row, (model, run) in enumerate(runs.items(), start=2):
            axes = fig.add_subplot(right[row])
            if run.key in table.outputs:
                _draw_images(axes, MODEL_NAMES[model], table.outputs[run.key])
            else:
                _draw_ending(axes, MODEL_NAMES[model], run, table.truth.shape)
        note(fig, budget(run, table.sweep.profile))
    return fig


def _draw_losses(axes: Axes, runs: dict[str, Run]) -> None:
    for model, run in runs.items():
        ending = run.status
        if run.status == COMPLETED:
            last = run.history.iloc[-1]
            ending = f"{last['test_loss']:.4f} ({last['test_psnr']:.1f} dB)"
        line: Any = {"linestyle": MODEL_LINES[model], "label": f"{MODEL_NAMES[model]}: {ending}"}
        axes.plot(run.history["epoch"], run.history["test_loss"], **line, **_line(model))
    axes.set_ylabel("test loss")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    _plain_ticks(axes, LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(4, steps=[1, 2, 5, 10]))
    axes.yaxis.set_label_coords(*LABEL)
    axes.legend(frameon=False)


def _draw_steps(axes: Axes, runs: dict[str, Run]) -> None:
    """Steps of a solve, on one scale whatever the selection, so that two pictures can be compared."""
    limit = max(run.config.max_steps for run in runs.values())
    for model, run in runs.items():
        for direction, linestyle in DIRECTION_LINES.items():
            steps = run.history[f"{direction}_steps"]
            axes.plot(run.history["epoch"], steps, linestyle=linestyle, **_line(model))
    axes.axhline(limit, color="0.6", linewidth=0.8, zorder=0)
    axes.text(
        0.98, limit, f"at most {limit}", transform=axes.get_yaxis_transform(), ha="right", va="bottom", size=7
    )
    axes.set(xlabel="epoch", ylabel="solver steps", yscale="log", ylim=(1, 1.8 * limit))
    _plain_ticks(axes, LogLocator(subs=(1, 2, 5)))
    last = max(run.config.epochs for run in runs.values())
    axes.set_xlim(-0.05 * last, 1.05 * last)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_label_coords(*LABEL)
    lines = [
        Line2D([], [], color="0.3", linestyle=style, label=name) for name, style in DIRECTION_LINES.items()
    ]
    axes.legend(handles=lines, frameon=False, ncols=2, loc="lower right")


def _plain_ticks(axes: Axes, locator: Locator) -> None:
    """Ticks of a logarithmic axis with decimal numbers."""
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")


def _line(model: str) -> dict[str, Any]:
    return {"color": MODEL_COLORS[model], "linewidth": 1.2, "marker": "o", "markersize": 2.5}


def _draw_images(axes: Axes, name: str, images: Pixels) -> None:
    """Images `(N, H, W)` in a row."""
    strip = np.concatenate(list(images), axis=-1)
    axes.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    _name_strip(axes, name)


def _draw_ending(axes: Axes, name: str, run: Run, shape: tuple[int, ...]) -> None:
    """In place of images of a shape `(N, H, W)`: how a run ended that has none."""
    text = f"{run.status}: {run.reason}" if run.reason else run.status
    count, height, width = shape
    axes.set(xlim=(0, count * width), ylim=(0, height), aspect="equal")
    place: Any = {"ha": "center", "va": "center", "transform": axes.transAxes}
    axes.text(0.5, 0.5, textwrap.fill(text, 40), size=8, **place)
    _name_strip(axes, name)


def _name_strip(axes: Axes, name: str) -> None:
    axes.set(xticks=[], yticks=[])
    axes.set_ylabel(name, rotation=0, ha="right", va="center")


def picture(table: Table, **selection: Any) -> bytes:
    """The `panel` of a selection as PNG, for screens."""
    fig = panel(table, **selection)
    buffer = io.BytesIO()
    with plt.rc_context(STYLE):
        fig.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def explorer(table: Table, **selection: Any) -> widgets.VBox:
    """Controls for every axis of a table, over the `panel` of what they select.

    Args:
        table: where it comes from.
        selection: what is selected first; see `panel`.

    Raises:
        ConfigError: there is no such axis, or it has no such level.
    """
    first = table.select(**selection)
    controls = {name: _control(name, levels, first[name]) for name, levels in table.axes().items()}
    image = widgets.Image(format="png", layout={"width": "100%", "max_width": "900px"})

    def draw(change: object = None) -> None:
        image.value = picture(table, **{name: control.value for name, control in controls.items()})

    for control in controls.values():
        control.observe(draw, names="value")
    draw()
    return widgets.VBox([widgets.HBox(list(controls.values()), layout={"flex_flow": "row wrap"}), image])


def _control(name: str, levels: list[Any], value: Any) -> widgets.Widget:
    """A menu of words or a slider over numbers, which waits until it is let go."""
    settings = {"options": levels, "value": value, "description": name, "layout": {"width": "280px"}}
    if isinstance(value, str):
        return widgets.Dropdown(**settings)
    return widgets.SelectionSlider(**settings, continuous_update=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.pages.explore", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("collect", help="make a profile's table from the stored runs")
    command.add_argument("--profile", default="quick")
    command.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
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
