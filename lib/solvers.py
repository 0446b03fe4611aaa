"""Fixed points `u = T(u)`: one interface, two solvers.

A batch of images is solved as many independent problems: every sample has its own residual, its own
stopping step and its own status. The last three dimensions `(C, H, W)` of a tensor are one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

StepMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class FixedPointProblem:
    """A fixed-point problem `u = T(u)`, and what is known of it beyond `T`.

    Attributes:
        step_map: `T`, maps `(..., C, H, W)` to the same shape and each sample independently.
        vjp: takes `u` and returns `w -> J^T w` with `J = dT/du` there; None leaves it to autograd.
        restrict: takes indices along the batch, the last dimension before `(C, H, W)`, and returns `T` of
            those samples alone: samples that have stopped then cost nothing. When None all are evaluated
            until the last one stops.
        precondition: `r -> P r`, `P` symmetric: a solver then sees the map `u + P (T(u) - u)`, which has the
            same fixed points, while the residuals that are reported and stop it stay those of `T`.
        first_adjoint: takes `dL/du*` and returns the first iterate of `w = J^T w + dL/du*`; None starts from
            `dL/du*` itself.
    """

    step_map: StepMap
    vjp: Callable[[Tensor], StepMap] | None = None
    restrict: Callable[[Tensor], StepMap] | None = None
    precondition: StepMap | None = None
    first_adjoint: StepMap | None = None


class Status(IntEnum):
    """How the iteration of one sample ended."""

    CONVERGED = 0
    MAX_STEPS = 1
    DIVERGED = 2
    STAGNATED = 3


@dataclass(frozen=True)
class Solution:
    """What a solve returns; a failure is a status, never an exception.

    Attributes:
        value: `(..., C, H, W)`, `T(u)` at the iterate `u` with the smallest residual, which is the last one
            of a converged sample; of a diverged sample the last iterate itself.
        residual: `(...)`, relative residual `||T(u) - u|| / ||T(u)||` at that iterate; infinite where `T` was
            not evaluated once.
        residuals: `(evaluations, ...)`, the same at every iterate, constant once a sample stopped.
        steps: `(...)`, evaluations of `T` until the sample stopped.
        status: `(...)`, integer codes of `Status`.
    """

    value: Tensor
    residual: Tensor
    residuals: Tensor
    steps: Tensor
    status: Tensor

    def fraction(self, status: Status) -> float:
        """Share of the samples that ended with `status`, in [0, 1]."""
        return (self.status == status).double().mean().item()


class Acceleration(Protocol):
    """Proposes the next iterate from the current one and the step map's value there."""

    def __call__(self, u: Tensor, step: Tensor, residual: Tensor) -> Tensor:
        """Next iterate `(N, d)` from `u`, `step = T(u)` and `residual = T(u) - u`, all `(N, d)`."""


@dataclass(frozen=True)
class PlainIteration:
    """`u <- T(u)`, until the relative residual is at most `tol` or after `max_steps` evaluations.

    `patience` is as in `Anderson`.
    """

    tol: float = 1e-3
    max_steps: int = 50
    patience: int | None = None

    def start(self, u0: Tensor) -> Acceleration:
        return lambda u, step, residual: step


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration of type II, each sample with its own history.

    Given the last `m` iterates `u_i` and residuals `g_i = T(u_i) - u_i`, it takes
    `sum_i alpha_i (u_i + beta g_i)` with `alpha` the minimiser of `||sum_i alpha_i g_i||^2 + delta
    ||alpha||^2` subject to `sum_i alpha_i = 1` (Walker and Ni, SIAM J. Numer. Anal. 49(4), 2011).
    The ridge `delta` is `regularization` times the mean squared norm of the `g_i`: the scale of the
    right-hand side then has no effect, and the system is positive definite whatever the history.

    Attributes:
        tol: relative residual at which a sample has converged.
        max_steps: evaluations of `T` at most.
        memory: `m`, length of the history.
        regularization: weight of the ridge relative to the Gram matrix of the residuals.
        beta: mixing weight in (0, 1]; 1 takes the images `T(u_i)` alone.
        patience: a sample stagnates when in this many evaluations its smallest residual has not fallen by a
            tenth and its residual has not grown by one, as when it diverges; None never gives up.
    """

    tol: float = 1e-3
    max_steps: int = 50
    memory: int = 5
    regularization: float = 1e-4
    beta: float = 1.0
    patience: int | None = None

    def start(self, u0: Tensor) -> Acceleration:
        return _AndersonHistory(self, u0)


class _AndersonHistory:
    def __init__(self, solver: Anderson, u0: Tensor) -> None:
        n, d = u0.shape
        self.solver = solver
        self.count = 0
        self.iterates = u0.new_zeros(n, solver.memory, d)
        self.residuals = u0.new_zeros(n, solver.memory, d)
        self.gram = u0.new_zeros(n, solver.memory, solver.memory)

    def __call__(self, u: Tensor, step: Tensor, residual: Tensor) -> Tensor:
        slot = self.count % self.solver.memory
        self.count += 1
        m = min(self.count, self.solver.memory)
        beta = self.solver.beta
        self.iterates[:, slot] = step if beta == 1 else torch.lerp(u, step, beta)
        self.residuals[:, slot] = residual
        # The row of the Gram matrix from the left: the same product from the right is ten times slower.
        row = torch.bmm(residual[:, None], self.residuals[:, :m].mT).squeeze(1)
        self.gram[:, slot, :m] = row
        self.gram[:, :m, slot] = row
        alpha = self._weights(self.gram[:, :m, :m], slot)
        return torch.bmm(alpha[:, None], self.iterates[:, :m]).squeeze(1)

    def _weights(self, gram: Tensor, newest: int) -> Tensor:
        """Minimiser `alpha`, `(N, m)`; a plain step where the system cannot be factorised."""
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
    """A step map that is evaluated on images only while they run; the others keep their last value."""

    def __init__(self, problem: FixedPointProblem, u0: Tensor) -> None:
        self.step_map, self.restrict, self.shape = problem.step_map, problem.restrict, u0.shape
        self.images = torch.arange(u0.shape[-4] if self.restrict else 0, device=u0.device)
        self.last = u0.flatten(-3)

    def __call__(self, u: Tensor, running: Tensor) -> Tensor:
        """`T(u)`, `(n, d)`, of iterates `u` `(n, d)` of which `running` `(n,)` still run."""
        if self.restrict is None or running.all():
            step = self.step_map(u.view(self.shape))
            if step.shape != self.shape:
                raise ValueError(f"T: got values of {tuple(step.shape)}, allowed: u0's {tuple(self.shape)}")
            self.last = step.flatten(-3)
        else:
            still = running.view(-1, self.shape[-4]).any(0).nonzero().squeeze(1)
            if len(still) < len(self.images):
                self.images, self.step_map = still, self.restrict(still)
            steps = self.step_map(u.view(self.shape).index_select(-4, self.images)).flatten(-3)
            self.last = self.last.index_copy(-2, self.images, steps)
        return self.last.reshape(u.shape)


DIVERGENCE_FACTOR = 1e6
"""A sample has diverged when its residual is this many times its first one, or not finite."""

STAGNATION_FACTOR = 0.9
"""A sample stagnates when its smallest residual is more than this share of that `patience` steps ago, and the
residual then more than this share of the one now."""

FIRST_CHECKS, CHECK_EVERY = 6, 5
"""On an accelerator, reading whether a sample still runs waits for the device: it is read after each of the
first evaluations, since many solves end there, and then after every fifth one."""


def _select(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Return one of two rows for each sample; where all are alike on a CPU nothing is copied."""
    if condition.device.type == "cpu" and condition.all():
        return yes
    return torch.where(condition[:, None], yes, no)


@torch.no_grad()
def fixed_point(problem: FixedPointProblem | StepMap, u0: Tensor, solver: Solver) -> Solution:
    """Iterate `u <- T(u)` from `u0` with a solver.

    Args:
        problem: a `FixedPointProblem`, or `T` alone.
        u0: `(..., C, H, W)`, first iterate.
        solver: `PlainIteration` or `Anderson`.

    Returns:
        The `Solution`; it carries no gradient (see `lib.implicit`).

    Raises:
        ValueError: `u0` is no such tensor of real numbers, or `T` changes its shape.
    """
    problem = problem if isinstance(problem, FixedPointProblem) else FixedPointProblem(problem)
    least = 4 if problem.restrict else 3
    if u0.dim() < least or not u0.is_floating_point():
        layout = "(..., N, C, H, W)" if problem.restrict else "(..., C, H, W)"
        got = f"{tuple(u0.shape)} of {u0.dtype}".replace("torch.", "")
        raise ValueError(f"u0: got {got}, allowed: {layout} of floating point numbers")
    u = u0.reshape(-1, u0.shape[-3:].numel()).clone()
    accelerate, evaluate = solver.start(u), _OnRunning(problem, u0)
    n, evaluations, limit = u.shape[0], 0, torch.empty(0)
    status = torch.full((n,), Status.MAX_STEPS, dtype=torch.int8, device=u.device)
    steps = torch.zeros(n, dtype=torch.int32, device=u.device)
    relative = torch.full((n,), torch.inf, dtype=u.dtype, device=u.device)
    best, smallest = u, relative
    running = torch.ones(n, dtype=torch.bool, device=u.device)
    # Allocated once: small tensors that stay would keep the large ones' memory from being used again.
    history, smallests, sizes = u.new_empty(3, solver.max_steps, n)
    for k in range(solver.max_steps):
        step = evaluate(u, running)
        evaluations, residual = k + 1, step - u
        size = torch.linalg.vector_norm(residual, dim=-1)
        scale = torch.linalg.vector_norm(step, dim=-1)
        if k == 0:
            limit = DIVERGENCE_FACTOR * size
        steps += running
        relative = torch.where(running, torch.where(size == 0, size, size / scale), relative)
        history[k] = relative
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
        u = _select(running, accelerate(u, step, residual), u)
    batch = u0.shape[:-3]
    return Solution(
        value=best.view(u0.shape),
        residual=smallest.view(batch),
        residuals=history[:evaluations].clone().view(-1, *batch),
        steps=steps.view(batch),
        status=status.view(batch),
    )
