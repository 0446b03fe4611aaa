"""Fields-of-experts regularizers `R(u) = gamma sum phi(A u + b)` and their learned fields.

`grad R(u) = gamma A^T sigma(A u + b)` with `sigma = phi'` (Roth and Black, IJCV 82, 2009). Freeing the
transpose, `gamma C^T sigma(A u + b)`, gives the deep equilibrium model's field. `A` is a dense matrix with a
bias, or a convolution with several kernels and none.

Every tensor may carry leading dimensions for a stack of models that are evaluated together.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lib.kernels import correlate, correlate_adjoint, spectral_norm
from lib.products import product


@dataclass(frozen=True)
class Activation:
    """`sigma` with its slope `sigma'` and its potential `phi`, `sigma = phi'`.

    All take `(z, tau)`, `tau` the step size.

    Attributes:
        steepest: the largest slope; the smallest one is zero or more.
    """

    sigma: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    potential: Callable[[Tensor, Tensor], Tensor]
    steepest: float = 1.0


def _softshrink(z: Tensor, tau: Tensor) -> Tensor:
    return z - torch.clamp(z, -tau, tau)


NORM_ITERATIONS, NORM_TOL = 500, 3e-3
"""Products at most for a norm, and the relative residual at which they end after a small step."""

RELU = Activation(
    sigma=lambda z, tau: z.relu(),
    slope=lambda z, tau: (z > 0).to(z),
    potential=lambda z, tau: z.relu().square() / 2,
)
SOFTSHRINK = Activation(
    sigma=_softshrink,
    slope=lambda z, tau: (z.abs() > tau).to(z),
    potential=lambda z, tau: _softshrink(z, tau).square() / 2,
)
LINEAR = Activation(
    sigma=lambda z, tau: z, slope=lambda z, tau: torch.ones_like(z), potential=lambda z, tau: z.square() / 2
)


def smoothed_sign(sharpness: float) -> Activation:
    """`sigma(z) = tanh(s z)` and `phi(z) = log(cosh(s z)) / s`, the smoothed sign and modulus.

    With finite differences as kernels `R` is a smoothed total variation.

    Args:
        sharpness: `s`, the slope of `sigma` at zero.
    """

    # torch.sigmoid is several times faster than torch.tanh on a CPU, but for the tiny numbers far from zero;
    # beyond 40 the result is +-1 in every precision.
    def sigma(z: Tensor) -> Tensor:
        return torch.add(z.new_tensor(-1), torch.sigmoid((2 * sharpness * z).clamp_(-40, 40)), alpha=2)

    def potential(z: Tensor) -> Tensor:
        # log cosh x without overflow
        x = (sharpness * z).abs()
        return (x + torch.log1p(torch.exp(-2 * x)) - math.log(2)) / sharpness

    return Activation(
        sigma=lambda z, tau: sigma(z),
        slope=lambda z, tau: sharpness * (1 - sigma(z).square()),
        potential=lambda z, tau: potential(z),
        steepest=sharpness,
    )


def broadcast(value: Tensor, like: Tensor) -> Tensor:
    """A value per model, `(*stack)`, with the dimensions behind it that `like` has."""
    return value.view(*value.shape, *[1] * (like.dim() - value.dim()))


class FieldsOfExperts(nn.Module, ABC):
    """What dense and convolutional fields of experts share.

    Attributes:
        A: analysis weights.
        C: synthesis weights, or None where they are tied, `C = A`, which makes the field a gradient.
        activation: `sigma`, its slope and its potential.
        weight_dims: dimensions of `A` behind those of a stack.
    """

    weight_dims: ClassVar[int]
    A: nn.Parameter
    C: nn.Parameter | None
    activation: Activation

    @abstractmethod
    def analysis(self, u: Tensor) -> Tensor:
        """`A u + b`, the experts of images `u` `(*stack, batch, C, H, W)`."""

    @abstractmethod
    def analysis_of_synthesis(self, w: Tensor) -> Tensor:
        """`C w`, `w` like `u`."""

    @abstractmethod
    def synthesis(self, z: Tensor, u: Tensor) -> Tensor:
        """`C^T z`, like `u`, of experts `z`."""

    @abstractmethod
    def adjoint_analysis(self, z: Tensor, u: Tensor) -> Tensor:
        """`A^T z`, like `u`, of experts `z`."""

    @abstractmethod
    def curvature(self, shape: torch.Size) -> Tensor:
        """`C^T A` on images `(C, H, W)`: a matrix `(*stack, n, n)`; of kernels the modulus of its transfer
        function, `(*stack, H, W // 2 + 1)`."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The weights that act on images, by name, with the leading dimensions of the stack."""

    def refresh(self, tol: float = NORM_TOL) -> None:
        """Called whenever the parameters have changed; `tol` is for norms that are measured then."""

    def require(self, f: Tensor) -> None:
        """Refuse data that the weights cannot act on.

        Raises:
            ValueError: says what was expected.
        """
        stack = tuple(self.A.shape[: -self.weight_dims])
        pixels = self.A.shape[-1] if self.weight_dims == 2 else None
        fits = f.dim() == len(stack) + 4 and f.shape[: len(stack)] == stack
        if pixels is None:
            fits, size = fits and f.shape[-3] == 1, "C = 1"
        else:
            fits, size = fits and f.shape[-3:].numel() == pixels, f"C H W = {pixels}, as the weights have it"
        if not fits:
            layout = ", ".join([*map(str, stack), "N", "C", "H", "W"])
            raise ValueError(f"images: got {tuple(f.shape)}, allowed: ({layout}) with {size}")

    def field(self, u: Tensor, gamma: Tensor, tau: Tensor) -> Tensor:
        """`gamma C^T sigma(A u + b)`, which is `grad R(u)` when `C = A`.

        Args:
            u: `(*stack, batch, C, H, W)`, images.
            gamma: `(*stack)`, weight of the regularizer.
            tau: `(*stack)`, step size, which is the threshold of softshrink.

        Returns:
            Tensor like `u`.
        """
        z = self.analysis(u)
        return broadcast(gamma, u) * self.synthesis(self.activation.sigma(z, broadcast(tau, z)), u)

    @torch.no_grad()
    def vjp(self, u: Tensor, gamma: Tensor, tau: Tensor) -> Callable[[Tensor], Tensor]:
        """The transposed Jacobian of `field` at `u`, `w -> gamma A^T (sigma'(A u + b) * C w)`."""
        z = self.analysis(u)
        slope = self.activation.slope(z, broadcast(tau, z))

        @torch.no_grad()
        def transposed_jacobian(w: Tensor) -> Tensor:
            return broadcast(gamma, w) * self.adjoint_analysis(slope * self.analysis_of_synthesis(w), w)

        return transposed_jacobian

    def energy(self, u: Tensor, gamma: Tensor, tau: Tensor) -> Tensor:
        """`R(u) = gamma sum phi(A u + b)` of every image, `(*stack, batch)`."""
        z = self.analysis(u)
        potential = self.activation.potential(z, broadcast(tau, z))
        return gamma[..., None] * potential.flatten(u.dim() - 3).sum(-1)


class DenseFieldsOfExperts(FieldsOfExperts):
    """Dense fields of experts: `A` mixes all pixels of an image of `n` pixels into `m` experts.

    Args:
        A: `(*stack, m, n)`, analysis operator.
        b: `(*stack, m)`, bias.
        C: `(*stack, m, n)`, or None to tie `C = A`, which makes the field a gradient.
        activation: such as `RELU`.
    """

    weight_dims = 2

    def __init__(self, A: Tensor, b: Tensor, C: Tensor | None, activation: Activation) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.b = nn.Parameter(b)
        self.C = None if C is None else nn.Parameter(C)
        self.activation = activation

    def analysis(self, u: Tensor) -> Tensor:
        """`A u + b`, `(*stack, batch, m)`, of images `u` `(*stack, batch, C, H, W)`."""
        return product(u.flatten(-3), self.A.mT) + self.b[..., None, :]

    def analysis_of_synthesis(self, w: Tensor) -> Tensor:
        return product(w.flatten(-3), (self.A if self.C is None else self.C).mT)

    def synthesis(self, z: Tensor, u: Tensor) -> Tensor:
        return product(z, self.A if self.C is None else self.C).view_as(u)

    def adjoint_analysis(self, z: Tensor, u: Tensor) -> Tensor:
        return product(z, self.A).view_as(u)

    def curvature(self, shape: torch.Size) -> Tensor:
        return product((self.A if self.C is None else self.C).mT, self.A)

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


GRADIENT_NORM = 2.7300944
"""The norm to which kernels are scaled, the paper's for the finite-difference gradient."""

CACHED = 2**18
"""Experts that a core's cache holds while they are worked on."""


class ConvFieldsOfExperts(FieldsOfExperts):
    """Convolutional fields of experts: `F` kernels, zero padding, no bias (see `lib.kernels`).

    In training each of `A` and `C` acts as `GRADIENT_NORM A / ||A||`. The norm is that of the operator on
    images of the training's size. It is refreshed after every optimizer step, by a search that goes on from
    the last direction. For the gradient it is a constant, as in the paper, or, where it is differentiated,
    `||A v||` at the image `v` that attains it: `d||A|| = <A v, dA v> / ||A||`.

    Args:
        A: `(*stack, F, k, k)`, analysis kernels, `k` odd.
        C: `(*stack, F, k, k)`, or None to tie `C = A`, which makes the field a gradient.
        activation: such as `smoothed_sign(100)`.
        direction: `(*stack, 1, 1, H, W)`, image from which the search for the norm starts; None takes the
            kernels as they are.
        differentiate_norm: whether the gradient goes through the norm.
    """

    weight_dims = 3
    scales: Tensor
    directions: Tensor

    def __init__(
        self,
        A: Tensor,
        C: Tensor | None,
        activation: Activation,
        direction: Tensor | None = None,
        differentiate_norm: bool = False,
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        # A copy, for `C` may be given as the same tensor.
        self.C = None if C is None else nn.Parameter(C.clone())
        self.activation = activation
        sets = 1 if C is None else 2
        self.normalized = direction is not None
        self.differentiate_norm = differentiate_norm and self.normalized
        self.register_buffer("scales", A.new_ones(*A.shape[:-3], sets))
        if direction is not None:
            self.register_buffer("directions", torch.stack([direction] * sets, dim=-5))
            self.refresh(tol=0.0)

    def refresh(self, tol: float = NORM_TOL) -> None:
        """Measure the norms of the kernels, where they are to be normalized."""
        if self.normalized:
            kernels = torch.stack([k.detach() for k in (self.A, self.C) if k is not None], dim=-4)
            norms, self.directions = spectral_norm(kernels, self.directions, NORM_ITERATIONS, tol)
            self.scales = GRADIENT_NORM / norms

    def _kernels(self, name: str) -> Tensor:
        kernels, index = (self.A, 0) if name == "A" or self.C is None else (self.C, 1)
        scale = self.scales[..., index]
        if self.differentiate_norm and torch.is_grad_enabled():
            worst = correlate(kernels, self.directions.select(-5, index))
            scale = GRADIENT_NORM / torch.linalg.vector_norm(worst, dim=(-3, -2, -1))
        return scale[..., None, None, None] * kernels

    def _parts(self, u: Tensor) -> tuple[Tensor, ...]:
        """The images in groups whose experts stay in the cache; on a GPU all at once."""
        at_once = CACHED // (self.A.shape[-3] * u.shape[-2:].numel())
        return (u,) if u.device.type != "cpu" else u.split(max(1, at_once), dim=-4)

    def field(self, u: Tensor, gamma: Tensor, tau: Tensor) -> Tensor:
        return torch.cat(
            [super(ConvFieldsOfExperts, self).field(part, gamma, tau) for part in self._parts(u)], -4
        )

    def vjp(self, u: Tensor, gamma: Tensor, tau: Tensor) -> Callable[[Tensor], Tensor]:
        vjps = [super(ConvFieldsOfExperts, self).vjp(part, gamma, tau) for part in self._parts(u)]

        def transposed_jacobian(w: Tensor) -> Tensor:
            return torch.cat([vjp(part) for vjp, part in zip(vjps, self._parts(w), strict=True)], -4)

        return transposed_jacobian

    def analysis(self, u: Tensor) -> Tensor:
        """`A u`, `(*stack, batch, F r r, blocks)`, block by block, of images `(*stack, batch, 1, H, W)`."""
        return correlate(self._kernels("A"), u)

    def analysis_of_synthesis(self, w: Tensor) -> Tensor:
        return correlate(self._kernels("C"), w)

    def synthesis(self, z: Tensor, u: Tensor) -> Tensor:
        return correlate_adjoint(self._kernels("C"), z, *u.shape[-2:])

    def adjoint_analysis(self, z: Tensor, u: Tensor) -> Tensor:
        return correlate_adjoint(self._kernels("A"), z, *u.shape[-2:])

    def curvature(self, shape: torch.Size) -> Tensor:
        A, C = (torch.fft.rfft2(self._kernels(name), s=shape[-2:]) for name in ("A", "C"))
        modulus: Tensor = (C.conj() * A).sum(-3).abs()
        return modulus

    def weights(self) -> dict[str, Tensor]:
        return {name: self._kernels(name).detach() for name, _ in self.named_parameters()}


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
