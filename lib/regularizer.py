"""Fields-of-experts regularizers `R(u) = gamma sum phi(A u + b)` and their learned fields.

`grad R(u) = gamma A^T sigma(A u + b)` with `sigma = phi'` (Roth and Black, IJCV 82, 2009). Freeing the
transpose, `gamma C^T sigma(A u + b)`, gives the deep equilibrium model's field.

Every tensor may carry leading dimensions for a stack of models that are evaluated together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Activation:
    """`sigma` with its potential `phi`, `sigma = phi'`; both take `(z, tau)`, `tau` the step size."""

    sigma: Callable[[Tensor, Tensor], Tensor]
    potential: Callable[[Tensor, Tensor], Tensor]


def _softshrink(z: Tensor, tau: Tensor) -> Tensor:
    return z - torch.clamp(z, -tau, tau)


ACTIVATIONS = {
    "relu": Activation(
        sigma=lambda z, tau: z.relu(),
        potential=lambda z, tau: z.relu().square() / 2,
    ),
    "softshrink": Activation(
        sigma=_softshrink,
        potential=lambda z, tau: _softshrink(z, tau).square() / 2,
    ),
    "identity": Activation(
        sigma=lambda z, tau: z,
        potential=lambda z, tau: z.square() / 2,
    ),
}


def affine(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """`x W + b` of stacked matrices `(*stack, batch, n)`, in one fused product where there is one."""
    return torch.baddbmm(b, x, W) if x.dim() == W.dim() == 3 else x @ W + b


class FieldsOfExperts(nn.Module):
    """Dense fields of experts: `A` mixes all pixels of an image of `n` pixels into `m` experts.

    Args:
        A: `(*stack, m, n)`, analysis operator.
        b: `(*stack, m)`, bias.
        C: `(*stack, m, n)`, or None to tie `C = A`, which makes the field a gradient.
        activation: a name in `ACTIVATIONS`.
    """

    def __init__(self, A: Tensor, b: Tensor, C: Tensor | None, activation: str) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.b = nn.Parameter(b)
        self.C = None if C is None else nn.Parameter(C)
        self.activation = ACTIVATIONS[activation]

    def analysis(self, u: Tensor) -> Tensor:
        """`A u + b`, `(*stack, batch, m)`, of images `u` `(*stack, batch, C, H, W)`."""
        return affine(u.flatten(-3), self.A.mT, self.b[..., None, :])

    def field(self, u: Tensor, gamma: Tensor, tau: Tensor) -> Tensor:
        """`gamma C^T sigma(A u + b)`, which is `grad R(u)` when `C = A`.

        Args:
            u: `(*stack, batch, C, H, W)`, images.
            gamma: `(*stack)`, weight of the regularizer.
            tau: `(*stack)`, step size, which is the threshold of softshrink.

        Returns:
            Tensor like `u`.
        """
        synthesis = self.A if self.C is None else self.C
        experts = self.activation.sigma(self.analysis(u), tau[..., None, None])
        return ((gamma[..., None, None] * experts) @ synthesis).view_as(u)

    def energy(self, u: Tensor, gamma: Tensor, tau: Tensor) -> Tensor:
        """`R(u) = gamma sum phi(A u + b)` of every image, `(*stack, batch)`."""
        potential = self.activation.potential(self.analysis(u), tau[..., None, None])
        return gamma[..., None] * potential.sum(-1)


def initial_weights(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """`A`, `b` and an independent `C` as torch's linear layer of `n` inputs starts: U(-1, 1)/sqrt(n).

    Args:
        n: number of pixels, and of experts.
        generator: source of the random numbers.

    Returns:
        `A` `(n, n)`, `b` `(n,)` and `C` `(n, n)`.
    """
    bound = n**-0.5
    shapes = ((n, n), (n,), (n, n))
    A, b, C = (torch.empty(s).uniform_(-bound, bound, generator=generator) for s in shapes)
    return A, b, C
