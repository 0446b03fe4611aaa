"""Why naive training does not fill a lost area: iterates, residuals and eigenvalues inside the mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib.experiments.build import make_operator, solve
from lib.experiments.runs import Run
from lib.figures.baselines import harmonic_inpainting, tv_model
from lib.figures.style import STYLE, TEXT_WIDTH, budget, note
from lib.kernels import correlate
from lib.operators import Mask
from lib.solvers import Anderson, Solution, Solver, fixed_point
from lib.training import one_thread, psnr


def lost_pixels(run: Run) -> Tensor:
    """`(H, W)`, true where the mask of a run's operator loses a pixel.

    Raises:
        ValueError: the run's task is another one.
    """
    operator = make_operator(run.config)
    if not isinstance(operator, Mask):
        raise ValueError(f"task: got {run.config.task!r}, allowed: 'inpainting'")
    return operator.mask == 0


def counts(shown: Sequence[int]) -> list[int]:
    """The numbers of iterations to draw an error at: those shown, and others evenly on a log axis."""
    spread = np.geomspace(1, max(shown), 40).round().astype(int)
    return sorted({*shown, *spread.tolist()})


@torch.no_grad()
@one_thread()
def plain_iterates(run: Run, f: Tensor, counts: Sequence[int]) -> dict[int, Tensor]:
    """The iterates `u^k` of `u <- T(u)` from `f`, like `f`, at some numbers `k` of iterations."""
    T, u = run.model().step_map(f), f
    iterates = {}
    for k in range(1, max(counts) + 1):
        u = T(u)
        if k in counts:
            iterates[k] = u
    return iterates


@torch.no_grad()
@one_thread()
def converged(run: Run, f: Tensor) -> Solution:
    """The fixed points of a run's model, solved until the lost area has converged too."""
    solver = Anderson(1e-6, 3000, memory=10, regularization=1e-6)
    return fixed_point(run.model().step_map(f), f, solver)


@torch.no_grad()
@one_thread()
def condition(run: Run, u: Tensor, lost: Tensor) -> dict[str, float]:
    """Why the equation of the hypergradient is nearly singular at one image.

    Args:
        run: gives `J = dT/du`.
        u: `(1, 1, H, W)`, where it is evaluated.
        lost: `(H, W)`, true where a pixel is lost.

    Returns:
        `saturated`, the share of the experts in touch with a lost pixel whose slope `sigma'` is under a
        hundredth of its largest value, and `gap`, one minus the largest eigenvalue of `J` restricted to the
        lost pixels. There the data term vanishes, and with tied weights `J` is symmetric; its symmetric part
        is taken, so that for free weights the gap is a bound.
    """
    model = run.model()
    regularizer = model.regularizer
    experts = regularizer.analysis(u)
    slope = regularizer.activation.slope(experts, model.tau)
    steepest = regularizer.activation.slope(torch.zeros(1), model.tau)
    touched = correlate(torch.ones_like(regularizer.A), lost.to(u).view(1, 1, *lost.shape)) > 0.5
    units = torch.eye(lost.numel(), dtype=u.dtype)[lost.flatten()].view(-1, 1, *lost.shape)
    J = model.vjp(u.expand(len(units), *u.shape[1:]))(units)[:, 0, lost].double()
    return {
        "saturated": float((slope[touched] < steepest / 100).double().mean()),
        "gap": 1 - float(torch.linalg.eigvalsh((J + J.T) / 2)[-1]),
    }


@torch.no_grad()
@one_thread()
def backward_residuals(run: Run, u: Tensor, truth: Tensor, solver: Solver) -> np.ndarray:
    """Relative residual of the hypergradient's equation `w = J^T w + dL/du` at `u` after each step.

    Args:
        run: gives `J`.
        u, truth: `(N, 1, H, W)`; the loss is their mean squared difference.
        solver: whose steps are counted.

    Returns:
        `(steps,)`, the largest one of the images.
    """
    cotangent = 2 * (u - truth) / truth.numel()
    transposed_jacobian = run.model().vjp(u)
    solution = fixed_point(lambda w: transposed_jacobian(w) + cotangent, cotangent, solver)
    largest: np.ndarray = solution.residuals.amax(-1).numpy()
    return largest


@torch.no_grad()
@one_thread()
def baselines(run: Run, f: Tensor) -> dict[str, Tensor]:
    """Harmonic and total variation inpainting of the same data.

    Total variation is our lower level with finite differences, solved from the harmonic images; the known
    pixels keep the weight `lambda` of the run.
    """
    harmonic = harmonic_inpainting(f, (~lost_pixels(run)).float())
    model = tv_model(make_operator(run.config), run.config.lam)
    solver = Anderson(1e-6, 1000, memory=10, regularization=1e-6)
    return {"harmonic": harmonic, "TV": fixed_point(model.step_map(f), harmonic, solver).value}


@torch.no_grad()
@one_thread()
def fill(run: Run, f: Tensor) -> Tensor:
    """The reconstructions of a run's model with the solver of its training, `(N, 1, H, W)`."""
    return solve(run.model(), f, run.config).value


def quality(images: Mapping[str, Tensor], truth: Tensor, lost: Tensor) -> pd.DataFrame:
    """Means over the images of the PSNR in dB over the lost pixels, and over all pixels."""
    rows = {
        name: {
            "psnr inside": psnr((u - truth)[..., lost].square().mean(-1)).mean().item(),
            "psnr": psnr((u - truth).square().mean((-3, -2, -1))).mean().item(),
        }
        for name, u in images.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("image")


def inpainting_figure(
    images: Mapping[str, Tensor],
    truth: Tensor,
    lost: Tensor,
    errors: Mapping[str, Mapping[int, float]],
    residuals: Mapping[str, np.ndarray],
    run: Run,
    profile: str,
) -> Figure:
    """Pictures of one face in two rows, over the error inside the mask and the backward residuals.

    Args:
        images: pictures `(H, W)` by title, row by row in two rows.
        truth: `(H, W)`.
        lost: `(H, W)`, true where a pixel is lost.
        errors: for each model the mean squared error inside the mask of the iterate `u^k`, by `k`.
        residuals: for each solver what `backward_residuals` returned.
        run: named in the line below.
        profile: name of the profile.
    """
    columns = -(-len(images) // 2)
    styles = ("-", "--", ":", "-.")
    colors = ("#0072b2", "#e69f00", "#009e73", "0.2")
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(TEXT_WIDTH, 6.2))
        halves: Any = fig.subfigures(2, 1, height_ratios=(1.75, 1))
        upper, lower = halves
        axes = upper.subplots(2, columns)
        upper.subplots_adjust(left=0.01, right=0.99, top=0.94, bottom=0.06, wspace=0.05, hspace=0.28)
        for axis in axes.flat[len(images) :]:
            axis.set_axis_off()
        for axis, (title, picture) in zip(axes.flat, images.items(), strict=False):
            axis.imshow(picture, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_title(title, pad=3)
            inside = psnr((picture - truth)[lost].square().mean()).item()
            if not torch.equal(picture, truth):
                axis.set_xlabel(f"{inside:.1f} dB inside", size=7.5, labelpad=2)
        left, right = lower.subplots(1, 2)
        lower.subplots_adjust(left=0.11, right=0.99, top=0.97, bottom=0.29, wspace=0.28)
        for (name, error), line, color in zip(errors.items(), styles, colors, strict=False):
            left.loglog(list(error), list(error.values()), line, color=color, label=name)
        left.set(xlabel="plain iterations $k$", ylabel="mean squared error in the mask")
        for (name, residual), line, color in zip(residuals.items(), styles, colors, strict=False):
            right.loglog(np.arange(1, len(residual) + 1), residual, line, color=color, label=name)
        right.set(xlabel="steps of the backward solve", ylabel="relative residual")
        for axis in (left, right):
            axis.grid(alpha=0.3, linewidth=0.5)
            axis.legend(frameon=False, handlelength=2.6)
        note(lower, budget(run, profile))
    return fig
