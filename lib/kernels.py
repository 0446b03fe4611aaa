"""Small convolution kernels: `A u` with zero padding and exactly `A^T z`, their norm, their initial values.

`(A u)_i(x) = sum_y A_i(y) u(x + y)`, with `u = 0` outside the image, as in `torch.nn.functional.conv2d`. Both
products are one matrix product per block of pixels: all experts of a block of `r x r` pixels depend on one
patch of `p x p` pixels, `p = k + r - 1`, so that a convolution with few kernels becomes a product with a
matrix that is large enough to be fast, and the transposed matrix, whose patches are summed where they
overlap, is the exact adjoint.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from lib.products import product

NEIGHBOURS = tuple((i, j) for i, j in itertools.product(range(3), range(-2, 3)) if (i, j) > (0, 0))
"""Offsets of the pixels up to two rows and columns away, one of each pair of opposite ones."""


def block_side(kernel_side: int) -> int:
    """Side `r` of the blocks: 2 for kernels of 3x3, 8 for 11x11, near the fastest on a CPU."""
    return max(1, 3 * kernel_side // 4)


@cache
def _packing(k: int) -> Tensor:
    """Where the entries of the block matrix `(r r, p p)` come from in a kernel with a zero behind it."""
    r = block_side(k)
    p = k + r - 1
    origin = torch.full((r, r, p, p), k * k)
    for i, j in itertools.product(range(r), repeat=2):
        origin[i, j, i : i + k, j : j + k] = torch.arange(k * k).view(k, k)
    return origin.view(r * r, p * p)


def _block_matrix(kernels: Tensor) -> Tensor:
    """`(*stack, F, k, k)` as `(*stack, F r r, p p)`."""
    padded: Tensor = functional.pad(kernels.flatten(-2), (0, 1))
    matrices: Tensor = padded[..., _packing(kernels.shape[-1]).to(kernels.device)].flatten(-3, -2)
    return matrices


@cache
def _inside(height: int, width: int, r: int) -> Tensor | None:
    """`(r r, blocks)`: whether a block's pixel is in the image; None where all are."""
    if height % r == 0 and width % r == 0:
        return None
    ones: Tensor = functional.pad(torch.ones(1, 1, height, width), (0, -width % r, 0, -height % r))
    inside: Tensor = functional.unfold(ones, r, stride=r)
    return inside.squeeze(0)


def _restricted(z: Tensor, height: int, width: int, r: int) -> Tensor:
    """Experts `(*stack, N, F r r, blocks)`, those outside the image set to zero."""
    inside = _inside(height, width, r)
    if inside is None:
        return z
    return (z.reshape(*z.shape[:-2], -1, *inside.shape) * inside.to(z)).flatten(-3, -2)


def _for_each(matrices: Tensor, images: Tensor) -> Tensor:
    """Products `M X` of a matrix `(*stack, l, n)` with every image's `X` of `(*stack, N, n, m)`."""
    return product(matrices[..., None, :, :].expand(*images.shape[:-2], *matrices.shape[-2:]), images)


def correlate(kernels: Tensor, u: Tensor) -> Tensor:
    """`A u`.

    Args:
        kernels: `A`, `(*stack, F, k, k)`, `k` odd.
        u: `(*stack, N, 1, H, W)`.

    Returns:
        `(*stack, N, F r r, blocks)`: all experts, block by block (see `block_side`).
    """
    k = kernels.shape[-1]
    r, (height, width) = block_side(k), u.shape[-2:]
    padded = functional.pad(
        u.reshape(-1, 1, height, width), (k // 2, k // 2 - width % -r, k // 2, k // 2 - height % -r)
    )
    patches = functional.unfold(padded, k + r - 1, stride=r)
    patches = patches.view(*u.shape[:-3], *patches.shape[-2:])
    return _restricted(_for_each(_block_matrix(kernels), patches), height, width, r)


def correlate_adjoint(kernels: Tensor, z: Tensor, height: int, width: int) -> Tensor:
    """`A^T z`, `(*stack, N, 1, H, W)`, of `z` in the layout of `correlate`."""
    k = kernels.shape[-1]
    r = block_side(k)
    patches = _for_each(_block_matrix(kernels).mT, _restricted(z, height, width, r))
    sides = (height - height % -r + k - 1, width - width % -r + k - 1)
    summed: Tensor = functional.fold(patches.flatten(0, -3), sides, k + r - 1, stride=r)
    image: Tensor = summed[..., k // 2 : k // 2 + height, k // 2 : k // 2 + width]
    return image.reshape(*z.shape[:-2], 1, height, width)


def most_amplified_wave(kernels: Tensor, height: int, width: int) -> Tensor:
    """The plane wave that `A` amplifies most, faded out towards the image's borders, `(*stack, 1, 1, H, W)`.

    On the whole plane `A` multiplies a wave of frequency `w` by the kernels' transfer functions there, and
    the largest of `sqrt(sum_i |A_i(w)|^2)` is its norm. On an image the norm is a little smaller.
    """
    power = torch.fft.rfft2(kernels, s=(height, width)).abs().square().sum(-3)
    peak = functional.one_hot(power.flatten(-2).argmax(-1), power.shape[-2:].numel())
    wave = torch.fft.irfft2(peak.view_as(power).to(power), s=(height, width))
    fades = [torch.sin(torch.pi * (torch.arange(n).to(wave) + 0.5) / n) for n in (height, width)]
    faded: Tensor = wave * fades[0][:, None] * fades[1]
    return faded[..., None, None, :, :]


KRYLOV = 8
"""Images that span the space in which `spectral_norm` looks for the worst one."""


@torch.no_grad()
def spectral_norm(
    kernels: Tensor, direction: Tensor, iterations: int, tol: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Norm of `A` as an operator on whole images: the root of the largest eigenvalue of `A^T A`.

    In the space of `v, A^T A v, (A^T A)^2 v, ...` the image with the largest `||A v||` is found, and the
    search goes on from there (the Lanczos method, restarted). It starts from a given image and the wave that
    the kernels amplify most, together: whichever image is the worst one after a change of the kernels, and
    whatever its symmetry, one of them is not orthogonal to it.

    Args:
        kernels: `A`, `(*stack, F, k, k)`.
        direction: `(*stack, 1, 1, H, W)`, image to start from, such as the one of the last kernels.
        iterations: products with `A^T A` at most; the norm is approached from below.
        tol: stop when `||A^T A v - s v|| <= tol s`, with `s = ||A v||^2`; `s` is then within that of an
            eigenvalue, and in general far closer.

    Returns:
        The norm, `(*stack)`, and the direction of unit norm that attains it.
    """

    def size(image: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(image, dim=(-4, -3, -2, -1), keepdim=True)
        return norm.clamp_min(1e-30)

    def image(rows: Tensor) -> Tensor:
        return rows.view_as(direction)

    v = direction / size(direction)
    wave = most_amplified_wave(kernels, *v.shape[-2:])
    v = v + wave / size(wave)
    v = v / size(v)
    for done in range(0, iterations, KRYLOV):
        basis = v.new_zeros(2, *v.shape[:-4], min(KRYLOV, iterations - done), v.shape[-2:].numel())
        space, images = basis
        for j in range(space.shape[-2]):
            space[..., j, :] = v.flatten(-4)
            images[..., j, :] = correlate_adjoint(kernels, correlate(kernels, v), *v.shape[-2:]).flatten(-4)
            rest = images[..., j, None, :]
            # Twice, for what rounding leaves of the projection.
            for _ in range(2):
                rest = rest - rest @ space.mT @ space
            # Where nothing but rounding is left, the space is complete.
            more = size(image(rest)) > 100 * torch.finfo(v.dtype).eps * size(image(images[..., j, :]))
            v = image(rest) / size(image(rest)) * more
        # Symmetric but for rounding; `eigh` takes one half.
        eigenvalues, eigenvectors = torch.linalg.eigh(space @ images.mT)
        best = eigenvectors[..., None, :, -1]
        v, squared = image(best @ space), eigenvalues[..., -1, None, None, None, None]
        residual = size(image(best @ images) - squared * v)
        v = v / size(v)
        if tol and bool((residual <= tol * squared).all()):
            break
    return torch.linalg.vector_norm(correlate(kernels, v), dim=(-3, -2, -1)), v


def difference_kernels(order: int, count: int, side: int) -> Tensor:
    """Finite differences of first or second order, the shortest and most central ones first.

    `D_d u(x) = u(x + d) - u(x)` or `D_d D_e u(x)` for offsets `d`, `e` of up to two pixels, at every position
    in the kernel; of first order the first two are the forward differences.

    Args:
        order: 1 or 2.
        count: how many.
        side: `k`.

    Returns:
        `(count, k, k)`.

    Raises:
        ValueError: there are not that many.
    """
    found = _differences(order, side)
    if count > len(found):
        raise ValueError(f"filters: got {count}, allowed: at most {len(found)} differences of {side}x{side}")
    kernels = torch.zeros(count, side, side)
    for kernel, corners in zip(kernels, found, strict=False):
        signs = (-1, 1) if order == 1 else (1, -1, -1, 1)
        for (i, j), sign in zip(corners, signs, strict=False):
            kernel[i, j] += sign
    return kernels


def cosine_kernels(count: int, side: int) -> Tensor:
    """The discrete cosine basis (DCT-II, orthonormal) without its constant, low frequencies first.

    Args:
        count: how many, at most `side**2 - 1`.
        side: `k`.

    Returns:
        `(count, k, k)`.
    """
    frequency, x = torch.arange(side)[:, None], torch.arange(side)
    basis = functional.normalize(torch.cos(math.pi * frequency * (x + 0.5) / side), dim=1)
    pairs = sorted(itertools.product(range(side), range(side)), key=lambda pair: (sum(pair), pair))
    return torch.stack([torch.outer(basis[i], basis[j]) for i, j in pairs[1 : count + 1]])


def count_differences(order: int, side: int) -> int:
    """Return the number of finite differences of an order that fit into `side x side`."""
    return len(_differences(order, side))


@cache
def _differences(order: int, side: int) -> list[list[tuple[int, int]]]:
    """For each difference the pixels of the kernel that it takes."""
    pairs = [(d, e) for d in NEIGHBOURS for e in (NEIGHBOURS if order == 2 else [(0, 0)]) if e <= d]
    centre = side // 2
    found = []
    for (d, e), x in itertools.product(pairs, itertools.product(range(side), range(side))):
        corners = [x, _plus(x, d), _plus(x, e), _plus(_plus(x, d), e)]
        if all(0 <= i < side and 0 <= j < side for i, j in corners):
            length = sum(i * i for i in (*d, *e))
            off = sum((2 * (i - centre) + di + ei) ** 2 for i, di, ei in zip(x, d, e, strict=True))
            found.append(((length, order == 2 and d != e, off, (-x[0], -x[1]), d, e), corners))
    return [corners for _, corners in sorted(found)]


def _plus(x: tuple[int, int], d: tuple[int, int]) -> tuple[int, int]:
    return x[0] + d[0], x[1] + d[1]
