"""Which hypergradient a training needs: errors of the gradient, and what trainings with it come to."""

from __future__ import annotations

import timeit
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib.experiments.build import Config, is_preconditioned, load_images, make_adjoint_solver, make_model
from lib.experiments.config import MODELS, TASKS
from lib.experiments.profiles import our_config, profile_config
from lib.experiments.records import Run
from lib.experiments.runs import get_runs
from lib.experiments.store import Results
from lib.figures.style import MODEL_NAMES, STYLE, TEXT_WIDTH, model_line, note
from lib.implicit import implicit_fixed_point
from lib.models import FixedPointModel
from lib.solvers import Anderson, FixedPointProblem, PlainIteration, Solver, fixed_point
from lib.training import COMPLETED, generator, observe, one_thread

ADJOINTS: dict[str, dict[str, Any]] = {
    "solved to 1e-5": {"adjoint": "solved", "adjoint_tol": 1e-5},
    "solved to 1e-3": {"adjoint": "solved", "adjoint_tol": 1e-3},
    "solved to 1e-1": {"adjoint": "solved", "adjoint_tol": 1e-1},
    "Neumann 20": {"adjoint": "neumann", "neumann_steps": 20},
    "Neumann 5": {"adjoint": "neumann", "neumann_steps": 5},
    "Neumann 1": {"adjoint": "neumann", "neumann_steps": 1},
    "Jacobian-free": {"adjoint": "neumann", "neumann_steps": 0},
}
"""What takes the place of the adjoint equation's solution, from the nearest to the farthest."""

SMALL = {"size": 14, "train_images": 1_000, "test_images": 200, "batch_size": 50, "gamma": 0.5}
SMALL |= {"final_learning_rate": 1e-3}
"""Trainings on MNIST, at one learning rate."""

PHOTOGRAPHS = {"reduction": 2, "optimizer": "adam", "learning_rate": 0.02, "final_learning_rate": 0.02}
PHOTOGRAPHS |= {"test_every": 1}
"""Trainings on photographs, whose kernels start as ours and whose weight is learned."""

EXACT = Anderson(tol=1e-11, max_steps=3_000, memory=20, regularization=1e-12)


def configurations(
    profile: str, digit_epochs: int, photograph_epochs: int, seed: int = 0
) -> dict[tuple[str, str, str], Config]:
    """A training for each case, by data and task, model, and what is done for the adjoint equation.

    Args:
        profile: of the parameters that are not set here.
        digit_epochs, photograph_epochs: of the trainings.
        seed: of every random number.
    """
    cases: dict[tuple[str, str, str], Config] = {}
    for model in MODELS:
        for name, changes in ADJOINTS.items():
            own = changes | {"model": model, "seed": seed}
            for task in TASKS:
                digits = SMALL | own | {"epochs": digit_epochs}
                cases[f"digits, {task}", model, name] = profile_config(profile, task, **digits)
            for task in ("denoising", "deblurring"):
                photographs = PHOTOGRAPHS | own | {"epochs": photograph_epochs}
                cases[f"photographs, {task}", model, name] = our_config(profile, task, **photographs)
    return dict(sorted(cases.items(), key=lambda case: case[0][0]))


@dataclass(frozen=True)
class TrainingProblem:
    """The loss of a training's first batch as a function of the weights, at one fixed point.

    Attributes:
        model: with one leading dimension, in float64.
        problem: `u = T(u)` for the data.
        f: the data `(1, N, 1, H, W)`.
        u: its solution, like `f`.
        truth: true images `(N, 1, H, W)`.
    """

    model: FixedPointModel
    problem: FixedPointProblem
    f: Tensor
    u: Tensor
    truth: Tensor


def training_problem(config: Config, images: int = 50) -> TrainingProblem:
    """The problem of a configuration's first batch with untrained weights, solved in float64.

    Args:
        config: whose.
        images: at most this many of the batch.
    """
    model = make_model([config]).double()
    model.refresh(tol=0.0)
    truth = load_images(config)["train"][: min(images, config.batch_size)].double()
    n = torch.randn(truth.shape, generator=generator(config.seed, "noise")).double()
    f = observe(model.operator, truth, torch.tensor([config.noise]).double(), n)
    P = model.preconditioner(f.shape[-3:]) if is_preconditioned(config) else None
    problem = model.problem(f, P)
    return TrainingProblem(model, problem, f, fixed_point(problem, f, EXACT).value, truth)


@torch.no_grad()
def training_loss(given: TrainingProblem, solver: Solver = EXACT) -> float:
    """The loss with the weights that the model has now, solved from `u`."""
    given.model.refresh(tol=0.0)
    P = None if given.problem.precondition is None else given.model.preconditioner(given.u.shape[-3:])
    u = fixed_point(given.model.problem(given.f, P), given.u, solver).value
    return (u - given.truth).square().mean().item()


def hypergradient(given: TrainingProblem, config: Config) -> Tensor:
    """Gradient of the loss at `u`, of all parameters in one vector, with a configuration's adjoint solver."""
    adjoint_solver = make_adjoint_solver(config)
    solution = implicit_fixed_point(given.problem, given.u, PlainIteration(max_steps=0), adjoint_solver)
    return _flat(given, (solution.value - given.truth).square().mean())


def exact_hypergradient(given: TrainingProblem) -> Tensor:
    """The same with `w` from a dense solution of `(I - J^T) w = dL/du` for digits, whose maps need not
    contract; for photographs from an iteration to the end."""
    vjp, g = given.problem.vjp, 2 * (given.u - given.truth) / given.truth.numel()
    assert vjp is not None
    if given.problem.restrict is not None:
        transposed_jacobian = vjp(given.u)
        equation = replace(given.problem, step_map=lambda w: transposed_jacobian(w) + g, restrict=None)
        w = fixed_point(equation, g, EXACT).value
    else:
        images, n = g.shape[1], g.shape[-3:].numel()
        many = (1, n * images, *g.shape[-3:])
        units = torch.eye(n).to(g).view(n, 1, *g.shape[-3:]).expand(n, *g.shape[1:]).reshape(many)
        # J^T e_i is the row i of J, for all images and i at once.
        J = vjp(given.u.expand(n, *g.shape[1:]).reshape(many))(units).view(n, images, n).transpose(0, 1)
        w = torch.linalg.solve(torch.eye(n).to(g) - J.mT, g.view(images, n, 1)).view_as(g)
    return _flat(given, (given.problem.step_map(given.u) * w).sum())


def _flat(given: TrainingProblem, of: Tensor) -> Tensor:
    # The graph of `lambda` is the problem's, for all that is asked of it.
    parts = torch.autograd.grad(of, list(given.model.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


@one_thread()
def gradient_table(cases: Mapping[tuple[str, str, str], Config]) -> pd.DataFrame:
    """Relative error of each hypergradient at the start of its training, and its milliseconds."""
    rows = {}
    problems: dict[tuple[str, str], tuple[TrainingProblem, Tensor]] = {}
    for (data, model, adjoint), config in cases.items():
        if (data, model) not in problems:
            given = training_problem(config)
            problems[data, model] = given, exact_hypergradient(given)
        given, exact = problems[data, model]
        compute = partial(hypergradient, given, config)
        rows[data, model, adjoint] = {
            "gradient error": float((compute() - exact).norm() / exact.norm()),
            "ms": 1e3 * median(timeit.repeat(compute, number=1, repeat=3)),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["data", "model", "adjoint"])


def training_table_of(runs: Mapping[tuple[str, str, str], Run]) -> pd.DataFrame:
    """Test losses that the trainings came to: after all steps, and after the time that the fastest one of the
    same data and model took for all of them; `status` and `seconds` of each."""
    rows = {
        case: {"status": run.status, "seconds": run.history["seconds"].iloc[-1], "test loss": _last(run)}
        for case, run in runs.items()
    }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis(["data", "model", "adjoint"])
    fastest = table["seconds"].groupby(["data", "model"]).transform("min")
    table["test loss, same time"] = [_last(run, fastest[case]) for case, run in runs.items()]
    return table


def _last(run: Run, seconds: float = np.inf) -> float:
    """Test loss of the last epoch that had ended after some seconds; NaN of a run that did not complete."""
    ended = run.history[run.history["seconds"] <= seconds]
    return float(ended["test_loss"].iloc[-1]) if run.status == COMPLETED else np.nan


def compare_hypergradients(
    cases: Mapping[tuple[str, str, str], Config], results: Results = None
) -> tuple[dict[tuple[str, str, str], Run], pd.DataFrame]:
    """The runs of all cases, trained where they are not stored, and the table of both kinds of numbers.

    Returns:
        The runs, and a row per case: `gradient error`, `ms`, `status`, `seconds`, `test loss`, `test loss,
        same time`, and `loss ratio`, that of the test loss to the one with the equation solved to 1e-5.
    """
    runs = dict(zip(cases, get_runs(list(cases.values()), results), strict=True))
    table = gradient_table(cases).join(training_table_of(runs))
    # The first one of each data and model.
    solved = table["test loss"].groupby(["data", "model"]).transform("first")
    table["loss ratio"] = table["test loss"] / solved
    return runs, table


def check_hypergradients(runs: Mapping[tuple[str, str, str], Run], table: pd.DataFrame) -> None:
    """Print what must hold whatever the parameters are.

    Raises:
        AssertionError: a row is missing, or a series took more steps than it has terms.
    """
    assert len(table) == len(runs) == 10 * len(ADJOINTS), f"{len(table)} rows of {len(runs)} runs"
    assert all(run.status == COMPLETED or run.reason for run in runs.values()), "a run ended without a reason"
    print("every case was trained, or says why not")
    for (data, model, adjoint), run in runs.items():
        if run.config.adjoint == "neumann":
            most = run.history.filter(["backward_steps"]).max().max()
            assert not most > run.config.neumann_steps, f"{data}, {model}, {adjoint}: {most} steps"
    print("no Neumann series has more terms than asked for, the Jacobian-free one none")


def hypergradient_figure(table: pd.DataFrame, text: str) -> Figure:
    """Above, the error of the gradient, below, the test loss over that with the solved equation.

    Args:
        table: what `compare_hypergradients` returned; a column of panels for each kind of data and task.
        text: for the line below.
    """
    kinds = list(table.groupby("data", sort=False))
    positions = np.arange(len(ADJOINTS))
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(2, len(kinds), figsize=(TEXT_WIDTH, 4.4), sharex=True)
        fig.subplots_adjust(left=0.09, right=0.995, top=0.9, bottom=0.24, wspace=0.42, hspace=0.1)
        for (above, below), (data, rows) in zip(axes.T, kinds, strict=True):
            for model in MODELS:
                own = rows.xs(model, level="model").reindex(list(ADJOINTS), level="adjoint")
                style = model_line(model) | {"label": MODEL_NAMES[model], "markersize": 3.5}
                above.semilogy(positions, own["gradient error"], **style)
                below.plot(positions, own["loss ratio"], **style)
            above.set_title(str(data).replace(", ", "\n"))
            below.axhline(1, color="0.6", linewidth=0.6, zorder=0)
            below.set_xticks(positions, list(ADJOINTS), rotation=90)
            for axis in (above, below):
                axis.grid(alpha=0.3, linewidth=0.5)
                axis.tick_params(labelsize=7)
        axes[0, 0].set_ylabel("error of the gradient")
        axes[1, 0].set_ylabel("test loss / solved to 1e-5")
        axes[0, -1].legend(frameon=False, fontsize=7)
        note(fig, text)
    return fig
