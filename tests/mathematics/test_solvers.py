"""Fixed-point solvers against closed forms, their definitions and TorchDEQ's Anderson acceleration."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import normal
from torch import Tensor

from lib.solvers import (
    DIVERGENCE_FACTOR,
    Anderson,
    FixedPointProblem,
    PlainIteration,
    Solver,
    Status,
    StepMap,
    fixed_point,
)

SEEDS = st.integers(0, 2**32 - 1)
BATCHES = st.sampled_from([(), (3,), (2, 2)])
SOLVERS = pytest.mark.parametrize("solver", [PlainIteration(), Anderson()], ids=["plain", "anderson"])


def linear_map(M: Tensor, c: Tensor) -> StepMap:
    """Return `u -> M u + c` per sample: `M` is `(*batch, d, d)`, `c` and `u` are `(*batch, 1, 1, d)`."""
    return lambda u: (M[..., None, None, :, :] @ u[..., None]).squeeze(-1) + c


def closed_form(M: Tensor, c: Tensor) -> Tensor:
    return torch.linalg.solve(torch.eye(M.shape[-1]) - M, c.flatten(-3)).view_as(c)


def size(u: Tensor) -> Tensor:
    return torch.linalg.vector_norm(u, dim=(-3, -2, -1))


def rotations(count: int, d: int, seed: int) -> Tensor:
    """Return random orthogonal matrices: `q` times one is a contraction by exactly `q`."""
    return torch.linalg.qr(normal(count, d, d, seed=seed))[0]


def recorded(step_map: StepMap) -> tuple[StepMap, list[Tensor]]:
    """Return the same map, and a list of the points of its evaluations."""
    points: list[Tensor] = []

    def T(u: Tensor) -> Tensor:
        points.append(u.clone())
        return step_map(u)

    return T, points


@SOLVERS
@given(st.integers(1, 10), BATCHES, st.floats(0, 0.9), SEEDS)
def test_linear_contractions_converge_to_closed_form(
    solver: Solver, d: int, batch: tuple[int, ...], factor: float, seed: int
) -> None:
    """The error at `u` is at most `||T(u) - u|| / (1 - q)` for a contraction with factor `q`."""
    G, c = normal(*batch, d, d, seed=seed), normal(*batch, 1, 1, d, seed=seed + 1)
    M = factor * G / torch.linalg.matrix_norm(G, 2)[..., None, None]
    T = linear_map(M, c)
    solution = fixed_point(T, torch.zeros_like(c), replace(solver, tol=1e-9, max_steps=500))
    assert solution.status.eq(Status.CONVERGED).all()
    assert solution.residual.le(1e-9).all()
    error = size(solution.value - closed_form(M, c))
    bound = size(T(solution.value) - solution.value) / (1 - factor)
    assert error.le(bound + 1e-12 * size(c) / (1 - factor)).all()


@SOLVERS
def test_batch_matches_separate_samples(solver: Solver) -> None:
    """Contractive, neutral, expansive and undefined samples have the same values, steps and statuses."""
    solver = replace(solver, tol=1e-8, max_steps=40)
    factors = torch.tensor([0.01, 0.5, 0.99, 1.0, 3.0, math.nan, 0.3], dtype=torch.float64)
    M = factors[:, None, None] * rotations(7, 30, 0)
    c, u0 = normal(2, 7, 1, 1, 30, seed=1)
    together = fixed_point(linear_map(M, c), u0, solver)
    assert set(together.status.tolist()) == set(Status) - {Status.STAGNATED}
    for i in range(7):
        alone = fixed_point(linear_map(M[i], c[i]), u0[i], solver)
        assert together.status[i] == alone.status
        assert together.steps[i] == alone.steps
        torch.testing.assert_close(together.value[i], alone.value, rtol=1e-8, atol=1e-8, equal_nan=True)


@SOLVERS
@pytest.mark.parametrize("stack", [(), (2,)])
def test_restriction_skips_stopped_images(solver: Solver, stack: tuple[int, ...]) -> None:
    """An image is evaluated while it is active in a member of the stack; the results do not change."""
    solver = replace(solver, tol=1e-8, max_steps=40)
    factors = torch.tensor([0.3, 0.01, 0.5, 3.0, 0.99], dtype=torch.float64)
    M = factors[:, None, None] * rotations(5, 30, 0)
    M = torch.stack([M, M / 2]) if stack else M
    c, u0 = normal(2, *stack, 5, 1, 1, 30, seed=1)
    evaluated: list[list[int]] = []

    def restricted(images: Tensor) -> StepMap:
        T = linear_map(M[..., images, :, :], c[..., images, :, :, :])

        def counted(u: Tensor) -> Tensor:
            evaluated.append(images.tolist())
            return T(u)

        return counted

    expected = fixed_point(linear_map(M, c), u0, solver)
    problem = FixedPointProblem(restricted(torch.arange(5)), restrict=restricted)
    solution = fixed_point(problem, u0, solver)
    for name in ("value", "steps", "status"):
        torch.testing.assert_close(getattr(solution, name), getattr(expected, name), rtol=1e-8, atol=1e-8)
    last = solution.steps.view(-1, 5).amax(0)
    assert last.unique().numel() >= 4
    assert evaluated == [[i for i in range(5) if k < last[i]] for k in range(40)]


@SOLVERS
def test_step_limit_is_a_status(solver: Solver) -> None:
    M, c = 0.99 * rotations(3, 30, 0), normal(3, 1, 1, 30, seed=1)
    solution = fixed_point(linear_map(M, c), torch.zeros_like(c), replace(solver, tol=1e-8, max_steps=7))
    assert solution.status.eq(Status.MAX_STEPS).all()
    assert solution.steps.eq(7).all()
    assert solution.residual.gt(1e-8).all()
    assert [solution.fraction(s) for s in (Status.MAX_STEPS, Status.CONVERGED)] == [1.0, 0.0]


@pytest.mark.parametrize("patience", [3, 5, 12])
def test_constant_residual_stagnates(patience: int) -> None:
    """A residual that falls fast enough or grows does not stagnate."""
    factors = torch.tensor([1.0, 0.5, 0.75 ** (1 / patience), 1.2], dtype=torch.float64)
    M, c = factors[:, None, None] * rotations(1, 8, 0), normal(4, 1, 1, 8, seed=1)
    c[0] = 0
    u0 = normal(4, 1, 1, 8, seed=2)
    solver = PlainIteration(tol=1e-5, max_steps=60, patience=patience)
    solution = fixed_point(linear_map(M, c), u0, solver)
    expected = [Status.STAGNATED, Status.CONVERGED, Status.MAX_STEPS, Status.MAX_STEPS]
    assert solution.status.tolist() == expected
    assert solution.steps[0] == patience + 1
    patient = fixed_point(linear_map(M, c), u0, replace(solver, patience=None))
    assert patient.status.tolist() == [Status.MAX_STEPS, *expected[1:]]
    assert torch.equal(patient.value[1:], solution.value[1:])


def test_expansion_diverges_once_residual_exceeds_limit() -> None:
    """Residuals of `T(u) = 3 u + c` grow by a factor of 3 per step."""
    c = normal(1, 1, 1, 5)
    solution = fixed_point(lambda u: 3 * u + c, torch.zeros_like(c), PlainIteration(max_steps=100))
    growths = next(k for k in range(100) if 3**k > DIVERGENCE_FACTOR)
    assert solution.status.item() == Status.DIVERGED
    assert solution.steps.item() == growths + 1
    torch.testing.assert_close(solution.value, (3**growths - 1) / 2 * c)


@SOLVERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "step_map",
    [
        lambda u: u * math.nan,
        lambda u: u.sqrt() - 1,
        lambda u: -u * math.inf,
        lambda u: u * 1e20,
        lambda u: u * 1e200,
    ],
    ids=["nan", "nan in the second step", "inf", "overflow of a float32 norm", "overflow of a float64 norm"],
)
def test_non_finite_values_diverge(solver: Solver, dtype: torch.dtype, step_map: StepMap) -> None:
    solution = fixed_point(step_map, torch.full((1, 1, 2, 2), 0.5, dtype=dtype), solver)
    assert solution.status.item() == Status.DIVERGED
    assert solution.value.isfinite().all()


@SOLVERS
def test_start_at_fixed_point_converges_in_one_step(solver: Solver) -> None:
    """This includes the fixed point 0. A constant map needs two steps."""
    c = torch.tensor([[[[2.0, -4.0]]], [[[0.0, 0.0]]]], dtype=torch.float64)
    solution = fixed_point(lambda u: u / 2 + c, 2 * c, solver)
    assert torch.equal(solution.value, 2 * c)
    assert solution.steps.eq(1).all()
    assert solution.residuals.eq(0).all()
    constant = fixed_point(lambda u: c.clone(), torch.ones_like(c), solver)
    assert torch.equal(constant.value, c)
    assert constant.steps.eq(2).all()
    for solved in (solution, constant):
        assert solved.status.eq(Status.CONVERGED).all()


@SOLVERS
def test_residuals_match_all_iterates(solver: Solver) -> None:
    """`residuals[k]` is `||T(u) - u|| / ||T(u)||` at the k-th point, constant once a sample has stopped."""
    factors = torch.tensor([[0.05, 0.4, 0.9], [0.97, 0.6, 0.2]], dtype=torch.float64)
    M = factors[..., None, None] * rotations(6, 15, 0).view(2, 3, 15, 15)
    c = normal(2, 3, 1, 1, 15, seed=1)
    step_map = linear_map(M, c)
    T, points = recorded(step_map)
    solution = fixed_point(T, torch.zeros_like(c), replace(solver, tol=1e-6, max_steps=60))
    assert solution.residuals.shape == (len(points), 2, 3)
    for k, u in enumerate(points):
        relative = size(step_map(u) - u) / size(step_map(u))
        torch.testing.assert_close(solution.residuals[k], relative, rtol=1e-8, atol=1e-13)
    assert torch.equal(solution.residual, solution.residuals.amin(0))
    assert torch.equal(solution.status == Status.CONVERGED, solution.residual <= 1e-6)
    for i in range(2):
        for j in range(3):
            stop = solution.steps[i, j] - 1
            assert solution.residuals[:stop, i, j].gt(1e-6).all()
            assert solution.residuals[stop:, i, j].eq(solution.residual[i, j]).all()


def test_plain_iteration_evaluates_powers_of_map() -> None:
    c = normal(2, 1, 1, 4)
    step_map = linear_map(0.9 * rotations(2, 4, 1), c)
    T, points = recorded(step_map)
    u = torch.zeros_like(c)
    fixed_point(T, u, PlainIteration(tol=1e-12, max_steps=20))
    for point in points:
        assert torch.equal(point, u)
        u = step_map(u)


@given(st.integers(1, 6), st.floats(0.1, 1), st.floats(1e-6, 1e-2), SEEDS)
def test_anderson_step_matches_definition(memory: int, beta: float, regularization: float, seed: int) -> None:
    """Every point minimizes the regularized residual over affine combinations of the last ones.

    The test computes the minimizer from the bordered system with a Lagrange multiplier.
    """
    d = 8
    c = normal(1, 1, 1, d, seed=seed)
    step_map = linear_map(0.9 * rotations(1, d, seed + 1), c)
    T, points = recorded(step_map)
    solver = Anderson(tol=1e-5, max_steps=9, memory=memory, regularization=regularization, beta=beta)
    fixed_point(T, torch.zeros_like(c), solver)
    assert len(points) >= 4
    for k in range(1, len(points)):
        U = torch.stack(points[max(0, k - memory) : k]).view(-1, d)
        G = torch.stack([step_map(u) - u for u in points[max(0, k - memory) : k]]).view(-1, d)
        m = len(U)
        ridge = regularization * G.square().sum(1).mean()
        bordered = torch.zeros(m + 1, m + 1, dtype=torch.float64)
        bordered[:m, :m] = (G @ G.T + ridge * torch.eye(m, dtype=torch.float64)) / G.square().sum()
        bordered[m, :m] = bordered[:m, m] = 1
        right = torch.zeros(m + 1, dtype=torch.float64)
        right[m] = 1
        alpha = torch.linalg.solve(bordered, right)[:m]
        torch.testing.assert_close(points[k].flatten(), alpha @ (U + beta * G), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("regularization", [1e-4, 1e-16, 0.0])
@pytest.mark.parametrize("d", [1, 3])
def test_anderson_is_finite_for_identical_residuals(d: int, regularization: float) -> None:
    """A translation has one residual, a Gram matrix of rank one and no fixed point."""
    c = torch.ones(2, 1, 1, d, dtype=torch.float64)
    solver = Anderson(tol=1e-12, max_steps=30, memory=6, regularization=regularization)
    solution = fixed_point(lambda u: u + c, torch.zeros_like(c), solver)
    assert solution.value.isfinite().all()
    assert solution.status.eq(Status.MAX_STEPS).all()


@given(st.integers(-60, 60), SEEDS)
def test_anderson_is_scale_invariant(exponent: int, seed: int) -> None:
    """`s T(u / s)` from `s u0` has `s` times the iterates, to the last bit for powers of two."""
    s = 2.0**exponent
    M, (c, u0) = 0.9 * rotations(2, 10, seed), normal(2, 2, 1, 1, 10, seed=seed + 1)
    T, points = recorded(linear_map(M, c))
    scaled_T, scaled_points = recorded(linear_map(M, s * c))
    solver = Anderson(tol=1e-8, max_steps=25)
    solution, scaled = fixed_point(T, u0, solver), fixed_point(scaled_T, s * u0, solver)
    assert all(torch.equal(s * u, v) for u, v in zip(points, scaled_points, strict=True))
    assert torch.equal(solution.residuals, scaled.residuals)


@given(
    st.lists(st.integers(1, 3), max_size=2), st.sampled_from([torch.float64, torch.int64, torch.complex64])
)
def test_invalid_shapes_and_types_are_rejected(shape: list[int], dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"^`u0` must be a floating point \(\.\.\., C, H, W\), got "):
        fixed_point(lambda u: u, torch.zeros(shape, dtype=dtype), PlainIteration())
    restricted = FixedPointProblem(lambda u: u, restrict=lambda indices: lambda u: u)
    with pytest.raises(ValueError, match=r"must be a floating point \(\.\.\., N, C, H, W\), got "):
        fixed_point(restricted, torch.zeros(1, 2, 2), PlainIteration())
    with pytest.raises(ValueError, match=r"^`T` must keep the shape .*, got "):
        fixed_point(lambda u: u[..., :1, :], torch.zeros(1, 2, 2), PlainIteration())
