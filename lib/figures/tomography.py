"""Sparse-angle tomography, a task of our own: kernels learned on denoising, and the same trained for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn import functional

from lib.deepinverse import PhysicsOperator, tomography, with_operator
from lib.experiments.config import FacesConfig
from lib.experiments.data import faces
from lib.experiments.runs import Run
from lib.figures.baselines import TUNING_IMAGES, Method, best_weight, tv_model
from lib.figures.evaluation import TV, progress, reweighted
from lib.figures.reconstructions import image_quality
from lib.figures.style import STYLE, TEXT_WIDTH, note
from lib.models import FixedPointModel
from lib.regularizer import ConvFieldsOfExperts, smoothed_sign
from lib.solvers import Anderson, Solution, Status, fixed_point
from lib.training import Adam, generator, one_thread, psnr, train

SOLVER = Anderson(tol=1e-4, max_steps=300, memory=10, patience=50)

FBP = "filtered back-projection"

FACE = slice(10, 102)
"""Rows of the faces' 112 that make them square."""

LAMBDAS = (10.0, 30_000.0)
"""Where the best `lambda` is looked for."""


class SystemMatrix:
    """`K` of small images as the matrix of an operator: the same products, several times cheaper.

    Args:
        operator: a physics as `K`, of images `(N, 1, side, side)`.
        side: of the images in pixels.
    """

    def __init__(self, operator: PhysicsOperator, side: int) -> None:
        pixels = torch.eye(side**2).view(-1, 1, side, side)
        responses = torch.cat([operator.forward(part) for part in pixels.split(side)])
        self.image, self.data = pixels.shape[1:], responses.shape[1:]
        self.transposed = responses.flatten(1)

    def forward(self, u: Tensor) -> Tensor:
        data: Tensor = (u.flatten(-3) @ self.transposed).unflatten(-1, self.data)
        return data

    def adjoint(self, v: Tensor) -> Tensor:
        image: Tensor = (v.flatten(-3) @ self.transposed.mT).unflatten(-1, self.image)
        return image

    def normal(self, u: Tensor) -> Tensor:
        return self.adjoint(self.forward(u))


@dataclass(frozen=True)
class Scans:
    """Faces and what a tomograph sees of them.

    Attributes:
        scanner: DeepInverse's, of norm 1.
        operator: the same as `K`.
        truth: images of each split, `(N, 1, side, side)` in [-1, 1].
        data: `f = K u + noise`, `(N, 1, detectors, angles)`.
    """

    scanner: PhysicsOperator
    operator: SystemMatrix
    truth: Mapping[str, Tensor]
    data: Mapping[str, Tensor]

    def first(self, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
        """The first images of a split and their data."""
        return self.truth[split][:count], self.data[split][:count]


@one_thread()
def scan(side: int, angles: int, noise: float, counts: Mapping[str, int], seed: int) -> Scans:
    """Scan faces of other people for training and for testing.

    Args:
        side: to which the images are reduced.
        angles: projections, evenly spaced over half a turn.
        noise: standard deviation in the sinogram.
        counts: images of `train` and of `test`.
        seed: of the noise.
    """
    scanner = PhysicsOperator(tomography(side, angles))
    operator = SystemMatrix(scanner, side)
    truth, data = {}, {}
    for split, count in counts.items():
        square = faces(split, count)[..., FACE, :]
        truth[split] = functional.interpolate(square, (side, side), mode="bilinear", antialias=True)
        clean = operator.forward(truth[split])
        n = torch.randn(clean.shape, generator=generator(seed, "tomography", split))
        data[split] = clean + noise * n
    return Scans(scanner, operator, truth, data)


def back_projection(scans: Scans, f: Tensor) -> Tensor:
    """Filtered back-projection of data, `(N, 1, side, side)`."""
    images: Tensor = scans.scanner.physics.fbp(f)
    return images


def _solve(model: FixedPointModel, f: Tensor) -> Solution:
    return fixed_point(model.problem(f), model.operator.adjoint(f), SOLVER)


def weighted_model(scans: Scans, run: Run, lam: float) -> FixedPointModel:
    """A run's kernels for tomography with a weight `lambda`."""
    shape = scans.truth["train"].shape
    return with_operator(reweighted(run, lam).model(shape=(shape[-2], shape[-1])), scans.operator)


@torch.no_grad()
@one_thread()
def tuned(scans: Scans, run: Run | None) -> tuple[FixedPointModel, float]:
    """A run's kernels or, when None, total variation with the `lambda` that is best on training images."""

    def model(lam: float) -> FixedPointModel:
        return tv_model(scans.operator, lam) if run is None else weighted_model(scans, run, lam)

    method: Method = lambda f, lam: _solve(model(lam), f).value  # noqa: E731
    truth, f = scans.first("train", TUNING_IMAGES)
    lam = best_weight(method, f, truth, *LAMBDAS)
    return model(lam), lam


def train_kernels(
    scans: Scans, run: Run, lam: float, epochs: int, learning_rate: float, noise: float, seed: int
) -> FixedPointModel:
    """Train a run's kernels for tomography, and `lambda` with them, by Adam on all training images at once.

    Args:
        scans: the operator and the training images.
        run: the kernels to start from.
        lam: the weight to start from.
        epochs: steps of the optimizer.
        learning_rate: the first one; it falls to a hundredth.
        noise: standard deviation in the sinogram.
        seed: of the noise and of the direction from which the kernels' norm is looked for.
    """
    config = run.config
    assert isinstance(config, FacesConfig)
    images, A = scans.truth["train"], run.weights["A"]
    direction = torch.randn(1, *images.shape[1:], generator=generator(seed, "direction"))
    sigma = smoothed_sign(config.sharpness)
    experts = ConvFieldsOfExperts(A.clone(), run.weights.get("C"), sigma, direction, differentiate_norm=True)
    model = FixedPointModel(scans.operator, experts, config.tau, lam, config.gamma, learn_weight=True)
    optimizer = Adam(learning_rate, learning_rate / 100)
    train(model, images, noise, epochs=epochs, optimizer=optimizer, solver=SOLVER, warm_start=True, seed=seed)
    return model


def all_models(
    scans: Scans, runs: Mapping[str, Run], epochs: int, learning_rate: float, noise: float, seed: int
) -> dict[str, FixedPointModel]:
    """Total variation, and of each run its kernels as they are and trained for tomography, by name."""
    models = {TV: tuned(scans, None)[0]}
    for name, run in progress(list(runs.items()), "models"):
        models[f"{name}, from denoising"], lam = tuned(scans, run)
        models[f"{name}, trained here"] = train_kernels(scans, run, lam, epochs, learning_rate, noise, seed)
    return models


@torch.no_grad()
@one_thread()
def compare(scans: Scans, models: Mapping[str, FixedPointModel]) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Quality on the test images, and the images `truth` and of each method, `(N, 1, side, side)`.

    Args:
        scans: the test data.
        models: by name.

    Returns:
        A row for filtered back-projection and for each model, means over the test images: `psnr` (dB),
        `ssim`, `mse`, the learned or chosen `lambda`, and of the solves `steps` and the share `unconverged`.
    """
    truth, f = scans.first("test")
    images, rows = {"truth": truth, FBP: back_projection(scans, f)}, {}
    solves: dict[str, dict[str, float]] = {FBP: {}}
    for name, model in models.items():
        solution = _solve(model, f)
        images[name] = solution.value
        solves[name] = {
            "lambda": model.lam.item(),
            "steps": solution.steps.double().mean().item(),
            "unconverged": 1 - solution.fraction(Status.CONVERGED),
        }
    for name, solved in solves.items():
        quality = image_quality(images[name], truth)
        rows[name] = {measure: float(values.mean()) for measure, values in quality.items()} | solved
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("image"), images


def tomography_figure(images: Mapping[str, Tensor], scans: Scans, image: int, text: str) -> Figure:
    """A test image, its sinogram and the reconstructions, with PSNR and SSIM of that image.

    Args:
        images: what `compare` returned.
        scans: the data.
        image: index of the test image.
        text: for the line below.
    """
    truth, sinogram = (tensor[image, 0] for tensor in scans.first("test"))
    shown = {"truth": truth, "data": sinogram.T} | {n: u[image, 0] for n, u in images.items() if n != "truth"}
    columns = math.ceil(len(shown) / 2)
    side = TEXT_WIDTH / columns
    with plt.rc_context(STYLE):
        height = 2 * (side + 0.3) + 0.5
        fig, axes = plt.subplots(2, columns, figsize=(TEXT_WIDTH, height), squeeze=False)
        fig.subplots_adjust(left=0.01, right=0.99, wspace=0.04, hspace=0.4 / side)
        fig.subplots_adjust(top=1 - 0.22 / height, bottom=0.55 / height)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, (name, picture) in zip(axes.flat, shown.items(), strict=False):
            if name == "data":
                axis.imshow(picture.numpy(), cmap="gray", aspect="auto", interpolation="nearest")
            else:
                axis.imshow(picture.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            axis.set_box_aspect(1)
            axis.set_title(name, pad=3)
            if name not in ("truth", "data"):
                decibels = psnr((picture - truth).square().mean()).item()
                ssim = structural_similarity(picture.numpy(), truth.numpy(), data_range=2)
                line = f"{decibels:.1f} dB, SSIM {ssim:.2f}"
                axis.text(0.5, -0.02, line, size=7.5, ha="center", va="top", transform=axis.transAxes)
        note(fig, text)
    return fig


@torch.no_grad()
@one_thread()
def check_tomography(scans: Scans, models: Sequence[FixedPointModel], seed: int = 0) -> None:
    """Print what must hold whatever the parameters are.

    Raises:
        AssertionError: the adjoint is not exact, or a step is too long for the norm of `K`.
    """
    u, f = scans.first("test")
    v, w = (torch.randn(t.shape, generator=generator(seed, "check", *t.shape)) for t in (u, f))
    K = scans.operator
    for operator in (scans.scanner, K):
        gap = ((operator.forward(v) * w).sum() - (v * operator.adjoint(w)).sum()).abs() / (
            v.norm() * w.norm()
        )
        assert gap <= 1e-5, f"<K u, v> and <u, K^T v> differ by {gap}"
    print("<K u, v> = <u, K^T v> to single precision")
    assert torch.allclose(K.forward(v), scans.scanner.forward(v), rtol=0, atol=1e-4), "K is another operator"
    print("the matrix has the products of DeepInverse's physics")
    for _ in range(20):
        v = K.normal(v / v.norm())
    assert v.norm() <= 1.01, f"||K||^2 is {v.norm()}"
    print("the norm of K is at most 1")
    for model in models:
        assert model.tau * model.lam < 1, f"tau {model.tau}, lambda {model.lam}"
    print("every step is shorter than 1 / lambda")
