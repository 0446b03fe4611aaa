"""Baseline without learning: total variation with its best weight."""

from __future__ import annotations

import math
from collections.abc import Callable

import scipy
import skimage
import torch
from torch import Tensor

from lib.experiments.build import make_operator
from lib.experiments.config import FacesConfig
from lib.kernels import difference_kernels
from lib.models import FixedPointModel
from lib.operators import Mask, Operator
from lib.regularizer import ConvFieldsOfExperts, smoothed_sign
from lib.solvers import Anderson, fixed_point

Method = Callable[[Tensor, float], Tensor]
"""Function of data `f` and a weight that returns images, all `(N, 1, H, W)`."""

DIFFERENCES_NORM = math.sqrt(8)
"""Largest norm of the forward differences in both directions (Chambolle, JMIV 20, 2004)."""

TV_WEIGHTS = {"denoising": (0.005, 1.0)}
TV_LAMBDAS = (10.0, 30_000.0)
"""Intervals of the weight of total variation: scikit-image's in denoising, otherwise `lambda`."""

TUNING_IMAGES = 4
"""Number of training images for the choice of weights."""


def chambolle(f: Tensor, weight: float) -> Tensor:
    """Denoise by total variation with scikit-image; a larger weight smooths more."""
    images = f.squeeze(1).numpy()
    u = skimage.restoration.denoise_tv_chambolle(images, weight=weight, eps=1e-5, channel_axis=0)
    return torch.from_numpy(u)[:, None]


def tv_model(operator: Operator, lam: float, sharpness: float = 100.0) -> FixedPointModel:
    """Return smoothed anisotropic total variation: our lower level with forward differences as kernels."""
    A = difference_kernels(1, 2, 3)
    tau = 1 / (lam + sharpness * DIFFERENCES_NORM**2)
    return FixedPointModel(operator, ConvFieldsOfExperts(A, None, smoothed_sign(sharpness)), tau, lam, 1.0)


def best_weight(method: Method, f: Tensor, truth: Tensor, low: float, high: float) -> float:
    """Return the weight in `[low, high]` with the smallest mean squared error, to three digits."""

    def error(exponent: float) -> float:
        return (method(f, math.exp(exponent)) - truth).square().mean().item()

    bounds = (math.log(low), math.log(high))
    best = scipy.optimize.minimize_scalar(error, bounds=bounds, method="bounded", options={"xatol": 0.05})
    return float(f"{math.exp(best.x):.3g}")


def tv_method(config: FacesConfig, shape: tuple[int, int]) -> Method:
    """Return total variation by scikit-image in denoising, otherwise by `tv_model` with the weight `lambda`.

    Solves are preconditioned unless `K` is a mask: the steps of deblurring are so short that otherwise the
    residual reaches its tolerance half a decibel away from the minimiser.
    """
    if config.task == "denoising":
        return chambolle
    operator = make_operator(config, shape)

    @torch.no_grad()
    def method(f: Tensor, weight: float) -> Tensor:
        model = tv_model(operator, weight)
        P = None if isinstance(operator, Mask) else model.preconditioner(f.shape[-3:])
        return fixed_point(model.problem(f, P), f, Anderson(1e-5, 500, memory=10)).value

    return method


def best_tv_weight(config: FacesConfig, f: Tensor, truth: Tensor) -> float:
    """Return the weight of `tv_method` that is best for data and true images."""
    method = tv_method(config, (f.shape[-2], f.shape[-1]))
    return best_weight(method, f, truth, *TV_WEIGHTS.get(config.task, TV_LAMBDAS))
