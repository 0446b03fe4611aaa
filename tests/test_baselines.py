"""Baselines without learning: total variation, the choice of its weight, and harmonic inpainting."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from lib.experiments import data
from lib.experiments.problem import psnr
from lib.figures.baselines import (
    DIFFERENCES_NORM,
    best_weight,
    chambolle,
    harmonic_inpainting,
    tv_model,
    tv_reconstruction,
)
from lib.kernels import difference_kernels, spectral_norm
from lib.operators import CircularBlur, Identity, central_block_mask, diagonal_motion_kernel
from lib.solvers import Anderson, fixed_point

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def piece() -> tuple[Tensor, Tensor]:
    """A piece of a face and the same with noise."""
    truth = data.faces("test", 1)[..., 30:70, 28:64]
    return truth, truth + 0.15 * normal(*truth.shape)


def decibels(images: Tensor, truth: Tensor) -> float:
    return psnr((images - truth).square().mean()).item()


def variation(images: Tensor) -> float:
    """Sum of the moduli of the differences of neighbours."""
    return sum(images.diff(dim=axis).abs().sum().item() for axis in (-2, -1))


def test_both_denoise_alike() -> None:
    """With the best weight of each, ours and scikit-image's are within 0.5 dB, and far above the data."""
    truth, f = piece()
    ours = tv_reconstruction(Identity(), tol=1e-4, max_steps=200)
    best = {
        "scikit-image": decibels(chambolle(f, best_weight(chambolle, f, truth, 0.01, 1.0)), truth),
        "ours": decibels(ours(f, best_weight(ours, f, truth, 1.0, 100.0)), truth),
    }
    assert abs(best["scikit-image"] - best["ours"]) <= 0.5
    assert min(best.values()) > decibels(f, truth) + 2


def test_the_weight_of_scikit_image_smooths() -> None:
    _, f = piece()
    smoother = [variation(chambolle(f, weight)) for weight in (1e-4, 0.03, 0.1, 0.3, 1.0)]
    assert smoother == sorted(smoother, reverse=True)
    assert smoother[0] == pytest.approx(variation(f), rel=0.01)
    assert smoother[-1] < 0.3 * smoother[0]


def test_lambda_keeps_the_data() -> None:
    """Ours smooths less with a larger `lambda`, and in the end not at all."""
    _, f = piece()
    method = tv_reconstruction(Identity(), tol=1e-4, max_steps=300)
    rougher = [variation(method(f, weight)) for weight in (1.0, 3.0, 10.0, 100.0, 1e5)]
    assert rougher == sorted(rougher)
    assert rougher[0] < 0.3 * variation(f)
    assert rougher[-1] == pytest.approx(variation(f), rel=0.01)


def test_images_of_a_batch_are_denoised_alone() -> None:
    """The shapes are kept, and a batch gives what its images give."""
    _, f = piece()
    batch = torch.cat([f, f.flip(-1), 0.5 * f])
    for method, weight in ((chambolle, 0.1), (tv_reconstruction(Identity()), 10.0)):
        whole = method(batch, weight)
        assert whole.shape == batch.shape
        assert whole.dtype == batch.dtype
        for image, alone in zip(batch, whole, strict=True):
            torch.testing.assert_close(method(image[None], weight)[0], alone, rtol=0, atol=2e-3)


def test_the_solution_minimises_the_energy() -> None:
    """Less energy than the data, than any neighbour in random directions, and no gradient is left."""
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


def test_the_energy_is_anisotropic_total_variation() -> None:
    """Its regularizer is the sum of the moduli of the forward differences, with zeros behind the border."""
    u = piece()[0].double()
    padded = torch.nn.functional.pad(u, (0, 1, 0, 1))
    moduli = padded.diff(dim=-1)[..., :-1, :].abs().sum() + padded.diff(dim=-2)[..., :-1].abs().sum()
    model = tv_model(Identity(), 1.0, sharpness=1e6).double()
    assert model.lower_level(u, u).item() == pytest.approx(moduli.item(), rel=1e-3)


def test_the_step_of_total_variation_is_the_longest_that_is_safe() -> None:
    """The norm of the differences is approached from below by large images, and the step is `1 / L`."""
    norm = spectral_norm(difference_kernels(1, 2, 3), normal(1, 1, 64, 64), 3000)[0].item()
    assert 0.995 * DIFFERENCES_NORM < norm <= DIFFERENCES_NORM * (1 + 1e-6)
    for lam, sharpness in ((1.0, 100.0), (500.0, 20.0)):
        tau = tv_model(Identity(), lam, sharpness).tau.item()
        assert tau == pytest.approx(1 / (lam + 8 * sharpness))


def test_deblurring_recovers_a_piecewise_constant_image() -> None:
    """Its corners are sharp again: 5 dB and more above the blurred data."""
    truth = -0.5 * torch.ones(1, 1, 32, 32)
    truth[..., 8:22, 6:18] = 0.6
    truth[..., 18:28, 20:29] = 0.1
    operator = CircularBlur(diagonal_motion_kernel(7))
    f = operator.forward(truth) + 0.01 * normal(*truth.shape)
    u = tv_reconstruction(operator, tol=1e-4, max_steps=300)(f, 300.0)
    assert decibels(u, truth) > decibels(f, truth) + 5


@given(exponent=st.floats(-3.5, 3.5), power=st.sampled_from([1.0, 2.0, 4.0]))
def test_the_best_weight_is_found(exponent: float, power: float) -> None:
    """Of an error with one known minimum, to 5 %; and the number has three digits."""
    truth = normal(1, 1, 4, 4)

    def method(f: Tensor, weight: float) -> Tensor:
        distance = abs(math.log(weight) - exponent) ** (power / 2)
        return f + distance * torch.ones_like(f)

    weight = best_weight(method, truth, truth, math.exp(-4), math.exp(4))
    # The search ends when its bracket is 0.05 wide; a quartic is flat in single precision before that.
    assert abs(math.log(weight) - exponent) <= (0.06 if power < 4 else 0.2)
    assert weight == float(f"{weight:.3g}")


def test_the_best_weight_stays_in_its_range() -> None:
    """A method that is the better the larger its weight gets nearly the largest one, never a larger one."""
    truth = torch.zeros(1, 1, 4, 4)
    asked = []

    def method(f: Tensor, weight: float) -> Tensor:
        asked.append(weight)
        return torch.full_like(f, 1 / weight)

    assert 0.9 * 50 <= best_weight(method, truth, truth, 2.0, 50.0) <= 50
    assert min(asked) >= 2
    assert max(asked) <= 50


def test_the_best_weight_compares_with_the_truth() -> None:
    """The method is given the data, and its error is the one against the true images."""
    truth, f = normal(2, 1, 5, 5), normal(2, 1, 5, 5, seed=3)

    def method(given: Tensor, weight: float) -> Tensor:
        assert given is f
        return truth + abs(math.log(weight / 7))

    assert best_weight(method, f, truth, 0.1, 100.0) == pytest.approx(7, rel=0.05)


def affine(height: int, width: int) -> Tensor:
    rows, columns = torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64)
    return (0.3 - 0.02 * rows[:, None] + 0.05 * columns)[None, None]


def test_affine_images_are_filled_exactly() -> None:
    """In a block, and in scattered pixels, that do not touch the border."""
    u = affine(13, 11)
    scattered = torch.ones(13, 11)
    scattered[1:-1, 1:-1] = (normal(11, 9) > 0).float()
    for mask in (central_block_mask(13, 11), scattered):
        filled = harmonic_inpainting(u * mask + 9 * (1 - mask), mask)
        torch.testing.assert_close(filled, u, rtol=0, atol=1e-12)


def test_a_harmonic_image_is_filled_exactly() -> None:
    """`i^2 - j^2` and `i j` solve the discrete equation too; `i^2` does not."""
    i = torch.arange(9.0).double().view(1, 1, 9, 1).expand(1, 1, 9, 8)
    j = torch.arange(8.0).double().expand(1, 1, 9, 8)
    mask = central_block_mask(9, 8)
    mask[2:6, 2:5] = 0
    for u in (i * i - j * j, i * j):
        torch.testing.assert_close(harmonic_inpainting(u, mask), u, rtol=0, atol=1e-11)
    assert (harmonic_inpainting(i * i, mask) - i * i).abs().max() > 1


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Images and a mask, whose lost pixels may be anywhere, but not everywhere."""
    height, width = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    lost = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = 1 - torch.tensor(lost, dtype=torch.float32).view(height, width)
    assume(0 < mask.sum() < mask.numel())
    return normal(draw(st.integers(1, 3)), 1, height, width, seed=draw(st.integers(0, 99))).double(), mask


@given(problem=problems())
def test_lost_pixels_are_means_of_their_neighbours(problem: tuple[Tensor, Tensor]) -> None:
    """Of those in the image; known pixels are untouched, and lie around all that is filled in."""
    f, mask = problem
    before = f.clone()
    filled = harmonic_inpainting(f, mask)
    assert torch.equal(f, before)
    assert filled.shape == f.shape
    assert filled.dtype == f.dtype
    known = mask == 1
    assert torch.equal(filled[..., known], f[..., known])
    for u, data_of_it in zip(filled[:, 0].numpy(), f[:, 0].numpy(), strict=True):
        padded = np.pad(u, 1)
        inside = np.pad(np.ones_like(u), 1)
        total, number = (p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:] for p in (padded, inside))
        lost = ~known.numpy()
        np.testing.assert_allclose(u[lost] * number[lost], total[lost], rtol=0, atol=1e-9)
        least, most = data_of_it[~lost].min(), data_of_it[~lost].max()
        assert least - 1e-9 <= u[lost].min()
        assert u[lost].max() <= most + 1e-9


def test_what_lies_in_the_mask_has_no_effect() -> None:
    """Single precision comes back as such, whatever the lost pixels were."""
    mask = torch.ones(10, 12)
    mask[:4] = 0  # touches three sides
    f = normal(2, 1, 10, 12)
    filled = harmonic_inpainting(f, mask)
    assert filled.dtype == torch.float32
    assert torch.equal(filled, harmonic_inpainting(torch.where(mask == 1, f, 1e3), mask))


def test_lost_rows_at_the_border_take_the_value_next_to_them() -> None:
    """Nothing is known beyond the border, and no zeros are taken to be there: a constant stays one."""
    mask = torch.ones(6, 5)
    mask[:3] = 0
    mask[4, 4] = 0
    u = torch.full((1, 1, 6, 5), 0.7, dtype=torch.float64)
    torch.testing.assert_close(harmonic_inpainting(u * mask, mask), u, rtol=0, atol=1e-12)
