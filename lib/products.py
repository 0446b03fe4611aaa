"""Products of matrices by the kernel that is the fastest for their size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

LARGE_PRODUCT = 2**21
"""Multiplications from which oneDNN's product of two float32 matrices is the faster one on a CPU."""


class _LargeProduct(torch.autograd.Function):
    """`x W` member by member with oneDNN, which is up to twice as fast as torch's default product.

    oneDNN keeps its product for linear layers, whose weight is `W^T`.
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
        # With the layout of W, for a parameter's gradient has to have the parameter's.
        return dx, product(x.mT, w) if W.stride(-1) == 1 else product(w.mT, x).mT


def product(x: Tensor, W: Tensor) -> Tensor:
    """`x W` of matrices `(*stack, l, n)` and `(*stack, n, m)`, by the faster kernel for their size."""
    large = x.shape[-2] * W.shape[-2:].numel() >= LARGE_PRODUCT
    if large and x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return cast(Tensor, _LargeProduct.apply(x, W))
    return x @ W


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Products of float32 matrices have this precision in here, whatever is set outside.

    Args:
        precision: `float32`, or `tf32`, with which a GPU rounds the factors to 10 bits behind the first one.
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
