"""The two models: closed forms, gradient descent, and bilevel learning as the DEQ with `C = A`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

from lib.implicit import implicit_fixed_point
from lib.models import MODELS, PRECONDITIONER_RIDGE, FixedPointModel, build_conv_model, build_model
from lib.operators import TASKS, Identity, Operator, forward_operator
from lib.regularizer import ACTIVATIONS, smoothed_sign
from lib.solvers import Anderson, PlainIteration, Solution, Status, fixed_point

pytestmark = pytest.mark.usefixtures("one_thread")

HEIGHT, WIDTH, BATCH = 6, 7, 2
PIXELS = HEIGHT * WIDTH
NUMBERS = {"tau": 0.5, "lam": 2.0, "gamma": 0.8}
SOLVER = Anderson(tol=1e-12, max_steps=2000)
PLAIN = PlainIteration(tol=1e-12, max_steps=5000)
EVERY_TASK_AND_ACTIVATION = pytest.mark.parametrize(
    ("task", "activation"), list(itertools.product(TASKS, ACTIVATIONS))
)

Weights = tuple[Tensor, Tensor, Tensor]


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def weights(near_orthogonal: Callable[[int], Weights]) -> Weights:
    return near_orthogonal(PIXELS)


@pytest.fixture
def f() -> Tensor:
    return normal((BATCH, 1, HEIGHT, WIDTH), 2)


def dense(operator: Operator) -> Tensor:
    """The matrix of an operator, column by column the images of the unit vectors."""
    units = torch.eye(PIXELS, dtype=torch.float64).view(PIXELS, 1, HEIGHT, WIDTH)
    return torch.stack([operator.forward(unit).flatten() for unit in units], dim=1)


def reconstruct(model: FixedPointModel, f: Tensor) -> Tensor:
    solution = fixed_point(model.step_map(f), torch.zeros_like(f), SOLVER)
    assert solution.status.eq(Status.CONVERGED).all()
    return solution.value


def random_bilevel_model(
    task: str, activation: str, tau: float, lam: float, gamma: float, seed: int
) -> FixedPointModel:
    A, C = normal((2, PIXELS, PIXELS), seed)
    weights = (A, normal((PIXELS,), seed + 1), C)
    operator = forward_operator(task, HEIGHT, WIDTH)
    return build_model("bilevel", operator, weights, activation, tau=tau, lam=lam, gamma=gamma)


SEEDS = st.integers(0, 2**32 - 1)
ANY_BILEVEL_MODEL = given(
    model=st.builds(
        random_bilevel_model,
        st.sampled_from(TASKS),
        st.sampled_from(sorted(ACTIVATIONS)),
        st.floats(0.01, 3),
        st.floats(0.1, 20),
        st.floats(0, 3),
        SEEDS,
    ),
    seed=SEEDS,
)
"""Gives a test a model of any task, activation and numbers, and a seed for its images."""


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", MODELS)
def test_linear_model_solves_its_linear_system(name: str, task: str, weights: Weights, f: Tensor) -> None:
    """With the identity as `sigma`, `(lambda K^T K + gamma C^T A) u = lambda K^T f - gamma C^T b`."""
    operator = forward_operator(task, HEIGHT, WIDTH)
    u = reconstruct(build_model(name, operator, weights, "identity", **NUMBERS), f)
    K, (A, b, C) = dense(operator), weights
    if name == "bilevel":
        C = A
    lam, gamma = NUMBERS["lam"], NUMBERS["gamma"]
    matrix = lam * K.T @ K + gamma * C.T @ A
    right = lam * f.flatten(1) @ K - gamma * C.T @ b
    expected = torch.linalg.solve(matrix, right.T).T.view_as(f)
    torch.testing.assert_close(u, expected, rtol=1e-9, atol=1e-9)


@ANY_BILEVEL_MODEL
def test_bilevel_step_is_gradient_descent_on_the_lower_level(model: FixedPointModel, seed: int) -> None:
    """`T(u) = u - tau grad E(u)` for any weights, numbers and images."""
    u, f = normal((2, BATCH, 1, HEIGHT, WIDTH), seed)
    u.requires_grad_()
    energy = model.lower_level(u, f)
    assert energy.shape == (BATCH,)
    (gradient,) = torch.autograd.grad(energy.sum(), u)
    torch.testing.assert_close(model.step_map(f)(u), u - model.tau * gradient, rtol=1e-11, atol=1e-10)


@EVERY_TASK_AND_ACTIVATION
def test_fixed_point_of_the_bilevel_model_is_a_minimiser(
    task: str, activation: str, weights: Weights, f: Tensor
) -> None:
    """The lower level is convex: at `u*` its gradient vanishes and no other image has a lower energy."""
    model = build_model("bilevel", forward_operator(task, HEIGHT, WIDTH), weights, activation, **NUMBERS)
    u = reconstruct(model, f).requires_grad_()
    energy = model.lower_level(u, f)
    (gradient,) = torch.autograd.grad(energy.sum(), u)
    assert gradient.norm() <= 1e-9 * u.norm()
    for seed in range(20):
        other = u + 0.1 * normal(tuple(u.shape), seed)
        assert model.lower_level(other, f).gt(energy).all()


@EVERY_TASK_AND_ACTIVATION
def test_deq_with_tied_weights_is_the_bilevel_model(
    task: str, activation: str, weights: Weights, f: Tensor
) -> None:
    """With `C = A`: the same iterates, the same fixed point, and gradients whose `A` and `C` parts add up."""
    A, b, _ = weights
    truth = normal(tuple(f.shape), 3)
    operator = forward_operator(task, HEIGHT, WIDTH)
    values, gradients = [], []
    iterates: list[list[Tensor]] = []
    for name in ("bilevel", "deq"):
        model = build_model(name, operator, (A, b, A.clone()), activation, **NUMBERS)
        T, u = model.step_map(f), torch.zeros_like(f)
        iterates.append([u := T(u).detach() for _ in range(50)])
        adjoints: list[Solution] = []
        solution = implicit_fixed_point(T, torch.zeros_like(f), SOLVER, on_adjoint=adjoints.append)
        parameters = dict(model.regularizer.named_parameters())
        loss = (solution.value - truth).square().mean()
        derivatives = torch.autograd.grad(loss, list(parameters.values()))
        for solved in (solution, *adjoints):
            assert solved.status.eq(Status.CONVERGED).all()
        values.append(solution.value.detach())
        gradients.append(dict(zip(parameters, derivatives, strict=True)))
    for of_bilevel, of_deq in zip(*iterates, strict=True):
        torch.testing.assert_close(of_deq, of_bilevel, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(values[1], values[0], rtol=1e-10, atol=1e-10)
    bilevel, deq = gradients
    assert bilevel.keys() == {"A", "b"}
    assert deq.keys() == {"A", "b", "C"}
    torch.testing.assert_close(deq["A"] + deq["C"], bilevel["A"], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(deq["b"], bilevel["b"], rtol=1e-8, atol=1e-10)
    assert bilevel["A"].norm() > 1e-3


@EVERY_TASK_AND_ACTIVATION
def test_deq_with_free_weights_is_another_model(
    task: str, activation: str, weights: Weights, f: Tensor
) -> None:
    """With `C` apart from `A` the two fixed points differ, and the DEQ's minimises no energy of `A, b`."""
    operator = forward_operator(task, HEIGHT, WIDTH)
    bilevel, deq = (build_model(name, operator, weights, activation, **NUMBERS) for name in MODELS)
    u = reconstruct(deq, f).requires_grad_()
    assert (u - reconstruct(bilevel, f)).norm() > 1e-3
    (gradient,) = torch.autograd.grad(deq.lower_level(u, f).sum(), u)
    assert gradient.norm() > 1e-3


@EVERY_TASK_AND_ACTIVATION
def test_bilevel_hypergradient_is_the_implicit_function_theorem(
    task: str, activation: str, weights: Weights, f: Tensor
) -> None:
    """`dL/dtheta = -<d/dtheta grad_u E, H^-1 dL/du>` with `H` the Hessian of the lower level `E` at `u*`."""
    operator = forward_operator(task, HEIGHT, WIDTH)
    model = build_model("bilevel", operator, weights, activation, **NUMBERS)
    truth = normal(tuple(f.shape), 3)
    f.requires_grad_()
    leaves = [*model.parameters(), f]
    solution = implicit_fixed_point(model.step_map(f), torch.zeros_like(f), SOLVER)
    assert solution.status.eq(Status.CONVERGED).all()
    hypergradients = torch.autograd.grad((solution.value - truth).square().mean(), leaves)

    u = solution.value.detach().requires_grad_()
    H = hessian(lambda x: model.lower_level(x, f).sum(), u).view(u.numel(), u.numel())
    (dL_du,) = torch.autograd.grad((u - truth).square().mean(), u)
    q = torch.linalg.solve(H, dL_du.flatten()).view_as(u)
    (optimality,) = torch.autograd.grad(model.lower_level(u, f).sum(), u, create_graph=True)
    expected = torch.autograd.grad(-(optimality * q).sum(), leaves)
    for ours, theorem in zip(hypergradients, expected, strict=True):
        assert theorem.norm() > 1e-3
        torch.testing.assert_close(ours, theorem, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("name", MODELS)
def test_tau_moves_only_the_fixed_point_of_softshrink(
    name: str, activation: str, weights: Weights, f: Tensor
) -> None:
    """For ReLU and identity `tau` is a step size and nothing else; for softshrink it is the threshold too."""
    operator = forward_operator("deblurring", HEIGHT, WIDTH)
    small, large = (
        reconstruct(build_model(name, operator, weights, activation, **NUMBERS | {"tau": tau}), f)
        for tau in (0.2, 0.6)
    )
    moved = (small - large).norm() / small.norm()
    assert moved > 1e-2 if activation == "softshrink" else moved < 1e-8


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("name", MODELS)
def test_a_stack_of_models_is_its_members(name: str, activation: str, weights: Weights, f: Tensor) -> None:
    """Steps and energies of models with their own weights, data, `tau`, `lambda` and `gamma`."""
    operator = forward_operator("inpainting", HEIGHT, WIDTH)
    A, b, C = (torch.stack([w, 2 * w, w + 1]) for w in weights)
    data = torch.stack([f, -f, 3 * f])
    u = normal(tuple(data.shape), 4)
    numbers = {
        "tau": torch.tensor([0.1, 0.5, 2.1]),
        "lam": torch.tensor([1.0, 2.0, 18.156]),
        "gamma": torch.tensor([0.1, 0.5, 1.0]),
    }
    stack = build_model(name, operator, (A, b, C), activation, **numbers)
    step, energy = stack.step_map(data)(u), stack.lower_level(u, data)
    assert energy.shape == (3, BATCH)
    for i in range(3):
        own = {key: value[i] for key, value in numbers.items()}
        member = build_model(name, operator, (A[i], b[i], C[i]), activation, **own)
        torch.testing.assert_close(step[i], member.step_map(data[i])(u[i]), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(energy[i], member.lower_level(u[i], data[i]), rtol=1e-11, atol=1e-11)


def test_unknown_model_is_refused_by_name(weights: Weights) -> None:
    """The refusal is one line that names the model and those that exist."""
    operator = forward_operator("denoising", HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="'unet'") as refusal:
        build_model("unet", operator, weights, "relu", **NUMBERS)
    message = str(refusal.value)
    assert "\n" not in message
    assert all(name in message for name in MODELS)


@ANY_BILEVEL_MODEL
def test_the_preconditioned_map_expands_nothing(model: FixedPointModel, seed: int) -> None:
    """`P` is symmetric and positive, and the eigenvalues of `P (I - dT/du)` are in [0, 2), for any `tau`."""
    u, f = normal((2, 1, 1, HEIGHT, WIDTH), seed)
    P = model.preconditioner(u.shape[1:])
    assert P.shape == (PIXELS, PIXELS)
    torch.testing.assert_close(P, P.T, rtol=1e-9, atol=1e-12)
    J = jacobian(model.step_map(f), u).view(PIXELS, PIXELS)
    root = torch.linalg.cholesky(P)
    eigenvalues = torch.linalg.eigvalsh(root.T @ (torch.eye(PIXELS) - J) @ root)
    assert eigenvalues.min() >= -1e-9
    assert eigenvalues.max() < 2


def test_the_preconditioner_is_the_inverse_of_the_mean_curvature(weights: Weights) -> None:
    """With `sigma` of slope one its experts count half; each member of a stack has its own."""
    operator = forward_operator("deblurring", HEIGHT, WIDTH)
    tau, lam, gamma = normal((3, 2), 7).abs() + 0.1
    A, b, C = (weight.expand(2, *weight.shape) for weight in weights)
    model = build_model("bilevel", operator, (A, b, C), "identity", tau=tau, lam=lam, gamma=gamma)
    P = model.preconditioner(torch.Size((1, HEIGHT, WIDTH)))
    K = dense(operator)
    for i in range(2):
        data = K.T @ K + PRECONDITIONER_RIDGE * torch.eye(PIXELS)
        curvature = tau[i] * (lam[i] * data + gamma[i] * weights[0].T @ weights[0] / 2)
        torch.testing.assert_close(P[i] @ curvature, torch.eye(PIXELS, dtype=P.dtype), rtol=0, atol=1e-9)


@EVERY_TASK_AND_ACTIVATION
def test_a_preconditioned_solve_has_the_same_fixed_point(
    task: str, activation: str, weights: Weights, f: Tensor
) -> None:
    """By plain iteration too, and for a step with which that diverges but for the preconditioner."""
    operator = forward_operator(task, HEIGHT, WIDTH)
    model = build_model("bilevel", operator, weights, activation, **NUMBERS)
    long = build_model("bilevel", operator, weights, activation, **NUMBERS | {"tau": 2.1})
    # The threshold of softshrink is the step, and another threshold another problem.
    for built in (model,) if activation == "softshrink" else (model, long):
        P = built.preconditioner(f.shape[-3:])
        T = built.step_map(f)
        for solver in (SOLVER, PLAIN):
            solution = fixed_point(built.problem(f, P), torch.zeros_like(f), solver)
            assert solution.status.eq(Status.CONVERGED).all()
            u = solution.value
            residual = (T(u) - u).flatten(1).norm(dim=1) / T(u).flatten(1).norm(dim=1)
            assert residual.le(1e-11).all()
            torch.testing.assert_close(u, reconstruct(model, f), rtol=1e-8, atol=1e-8)
    assert not fixed_point(long.step_map(f), torch.zeros_like(f), PLAIN).status.eq(Status.CONVERGED).any()


def test_weights_without_a_usable_preconditioner_have_the_identity(weights: Weights) -> None:
    """A member whose weights are not finite, or overflow, disturbs no other; free weights are refused."""
    A = torch.stack([weights[0], torch.full_like(weights[0], torch.nan), 1e200 * weights[0]])
    b, C = (weight.expand(3, *weight.shape) for weight in weights[1:])
    operator, numbers = forward_operator("inpainting", HEIGHT, WIDTH), {n: torch.ones(3) for n in NUMBERS}
    shape = torch.Size((1, HEIGHT, WIDTH))
    P = build_model("bilevel", operator, (A, b, C), "relu", **numbers).preconditioner(shape)
    assert not torch.equal(P[0], torch.eye(PIXELS, dtype=P.dtype))
    assert all(torch.equal(P[i], torch.eye(PIXELS, dtype=P.dtype)) for i in (1, 2))
    free = build_model("deq", operator, weights, "relu", **NUMBERS)
    with pytest.raises(ValueError, match="preconditioner: allowed for tied"):
        free.preconditioner(shape)


@given(st.sampled_from(TASKS), st.lists(st.integers(1, 5), min_size=2, max_size=5))
def test_data_of_another_size_are_refused(task: str, shape: list[int]) -> None:
    """In one line, by dense weights of 5x5, by kernels and by masks; all that fits is solved."""
    A, k = normal((25, 25), 0), normal((2, 3, 3), 0)
    matrices = build_model("deq", Identity(), (A, A[0], A), "relu", **NUMBERS)
    kernels = build_conv_model("deq", Identity(), (k, k), smoothed_sign(1.0), **NUMBERS)
    f = normal(tuple(shape), 1)
    for model, fits in (
        (matrices, len(shape) == 4 and math.prod(shape[1:]) == 25),
        (kernels, len(shape) == 4 and shape[1] == 1),
    ):
        if fits:
            assert model.step_map(f)(f).shape == f.shape
        else:
            with pytest.raises(ValueError, match=r"^images: got .*, allowed: \(N, C, H, W\) with "):
                model.problem(f)
    mask = forward_operator("inpainting", 5, 5)
    if shape[-2:] != [5, 5]:
        with pytest.raises(ValueError, match=r"^images: got .* pixels, allowed: the mask's 5x5$"):
            mask.forward(f)
