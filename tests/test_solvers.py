"""Fixed-point solvers against closed forms, their own definitions and TorchDEQ's Anderson acceleration."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchdeq.solver import get_solver

from lib.solvers import (
    DIVERGENCE_FACTOR,
    Anderson,
    FixedPointProblem,
    PlainIteration,
    Solution,
    Solver,
    Status,
    StepMap,
    fixed_point,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = st.integers(0, 2**32 - 1)
BATCHES = st.sampled_from([(), (3,), (2, 2)])
SOLVERS = pytest.mark.parametrize("solver", [PlainIteration(), Anderson()], ids=["plain", "anderson"])


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear_map(M: Tensor, c: Tensor) -> StepMap:
    """`u -> M u + c` for every sample: `M` is `(*batch, d, d)`, `c` and `u` are `(*batch, 1, 1, d)`."""

    def T(u: Tensor) -> Tensor:
        Mu: Tensor = (M[..., None, None, :, :] @ u[..., None]).squeeze(-1)
        return Mu + c

    return T


def closed_form(M: Tensor, c: Tensor) -> Tensor:
    u: Tensor = torch.linalg.solve(torch.eye(M.shape[-1]) - M, c.flatten(-3))
    return u.view_as(c)


def size(u: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(u, dim=(-3, -2, -1))
    return norms


def rotations(count: int, d: int, seed: int) -> Tensor:
    """Random orthogonal matrices: `q` times one shortens every vector by exactly the factor `q`."""
    rotation: Tensor = torch.linalg.qr(normal((count, d, d), seed))[0]
    return rotation


def recorded(step_map: StepMap) -> tuple[StepMap, list[Tensor]]:
    """The same map, and the list of the points at which it is evaluated."""
    points: list[Tensor] = []

    def T(u: Tensor) -> Tensor:
        points.append(u.clone())
        return step_map(u)

    return T, points


@SOLVERS
@given(st.integers(1, 10), BATCHES, st.floats(0, 0.9), SEEDS)
def test_linear_contractions_reach_their_closed_form(
    solver: Solver, d: int, batch: tuple[int, ...], factor: float, seed: int
) -> None:
    """The error at `u` is at most `||T(u) - u|| / (1 - q)` for a contraction with factor `q`."""
    solver = replace(solver, tol=1e-9, max_steps=500)
    G, c = normal((*batch, d, d), seed), normal((*batch, 1, 1, d), seed + 1)
    M = factor * G / torch.linalg.matrix_norm(G, 2)[..., None, None]
    T = linear_map(M, c)
    solution = fixed_point(T, torch.zeros_like(c), solver)
    assert solution.status.eq(Status.CONVERGED).all()
    assert solution.residual.le(1e-9).all()
    error = size(solution.value - closed_form(M, c))
    bound = size(T(solution.value) - solution.value) / (1 - factor)
    assert error.le(bound + 1e-13 * size(c) / (1 - factor)).all()


@SOLVERS
def test_a_batch_solves_every_sample_as_if_alone(solver: Solver) -> None:
    """Easy, hard, hopeless, expansive and undefined samples side by side: value, steps, status as alone."""
    solver = replace(solver, tol=1e-8, max_steps=40)
    factors = torch.tensor([0.01, 0.5, 0.99, 1.0, 3.0, math.nan, 0.3], dtype=torch.float64)
    M = factors[:, None, None] * rotations(7, 30, 0)
    c, u0 = normal((2, 7, 1, 1, 30), 1)
    together = fixed_point(linear_map(M, c), u0, solver)
    assert set(together.status.tolist()) == set(Status) - {Status.STAGNATED}
    assert together.steps.unique().numel() >= 4
    for i in range(7):
        alone = fixed_point(linear_map(M[i], c[i]), u0[i], solver)
        assert together.status[i] == alone.status
        assert together.steps[i] == alone.steps
        torch.testing.assert_close(together.value[i], alone.value, rtol=1e-9, atol=1e-9, equal_nan=True)
        history = together.residuals[: alone.steps, i]
        torch.testing.assert_close(history, alone.residuals, rtol=1e-6, atol=1e-12, equal_nan=True)


@SOLVERS
@pytest.mark.parametrize("stack", [(), (2,)])
def test_a_restricted_map_changes_nothing_but_the_work(solver: Solver, stack: tuple[int, ...]) -> None:
    """The same solution; the map is evaluated on an image while it runs in one of the stack, no longer."""
    solver = replace(solver, tol=1e-8, max_steps=40)
    factors = torch.tensor([0.3, 0.01, 0.5, 3.0, 0.99], dtype=torch.float64)
    M = factors[:, None, None] * rotations(5, 30, 0)
    if stack:
        # Most images stop earlier in the second of the stack.
        M = torch.stack([M, M / 2])
    c, u0 = normal((2, *stack, 5, 1, 1, 30), 1)
    evaluated: list[list[int]] = []

    def of(images: Tensor) -> StepMap:
        T = linear_map(M[..., images, :, :], c[..., images, :, :, :])

        def counted(u: Tensor) -> Tensor:
            evaluated.append(images.tolist())
            return T(u)

        return counted

    def whole(u: Tensor) -> Tensor:
        evaluated.append([0, 1, 2, 3, 4])
        return linear_map(M, c)(u)

    expected = fixed_point(whole, u0, solver)
    assert len(evaluated) == 40
    evaluated.clear()
    solution = fixed_point(FixedPointProblem(whole, restrict=of), u0, solver)
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(solution, name), value, rtol=1e-9, atol=1e-12)
    last = solution.steps.view(-1, 5).amax(0)
    assert last.unique().numel() >= 4
    assert evaluated == [[i for i in range(5) if k < last[i]] for k in range(40)]


@SOLVERS
def test_all_dimensions_of_an_image_are_one_sample(solver: Solver) -> None:
    """Channels, rows and columns are solved together: the layout of a sample has no influence."""
    M, c = 0.8 * rotations(2, 12, 0), normal((2, 1, 1, 12), 1)
    flat = linear_map(M, c)
    solver = replace(solver, tol=1e-10, max_steps=300)
    expected = fixed_point(flat, torch.zeros_like(c), solver)
    shape = (2, 2, 3, 2)
    image = fixed_point(lambda u: flat(u.view(c.shape)).view(shape), torch.zeros(shape).double(), solver)
    torch.testing.assert_close(image.value.view(c.shape), expected.value, rtol=1e-12, atol=1e-12)
    assert torch.equal(image.steps, expected.steps)


@SOLVERS
def test_too_few_steps_are_reported_as_such(solver: Solver) -> None:
    """A contraction that needs more steps than allowed ends with `MAX_STEPS`, having used exactly those."""
    M, c = 0.99 * rotations(3, 30, 0), normal((3, 1, 1, 30), 1)
    solution = fixed_point(linear_map(M, c), torch.zeros_like(c), replace(solver, tol=1e-8, max_steps=7))
    assert solution.status.eq(Status.MAX_STEPS).all()
    assert solution.steps.eq(7).all()
    assert solution.residual.gt(1e-8).all()


@pytest.mark.parametrize("patience", [3, 5, 12])
def test_a_residual_that_stands_still_is_given_up(patience: int) -> None:
    """Not one that falls, however far it is from the tolerance, and not one that grows."""
    factors = torch.tensor([1.0, 0.5, 0.75 ** (1 / patience), 1.2], dtype=torch.float64)
    M, c = factors[:, None, None] * rotations(1, 8, 0), normal((4, 1, 1, 8), 1)
    c[0] = 0
    u0 = normal((4, 1, 1, 8), 2)
    solver = PlainIteration(tol=1e-5, max_steps=60, patience=patience)
    solution = fixed_point(linear_map(M, c), u0, solver)
    expected = [Status.STAGNATED, Status.CONVERGED, Status.MAX_STEPS, Status.MAX_STEPS]
    assert solution.status.tolist() == expected
    assert solution.steps[0] == patience + 1
    patient = fixed_point(linear_map(M, c), u0, replace(solver, patience=None))
    assert patient.status.tolist() == [Status.MAX_STEPS, *expected[1:]]
    assert torch.equal(patient.value[1:], solution.value[1:])


def test_an_expansion_diverges_at_the_step_its_growth_gives() -> None:
    """With `T(u) = 3 u + c` residuals grow by 3 a step: the iteration ends once that exceeds the limit."""
    c = normal((1, 1, 1, 5), 0)
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
        pytest.param(lambda u: u * math.nan, id="nan"),
        pytest.param(lambda u: u.sqrt() - 1, id="nan-in-the-second-step"),
        pytest.param(lambda u: u * math.inf, id="inf"),
        pytest.param(lambda u: -u * math.inf, id="minus-inf"),
        pytest.param(lambda u: u * 1e20, id="overflow-of-a-float32-norm"),
        pytest.param(lambda u: u * 1e200, id="overflow-of-a-float64-norm"),
    ],
)
def test_what_is_not_finite_has_diverged(solver: Solver, dtype: torch.dtype, step_map: StepMap) -> None:
    """NaN and overflow are a status, not an exception and not a convergence, and leave a finite iterate."""
    solution = fixed_point(step_map, torch.full((1, 1, 2, 2), 0.5, dtype=dtype), solver)
    assert solution.status.item() == Status.DIVERGED
    assert solution.value.isfinite().all()


@SOLVERS
def test_a_fixed_point_is_recognised_at_the_start(solver: Solver) -> None:
    """One evaluation, residual zero and no move; also where `T(u) = u = 0` and the ratio is 0/0."""
    c = torch.tensor([[[[2.0, -4.0]]], [[[0.0, 0.0]]]], dtype=torch.float64)
    solution = fixed_point(lambda u: u / 2 + c, 2 * c, solver)
    assert torch.equal(solution.value, 2 * c)
    assert solution.status.eq(Status.CONVERGED).all()
    assert solution.steps.eq(1).all()
    assert solution.residual.eq(0).all()
    assert solution.residuals.shape == (1, 2)


@SOLVERS
def test_a_constant_map_is_solved_in_two_steps(solver: Solver) -> None:
    """One step reaches the value, zero or not, and the next evaluation confirms it."""
    c = torch.tensor([[[[2.0, -4.0]]], [[[0.0, 0.0]]]], dtype=torch.float64)
    solution = fixed_point(lambda u: c.clone(), torch.ones_like(c), solver)
    assert torch.equal(solution.value, c)
    assert solution.steps.eq(2).all()
    assert solution.status.eq(Status.CONVERGED).all()


@pytest.mark.parametrize("patience", [None, 50])
@SOLVERS
def test_no_tensor_is_kept_for_a_step(solver: Solver, patience: int | None) -> None:
    """After sixty steps there are few more than after ten: what stays breaks up the memory for large ones."""
    f = normal((4, 1, 8, 8), 0)
    alive: list[int] = []

    def T(u: Tensor) -> Tensor:
        alive.append(sum(isinstance(kept, Tensor) for kept in gc.get_objects()))
        return u + f

    gc.freeze()
    try:
        fixed_point(T, f, replace(solver, tol=1e-300, max_steps=60, patience=patience))
    finally:
        gc.unfreeze()
    assert len(alive) == 60
    assert max(alive) - alive[10] < 10


@SOLVERS
def test_history_holds_the_relative_residual_before_every_step(solver: Solver) -> None:
    """`residuals[k]` is `||T(u) - u|| / ||T(u)||` at the k-th point; it stays once a sample has stopped."""
    factors = torch.tensor([[0.05, 0.4, 0.9], [0.97, 0.6, 0.2]], dtype=torch.float64)
    M = factors[..., None, None] * rotations(6, 15, 0).view(2, 3, 15, 15)
    c = normal((2, 3, 1, 1, 15), 1)
    step_map = linear_map(M, c)
    T, points = recorded(step_map)
    solution = fixed_point(T, torch.zeros_like(c), replace(solver, tol=1e-6, max_steps=60))
    evaluations = len(points)
    assert solution.residuals.shape == (evaluations, 2, 3)
    assert solution.steps.max() == evaluations

    def relative_residual(u: Tensor) -> Tensor:
        return size(step_map(u) - u) / size(step_map(u))

    for k, u in enumerate(points):
        torch.testing.assert_close(solution.residuals[k], relative_residual(u), rtol=1e-9, atol=1e-14)
    visited = torch.stack([step_map(u) for u in points])
    nearest = size(visited - solution.value).argmin(0)
    reached = solution.residuals.gather(0, nearest[None])[0]
    torch.testing.assert_close(size(visited - solution.value).amin(0), torch.zeros(2, 3).double())
    torch.testing.assert_close(solution.residual, reached, rtol=0, atol=0)
    assert torch.equal(solution.residual, solution.residuals.amin(0))
    converged = solution.status == Status.CONVERGED
    assert converged.any()
    assert torch.equal(converged, solution.residual <= 1e-6)
    for i in range(2):
        for j in range(3):
            stop = solution.steps[i, j] - 1
            assert solution.residuals[:stop, i, j].gt(1e-6).all()
            assert solution.residuals[stop:, i, j].eq(solution.residual[i, j]).all()


def test_plain_iteration_evaluates_the_powers_of_the_map() -> None:
    """The points are `u`, `T(u)`, `T(T(u))`, ... to the last bit."""
    c = normal((2, 1, 1, 4), 0)
    step_map = linear_map(0.9 * rotations(2, 4, 1), c)
    T, points = recorded(step_map)
    u = torch.zeros_like(c)
    fixed_point(T, u, PlainIteration(tol=1e-12, max_steps=20))
    assert len(points) == 20
    for point in points:
        assert torch.equal(point, u)
        u = step_map(u)


@given(st.integers(1, 6), st.floats(0.1, 1), st.floats(1e-6, 1e-2), SEEDS)
def test_anderson_takes_the_step_of_its_definition(
    memory: int, beta: float, regularization: float, seed: int
) -> None:
    """Every point minimises the regularised residual over affine combinations of the last `memory` ones.

    The minimiser comes here from the bordered system of the Lagrange multiplier, and the residuals from
    the points themselves.
    """
    d = 8
    c = normal((1, 1, 1, d), seed)
    step_map = linear_map(0.9 * rotations(1, d, seed + 1), c)
    T, points = recorded(step_map)
    fixed_point(
        T,
        torch.zeros_like(c),
        Anderson(tol=1e-5, max_steps=9, memory=memory, regularization=regularization, beta=beta),
    )
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
        torch.testing.assert_close(points[k].flatten(), alpha @ (U + beta * G), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("regularization", [1e-4, 1e-16, 0.0])
@pytest.mark.parametrize("d", [1, 3])
def test_identical_residuals_leave_anderson_finite(d: int, regularization: float) -> None:
    """A translation has one residual, a Gram matrix of rank one and no fixed point: it runs, finite, on."""
    c = torch.ones(2, 1, 1, d, dtype=torch.float64)
    solver = Anderson(tol=1e-12, max_steps=30, memory=6, regularization=regularization)
    solution = fixed_point(lambda u: u + c, torch.zeros_like(c), solver)
    assert solution.value.isfinite().all()
    assert solution.residuals.isfinite().all()
    assert solution.status.eq(Status.MAX_STEPS).all()


@given(st.integers(1, 3), st.sampled_from([1e-4, 1e-10]), SEEDS)
def test_memory_beyond_the_dimension_is_safe(d: int, regularization: float, seed: int) -> None:
    """Where residuals are linearly dependent by force, Anderson still solves a contraction."""
    M, c = 0.9 * rotations(3, d, seed), normal((3, 1, 1, d), seed + 1)
    solver = Anderson(tol=1e-9, max_steps=200, memory=9, regularization=regularization)
    solution = fixed_point(linear_map(M, c), torch.zeros_like(c), solver)
    assert solution.status.eq(Status.CONVERGED).all()
    torch.testing.assert_close(solution.value, closed_form(M, c), rtol=1e-6, atol=1e-7)


@given(st.integers(-60, 60), SEEDS)
def test_anderson_does_not_see_the_scale_of_a_problem(exponent: int, seed: int) -> None:
    """`s T(u / s)` from `s u0` has `s` times the iterates, to the last bit where `s` is a power of two."""
    s = 2.0**exponent
    M, (c, u0) = 0.9 * rotations(2, 10, seed), normal((2, 2, 1, 1, 10), seed + 1)
    T, points = recorded(linear_map(M, c))
    scaled_T, scaled_points = recorded(linear_map(M, s * c))
    solver = Anderson(tol=1e-8, max_steps=25)
    solution, scaled = fixed_point(T, u0, solver), fixed_point(scaled_T, s * u0, solver)
    assert len(points) == len(scaled_points) > 5
    for u, v in zip(points, scaled_points, strict=True):
        assert torch.equal(s * u, v)
    assert torch.equal(solution.steps, scaled.steps)
    assert torch.equal(solution.residuals, scaled.residuals)


def test_anderson_beats_plain_iteration_where_that_is_slow() -> None:
    """For a contraction with eigenvalues up to 0.99 it needs less than a tenth of the steps."""
    M = torch.linspace(0, 0.99, 20, dtype=torch.float64).diag()[None]
    c = normal((1, 1, 1, 20), 0)
    solutions = [
        fixed_point(linear_map(M, c), torch.zeros_like(c), solver)
        for solver in (PlainIteration(1e-6, 5000), Anderson(1e-6, 5000, memory=10))
    ]
    assert all(solution.status.eq(Status.CONVERGED).all() for solution in solutions)
    plain, anderson = (int(solution.steps) for solution in solutions)
    assert plain > 500
    assert anderson < plain / 10


@given(st.integers(1, 6), SEEDS)
def test_anderson_with_full_memory_ends_with_the_dimension(d: int, seed: int) -> None:
    """`d + 1` residuals in `d` dimensions have a combination that vanishes: the next point solves it."""
    M, c = 0.9 * rotations(2, d, seed), normal((2, 1, 1, d), seed + 1)
    solver = Anderson(tol=1e-6, max_steps=100, memory=d + 1, regularization=1e-14)
    solution = fixed_point(linear_map(M, c), torch.zeros_like(c), solver)
    assert solution.status.eq(Status.CONVERGED).all()
    assert solution.steps.le(d + 2).all()


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_anderson_agrees_with_torchdeq(beta: float) -> None:
    """The same fixed point of a nonlinear map, in nearly as many steps, also when damped by `beta`.

    Both ridges are negligible here: TorchDEQ's is absolute and this library's relative.
    """
    M, c = 1.2 * rotations(4, 20, 0), normal((4, 1, 1, 20), 1)

    def T(u: Tensor) -> Tensor:
        return 0.8 * torch.tanh(linear_map(M, c)(u)) + c

    u0, tol = torch.zeros_like(c), 1e-9
    solver = Anderson(tol, 200, memory=5, regularization=1e-12, beta=beta)
    ours = fixed_point(T, u0, solver)
    anderson: Callable[..., tuple[Tensor, list[Tensor], dict[str, Tensor]]] = get_solver("anderson")
    theirs, _, info = anderson(T, u0, max_iter=200, tol=tol, stop_mode="rel", m=5, lam=1e-20, tau=beta)
    assert ours.status.eq(Status.CONVERGED).all()
    assert info["rel_lowest"].le(tol).all()
    torch.testing.assert_close(ours.value, theirs, rtol=0, atol=1e-7)
    assert abs(ours.steps.max() - info["nstep"].max()) <= 3


def test_fraction_counts_samples_by_status() -> None:
    """The shares of the statuses are what was counted and add up to one."""
    status = torch.tensor([[0, 1, 0], [2, 0, 3]], dtype=torch.int8)
    solution = Solution(torch.zeros(2, 3, 1, 1, 1), torch.zeros(2, 3), torch.zeros(1, 2, 3), status, status)
    shares = [solution.fraction(s) for s in Status]
    assert shares == pytest.approx([3 / 6, 1 / 6, 1 / 6, 1 / 6])


@SOLVERS
def test_a_solve_changes_no_input_and_records_no_graph(solver: Solver) -> None:
    """The start is left as it was, and the solution carries no gradient."""
    c = normal((2, 1, 1, 6), 0).requires_grad_()
    u0 = normal((2, 1, 1, 6), 1)
    kept = u0.clone()
    solution = fixed_point(lambda u: u / 2 + c, u0, solver)
    assert torch.equal(u0, kept)
    assert not solution.value.requires_grad


@given(
    st.lists(st.integers(1, 3), max_size=2), st.sampled_from([torch.float64, torch.int64, torch.complex64])
)
def test_what_is_no_batch_of_images_is_refused(shape: list[int], dtype: torch.dtype) -> None:
    """In one line that names the shape that was expected, and so is a map to another shape."""
    u0 = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match=r"^u0: got .*, allowed: \(\.\.\., C, H, W\) of floating"):
        fixed_point(lambda u: u, u0, PlainIteration())
    images = u0.real.double().expand(4, 1, 2, *shape)
    assert images.dim() >= 3
    fixed_point(lambda u: u, images, PlainIteration())
    one = FixedPointProblem(lambda u: u, restrict=lambda indices: lambda u: u)
    with pytest.raises(ValueError, match=r"allowed: \(\.\.\., N, C, H, W\)"):
        fixed_point(one, torch.zeros(1, 2, 2), PlainIteration())
    with pytest.raises(ValueError, match=r"^T: got values of .*, allowed: u0's"):
        fixed_point(lambda u: u[..., :1, :], images.new_zeros(1, 2, 2), PlainIteration())
