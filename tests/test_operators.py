"""Forward operators: exact adjoints, linearity, the paper's masks and blurs, agreement with DeepInverse."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib.operators import (
    TASKS,
    CircularBlur,
    Mask,
    Operator,
    central_block_mask,
    diagonal_motion_kernel,
    forward_operator,
    top_rows_mask,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = st.integers(0, 2**32 - 1)
BATCHES = st.lists(st.integers(1, 3), max_size=3).map(tuple)
SIDES = st.integers(1, 12)
PAPER_OPERATORS = [
    pytest.param(
        forward_operator(task, height, width, faces=faces), height, width, id=f"{task}-{height}x{width}"
    )
    for task in TASKS
    for height, width, faces in ((28, 28, False), (112, 92, True), (218, 178, True))
]


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def blurs(draw: st.DrawFn) -> tuple[CircularBlur, tuple[int, ...]]:
    """A blur with a random kernel, of even or odd sides, and an image shape that is large enough for it."""
    p, q = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    height, width = p + draw(st.integers(0, 5)), q + draw(st.integers(0, 5))
    return CircularBlur(normal((p, q), draw(SEEDS))), (*draw(BATCHES), height, width)


@st.composite
def masks(draw: st.DrawFn) -> tuple[Mask, tuple[int, ...]]:
    height, width = draw(SIDES), draw(SIDES)
    mask = (normal((height, width), draw(SEEDS)) > 0).double()
    return Mask(mask), (*draw(BATCHES), height, width)


def assert_adjoint(operator: Operator, u: Tensor, v: Tensor) -> None:
    Ku, Ktv = operator.forward(u), operator.adjoint(v)
    assert Ku.shape == Ktv.shape == u.shape
    gap = (Ku * v).sum() - (u * Ktv).sum()
    assert gap.abs() <= 1e-13 * (Ku.norm() * v.norm() + u.norm() * Ktv.norm())


def assert_linear(operator: Operator, u: Tensor, v: Tensor) -> None:
    expected = 2 * operator.forward(u) - 3 * operator.forward(v)
    torch.testing.assert_close(operator.forward(2 * u - 3 * v), expected, rtol=1e-12, atol=1e-12)


def assert_normal(operator: Operator, u: Tensor) -> None:
    expected = operator.adjoint(operator.forward(u))
    torch.testing.assert_close(operator.normal(u), expected, rtol=1e-12, atol=1e-12)


@given(blurs() | masks(), SEEDS)
def test_any_operator_is_linear_with_an_exact_adjoint(
    drawn: tuple[Operator, tuple[int, ...]], seed: int
) -> None:
    """`<K u, v> = <u, K^T v>`, `K (a u + b v) = a K u + b K v`, and `normal` is `K^T K`."""
    operator, shape = drawn
    u, v = normal((2, *shape), seed)
    assert_adjoint(operator, u, v)
    assert_linear(operator, u, v)
    assert_normal(operator, u)


@pytest.mark.parametrize(("operator", "height", "width"), PAPER_OPERATORS)
def test_the_papers_operators_are_linear_with_exact_adjoints(
    operator: Operator, height: int, width: int
) -> None:
    """The same for the three tasks at the sizes of MNIST and of both sets of faces."""
    u, v = normal((2, 3, 1, height, width), 0)
    assert_adjoint(operator, u, v)
    assert_linear(operator, u, v)
    assert_normal(operator, u)


@given(blurs(), SEEDS)
def test_blur_is_the_circular_sum_over_its_kernel(
    drawn: tuple[CircularBlur, tuple[int, ...]], seed: int
) -> None:
    """`K u` sums copies of `u` moved by each entry's offset from the centre; `K^T` moves them back."""
    operator, shape = drawn
    u = normal(shape, seed)
    p, q = operator.kernel.shape
    forward, adjoint = torch.zeros_like(u), torch.zeros_like(u)
    for i in range(p):
        for j in range(q):
            offset = (i - p // 2, j - q // 2)
            forward += operator.kernel[i, j] * u.roll(offset, dims=(-2, -1))
            adjoint += operator.kernel[i, j] * u.roll((-offset[0], -offset[1]), dims=(-2, -1))
    torch.testing.assert_close(operator.forward(u), forward, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator.adjoint(u), adjoint, rtol=1e-12, atol=1e-12)


def test_one_blur_serves_images_of_any_size_and_precision() -> None:
    """What a blur has computed for one image size and dtype does not leak into another's result."""
    kernel = normal((3, 4), 0)
    shared = CircularBlur(kernel)
    for height, width in ((6, 7), (7, 6), (6, 7)):
        for dtype in (torch.float64, torch.float32):
            u = normal((height, width), 1).to(dtype)
            alone = CircularBlur(kernel).forward(u)
            assert shared.forward(u).dtype == dtype
            torch.testing.assert_close(shared.forward(u), alone, rtol=0, atol=0)


@pytest.mark.parametrize("size", [5, 11])
def test_the_papers_blur_averages_along_the_diagonal(size: int) -> None:
    """The blur of one bright pixel is a diagonal streak of `size` equal pixels, centred on it."""
    u = torch.zeros(28, 28, dtype=torch.float64)
    u[14, 14] = 1
    streak = torch.zeros_like(u)
    for offset in range(-(size // 2), size // 2 + 1):
        streak[14 + offset, 14 + offset] = 1 / size
    blurred = CircularBlur(diagonal_motion_kernel(size)).forward(u)
    torch.testing.assert_close(blurred, streak, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("faces", "size"), [(False, 5), (True, 11)])
def test_tasks_choose_the_papers_kernels(faces: bool, size: int) -> None:
    """Deblurring uses a 5x5 kernel on MNIST and an 11x11 one on faces."""
    operator = forward_operator("deblurring", 28, 28, faces=faces)
    assert isinstance(operator, CircularBlur)
    assert torch.equal(operator.kernel, diagonal_motion_kernel(size))


def test_mnist_loses_its_top_ten_rows() -> None:
    """Of 28 rows the first 10 are zero and the other 18 are one."""
    mask = top_rows_mask(28, 28)
    assert mask[:10].eq(0).all()
    assert mask[10:].eq(1).all()
    ones = torch.ones(2, 1, 28, 28)
    assert torch.equal(forward_operator("inpainting", 28, 28).forward(ones), mask.expand_as(ones))


@given(st.integers(1, 300), st.integers(1, 300))
def test_top_rows_mask_loses_a_third_rounded_up(height: int, width: int) -> None:
    """The number of lost rows is the smallest integer that is at least `height / 3`."""
    mask = top_rows_mask(height, width)
    lost = int((mask == 0).all(1).sum())
    assert 3 * lost >= height > 3 * (lost - 1)
    assert mask.sum() == (height - lost) * width
    assert mask[:lost].eq(0).all()


@given(st.integers(4, 300), st.integers(4, 300))
def test_central_block_mask_loses_a_quarter_of_each_side(height: int, width: int) -> None:
    """The lost pixels fill a rectangle of a quarter of each side, with equal margins up to one pixel."""
    lost = central_block_mask(height, width) == 0
    rows, columns = lost.any(1).nonzero().flatten(), lost.any(0).nonzero().flatten()
    for inside, side in ((rows, height), (columns, width)):
        before, after = int(inside[0]), side - 1 - int(inside[-1])
        assert len(inside) == side // 4 == side - before - after
        assert 0 <= after - before <= 1
    assert lost.sum() == len(rows) * len(columns)


def test_faces_lose_their_central_block() -> None:
    """Inpainting of faces of 112x92 pixels masks the 28x23 block that starts at row 42, column 34."""
    masked = forward_operator("inpainting", 112, 92, faces=True).forward(torch.ones(112, 92))
    expected = torch.ones(112, 92)
    expected[42:70, 34:57] = 0
    assert torch.equal(masked, expected)


@given(masks(), SEEDS)
def test_a_mask_is_an_orthogonal_projection(drawn: tuple[Mask, tuple[int, ...]], seed: int) -> None:
    """`K K = K = K^T`: what is lost stays lost and what is seen stays as it was."""
    operator, shape = drawn
    u = normal(shape, seed)
    Ku = operator.forward(u)
    assert torch.equal(operator.forward(Ku), Ku)
    assert torch.equal(operator.adjoint(u), Ku)
    assert torch.equal(Ku, torch.where(operator.mask.bool(), u, 0.0))


def test_unknown_task_is_refused_by_name() -> None:
    """The refusal is one line that names the task and those that exist."""
    with pytest.raises(ValueError, match="'superresolution'") as refusal:
        forward_operator("superresolution", 28, 28)
    message = str(refusal.value)
    assert "\n" not in message
    assert all(task in message for task in TASKS)


@pytest.mark.parametrize(("height", "width"), [(4, 28), (28, 4)])
def test_a_blur_larger_than_the_image_is_refused(height: int, width: int) -> None:
    """A 5x5 kernel does not fit an image with a side of four pixels."""
    operator = forward_operator("deblurring", height, width)
    with pytest.raises(ValueError, match=f"got 5x5, allowed: at most the image's {height}x{width}"):
        operator.forward(torch.zeros(height, width))


@pytest.fixture(scope="module")
def physics() -> ModuleType:
    """DeepInverse's operators; it takes seconds to import."""
    return importlib.import_module("lib.deepinverse").deepinv.physics


def test_denoising_agrees_with_deepinverse(physics: ModuleType) -> None:
    """Identity and adjoint identity, as in `Denoising`."""
    u = normal((2, 1, 28, 28), 0)
    ours, theirs = forward_operator("denoising", 28, 28), physics.Denoising()
    assert torch.equal(ours.forward(u), theirs.A(u))
    assert torch.equal(ours.adjoint(u), theirs.A_adjoint(u))


@pytest.mark.parametrize(("height", "width", "faces"), [(28, 28, False), (112, 92, True)])
def test_inpainting_agrees_with_deepinverse(
    physics: ModuleType, height: int, width: int, faces: bool
) -> None:
    """Forward and adjoint of the paper's masks, as in `Inpainting`."""
    u = normal((2, 1, height, width), 0)
    ours = forward_operator("inpainting", height, width, faces=faces)
    mask = ours.forward(torch.ones(1, height, width))
    theirs = physics.Inpainting(img_size=(1, height, width), mask=mask)
    assert torch.equal(ours.forward(u), theirs.A(u))
    assert torch.equal(ours.adjoint(u), theirs.A_adjoint(u))


@pytest.mark.parametrize("use_fft", [False, True])
@pytest.mark.parametrize(("p", "q"), [(5, 5), (3, 5), (4, 3), (4, 6)])
def test_blur_agrees_with_deepinverse(physics: ModuleType, p: int, q: int, use_fft: bool) -> None:
    """Forward and adjoint for a kernel without symmetry, as in `Blur`; swapping the two would be noticed."""
    kernel, u = normal((p, q), 0), normal((2, 3, 9, 8), 1)
    ours = CircularBlur(kernel)
    theirs = physics.Blur(filter=kernel[None, None], padding="circular", use_fft=use_fft)
    torch.testing.assert_close(ours.forward(u), theirs.A(u), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.adjoint(u), theirs.A_adjoint(u), rtol=1e-12, atol=1e-12)
    assert (ours.forward(u) - theirs.A_adjoint(u)).abs().max() > 0.1
