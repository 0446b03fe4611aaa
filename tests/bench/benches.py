"""Shared parts of the benchmarks of `make bench`: a training step of ours, and tables in `results/bench/`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lib.experiments.provenance import write_with_provenance
from lib.experiments.store import RESULTS
from lib.implicit import NeumannSeries, implicit_fixed_point
from lib.models import FixedPointModel
from lib.solvers import FixedPointProblem, Solution, Solver


@dataclass
class Step:
    """Loss and hypergradient of one training step.

    Attributes:
        loss, gradient: mean squared error and its gradient, flattened.
        forward, backward: solver steps of the images, NaN if unknown.
        residual: larger relative residual of the two solves, NaN if unknown.
    """

    loss: float
    gradient: Tensor
    forward: Tensor
    backward: Tensor
    residual: float = float("nan")

    def errors(self, exact: Step) -> dict[str, float]:
        """Return the relative errors of loss and hypergradient."""
        difference = torch.linalg.vector_norm(self.gradient.double() - exact.gradient)
        size = torch.linalg.vector_norm(exact.gradient)
        return {"loss error": abs(self.loss / exact.loss - 1), "gradient error": float(difference / size)}


def differentiate(model: FixedPointModel, value: Tensor, truth: Tensor) -> tuple[float, Tensor]:
    """Return the loss of a fixed point and its gradient, which is also left in the parameters."""
    model.zero_grad()
    loss = (value.view_as(truth) - truth).square().mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.regularizer.parameters()])


def training_step(
    model: FixedPointModel,
    problem: FixedPointProblem,
    u0: Tensor,
    truth: Tensor,
    solver: Solver,
    adjoint_solver: Solver | NeumannSeries | None = None,
) -> Step:
    """Return the loss and the implicit gradient of a batch, as `lib.training` computes them."""
    adjoint: list[Solution] = []
    solution = implicit_fixed_point(problem, u0, solver, adjoint_solver, adjoint.append)
    loss, gradient = differentiate(model, solution.value, truth)
    residual = max(s.residual.max().item() for s in (solution, *adjoint))
    return Step(loss, gradient, solution.steps.double(), adjoint[0].steps.double(), residual)


def save(
    name: str, table: pd.DataFrame, device: torch.device | str = "cpu", digits: int = 3, **provenance: Any
) -> None:
    """Print a table with some significant digits, and write it as CSV with its provenance."""
    print(table.to_string(float_format=f"{{:.{digits}g}}".format))
    files = {f"{name}.csv": table.to_csv(float_format=f"%.{digits}g").encode()}
    write_with_provenance(RESULTS / "bench", files, provenance, f"{name}_provenance.json", device)
