"""Figures: reconstructions beside each other, their numbers, and their files with provenance."""

from __future__ import annotations

import hashlib
import io
import json
import math
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator
from skimage.metrics import structural_similarity
from torch import Tensor

from lib import comparison
from lib.comparison import LOSS_THRESHOLD, Claim
from lib.config import FacesConfig, RunConfig
from lib.models import MODELS
from lib.operators import TASKS
from lib.runs import Run, code_version, data_digests, default_device, environment, get_run
from lib.solvers import Status
from lib.store import RESULTS, write_atomic
from lib.sweep import NOT_RUN, Sweep
from lib.training import (
    COMPLETED,
    TEST_BATCH,
    image_shape,
    load_images,
    make_operator,
    observe,
    one_thread,
    psnr,
    solve,
    test_noise,
)

MODEL_NAMES = {"bilevel": "bilevel", "deq": "DEQ"}
DATA_NAMES = {"mnist": "MNIST", "faces": "AT&T faces", "celeba": "CelebA"}

MODEL_COLORS = {"bilevel": "#0072b2", "deq": "#e69f00"}
MODEL_OFFSETS = {"bilevel": -0.175, "deq": 0.175}
MODEL_LINES = {"bilevel": "-", "deq": "--"}
"""Blue and orange differ for every kind of colour vision, and in grey one is dark and one is light."""

STYLE: Any = {
    "font.family": "STIXGeneral",
    "mathtext.fontset": "stix",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
}
"""Fonts that fit a column, and text that stays text in the PDF."""

TEXT_WIDTH = 6.9
"""Width in inches of a page of two columns."""


@dataclass(frozen=True)
class Reconstructions:
    """Test images, their data and what each model makes of them; images are `(N, H, W)` in [-1, 1].

    Attributes:
        runs: the run of each model.
        truth: `u`.
        observed: `f = K u + noise`.
        outputs: the fixed point `u*` of each model.
        forwarded: `K u*` of each model.
        table: a row for the input and for each model, means over the test images: `psnr` (dB), `ssim`,
            `mse`, and of the solves `steps`, `residual` and the share `unconverged`.
    """

    runs: Mapping[str, Run]
    truth: Tensor
    observed: Tensor
    outputs: dict[str, Tensor]
    forwarded: dict[str, Tensor]
    table: pd.DataFrame


@torch.no_grad()
@one_thread()
def reconstruct(runs: Mapping[str, Run]) -> Reconstructions:
    """Reconstruct the whole test set with each model from the same data, and measure.

    Args:
        runs: the run of each model; all of one task, noise level and test set.
    """
    config = next(iter(runs.values())).config
    device = default_device()
    operator = make_operator(config)
    truth = load_images(config)["test"]
    observed = observe(operator, truth, torch.tensor(config.noise), test_noise(config))
    rows = {"input": _quality(observed, truth)}
    outputs, forwarded = {}, {}
    for name, run in runs.items():
        # In the batches of the training's evaluation, so that the numbers are its numbers to the bit.
        batches = [f[None].to(device) for f in observed.split(TEST_BATCH)]
        model = run.model(stacked=True).to(device)
        solutions = [solve(model, f, run.config) for f in batches]
        u = torch.cat([solution.value[0] for solution in solutions]).cpu()
        outputs[name], forwarded[name] = u.squeeze(1), operator.forward(u).squeeze(1)
        rows[name] = _quality(u, truth) | {
            field: torch.cat([getattr(s, field)[0] for s in solutions]).double().mean().item()
            for field in ("steps", "residual")
        }
        status = torch.cat([solution.status[0] for solution in solutions])
        rows[name]["unconverged"] = (status != Status.CONVERGED).double().mean().item()
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("image")
    return Reconstructions(runs, truth.squeeze(1), observed.squeeze(1), outputs, forwarded, table)


def _quality(images: Tensor, truth: Tensor) -> dict[str, float]:
    """Means over the images of PSNR, SSIM and mean squared error; `(N, 1, H, W)` both."""
    mse = (images - truth).square().mean((-3, -2, -1))
    pairs = zip(images.squeeze(1).numpy(), truth.squeeze(1).numpy(), strict=True)
    ssim = [structural_similarity(image, reference, data_range=2) for image, reference in pairs]
    return {
        "psnr": psnr(mse).mean().item(),
        "ssim": float(np.mean(ssim)),
        "mse": mse.mean().item(),
    }


def with_images(result: Reconstructions, name: str, images: Tensor) -> Reconstructions:
    """The same with the reconstructions `(N, 1, H, W)` of another method, measured in the same way."""
    operator = make_operator(next(iter(result.runs.values())).config)
    rows = result.table.to_dict("index") | {name: _quality(images, result.truth[:, None])}
    return replace(
        result,
        outputs=result.outputs | {name: images.squeeze(1)},
        forwarded=result.forwarded | {name: operator.forward(images).squeeze(1)},
        table=pd.DataFrame.from_dict(rows, orient="index").rename_axis("image"),
    )


def training_table(runs: Mapping[str, Run]) -> pd.DataFrame:
    """How the training of each run ended: its status and the last row of its history."""
    rows = {
        name: {"status": run.status, "reason": run.reason}
        | (run.history.iloc[-1].to_dict() if len(run.history) else {})
        for name, run in runs.items()
    }
    return pd.DataFrame(rows)


def check_reconstructions(result: Reconstructions) -> None:
    """Recompute what must hold whatever the parameters are, and print it.

    Raises:
        AssertionError: the figure does not show what its caption says.
    """
    config = next(iter(result.runs.values())).config
    operator = make_operator(config)
    noise = (result.observed[:, None] - operator.forward(result.truth[:, None])).std().item()
    # Four standard deviations of the estimate, or a percent.
    allowed = max(0.01, 4 / math.sqrt(2 * result.truth.numel())) * config.noise
    assert abs(noise - config.noise) <= allowed, f"noise in the input: {noise}"
    print(f"the input is K u + noise, standard deviation {noise:.2f}")
    for name, run in result.runs.items():
        assert (run.weights.get("C") is None) == (run.config.model == "bilevel"), f"{name}: weights"
        print(f"{name}: C is {'a parameter of its own' if 'C' in run.weights else 'tied to A'}")
        if run.status == COMPLETED:
            stored, mse = run.history.test_loss.iloc[-1], result.table.mse[name]
            assert abs(mse - stored) <= 1e-6 * stored, f"{name}: loss {mse}, in training {stored}"
            print(f"{name}: the picture has the test loss that the training ended with")


def check_stored_losses(runs: pd.DataFrame, results: Path | str | None = None) -> None:
    """Reconstruct the test set again with one stored run per task and model, and compare the test loss.

    Args:
        runs: rows of `Sweep.runs`.
        results: folder of the results; the repository's when None.

    Raises:
        AssertionError: a stored run's weights do not give the test loss that was stored.
    """
    for row in runs.drop_duplicates(["task", "model"]).to_dict("records"):
        run = get_run(RunConfig(**{name: row[name] for name in RunConfig.model_fields}), results)
        mse = reconstruct({run.config.model: run}).table.mse[run.config.model]
        # Of a loss of almost nothing, another processor's rounding is a larger part.
        allowed = 1e-6 * max(mse, 1e-6)
        assert abs(mse - row["test_loss"]) <= allowed, f"{run.key}: {mse}, stored {row['test_loss']}"
        name = f"{MODEL_NAMES[run.config.model]}, {run.config.task}"
        print(f"{name}: the stored weights give the stored test loss")


def print_findings(result: Reconstructions, margin: float = 0.5) -> None:
    """Print what the figure shows about each trained model: findings, not requirements.

    Args:
        result: what was measured.
        margin: dB of PSNR from which a reconstruction counts as clearly better than its input.
    """
    before = result.table.loc["input"]
    for name, run in result.runs.items():
        if run.history.empty:
            continue
        row = result.table.loc[name]
        clearly = "clearly better" if row.psnr - before.psnr >= margin else "not clearly better"
        print(f"{name}: training {run.status}")
        print(f"{name}: {clearly} than the input in PSNR (by at least {margin} dB)")
        solved = "all" if row.unconverged == 0 else "none" if row.unconverged == 1 else "some"
        print(f"{name}: {solved} of the test images reach the tolerance {run.config.tol:g}")


def print_rounded(decibels: pd.Series, runs: Mapping[str, Run], margin: float = 0.5) -> None:
    """Print PSNRs to the digits that hold on other machines, and their order.

    With the sums of other processors a training ended at most 0.03 dB away where its solves converged, and up
    to 2.6 dB away where they did not (`results/bench/reproducibility.csv`). The former are printed to half a
    decibel, the latter not at all.

    Args:
        decibels: a PSNR by name.
        runs: the runs behind some of them, by the same names.
        margin: dB from which one is better than the next; below it they stand side by side.
    """
    rough = [name for name, run in runs.items() if not comparison.has_converged(run.history)]
    for name, value in decibels.items():
        said = "depends on roundings" if name in rough else f"{round(2 * value) / 2} dB"
        print(f"{name}: {said}")
    ranked = decibels.drop(rough).sort_values(ascending=False)
    groups = ranked.groupby((-ranked.diff() >= margin).cumsum())
    order = " > ".join(" ~ ".join(sorted(group.index)) for _, group in groups)
    print(f"in order, ~ where less than {margin} dB apart: {order}")


def budget(run: Run, profile: str, experts: str = "") -> str:
    """One line that says which data, parameters, profile and budget a run was made with.

    Args:
        run: the run, or one of several that share all this.
        profile: name of the profile.
        experts: what to say of them; the run's own when empty.
    """
    c = run.config
    height, width = image_shape(c)
    name = DATA_NAMES.get(c.dataset, Path(c.dataset).name)
    own = f"{c.filters} kernels {c.filter_size}x{c.filter_size}" if isinstance(c, FacesConfig) else c.sigma
    return (
        f"{name} {height}x{width}, {c.task}, noise {c.noise:g}, "
        rf"$\tau$ = {c.tau:g}, $\gamma$ = {c.gamma:g}, {experts or own}; profile {profile}: "
        f"{c.train_images:,} training images, {c.epochs} epochs; {c.test_images:,} test images"
    )


def reconstruction_figure(
    result: Reconstructions, rows: Sequence[str], profile: str, count: int = 8
) -> Figure:
    """Test images in rows, one block of columns per model.

    Args:
        result: what to show.
        rows: from `truth`, `input`, `K output` and `output`.
        profile: name of the profile, for the line below.
        count: how many of the first test images.
    """
    with plt.rc_context(STYLE):
        models = list(result.runs)
        fig, axes = plt.subplots(
            len(rows),
            len(models),
            figsize=(TEXT_WIDTH, 0.42 * len(rows) + 0.7),
            squeeze=False,
            gridspec_kw={"wspace": 0.03, "hspace": 0.06, "left": 0.09, "right": 0.995},
        )
        fig.subplots_adjust(top=1 - 0.36 / fig.get_figheight(), bottom=0.3 / fig.get_figheight())
        before = result.table.loc["input"]
        for column, model in zip(axes.T, models, strict=True):
            images = {
                "truth": result.truth,
                "input": result.observed,
                "K output": result.forwarded[model],
                "output": result.outputs[model],
            }
            for axis, row in zip(column, rows, strict=True):
                strip = torch.cat(list(images[row][:count]), dim=-1)
                axis.imshow(strip, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
            after = result.table.loc[model]
            column[0].set_title(
                f"{MODEL_NAMES[model]}: {after.psnr:.1f} dB, SSIM {after.ssim:.2f} "
                f"(input {before.psnr:.1f} dB, {before.ssim:.2f})"
            )
        for axis, row in zip(axes[:, 0], rows, strict=True):
            axis.set_ylabel(row.replace("K", "$K$"), rotation=0, ha="right", va="center")
        note(fig, budget(next(iter(result.runs.values())), profile))
    return fig


def _model_patches() -> list[Patch]:
    return [Patch(facecolor=MODEL_COLORS[model], edgecolor="k", label=MODEL_NAMES[model]) for model in MODELS]


def sweep_budget(sweep: Sweep) -> str:
    """One line that says which data, profile and budget a sweep was made with, and what is missing."""
    common, axes = sweep.provenance["shared"], sweep.provenance["axes"]

    def value(name: str) -> str:
        values = [common[name]] if name in common else axes[name]
        return " or ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in values)

    missing = sweep.provenance["statuses"].get(NOT_RUN, 0)
    return (
        f"{DATA_NAMES[value('dataset')]} {value('size')}x{value('size')}; profile {sweep.profile}: "
        f"{len(sweep.runs):,} configurations, {value('train_images')} training images, "
        f"{value('epochs')} epochs; {value('test_images')} test images"
        + (f"; {missing:,} configurations not run" if missing else "")
    )


def note(fig: Figure | SubFigure, text: str) -> None:
    """A line at the bottom of a figure, or two where it is narrow."""
    width, height = (side / fig.dpi for side in fig.bbox.size)
    text = textwrap.fill(text, int(24 * width), break_on_hyphens=False)
    fig.text(0.5, 0.08 / height, text, ha="center", va="bottom", size=7)


def loss_figure(sweep: Sweep, threshold: float = LOSS_THRESHOLD) -> Figure:
    """Boxplots of the final test loss per task and model, and the paired differences beside them.

    Args:
        sweep: what to show.
        threshold: largest final test loss that is kept.
    """
    kept = comparison.kept_runs(sweep.runs, threshold)
    with plt.rc_context(STYLE):
        fig, (left, right) = plt.subplots(1, 2, figsize=(TEXT_WIDTH, 3.4), width_ratios=(1.25, 1))
        fig.subplots_adjust(left=0.09, right=0.99, top=0.92, bottom=0.31, wspace=0.3)
        for model, offset in MODEL_OFFSETS.items():
            losses = [kept["test_loss"][(kept["task"] == t) & (kept["model"] == model)] for t in TASKS]
            left.boxplot(
                losses,
                positions=[i + offset for i in range(len(TASKS))],
                widths=0.32,
                patch_artist=True,
                boxprops={"facecolor": MODEL_COLORS[model]},
                medianprops={"color": "k"},
                flierprops={"markersize": 2},
            )
        left.legend(handles=_model_patches(), frameon=False, loc="upper left")
        left.set_xticks(range(len(TASKS)), TASKS)
        left.set(ylabel="final test loss", ylim=(-0.01, threshold * 1.02))
        left.set_title(f"runs with a final test loss up to {threshold:g}")
        _write_counts(left, comparison.outcome_table(sweep.runs, threshold))
        _draw_differences(right, comparison.paired(kept, "test_loss"))
        note(fig, sweep_budget(sweep))
    return fig


def _write_counts(axes: Axes, outcomes: pd.DataFrame) -> None:
    """Rows of numbers under the boxes: how many runs each box has and lacks."""
    shown = [name for name in comparison.OUTCOMES if name in comparison.OUTCOMES[:3] or outcomes[name].any()]
    counts = outcomes.to_dict("index")
    line = 0.062
    for row, name in enumerate(shown):
        text: Any = {"y": -0.06 - line * row, "size": 7, "va": "center"}
        text["transform"] = axes.get_xaxis_transform()
        axes.text(x=-0.55, s=name, ha="right", **text)
        for i, task in enumerate(TASKS):
            for model, offset in MODEL_OFFSETS.items():
                if (task, model) in counts:
                    axes.text(x=i + offset, s=str(counts[task, model][name]), ha="center", **text)
    axes.tick_params(axis="x", length=0, pad=7 + 10.5 * len(shown))
    axes.set_xlim(-0.5, len(TASKS) - 0.5)


def _draw_differences(axes: Axes, pairs: pd.DataFrame) -> None:
    """Each pair's difference, and per task the median with its interval."""
    axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    jitter = np.random.default_rng(0)
    for i, task in enumerate(TASKS):
        differences = pairs.loc[pairs["task"] == task, "difference"].to_numpy()
        heights = i + jitter.uniform(-0.2, 0.2, len(differences))
        axes.scatter(differences, heights, s=4, color="0.55", linewidth=0, zorder=1)
        test = comparison.paired_test(differences)
        if test["pairs"]:
            spread = [[test["median"] - test["low"]], [test["high"] - test["median"]]]
            bar: Any = {"fmt": "D", "color": "k", "markersize": 3.5, "capsize": 3, "linewidth": 1.2}
            axes.errorbar(test["median"], i, xerr=spread, zorder=3, **bar)
        label = f"{test['pairs']:.0f} pairs, median {test['median']:+.2g}"
        text = axes.text(0.98, i - 0.33, label, size=7, ha="right", transform=axes.get_yaxis_transform())
        # The line at zero must not run through it.
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.set_xscale("symlog", linthresh=0.01, linscale=0.6)
    axes.set(ylabel="", xlabel="bilevel minus DEQ (right of 0: the DEQ is better)")
    axes.set_yticks(range(len(TASKS)), TASKS)
    axes.set_ylim(len(TASKS) - 0.5, -0.6)
    axes.set_title("the same configuration, both kept")


def best_runs_figure(sweep: Sweep) -> Figure:
    """Test loss after each epoch of the best configuration of each model: noise levels x tasks.

    Of several seeds the median is drawn, and the range between the lowest and the highest loss.
    """
    best = comparison.best_runs(sweep.runs)
    levels = sorted(sweep.runs["noise"].unique())
    with plt.rc_context(STYLE):
        fig, grid = plt.subplots(
            len(levels),
            len(TASKS),
            figsize=(TEXT_WIDTH, 0.6 + 1.25 * len(levels)),
            sharex=True,
            squeeze=False,
        )
        fig.subplots_adjust(left=0.115, right=0.99, wspace=0.27, hspace=0.14)
        fig.subplots_adjust(top=1 - 0.25 / fig.get_figheight(), bottom=0.62 / fig.get_figheight())
        for column, task in zip(grid.T, TASKS, strict=True):
            column[0].set_title(task)
            column[-1].set_xlabel("epoch")
            noisy = [axes for axes, noise in zip(column, levels, strict=True) if noise > 0]
            for axes in noisy[1:]:
                axes.sharey(noisy[0])
            for axes, noise in zip(column, levels, strict=True):
                here = best[(best["task"] == task) & (best["noise"] == noise)]
                _draw_histories(axes, here, sweep.epochs)
        for axes, noise in zip(grid[:, 0], levels, strict=True):
            axes.set_ylabel(f"noise {noise:g}\ntest loss")
            axes.yaxis.set_label_coords(-0.2, 0.5)
        lines = [Line2D([], [], label=MODEL_NAMES[model], **_line(model)) for model in MODELS]
        grid[0, 0].legend(handles=lines, frameon=False, loc="upper right")
        note(fig, sweep_budget(sweep))
    return fig


def _draw_histories(axes: Axes, runs: pd.DataFrame, epochs: pd.DataFrame) -> None:
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.yaxis.set_minor_formatter(lambda y, _: f"{y:g}")
    axes.tick_params(axis="y", which="both", labelsize=6.5)
    axes.grid(alpha=0.3, linewidth=0.5)
    if runs.empty:
        axes.text(0.5, 0.5, "no run ended", ha="center", size=8, transform=axes.transAxes)
    for model, group in runs.groupby("model"):
        histories = epochs[epochs["key"].isin(group["key"])].groupby("epoch")["test_loss"]
        median = histories.median()
        if len(group) > 1:
            spread: Any = {"color": MODEL_COLORS[str(model)], "alpha": 0.2, "linewidth": 0}
            axes.fill_between(median.index, histories.min(), histories.max(), **spread)
        axes.plot(median.index, median, label=MODEL_NAMES[str(model)], **_line(str(model)))


def _line(model: str) -> dict[str, Any]:
    style = {"linestyle": MODEL_LINES[model], "color": MODEL_COLORS[model], "linewidth": 1.2}
    return style | {"marker": "o" if model == "bilevel" else "s", "markersize": 2.5}


def epochs_figure(sweep: Sweep, seconds: float, threshold: float = LOSS_THRESHOLD) -> Figure:
    """Histograms of the epochs finished within a time, over the solver steps that explain them.

    Args:
        sweep: what to show.
        seconds: time in which epochs are counted.
        threshold: largest final test loss that is kept.
    """
    runs = comparison.epochs_within(sweep, seconds, threshold)
    epochs = sweep.epochs[sweep.epochs["epoch"] > 0].merge(runs[["key", "task", "model"]], on="key")
    most = int(sweep.runs["epochs"].max())
    width = math.ceil((most + 1) / 20)
    edges = np.arange(0, most + width + 1, width) - 0.5
    with plt.rc_context(STYLE):
        fig, (top, bottom) = plt.subplots(2, len(TASKS), figsize=(TEXT_WIDTH, 4.2), sharey="row")
        fig.subplots_adjust(left=0.085, right=0.99, top=0.94, bottom=0.17, wspace=0.08, hspace=0.38)
        for upper, lower, task in zip(top, bottom, TASKS, strict=True):
            here = runs[runs["task"] == task]
            if not here.empty:
                sns.histplot(
                    here,
                    x="epochs_within",
                    hue="model",
                    hue_order=MODELS,
                    palette=MODEL_COLORS,
                    bins=edges.tolist(),
                    multiple="dodge",
                    shrink=0.85,
                    alpha=1,
                    linewidth=0,
                    legend=False,
                    ax=upper,
                )
            upper.xaxis.set_major_locator(MaxNLocator(integer=True))
            upper.set(title=task, xlabel=f"epochs finished in {seconds:.3g} s", ylabel="runs")
            _draw_solver_steps(lower, epochs[epochs["task"] == task])
        top[0].legend(handles=_model_patches(), frameon=False, loc="upper left")
        bottom[0].set(ylabel="solver steps per solve", ylim=(0, None))
        bottom[0].legend(frameon=False, loc="upper left", handlelength=2.6)
        note(fig, sweep_budget(sweep))
    return fig


def _draw_solver_steps(axes: Axes, epochs: pd.DataFrame) -> None:
    """Median over the runs, and the middle half of them, of the mean steps of a solve in each epoch."""
    for model in MODELS:
        steps = epochs[epochs["model"] == model].groupby("epoch")
        for direction, line, marker in (("forward", "-", "o"), ("backward", ":", "s")):
            low, median, high = (steps[f"{direction}_steps"].quantile(q) for q in (0.25, 0.5, 0.75))
            style: Any = {"color": MODEL_COLORS[model]}
            axes.fill_between(median.index, low, high, alpha=0.15, linewidth=0, **style)
            axes.plot(
                median.index,
                median,
                line,
                marker=marker,
                markersize=2.5,
                linewidth=1.2,
                label=f"{MODEL_NAMES[model]}, {direction}",
                **style,
            )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_xlabel("epoch")


def save(
    name: str,
    fig: Figure,
    table: pd.DataFrame,
    source: Sequence[Run] | Sweep,
    profile: str,
    results: Path | str | None = None,
    claims: Sequence[Claim] = (),
) -> Path:
    """Write `results/<profile>/<name>/` with the figure, its numbers and where they come from.

    Args:
        name: of the figure, such as `fig02`.
        fig: written as PNG (300 dpi) and PDF.
        table: the numbers behind the figure, written as CSV.
        source: the runs, or the sweep, that it was made from.
        profile: name of the profile.
        results: folder of the results; the repository's when None.
        claims: what the figure decides, written as `claims.json` if there are any.

    Returns:
        The figure's folder.
    """
    folder = Path(results or RESULTS) / profile / name
    files = {f"{name}.csv": table.to_csv().encode()}
    if claims:
        files["claims.json"] = json.dumps([asdict(claim) for claim in claims], indent=1).encode()
    # Without dates and versions in them the files are the same whenever they are made.
    silent = {"png": {"Software": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None}}
    for suffix, metadata in silent.items():
        buffer = io.BytesIO()
        with plt.rc_context(STYLE):
            fig.savefig(buffer, format=suffix, metadata=metadata)
        files[f"{name}.{suffix}"] = buffer.getvalue()
    provenance = {
        "figure": name,
        "profile": profile,
        **(source.provenance if isinstance(source, Sweep) else _provenance(source)),
        "environment": environment(default_device()),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sha256": {file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
    }
    files["provenance.json"] = json.dumps(provenance, indent=1, default=float).encode()
    for file, content in files.items():
        write_atomic(folder / file, content)
    return folder


def _provenance(runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "runs": {run.key: run.config.model_dump() | {"status": run.status} for run in runs},
        "data": {run.config.dataset: data_digests(run.config) for run in runs},
        "code": code_version(),
        "training_seconds": sum(run.provenance["seconds"] for run in runs),
        "trained_on": {run.key: run.provenance["environment"] for run in runs},
    }
