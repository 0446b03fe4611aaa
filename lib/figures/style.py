"""Style, footnote and files with provenance of all figures."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure, SubFigure
from PIL import Image

from lib.experiments.build import Config, image_shape
from lib.experiments.config import FacesConfig
from lib.experiments.provenance import write_with_provenance
from lib.experiments.records import Run
from lib.experiments.store import RESULTS, Results
from lib.experiments.sweep import NOT_RUN, Sweep
from lib.figures.comparison import Question, has_converged

MODEL_NAMES = {"bilevel": "bilevel", "deq": "DEQ"}

DATA_NAMES = {"mnist": "MNIST", "faces": "AT&T faces", "celeba": "CelebA"}

MODEL_COLORS = {"bilevel": "#0072b2", "deq": "#e69f00"}
"""Blue and orange differ for every kind of colour vision, and in grey one is dark and one is light."""

ARM_NAMES = MODEL_NAMES | {"deq tied": "DEQ from $C = A$, ours"}

ARM_COLORS = MODEL_COLORS | {"deq tied": "#009e73"}
"""Areas of the third are hatched, because in grey it is nearly as dark as the first."""


def arm_line(arm: str) -> dict[str, Any]:
    """Return the style of the curve of a model or arm."""
    linestyle, marker = {"bilevel": ("-", "o"), "deq": ("--", "s"), "deq tied": ("-.", "^")}[arm]
    style = {"linestyle": linestyle, "marker": marker, "color": ARM_COLORS[arm]}
    return style | {"linewidth": 1.2, "markersize": 2.5}


def arm_patch(arm: str) -> dict[str, Any]:
    """Return the style of an area of an arm."""
    return {"facecolor": ARM_COLORS[arm], "edgecolor": "k", "hatch": "//////" if arm == "deq tied" else ""}


# pyplot loads its backend for the first figure, and the backend of notebooks switches the display of figures
# on: inside a context that is undone at its end.
plt.switch_backend(mpl.get_backend())

STYLE: Any = {k: v for k, v in mpl.rcParamsDefault.items() if not k.startswith(("backend", "interactive"))}
STYLE |= {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
    "hatch.linewidth": 0.5,
}
STYLE |= dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 9)
STYLE |= dict.fromkeys(("legend.fontsize", "xtick.labelsize", "ytick.labelsize"), 8)
"""Defaults of matplotlib without user settings, fonts that fit a column, text as text in PDFs."""

TEXT_WIDTH = 6.9
"""Width in inches of a page of two columns."""


def budget(run: Run, profile: str, experts: str = "") -> str:
    """Return a line with the data, parameters, profile and budget of a run; `experts` replaces its own."""
    c = run.config
    height, width = image_shape(c)
    name = DATA_NAMES.get(c.dataset, Path(c.dataset).name)
    own = f"{c.filters} kernels {c.filter_size}x{c.filter_size}" if isinstance(c, FacesConfig) else c.sigma
    return (
        f"{name} {height}x{width}, {c.task}, noise {c.noise:g} ({127.5 * c.noise:.4g} of 255), "
        rf"$\tau$ = {c.tau:g}, $\gamma$ = {c.gamma:g}, {experts or own}; profile {profile}: "
        f"{c.train_images:,} training images, {c.epochs} epochs; {c.test_images:,} test images"
    )


def sweep_budget(profile: str, provenance: Mapping[str, Any]) -> str:
    """Return a line with the data, profile, budget and missing runs of a sweep from its provenance."""
    common, axes, statuses = (provenance[name] for name in ("shared", "axes", "statuses"))

    def value(name: str) -> str:
        values = [common[name]] if name in common else axes[name]
        return " or ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in values)

    missing = statuses.get(NOT_RUN, 0)
    return (
        f"{DATA_NAMES[value('dataset')]} {value('size')}x{value('size')}; profile {profile}: "
        f"{sum(statuses.values()):,} configurations, {value('train_images')} training images, "
        f"{value('epochs')} epochs; {value('test_images')} test images"
        + (f"; {missing:,} configurations not run" if missing else "")
    )


def parameter_table(configs: Mapping[str, Config]) -> pd.DataFrame:
    """Return the parameters of trainings, a column for each name."""

    def column(c: Config) -> dict[str, str]:
        optimizer = f"Adam, {c.learning_rate:g} to {c.final_learning_rate:g}, {c.schedule}"
        experts, lam = f"dense, {getattr(c, 'sigma', '')}", f"{c.lam:g}"
        start = "C = A" if c.model == "bilevel" or c.initial == "tied" else "A and C independent"
        start = start if isinstance(c.initial, str) else "a run's weights"
        if isinstance(c, FacesConfig):
            experts = f"{c.filters} kernels {c.filter_size}x{c.filter_size}"
            start = f"C = A, {c.initial if isinstance(c.initial, str) else 'learned on denoising'}"
            optimizer = "L-BFGS" if c.optimizer == "lbfgs" else optimizer
            lam = "learned" if c.learn_weight else lam
        size, data = "x".join(map(str, image_shape(c))), DATA_NAMES.get(c.dataset, Path(c.dataset).name)
        return {
            "data": f"{data} {size}, {c.train_images:,} to train, {c.test_images:,} to test",
            "task, noise": f"{c.task}, {c.noise:g} ({127.5 * c.noise:.4g} of 255)",
            "tau, lambda, gamma": f"{c.tau:.4g}, {lam}, {c.gamma:g}",
            "experts": experts,
            "start": start,
            "solver": f"{c.solver}, tol {c.tol:g}, at most {c.max_steps} steps",
            "adjoint": "solved" if c.adjoint == "solved" else f"Neumann series of {c.neumann_steps}",
            "optimizer": optimizer,
            "epochs, batch, seed": f"{c.epochs}, {c.batch_size}, {c.seed}",
        }

    return pd.DataFrame({name: column(config) for name, config in configs.items()})


def sweep_table(sweep: Sweep) -> pd.DataFrame:
    """Return the axes and shared parameters of a sweep as a table."""
    common = sweep.provenance["shared"]
    names = ("size", "train_images", "epochs", "batch_size", "lam", "seed")
    values = sweep.provenance["axes"] | {name: [common[name]] for name in names if name in common}
    rows = {name: ", ".join(map(str, levels)) for name, levels in values.items()}
    return pd.DataFrame({"values": rows}).rename_axis("parameter")


def note(fig: Figure | SubFigure, text: str) -> None:
    """Write a note at the bottom of a figure, wrapped to its width."""
    width, height = (side / fig.dpi for side in fig.bbox.size)
    text = textwrap.fill(text, int(24 * width), break_on_hyphens=False)
    fig.text(0.5, 0.08 / height, text, ha="center", va="bottom", size=7)


def with_palette(picture: io.BytesIO) -> bytes:
    """Return a PNG with 256 colours, of half the size; grey stays exact, edges of lines change invisibly."""
    with Image.open(picture) as image, io.BytesIO() as smaller:
        few = image.convert("RGB").quantize(256, kmeans=4, dither=Image.Dither.NONE)
        few.save(smaller, "PNG", optimize=True, dpi=image.info["dpi"])
        return smaller.getvalue()


def save(
    name: str,
    fig: Figure,
    table: pd.DataFrame,
    source: Mapping[str, Run] | Sweep,
    profile: str,
    results: Results = None,
    questions: Sequence[Question] = (),
    tables: Mapping[str, pd.DataFrame] | None = None,
    pictures: Mapping[str, Figure] | None = None,
    settings: Mapping[str, Any] | None = None,
    histories: Mapping[str, Run] | None = None,
) -> Path:
    """Write `results/<profile>/<name>/` with the figure, its numbers and their provenance.

    Args:
        name: of the figure, such as `fig02`.
        fig: written as PNG (300 dpi) and PDF.
        table: the numbers behind the figure, written as CSV.
        source: the sweep behind the figure, or its runs by their names in the table.
        profile: name of the profile.
        questions: written as `questions.json` if there are any.
        tables, pictures: further ones by name, each written to files of that name.
        settings: further parameters for the provenance.
        histories: runs by name whose weights are not needed.

    Returns:
        The figure's folder.
    """
    folder = Path(results or RESULTS) / profile / name
    files = {f"{key}.csv": own.to_csv().encode() for key, own in ({name: table} | dict(tables or {})).items()}
    if questions:
        files["questions.json"] = json.dumps([asdict(question) for question in questions], indent=1).encode()
    # Without dates and versions, equal figures have equal files.
    silent = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None}}
    for key, own in ({name: fig} | dict(pictures or {})).items():
        for suffix, metadata in silent.items():
            buffer = io.BytesIO()
            with plt.rc_context(STYLE):
                own.savefig(buffer, format=suffix, metadata=metadata)
            files[f"{key}.{suffix}"] = with_palette(buffer) if suffix == "png" else buffer.getvalue()
    came_from = source.provenance if isinstance(source, Sweep) else _provenance(source, histories or {})
    if settings:
        came_from = came_from | {"settings": dict(settings)}
    write_with_provenance(folder, files, {"figure": name, "profile": profile, **came_from})
    return folder


def _provenance(named: Mapping[str, Run], histories: Mapping[str, Run]) -> dict[str, Any]:
    runs = [*named.values(), *histories.values()]

    def records(by_name: Mapping[str, Run]) -> dict[str, Any]:
        return {
            run.key: run.config.model_dump()
            | {"name": name, "status": run.status, "converged": has_converged(run.history)}
            for name, run in by_name.items()
        }

    return {
        "runs": records(named),
        **({"histories": records(histories)} if histories else {}),
        "data": {run.config.dataset: run.provenance["data"] for run in runs},
        "training_seconds": sum(run.provenance["seconds"] for run in runs),
        "trained_on": {run.key: run.provenance["environment"] for run in runs},
        "trained_by": sorted({run.provenance["method"] for run in runs}),
    }
