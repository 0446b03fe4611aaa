"""Implicit differentiation of a fixed point, for any step map and either solver.

For `u* = T(u*; theta)` and a loss `L(u*)`, the implicit function theorem gives `dL/dtheta = w^T dT/dtheta`
where `w` solves `w = J^T w + dL/du*` with `J = dT/du` at `u*` (Bai, Kolter and Koltun, NeurIPS 2019). Only
one evaluation of `T` is recorded, so memory does not grow with the number of solver steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lib.solvers import Solution, Solver, StepMap, fixed_point


def implicit_fixed_point(
    step_map: StepMap,
    u0: Tensor,
    solver: Solver,
    adjoint_solver: Solver | None = None,
    on_adjoint: Callable[[Solution], None] | None = None,
    vjp: Callable[[Tensor], StepMap] | None = None,
    w0: Callable[[Tensor], Tensor] | None = None,
    restrict: Callable[[Tensor], StepMap] | None = None,
    precondition: StepMap | None = None,
) -> Solution:
    """Solve `u = T(u)` and attach the implicit gradient to the solution's value.

    Args:
        step_map: `T`; whatever it depends on and requires a gradient receives one.
        u0: `(..., C, H, W)`, first iterate.
        solver: solver of the fixed point.
        adjoint_solver: solver of `w = J^T w + dL/du*`; the same solver when None.
        on_adjoint: called in the backward pass with the adjoint `Solution` (residual, steps, status).
        vjp: takes `u*` and returns `w -> J^T w`; when None, autograd goes back through one recorded step.
        w0: takes `dL/du*` and returns the first iterate of the adjoint equation; when None `dL/du*` itself.
        restrict: see `fixed_point`; with `vjp`, samples that have stopped cost nothing in either solve.
        precondition: see `fixed_point`; symmetric, for it serves both solves.

    Returns:
        The `Solution` of the fixed point; gradients flow through `value`.
    """
    solution = fixed_point(step_map, u0, solver, restrict, precondition)
    if not torch.is_grad_enabled():
        return solution
    u = solution.value.detach().requires_grad_(vjp is None)
    step = step_map(u)
    # Forward value u*, derivative that of T: the residual at `value` is the one reported.
    value = u.detach() + (step - step.detach())

    def recorded(w: Tensor) -> Tensor:
        return torch.autograd.grad(step, u, w, retain_graph=True)[0]

    def solve_adjoint(cotangent: Tensor) -> Tensor:
        def adjoint_map(images: Tensor | None = None) -> StepMap:
            at, g = (t if images is None else t.index_select(-4, images) for t in (u, cotangent))
            transposed_jacobian = recorded if vjp is None else vjp(at)
            return lambda w: transposed_jacobian(w) + g

        adjoint = fixed_point(
            adjoint_map(),
            cotangent if w0 is None else w0(cotangent),
            adjoint_solver or solver,
            None if vjp is None or restrict is None else adjoint_map,
            precondition,
        )
        if on_adjoint is not None:
            on_adjoint(adjoint)
        return adjoint.value

    if value.requires_grad:
        value.register_hook(solve_adjoint)
    return replace(solution, value=value)
