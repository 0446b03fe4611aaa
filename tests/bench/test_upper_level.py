"""Re-implemented upper-level methods: agreement with L-BFGS, and decreasing losses of MAID."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from upper_level import CountedModel, Problem, hoag, maid

from lib.kernels import cosine_kernels
from lib.regularizer import ConvFieldsOfExperts, WeightedExperts, smoothed_sign
from lib.solvers import Anderson
from lib.training import LBFGS, Training

NOISE = 0.2
IMAGES = torch.linspace(-1, 1, 12, dtype=torch.float64).sign().expand(3, 1, 12, 12).contiguous()


class Enough(Exception):
    """Raised to end a method."""


def make_model(weights_alone: bool = False) -> CountedModel:
    A, t = cosine_kernels(2, 3).double(), torch.zeros(2, dtype=torch.float64)
    model = CountedModel(ConvFieldsOfExperts(A, WeightedExperts(t), smoothed_sign(10)), lam=10.0)
    model.regularizer.A.requires_grad_(not weights_alone)
    return model


def run(problem: Problem, method: partial[None], iterations: int) -> list[Tensor]:
    """Return the parameters after each iteration."""
    path = [problem.theta()]

    def on_iteration() -> None:
        path.append(problem.theta())
        if len(path) > iterations:
            raise Enough

    with pytest.raises(Enough):
        method(problem, on_iteration=on_iteration)
    return path


def exact(problem: Problem, theta: Tensor) -> float:
    problem.move(theta)
    return problem.loss(1e-12).loss


METHODS = {
    "maid": partial(maid, tol=1e-2, length=0.1),
    "fixed": partial(maid, tol=1e-6, length=0.1, adaptive=False),
    "hoag": partial(hoag, tol=1e-2, length=0.1),
}


@pytest.fixture(scope="module")
def minimum() -> float:
    """Loss that L-BFGS reaches over the weights alone."""
    model, solver = make_model(weights_alone=True), Anderson(1e-9, 500, 10)
    options: dict[str, Any] = {"solver": solver, "precondition": True, "warm_start": True}
    Training(model, IMAGES, NOISE, epochs=8, optimizer=LBFGS(), **options).run()
    problem = Problem(model, IMAGES, NOISE)
    return exact(problem, problem.theta())


@pytest.mark.parametrize("name", METHODS)
def test_minimum_matches_lbfgs(name: str, minimum: float) -> None:
    """The losses differ by at most 0.1 % of the decrease from the start."""
    problem = Problem(make_model(weights_alone=True), IMAGES, NOISE)
    start = exact(problem, problem.theta())
    end = exact(problem, run(problem, METHODS[name], 40)[-1])
    assert abs(end - minimum) <= 1e-3 * (start - minimum)


def test_maid_never_increases_exact_loss() -> None:
    problem = Problem(make_model(), IMAGES, NOISE)
    path = run(problem, METHODS["maid"], 30)
    losses = torch.tensor([exact(problem, theta) for theta in path], dtype=torch.float64)
    assert (losses.diff() <= 1e-12).all()
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
def test_bounds_enclose_exact_loss(tol: float) -> None:
    problem = Problem(make_model(), IMAGES, NOISE)
    approximate = problem.loss(tol)
    assert approximate.lower <= exact(problem, problem.theta()) <= approximate.upper
