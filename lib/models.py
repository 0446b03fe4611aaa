"""The two models: fixed points of one step map, with tied (bilevel) or free (DEQ) synthesis weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lib.operators import Identity, Mask, Operator
from lib.products import product
from lib.regularizer import GRADIENT_NORM, NORM_TOL, ConvFieldsOfExperts, FieldsOfExperts, broadcast
from lib.solvers import FixedPointProblem, StepMap

WEIGHT_PACE = 8.0
"""`lambda = exp(WEIGHT_PACE t)`: steps in `t` as long as those in the kernels are then as fast."""

PRECONDITIONER_RIDGE = 1e-2
"""Relative to `lambda`, for where neither `K` nor the experts see much."""


class FixedPointModel(nn.Module):
    """Reconstruction as a fixed point of `T(u) = u - tau (lambda K^T (K u - f) + field(u))`.

    With tied weights the field is `grad R` and `T` is one step of gradient descent on the lower level
    `lambda/2 ||K u - f||^2 + R(u)`: the bilevel model. With a free `C` it is the deep equilibrium model.

    Args:
        operator: `K`.
        regularizer: the learned field; tied or free.
        tau: step size, a number or `(*stack)`.
        lam: weight `lambda` of the data term, a number or `(*stack)`.
        gamma: weight of the regularizer, a number or `(*stack)`.
        learn_weight: whether `lambda` is a parameter too, `exp(WEIGHT_PACE t)`, which starts at `lam`; the
            step then follows it (`refresh`) and needs kernels that are normalized.
    """

    tau: Tensor
    lam: Tensor
    gamma: Tensor

    def __init__(
        self,
        operator: Operator,
        regularizer: FieldsOfExperts,
        tau: float | Tensor,
        lam: float | Tensor,
        gamma: float | Tensor,
        learn_weight: bool = False,
    ) -> None:
        super().__init__()
        self.operator = operator
        self.regularizer = regularizer
        A = regularizer.A
        for name, value in (("tau", tau), ("lam", lam), ("gamma", gamma)):
            self.register_buffer(name, torch.as_tensor(value, dtype=A.dtype, device=A.device))
        self.weight = nn.Parameter(self.lam.log() / WEIGHT_PACE) if learn_weight else None
        self._follow_weight()

    def refresh(self, tol: float = NORM_TOL) -> None:
        """Called when the parameters have changed: measures the kernels' norms to `tol`, sets `lambda`, and
        the step `1 / (lambda + gamma max(sigma') N^2)`, with which `T` contracts where `K` loses nothing."""
        self.regularizer.refresh(tol)
        self._follow_weight()

    @torch.no_grad()
    def _follow_weight(self) -> None:
        if self.weight is not None:
            self.lam = torch.exp(WEIGHT_PACE * self.weight)
            self.tau = 1 / (self.lam + self.gamma * self.regularizer.activation.steepest * GRADIENT_NORM**2)

    def weights(self) -> dict[str, Tensor]:
        """All that was learned, by name: those of the regularizer and, where it is learned, `lam`."""
        learned = {} if self.weight is None else {"lam": self.lam}
        return self.regularizer.weights() | learned

    def problem(self, f: Tensor, P: Tensor | None = None) -> FixedPointProblem:
        """`u = T(u)` for the data `f`, with all that is known of it.

        Only kernels go from image to image: a matrix multiplies the whole batch at once, and fewer images are
        not much cheaper, nor the same to the bit. In denoising the adjoint equation starts from the solution
        of `w = (1 - tau lambda) w + dL/du*`, that of the data term alone.

        Args:
            f: `(*stack, batch, C, H, W)`.
            P: what `preconditioner` returned, for solves that are preconditioned.

        Raises:
            ValueError: the images are not of the size or the number of channels that the weights are for.
        """
        conv = isinstance(self.regularizer, ConvFieldsOfExperts)

        def precondition(r: Tensor) -> Tensor:
            return r if P is None else self.precondition(r, P)

        def solved_without_experts(g: Tensor) -> Tensor:
            return g / broadcast(self.tau * self.lam, g)

        start = solved_without_experts if isinstance(self.operator, Identity) else None
        return FixedPointProblem(
            self.step_map(f),
            self.vjp,
            restrict=(lambda images: self.step_map(f.index_select(-4, images))) if conv else None,
            precondition=None if P is None else precondition,
            first_adjoint=start if P is None else precondition,
        )

    def step_map(self, f: Tensor) -> StepMap:
        """`T` for the data `f`, `(*stack, batch, C, H, W)`, which it refuses as `problem` does."""
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
        """`w -> J^T w` with `J = dT/du` at `u`, `(*stack, batch, C, H, W)`, whatever the data are."""
        K, field_vjp = self.operator, self.regularizer.vjp(u, self.gamma, self.tau)
        tau, lam = broadcast(self.tau, u), broadcast(self.lam, u)

        @torch.no_grad()
        def transposed_jacobian(w: Tensor) -> Tensor:
            return w - tau * (lam * K.normal(w) + field_vjp(w))

        return transposed_jacobian

    @torch.no_grad()
    def preconditioner(self, shape: torch.Size) -> Tensor:
        """`P`, near `(I - dT/du)^-1` for all data at once.

        `I - dT/du = tau (lambda K^T K + gamma C^T D A)`, where `D` holds the slopes of `sigma`, each image's
        own. `P` is the inverse with half the steepest slope in place of each, and a ridge: the eigenvalues of
        `P (I - dT/du)` are then in [0, 2) with tied dense weights, whatever `tau` is. Of kernels `P` is a
        convolution, as if images went on periodically, and for a DEQ the modulus of `C^T A` is taken.

        Args:
            shape: `(C, H, W)`, of an image.

        Returns:
            For dense weights the symmetric matrix `(*stack, n, n)`, `n` the pixels of an image; the identity
            where no inverse can be had. For kernels the transfer function `(*stack, H, W // 2 + 1)`, real.

        Raises:
            ValueError: dense weights are free, or kernels meet a `K` that is no convolution.
        """
        field, conv = self.regularizer, isinstance(self.regularizer, ConvFieldsOfExperts)
        if (conv and isinstance(self.operator, Mask)) or not (conv or field.C is None):
            raise ValueError("preconditioner: allowed for tied dense weights, and for kernels without a mask")
        curvature = field.activation.steepest / 2 * field.curvature(shape)
        tau, lam, gamma = (value[..., None, None] for value in (self.tau, self.lam, self.gamma))
        if conv:
            impulse = curvature.new_zeros(shape)
            impulse[..., 0, 0] = 1
            data = torch.fft.rfft2(self.operator.normal(impulse))[0].abs() + PRECONDITIONER_RIDGE
            transfer: Tensor = 1 / (tau * (lam * data + gamma * curvature))
            return transfer
        identity = torch.eye(curvature.shape[-1]).to(curvature)
        data = self.operator.normal(identity.view(-1, *shape)).flatten(1) + PRECONDITIONER_RIDGE * identity
        factor, info = torch.linalg.cholesky_ex(tau * (lam * data + gamma * curvature))
        # By hand: `cholesky_inverse` rounds by a matrix's place in memory, and members would not be equal.
        root = torch.linalg.solve_triangular(factor, identity, upper=False)
        P = product(root.mT, root)
        usable = (info == 0)[..., None, None] & P.isfinite().all(-1).all(-1)[..., None, None]
        return torch.where(usable, P, identity)

    def precondition(self, r: Tensor, P: Tensor) -> Tensor:
        """`P r` for residuals `r` `(*stack, batch, C, H, W)` and what `preconditioner` returned."""
        if isinstance(self.regularizer, ConvFieldsOfExperts):
            filtered: Tensor = torch.fft.irfft2(P[..., None, None, :, :] * torch.fft.rfft2(r), s=r.shape[-2:])
            return filtered
        return product(r.flatten(-3), P).view_as(r)

    def lower_level(self, u: Tensor, f: Tensor) -> Tensor:
        """`lambda/2 ||K u - f||^2 + R(u)` of every image, `(*stack, batch)`; `R` is that of `A, b`."""
        misfit = (self.operator.forward(u) - f).square().sum((-3, -2, -1))
        return self.lam[..., None] / 2 * misfit + self.regularizer.energy(u, self.gamma, self.tau)
