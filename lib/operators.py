"""Forward operators `K` with their exact adjoints.

Images are tensors `(..., C, H, W)`; all leading dimensions are a batch.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Operator(Protocol):
    """Linear operator `K` from images to data `(..., C, H, W)`, of any size, with `<K u, v> = <u, K^T v>`."""

    def forward(self, u: Tensor) -> Tensor:
        """Return the data `K u` of images `u`."""

    def adjoint(self, v: Tensor) -> Tensor:
        """Return the images `K^T v` of data `v`."""

    def normal(self, u: Tensor) -> Tensor:
        """Return `K^T K u`, which may be cheaper than `forward` and `adjoint` in turn."""


class Identity:
    """Identity, `K u = u`, for denoising."""

    def forward(self, u: Tensor) -> Tensor:
        return u

    def adjoint(self, v: Tensor) -> Tensor:
        return v

    normal = forward


class Mask:
    """Multiplication with a mask, `K u = m * u`, for inpainting: an orthogonal projection, `K^T = K`.

    Args:
        mask: `(H, W)`, one where a pixel is observed and zero where it is lost.

    >>> Mask(torch.tensor([[1.0, 0.0]])).forward(torch.tensor([[5.0, 5.0]]))
    tensor([[5., 0.]])
    """

    def __init__(self, mask: Tensor) -> None:
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"`mask` must be 0 or 1 at every pixel, got {mask.unique().tolist()[:3]}.")
        self.mask = mask

    def forward(self, u: Tensor) -> Tensor:
        if u.shape[-2:] != self.mask.shape:
            got, size = ("x".join(map(str, shape)) for shape in (u.shape[-2:], self.mask.shape))
            raise ValueError(f"Images must have the mask's {size} pixels, got {got}.")
        # Moved once: a copy between devices waits for all queued work.
        mask = self.mask = self.mask.to(u)
        return mask * u

    def adjoint(self, v: Tensor) -> Tensor:
        return self.forward(v)

    normal = forward


class CircularBlur:
    """Circular convolution with a kernel centred at its middle entry, for deblurring.

    In the Fourier domain `K` multiplies by the kernel's transfer function and `K^T` by its complex
    conjugate, for every image size that is at least the kernel's.

    Args:
        kernel: `(p, q)`, point spread function.

    >>> blur, (u, v) = CircularBlur(diagonal_motion_kernel(3)), torch.randn(2, 1, 8, 8)
    >>> torch.allclose((blur.forward(u) * v).sum(), (u * blur.adjoint(v)).sum(), atol=1e-4)
    True
    """

    def __init__(self, kernel: Tensor) -> None:
        self.kernel = kernel
        self._transfer: dict[tuple[torch.Size, torch.dtype, torch.device], Tensor] = {}

    def transfer(self, u: Tensor) -> Tensor:
        """Return the transfer function `(H, W // 2 + 1)` of the kernel on the grid of `u`."""
        key = (u.shape[-2:], u.dtype, u.device)
        if key not in self._transfer:
            height, width = u.shape[-2:]
            p, q = self.kernel.shape
            if p > height or q > width:
                raise ValueError(
                    f"Images must have at least the kernel's {p}x{q} pixels, got {height}x{width}."
                )
            padded = torch.zeros(height, width, dtype=u.dtype, device=u.device)
            padded[:p, :q] = self.kernel.to(padded)
            centred = padded.roll((-(p // 2), -(q // 2)), dims=(0, 1))
            self._transfer[key] = torch.fft.rfft2(centred)
        return self._transfer[key]

    def forward(self, u: Tensor) -> Tensor:
        return _filtered(u, self.transfer(u))

    def adjoint(self, v: Tensor) -> Tensor:
        return _filtered(v, self.transfer(v).conj())

    def normal(self, u: Tensor) -> Tensor:
        return _filtered(u, self.transfer(u).abs().square())


def _filtered(u: Tensor, transfer: Tensor) -> Tensor:
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(u) * transfer, s=u.shape[-2:])
    return filtered


def top_rows_mask(height: int, width: int) -> Tensor:
    """Return the mask `(height, width)` that loses the top third of the rows, rounded up (10 of 28)."""
    mask = torch.ones(height, width)
    mask[: -(-height // 3)] = 0
    return mask


def central_block_mask(height: int, width: int) -> Tensor:
    """Return the mask `(height, width)` that loses a central block of a quarter of each side.

    >>> central_block_mask(8, 8).sum()
    tensor(60.)
    """
    mask = torch.ones(height, width)
    rows, columns = height // 4, width // 4
    top, left = (height - rows) // 2, (width - columns) // 2
    mask[top : top + rows, left : left + columns] = 0
    return mask


def diagonal_motion_kernel(size: int) -> Tensor:
    """Return the point spread function `eye(size) / size` of a motion along the diagonal."""
    return torch.eye(size) / size
