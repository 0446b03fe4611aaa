"""Hypergradients of the first loss of a training, in float64: exact ones and those of adjoint solvers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lib.experiments.build import Config
from lib.experiments.profiles import our_config, profile_config
from lib.figures.hypergradients import TrainingProblem, training_problem
from lib.implicit import NeumannSeries
from lib.solvers import Anderson

pytestmark = pytest.mark.usefixtures("one_thread")

MakeConfig = Callable[..., Config]


def digits(task: str, model: str) -> Config:
    # Linear experts: a finite difference across a kink of ReLU would be off.
    own = {"size": 7, "sigma": "identity", "gamma": 0.3, "tau": 0.3, "batch_size": 5}
    return profile_config("smoke", task, **own | {"model": model, "train_images": 60, "test_images": 10})


def photographs(task: str, model: str, **values: Any) -> Config:
    # With random kernels one image alone attains the norm, which the gradient goes through.
    own = {"blur": 5, "sharpness": 20.0, "reduction": 8, "initial": "random"}
    return our_config("smoke", task, **own | {"model": model} | values)


CASES = [
    (make, task, model)
    for make in (digits, photographs)
    for task in ("denoising", "deblurring")
    for model in ("bilevel", "deq")
    # Its map does not contract.
    if (make, task, model) != (digits, "deblurring", "deq")
]


def loss_along(problem: TrainingProblem, direction: list[torch.Tensor], step: float) -> float:
    parameters = list(problem.model.parameters())
    start = [parameter.data for parameter in parameters]
    for parameter, d in zip(parameters, direction, strict=True):
        parameter.data = parameter.data + step * d
    loss = problem.loss()
    for parameter, data in zip(parameters, start, strict=True):
        parameter.data = data
    return loss


@pytest.mark.parametrize(("make", "task", "model"), CASES)
def test_exact_hypergradient_is_that_of_finite_differences(make: MakeConfig, task: str, model: str) -> None:
    """Along a random direction of all parameters, with the loss solved again on both sides.

    With this step both the curvature of the loss and the residuals of the solves are off by at most 1e-5.
    """
    problem = training_problem(make(task, model))
    draws = torch.Generator().manual_seed(0)
    parameters = list(problem.model.parameters())
    direction = [torch.randn(p.shape, generator=draws, dtype=torch.float64) for p in parameters]
    exact = problem.exact_hypergradient()
    along = (exact @ torch.cat([d.flatten() for d in direction])).item()
    ahead, behind = (loss_along(problem, direction, step) for step in (1e-4, -1e-4))
    assert (ahead - behind) / 2e-4 == pytest.approx(along, rel=0, abs=1e-4 * exact.norm().item())


@pytest.mark.parametrize(("make", "task", "model"), CASES)
def test_adjoint_solvers_approach_the_exact_hypergradient(make: MakeConfig, task: str, model: str) -> None:
    problem = training_problem(make(task, model))
    exact = problem.exact_hypergradient()

    def error(adjoint: Anderson | NeumannSeries) -> float:
        return float((problem.hypergradient(adjoint) - exact).norm() / exact.norm())

    assert error(Anderson(1e-10, 2000, memory=10)) < 1e-5
    assert error(NeumannSeries(2000)) < 0.1 * error(NeumannSeries(0))


@pytest.mark.parametrize("task", ["denoising", "deblurring"])
def test_true_gradient_is_orthogonal_to_the_kernels(task: str) -> None:
    """The norm takes their length away; with the norm as a constant a part lies along them."""
    along = {}
    for differentiate in (True, False):
        own = {"initial": "first", "learn_weight": False, "differentiate_norm": differentiate}
        problem = training_problem(photographs(task, "bilevel", **own))
        gradient, A = problem.exact_hypergradient(), problem.model.regularizer.A.detach().flatten()
        along[differentiate] = float((gradient @ A).abs() / (gradient.norm() * A.norm()))
    assert along[True] < 1e-10
    assert along[False] > 0.01
