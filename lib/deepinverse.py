"""DeepInverse beside this library: its physics as `K`, our field as its prior, our models as reconstructors.

This is the one module that imports DeepInverse (Tachella et al., JOSS 10(115), 2025), which takes seconds.
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
from lib.solvers import Solution, Solver

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # DeepInverse imports torchvision. PyPI's is built for CUDA: beside a CPU build of torch its operators do
    # not load, and its import fails for want of two schemas, of operators that nothing here calls.
    schemas = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for module in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[module]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepinv


class PhysicsOperator:
    """A linear physics of DeepInverse as `K`, an `Operator` of images `(..., C, H, W)`.

    `K^T` is `A_adjoint`, which not every physics has exactly: ask for the exact one, or fixed points and
    gradients are those of no energy (see `tomography`).

    Args:
        physics: with `A`, `A_adjoint` and data of three dimensions behind those of the batch.

    Raises:
        ValueError: the physics is not linear.
    """

    def __init__(self, physics: Any) -> None:
        if not isinstance(physics, deepinv.physics.LinearPhysics):
            raise ValueError(
                f"physics: got {type(physics).__name__}, allowed: a LinearPhysics of DeepInverse"
            )
        self.physics = physics

    def forward(self, u: Tensor) -> Tensor:
        return _batched(self.physics.A(u.flatten(0, -4)), u)

    def adjoint(self, v: Tensor) -> Tensor:
        return _batched(self.physics.A_adjoint(v.flatten(0, -4)), v)

    def normal(self, u: Tensor) -> Tensor:
        return _batched(self.physics.A_adjoint_A(u.flatten(0, -4)), u)


class _NormalOperator(PhysicsOperator):
    """`K` for those who have `K^T f` in the place of the data `f`, which may then be of any shape.

    The step map, its Jacobian and its fixed points see no more of the data.
    """

    def adjoint(self, v: Tensor) -> Tensor:
        return v


def _batched(images: Tensor, like: Tensor) -> Tensor:
    """What DeepInverse returned, `(N, ...)`, with the batch dimensions of what it was given."""
    return images.view(*like.shape[:-3], *images.shape[1:])


def with_operator(model: FixedPointModel, operator: Any, norm: float = 1.0) -> FixedPointModel:
    """A model with another `K`; the weights are shared, and gradients reach those of `model`.

    Args:
        model: with kernels, or with dense weights and images of their size.
        operator: an `Operator`.
        norm: what `||K||` is at most; above 1 the step is shortened to `1 / (1 / tau + lambda (norm^2 - 1))`,
            which keeps a contraction one. Softshrink, whose threshold is the step, wants a norm of 1.
    """
    lam = model.lam if model.weight is None else torch.exp(WEIGHT_PACE * model.weight)
    tau = 1 / (1 / model.tau + lam.detach() * max(0.0, norm**2 - 1))
    return FixedPointModel(operator, model.regularizer, tau, lam, model.gamma)


class FieldPrior(deepinv.optim.Prior):
    """The learned field as the gradient of DeepInverse's prior, for images in [-1, 1].

    With tied weights it is explicit, with `R` as its function. Gradient descent with the data fidelity `L2`
    of deviation 1 has our step map with `lambda_reg = 1 / lambda` and `stepsize = tau lambda`.

    Args:
        model: has the field and its weight `gamma`; one model, whose leading dimension, if any, is 1.
    """

    def __init__(self, model: FixedPointModel) -> None:
        super().__init__()
        self.model = model
        self.explicit_prior = model.regularizer.C is None

    def fn(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`R(x)` of every image, `(N,)`, of images `(N, C, H, W)`; of a DEQ that of `A, b` alone."""
        model = self.model
        return model.regularizer.energy(self._stacked(x), model.gamma, model.tau).view(-1)

    def grad(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`gamma C^T sigma(A x + b)`, `(N, C, H, W)` like `x`."""
        return self.model.regularizer.field(self._stacked(x), self.model.gamma, self.model.tau).view_as(x)

    def _stacked(self, x: Tensor) -> Tensor:
        return x.reshape(*self.model.tau.shape, *x.shape)


class Reconstructor(deepinv.models.Reconstructor):
    """A model as a reconstructor of DeepInverse: `forward(y, physics)`, for its trainer and its metrics.

    Images are in [0, 1], as DeepInverse has them: with `x = (u + 1) / 2` the data are `2 y - A 1` in ours,
    and a noise of deviation `s` is one of `2 s`. Gradients are implicit ones. In training each call measures
    the norms of kernels that are normalized (`FixedPointModel.refresh`).

    Args:
        model: such as `run.model()`; its `K` is not used, its `lambda` is for the noise of its training.
        solver: such as `make_solver(run.config)`.
        adjoint_solver: of the adjoint equation; the same when None.
        norm: what the norm of the physics is at most (see `with_operator`).

    Attributes:
        solution: the last `Solution`, without a gradient: its `status` says which images have converged.
    """

    solution: Solution

    def __init__(
        self, model: FixedPointModel, solver: Solver, adjoint_solver: Solver | None = None, norm: float = 1.0
    ) -> None:
        super().__init__()
        self.model, self.solver, self.adjoint_solver, self.norm = model, solver, adjoint_solver, norm

    def train(self, mode: bool = True) -> Self:
        """As of every module; what the last steps of an optimizer changed is measured when training ends."""
        self.model.refresh()
        super().train(mode)
        return self

    def forward(self, y: Tensor, physics: Any, **kwargs: Any) -> Tensor:
        """Reconstruct data `y`, `(N, ...)`, of a linear physics as images `(N, C, H, W)` in [0, 1].

        Raises:
            ValueError: the physics is not linear, or its images are not what the weights are for.
        """
        K = _NormalOperator(physics)
        if self.training:
            self.model.refresh()
        Kty = physics.A_adjoint(y)
        Ktf = 2 * Kty - K.normal(torch.ones_like(Kty))
        problem = with_operator(self.model, K, self.norm).problem(Ktf)
        solution = implicit_fixed_point(problem, Ktf, self.solver, self.adjoint_solver)
        self.solution = replace(solution, value=solution.value.detach())
        return (solution.value + 1) / 2


def tomography(side: int, angles: int) -> Any:
    """DeepInverse's parallel-beam tomography with the exact adjoint, of a norm just below 1.

    The adjoint differentiates `A` backwards. DeepInverse also has a back-projection that interpolates, which
    is only near the adjoint: the two inner products differ in the third digit.

    Args:
        side: of the square images in pixels.
        angles: number of projections, evenly spaced over half a turn.
    """
    turn = torch.arange(angles) * (180.0 / angles)
    physics = deepinv.physics.Tomography(
        angles=turn, img_width=side, circle=False, adjoint_via_backprop=True, normalize=True
    )
    # Measured from below, with other last digits each time: rounded up it is the same on every machine.
    physics.operator_norm = torch.ceil(100.1 * physics.operator_norm) / 100
    return physics
