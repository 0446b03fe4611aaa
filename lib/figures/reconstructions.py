"""Reconstructions of the test images beside each other, their quality, and what must hold of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from skimage.metrics import structural_similarity
from torch import Tensor

from lib.experiments.config import RunConfig
from lib.experiments.problem import (
    TEST_BATCH,
    load_images,
    make_operator,
    observe,
    one_thread,
    psnr,
    solve,
    test_noise,
)
from lib.experiments.runs import Run, default_device, get_run
from lib.experiments.trainer import COMPLETED
from lib.figures import comparison
from lib.figures.style import MODEL_NAMES, STYLE, TEXT_WIDTH, budget, note
from lib.solvers import Status


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
