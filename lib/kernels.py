"""Convolution with small kernels: `A u`, its exact adjoint `A^T z`, its norm, and initial kernels.

`(A u)_i(x) = sum_y A_i(y) u(x + y)` with `u = 0` outside the image, as in `torch.nn.functional.conv2d`.
Images are processed in blocks: all experts of a block of `r x r` pixels depend on one patch of `p x p`
pixels, `p = k + r - 1`, so that a convolution with few kernels becomes a product with a matrix that is large
enough to be fast. The transposed matrix is the adjoint; its patches are summed where they overlap.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from lib.products import product


def block_side(count: int, side: int) -> int:
    """Return the side `r` of the blocks, near the fastest on a CPU: 2 for many kernels, more for a few."""
    return max(1, 3 * side // 4) if count < 16 else 2


@cache
def _packing(k: int, r: int) -> Tensor:
    """Return the indices of the block matrix's entries, `(r r, p p)`, in a kernel followed by a zero."""
    p = k + r - 1
    origin = torch.full((r, r, p, p), k * k)
    for i, j in itertools.product(range(r), repeat=2):
        origin[i, j, i : i + k, j : j + k] = torch.arange(k * k).view(k, k)
    return origin.view(r * r, p * p)


def _block_matrix(kernels: Tensor) -> Tensor:
    """Return the block matrices `(*stack, F r r, p p)` of kernels `(*stack, F, k, k)`."""
    padded: Tensor = functional.pad(kernels.flatten(-2), (0, 1))
    matrices: Tensor = padded[
        ..., _packing(kernels.shape[-1], block_side(*kernels.shape[-3:-1])).to(kernels.device)
    ].flatten(-3, -2)
    return matrices


@cache
def _inside(height: int, width: int, r: int) -> Tensor | None:
    """Return the mask of block pixels inside the image, `(r r, blocks)`; None if all are."""
    if height % r == 0 and width % r == 0:
        return None
    ones: Tensor = functional.pad(torch.ones(1, 1, height, width), (0, -width % r, 0, -height % r))
    inside: Tensor = functional.unfold(ones, r, stride=r)
    return inside.squeeze(0)


def _restricted(z: Tensor, height: int, width: int, r: int) -> Tensor:
    """Return experts `(*stack, N, F r r, blocks)` with zeros outside the image."""
    inside = _inside(height, width, r)
    if inside is None:
        return z
    return (z.reshape(*z.shape[:-2], -1, *inside.shape) * inside.to(z)).flatten(-3, -2)


def _for_each(matrices: Tensor, images: Tensor) -> Tensor:
    """Return the products `M X` of matrices `(*stack, l, n)` and the `X` of images, `(*stack, N, n, m)`."""
    return product(matrices[..., None, :, :].expand(*images.shape[:-2], *matrices.shape[-2:]), images)


def correlate(kernels: Tensor, u: Tensor) -> Tensor:
    """Return `A u`.

    Args:
        kernels: `A`, `(*stack, F, k, k)`, `k` odd.
        u: `(*stack, N, 1, H, W)`.

    Returns:
        `(*stack, N, F r r, blocks)`, the experts block by block (see `block_side`).

    >>> kernels, u = difference_kernels(1, 2, 3), torch.randn(1, 1, 6, 6)
    >>> z = correlate(kernels, u)
    >>> torch.allclose(z.square().sum(), (u * correlate_adjoint(kernels, z, 6, 6)).sum(), rtol=1e-3)
    True
    """
    k = kernels.shape[-1]
    r, (height, width) = block_side(*kernels.shape[-3:-1]), u.shape[-2:]
    padded = functional.pad(
        u.reshape(-1, 1, height, width), (k // 2, k // 2 - width % -r, k // 2, k // 2 - height % -r)
    )
    patches = functional.unfold(padded, k + r - 1, stride=r)
    patches = patches.view(*u.shape[:-3], *patches.shape[-2:])
    return _restricted(_for_each(_block_matrix(kernels), patches), height, width, r)


def correlate_adjoint(kernels: Tensor, z: Tensor, height: int, width: int) -> Tensor:
    """Return `A^T z`, `(*stack, N, 1, H, W)`, of experts `z` in the layout of `correlate`."""
    k = kernels.shape[-1]
    r = block_side(*kernels.shape[-3:-1])
    patches = _for_each(_block_matrix(kernels).mT, _restricted(z, height, width, r))
    sides = (height - height % -r + k - 1, width - width % -r + k - 1)
    summed: Tensor = functional.fold(patches.flatten(0, -3), sides, k + r - 1, stride=r)
    image: Tensor = summed[..., k // 2 : k // 2 + height, k // 2 : k // 2 + width]
    return image.reshape(*z.shape[:-2], 1, height, width)


def most_amplified_wave(kernels: Tensor, height: int, width: int) -> Tensor:
    """Return the plane wave that `A` amplifies most, tapered to the image's borders, `(*stack, 1, 1, H, W)`.

    On the whole plane `A` multiplies a wave of frequency `w` by the kernels' transfer functions, and its norm
    is the largest `sqrt(sum_i |A_i(w)|^2)`. On an image the norm is a little smaller.
    """
    power = torch.fft.rfft2(kernels, s=(height, width)).abs().square().sum(-3)
    peak = functional.one_hot(power.flatten(-2).argmax(-1), power.shape[-2:].numel())
    wave = torch.fft.irfft2(peak.view_as(power).to(power), s=(height, width))
    fades = [torch.sin(torch.pi * (torch.arange(n).to(wave) + 0.5) / n) for n in (height, width)]
    faded: Tensor = wave * fades[0][:, None] * fades[1]
    return faded[..., None, None, :, :]


KRYLOV = 8
"""Dimension of the Krylov spaces of `spectral_norm`."""


@torch.no_grad()
def spectral_norm(
    kernels: Tensor, direction: Tensor, iterations: int, tol: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute the norm of `A` on whole images by the restarted Lanczos method.

    The start is the sum of a direction and of the wave that the kernels amplify most, so that it is not
    orthogonal to the maximizer of `||A v||`, even if the kernels or their symmetry have changed.

    Args:
        kernels: `A`, `(*stack, F, k, k)`.
        direction: `(*stack, 1, 1, H, W)`, such as the maximizer for the last kernels.
        iterations: maximum number of products with `A^T A`; the norm is approached from below.
        tol: tolerance of `||A^T A v - s v|| <= tol s`, `s = ||A v||^2`; the relative distance of `s` from an
            eigenvalue is at most that, and in general far less.

    Returns:
        The norm, `(*stack)`, and the maximizer of unit norm.

    >>> norm, v = spectral_norm(difference_kernels(1, 2, 3), torch.ones(1, 1, 20, 20), 100)
    >>> 2.7 < norm.item() < 8**0.5, v.shape
    (True, torch.Size([1, 1, 20, 20]))
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
            # Twice, because of rounding errors.
            for _ in range(2):
                rest = rest - rest @ space.mT @ space
            # A zero vector if only rounding errors are left: the space is then complete.
            more = size(image(rest)) > 100 * torch.finfo(v.dtype).eps * size(image(images[..., j, :]))
            v = image(rest) / size(image(rest)) * more
        # Symmetric up to rounding; `eigh` reads one triangle, and refuses the NaN of kernels that overflowed.
        eigenvalues, eigenvectors = torch.linalg.eigh((space @ images.mT).nan_to_num())
        best = eigenvectors[..., None, :, -1]
        v, squared = image(best @ space), eigenvalues[..., -1, None, None, None, None]
        residual = size(image(best @ images) - squared * v)
        v = v / size(v)
        if tol and bool((residual <= tol * squared).all()):
            break
    return torch.linalg.vector_norm(correlate(kernels, v), dim=(-3, -2, -1)), v


def difference_kernels(order: int, count: int, side: int) -> Tensor:
    """Return finite differences of order 1 or 2, `(count, side, side)`, short and central ones first.

    They are `D_d u(x) = u(x + d) - u(x)` or `D_d D_e u(x)` for offsets `d`, `e` of up to two pixels, at every
    position in the kernel. The first two of first order are the forward differences.

    Raises:
        ValueError: `count` exceeds `count_differences`.

    >>> difference_kernels(order=1, count=1, side=3)
    tensor([[[ 0.,  0.,  0.],
             [ 0., -1.,  1.],
             [ 0.,  0.,  0.]]])
    """
    differences = _differences(order, side)
    if count > len(differences):
        raise ValueError(
            f"`count` must be at most {len(differences)} for kernels of {side}x{side}, got {count}."
        )
    kernels = torch.zeros(count, side, side)
    for kernel, corners in zip(kernels, differences, strict=False):
        for (i, j), sign in zip(corners, (1, -1, -1, 1), strict=False):
            kernel[i, j] += sign if order == 2 else -sign
    return kernels


def cosine_kernels(count: int, side: int) -> Tensor:
    """Return the orthonormal DCT-II basis without its constant, `(count, side, side)`, low frequencies first.

    >>> kernels = cosine_kernels(8, 3).flatten(1)
    >>> torch.allclose(kernels @ kernels.T, torch.eye(8), atol=1e-5)
    True
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
    """Return the pixels of all differences, with alternating signs, in the order of `difference_kernels`."""
    # Up to two rows and columns away, one of each pair of opposite ones.
    neighbours = [d for d in itertools.product(range(3), range(-2, 3)) if d > (0, 0)]
    pairs = [(d, e) for d in neighbours for e in (neighbours if order == 2 else [(0, 0)]) if e <= d]
    ordered = []
    for (d, e), (i, j) in itertools.product(pairs, itertools.product(range(side), repeat=2)):
        corners = [(i + a * d[0] + b * e[0], j + a * d[1] + b * e[1]) for b in range(2) for a in range(2)]
        corners = corners[: 2 * order]
        if all(0 <= k < side for corner in corners for k in corner):
            length = sum(k * k for k in (*d, *e))
            off = sum((k + m + 1 - side) ** 2 for k, m in zip(corners[0], corners[-1], strict=True))
            ordered.append(((length, order == 2 and d != e, off, (-i, -j), d, e), corners))
    return [corners for _, corners in sorted(ordered)]
