"""Hypergradients at the start of a training: exact ones, and those that a training takes in their place."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib.experiments.build import Config, is_preconditioned, load_images, make_model
from lib.implicit import NeumannSeries, implicit_fixed_point
from lib.models import FixedPointModel
from lib.solvers import Anderson, FixedPointProblem, PlainIteration, Solver, fixed_point
from lib.training import generator, observe

EXACT = Anderson(tol=1e-11, max_steps=3_000, memory=20, regularization=1e-12)


@dataclass(frozen=True)
class TrainingProblem:
    """The loss of a training's first batch as a function of the weights, at one fixed point.

    Attributes:
        model: with one leading dimension, in float64.
        problem: `u = T(u)` for the data.
        f: the data `(1, N, 1, H, W)`.
        u: the fixed point, like `f`.
        truth: true images `(N, 1, H, W)`.
    """

    model: FixedPointModel
    problem: FixedPointProblem
    f: Tensor
    u: Tensor
    truth: Tensor

    @torch.no_grad()
    def loss(self, solver: Solver = EXACT) -> float:
        """Return the loss with the current weights of the model, solved from `u`."""
        self.model.refresh(tol=0.0)
        P = None if self.problem.precondition is None else self.model.preconditioner(self.u.shape[-3:])
        u = fixed_point(self.model.problem(self.f, P), self.u, solver).value
        return (u - self.truth).square().mean().item()

    def hypergradient(self, adjoint: Solver | NeumannSeries) -> Tensor:
        """Return the gradient of the loss at `u` for all parameters in one vector."""
        solution = implicit_fixed_point(self.problem, self.u, PlainIteration(max_steps=0), adjoint)
        return self._gradient((solution.value - self.truth).square().mean())

    def exact_hypergradient(self) -> Tensor:
        """Return the gradient with the solution `w` of `(I - J^T) w = dL/du`.

        Digits, whose maps need not contract, have a dense solution, photographs an iterative one.
        """
        assert self.problem.vjp is not None
        g = 2 * (self.u - self.truth) / self.truth.numel()
        if self.problem.restrict is not None:
            transposed_jacobian = self.problem.vjp(self.u)
            equation = replace(self.problem, step_map=lambda w: transposed_jacobian(w) + g, restrict=None)
            w = fixed_point(equation, g, EXACT).value
        else:
            images, n = g.shape[1], g.shape[-3:].numel()
            many = (1, n * images, *g.shape[-3:])
            units = torch.eye(n).to(g).view(n, 1, *g.shape[-3:]).expand(n, *g.shape[1:]).reshape(many)
            # J^T e_i is the row i of J, for all images and i at once.
            vjp = self.problem.vjp(self.u.expand(n, *g.shape[1:]).reshape(many))
            J = vjp(units).view(n, images, n).transpose(0, 1)
            w = torch.linalg.solve(torch.eye(n).to(g) - J.mT, g.view(images, n, 1)).view_as(g)
        return self._gradient((self.problem.step_map(self.u) * w).sum())

    def _gradient(self, value: Tensor) -> Tensor:
        # All gradients share the graph of `lambda`, which is a part of the problem.
        parts = torch.autograd.grad(value, list(self.model.parameters()), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])


def training_problem(config: Config, images: int = 50) -> TrainingProblem:
    """Return the problem of a configuration's first batch with untrained weights, solved in float64.

    Args:
        config: of the training.
        images: number of images of the batch, at most.
    """
    model = make_model([config]).double()
    model.refresh(tol=0.0)
    truth = load_images(config)["train"][: min(images, config.batch_size)].double()
    n = torch.randn(truth.shape, generator=generator(config.seed, "noise")).double()
    f = observe(model.operator, truth, torch.tensor([config.noise]).double(), n)
    P = model.preconditioner(f.shape[-3:]) if is_preconditioned(config) else None
    problem = model.problem(f, P)
    return TrainingProblem(model, problem, f, fixed_point(problem, f, EXACT).value, truth)
