"""Implicit gradients against differences, unrolled iterations, dense algebra and TorchDEQ."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from problems import (
    ANDERSON,
    KINDS,
    OPERATORS,
    PLAIN,
    Problem,
    assert_converged,
    assert_differences,
    assert_same_gradients,
    make_problem,
)
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian
from torchdeq import get_deq

from lib.implicit import NeumannSeries, implicit_fixed_point
from lib.models import FixedPointModel
from lib.regularizer import LINEAR
from lib.solvers import Anderson, PlainIteration, Solution, Solver, Status, fixed_point

EVERY_PROBLEM = pytest.mark.parametrize(
    ("kind", "operator", "tied"), list(itertools.product(KINDS, OPERATORS, (True, False)))
)


def active_pieces(model: FixedPointModel, u: Tensor) -> Tensor:
    """Return the linear piece of `sigma` for every expert of `u`."""
    field = model.regularizer
    if field.activation is LINEAR:
        return torch.zeros(1)
    return field.activation.sigma(field.analysis(u), model.tau).sign()


@EVERY_PROBLEM
def test_hypergradient_matches_differences(kind: str, operator: str, tied: bool) -> None:
    """Directional derivatives of the loss with respect to weights and data, away from all kinks."""
    problem = make_problem(kind, operator, tied)
    gradients, solution, adjoint = problem.implicit_gradients()
    assert_converged(solution, adjoint)

    def losses(points: dict[str, Tensor]) -> Tensor:
        models, f = problem.build(points)
        solution = fixed_point(models.step_map(f), problem.start(f), replace(ANDERSON, tol=1e-13))
        assert_converged(solution)
        if kind != "kernels":
            pieces = active_pieces(models, solution.value)
            assert torch.equal(pieces, pieces[:1].expand_as(pieces))
        return problem.loss(solution.value)

    assert_differences(gradients, problem.leaves, losses)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_hypergradient_matches_unrolled_iteration(kind: str, tied: bool) -> None:
    """Backpropagation through converged plain steps, against both solvers and autograd's products."""
    problem = make_problem(kind, "projections", tied)
    model, f = problem.build()
    T, u = model.step_map(f), problem.start(f)
    for _ in range(2500):
        u, last = T(u), u
        if (u - last).norm() <= 1e-12 * u.norm():
            break
    else:
        pytest.fail("the iteration has not converged")
    # Contributions of early steps are denormal numbers, which are slow.
    torch.set_flush_denormal(True)
    try:
        unrolled = problem.gradients(model, f, problem.loss(u))
    finally:
        torch.set_flush_denormal(False)
    assert_same_gradients(problem.implicit_gradients(PLAIN)[0], unrolled, rtol=1e-7)
    assert_same_gradients(problem.implicit_gradients(ANDERSON)[0], unrolled, rtol=1e-7)
    products = problem.implicit_gradients(ANDERSON, vjp=None, restrict=None)[0]
    assert_same_gradients(products, unrolled, rtol=1e-7)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("operator", OPERATORS)
def test_adjoint_solves_transposed_linear_system(operator: str, tied: bool) -> None:
    """`w` solves `(I - J)^T w = dL/du` with the dense Jacobian `J`; truncated series sum powers of `J^T`."""
    problem = make_problem("relu", operator, tied)
    _, solution, adjoint = problem.implicit_gradients()
    model, f = problem.build()
    u = solution.value.detach()
    J = jacobian(model.step_map(f), u).view(u.numel(), u.numel())
    g = 2 * (u - problem.truth).flatten() / u.numel()
    w = torch.linalg.solve((torch.eye(u.numel()) - J).T, g)
    torch.testing.assert_close(adjoint.value.flatten(), w, rtol=1e-7, atol=1e-9)
    total = power = g
    for steps in range(5):
        _, _, series = problem.implicit_gradients(adjoint=NeumannSeries(steps))
        torch.testing.assert_close(series.value.flatten(), total, rtol=1e-8, atol=1e-10)
        assert series.steps.eq(steps).all()
        power = J.T @ power
        total = total + power


def test_hypergradient_is_independent_of_adjoint_start() -> None:
    """A start at the solution takes one step."""
    problem = make_problem("kernels", "blur", tied=False)
    expected, _, adjoint = problem.implicit_gradients()
    for start, steps in ((adjoint.value, 1), (100 * torch.ones_like(adjoint.value), None)):
        gradients, _, solved = problem.implicit_gradients(first_adjoint=lambda g, w=start: w)
        assert_same_gradients(gradients, expected, rtol=1e-7)
        assert steps is None or solved.steps.le(steps).all()


def test_adjoint_failure_is_a_status() -> None:
    """Too few steps and an expansion are reported, not raised."""
    problem = make_problem("relu", "mask", tied=False)
    _, solution, adjoint = problem.implicit_gradients(PLAIN, PlainIteration(tol=1e-12, max_steps=3))
    assert_converged(solution)
    assert adjoint.status.eq(Status.MAX_STEPS).all()
    assert adjoint.steps.eq(3).all()
    theta = torch.tensor([[[[1.0, 2.0]]]], dtype=torch.float64, requires_grad=True)
    adjoints: list[Solution] = []
    solution = implicit_fixed_point(
        lambda u: 3 * u + theta, -theta.detach() / 2, PLAIN, on_adjoint=adjoints.append
    )
    solution.value.sum().backward()
    assert [solution.status.item(), adjoints[0].status.item()] == [Status.CONVERGED, Status.DIVERGED]


@pytest.mark.parametrize("solver", [PlainIteration(1e-2, 20), Anderson(1e-2, 20)], ids=["plain", "anderson"])
def test_value_is_iterate_of_solver(solver: Solver) -> None:
    """The value equals the solver's iterate to the last bit; without gradients nothing is recorded."""
    problem = make_problem("softshrink", "blur", tied=False)
    model, f = problem.build()
    T, u0 = model.step_map(f), problem.start(f)
    expected, solution = fixed_point(T, u0, solver), implicit_fixed_point(T, u0, solver)
    assert torch.equal(solution.value, expected.value)
    assert solution.value.requires_grad
    with torch.no_grad():
        assert not implicit_fixed_point(T, u0, solver).value.requires_grad


@pytest.mark.parametrize("solver", [PlainIteration, Anderson])
def test_memory_is_independent_of_steps(solver: Callable[[float, int], Solver]) -> None:
    """Ten or two hundred steps save the same tensors for the backward pass."""
    problem = make_problem("relu", "mask", tied=False)
    model, f = problem.build()
    T, u0 = model.step_map(f), problem.start(f)

    def saved(steps: int) -> list[int]:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert implicit_fixed_point(T, u0, solver(1e-300, steps)).steps.eq(steps).all()
        return sizes

    assert saved(10) == saved(200) != []


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")  # of torch itself, in forward mode
def test_higher_and_forward_derivatives_are_rejected() -> None:
    """Second derivatives, forward mode and torch.func raise an error in place of a wrong number."""

    def solved(t: Tensor) -> Tensor:
        u0 = torch.zeros(1, 1, 1, dtype=torch.float64)
        return implicit_fixed_point(lambda u: 0.5 * u.tanh() + t.square(), u0, ANDERSON).value.sum()

    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(solved(t), t, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hessian(solved, t.detach())
    with forward_ad.dual_level(), pytest.raises(NotImplementedError):
        solved(forward_ad.make_dual(t.detach(), torch.ones_like(t.detach())))
    with pytest.raises(RuntimeError):
        torch.func.grad(solved)(t.detach())


@pytest.mark.parametrize(("solver", "hook"), [("fixed_point_iter", True), ("anderson", False)])
@pytest.mark.parametrize("kind", ["relu", "kernels"])
def test_hypergradient_matches_torchdeq(kind: str, solver: str, hook: bool) -> None:
    """TorchDEQ differentiates the same step map, by a hook or its own function."""
    problem: Problem = make_problem(kind, "blur", tied=False)
    model, f = problem.build()
    options = {
        f"{part}_{name}": value for part in "fb" for name, value in (("max_iter", 2000), ("tol", 1e-9))
    }
    modes = {f"{part}_stop_mode": "rel" for part in "fb"}
    deq = get_deq(f_solver=solver, b_solver=solver, ift=not hook, hook_ift=hook, **options, **modes)
    values, info = deq(model.step_map(f), problem.start(f))
    assert info["rel_lowest"].le(1e-9).all()
    theirs = problem.gradients(model, f, problem.loss(values[-1]))
    assert_same_gradients(problem.implicit_gradients()[0], theirs, rtol=1e-5)
