"""Shared functions of the benchmarks: our training steps, timed trainings, tables in `results/bench/`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lib.experiments import build
from lib.experiments.build import Config
from lib.experiments.config import FacesConfig
from lib.experiments.provenance import write_with_provenance
from lib.experiments.store import RESULTS
from lib.implicit import NeumannSeries, implicit_fixed_point
from lib.models import FixedPointModel
from lib.solvers import Anderson, FixedPointProblem, Solution, Solver
from lib.training import History, generator, observe

REFERENCE = Anderson(tol=1e-10, max_steps=5000, memory=20, regularization=1e-10)


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


@dataclass
class Batch:
    """A model, and images `truth`, `(N, 1, H, W)`, with their data `f`, `(1, N, 1, H, W)`."""

    config: Config
    model: FixedPointModel
    f: Tensor
    truth: Tensor


def make_batch(config: Config) -> Batch:
    """Return the first batch of a training with untrained weights."""
    model = build.make_model([config])
    truth = build.load_images(config)["train"][: config.batch_size]
    n = torch.randn(truth.shape, generator=generator(0, "bench"))
    return Batch(config, model, observe(model.operator, truth, torch.tensor([config.noise]), n), truth)


def ours(batch: Batch, solver: Solver | None = None, P: Tensor | None = None) -> Step:
    """Return a step with the configuration's solvers, or with one solver for both equations."""
    config, model = batch.config, batch.model
    if isinstance(config, FacesConfig):
        # As in a training, every step on photographs has its own preconditioner.
        P = model.preconditioner(batch.truth.shape[1:])
    solvers = (solver, solver) if solver else (build.make_solver(config), build.make_adjoint_solver(config))
    u0 = build.first_iterate(config)(batch.f)
    return training_step(model, model.problem(batch.f, P), u0, batch.truth, *solvers)


def exact(batch: Batch) -> Step:
    """Return loss and hypergradient in float64."""
    double = Batch(batch.config, deepcopy(batch.model).double(), batch.f.double(), batch.truth.double())
    return ours(double, REFERENCE)


def timed_training(configs: Sequence[Config], device: torch.device) -> tuple[list[History], list[float]]:
    """Train a stack, and return its histories and the seconds of its optimizer steps without the first."""
    ends: list[float] = []

    def on_step() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())

    members = build.make_training(configs, device).run(on_step=on_step)
    return members, [end - begin for begin, end in pairwise(ends)]


def save(
    name: str,
    table: pd.DataFrame,
    device: torch.device | str = "cpu",
    digits: int = 3,
    pictures: Mapping[str, bytes] | None = None,
    **provenance: Any,
) -> None:
    """Print a table with some significant digits, and write it as CSV, with pictures and its provenance."""
    print(table.to_string(float_format=f"{{:.{digits}g}}".format))
    files = {f"{name}.csv": table.to_csv(float_format=f"%.{digits}g").encode(), **(pictures or {})}
    write_with_provenance(RESULTS / "bench", files, provenance, f"{name}_provenance.json", device)
