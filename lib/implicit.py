"""Implicit differentiation of fixed points.

For `u* = T(u*; theta)` and a loss `L(u*)` the implicit function theorem gives `dL/dtheta = w^T dT/dtheta`,
where `w` solves the adjoint equation `w = J^T w + dL/du*`, `J = dT/du` at `u*` (Bai, Kolter and Koltun,
NeurIPS 2019). autograd records one evaluation of `T`: memory does not grow with the number of solver steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from lib.solvers import FixedPointProblem, PlainIteration, Solution, Solver, StepMap, fixed_point


@dataclass(frozen=True)
class NeumannSeries:
    """Truncated series `sum_(j = 0)^steps (J^T)^j dL/du*` in place of the solution of the adjoint equation.

    With `steps = 0` it is `dL/du*`: Jacobian-free backpropagation (Fung et al., AAAI 2022). It ends early if
    the equation's relative residual is at most `tol`. If that residual grows, it is the partial sum with the
    smallest one.
    """

    steps: int
    tol: float = 0.0


class _Implicit(torch.autograd.Function):
    """`u*` with the derivative of `T(u*)` for the adjoint solution as cotangent; no second derivatives."""

    @staticmethod
    def forward(ctx: Any, step: Tensor, u: Tensor, solve_adjoint: StepMap) -> Tensor:
        ctx.solve_adjoint = solve_adjoint
        return u.detach().clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "`create_graph` must be False: fixed points have no second derivative, got True."
            )
        return ctx.solve_adjoint(cotangents[0]), None, None


def implicit_fixed_point(
    problem: FixedPointProblem | StepMap,
    u0: Tensor,
    solver: Solver,
    adjoint_solver: Solver | NeumannSeries | None = None,
    on_adjoint: Callable[[Solution], None] | None = None,
) -> Solution:
    """Solve `u = T(u)` and attach the implicit gradient to the solution's value.

    Args:
        problem: a `FixedPointProblem`, or `T` alone; every tensor that `T` depends on and that requires a
            gradient receives one.
        u0: `(..., C, H, W)`, first iterate.
        solver: solver of the fixed point.
        adjoint_solver: solver of the adjoint equation; None uses `solver`. A `NeumannSeries` ignores the
            preconditioner and the first adjoint of the problem.
        on_adjoint: called in the backward pass with the adjoint `Solution` (residual, steps, status).

    Returns:
        The `Solution` of the fixed point. Gradients flow through `value`; a backward pass
        with `create_graph`, as for second derivatives, raises a RuntimeError.

    >>> a, u0 = torch.tensor(0.5, requires_grad=True), torch.zeros(1, 1, 1)
    >>> implicit_fixed_point(lambda u: a * u + 1, u0, PlainIteration(tol=1e-6)).value.sum().backward()
    >>> torch.allclose(a.grad, torch.tensor(4.0), atol=1e-3)  # of 1 / (1 - a)
    True
    """
    problem = problem if isinstance(problem, FixedPointProblem) else FixedPointProblem(problem)
    solution = fixed_point(problem, u0, solver)
    if not torch.is_grad_enabled():
        return solution
    u = solution.value.detach().requires_grad_(problem.vjp is None)
    step = problem.step_map(u)

    def solve_adjoint(cotangent: Tensor) -> Tensor:
        def adjoint_map(images: Tensor | None = None) -> StepMap:
            """Return `w -> J^T w + dL/du*` of the images of these indices, or of all."""
            if problem.vjp is None:
                return lambda w: torch.autograd.grad(step, u, w, retain_graph=True)[0] + cotangent
            at, g = (t if images is None else t.index_select(-4, images) for t in (u, cotangent))
            transposed_jacobian = problem.vjp(at)
            return lambda w: transposed_jacobian(w) + g

        restrict = None if problem.vjp is None or problem.restrict is None else adjoint_map
        equation = FixedPointProblem(adjoint_map(), restrict=restrict)
        if isinstance(adjoint_solver, NeumannSeries):
            series = PlainIteration(adjoint_solver.tol, adjoint_solver.steps)
            adjoint = fixed_point(equation, cotangent, series)
        else:
            equation = replace(equation, precondition=problem.precondition)
            w0 = cotangent if problem.first_adjoint is None else problem.first_adjoint(cotangent)
            adjoint = fixed_point(equation, w0, adjoint_solver or solver)
        if on_adjoint is not None:
            on_adjoint(adjoint)
        return adjoint.value

    return replace(solution, value=cast(Tensor, _Implicit.apply(step, u, solve_adjoint)))
