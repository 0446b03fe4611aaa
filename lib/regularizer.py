"""Fields-of-experts regularizers `R(u) = gamma sum phi(A u + b)` and their gradient fields.

`grad R(u) = gamma A^T sigma(A u + b)` with `sigma = phi'` (Roth and Black, IJCV 82, 2009). The field of a
deep equilibrium model, `gamma C^T sigma(A u + b)`, has a synthesis `C` of its own, free or a function of `A`.
`A` is a dense matrix with a bias, or a convolution with several kernels and no bias.

Every tensor may have leading dimensions: a stack of models that are evaluated together.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from lib.kernels import correlate, correlate_adjoint, spectral_norm
from lib.operators import Operator
from lib.products import product


@dataclass(frozen=True)
class Activation:
    """An activation function `sigma`, its slope `sigma'` and its potential `phi`, `sigma = phi'`.

    All three are functions of `(z, tau)` with the step size `tau`.

    Attributes:
        sigma, slope, potential: `sigma`, `sigma'` and `phi`, elementwise.
        steepest: the largest slope; a preconditioner assumes that none is negative.
    """

    sigma: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    potential: Callable[[Tensor, Tensor], Tensor]
    steepest: float = 1.0


NORM_ITERATIONS, NORM_TOL = 500, 3e-3
"""Maximum number of Lanczos steps for a norm, and their relative tolerance after an optimizer step."""

RELU = Activation(
    sigma=lambda z, tau: z.relu(),
    slope=lambda z, tau: (z > 0).to(z),
    potential=lambda z, tau: z.relu().square() / 2,
)
SOFTSHRINK = Activation(
    sigma=lambda z, tau: z - torch.clamp(z, -tau, tau),
    slope=lambda z, tau: (z.abs() > tau).to(z),
    potential=lambda z, tau: (z - torch.clamp(z, -tau, tau)).square() / 2,
)
LINEAR = Activation(
    sigma=lambda z, tau: z, slope=lambda z, tau: torch.ones_like(z), potential=lambda z, tau: z.square() / 2
)


def smoothed_sign(sharpness: float) -> Activation:
    """Return the smoothed sign `sigma(z) = tanh(s z)`, with `phi(z) = log(cosh(s z)) / s`.

    With finite differences as kernels, `R` is a smoothed total variation.

    Args:
        sharpness: `s`, the slope of `sigma` at zero.

    >>> smoothed_sign(100).sigma(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor(0.0))
    tensor([-1.,  0.,  1.])
    """

    # torch.sigmoid is several times faster than torch.tanh on a CPU, unless its result is denormal; beyond 40
    # the result is +-1 in every precision.
    def sigma(z: Tensor, tau: Tensor) -> Tensor:
        return torch.add(z.new_tensor(-1), torch.sigmoid((2 * sharpness * z).clamp_(-40, 40)), alpha=2)

    def slope(z: Tensor, tau: Tensor) -> Tensor:
        return sharpness * (1 - sigma(z, tau).square())

    def potential(z: Tensor, tau: Tensor) -> Tensor:
        # log cosh x without overflow
        x = (sharpness * z).abs()
        return (x + torch.log1p(torch.exp(-2 * x)) - math.log(2)) / sharpness

    return Activation(sigma, slope, potential, sharpness)


class LearnedSpline(nn.Module):
    """A learned odd spline `sigma(z) = sum_j (d_j - d_(j+1)) clip(z, -a_j, a_j)`, the same for all experts.

    `d_j` is its slope between the knots `a_(j-1)` and `a_j`, zero beyond the last one, so that the potential
    is a combination of Huber functions. All slopes are positive, and `R` is convex; with `concave` there is
    one more, the last, of -1 (a smoothed minimax concave penalty; Zhang, Ann. Statist. 38(2), 2010).

    Args:
        knots: `(J,)`, positive and ascending.
        slopes: `(J,)`, or `(J - 1,)` with `concave`, positive.
        concave: whether the last slope is -1.

    >>> spline = LearnedSpline(torch.tensor([1.0, 2.0]), torch.tensor([3.0]), concave=True)
    >>> spline.sigma(torch.tensor([0.0, 1.0, 2.0]), torch.tensor(0.0)).round(decimals=2).tolist()
    [0.0, 3.0, 2.0]
    """

    def __init__(self, knots: Tensor, slopes: Tensor, concave: bool) -> None:
        super().__init__()
        self.gaps = nn.Parameter(torch.diff(knots, prepend=torch.zeros_like(knots[:1])).log())
        self.log_slopes = nn.Parameter(slopes.log())
        self.concave = concave

    def shape(self) -> tuple[Tensor, Tensor]:
        """Return the knots and the slopes, both `(J,)`."""
        d = self.log_slopes.exp()
        return self.gaps.exp().cumsum(0), torch.cat([d, -torch.ones_like(d[:1])]) if self.concave else d

    @property
    def steepest(self) -> float:
        """The largest slope."""
        return self.log_slopes.max().exp().item()

    def _terms(self) -> list[tuple[Any, Any]]:
        """Return weights and bounds of the clips; numbers, which are faster, if there is no gradient."""
        a, d = self.shape()
        w = d - torch.cat([d[1:], torch.zeros_like(d[:1])])
        return list(zip(*((w, a) if torch.is_grad_enabled() else (w.tolist(), a.tolist())), strict=True))

    def sigma(self, z: Tensor, tau: Tensor) -> Tensor:
        return cast(Tensor, sum(w * torch.clamp(z, -a, a) for w, a in self._terms()))

    def slope(self, z: Tensor, tau: Tensor) -> Tensor:
        return cast(Tensor, sum(w * (z.abs() < a).to(z) for w, a in self._terms()))

    def potential(self, z: Tensor, tau: Tensor) -> Tensor:
        clipped = [(w, torch.clamp(z, -a, a)) for w, a in self._terms()]
        return cast(Tensor, sum(w * c * (z - c / 2) for w, c in clipped))


Potential = Activation | LearnedSpline


class Regularizer(Protocol):
    """Learned field of a model, with its energy, as in `FieldsOfExperts`."""

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def field(self, u: Tensor, gamma: Tensor, tau: Tensor) -> Tensor: ...
    def energy(self, u: Tensor, gamma: Tensor, tau: Tensor) -> Tensor: ...
    def weights(self) -> dict[str, Tensor]: ...
    def refresh(self, tol: float) -> None: ...
    def require(self, f: Tensor) -> None: ...
    def steepest(self) -> Tensor | float: ...


def broadcast(value: Tensor, like: Tensor) -> Tensor:
    """Return a value per model, `(*stack)`, with as many dimensions as `like` has."""
    return value.view(*value.shape, *[1] * (like.dim() - value.dim()))


class WeightedExperts(nn.Module):
    """`C = P A` with weights `p = exp(t)`, `(*stack, m)`: the field is the gradient of `sum p_i phi(z_i)`."""

    def __init__(self, t: Tensor) -> None:
        super().__init__()
        self.t = nn.Parameter(t.clone())

    def weights(self, A: Tensor) -> Tensor:
        """Return `p`, `(*stack, m)`."""
        return self.t.exp()

    def forward(self, A: Tensor) -> Tensor:
        return broadcast(self.weights(A), A) * A


class WeaklyConvexExperts(WeightedExperts):
    """`C = P A` for kernels, with weights that keep `bound/2 ||u||^2 + R(u)` convex.

    If no slope of `sigma` is below `-concavity`, no eigenvalue of the Hessian of `R` is below
    `-concavity max_w sum_i p_i |A_i(w)|^2`. `p = exp(t)`, scaled down where this exceeds `bound`. The maximum
    of the trigonometric polynomial follows from its values on a grid (Ehlich and Zeller, Math. Z. 86, 1964).

    >>> A, t = torch.ones(1, 3, 3), torch.zeros(1)  # the largest |A(w)|^2 is 81
    >>> [WeaklyConvexExperts(t, 1, bound).weights(A).item() for bound in (1, 100)]
    [0.012..., 1.0]
    """

    def __init__(self, t: Tensor, concavity: float, bound: float) -> None:
        super().__init__(t)
        self.concavity, self.bound = concavity, bound

    def weights(self, A: Tensor) -> Tensor:
        p, k = self.t.exp(), A.shape[-1]
        n = 16 * k
        power = torch.fft.rfft2(A, s=(n, n)).abs().square()
        most = broadcast(p, power).mul(power).sum(-3).amax((-2, -1)) / math.cos(math.pi * (k - 1) / n) ** 2
        return p * (self.bound / (self.concavity * most)).clamp(max=1)[..., None]


class TiedOnKernel(nn.Module):
    """`C = A + E K` for dense `A`, with data `E`, `(*stack, m, C, H, W)`: `C v = A v` wherever `K v = 0`.

    If `K` is a mask, `C` is free at observed pixels and tied at lost ones. If `gamma s ||E||^2 <= 4 lambda`,
    the symmetric part of `I - dT/du` has no negative eigenvalue for any slopes in [0, s].
    """

    def __init__(self, operator: Operator, E: Tensor) -> None:
        super().__init__()
        self.operator, self.E = operator, nn.Parameter(E.clone())

    def forward(self, A: Tensor) -> Tensor:
        return A + self.operator.adjoint(self.E).flatten(-3)


class FieldsOfExperts(nn.Module, ABC):
    """Base class of dense and convolutional fields of experts.

    Attributes:
        A: analysis weights.
        C: synthesis weights, or a module that computes them from `A`; None ties them, `C = A`.
        b: bias, or None.
        activation: `sigma`, its slope and its potential.
        weight_dims: dimensions of `A` behind those of the stack.
    """

    weight_dims: ClassVar[int]
    coupled: Tensor

    def __init__(
        self, A: Tensor, C: Tensor | nn.Module | None, activation: Potential, b: Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("coupled", None)
        # Copies: training changes no tensor of the caller, and `C` may be the same one as `A`.
        self.A = nn.Parameter(A.clone())
        self.C = nn.Parameter(C.clone()) if isinstance(C, Tensor) else C
        self.b = None if b is None else nn.Parameter(b.clone())
        self.activation = activation

    @abstractmethod
    def forward(self, weights: Tensor, u: Tensor) -> Tensor:
        """Return the experts `W u` of images `u`, `(*stack, batch, C, H, W)`, for `A` or `C` as `W`."""

    @abstractmethod
    def adjoint(self, weights: Tensor, z: Tensor, u: Tensor) -> Tensor:
        """Return the images `W^T z` of experts `z`, of the shape of `u`."""

    @abstractmethod
    def curvature(self, shape: torch.Size) -> Tensor:
        """Return `C^T A` on images of a shape `(C, H, W)`.

        Dense weights have a matrix `(*stack, n, n)`, kernels the modulus of a transfer function,
        `(*stack, H, W // 2 + 1)`.
        """

    def analysis(self, u: Tensor) -> Tensor:
        """Return the experts `A u + b` of images `u`."""
        z = self.forward(self.acting("A"), u)
        return z if self.b is None else z + self.b[..., None, :]

    def acting(self, name: str) -> Tensor:
        """Return `A` or `C` as it acts on images, with the leading dimensions of the stack."""
        if name == "A" or self.C is None:
            return self._scaled(self.A, 0)
        if isinstance(self.C, Tensor):
            return self._scaled(self.C, 1)
        return cast(Tensor, self.C(self.acting("A"))) if torch.is_grad_enabled() else self.coupled

    def _scaled(self, weights: Tensor, index: int) -> Tensor:
        return weights

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that act on images, by name."""
        parts = {"A": self.acting("A"), "b": self.b, "C": None if self.C is None else self.acting("C")}
        return {name: part.detach() for name, part in parts.items() if part is not None}

    @torch.no_grad()
    def refresh(self, tol: float = NORM_TOL) -> None:
        """Update everything that depends on the parameters after they have changed; norms to `tol`."""
        if isinstance(self.C, nn.Module):
            self.coupled = self.C(self.acting("A"))

    def steepest(self) -> Tensor | float:
        """Return the largest slope of the weighted activations, `max p_i sigma'`."""
        p = self.C.weights(self.weights()["A"]).amax(-1) if isinstance(self.C, WeightedExperts) else 1.0
        return p * self.activation.steepest

    def require(self, f: Tensor) -> None:
        """Raise ValueError unless the weights can act on images of the shape of `f`."""
        dense, stack = self.weight_dims == 2, tuple(self.A.shape[: -self.weight_dims])
        own, count = (f.shape[-3:], self.A.shape[-1]) if dense else (f.shape[-3:-2], 1)
        if f.dim() != len(stack) + 4 or f.shape[: len(stack)] != stack or own.numel() != count:
            layout = ", ".join([*map(str, stack), "N", "C", "H", "W"])
            size = f"{'C H W' if dense else 'C'} = {count}"
            raise ValueError(f"Images must have shape ({layout}) with {size}, got {tuple(f.shape)}.")

    def field(self, u: Tensor, gamma: Tensor, tau: Tensor) -> Tensor:
        """Return `gamma C^T sigma(A u + b)`, which is `grad R(u)` when `C = A`.

        Args:
            u: `(*stack, batch, C, H, W)`, images.
            gamma: `(*stack)`, weight of the regularizer.
            tau: `(*stack)`, step size, which is the threshold of softshrink.

        Returns:
            Tensor like `u`.
        """
        z = self.analysis(u)
        z = self.activation.sigma(z, broadcast(tau, z))
        return broadcast(gamma, u) * self.adjoint(self.acting("C"), z, u)

    @torch.no_grad()
    def vjp(self, u: Tensor, gamma: Tensor, tau: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the transposed Jacobian of `field` at `u`, `w -> gamma A^T (sigma'(A u + b) * C w)`."""
        z = self.analysis(u)
        slope = self.activation.slope(z, broadcast(tau, z))

        @torch.no_grad()
        def transposed_jacobian(w: Tensor) -> Tensor:
            z = slope * self.forward(self.acting("C"), w)
            return broadcast(gamma, w) * self.adjoint(self.acting("A"), z, w)

        return transposed_jacobian

    def energy(self, u: Tensor, gamma: Tensor, tau: Tensor) -> Tensor:
        """Return `R(u) = gamma sum p_i phi(a_i u + b_i)` of every image, `(*stack, batch)`."""
        z = self.analysis(u)
        potential = self.activation.potential(z, broadcast(tau, z)).flatten(u.dim() - 3)
        if isinstance(self.C, WeightedExperts):
            p = self.C.weights(self.weights()["A"])
            potential = p[..., None, :] * potential.unflatten(-1, (p.shape[-1], -1)).sum(-1)
        return gamma[..., None] * potential.sum(-1)


class DenseFieldsOfExperts(FieldsOfExperts):
    """Dense fields of experts: `A` mixes all pixels of an image of `n` pixels into `m` experts.

    Args:
        A: `(*stack, m, n)`, analysis operator.
        b: `(*stack, m)`, bias.
        C: `(*stack, m, n)`, or a module, evaluated at each `refresh` for solves; None ties `C = A`.
        activation: such as `RELU`.

    >>> field = DenseFieldsOfExperts(torch.eye(2), torch.zeros(2), None, RELU)
    >>> field.energy(torch.tensor([[[[-1.0, 2.0]]]]), gamma=torch.tensor(3.0), tau=torch.tensor(0.1)).item()
    6.0
    """

    weight_dims = 2

    def __init__(self, A: Tensor, b: Tensor, C: Tensor | nn.Module | None, activation: Potential) -> None:
        super().__init__(A, C, activation, b)
        self.refresh()

    def forward(self, weights: Tensor, u: Tensor) -> Tensor:
        return product(u.flatten(-3), weights.mT)

    def adjoint(self, weights: Tensor, z: Tensor, u: Tensor) -> Tensor:
        return product(z, weights).view_as(u)

    def curvature(self, shape: torch.Size) -> Tensor:
        return product(self.acting("C").mT, self.A)


GRADIENT_NORM = 2.7300944
"""Norm to which kernels are scaled: the paper's value for the finite-difference gradient."""

CACHED = 2**18
"""Number of experts whose intermediate results fit in the cache of a CPU core."""


class ConvFieldsOfExperts(FieldsOfExperts):
    """Convolutional fields of experts: `F` kernels, zero padding, no bias (see `lib.kernels`).

    Normalized kernels `A` act as `GRADIENT_NORM A / ||A||`, and so do those of `C`. The norm is that of the
    operator on whole images. It is updated after every optimizer step (`refresh`), starting from the last
    direction. The gradient treats it as a constant, as in the paper, or differentiates `||A v||` at the image
    `v` that attains it: `d||A|| = <A v, dA v> / ||A||`.

    Args:
        A: `(*stack, F, k, k)`, analysis kernels, `k` odd.
        C: `(*stack, F, k, k)`, or a module that computes it from normalized `A`; None ties `C = A`.
        activation: such as `smoothed_sign(100)`.
        direction: `(*stack, 1, 1, H, W)`, image from which the computation of the norm starts; None does
            not normalize the kernels.
        differentiate_norm: whether the gradient goes through the norm.

    >>> A, direction, u = torch.randn(4, 3, 3), torch.randn(1, 1, 8, 8), torch.randn(2, 1, 8, 8)
    >>> field = ConvFieldsOfExperts(A, None, smoothed_sign(100), direction)
    >>> bool(field.analysis(u).norm() <= GRADIENT_NORM * u.norm())
    True
    """

    weight_dims = 3
    scales: Tensor
    directions: Tensor

    def __init__(
        self,
        A: Tensor,
        C: Tensor | nn.Module | None,
        activation: Potential,
        direction: Tensor | None = None,
        differentiate_norm: bool = False,
    ) -> None:
        super().__init__(A, C, activation)
        sets = 2 if isinstance(C, Tensor) else 1
        self.normalized = direction is not None
        self.differentiate_norm = differentiate_norm and self.normalized
        self.register_buffer("scales", A.new_ones(*A.shape[:-3], sets))
        if direction is not None:
            self.register_buffer("directions", torch.stack([direction] * sets, dim=-5))
        self.refresh(tol=0.0)

    @torch.no_grad()
    def refresh(self, tol: float = NORM_TOL) -> None:
        if self.normalized:
            kernels = torch.stack([k.detach() for k in (self.A, self.C) if isinstance(k, Tensor)], dim=-4)
            norms, self.directions = spectral_norm(kernels, self.directions, NORM_ITERATIONS, tol)
            self.scales = GRADIENT_NORM / norms
        super().refresh(tol)

    def _scaled(self, weights: Tensor, index: int) -> Tensor:
        scale = self.scales[..., index]
        if self.differentiate_norm and torch.is_grad_enabled():
            worst = correlate(weights, self.directions.select(-5, index))
            scale = GRADIENT_NORM / torch.linalg.vector_norm(worst, dim=(-3, -2, -1))
        return scale[..., None, None, None] * weights

    def _parts(self, u: Tensor) -> tuple[Tensor, ...]:
        """Split the images into groups whose experts fit in the cache; on a GPU, return all of them."""
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

    def forward(self, weights: Tensor, u: Tensor) -> Tensor:
        return correlate(weights, u)

    def adjoint(self, weights: Tensor, z: Tensor, u: Tensor) -> Tensor:
        return correlate_adjoint(weights, z, *u.shape[-2:])

    def curvature(self, shape: torch.Size) -> Tensor:
        A, C = (torch.fft.rfft2(self.acting(name), s=shape[-2:]) for name in ("A", "C"))
        modulus: Tensor = (C.conj() * A).sum(-3).abs()
        return modulus


def initial_weights(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `A` `(n, n)`, `b` `(n,)` and an independent `C` `(n, n)` for `n` experts on `n` pixels.

    All numbers are from U(-1, 1) / sqrt(n), as torch initializes linear layers.
    """
    bound = n**-0.5
    A, b, C = (torch.empty(s).uniform_(-bound, bound, generator=generator) for s in ((n, n), (n,), (n, n)))
    return A, b, C
