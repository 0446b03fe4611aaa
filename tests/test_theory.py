"""The special case: tied weights have the bilevel gradient, and a field that is a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from lib.experiments.profiles import faces_config
from lib.experiments.runs import Run
from lib.figures import theory
from lib.figures.theory import (
    SmallProblem,
    check_shares,
    equilibrium_gradients,
    field_jacobian,
    optimality_hypergradient,
    path_of_skew_shares,
    skew_figure,
    skew_share,
    small_problem,
    trained_skew_shares,
)
from lib.models import FixedPointModel
from lib.regularizer import GRADIENT_NORM
from lib.solvers import Anderson, PlainIteration, Status, fixed_point

pytestmark = pytest.mark.usefixtures("one_thread", "drawing")

SOLVER = Anderson(1e-13, 2000)


def make_problem(**values: Any) -> SmallProblem:
    numbers: dict[str, Any] = {"height": 9, "width": 8, "filters": 2, "filter_size": 3}
    numbers |= {"sharpness": 5.0, "lam": 3.0, "noise": 0.2, "seed": 0}
    return small_problem(**numbers | values)


@pytest.fixture(scope="module")
def problem(one_thread: None) -> SmallProblem:
    return make_problem()


def minimiser(model: FixedPointModel, f: Tensor) -> Tensor:
    solution = fixed_point(model.step_map(f), f, SOLVER)
    assert solution.status.item() == Status.CONVERGED
    return solution.value


def upper_level(model: FixedPointModel, name: str, weight: Tensor, problem: SmallProblem) -> float:
    """The loss at the fixed point that a model has with other weights."""
    parameter = getattr(model.regularizer, name)
    kept = parameter.data
    parameter.data = weight
    loss = (minimiser(model, problem.f) - problem.truth).square().mean().item()
    parameter.data = kept
    return loss


def central_difference(
    model: FixedPointModel, name: str, entry: tuple[int, ...], problem: SmallProblem, h: float = 1e-4
) -> float:
    weight = getattr(model.regularizer, name).detach()
    sides = []
    for sign in (1, -1):
        moved = weight.clone()
        moved[entry] += sign * h
        sides.append(upper_level(model, name, moved, problem))
    return (sides[0] - sides[1]) / (2 * h)


ENTRIES = [(0, 0, 0), (0, 1, 1), (0, 2, 1), (1, 0, 2), (1, 1, 0), (1, 2, 2)]


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_the_optimality_condition_gives_the_derivative_of_the_loss(gamma: float) -> None:
    """Central differences, with the lower level solved again on both sides, agree in every entry tried."""
    problem = make_problem()
    model = problem.tied
    model.gamma.fill_(gamma)
    hypergradient = optimality_hypergradient(model, minimiser(model, problem.f), problem.f, problem.truth)
    assert hypergradient.shape == model.regularizer.A.shape
    for entry in ENTRIES:
        expected = central_difference(model, "A", entry, problem)
        assert hypergradient[entry].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_implicit_differentiation_gives_the_derivative_of_the_loss() -> None:
    """For a free `C` that differs from `A`, in each of both."""
    problem = make_problem()
    assert problem.free.regularizer.C is not None
    problem.free.regularizer.C.data = 0.8 * problem.free.regularizer.A.data + 0.2 * problem.other
    _, gradients = equilibrium_gradients(problem.free, problem.f, problem.truth, SOLVER)
    assert set(gradients) == {"A", "C"}
    for name, gradient in gradients.items():
        for entry in ENTRIES[::2]:
            expected = central_difference(problem.free, name, entry, problem)
            assert gradient[entry].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("values", [{}, {"seed": 1, "filters": 3}, {"filter_size": 5, "sharpness": 20.0}])
def test_bilevel_learning_is_the_tied_equilibrium(values: dict[str, Any]) -> None:
    """The gradient of the tied model is the optimality condition's; it is the sum of both parts of the free
    one, and none of the parts alone."""
    problem = make_problem(**values)
    u, tied = equilibrium_gradients(problem.tied, problem.f, problem.truth, SOLVER)
    v, free = equilibrium_gradients(problem.free, problem.f, problem.truth, SOLVER)
    torch.testing.assert_close(u, v, rtol=0, atol=1e-12)
    expected = optimality_hypergradient(problem.tied, u, problem.f, problem.truth)
    size = torch.linalg.vector_norm(expected)
    assert size > 1e-4
    assert set(tied) == {"A"}

    def distance(gradient: Tensor) -> float:
        return (torch.linalg.vector_norm(gradient - expected) / size).item()

    assert distance(tied["A"]) < 1e-8
    assert distance(free["A"] + free["C"]) < 1e-8
    assert distance(free["A"]) > 0.01
    assert distance(free["C"]) > 0.01


def test_gradients_do_not_add_up_over_calls(problem: SmallProblem) -> None:
    """Each call starts from none, and its gradients are kept by the next one."""
    _, first = equilibrium_gradients(problem.tied, problem.f, problem.truth, SOLVER)
    kept = first["A"].clone()
    _, second = equilibrium_gradients(problem.tied, problem.f, problem.truth, SOLVER)
    assert torch.equal(first["A"], kept)
    assert torch.equal(second["A"], kept)


def test_the_problem_is_what_it_says(problem: SmallProblem) -> None:
    """Noise of its standard deviation, tied and free models that start as one, and other kernels."""
    assert problem.tied.regularizer.C is None
    assert problem.free.regularizer.C is not None
    A = problem.tied.regularizer.A
    assert torch.equal(A, problem.free.regularizer.A)
    assert torch.equal(A, problem.free.regularizer.C)
    assert A.data_ptr() != problem.free.regularizer.A.data_ptr() != problem.free.regularizer.C.data_ptr()
    assert A.dtype == problem.f.dtype == torch.float64
    assert problem.other.shape == A.shape
    for kernels in (A.detach(), problem.other):
        expected = GRADIENT_NORM / kernels.shape[-1]
        assert torch.linalg.vector_norm(kernels).item() == pytest.approx(expected)
    assert (A - problem.other).abs().max() > 0.1
    assert problem.f.shape == problem.truth.shape == (1, 1, 9, 8)
    large = make_problem(height=60, width=50)
    assert (large.f - large.truth).std().item() == pytest.approx(0.2, rel=0.1)


@pytest.mark.parametrize("seed", range(3))
def test_plain_iteration_contracts(seed: int) -> None:
    """Every residual is smaller than the one before, for kernels of any draw."""
    problem = make_problem(seed=seed, sharpness=30.0)
    for model in (problem.tied, problem.free):
        residuals = fixed_point(model.step_map(problem.f), problem.f, PlainIteration(1e-11, 3000)).residuals
        assert residuals[-1].item() <= 1e-11
        assert (residuals.flatten().diff() < 0).all()


def test_the_jacobian_is_that_of_the_field(problem: SmallProblem) -> None:
    """Its columns are central differences of the field."""
    model, u = problem.free, problem.f
    J = field_jacobian(model, u)
    assert J.shape == (72, 72)
    assert not J.requires_grad
    h = 1e-6
    for pixel in (0, 31, 71):
        unit = torch.zeros(72, dtype=torch.float64)
        unit[pixel] = h
        above, below = (
            model.regularizer.field(u + sign * unit.view_as(u), model.gamma, model.tau) for sign in (1, -1)
        )
        torch.testing.assert_close(
            J[:, pixel], ((above - below) / (2 * h)).flatten().detach(), rtol=1e-6, atol=1e-7
        )


def test_the_jacobian_is_symmetric_if_and_only_if_the_weights_are_tied() -> None:
    """At any image; a free `C` that equals `A` counts as tied, a small difference does not."""
    problem = make_problem()
    assert problem.free.regularizer.C is not None
    for u in (problem.f, problem.truth, torch.zeros_like(problem.f)):
        for model in (problem.tied, problem.free):
            J = field_jacobian(model, u)
            torch.testing.assert_close(J, J.T, rtol=0, atol=1e-12)
            assert torch.linalg.eigvalsh(J)[0] > -1e-12
    problem.free.regularizer.C.data += 1e-3 * problem.other
    J = field_jacobian(problem.free, problem.f)
    assert (J - J.T).abs().max() > 1e-5
    assert 1e-6 < skew_share(J) < 0.1


def test_the_skew_share_of_known_matrices() -> None:
    """0 of a symmetric matrix, 1 of a skew one, and the sine of the angle between both parts."""
    M = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    symmetric, skew = (M + M.T) / 2, (M - M.T) / 2
    assert skew_share(symmetric) == pytest.approx(0, abs=1e-15)
    assert skew_share(skew) == pytest.approx(1)
    for factor in (1e-8, -3.0, 1e6):
        assert skew_share(factor * M) == pytest.approx(skew_share(M))
    symmetric, skew = (part / torch.linalg.matrix_norm(part) for part in (symmetric, skew))
    for angle in (0.1, 0.7, 1.5):
        assert skew_share(np.cos(angle) * symmetric + np.sin(angle) * skew) == pytest.approx(np.sin(angle))


def test_the_path_starts_at_the_tied_model_and_gives_the_weights_back() -> None:
    """Its rows are those of `C = (1 - t) A + t B`, and afterwards `C` is `A` again."""
    problem = make_problem()
    regularizer = problem.free.regularizer
    assert regularizer.C is not None
    A = regularizer.A.detach().clone()
    shares = path_of_skew_shares(problem, 5)
    assert torch.equal(regularizer.C, A)
    assert torch.equal(regularizer.A, A)
    assert shares.index.name == "t"
    np.testing.assert_allclose(shares.index, [0, 0.25, 0.5, 0.75, 1])
    assert shares["skew"].iloc[0] <= 1e-14
    assert shares["lowest"].iloc[0] >= -1e-14
    for t, row in list(shares.iterrows())[1:]:
        regularizer.C.data = A + t * (problem.other - A)
        J = field_jacobian(problem.free, problem.f)
        assert row["skew"] == pytest.approx(skew_share(J))
        eigenvalues = np.linalg.eigvalsh((J + J.T).numpy() / 2)
        assert row["lowest"] == pytest.approx(eigenvalues.min() / eigenvalues.max())
    assert (shares["skew"].diff().dropna() > 0).all()
    # `C` shares no memory with `A`.
    regularizer.C.data = A
    path_of_skew_shares(problem, 2)
    regularizer.C.data += 1
    assert torch.equal(regularizer.A, A)


def kernels_run(task: str, model: str, filters: int) -> Run:
    """A run with random kernels, as `trained_kernels` would find it."""
    config = faces_config("quick", task, model=model, filters=filters, filter_size={2: 11, 30: 3}[filters])
    draws = torch.Generator().manual_seed(filters)
    A, C = (0.05 * torch.randn(2, filters, config.filter_size, config.filter_size, generator=draws)).unbind()
    weights = {"A": A} | ({"C": C} if model == "deq" else {})
    return Run("key", config, "completed", "", pd.DataFrame(), weights, {})


def test_the_shares_of_trained_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the four trainings on denoising: none where the kernels are tied."""
    asked = []

    def find(task: str, model: str, filters: int) -> Run:
        asked.append((task, model, filters))
        return kernels_run(task, model, filters)

    monkeypatch.setattr(theory, "trained_kernels", find)
    shares = trained_skew_shares(12, 10)
    assert set(asked) == {("denoising", model, count) for model in ("bilevel", "deq") for count in (2, 30)}
    assert list(shares) == ["bilevel 11x11", "bilevel 3x3", "DEQ 11x11", "DEQ 3x3"]
    for name, share in shares.items():
        assert share <= 1e-5 if name.startswith("bilevel") else share > 0.05


def good_shares() -> tuple[pd.DataFrame, dict[str, float]]:
    path = pd.DataFrame({"skew": [0.0, 0.2, 0.4], "lowest": [0.0, -0.1, -0.3]}, index=[0, 0.5, 1])
    return path, {"bilevel 3x3": 1e-8, "DEQ 3x3": 0.2}


def test_the_check_of_shares_passes_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    check_shares(*good_shares())
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4
    assert said[2:] == ["bilevel 3x3, trained: a gradient", "DEQ 3x3, trained: no gradient"]


SPOILT: dict[str, tuple[Callable[[pd.DataFrame, dict[str, float]], object], str]] = {
    "a skew start": (lambda path, trained: path["skew"].__setitem__(0, 1e-6), "C = A: skew share"),
    "an indefinite start": (lambda path, trained: path["lowest"].__setitem__(0, -1e-6), "lowest eigenvalue"),
    "a symmetric end": (lambda path, trained: path["skew"].__setitem__(1, 0.0), "no skew part"),
    "a skew tied field": (lambda path, trained: trained.update({"bilevel 3x3": 1e-3}), "bilevel 3x3"),
    "a symmetric free field": (lambda path, trained: trained.update({"DEQ 3x3": 1e-6}), "DEQ 3x3"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_the_check_of_shares_fires(name: str) -> None:
    spoil, message = SPOILT[name]
    path, trained = good_shares()
    columns = {column: path[column].copy() for column in path}
    spoil(columns, trained)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=message):
        check_shares(path.assign(**columns), trained)


def test_the_check_passes_what_is_computed(problem: SmallProblem) -> None:
    check_shares(path_of_skew_shares(problem, 3), {})


def test_the_figure_shows_the_shares() -> None:
    """The path as two curves, the trained shares as bars of the models' colours."""
    path, trained = good_shares()
    left, right = skew_figure(path, trained).axes
    curves = {line.get_label(): line.get_ydata() for line in left.lines[:2]}
    assert [list(values) for values in curves.values()] == [list(path["skew"]), list(path["lowest"])]
    assert [bar.get_height() for bar in right.patches] == list(trained.values())
    assert [" ".join(label.get_text().split()) for label in right.get_xticklabels()] == list(trained)
    colors = [bar.get_facecolor() for bar in right.patches]
    assert colors[0] != colors[1]
