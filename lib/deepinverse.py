"""Adapters to DeepInverse: its physics as `K`, its priors as fields and fields as its priors, reconstructors.

DeepInverse (Tachella et al., JOSS 10(115), 2025) is imported in this module alone: the import takes seconds.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from lib.implicit import implicit_fixed_point
from lib.models import WEIGHT_PACE, FixedPointModel
from lib.solvers import Solver

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # DeepInverse imports torchvision. With a CPU build of torch the operators of PyPI's build for CUDA do not
    # load, and its import fails without the schemas of two of them, which are not used here.
    schemas = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for module in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[module]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepinv


class PhysicsOperator:
    """A linear physics of DeepInverse as an `Operator` of images `(..., C, H, W)`.

    `K^T` is `A_adjoint`, which some physics only approximate by default: fixed points and gradients are then
    those of no energy.

    Args:
        physics: data must have three dimensions behind those of the batch.

    Raises:
        ValueError: the physics is not linear.

    >>> blur = PhysicsOperator(deepinv.physics.Blur(torch.ones(1, 1, 3, 3) / 9, padding="circular"))
    >>> blur.forward(torch.ones(2, 1, 8, 8)).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, physics: Any) -> None:
        if not isinstance(physics, deepinv.physics.LinearPhysics):
            raise ValueError(
                f"`physics` must be a LinearPhysics of DeepInverse, got {type(physics).__name__}."
            )
        self.physics = physics

    def forward(self, u: Tensor) -> Tensor:
        return torch.unflatten(self.physics.A(u.flatten(0, -4)), 0, u.shape[:-3])

    def adjoint(self, v: Tensor) -> Tensor:
        return torch.unflatten(self.physics.A_adjoint(v.flatten(0, -4)), 0, v.shape[:-3])

    def normal(self, u: Tensor) -> Tensor:
        return torch.unflatten(self.physics.A_adjoint_A(u.flatten(0, -4)), 0, u.shape[:-3])


class _NormalOperator(PhysicsOperator):
    """`K` for data given as `K^T f`, so that `f` may have any shape; the step map needs no more of `f`."""

    def adjoint(self, v: Tensor) -> Tensor:
        return v


class PriorField(torch.nn.Module):
    """A prior of DeepInverse as the regularizer of one model: the field `gamma grad` of images in [-1, 1].

    Args:
        prior: whose `grad` autograd can differentiate; its parameters are trained.
        arguments: of `grad` and `fn` after the images, such as `sigma_denoiser`.

    >>> from lib.operators import Identity
    >>> model = FixedPointModel(Identity(), PriorField(deepinv.optim.Tikhonov()), 0.1, 1, 1)
    >>> model.step_map(torch.zeros(2, 1, 8, 8))(torch.ones(2, 1, 8, 8)).mean()  # u - 0.1 (u + u)
    tensor(0.8000)
    """

    def __init__(self, prior: Any, *arguments: Any) -> None:
        super().__init__()
        self.prior, self.arguments = prior, arguments

    def field(self, u: Tensor, gamma: Tensor, tau: Tensor) -> Tensor:
        # An explicit prior requires a gradient of its argument, which is an iterate in a solve.
        return torch.mul(gamma, self.prior.grad(u if u.requires_grad else u.detach(), *self.arguments))

    def energy(self, u: Tensor, gamma: Tensor, tau: Tensor) -> Tensor:
        return torch.mul(gamma, self.prior.fn(u, *self.arguments).view(-1))

    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.prior.named_parameters()}

    def refresh(self, tol: float) -> None:
        """Update nothing: the field alone depends on the parameters."""

    def require(self, f: Tensor) -> None:
        if f.dim() != 4:
            raise ValueError(f"Images must have shape (N, C, H, W), got {tuple(f.shape)}.")

    def steepest(self) -> float:
        raise ValueError("`learn_weight` must be False for a prior of DeepInverse, got True.")


class FieldPrior(deepinv.optim.Prior):
    """A learned field as the gradient of a prior of DeepInverse, for images in [-1, 1].

    With tied weights it is explicit, with the function `R`. DeepInverse's gradient descent with the data
    fidelity `L2`, `lambda_reg = 1 / lambda` and `stepsize = tau lambda` iterates the model's step map.

    Args:
        model: one model, without a stack dimension or with one of size 1.
    """

    def __init__(self, model: FixedPointModel) -> None:
        super().__init__()
        self.model, self.explicit_prior = model, getattr(model.regularizer, "C", None) is None

    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `R(x)` of images `(N, C, H, W)`, `(N,)`; for a DEQ `R` has `A` and `b`."""
        u = x.reshape(*self.model.tau.shape, *x.shape)
        return self.model.regularizer.energy(u, self.model.gamma, self.model.tau).view(-1)

    def grad(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `gamma C^T sigma(A x + b)`, `(N, C, H, W)` like `x`."""
        u = x.reshape(*self.model.tau.shape, *x.shape)
        return self.model.regularizer.field(u, self.model.gamma, self.model.tau).view_as(x)


class Reconstructor(deepinv.models.Reconstructor):
    """A model as a reconstructor of DeepInverse, for its trainer and its metrics.

    Images of DeepInverse are in [0, 1]: `x = (u + 1) / 2`. In the units of `u` its data `y` are `2 y - A 1`,
    and noise of standard deviation `s` has `2 s`. Gradients are implicit. In training mode each call
    updates the norms of normalized kernels (`FixedPointModel.refresh`).

    Args:
        model: such as `run.model()`. Its `K` is not used; its `lambda` fits the noise of its training.
        solver: solver of the fixed point.
        adjoint_solver: solver of the adjoint equation; None uses `solver`.
        norm: upper bound of the norm of the physics. If it is above 1, the step size becomes
            `1 / (1 / tau + lambda (norm^2 - 1))`, so that contractions remain contractions. Softshrink, whose
            threshold is the step size, requires a norm of 1.

    Attributes:
        solution: the last `Solution`, without a gradient.
    """

    def __init__(
        self, model: FixedPointModel, solver: Solver, adjoint_solver: Solver | None = None, norm: float = 1.0
    ) -> None:
        super().__init__()
        self.model, self.solver, self.adjoint_solver, self.norm = model, solver, adjoint_solver, norm

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and update what depends on the parameters."""
        self.model.refresh()
        super().train(mode)
        return self

    def forward(self, y: Tensor, physics: Any, **kwargs: Any) -> Tensor:
        """Reconstruct data `y`, `(N, ...)`, of a linear physics as images `(N, C, H, W)` in [0, 1].

        Raises:
            ValueError: the physics is not linear, or the weights are for other images.
        """
        K, model = _NormalOperator(physics), self.model
        if self.training:
            model.refresh()
        Kty = physics.A_adjoint(y)
        Ktf = 2 * Kty - K.normal(torch.ones_like(Kty))
        lam = model.lam if model.weight is None else torch.exp(WEIGHT_PACE * model.weight)
        tau = 1 / (1 / model.tau + lam.detach() * max(0.0, self.norm**2 - 1))
        problem = FixedPointModel(K, model.regularizer, tau, lam, model.gamma).problem(Ktf)
        solution = implicit_fixed_point(problem, Ktf, self.solver, self.adjoint_solver)
        self.solution = replace(solution, value=solution.value.detach())
        return (solution.value + 1) / 2
