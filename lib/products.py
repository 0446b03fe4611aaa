"""Matrix products with the fastest kernel for their size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

LARGE_PRODUCT = 2**21
"""Number of multiplications from which oneDNN's product of float32 matrices is faster on a CPU."""


class _LargeProduct(torch.autograd.Function):
    """The product `x W`, matrix by matrix, with oneDNN: up to twice as fast as torch's default.

    torch offers oneDNN's product for linear layers alone, whose weight is `W^T`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(x, W)
        pairs = zip(x.reshape(-1, *x.shape[-2:]), W.mT.reshape(-1, *W.mT.shape[-2:]), strict=True)
        products = [torch.ops.mkldnn._linear_pointwise(a, B, None, "none", [], "") for a, B in pairs]
        shape = (*x.shape[:-1], W.shape[-1])
        return products[0].view(shape) if len(products) == 1 else torch.stack(products).view(shape)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x, W), (w,) = ctx.saved_tensors, cotangents
        dx = product(w, W.mT) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        # A gradient must have the memory layout of its parameter.
        return dx, product(x.mT, w) if W.stride(-1) == 1 else product(w.mT, x).mT


def product(x: Tensor, W: Tensor) -> Tensor:
    """Return `x W` of matrices `(*stack, l, n)` and `(*stack, n, m)`.

    >>> product(torch.randn(5, 2, 3), torch.randn(5, 3, 4)).shape
    torch.Size([5, 2, 4])
    """
    large = x.shape[-2] * W.shape[-2:].numel() >= LARGE_PRODUCT
    if large and x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return cast(Tensor, _LargeProduct.apply(x, W))
    return x @ W


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Set the precision of products of float32 matrices within the block.

    Args:
        precision: `float32`, or `tf32`: a GPU then rounds the factors to a mantissa of 10 bits.
    """
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting, chosen in zip(settings, ("tf32" if precision == "tf32" else "ieee", "ieee"), strict=True):
        setting.fp32_precision = chosen
    try:
        yield
    finally:
        for setting, chosen in zip(settings, before, strict=True):
            setting.fp32_precision = chosen
