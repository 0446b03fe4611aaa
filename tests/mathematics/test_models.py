"""Fixed-point models: closed forms, energies, bilevel learning as a DEQ with `C = A`, preconditioners."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    ANDERSON,
    BATCH,
    DENSE,
    HEIGHT,
    KINDS,
    OPERATORS,
    PIXELS,
    PLAIN,
    SHARPNESS,
    WIDTH,
    assert_converged,
    assert_differences,
    assert_same_gradients,
    make_field,
    make_problem,
    matrix_of,
    normal,
)
from scipy.optimize import minimize
from torch import Tensor
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional

from lib.implicit import implicit_fixed_point
from lib.kernels import difference_kernels
from lib.models import PRECONDITIONER_RIDGE, WEIGHT_PACE, FixedPointModel
from lib.operators import Identity
from lib.regularizer import GRADIENT_NORM, RELU, ConvFieldsOfExperts, DenseFieldsOfExperts, smoothed_sign
from lib.solvers import PlainIteration, Status, fixed_point

SEEDS = st.integers(0, 2**32 - 1)
SHAPE = torch.Size((1, HEIGHT, WIDTH))
EVERY_PROBLEM = pytest.mark.parametrize(("kind", "operator"), list(itertools.product(KINDS, OPERATORS)))
TIED = pytest.mark.parametrize("tied", [True, False], ids=["bilevel", "deq"])


@pytest.mark.parametrize("operator", OPERATORS)
@TIED
def test_linear_model_solves_linear_system(tied: bool, operator: str) -> None:
    """`(lambda K^T K + gamma C^T A) u = lambda K^T f - gamma C^T b`."""
    problem = make_problem("linear", operator, tied)
    model, f = problem.build()
    solution = fixed_point(model.problem(f), problem.start(f), ANDERSON)
    assert_converged(solution)
    K, (A, b), (lam, gamma) = (
        matrix_of(problem.operator),
        (problem.leaves[name] for name in ("A", "b")),
        (problem.numbers[name] for name in ("lam", "gamma")),
    )
    C = problem.leaves.get("C", A)
    right = lam * f.flatten(1) @ K - gamma * C.T @ b
    expected = torch.linalg.solve(lam * K.T @ K + gamma * C.T @ A, right.T).T.view_as(solution.value)
    torch.testing.assert_close(solution.value, expected, rtol=1e-8, atol=1e-8)


@EVERY_PROBLEM
@given(SEEDS, st.floats(0.01, 3), st.floats(0.1, 20), st.floats(0, 3))
@settings(max_examples=5)
def test_tied_step_is_gradient_descent_on_lower_level(
    kind: str, operator: str, seed: int, tau: float, lam: float, gamma: float
) -> None:
    """`T(u) = u - tau grad E(u)` for any weights, numbers and images."""
    problem = make_problem(kind, operator, tied=True)
    weights = {name: normal(*leaf.shape, seed=seed) for name, leaf in problem.leaves.items() if name != "f"}
    model = FixedPointModel(problem.operator, make_field(kind, weights), tau, lam, gamma)
    f, u = problem.leaves["f"], normal(BATCH, *SHAPE, seed=seed + 1).requires_grad_()
    energy = model.lower_level(u, f)
    assert energy.shape == (BATCH,)
    (gradient,) = torch.autograd.grad(energy.sum(), u)
    torch.testing.assert_close(model.step_map(f)(u), u - tau * gradient, rtol=1e-9, atol=1e-9)


@EVERY_PROBLEM
def test_tied_fixed_point_minimizes_lower_level(kind: str, operator: str) -> None:
    """The gradient vanishes, nearby points have more energy, and plain iteration descends."""
    problem = make_problem(kind, operator, tied=True)
    model, f = problem.build()
    f = f.detach()
    u = fixed_point(model.problem(f), problem.start(f), ANDERSON).value.requires_grad_()
    energy = model.lower_level(u, f)
    (gradient,) = torch.autograd.grad(energy.sum(), u)
    assert gradient.norm() < 1e-9
    with torch.no_grad():
        for seed in range(5):
            nearby = u + 1e-2 * normal(*u.shape, seed=seed)
            assert (model.lower_level(nearby, f) > energy).all()
        v, energies, T = problem.start(f), list[Tensor](), model.step_map(f)
        for _ in range(50):
            energies.append(model.lower_level(v, f))
            v = T(v)
    assert all((after <= before + 1e-11).all() for before, after in itertools.pairwise(energies))


@EVERY_PROBLEM
@pytest.mark.parametrize("solver", [PLAIN, ANDERSON], ids=["plain", "anderson"])
def test_deq_with_equal_weights_is_bilevel_model(kind: str, operator: str, solver: Any) -> None:
    """Iterates and fixed points agree for `C = A`, and the gradients of `A` and `C` add up."""
    tied, free = (make_problem(kind, operator, flag, same=True) for flag in (True, False))
    (one, f), (other, _) = tied.build(), free.build()
    u = v = tied.start(f)
    with torch.no_grad():
        for _ in range(20):
            u, v = one.step_map(f)(u), other.step_map(f)(v)
            torch.testing.assert_close(u, v, rtol=1e-12, atol=1e-14)
    expected, solution, adjoint = tied.implicit_gradients(solver)
    gradients, same, other_adjoint = free.implicit_gradients(solver)
    assert_converged(solution, adjoint, same, other_adjoint)
    torch.testing.assert_close(solution.value, same.value, rtol=0, atol=1e-9)
    assert all(gradients[name].norm() > 1e-6 for name in ("A", "C"))
    gradients["A"] = gradients["A"] + gradients.pop("C")
    assert_same_gradients(gradients, expected, rtol=1e-7)


@EVERY_PROBLEM
def test_bilevel_hypergradient_matches_implicit_function_theorem(kind: str, operator: str) -> None:
    """`dL/dtheta = -<d/dtheta grad_u E, H^-1 dL/du>`, with the Hessian `H` of the lower level `E` at `u*`."""
    problem = make_problem(kind, operator, tied=True)
    gradients, solution, adjoint = problem.implicit_gradients()
    assert_converged(solution, adjoint)
    model, f = problem.build()
    u = solution.value.detach().requires_grad_()
    H = hessian(lambda x: model.lower_level(x, f).sum(), u).view(u.numel(), u.numel())
    (dL_du,) = torch.autograd.grad(problem.loss(u), u)
    q = torch.linalg.solve(H, dL_du.flatten()).view_as(u)
    (optimality,) = torch.autograd.grad(model.lower_level(u, f).sum(), u, create_graph=True)
    assert_same_gradients(gradients, problem.gradients(model, f, -(optimality * q).sum()), rtol=1e-7)


def test_smoothed_tv_denoising_matches_scipy() -> None:
    """SciPy's L-BFGS minimizes the same energy, written in NumPy."""
    side, sharpness, lam, gamma = 8, 5.0, 4.0, 0.7
    truth = np.sign(np.arange(side)[:, None] - np.arange(side)[None] + 0.5)
    noisy = truth + 0.3 * np.random.default_rng(0).standard_normal((side, side))

    def energy(x: np.ndarray) -> tuple[float, np.ndarray]:
        u = x.reshape(side, side)
        padded = np.pad(u, ((0, 1), (0, 1)))
        right, down = padded[:-1, 1:] - u, padded[1:, :-1] - u
        logcosh = sum((np.logaddexp(sharpness * z, -sharpness * z) - np.log(2)).sum() for z in (right, down))
        p, q = np.tanh(sharpness * right), np.tanh(sharpness * down)
        gradient = lam * (u - noisy) - gamma * (p + q)
        gradient[:, 1:] += gamma * p[:, :-1]
        gradient[1:] += gamma * q[:-1]
        return lam / 2 * ((u - noisy) ** 2).sum() + gamma * logcosh / sharpness, gradient.ravel()

    options = {"maxiter": 10_000, "maxcor": 50, "ftol": 1e-16, "gtol": 1e-11}
    theirs = minimize(energy, noisy.ravel(), jac=True, method="L-BFGS-B", options=options)
    f = torch.from_numpy(noisy)[None, None]
    field = ConvFieldsOfExperts(difference_kernels(1, 2, 3).double(), None, smoothed_sign(sharpness))
    model = FixedPointModel(Identity(), field, 1 / (lam + gamma * sharpness * 8), lam, gamma)
    solution = fixed_point(model.problem(f), f, ANDERSON)
    assert_converged(solution)
    np.testing.assert_allclose(solution.value[0, 0].numpy().ravel(), theirs.x, rtol=0, atol=1e-6)
    assert model.lower_level(solution.value, f).item() == pytest.approx(theirs.fun, rel=1e-10)


@given(st.sampled_from(sorted(DENSE)), st.sampled_from(sorted(OPERATORS)), st.floats(0.01, 3), SEEDS)
def test_preconditioned_map_is_nonexpansive(kind: str, operator: str, tau: float, seed: int) -> None:
    """`P` is symmetric and positive, and `P (I - dT/du)` has eigenvalues in [0, 2), for every `tau`."""
    K = OPERATORS[operator]()
    leaves = {"A": normal(PIXELS, PIXELS, seed=seed), "b": normal(PIXELS, seed=seed + 1)}
    lam, gamma = (0.1 + 3 * normal(2, seed=seed + 2).abs()).tolist()
    model = FixedPointModel(K, make_field(kind, leaves), tau, lam, gamma)
    u = normal(1, *SHAPE, seed=seed + 3)
    P = model.preconditioner(SHAPE)
    torch.testing.assert_close(P, P.T, rtol=1e-8, atol=1e-11)
    J = jacobian(model.step_map(K.forward(u)), u).view(PIXELS, PIXELS)
    root = torch.linalg.cholesky(P)
    eigenvalues = torch.linalg.eigvalsh(root.T @ (torch.eye(PIXELS) - J) @ root)
    assert eigenvalues.min() >= -1e-8
    assert eigenvalues.max() < 2


@TIED
@pytest.mark.parametrize("operator", ["identity", "blur"])
def test_preconditioner_of_kernels_inverts_circulant(operator: str, tied: bool) -> None:
    """Compare with the circulant matrix for periodic images; a DEQ uses the modulus of `C^T A`."""
    problem = make_problem("kernels", operator, tied)
    model, _ = problem.build()
    units = torch.eye(PIXELS, dtype=torch.float64).view(PIXELS, *SHAPE)

    def circulant(kernels: Tensor) -> Tensor:
        padded = functional.pad(units, [1] * 4, mode="circular")
        return functional.conv2d(padded, kernels[:, None]).flatten(1).T

    A = problem.leaves["A"]
    product = circulant(problem.leaves.get("C", A)).T @ circulant(A)
    # The modulus of a normal matrix has its singular values and vectors.
    U, singular, _ = torch.linalg.svd(product)
    tau, lam, gamma = (problem.numbers[name] for name in ("tau", "lam", "gamma"))
    data = problem.operator.normal(units).flatten(1) + PRECONDITIONER_RIDGE * torch.eye(PIXELS)
    curvature = tau * (lam * data + gamma * SHARPNESS / 2 * U @ singular.diag() @ U.T)
    inverse = model.precondition(curvature.view(PIXELS, *SHAPE), model.preconditioner(SHAPE)).flatten(1)
    torch.testing.assert_close(inverse, torch.eye(PIXELS).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("kind", "operator"), list(itertools.product(DENSE, OPERATORS)))
def test_preconditioning_preserves_gradients(kind: str, operator: str) -> None:
    """Gradients also agree for a step with which plain iteration diverges."""
    problem = make_problem(kind, operator, tied=True)
    expected, solution, adjoint = problem.implicit_gradients(PLAIN)
    # The threshold of softshrink is the step: another step is another problem.
    tau = problem.numbers["tau"] if kind == "softshrink" else 2.1
    longer = replace(problem, numbers=problem.numbers | {"tau": tau})
    model, f = longer.build()
    gradients, *preconditioned = longer.implicit_gradients(PLAIN, P=model.preconditioner(SHAPE))
    assert_converged(solution, adjoint, *preconditioned)
    assert_same_gradients(gradients, expected, rtol=1e-7)
    if kind != "softshrink":
        assert fixed_point(model.step_map(f), longer.start(f), PLAIN).status.ne(Status.CONVERGED).all()


@TIED
@pytest.mark.parametrize("operator", ["identity", "blur"])
def test_preconditioning_of_kernels_saves_steps(operator: str, tied: bool) -> None:
    problem = make_problem("kernels", operator, tied)
    expected, *solutions = problem.implicit_gradients(first_adjoint=None)
    P = problem.build()[0].preconditioner(SHAPE)
    gradients, *preconditioned = problem.implicit_gradients(P=P, first_adjoint=None)
    assert_converged(*solutions, *preconditioned)
    assert_same_gradients(gradients, expected, rtol=1e-7)
    assert all(a.steps.max() < b.steps.max() for a, b in zip(preconditioned, solutions, strict=True))


def test_preconditioner_of_non_finite_weights_is_identity() -> None:
    """Other members are not affected; free weights and masks are rejected."""
    problem = make_problem("relu", "projections", tied=True)
    A, b = (problem.leaves[name] for name in ("A", "b"))
    stack = {"A": torch.stack([A, torch.full_like(A, torch.nan), 1e200 * A]), "b": b.expand(3, -1)}
    P = FixedPointModel(problem.operator, make_field("relu", stack), *torch.ones(3, 3)).preconditioner(SHAPE)
    identity = torch.eye(PIXELS, dtype=torch.float64)
    assert [torch.equal(member, identity) for member in P] == [False, True, True]
    for kind, operator, tied in (("relu", "identity", False), ("kernels", "mask", True)):
        with pytest.raises(ValueError, match="A preconditioner requires tied"):
            make_problem(kind, operator, tied).build()[0].preconditioner(SHAPE)


@given(st.sampled_from(sorted(OPERATORS)), st.booleans(), st.floats(0.5, 50.0), SEEDS)
@settings(max_examples=10)
def test_hypergradient_with_learned_weight_matches_differences(
    operator: str, tied: bool, lam: float, seed: int
) -> None:
    """Derivatives of `A`, `C` and `lambda` through the normalization; the step follows the weight."""
    A, other = normal(2, 3, 3, 3, seed=seed)
    kernels = {"A": A} if tied else {"A": A, "C": A + 0.3 * other}
    K, truth = OPERATORS[operator](), normal(BATCH, *SHAPE, seed=seed + 1)
    data = K.forward(truth)
    f = data + 0.1 * normal(*data.shape, seed=seed + 2)

    def build(kernels: dict[str, Tensor], lam: Tensor) -> FixedPointModel:
        stack = lam.shape
        start = normal(1, 1, HEIGHT, WIDTH, seed=seed + 3).expand(*stack, 1, 1, HEIGHT, WIDTH)
        field = ConvFieldsOfExperts(kernels["A"], kernels.get("C"), smoothed_sign(SHARPNESS), start, True)
        return FixedPointModel(K, field, torch.ones(stack), lam, torch.ones(stack), learn_weight=True)

    model = build(kernels, torch.tensor(lam, dtype=torch.float64))
    step = 1 / (lam + SHARPNESS * GRADIENT_NORM**2)
    assert model.tau.item() == pytest.approx(step, rel=1e-6)
    solver = replace(ANDERSON, tol=1e-13, max_steps=5000, memory=10, regularization=1e-8)
    solution = implicit_fixed_point(model.problem(f), K.adjoint(f), solver)
    (solution.value - truth).square().mean().backward()
    parameters = dict(model.named_parameters())
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert len(gradients) == len(kernels) + 1

    def losses(points: dict[str, Tensor]) -> Tensor:
        moved = {name: points[f"regularizer.{name}"] for name in kernels}
        models = build(moved, torch.exp(WEIGHT_PACE * points["weight"]))
        stacked = f.expand(len(points["weight"]), *f.shape)
        value = fixed_point(models.problem(stacked), K.adjoint(stacked), solver).value
        return (value - truth).square().mean((-4, -3, -2, -1))

    assert_differences(gradients, {name: p.detach() for name, p in parameters.items()}, losses, 1e-3)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5))
def test_data_of_wrong_size_are_rejected(shape: list[int]) -> None:
    """Dense weights accept 5x5 pixels, kernels all images of one channel."""
    A, k, f = normal(25, 25), normal(2, 3, 3), normal(*shape)
    dense, conv = DenseFieldsOfExperts(A, A[0], A, RELU), ConvFieldsOfExperts(k, k, smoothed_sign(1.0))
    fits = (len(shape) == 4 and torch.Size(shape[1:]).numel() == 25, len(shape) == 4 and shape[1] == 1)
    for field, fit in zip((dense, conv), fits, strict=True):
        model = FixedPointModel(Identity(), field, 0.5, 2.0, 0.8)
        if fit:
            assert fixed_point(model.problem(f), f, PlainIteration(max_steps=1)).value.shape == f.shape
        else:
            with pytest.raises(ValueError, match=r"^Images must have shape \(N, C, H, W\) with .*, got "):
                model.problem(f)
