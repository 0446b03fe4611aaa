"""Convolution kernels: block products against torch's convolutions, adjoints, norms, initial values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import image_norm, normal
from torch import Tensor
from torch.nn import functional

from lib.kernels import (
    block_side,
    correlate,
    correlate_adjoint,
    cosine_kernels,
    count_differences,
    difference_kernels,
    spectral_norm,
)

SIDES = (3, 5, 7, 11)
EVERY_SIDE = pytest.mark.parametrize("k", SIDES)
IMAGE_SIDES = st.integers(1, 20)
FILTERS = st.sampled_from([1, 2, 3, 16])
SEEDS = st.integers(0, 2**32 - 1)
STACKS = st.lists(st.integers(1, 3), max_size=2).map(tuple)


def layout(k: int, filters: int, height: int, width: int) -> tuple[int, int]:
    """Return the last two dimensions of the experts of an image, block by block."""
    r = block_side(filters, k)
    return filters * r * r, math.ceil(height / r) * math.ceil(width / r)


def as_images(z: Tensor, k: int, filters: int, height: int, width: int) -> Tensor:
    """Return experts as images `(..., F, H, W)` that are whole blocks."""
    r = block_side(filters, k)
    grid = z.unflatten(-1, (math.ceil(height / r), math.ceil(width / r))).unflatten(-3, (-1, r, r))
    return grid.movedim((-2, -1), (-4, -2)).flatten(-4, -3).flatten(-2)


def convolved(kernels: Tensor, u: Tensor) -> Tensor:
    """Return `A u` by torch for kernels `(F, k, k)` and images `(N, 1, H, W)`."""
    return functional.conv2d(u, kernels[:, None], padding=kernels.shape[-1] // 2)


@EVERY_SIDE
@given(IMAGE_SIDES, IMAGE_SIDES, FILTERS, st.integers(1, 3), SEEDS)
@settings(max_examples=30)
def test_analysis_matches_torch_convolution(
    k: int, height: int, width: int, filters: int, batch: int, seed: int
) -> None:
    """Images smaller or larger than the kernel, zero outside, with gradients."""
    kernels = normal(filters, k, k, seed=seed).requires_grad_()
    u = normal(batch, 1, height, width, seed=seed + 1).requires_grad_()
    z = correlate(kernels, u)
    assert z.shape == (batch, *layout(k, filters, height, width))
    images = as_images(z, k, filters, height, width)
    expected = convolved(kernels, u)
    torch.testing.assert_close(images[..., :height, :width], expected, rtol=1e-11, atol=1e-11)
    assert not images[..., height:, :].any()
    assert not images[..., width:].any()
    ours = torch.autograd.grad(z.sin().square().sum(), (kernels, u))
    theirs = torch.autograd.grad(expected.sin().square().sum(), (kernels, u))
    for gradient, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-9, atol=1e-9)


@EVERY_SIDE
@given(IMAGE_SIDES, IMAGE_SIDES, st.integers(1, 4), STACKS, SEEDS)
@settings(max_examples=30)
def test_synthesis_passes_inner_product(
    k: int, height: int, width: int, filters: int, stack: tuple[int, ...], seed: int
) -> None:
    """`<A u, z> = <u, A^T z>` for arbitrary experts, every member of a stack and image of a batch."""
    kernels = normal(*stack, filters, k, k, seed=seed)
    u = normal(*stack, 2, 1, height, width, seed=seed + 1)
    z = normal(*stack, 2, *layout(k, filters, height, width), seed=seed + 2)
    left = (correlate(kernels, u) * z).sum((-2, -1))
    right = (u * correlate_adjoint(kernels, z, height, width)).sum((-3, -2, -1))
    assert left.shape == (*stack, 2)
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@given(st.sampled_from(SIDES), st.integers(2, 14), st.integers(2, 14), st.integers(1, 3), SEEDS)
@settings(max_examples=10)
def test_spectral_norm_is_largest_singular_value(
    k: int, height: int, width: int, filters: int, seed: int
) -> None:
    """The norm increases with the iterations, and the returned image attains it."""
    kernels = normal(filters, k, k, seed=seed)
    exact = image_norm(kernels, height, width).item()
    start, norms = normal(1, 1, height, width, seed=seed + 1), []
    for iterations in (0, 1, 5, 20, 300):
        norm, direction = spectral_norm(kernels, start, iterations)
        assert direction.norm().item() == pytest.approx(1, rel=1e-12)
        assert convolved(kernels, direction).norm().item() == pytest.approx(norm.item(), rel=1e-11)
        norms.append(norm.item())
    assert all(before <= after * (1 + 1e-11) for before, after in itertools.pairwise(norms))
    assert norms[-1] <= exact * (1 + 1e-11)
    assert norms[-1] == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(("height", "width"), [(1, 2), (3, 8), (12, 9)])
@pytest.mark.parametrize("k", [3, 11])
def test_spectral_norm_of_gradient_matches_closed_form(k: int, height: int, width: int) -> None:
    """With `u = 0` outside, forward differences of `n` pixels have the norm `2 cos(pi / (2n + 1))`."""
    expected = math.hypot(*(2 * math.cos(math.pi / (2 * n + 1)) for n in (height, width)))
    norm, _ = spectral_norm(difference_kernels(1, 2, k).double(), normal(1, 1, height, width), 500)
    assert norm.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3])
def test_spectral_norm_satisfies_tolerance(tol: float) -> None:
    """`||A^T A v - s v|| <= tol s`, and the norm has a relative error of at most `tol`."""
    kernels, start = normal(2, 7, 7), normal(1, 1, 20, 17, seed=1)
    norm, v = spectral_norm(kernels, start, 500, tol)
    product = correlate_adjoint(kernels, correlate(kernels, v), 20, 17)
    squared = (product * v).sum()
    assert (product - squared * v).norm() <= tol * squared * (1 + 1e-9)
    exact = image_norm(kernels, 20, 17)
    assert (1 - tol) * exact <= norm <= (1 + 1e-11) * exact


def test_spectral_norm_converges_from_orthogonal_start() -> None:
    """A symmetric start is orthogonal to the maximizer of a kernel with alternating signs.

    Products with `A^T A` map symmetric images to symmetric ones, with a smaller singular value.
    """
    mean = torch.ones(1, 3, 3, dtype=torch.float64)
    signs = (-1.0) ** torch.arange(3, dtype=torch.float64)
    alternating = mean * signs[:, None] * signs
    _, symmetric = spectral_norm(mean, torch.ones(1, 1, 12, 10, dtype=torch.float64), 500)
    norm, maximizer = spectral_norm(alternating, symmetric, 200)
    assert norm.item() == pytest.approx(image_norm(alternating, 12, 10).item(), rel=1e-6)
    assert (maximizer * symmetric).sum().abs() < 1e-6


def test_spectral_norm_of_zero_is_zero() -> None:
    zero, _ = spectral_norm(torch.zeros(2, 3, 3), torch.ones(1, 1, 5, 5), 10)
    assert zero.item() == 0


@EVERY_SIDE
def test_first_differences_are_forward_differences(k: int) -> None:
    u = normal(1, 1, 9, 8)
    padded = functional.pad(u, (0, 1, 0, 1))[0, 0]
    expected = torch.stack([padded[:-1, 1:], padded[1:, :-1]]) - u[0, 0]
    assert torch.equal(convolved(difference_kernels(1, 2, k).double(), u)[0], expected)


@EVERY_SIDE
@pytest.mark.parametrize("order", [1, 2])
def test_differences_are_distinct_and_annihilate_polynomials(order: int, k: int) -> None:
    """Constants, and affine images for the second order, away from the border."""
    kernels = difference_kernels(order, 30, k)
    flat = functional.normalize(kernels.flatten(1))
    assert (flat @ flat.T).fill_diagonal_(0).abs().max() < 1 - 1e-3
    rows, columns = torch.meshgrid(*[torch.arange(25, dtype=torch.float64)] * 2, indexing="ij")
    images = {0: torch.ones_like(rows), 1: 2 * rows - 3 * columns + 5, 2: rows**2 + 3 * columns**2}
    for degree, image in images.items():
        inner = convolved(kernels.double(), image[None, None])[0, :, k // 2 : -(k // 2), k // 2 : -(k // 2)]
        assert inner.any() == (degree >= order)


def test_smallest_kernel_has_36_first_differences() -> None:
    """One for each pair of its nine pixels."""
    kernels = difference_kernels(1, count_differences(1, 3), 3)
    pairs = {tuple(kernel.flatten().nonzero().flatten().tolist()) for kernel in kernels}
    assert pairs == set(itertools.combinations(range(9), 2))
    with pytest.raises(ValueError, match=r"^`count` must be at most 36 for kernels of 3x3, got 37\.$"):
        difference_kernels(1, 37, 3)


@pytest.mark.parametrize("side", [3, 5])
def test_cosine_kernels_match_scipy(side: int) -> None:
    """Orthonormal kernels without the constant, each frequency once, low ones first."""
    kernels = cosine_kernels(side**2 - 1, side)
    flat = kernels.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(side**2 - 1))
    spectra = scipy.fft.dctn(kernels.numpy(), axes=(1, 2), norm="ortho")
    frequencies = [np.unravel_index(abs(spectrum).argmax(), spectrum.shape) for spectrum in spectra]
    for spectrum, frequency in zip(spectra, frequencies, strict=True):
        assert spectrum[frequency] == pytest.approx(1, abs=1e-5)
    assert len(set(frequencies)) == side**2 - 1
    assert [sum(frequency) for frequency in frequencies] == sorted(sum(f) for f in frequencies)
    assert torch.equal(cosine_kernels(4, side), kernels[:4])
