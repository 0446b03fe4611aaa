"""Forward operators: exact adjoints, linearity, masks and blurs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import HEIGHT, WIDTH, Projections, normal
from torch import Tensor

from lib.operators import (
    CircularBlur,
    Identity,
    Mask,
    Operator,
    central_block_mask,
    diagonal_motion_kernel,
    top_rows_mask,
)

SEEDS = st.integers(0, 2**32 - 1)
BATCHES = st.lists(st.integers(1, 3), max_size=3).map(tuple)
SIDES = st.integers(1, 12)


@st.composite
def blurs(draw: st.DrawFn) -> tuple[CircularBlur, tuple[int, ...]]:
    """A blur with a random kernel, of even or odd sides, and a shape of images that are large enough."""
    p, q = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    height, width = p + draw(st.integers(0, 5)), q + draw(st.integers(0, 5))
    return CircularBlur(normal(p, q, seed=draw(SEEDS))), (*draw(BATCHES), height, width)


@st.composite
def masks(draw: st.DrawFn) -> tuple[Mask, tuple[int, ...]]:
    height, width = draw(SIDES), draw(SIDES)
    mask = (normal(height, width, seed=draw(SEEDS)) > 0).double()
    return Mask(mask), (*draw(BATCHES), height, width)


OTHERS = st.tuples(st.sampled_from([Projections(), Identity()]), st.just((3, 1, HEIGHT, WIDTH)))


@given(blurs() | masks() | OTHERS, SEEDS)
def test_operator_is_linear_and_adjoint_passes_inner_product(
    drawn: tuple[Operator, tuple[int, ...]], seed: int
) -> None:
    """`<K u, v> = <u, K^T v>`, `K (2 u - 3 w) = 2 K u - 3 K w`, and `normal` is `K^T K`."""
    K, shape = drawn
    u, w = normal(2, *shape, seed=seed)
    Ku = K.forward(u)
    v = normal(*Ku.shape, seed=seed + 1)
    Ktv = K.adjoint(v)
    assert Ktv.shape == u.shape
    gap = (Ku * v).sum() - (u * Ktv).sum()
    assert gap.abs() <= 1e-12 * (Ku.norm() * v.norm() + u.norm() * Ktv.norm())
    expected = 2 * Ku - 3 * K.forward(w)
    torch.testing.assert_close(K.forward(2 * u - 3 * w), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(K.normal(u), K.adjoint(Ku), rtol=1e-11, atol=1e-11)


@given(blurs(), SEEDS)
def test_blur_is_circular_convolution(drawn: tuple[CircularBlur, tuple[int, ...]], seed: int) -> None:
    """`K u` is the sum of copies of `u`, shifted by the offset of each entry from the centre."""
    K, shape = drawn
    u = normal(*shape, seed=seed)
    p, q = K.kernel.shape
    forward = torch.zeros_like(u)
    for i in range(p):
        for j in range(q):
            forward += K.kernel[i, j] * u.roll((i - p // 2, j - q // 2), dims=(-2, -1))
    torch.testing.assert_close(K.forward(u), forward, rtol=1e-11, atol=1e-11)


def test_blur_accepts_any_size_and_precision() -> None:
    kernel = normal(3, 4)
    shared = CircularBlur(kernel)
    for height, width in ((6, 7), (7, 6), (6, 7)):
        for dtype in (torch.float64, torch.float32):
            u = normal(height, width, seed=1).to(dtype)
            assert shared.forward(u).dtype == dtype
            assert torch.equal(shared.forward(u), CircularBlur(kernel).forward(u))


@pytest.mark.parametrize("size", [5, 11])
def test_motion_blur_averages_along_diagonal(size: int) -> None:
    """One bright pixel becomes a centred diagonal of `size` equal pixels."""
    u = torch.zeros(28, 28, dtype=torch.float64)
    u[14, 14] = 1
    expected = torch.zeros_like(u)
    for offset in range(-(size // 2), size // 2 + 1):
        expected[14 + offset, 14 + offset] = 1 / size
    kernel = diagonal_motion_kernel(size).double()
    torch.testing.assert_close(CircularBlur(kernel).forward(u), expected, rtol=0, atol=1e-7)


@given(st.integers(1, 300), st.integers(1, 300))
def test_top_rows_mask_removes_third_rounded_up(height: int, width: int) -> None:
    mask = top_rows_mask(height, width)
    removed = int((mask == 0).all(1).sum())
    assert 3 * removed >= height > 3 * (removed - 1)
    assert mask.sum() == (height - removed) * width
    assert mask[:removed].eq(0).all()


@given(st.integers(4, 300), st.integers(4, 300))
def test_central_block_mask_removes_quarter_of_each_side(height: int, width: int) -> None:
    """The removed pixels are a rectangle, with equal margins up to one pixel."""
    removed = central_block_mask(height, width) == 0
    rows, columns = removed.any(1).nonzero().flatten(), removed.any(0).nonzero().flatten()
    for inside, side in ((rows, height), (columns, width)):
        before, after = int(inside[0]), side - 1 - int(inside[-1])
        assert len(inside) == side // 4 == side - before - after
        assert 0 <= after - before <= 1
    assert removed.sum() == len(rows) * len(columns)


def test_images_of_wrong_size_are_rejected() -> None:
    image: Tensor = torch.zeros(4, 28)
    with pytest.raises(ValueError, match="at least the kernel's 5x5 pixels, got 4x28"):
        CircularBlur(diagonal_motion_kernel(5)).forward(image)
    with pytest.raises(ValueError, match=r"`mask` must be 0 or 1 at every pixel, got \[0.5, 1.0\]"):
        Mask(torch.tensor([[1.0, 0.5]]))
    with pytest.raises(ValueError, match="the mask's 5x5 pixels, got 4x28"):
        Mask(torch.ones(5, 5)).forward(image)
