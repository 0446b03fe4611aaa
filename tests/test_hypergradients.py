"""Hypergradients of trainings: exact ones against finite differences, and those that trainings take."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lib.experiments import data
from lib.experiments.problem import Config
from lib.experiments.profiles import our_config, profile_config
from lib.experiments.runs import Run
from lib.figures import hypergradients
from lib.figures.hypergradients import ADJOINTS, exact_hypergradient, hypergradient, training_problem
from lib.models import MODELS
from lib.operators import TASKS

pytestmark = pytest.mark.usefixtures("one_thread", "drawing")


@pytest.fixture(scope="module", autouse=True)
def images_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "faces", cache(data.faces))
        yield


def digits(model: str, task: str, **values: Any) -> Config:
    own = {"size": 7, "gamma": 0.3, "tau": 0.3, "train_images": 60, "test_images": 10, "batch_size": 5}
    return profile_config("smoke", task, **own | {"model": model} | values)


def photographs(model: str, task: str, **values: Any) -> Config:
    # Small images and random kernels have one image that attains the norm, which the gradient goes through.
    return our_config(
        "smoke", task, model=model, blur=5, sharpness=20.0, reduction=8, initial="random", **values
    )


CASES = [
    (make, task, model)
    for make in (digits, photographs)
    for task in ("denoising", "deblurring")
    for model in MODELS
    # Its map does not contract, and there is no fixed point to compare with.
    if (make, task, model) != (digits, "deblurring", "deq")
]


@pytest.mark.parametrize(("make", "task", "model"), CASES)
def test_the_exact_gradient_is_that_of_finite_differences(make: Any, task: str, model: str) -> None:
    """Along a random direction of all parameters, through both solves in float64."""
    given = training_problem(make(model, task))
    exact = exact_hypergradient(given)
    draws = torch.Generator().manual_seed(0)
    parameters = list(given.model.parameters())
    direction = [torch.randn(p.shape, generator=draws).double() for p in parameters]
    losses = []
    for sign in (1, -2, 1):
        for parameter, d in zip(parameters, direction, strict=True):
            parameter.data += sign * 1e-4 * d
        losses.append(hypergradients.training_loss(given))
    slope = (losses[0] - losses[1]) / 2e-4
    assert losses[2] == pytest.approx(given_loss(given), rel=1e-6)
    along = exact @ torch.cat([d.flatten() for d in direction])
    assert along.item() == pytest.approx(slope, rel=1e-3)


def given_loss(given: hypergradients.TrainingProblem) -> float:
    return (given.u - given.truth).square().mean().item()


@pytest.mark.parametrize(("make", "task", "model"), CASES)
def test_a_smaller_tolerance_is_nearer_to_the_exact_gradient(make: Any, task: str, model: str) -> None:
    """Solved to the end they are the same; longer series are nearer, if the map contracts."""
    config = make(model, task)
    given = training_problem(config)
    exact = exact_hypergradient(given)

    def error(**changes: Any) -> float:
        own = config.model_copy(update={"max_steps": 2000, "patience": None} | changes)
        return float((hypergradient(given, own) - exact).norm() / exact.norm())

    solved = [error(adjoint="solved", adjoint_tol=tol) for tol in (1e-1, 1e-3, 1e-9)]
    assert solved == sorted(solved, reverse=True)
    assert solved[-1] < 1e-5
    series = [error(adjoint="neumann", neumann_steps=steps) for steps in (0, 20, 2000)]
    assert series == sorted(series, reverse=True)


def test_every_case_has_a_training_of_its_own() -> None:
    """Both models, five tasks and seven adjoints, with what the adjoint's name says."""
    cases = hypergradients.configurations("quick", 4, 30, seed=3)
    assert len(cases) == len(set(cases.values())) == 2 * 5 * len(ADJOINTS)
    for (data_name, model, adjoint), config in cases.items():
        assert (config.model, config.seed) == (model, 3)
        assert data_name.endswith(config.task)
        assert config.model_copy(update=ADJOINTS[adjoint]) == config
    assert {name for name, _, _ in cases} == {f"digits, {task}" for task in TASKS} | {
        "photographs, denoising",
        "photographs, deblurring",
    }


def test_losses_are_those_of_the_same_time() -> None:
    """The last epoch that had ended when the fastest training of the same kind was through."""

    def run(seconds: list[float], losses: list[float], status: str = "completed") -> Run:
        history = pd.DataFrame({"seconds": seconds, "test_loss": losses})
        return Run("key", profile_config("smoke", "denoising"), status, "", history, {}, {})

    runs = {
        ("d", "deq", "solved"): run([1, 5, 9], [3.0, 2.0, 1.0]),
        ("d", "deq", "fast"): run([1, 2, 6], [3.0, 2.5, 2.4]),
        ("d", "deq", "lost"): run([1, 2, 6], [3.0, 9.0, 90.0], "diverged"),
        ("d", "bilevel", "solved"): run([1, 2, 3], [3.0, 2.0, 1.0]),
    }
    table = hypergradients.training_table_of(runs)
    assert table["test loss"].tolist() == pytest.approx([1.0, 2.4, np.nan, 1.0], nan_ok=True)
    assert table["test loss, same time"].tolist() == pytest.approx([2.0, 2.4, np.nan, 1.0], nan_ok=True)


def test_the_check_notices_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    cases = hypergradients.configurations("smoke", 1, 1)
    history = pd.DataFrame({"backward_steps": [np.nan, 0.0]})
    runs = {case: Run("key", config, "completed", "", history, {}, {}) for case, config in cases.items()}
    table = pd.DataFrame(index=pd.MultiIndex.from_tuples(list(runs)))
    hypergradients.check_hypergradients(runs, table)
    assert "Jacobian-free one none" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="rows"):
        hypergradients.check_hypergradients(runs, table.iloc[1:])
    free = ("digits, denoising", "deq", "Jacobian-free")
    history = pd.DataFrame({"backward_steps": [1.0]})
    with pytest.raises(AssertionError, match="Jacobian-free: 1"):
        hypergradients.check_hypergradients(
            runs | {free: Run("key", cases[free], "completed", "", history, {}, {})}, table
        )
