"""Baselines without learning: total variation and the choice of its weight."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib.experiments.data import photographs
from lib.figures.baselines import DIFFERENCES_NORM, best_weight, chambolle, tv_model
from lib.kernels import difference_kernels, spectral_norm
from lib.operators import Identity
from lib.solvers import Anderson, fixed_point
from lib.training import psnr


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def piece() -> tuple[Tensor, Tensor]:
    """A crop of a face without and with noise."""
    truth = photographs("faces", 0, 1)["test"][..., 30:70, 28:64]
    return truth, truth + 0.15 * normal(*truth.shape)


def decibels(images: Tensor, truth: Tensor) -> float:
    return psnr((images - truth).square().mean()).item()


def test_tv_denoises_like_chambolle() -> None:
    """With their best weights, both are within 0.5 dB of each other and 2 dB above the data."""
    truth, f = piece()

    def ours(f: Tensor, weight: float) -> Tensor:
        model = tv_model(Identity(), weight)
        problem = model.problem(f, model.preconditioner(f.shape[-3:]))
        return fixed_point(problem, f, Anderson(1e-4, 200, memory=10)).value

    best = {
        "scikit-image": decibels(chambolle(f, best_weight(chambolle, f, truth, 0.01, 1.0)), truth),
        "ours": decibels(ours(f, best_weight(ours, f, truth, 1.0, 100.0)), truth),
    }
    assert abs(best["scikit-image"] - best["ours"]) <= 0.5
    assert min(best.values()) > decibels(f, truth) + 2


def test_tv_solution_minimizes_energy() -> None:
    """The energy is below that of the data and of nearby images, and the gradient vanishes."""
    _, f = piece()
    f = f.double()
    model = tv_model(Identity(), 8.0).double()
    u = fixed_point(model.step_map(f), f, Anderson(1e-10, 3000)).value
    lowest = model.lower_level(u, f).item()
    assert lowest < 0.8 * model.lower_level(f, f).item()
    for seed in range(5):
        direction = normal(*f.shape, seed=seed + 1).double()
        for size in (1e-5, 1e-3, 1e-1):
            assert model.lower_level(u + size * direction, f).item() > lowest
            assert model.lower_level(u - size * direction, f).item() > lowest
    v = u.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.lower_level(v, f).sum(), v)
    assert gradient.abs().max() < 1e-6


def test_step_is_the_reciprocal_lipschitz_constant() -> None:
    """The norm of the differences on large images is just below sqrt(8)."""
    norm = spectral_norm(difference_kernels(1, 2, 3), normal(1, 1, 64, 64), 3000)[0].item()
    assert 0.995 * DIFFERENCES_NORM < norm <= DIFFERENCES_NORM * (1 + 1e-6)
    for lam, sharpness in ((1.0, 100.0), (500.0, 20.0)):
        tau = tv_model(Identity(), lam, sharpness).tau.item()
        assert tau == pytest.approx(1 / (lam + 8 * sharpness))


@given(exponent=st.floats(-3.5, 3.5), power=st.sampled_from([1.0, 2.0, 4.0]))
def test_best_weight_minimizes_error(exponent: float, power: float) -> None:
    """The weight is near the minimizer of a known error, and has three digits."""
    truth = normal(1, 1, 4, 4)

    def method(f: Tensor, weight: float) -> Tensor:
        distance = abs(math.log(weight) - exponent) ** (power / 2)
        return f + distance * torch.ones_like(f)

    weight = best_weight(method, truth, truth, math.exp(-4), math.exp(4))
    # The search ends when its bracket is 0.05 wide; a quartic is flat in single precision before that.
    assert abs(math.log(weight) - exponent) <= (0.06 if power < 4 else 0.2)
    assert weight == float(f"{weight:.3g}")
