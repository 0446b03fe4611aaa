"""Convolution kernels: block products against torch's convolutions, exact adjoints, norms, first values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lib.kernels import (
    NEIGHBOURS,
    block_side,
    correlate,
    correlate_adjoint,
    difference_kernels,
    initial_kernels,
    most_kernels,
    spectral_norm,
)

pytestmark = pytest.mark.usefixtures("one_thread")

KERNEL_SIDES = (3, 5, 7, 9, 11)
EVERY_KERNEL_SIDE = pytest.mark.parametrize("k", KERNEL_SIDES)
IMAGE_SIDES = st.integers(1, 20)
SEEDS = st.integers(0, 2**32 - 1)
STACKS = st.lists(st.integers(1, 3), max_size=2).map(tuple)
ORDERS = {"first": 1, "second": 2}


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def padded_to(side: int, r: int) -> int:
    """The first multiple of `r` that is at least `side`."""
    return math.ceil(side / r) * r


def layout(k: int, filters: int, height: int, width: int) -> tuple[int, int]:
    """The last two dimensions of all experts of an image, block by block."""
    r = block_side(k)
    return filters * r * r, math.ceil(height / r) * math.ceil(width / r)


def as_images(z: Tensor, k: int, height: int, width: int) -> Tensor:
    """Experts as images `(..., F, H, W)` that are whole blocks, whose rows and columns beyond are kept."""
    r = block_side(k)
    rows, columns = padded_to(height, r) // r, padded_to(width, r) // r
    grid = z.unflatten(-1, (rows, columns)).unflatten(-3, (-1, r, r))
    return grid.movedim((-2, -1), (-4, -2)).flatten(-4, -3).flatten(-2)


def as_blocks(images: Tensor, k: int) -> Tensor:
    """The inverse of `as_images`, of images that are whole blocks."""
    r = block_side(k)
    grid = images.unflatten(-1, (-1, r)).unflatten(-3, (-1, r))
    return grid.movedim((-4, -2), (-2, -1)).flatten(-2).flatten(-4, -2)


def convolved(kernels: Tensor, u: Tensor) -> Tensor:
    """`A u` by torch, for one set of kernels `(F, k, k)` and images `(N, 1, H, W)`."""
    return functional.conv2d(u, kernels[:, None], padding=kernels.shape[-1] // 2)


def dense_matrix(kernels: Tensor, height: int, width: int) -> Tensor:
    """The operator `A` on images of this size as a matrix."""
    basis = torch.eye(height * width, dtype=kernels.dtype).view(-1, 1, height, width)
    return convolved(kernels, basis).flatten(1).T


@EVERY_KERNEL_SIDE
@given(IMAGE_SIDES, IMAGE_SIDES, st.integers(1, 4), st.integers(1, 3), SEEDS)
@settings(max_examples=40)
def test_analysis_is_torchs_convolution(
    k: int, height: int, width: int, filters: int, batch: int, seed: int
) -> None:
    """`A u` of any image, smaller or larger than the kernel, is conv2d's, and zero outside the image."""
    kernels, u = normal((filters, k, k), seed), normal((batch, 1, height, width), seed + 1)
    z = correlate(kernels, u)
    assert z.shape == (batch, *layout(k, filters, height, width))
    images = as_images(z, k, height, width)
    torch.testing.assert_close(images[..., :height, :width], convolved(kernels, u), rtol=1e-12, atol=1e-12)
    assert not images[..., height:, :].any()
    assert not images[..., width:].any()
    assert torch.equal(as_blocks(images, k), z)


@EVERY_KERNEL_SIDE
@given(IMAGE_SIDES, IMAGE_SIDES, st.integers(1, 4), st.integers(1, 3), SEEDS)
@settings(max_examples=40)
def test_synthesis_is_torchs_transposed_convolution(
    k: int, height: int, width: int, filters: int, batch: int, seed: int
) -> None:
    """`A^T z` is conv_transpose2d's, whatever `z` has in its blocks beyond the image."""
    r = block_side(k)
    kernels = normal((filters, k, k), seed)
    z = normal((batch, filters, padded_to(height, r), padded_to(width, r)), seed + 1)
    inside = z[..., :height, :width]
    expected = functional.conv_transpose2d(inside, kernels[:, None], padding=k // 2)
    image = correlate_adjoint(kernels, as_blocks(z, k), height, width)
    torch.testing.assert_close(image, expected, rtol=1e-12, atol=1e-12)


@EVERY_KERNEL_SIDE
@given(IMAGE_SIDES, IMAGE_SIDES, st.integers(1, 4), STACKS, SEEDS)
@settings(max_examples=40)
def test_synthesis_is_the_exact_adjoint(
    k: int, height: int, width: int, filters: int, stack: tuple[int, ...], seed: int
) -> None:
    """`<A u, z> = <u, A^T z>` for arbitrary experts, of every member of a stack and image of a batch."""
    kernels = normal((*stack, filters, k, k), seed)
    u = normal((*stack, 2, 1, height, width), seed + 1)
    z = normal((*stack, 2, *layout(k, filters, height, width)), seed + 2)
    left = (correlate(kernels, u) * z).sum((-2, -1))
    right = (u * correlate_adjoint(kernels, z, height, width)).sum((-3, -2, -1))
    assert left.shape == (*stack, 2)
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("k", "height", "width"), [(3, 4, 6), (5, 7, 4), (7, 3, 12), (11, 17, 9)])
def test_products_of_a_stack_are_those_of_its_members(k: int, height: int, width: int) -> None:
    """Every member's own kernels meet its own images, with one or two leading dimensions."""
    for stack in ((3,), (2, 3)):
        kernels, u = normal((*stack, 2, k, k), 0), normal((*stack, 4, 1, height, width), 1)
        z = correlate(kernels, u)
        image = correlate_adjoint(kernels, z, height, width)
        assert image.shape == u.shape
        for i in itertools.product(*map(range, stack)):
            alone = correlate(kernels[i], u[i])
            torch.testing.assert_close(z[i], alone, rtol=1e-13, atol=1e-13)
            alone = correlate_adjoint(kernels[i], z[i], height, width)
            torch.testing.assert_close(image[i], alone, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("k", "height", "width"), [(3, 3, 4), (5, 4, 3), (7, 3, 6), (11, 2, 3)])
def test_products_have_the_gradients_of_finite_differences(k: int, height: int, width: int) -> None:
    """With respect to kernels, images and experts, for a stack of two."""
    kernels = normal((2, 2, k, k), 0).requires_grad_()
    u = normal((2, 1, 1, height, width), 1).requires_grad_()
    z = normal((2, 1, *layout(k, 2, height, width)), 2).requires_grad_()

    def both(kernels: Tensor, u: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return correlate(kernels, u).square().sum(-1), correlate_adjoint(kernels, z, height, width)

    assert torch.autograd.gradcheck(both, (kernels, u, z), fast_mode=True)


@pytest.mark.parametrize(("k", "height", "width"), [(3, 5, 6), (11, 9, 14), (11, 16, 8)])
def test_gradients_are_those_of_torchs_convolution(k: int, height: int, width: int) -> None:
    """A nonlinear function of `A u` has the gradients that conv2d gives it, for kernels and for images."""
    kernels = normal((3, k, k), 0).requires_grad_()
    u = normal((2, 1, height, width), 1).requires_grad_()
    ours = torch.autograd.grad(correlate(kernels, u).sin().square().sum(), (kernels, u))
    theirs = torch.autograd.grad(convolved(kernels, u).sin().square().sum(), (kernels, u))
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-11)


@EVERY_KERNEL_SIDE
def test_single_precision_is_near_double_precision(k: int) -> None:
    """The same products in float32 keep their type, and the accuracy of float32."""
    kernels, u = normal((2, k, k), 0), normal((2, 1, 13, 10), 1)
    z = correlate(kernels.float(), u.float())
    assert z.dtype == torch.float32
    exact = correlate(kernels, u)
    assert (z - exact).norm() < 1e-6 * exact.norm()
    image = correlate_adjoint(kernels.float(), z, 13, 10)
    assert image.dtype == torch.float32
    exact = correlate_adjoint(kernels, exact, 13, 10)
    assert (image - exact).norm() < 1e-6 * exact.norm()


@given(st.sampled_from(KERNEL_SIDES), st.integers(2, 14), st.integers(2, 14), st.integers(1, 3), SEEDS)
def test_norm_is_the_largest_singular_value(k: int, height: int, width: int, filters: int, seed: int) -> None:
    """The search comes to the dense operator's norm, from below, and to a direction that attains it."""
    kernels = normal((filters, k, k), seed)
    exact = torch.linalg.svdvals(dense_matrix(kernels, height, width))[0]
    start = normal((1, 1, height, width), seed + 1)
    norms = []
    for iterations in (0, 1, 5, 20, 1000):
        norm, direction = spectral_norm(kernels, start, iterations)
        assert norm.shape == ()
        assert direction.shape == start.shape
        assert direction.norm().item() == pytest.approx(1, rel=1e-12)
        attained = convolved(kernels, direction).norm().item()
        assert attained == pytest.approx(norm.item(), rel=1e-12)
        norms.append(norm.item())
    assert all(before <= after * (1 + 1e-12) for before, after in itertools.pairwise(norms))
    assert norms[-1] <= exact.item() * (1 + 1e-12)
    assert norms[-1] == pytest.approx(exact.item(), rel=1e-3)


@pytest.mark.parametrize(("height", "width"), [(1, 2), (3, 8), (12, 9)])
@pytest.mark.parametrize("k", [3, 11])
def test_norm_of_the_gradient_is_the_known_one(k: int, height: int, width: int) -> None:
    """With `u = 0` outside, forward differences of `n` pixels have the norm `2 cos(pi / (2n + 1))`."""
    expected = math.hypot(*(2 * math.cos(math.pi / (2 * n + 1)) for n in (height, width)))
    kernels = difference_kernels(1, 2, k).double()
    norm, _ = spectral_norm(kernels, normal((1, 1, height, width), 0), 500)
    assert norm.item() == pytest.approx(expected, rel=1e-4)


def test_norm_is_each_members_own() -> None:
    """A stack of kernels has a stack of norms and of directions, of the members' own sizes."""
    kernels = normal((3, 2, 2, 5, 5), 0) * torch.tensor([1.0, 1e-3, 1e3])[:, None, None, None, None]
    start = normal((3, 2, 1, 1, 9, 7), 1)
    norms, directions = spectral_norm(kernels, start, 50)
    assert norms.shape == (3, 2)
    assert directions.shape == start.shape
    for i in itertools.product(range(3), range(2)):
        norm, direction = spectral_norm(kernels[i], start[i], 50)
        assert norms[i].item() == pytest.approx(norm.item(), rel=1e-12)
        torch.testing.assert_close(directions[i], direction, rtol=1e-10, atol=1e-10)


def test_norm_is_that_on_images_and_not_on_patches() -> None:
    """It grows with the image to the transfer function's; that of a small patch is far smaller."""
    kernels = normal((2, 11, 11), 0)
    limit = torch.fft.fft2(kernels, s=(256, 256)).abs().square().sum(0).max().sqrt().item()
    norms = [
        spectral_norm(kernels, normal((1, 1, side, side), 1), 200)[0].item() / limit
        for side in (5, 13, 24, 48)
    ]
    assert norms == sorted(norms)
    assert norms[0] < 0.6
    assert norms[1] < 0.8
    assert 0.93 < norms[-1] < 1


def test_norm_goes_on_from_the_last_direction() -> None:
    """Going on comes nearer to the norm; after a small change of the kernels few products are enough."""
    kernels, start = normal((2, 7, 7), 0), normal((1, 1, 20, 17), 1)
    halfway, direction = spectral_norm(kernels, start, 15)
    onwards, _ = spectral_norm(kernels, direction, 15)
    assert halfway < onwards <= (1 + 1e-12) * torch.linalg.svdvals(dense_matrix(kernels, 20, 17))[0]
    _, direction = spectral_norm(kernels, start, 500)
    changed = kernels + 0.01 * normal((2, 7, 7), 2)
    exact = torch.linalg.svdvals(dense_matrix(changed, 20, 17))[0]
    warm, cold = spectral_norm(changed, direction, 1)[0], spectral_norm(changed, start, 1)[0]
    assert cold < warm < exact
    assert (1 - 1e-4) * exact < spectral_norm(changed, direction, 10)[0] <= (1 + 1e-12) * exact


@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3])
def test_the_search_for_the_norm_ends_at_its_tolerance(tol: float) -> None:
    """`A^T A v` is then `||A v||^2 v` up to the tolerance, and that took no more products than it needs."""
    kernels, start = normal((2, 7, 7), 0), normal((1, 1, 20, 17), 1)

    def residual(v: Tensor) -> float:
        product = correlate_adjoint(kernels, correlate(kernels, v), 20, 17)
        squared = (product * v).sum()
        return ((product - squared * v).norm() / squared).item()

    norm, direction = spectral_norm(kernels, start, 500, tol)
    assert residual(direction) <= tol * (1 + 1e-9)
    counts = range(8, 500, 8)
    needed = next(n for n in counts if residual(spectral_norm(kernels, start, n)[1]) <= tol)
    assert torch.equal(direction, spectral_norm(kernels, start, needed)[1])
    exact = torch.linalg.svdvals(dense_matrix(kernels, 20, 17))[0]
    assert (1 - tol) * exact <= norm <= (1 + 1e-12) * exact


def test_norm_is_found_from_a_direction_that_is_orthogonal_to_the_worst_one() -> None:
    """The worst image of a mean is symmetric, that of a mean with alternating signs is antisymmetric.

    Products with `A^T A` never leave the symmetric images, and would take the second largest singular value.
    """
    mean = torch.ones(1, 3, 3, dtype=torch.float64)
    signs = (-1.0) ** torch.arange(3, dtype=torch.float64)
    alternating = mean * signs[:, None] * signs
    _, symmetric = spectral_norm(mean, torch.ones(1, 1, 12, 10, dtype=torch.float64), 500)
    singular = torch.linalg.svdvals(dense_matrix(alternating, 12, 10))
    assert singular[1] < 0.96 * singular[0]
    norm, worst = spectral_norm(alternating, symmetric, 200)
    assert norm.item() == pytest.approx(singular[0].item(), rel=1e-6)
    assert abs((worst * symmetric).sum().item()) < 1e-6


def test_norm_of_kernels_that_are_zero_is_zero() -> None:
    """Not a NaN; and the norm is not a function that gradients flow through."""
    zero, _ = spectral_norm(torch.zeros(2, 3, 3), torch.ones(1, 1, 5, 5), 10)
    assert zero.item() == 0
    kernels = torch.ones(2, 3, 3, requires_grad=True)
    assert not spectral_norm(kernels, torch.ones(1, 1, 5, 5), 1)[0].requires_grad


@EVERY_KERNEL_SIDE
def test_the_first_differences_are_the_forward_ones(k: int) -> None:
    """Two kernels are the gradient: each pixel's right and lower neighbour minus itself."""
    kernels = difference_kernels(1, 2, k)
    assert kernels.shape == (2, k, k)
    u = normal((1, 1, 9, 8), 0)
    found = convolved(kernels.double(), u)[0]
    beyond = functional.pad(u, (0, 1, 0, 1))[0, 0]
    expected = torch.stack([beyond[:-1, 1:], beyond[1:, :-1]]) - u[0, 0]
    same = torch.equal(found, expected) or torch.equal(found, expected.flip(0))
    assert same


@EVERY_KERNEL_SIDE
@pytest.mark.parametrize("order", [1, 2])
def test_differences_are_distinct_and_have_the_sum_zero(order: int, k: int) -> None:
    """No two are equal up to their sign, and constants are mapped to zero."""
    kernels = difference_kernels(order, 30, k)
    assert torch.equal(kernels.sum((-2, -1)), torch.zeros(30))
    flat = functional.normalize(kernels.flatten(1))
    gram = flat @ flat.T - 2 * torch.eye(30)
    assert gram.abs().fill_diagonal_(0).max() < 1 - 1e-3
    sizes = {tuple(sorted(kernel[kernel != 0].tolist())) for kernel in kernels}
    allowed = {1: {(-1.0, 1.0)}, 2: {(-2.0, 1.0, 1.0), (-1.0, -1.0, 1.0, 1.0)}}
    assert sizes <= allowed[order]


@EVERY_KERNEL_SIDE
def test_second_differences_annihilate_affine_images(k: int) -> None:
    """Away from the border; first ones do not, and neither do second ones annihilate a quadratic image."""
    rows, columns = torch.meshgrid(*[torch.arange(25, dtype=torch.float64)] * 2, indexing="ij")
    affine = (2 * rows - 3 * columns + 5)[None, None]
    quadratic = (rows.square() + 3 * rows * columns + 5 * columns.square())[None, None]
    second = difference_kernels(2, 30, k).double()
    margin = k // 2

    def inner(kernels: Tensor, u: Tensor) -> Tensor:
        return convolved(kernels, u)[0, :, margin:-margin, margin:-margin]

    assert not inner(second, affine).any()
    assert inner(second, quadratic).abs().amin((-2, -1)).ge(1).all()
    assert inner(difference_kernels(1, 2, k).double(), affine).abs().amin((-2, -1)).tolist() == [3, 2]


def test_the_shortest_differences_come_first() -> None:
    """In a large kernel the first ones join neighbours near the centre, longer ones come later."""
    spreads = []
    for kernel in difference_kernels(1, 200, 11):
        (first, second) = kernel.nonzero().tolist()
        spreads.append(math.dist(first, second))
    assert spreads == sorted(spreads)
    for order in ORDERS.values():
        pixels = difference_kernels(order, 4, 11).abs().sum(0).nonzero()
        assert (pixels - 5).abs().max() <= 2


@pytest.mark.parametrize(("order", "side"), [(1, 3), (2, 3), (1, 5), (2, 5)])
def test_more_differences_than_there_are_are_refused(order: int, side: int) -> None:
    """The line names the parameter and says how many there are, which can all be had."""
    shortest = [(0, 0)] if order == 1 else NEIGHBOURS
    most = 0
    for d, e in itertools.product(NEIGHBOURS, shortest):
        if order == 1 or d <= e:
            corners = [(0, 0), d, e, (d[0] + e[0], d[1] + e[1])]
            spans = [max(c[axis] for c in corners) - min(c[axis] for c in corners) for axis in (0, 1)]
            most += math.prod(max(0, side - span) for span in spans)
    assert len({tuple(kernel.flatten().tolist()) for kernel in difference_kernels(order, most, side)}) == most
    message = f"^filters: got {most + 1}, allowed: at most {most} differences of {side}x{side}$"
    with pytest.raises(ValueError, match=message):
        difference_kernels(order, most + 1, side)


def test_all_pairs_of_pixels_are_first_differences_of_the_smallest_kernel() -> None:
    """There are 36 pairs of the nine pixels, enough for the paper's thirty kernels of 3x3."""
    kernels = difference_kernels(1, 36, 3)
    pairs = {tuple(sorted(kernel.flatten().nonzero().flatten().tolist())) for kernel in kernels}
    assert pairs == set(itertools.combinations(range(9), 2))


@pytest.mark.parametrize("kind", ORDERS)
def test_initial_differences_draw_nothing(kind: str) -> None:
    """They are the differences of their order, whatever the generator."""
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    kernels = initial_kernels(kind, 5, 7, generator)
    assert torch.equal(kernels, difference_kernels(ORDERS[kind], 5, 7))
    assert torch.equal(generator.get_state(), before)
    with pytest.raises(ValueError, match=r"^filters: got 1000, allowed: at most "):
        initial_kernels(kind, 1000, 3, generator)


@pytest.mark.parametrize("side", [3, 5])
def test_the_cosine_basis_is_scipys(side: int) -> None:
    """Orthonormal, without the constant, each frequency once and no higher one before a lower one."""
    most = most_kernels("cosine", side)
    kernels = initial_kernels("cosine", most, side, torch.Generator())
    flat = kernels.flatten(1)
    assert len(flat) == most == side**2 - 1
    torch.testing.assert_close(flat @ flat.T, torch.eye(most))
    torch.testing.assert_close(flat.sum(1), torch.zeros(most), rtol=0, atol=1e-6)
    spectra = scipy.fft.dctn(kernels.numpy(), axes=(1, 2), norm="ortho")
    found = [np.unravel_index(abs(spectrum).argmax(), spectrum.shape) for spectrum in spectra]
    for spectrum, frequency in zip(spectra, found, strict=True):
        assert spectrum[frequency] == pytest.approx(1, abs=1e-6)
    assert len(set(found)) == most
    assert [sum(frequency) for frequency in found] == sorted(sum(frequency) for frequency in found)
    assert torch.equal(initial_kernels("cosine", 4, side, torch.Generator()), kernels[:4])


def test_random_initial_kernels_are_standard_normal() -> None:
    """Of any number; the same generator gives the same ones, another one others."""
    kernels = initial_kernels("random", 1000, 11, torch.Generator().manual_seed(0))
    assert kernels.shape == (1000, 11, 11)
    assert abs(kernels.mean()) < 0.02
    assert kernels.std().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(kernels, initial_kernels("random", 1000, 11, torch.Generator().manual_seed(0)))
    assert not torch.equal(kernels, initial_kernels("random", 1000, 11, torch.Generator().manual_seed(1)))
