"""Fixed-point models: one step map, with tied (bilevel) or free (DEQ) synthesis weights."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from lib.operators import Identity, Mask, Operator
from lib.products import product
from lib.regularizer import (
    GRADIENT_NORM,
    NORM_TOL,
    ConvFieldsOfExperts,
    FieldsOfExperts,
    Regularizer,
    broadcast,
)
from lib.solvers import FixedPointProblem, StepMap

WEIGHT_PACE = 8.0
"""Scale of the learned weight, `lambda = exp(WEIGHT_PACE t)`: `t` learns about as fast as the kernels."""

PRECONDITIONER_RIDGE = 1e-2
"""Ridge of the preconditioner relative to `lambda`, for directions that neither `K` nor the experts see."""


class FixedPointModel(nn.Module):
    """Reconstruction as a fixed point of `T(u) = u - tau (lambda K^T (K u - f) + field(u))`.

    With tied weights, `C = A`, the field is `grad R` and `T` is a step of gradient descent on the lower level
    `lambda/2 ||K u - f||^2 + R(u)`: the bilevel model. With a free `C` it is a deep equilibrium model (DEQ).

    Args:
        operator: `K`.
        regularizer: `FieldsOfExperts`, or another field such as `lib.deepinverse.PriorField`, which is
            differentiated by autograd alone.
        tau: step size, a number or `(*stack)`.
        lam: weight `lambda` of the data term, a number or `(*stack)`.
        gamma: weight of the regularizer, a number or `(*stack)`.
        learn_weight: whether `lambda` is a parameter too, `exp(WEIGHT_PACE t)`, which starts at `lam`; the
            step size then depends on it (`refresh`), and kernels must be normalized.

    >>> from lib.regularizer import smoothed_sign
    >>> A, f = torch.randn(4, 3, 3), torch.randn(2, 1, 8, 8)
    >>> model = FixedPointModel(Identity(), ConvFieldsOfExperts(A, None, smoothed_sign(5)), 0.01, 4, 1)
    >>> model.step_map(f)(f).shape
    torch.Size([2, 1, 8, 8])
    """

    tau: Tensor
    lam: Tensor
    gamma: Tensor

    def __init__(
        self,
        operator: Operator,
        regularizer: Regularizer,
        tau: float | Tensor,
        lam: float | Tensor,
        gamma: float | Tensor,
        learn_weight: bool = False,
    ) -> None:
        super().__init__()
        self.operator, self.regularizer = operator, regularizer
        like = next(regularizer.parameters(), torch.empty(0))
        for name, value in (("tau", tau), ("lam", lam), ("gamma", gamma)):
            self.register_buffer(name, torch.as_tensor(value, dtype=like.dtype, device=like.device))
        self.weight = nn.Parameter(self.lam.log() / WEIGHT_PACE) if learn_weight else None
        self._follow_weight()

    def refresh(self, tol: float = NORM_TOL) -> None:
        """Update everything that depends on the parameters after they have changed.

        Kernels' norms are computed to the relative tolerance `tol`. If `lambda` is learned, the step size is
        `1 / (lambda + gamma max(p sigma') N^2)`, `N = GRADIENT_NORM`: `T` then contracts if `K` is injective.
        """
        self.regularizer.refresh(tol)
        self._follow_weight()

    @torch.no_grad()
    def _follow_weight(self) -> None:
        if self.weight is not None:
            self.lam = torch.exp(WEIGHT_PACE * self.weight)
            self.tau = 1 / (self.lam + self.gamma * self.regularizer.steepest() * GRADIENT_NORM**2)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of the regularizer and a learned `lam`, by name."""
        return self.regularizer.weights() | ({} if self.weight is None else {"lam": self.lam})

    def problem(self, f: Tensor, P: Tensor | None = None) -> FixedPointProblem:
        """Return the problem `u = T(u)` for the data `f`.

        Kernels are evaluated on running images only. Dense weights are not: one product serves the whole
        batch, and fewer images would be hardly cheaper and round differently. In denoising the adjoint
        equation starts from the solution for the data term alone, of `w = (1 - tau lambda) w + dL/du*`.

        Args:
            f: `(*stack, batch, C, H, W)`.
            P: a `preconditioner`; None solves without one.

        Raises:
            ValueError: the weights are for images of another size or number of channels.
        """
        conv = isinstance(self.regularizer, ConvFieldsOfExperts)
        precondition = None if P is None else partial(self.precondition, P=P)
        denoising = isinstance(self.operator, Identity)
        start = (lambda g: g / broadcast(self.tau * self.lam, g)) if denoising else None
        return FixedPointProblem(
            self.step_map(f),
            self.vjp if isinstance(self.regularizer, FieldsOfExperts) else None,
            restrict=(lambda images: self.step_map(f.index_select(-4, images))) if conv else None,
            precondition=precondition,
            first_adjoint=precondition or start,
        )

    def step_map(self, f: Tensor) -> StepMap:
        """Return `T` for the data `f`, `(*stack, batch, C, H, W)`; errors are those of `problem`."""
        K, Ktf = self.operator, self.operator.adjoint(f)
        self.regularizer.require(Ktf)
        lam = self.lam if self.weight is None else torch.exp(WEIGHT_PACE * self.weight)
        tau, lam = broadcast(self.tau, f), broadcast(lam, f)

        def T(u: Tensor) -> Tensor:
            data_gradient = lam * (K.normal(u) - Ktf)
            return u - tau * (data_gradient + self.regularizer.field(u, self.gamma, self.tau))

        return T

    @torch.no_grad()
    def vjp(self, u: Tensor) -> StepMap:
        """Return `w -> J^T w` with `J = dT/du` at `u`, `(*stack, batch, C, H, W)`, the same for all data."""
        K, field = self.operator, cast(FieldsOfExperts, self.regularizer)
        field_vjp = field.vjp(u, self.gamma, self.tau)
        tau, lam = broadcast(self.tau, u), broadcast(self.lam, u)

        @torch.no_grad()
        def transposed_jacobian(w: Tensor) -> Tensor:
            return w - tau * (lam * K.normal(w) + field_vjp(w))

        return transposed_jacobian

    @torch.no_grad()
    def preconditioner(self, shape: torch.Size) -> Tensor:
        """Return an approximation `P` of `(I - dT/du)^-1` for all images.

        `I - dT/du = tau (lambda K^T K + gamma C^T D A)` with the slopes of `sigma` in the diagonal `D`, which
        differ from image to image. `P` is the inverse with half the steepest slope in place of each, and a
        ridge: with tied dense weights the eigenvalues of `P (I - dT/du)` are in [0, 2) for every `tau`. For
        kernels `P` is a circular convolution; for those of a DEQ it uses the modulus of `C^T A`.

        Args:
            shape: `(C, H, W)`, of an image.

        Returns:
            For dense weights a symmetric matrix `(*stack, n, n)`, `n` the pixels of an image; the identity
            if there is no inverse. For kernels a real transfer function `(*stack, H, W // 2 + 1)`.

        Raises:
            ValueError: dense weights are free, or `K` is a mask and the weights are kernels.
        """
        field, masked = self.regularizer, isinstance(self.operator, Mask)
        conv = isinstance(field, ConvFieldsOfExperts)
        if not isinstance(field, FieldsOfExperts) or (masked if conv else field.C is not None):
            raise ValueError("A preconditioner requires tied dense weights, or kernels without a mask.")
        curvature = field.activation.steepest / 2 * field.curvature(shape)
        tau, lam, gamma = (value[..., None, None] for value in (self.tau, self.lam, self.gamma))
        if conv:
            impulse = curvature.new_zeros(1, *shape)
            impulse[..., 0, 0] = 1
            data = torch.fft.rfft2(self.operator.normal(impulse))[0, 0].abs() + PRECONDITIONER_RIDGE
            transfer: Tensor = 1 / (tau * (lam * data + gamma * curvature))
            return transfer
        identity = torch.eye(curvature.shape[-1]).to(curvature)
        data = self.operator.normal(identity.view(-1, *shape)).flatten(1) + PRECONDITIONER_RIDGE * identity
        factor, info = torch.linalg.cholesky_ex(tau * (lam * data + gamma * curvature))
        # `cholesky_inverse` rounds depending on the alignment in memory: equal members would differ.
        root = torch.linalg.solve_triangular(factor, identity, upper=False)
        P = product(root.mT, root)
        usable = (info == 0)[..., None, None] & P.isfinite().all(-1).all(-1)[..., None, None]
        return torch.where(usable, P, identity)

    def precondition(self, r: Tensor, P: Tensor) -> Tensor:
        """Return `P r` of residuals `r`, `(*stack, batch, C, H, W)`, for a `preconditioner` `P`."""
        if isinstance(self.regularizer, ConvFieldsOfExperts):
            filtered: Tensor = torch.fft.irfft2(P[..., None, None, :, :] * torch.fft.rfft2(r), s=r.shape[-2:])
            return filtered
        return product(r.flatten(-3), P).view_as(r)

    def lower_level(self, u: Tensor, f: Tensor) -> Tensor:
        """Return `lambda/2 ||K u - f||^2 + R(u)` of every image, `(*stack, batch)`; `R` as in `energy`."""
        misfit = (self.operator.forward(u) - f).square().sum((-3, -2, -1))
        return self.lam[..., None] / 2 * misfit + self.regularizer.energy(u, self.gamma, self.tau)
