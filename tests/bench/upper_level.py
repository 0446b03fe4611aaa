"""Upper-level methods of bilevel learning, written from their papers for comparison with `lib.training`.

`maid` and `hoag` minimize a `Problem`: the mean squared error of the reconstructions as a function of the
parameters, at a chosen accuracy. The lower level is `lambda`-strongly convex, so the residual of the step map
bounds the distance of a reconstruction from the exact one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lib.implicit import implicit_fixed_point
from lib.models import FixedPointModel
from lib.operators import Identity
from lib.regularizer import ConvFieldsOfExperts
from lib.solvers import Anderson, FixedPointProblem, Solution, StepMap, fixed_point
from lib.training import generator, observe

FREQUENCIES = torch.Size((1, 64, 64))
"""Grid of frequencies for the largest curvature of the regularizer."""

ADJOINT = 10
"""Ratio of the adjoint's tolerance to that of the lower level, as in this repository's trainings."""

ETA, BACKTRACK, GROW = 1e-4, 0.5, 10 / 9
"""MAID: required share of the decrease, and factors of the step size after a failure and a success."""

TIGHTEN, LOOSEN, LEAST, MOST = 0.5, 1.25, 1e-12, 0.05
"""MAID: factors of the tolerances after a failure and a success, and their range."""

TRIALS = 5
"""MAID: step sizes in the first line search; one more after each failure at the same point."""

DECREASE, FASTER, SLOWER = 0.9, 1.05, 0.5
"""HOAG: factors of the tolerances in each iteration, and of the step size."""


class CountedModel(FixedPointModel):
    """A denoising model that counts its evaluations of `T` and `J^T`, as multiples of all images.

    Kernels are not normalized: the step size follows them, and has no effect on the fixed points.
    """

    def __init__(self, regularizer: ConvFieldsOfExperts, lam: float) -> None:
        super().__init__(Identity(), regularizer, 1.0, lam, 1.0)
        self.evaluations = 0.0
        self.refresh()

    @torch.no_grad()
    def refresh(self, tol: float = 0.0) -> None:
        super().refresh(tol)
        steepest = self.regularizer.activation.steepest
        self.tau = 1 / (self.lam + self.gamma * steepest * self.regularizer.curvature(FREQUENCIES).max())

    def problem(self, f: Tensor, P: Tensor | None = None) -> FixedPointProblem:
        problem, images = super().problem(f, P), f.shape[-4]
        restrict = problem.restrict

        def counted(step_map: StepMap) -> StepMap:
            def count(u: Tensor) -> Tensor:
                self.evaluations += u.shape[-4] / images
                return step_map(u)

            return count

        return replace(
            problem,
            step_map=counted(problem.step_map),
            vjp=lambda u: counted(self.vjp(u)),
            restrict=None if restrict is None else lambda images: counted(restrict(images)),
        )


@dataclass(frozen=True)
class Evaluation:
    """Loss and optionally its hypergradient, at some accuracy.

    Attributes:
        loss: mean squared error of the approximate reconstructions.
        error: bound of the root mean squared distance from the exact reconstructions.
        gradient: flattened gradient of the loss; empty if not computed.
        gradient_error: estimated bound of the gradient's relative error.
    """

    loss: float
    error: float
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    gradient_error: float = math.nan

    @property
    def lower(self) -> float:
        """Lower bound of the exact loss."""
        return self.loss - 2 * math.sqrt(self.loss) * self.error

    @property
    def upper(self) -> float:
        """Upper bound of the exact loss."""
        return (math.sqrt(self.loss) + self.error) ** 2


class Problem:
    """Mean squared error of reconstructions over the parameters of a denoising model.

    Solves start from the last solutions. The noise is that of `lib.training.Training` with a warm start.
    """

    def __init__(self, model: FixedPointModel, images: Tensor, noise: float, seed: int = 0) -> None:
        n = torch.randn(images.shape, generator=generator(seed, "noise")).to(images)
        self.model, self.images = model, images
        self.f = observe(model.operator, images, torch.tensor(noise).to(images), n)
        self.u, self.w = self.f, torch.zeros_like(self.f)
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def theta(self) -> Tensor:
        """Return a copy of the parameters, flattened."""
        return parameters_to_vector(self.parameters).detach().clone()

    def move(self, theta: Tensor) -> None:
        """Set the parameters."""
        vector_to_parameters(theta, self.parameters)
        self.model.refresh()

    def _error(self, solution: Solution) -> float:
        """Return `||T(v) - v|| / (tau lambda)`, root mean square over all pixels."""
        size = torch.linalg.vector_norm(solution.value.detach().flatten(-3), dim=-1)
        absolute = (solution.residual * size).square().sum().sqrt()
        return (absolute / (self.model.tau * self.model.lam)).item() / math.sqrt(self.f.numel())

    def _problem(self) -> FixedPointProblem:
        problem = self.model.problem(self.f, self.model.preconditioner(self.f.shape[-3:]))
        return replace(problem, first_adjoint=lambda g: self.w)

    def loss(self, tol: float) -> Evaluation:
        """Return the loss at a relative residual."""
        solution = fixed_point(self._problem(), self.u, lower_level_solver(tol))
        self.u = solution.value
        return Evaluation((self.u - self.images).square().mean().item(), self._error(solution))

    def gradient(self, tol: float) -> Evaluation:
        """Return loss and hypergradient at a relative residual.

        The error of the hypergradient has the structure of the bound in MAID's paper, without its terms for
        the changes of Hessian and mixed derivative between approximate and exact reconstruction: the adjoint
        is wrong by its own residual and by that of the loss's gradient, both over the strong convexity.
        """
        adjoints: list[Solution] = []
        accuracy = lower_level_solver(tol), lower_level_solver(min(ADJOINT * tol, 0.5))
        solution = implicit_fixed_point(self._problem(), self.u, *accuracy, adjoints.append)
        loss = (solution.value - self.images).square().mean()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.parameters)])
        (adjoint,) = adjoints
        self.u, self.w = solution.value.detach(), adjoint.value
        error, size = self._error(solution), self.w.square().mean().sqrt().item()
        # L_g = 2 / n, and the adjoint is `tau` times `w`.
        change = 2 * error / self.f.numel() / (self.model.lam * self.model.tau).item()
        relative = (self._error(adjoint) + change) / size if size else math.inf
        return Evaluation(loss.item(), error, gradient, relative)


def lower_level_solver(tol: float) -> Anderson:
    """Return the solver of both equations with the options of this repository's trainings."""
    return Anderson(tol, max_steps=500, memory=10, patience=50)


def maid(
    problem: Problem, tol: float, length: float, on_iteration: Callable[[], None], adaptive: bool = True
) -> None:
    """Method of adaptive inexact descent (Salehi et al., SIAM J. Math. Data Sci. 2025).

    A step is accepted if bounds of the exact losses guarantee a decrease. If no step size is, or if the
    hypergradient may be wrong by its own size, both tolerances fall; after a success they grow.

    Args:
        problem: loss with the initial parameters.
        tol: initial relative residual of the lower level.
        length: length of the first trial step.
        on_iteration: called after each line search; ends the method by raising an exception.
        adaptive: whether tolerances adapt. Otherwise the method is gradient descent with Armijo's rule, which
            treats approximate losses as exact.
    """
    theta, trials, step = problem.theta(), TRIALS, math.nan
    while True:
        now = problem.gradient(tol)
        while adaptive and now.gradient_error > 1 - ETA and tol > LEAST:
            tol *= TIGHTEN
            now = problem.gradient(tol)
        slope = now.gradient.square().sum().item()
        step = length / math.sqrt(slope) if math.isnan(step) else step
        u, least = problem.u, now.lower if adaptive else now.loss
        for trial in range(trials):
            size = step * BACKTRACK**trial
            problem.move(theta - size * now.gradient)
            new = problem.loss(tol)
            if (new.upper if adaptive else new.loss) + ETA * size * slope <= least:
                theta, trials, step = problem.theta(), TRIALS, GROW * size
                tol = min(LOOSEN * tol, MOST) if adaptive else tol
                break
        else:
            problem.move(theta)
            problem.u = u
            if adaptive:
                tol, trials = max(TIGHTEN * tol, LEAST), trials + 1
            else:
                step *= BACKTRACK**trials
        on_iteration()


def hoag(problem: Problem, tol: float, length: float, on_iteration: Callable[[], None]) -> None:
    """Hyperparameter optimization with approximate gradients (Pedregosa, ICML 2016).

    The tolerances fall geometrically. The step size grows where the loss fell by half of what its gradient
    predicts, up to the errors of both losses, and is halved elsewhere; no step is undone.

    Args:
        problem, tol, length, on_iteration: as in `maid`.
    """
    step, last, slope = math.nan, Evaluation(math.inf, 0.0), 0.0
    for k in itertools.count():
        now = problem.gradient(max(tol * DECREASE**k, LEAST))
        if math.isnan(step):
            step = length / torch.linalg.vector_norm(now.gradient).item()
        else:
            step *= FASTER if now.lower <= last.upper - step * slope / 2 else SLOWER
        last, slope = now, now.gradient.square().sum().item()
        problem.move(problem.theta() - step * now.gradient)
        on_iteration()
