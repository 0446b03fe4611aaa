"""Solves on a GPU as CUDA graphs: recorded once, and from then on launched as a whole.

An evaluation of the step map and what a solver does around it are some fifty small kernels, and to launch
them one by one takes longer than to compute them. On a GPU the kernels of a solve do not depend on what its
tensors hold (`lib.solvers.Iteration`), so those between two looks at the samples are one graph over fixed
buffers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields
from itertools import count
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from lib.solvers import FixedPointProblem, Iteration, Solution, Solver, at_once, fixed_point

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

Result = TypeVar("Result")


class RecordedSolves:
    """Takes and returns what `fixed_point` does, to the bit, and records a solve of each shape.

    What has no `pose`, can be restricted or is on a CPU is solved by `fixed_point` itself, and all is where a
    recording fails, which a warning says.

    Args:
        model: whose parameters and buffers the problems read beside their `data`. They may change in place;
            when one of them is replaced, what was recorded is forgotten.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.recordings: dict[object, _Recording] = {}
        self.state: list[object] = []
        self.failed = False

    @torch.no_grad()
    def __call__(self, problem: FixedPointProblem, u0: Tensor, solver: Solver) -> Solution:
        pose = problem.pose
        if self.failed or pose is None or problem.restrict or solver.max_steps == 0 or at_once(u0):
            return fixed_point(problem, u0, solver)
        tensors = (u0, *problem.data)
        state = [(t.data_ptr(), t.shape) for t in (*self.model.parameters(), *self.model.buffers())]
        if state != self.state:
            self.recordings.clear()
            self.state = list(state)
        layout = tuple((t.shape, t.dtype) for t in tensors)
        key = (getattr(pose, "__qualname__", pose), solver, layout)
        try:
            if key not in self.recordings:
                self.recordings[key] = _Recording(pose, tensors, solver)
            return self.recordings[key].replay(tensors)
        except RuntimeError as error:
            self.failed = True
            self.recordings.clear()
            said = str(error).partition("\n")[0]
            warnings.warn(f"solves are not recorded as CUDA graphs and take longer: {said}", stacklevel=2)
            return fixed_point(problem, u0, solver)


class _Recording:
    """One solve in parts, each up to the next look at its samples; a part is recorded when it is needed."""

    def __init__(
        self, pose: Callable[..., FixedPointProblem], tensors: tuple[Tensor, ...], solver: Solver
    ) -> None:
        self.pose, self.solver = pose, solver
        self.buffers = [t.detach().clone() for t in tensors]
        self.parts: list[tuple[Callable[[], object], Tensor, Solution]] = []
        # What libraries set up at the first call of a kernel cannot be recorded.
        self._begin()
        while self.iteration.evaluations < solver.max_steps:
            self.iteration.advance()
        self.pool = new_pool()

    def _begin(self) -> None:
        self.iteration = Iteration(self.pose(*self.buffers[1:]), self.buffers[0], self.solver)

    def _part(self) -> tuple[Tensor, Solution]:
        if not self.parts:
            self._begin()
        self.iteration.advance()
        return self.iteration.running.any(), self.iteration.solution()

    def replay(self, tensors: tuple[Tensor, ...]) -> Solution:
        for buffer, value in zip(self.buffers, tensors, strict=True):
            buffer.copy_(value)
        for k in count():
            if k == len(self.parts):
                launch, outcome = record(self._part, self.pool)
                self.parts.append((launch, *outcome))
            launch, running, solution = self.parts[k]
            launch()
            if len(solution.residuals) == self.solver.max_steps or not running.item():
                break
        # The next solve overwrites them.
        return Solution(**{part.name: getattr(solution, part.name).clone() for part in fields(Solution)})


def new_pool() -> _POOL_HANDLE:
    """Memory that the graphs of one recording share, for they run in their order."""
    return torch.cuda.graph_pool_handle()


def record(work: Callable[[], Result], pool: _POOL_HANDLE) -> tuple[Callable[[], object], Result]:
    """Note, without doing it, what some work launches on the GPU: what launches it all, and the tensors that
    hold the result then."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = work()
    return graph.replay, result
