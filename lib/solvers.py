"""Solvers of fixed-point equations `u = T(u)`: plain iteration and Anderson acceleration.

The images of a batch are independent problems: each has its own residual, last step and status. The last
three dimensions `(C, H, W)` of a tensor are one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

StepMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FixedPointProblem:
    """A fixed-point problem `u = T(u)`, with optional knowledge about `T`.

    Attributes:
        step_map: `T`, from `(..., C, H, W)` to the same shape, each sample independently.
        vjp: maps `u` to `w -> J^T w` with `J = dT/du` at `u`; None uses autograd.
        restrict: maps indices along the batch, the last dimension before `(C, H, W)`, to `T` of these
            samples, so that stopped ones are not evaluated; None evaluates all until the last one stops.
        precondition: `r -> P r`, `P` symmetric: the solver iterates `u + P (T(u) - u)`, which has the same
            fixed points; residuals and the stopping criterion remain those of `T`.
        first_adjoint: maps `dL/du*` to the first iterate of `w = J^T w + dL/du*`; None uses `dL/du*`.
    """

    step_map: StepMap
    vjp: Callable[[Tensor], StepMap] | None = None
    restrict: Callable[[Tensor], StepMap] | None = None
    precondition: StepMap | None = None
    first_adjoint: StepMap | None = None


class Status(IntEnum):
    """Status of one sample at the end of a solve."""

    CONVERGED = 0
    MAX_STEPS = 1
    DIVERGED = 2
    STAGNATED = 3


@dataclass(frozen=True)
class Solution:
    """Result of a solve; a failure is a status, never an exception.

    Attributes:
        value: `(..., C, H, W)`, `T(u)` at the iterate `u` with the smallest residual, the last one of a
            converged sample; the last iterate itself of a diverged sample.
        residual: `(...)`, relative residual `||T(u) - u|| / ||T(u)||` at that iterate; infinite if `T` was
            never evaluated.
        residuals: `(evaluations, ...)`, relative residuals of all iterates, constant after a sample stopped.
        steps: `(...)`, evaluations of `T` until the sample stopped.
        status: `(...)`, integer codes of `Status`.
    """

    value: Tensor
    residual: Tensor
    residuals: Tensor
    steps: Tensor
    status: Tensor

    def fraction(self, status: Status) -> float:
        """Return the share of the samples with a status, in [0, 1]."""
        return (self.status == status).double().mean().item()


@dataclass(frozen=True)
class PlainIteration:
    """Plain iteration `u <- T(u)`.

    Attributes:
        tol, max_steps, patience: as in `Anderson`.
    """

    tol: float = 1e-3
    max_steps: int = 50
    patience: int | None = None


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration of type II, each sample with its own history.

    From the last `m` iterates `u_i` and residuals `g_i = T(u_i) - u_i` the next iterate is
    `sum_i alpha_i (u_i + beta g_i)`; `alpha` minimizes `||sum_i alpha_i g_i||^2 + delta ||alpha||^2` subject
    to `sum_i alpha_i = 1` (Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011). The ridge `delta` is
    `regularization` times the mean squared norm of the `g_i`, so that the scale of the problem has no effect
    and the system is positive definite.

    Attributes:
        tol: relative residual at which a sample has converged.
        max_steps: maximum number of evaluations of `T`.
        memory: `m`, length of the history.
        regularization: weight of the ridge relative to the Gram matrix of the residuals.
        beta: mixing weight in (0, 1]; 1 combines the `T(u_i)` alone.
        patience: a sample stagnates if in this many evaluations its smallest residual has not fallen by a
            tenth, nor its residual grown by one; None disables the criterion.

    >>> fixed_point(torch.cos, torch.ones(1, 1, 1), Anderson(tol=1e-4)).fraction(Status.CONVERGED)
    1.0
    """

    tol: float = 1e-3
    max_steps: int = 50
    memory: int = 5
    regularization: float = 1e-4
    beta: float = 1.0
    patience: int | None = None


class _AndersonHistory:
    def __init__(self, solver: Anderson, u0: Tensor) -> None:
        n, d = u0.shape
        self.solver = solver
        self.count = 0
        self.iterates = u0.new_zeros(n, solver.memory, d)
        self.residuals = u0.new_zeros(n, solver.memory, d)
        self.gram = u0.new_zeros(n, solver.memory, solver.memory)

    def next_iterate(self, u: Tensor, step: Tensor, residual: Tensor) -> Tensor:
        slot = self.count % self.solver.memory
        self.count += 1
        m = min(self.count, self.solver.memory)
        beta = self.solver.beta
        self.iterates[:, slot] = step if beta == 1 else torch.lerp(u, step, beta)
        self.residuals[:, slot] = residual
        # A row vector: the product with a column vector is ten times slower.
        row = torch.bmm(residual[:, None], self.residuals[:, :m].mT).squeeze(1)
        self.gram[:, slot, :m] = row
        self.gram[:, :m, slot] = row
        alpha = self._weights(self.gram[:, :m, :m], slot)
        return torch.bmm(alpha[:, None], self.iterates[:, :m]).squeeze(1)

    def _weights(self, gram: Tensor, newest: int) -> Tensor:
        """Return `alpha`, `(N, m)`; a plain step if the system cannot be factorized."""
        scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        scale = torch.where(scale > 0, scale, 1)
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factor, info = torch.linalg.cholesky_ex(gram / scale + self.solver.regularization * identity)
        alpha = torch.cholesky_solve(torch.ones_like(gram[..., :1]), factor).squeeze(-1)
        alpha = alpha / alpha.sum(-1, keepdim=True)
        usable = (info == 0) & alpha.isfinite().all(-1)
        return torch.where(usable[:, None], alpha, identity[newest])


Solver = PlainIteration | Anderson


class _OnRunning:
    """Step map, evaluated on running images only; the others keep their last value."""

    def __init__(self, problem: FixedPointProblem, u0: Tensor) -> None:
        self.step_map, self.restrict, self.shape = problem.step_map, problem.restrict, u0.shape
        self.images = torch.arange(u0.shape[-4] if self.restrict else 0, device=u0.device)
        self.last = u0.flatten(-3)

    def __call__(self, u: Tensor, running: Tensor) -> Tensor:
        """Return `T(u)`, `(n, d)`, of iterates `u` `(n, d)`; `running` `(n,)` marks those that still run."""
        if self.restrict is None or running.all():
            step = self.step_map(u.view(self.shape))
            if step.shape != self.shape:
                raise ValueError(f"`T` must keep the shape {tuple(self.shape)}, got {tuple(step.shape)}.")
            self.last = step.flatten(-3)
        else:
            still = running.view(-1, self.shape[-4]).any(0).nonzero().squeeze(1)
            if len(still) < len(self.images):
                self.images, self.step_map = still, self.restrict(still)
            steps = self.step_map(u.view(self.shape).index_select(-4, self.images)).flatten(-3)
            self.last = self.last.index_copy(-2, self.images, steps)
        return self.last.reshape(u.shape)


DIVERGENCE_FACTOR = 1e6
"""Ratio of a residual to the first one above which a sample has diverged, as if it were not finite."""

STAGNATION_FACTOR = 0.9
"""Factor by which the smallest residual must fall in `patience` steps, or the residual grow."""

FIRST_CHECKS, CHECK_EVERY = 6, 5
"""Evaluations at which a GPU is checked for running samples, which waits: the first 6, then every fifth."""


def _select(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Return one of two rows for each sample; on a CPU without a copy if all are `yes`."""
    if condition.device.type == "cpu" and condition.all():
        return yes
    return torch.where(condition[:, None], yes, no)


@torch.no_grad()
def fixed_point(problem: FixedPointProblem | StepMap, u0: Tensor, solver: Solver) -> Solution:
    """Solve `u = T(u)`, starting from `u0`.

    Args:
        problem: a `FixedPointProblem`, or `T` alone.
        u0: `(..., C, H, W)`, first iterate.
        solver: `PlainIteration` or `Anderson`.

    Returns:
        The `Solution`, without a gradient (see `lib.implicit`).

    Raises:
        ValueError: `u0` has another shape or type, or `T` changes its shape.

    >>> solution = fixed_point(torch.cos, torch.ones(1, 1, 1), PlainIteration(tol=1e-4))
    >>> solution.value.round(decimals=3).item(), Status(solution.status.item()).name
    (0.739..., 'CONVERGED')
    """
    problem = problem if isinstance(problem, FixedPointProblem) else FixedPointProblem(problem)
    least = 4 if problem.restrict else 3
    if u0.dim() < least or not u0.is_floating_point():
        layout = "(..., N, C, H, W)" if problem.restrict else "(..., C, H, W)"
        raise ValueError(f"`u0` must be a floating point {layout}, got {tuple(u0.shape)} of {u0.dtype}.")
    u = u0.reshape(-1, u0.shape[-3:].numel()).clone()
    history = _AndersonHistory(solver, u) if isinstance(solver, Anderson) else None
    evaluate = _OnRunning(problem, u0)
    n, evaluations, limit = u.shape[0], 0, torch.empty(0)
    status = torch.full((n,), Status.MAX_STEPS, dtype=torch.int8, device=u.device)
    steps = torch.zeros(n, dtype=torch.int32, device=u.device)
    relative = torch.full((n,), torch.inf, dtype=u.dtype, device=u.device)
    best, smallest = u, relative
    running = torch.ones(n, dtype=torch.bool, device=u.device)
    # Allocated once: many small tensors would fragment the memory.
    relatives, smallests, sizes = u.new_empty(3, solver.max_steps, n)
    for k in range(solver.max_steps):
        step = evaluate(u, running)
        evaluations, residual = k + 1, step - u
        size = torch.linalg.vector_norm(residual, dim=-1)
        scale = torch.linalg.vector_norm(step, dim=-1)
        if k == 0:
            limit = DIVERGENCE_FACTOR * size
        steps += running
        relative = torch.where(running, torch.where(size == 0, size, size / scale), relative)
        relatives[k] = relative
        finite = size.isfinite() & scale.isfinite()
        converged = running & finite & (size <= solver.tol * scale)
        diverged = running & ~converged & ~(finite & (size <= limit))
        status.masked_fill_(converged, Status.CONVERGED)
        status.masked_fill_(diverged, Status.DIVERGED)
        improved = running & (diverged | (relative <= smallest))
        best = _select(improved, _select(~diverged, step, u), best)
        smallest = torch.where(improved, relative, smallest)
        running = running & ~converged & ~diverged
        smallests[k], sizes[k] = smallest, size
        if solver.patience is not None and k >= solver.patience:
            fallen = smallest <= STAGNATION_FACTOR * smallests[k - solver.patience]
            grown = size * STAGNATION_FACTOR >= sizes[k - solver.patience]
            stagnated = running & ~fallen & ~grown
            status.masked_fill_(stagnated, Status.STAGNATED)
            running = running & ~stagnated
        checked = u.device.type == "cpu" or problem.restrict is not None or k < FIRST_CHECKS
        if k + 1 == solver.max_steps or ((checked or (k + 1) % CHECK_EVERY == 0) and not running.any()):
            break
        if problem.precondition is not None:
            residual = problem.precondition(residual.view(u0.shape)).reshape(u.shape)
            step = u + residual
        u = _select(running, step if history is None else history.next_iterate(u, step, residual), u)
    batch = u0.shape[:-3]
    return Solution(
        value=best.view(u0.shape),
        residual=smallest.view(batch),
        residuals=relatives[:evaluations].clone().view(-1, *batch),
        steps=steps.view(batch),
        status=status.view(batch),
    )
