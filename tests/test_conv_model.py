"""Convolutional models: energies and fields, exact products, hypergradients, normalized kernels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.nn import functional

from lib import regularizer
from lib.implicit import implicit_fixed_point
from lib.kernels import difference_kernels
from lib.models import (
    MODELS,
    PRECONDITIONER_RIDGE,
    WEIGHT_PACE,
    FixedPointModel,
    build_conv_model,
    build_model,
)
from lib.operators import TASKS, CircularBlur, Identity, Mask, Operator, forward_operator
from lib.regularizer import (
    ACTIVATIONS,
    GRADIENT_NORM,
    ConvFieldsOfExperts,
    DenseFieldsOfExperts,
    FieldsOfExperts,
    smoothed_sign,
)
from lib.solvers import (
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
STACKS = st.lists(st.integers(1, 3), max_size=2).map(tuple)
HEIGHT, WIDTH, BATCH, FILTERS = 8, 7, 2, 2
SHARPNESS, LAM, GAMMA = 5.0, 4.0, 1.0
TAU = 1 / (LAM + SHARPNESS * 2.73**2)
ANDERSON, PLAIN = Anderson(tol=1e-12, max_steps=3000), PlainIteration(tol=1e-12, max_steps=3000)
EVERY_TASK = pytest.mark.parametrize(
    ("task", "side"), [("denoising", 3), ("denoising", 11), ("inpainting", 11), ("deblurring", 3)]
)
EVERY_MODEL = pytest.mark.parametrize("model", MODELS)

Gradients = dict[str, Tensor]


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image_norm(kernels: Tensor, height: int, width: int) -> Tensor:
    """Norm of the dense operator on images of this size, of one set of kernels `(F, k, k)`."""
    basis = torch.eye(height * width, dtype=kernels.dtype).view(-1, 1, height, width)
    dense = functional.conv2d(basis, kernels[:, None], padding=kernels.shape[-1] // 2)
    return torch.linalg.svdvals(dense.flatten(1))[0]


def draw_conv_field(
    stack: tuple[int, ...], side: int, tied: bool, seed: int
) -> tuple[ConvFieldsOfExperts, Tensor, Tensor, Tensor]:
    """A random field, kernels as they are, with its images, weight `gamma` and step size `tau`."""
    A, C = normal((2, *stack, FILTERS, side, side), seed) / side
    gamma, tau = normal((2, *stack), seed + 1).abs() + 0.1
    u = normal((*stack, BATCH, 1, HEIGHT, WIDTH), seed + 2)
    return ConvFieldsOfExperts(A, None if tied else C, smoothed_sign(SHARPNESS)), u, gamma, tau


@dataclass(frozen=True)
class Problem:
    """A small training problem whose step map contracts.

    Attributes:
        model, task: which model and operator.
        leaves: kernels `A`, for a DEQ `C`, and the data `f`; all may have a leading stack dimension.
        truth: the images to compare with.
    """

    model: str
    task: str
    leaves: dict[str, Tensor]
    truth: Tensor

    def build(self, leaves: dict[str, Tensor] | None = None) -> tuple[FixedPointModel, Tensor]:
        leaves = self.leaves if leaves is None else leaves
        operator = forward_operator(self.task, HEIGHT, WIDTH, faces=True, blur=3)
        kernels = (leaves["A"].clone(), leaves.get("C", leaves["A"]).clone())
        numbers = {"tau": TAU, "lam": LAM, "gamma": GAMMA}
        built = build_conv_model(self.model, operator, kernels, smoothed_sign(SHARPNESS), **numbers)
        return built, leaves["f"].clone().requires_grad_()

    def loss(self, u: Tensor) -> Tensor:
        return (u - self.truth).square().mean((-4, -3, -2, -1))

    def gradients(self, model: FixedPointModel, f: Tensor, loss: Tensor) -> Gradients:
        leaves = dict(model.regularizer.named_parameters()) | {"f": f}
        assert leaves.keys() == self.leaves.keys()
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    def implicit_gradients(self, solver: Solver = ANDERSON, exact_vjp: bool = True) -> Gradients:
        model, f = self.build()
        adjoints: list[Solution] = []
        T = FixedPointProblem(model.step_map(f), model.vjp if exact_vjp else None)
        solution = implicit_fixed_point(T, f.detach(), solver, on_adjoint=adjoints.append)
        gradients = self.gradients(model, f, self.loss(solution.value))
        assert len(adjoints) == 1
        for solve in (solution, *adjoints):
            assert solve.status.eq(Status.CONVERGED).all()
        return gradients


def make_problem(model: str, task: str, side: int, same: bool = False) -> Problem:
    """Noisy data and kernels of norm 2.73 on the images; `C` is near `A`, or the `same`."""
    A = normal((FILTERS, side, side), 0)
    A *= GRADIENT_NORM / image_norm(A, HEIGHT, WIDTH)
    C = A + 0.1 * A.std() * normal(A.shape, 1)
    C = A if same else C * GRADIENT_NORM / image_norm(C, HEIGHT, WIDTH)
    truth = 0.3 * normal((BATCH, 1, HEIGHT, WIDTH), 2)
    K = forward_operator(task, HEIGHT, WIDTH, faces=True, blur=3)
    leaves = {"A": A, "C": C, "f": K.forward(truth) + 0.1 * normal(truth.shape, 3)}
    if model == "bilevel":
        del leaves["C"]
    return Problem(model, task, leaves, truth)


def assert_same_gradients(actual: Gradients, expected: Gradients, rtol: float) -> None:
    """Every gradient is right in norm, up to `rtol`, and none is zero."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-6, name
        assert (actual[name] - gradient).norm() <= rtol * gradient.norm(), name


@given(st.floats(0.1, 200), SEEDS)
def test_smoothed_sign_is_a_hyperbolic_tangent(sharpness: float, seed: int) -> None:
    """`sigma = tanh(s z) = phi'` and `slope = sigma'`; `phi` is zero at zero and even."""
    activation, tau = smoothed_sign(sharpness), torch.tensor(0.5)
    z = torch.cat([normal((50,), seed), normal((50,), seed) / sharpness, torch.zeros(1)]).requires_grad_()
    sigma, potential = activation.sigma(z, tau), activation.potential(z, tau)
    torch.testing.assert_close(sigma, torch.tanh(sharpness * z), rtol=1e-12, atol=1e-14)
    # Where the modulus has its kink autograd's derivative of it is zero, and so is sigma.
    (derivative,) = torch.autograd.grad(potential.sum(), z)
    torch.testing.assert_close(sigma, derivative, rtol=1e-12, atol=1e-12)
    (derivative,) = torch.autograd.grad(sigma.sum(), z)
    slope = activation.slope(z, tau)
    torch.testing.assert_close(slope, derivative, rtol=1e-9, atol=1e-12 * sharpness)
    torch.testing.assert_close(potential, activation.potential(-z, tau), rtol=0, atol=0)
    assert potential[-1].abs() < 1e-15
    assert slope[-1].item() == pytest.approx(sharpness)
    near = z.detach() * (sharpness * z.detach()).abs().le(10)
    exact = torch.log(torch.cosh(sharpness * near)) / sharpness
    torch.testing.assert_close(activation.potential(near, tau), exact, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smoothed_sign_does_not_overflow(dtype: torch.dtype) -> None:
    """At numbers however large it is the sign, and its potential the modulus, but for `log 2 / s`."""
    activation, tau = smoothed_sign(100.0), torch.tensor(0.5)
    z = torch.tensor([1.0, 10.0, 1e4, 1e30], dtype=dtype)
    z = torch.cat([z, -z]).requires_grad_()
    sigma, potential = activation.sigma(z, tau), activation.potential(z, tau)
    assert sigma.dtype == potential.dtype == dtype
    torch.testing.assert_close(sigma, z.sign(), rtol=1e-6, atol=0)
    torch.testing.assert_close(potential, z.abs() - math.log(2) / 100, rtol=1e-6, atol=0)
    (derivative,) = torch.autograd.grad(potential.sum(), z)
    torch.testing.assert_close(derivative, z.sign(), rtol=1e-6, atol=0)
    assert activation.slope(z, tau).abs().max() < 1e-4


def test_smoothed_sign_tends_to_the_sign_and_does_not_know_the_step() -> None:
    """The sharper, the nearer the modulus; `tau` is no threshold of it."""
    z = torch.linspace(-1, 1, 101, dtype=torch.float64)
    gaps = [
        (smoothed_sign(s).potential(z, torch.tensor(0.5)) - z.abs()).abs().max().item() for s in (1, 10, 100)
    ]
    assert gaps[1:] == pytest.approx([math.log(2) / 10, math.log(2) / 100])
    assert gaps[0] > gaps[1] > gaps[2]
    activation = smoothed_sign(3.0)
    for part in (activation.sigma, activation.slope, activation.potential):
        assert torch.equal(part(z, torch.tensor(0.1)), part(z, torch.tensor(0.9)))


@pytest.mark.parametrize("side", [3, 11])
@given(STACKS, SEEDS)
def test_tied_field_is_the_gradient_of_the_energy(side: int, stack: tuple[int, ...], seed: int) -> None:
    """With `C = A` the field is `grad R`, for every member of a stack."""
    regularizer, u, gamma, tau = draw_conv_field(stack, side, True, seed)
    u.requires_grad_()
    energy = regularizer.energy(u, gamma, tau)
    assert energy.shape == (*stack, BATCH)
    (gradient,) = torch.autograd.grad(energy.sum(), u)
    torch.testing.assert_close(regularizer.field(u, gamma, tau), gradient, rtol=1e-11, atol=1e-11)


@given(st.sampled_from([3, 5, 11]), st.booleans(), SEEDS)
def test_field_and_energy_are_the_formulas(side: int, tied: bool, seed: int) -> None:
    """`gamma C^T tanh(s A u)` and `gamma sum log cosh(s A u) / s` by torch's convolutions."""
    regularizer, u, gamma, tau = draw_conv_field((), side, tied, seed)
    A = regularizer.A[:, None]
    C = A if regularizer.C is None else regularizer.C[:, None]
    z = functional.conv2d(u, A, padding=side // 2)
    field = gamma * functional.conv_transpose2d(torch.tanh(SHARPNESS * z), C, padding=side // 2)
    torch.testing.assert_close(regularizer.field(u, gamma, tau), field, rtol=1e-11, atol=1e-11)
    x = SHARPNESS * z.abs()
    potential = (x + functional.softplus(-2 * x) - math.log(2)) / SHARPNESS
    energy = gamma * potential.sum((1, 2, 3))
    torch.testing.assert_close(regularizer.energy(u, gamma, tau), energy, rtol=1e-11, atol=1e-11)


@given(st.booleans(), SEEDS)
def test_only_the_tied_field_has_a_symmetric_jacobian(tied: bool, seed: int) -> None:
    """With a free `C` the field is no gradient."""
    regularizer, u, gamma, tau = draw_conv_field((), 3, tied, seed)
    J = jacobian(lambda x: regularizer.field(x, gamma, tau), u[:1]).view(HEIGHT * WIDTH, -1)
    asymmetry = (J - J.T).norm() / J.norm()
    assert asymmetry < 1e-12 if tied else asymmetry > 0.1


@given(STACKS, st.booleans(), SEEDS)
def test_a_stack_is_its_members_one_at_a_time(stack: tuple[int, ...], tied: bool, seed: int) -> None:
    """Field, energy and products with the Jacobian of a stack hold those of every member."""
    regularizer, u, gamma, tau = draw_conv_field(stack, 5, tied, seed)
    w = normal(tuple(u.shape), seed + 3)
    field, energy = regularizer.field(u, gamma, tau), regularizer.energy(u, gamma, tau)
    product = regularizer.vjp(u, gamma, tau)(w)
    for i in itertools.product(*map(range, stack)):
        C = None if regularizer.C is None else regularizer.C[i]
        member = ConvFieldsOfExperts(regularizer.A[i], C, regularizer.activation)
        numbers = (u[i], gamma[i], tau[i])
        torch.testing.assert_close(field[i], member.field(*numbers), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(energy[i], member.energy(*numbers), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(product[i], member.vjp(*numbers)(w[i]), rtol=1e-12, atol=1e-12)


@given(st.sampled_from([(), (2,)]), st.booleans(), SEEDS)
def test_how_many_images_fit_the_cache_changes_nothing(stack: tuple[int, ...], tied: bool, seed: int) -> None:
    """The field, its transposed Jacobian and its gradients, image by image, are those of all at once."""

    def results(cached: int) -> list[Tensor]:
        field, u, gamma, tau = draw_conv_field(stack, 3, tied, seed)
        u.requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(regularizer, "CACHED", cached)
            value = field.field(u, gamma, tau)
            gradients = torch.autograd.grad(value.square().sum(), [u, *field.parameters()])
            return [value.detach(), *gradients, field.vjp(u.detach(), gamma, tau)(u.detach())]

    for alone, together in zip(results(1), results(2**30), strict=True):
        torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)


def dense_field(activation: str, stack: tuple[int, ...], tied: bool, seed: int) -> FieldsOfExperts:
    A, C = normal((2, *stack, 9, HEIGHT * WIDTH), seed) / WIDTH
    return DenseFieldsOfExperts(A, normal((*stack, 9), seed + 4), None if tied else C, activation)


@pytest.mark.parametrize("kind", [*ACTIVATIONS, "conv 3", "conv 11", "normalized"])
@given(STACKS, st.booleans(), SEEDS)
@settings(max_examples=12)
def test_products_with_the_jacobian_are_autograds(
    kind: str, stack: tuple[int, ...], tied: bool, seed: int
) -> None:
    """`J^T w` of dense and convolutional fields, tied or free, in any stack."""
    conv, u, gamma, tau = draw_conv_field(stack, 11 if kind == "conv 11" else 3, tied, seed)
    regularizer: FieldsOfExperts = conv
    if kind == "normalized":
        start = normal((*stack, 1, 1, HEIGHT, WIDTH), seed + 5)
        C = None if conv.C is None else 3 * conv.C.detach()
        regularizer = ConvFieldsOfExperts(conv.A.detach(), C, conv.activation, start)
    elif kind in ACTIVATIONS:
        regularizer = dense_field(kind, stack, tied, seed)
    w = normal(tuple(u.shape), seed + 6)
    u.requires_grad_()
    (expected,) = torch.autograd.grad(regularizer.field(u, gamma, tau), u, w)
    product = regularizer.vjp(u, gamma, tau)(w)
    torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-10)


@EVERY_MODEL
@EVERY_TASK
def test_products_with_the_step_maps_jacobian_are_autograds(model: str, task: str, side: int) -> None:
    """`w -> (dT/du)^T w` of whole models, which the adjoint equation is solved with."""
    built, f = make_problem(model, task, side).build()
    u, w = normal(tuple(f.shape), 5).requires_grad_(), normal(tuple(f.shape), 6)
    (expected,) = torch.autograd.grad(built.step_map(f)(u), u, w)
    torch.testing.assert_close(built.vjp(u)(w), expected, rtol=1e-11, atol=1e-12)


@EVERY_MODEL
@pytest.mark.parametrize("task", TASKS)
def test_products_with_the_dense_step_maps_jacobian_are_autograds(model: str, task: str) -> None:
    """The same for the dense models."""
    n = HEIGHT * WIDTH
    A, C = normal((2, n, n), 0) / n**0.5
    operator = forward_operator(task, HEIGHT, WIDTH)
    weights = (A, normal((n,), 1), C)
    built = build_model(model, operator, weights, "softshrink", tau=0.3, lam=0.9, gamma=0.7)
    f = normal((BATCH, 1, HEIGHT, WIDTH), 2)
    u, w = normal(tuple(f.shape), 5).requires_grad_(), normal(tuple(f.shape), 6)
    (expected,) = torch.autograd.grad(built.step_map(f)(u), u, w)
    torch.testing.assert_close(built.vjp(u)(w), expected, rtol=1e-11, atol=1e-12)


@EVERY_TASK
def test_with_equal_kernels_the_deq_is_the_bilevel_model(task: str, side: int) -> None:
    """Equal iterates, fixed points and hypergradients: the DEQ's for `A` and `C` add up to the tied one."""
    tied, free = (make_problem(model, task, side, same=True) for model in MODELS)
    assert torch.equal(free.leaves["A"], free.leaves["C"])
    (one, f), (other, _) = tied.build(), free.build()
    u = v = f.detach()
    for _ in range(20):
        u, v = one.step_map(f)(u).detach(), other.step_map(f)(v).detach()
        assert torch.equal(u, v)
    for solver in (PLAIN, ANDERSON):
        solutions = [fixed_point(m.step_map(f.detach()), f.detach(), solver) for m in (one, other)]
        assert torch.equal(solutions[0].value, solutions[1].value)
        expected, found = tied.implicit_gradients(solver), free.implicit_gradients(solver)
        summed = {"A": found["A"] + found["C"], "f": found["f"]}
        assert_same_gradients(summed, expected, rtol=1e-9)
        assert found["A"].norm() > 1e-6
        assert found["C"].norm() > 1e-6


@EVERY_MODEL
@EVERY_TASK
def test_hypergradient_is_that_of_finite_differences(model: str, task: str, side: int) -> None:
    """Central differences of the loss in random directions of the kernels and of the data."""
    problem = make_problem(model, task, side)
    gradients = problem.implicit_gradients()
    h, directions = 1e-5, list[tuple[str, Tensor]]()
    for i, name in enumerate([name for name in problem.leaves for _ in range(3)]):
        direction = normal(tuple(problem.leaves[name].shape), 10 + i)
        directions.append((name, direction / direction.norm()))
    stack = {
        name: leaf.expand(2 * len(directions), *leaf.shape).clone() for name, leaf in problem.leaves.items()
    }
    for i, (name, direction) in enumerate(directions):
        stack[name][2 * i] += h * direction
        stack[name][2 * i + 1] -= h * direction
    models, f = problem.build(stack)
    solution = fixed_point(models.step_map(f), f.detach(), ANDERSON)
    assert solution.status.eq(Status.CONVERGED).all()
    losses = problem.loss(solution.value).tolist()
    for (name, direction), up, down in zip(directions, losses[::2], losses[1::2], strict=True):
        derivative = (gradients[name] * direction).sum().item()
        assert (up - down) / (2 * h) == pytest.approx(derivative, rel=1e-5, abs=1e-8), name


@EVERY_MODEL
@EVERY_TASK
def test_hypergradient_is_that_of_the_unrolled_iteration(model: str, task: str, side: int) -> None:
    """Backpropagation through plain steps until they have converged, against both solvers and products."""
    problem = make_problem(model, task, side)
    built, f = problem.build()
    T, u = built.step_map(f), f
    for _ in range(700 if task == "deblurring" else 250):
        u = T(u)
    assert (T(u) - u).norm() <= 1e-12 * u.norm()
    # What early steps contribute decays into denormal numbers, which are slow.
    torch.set_flush_denormal(True)
    try:
        unrolled = problem.gradients(built, f, problem.loss(u))
    finally:
        torch.set_flush_denormal(False)
    for solver, exact_vjp in ((PLAIN, True), (ANDERSON, True), (ANDERSON, False)):
        assert_same_gradients(problem.implicit_gradients(solver, exact_vjp), unrolled, rtol=1e-8)


@EVERY_MODEL
def test_adjoint_may_start_anywhere(model: str) -> None:
    """From its solution it takes one step, from anywhere else it comes to the same gradient."""
    problem = make_problem(model, "deblurring", 3)
    expected = problem.implicit_gradients()
    built, f = problem.build()
    adjoints: list[Solution] = []

    def gradients(w0: Callable[[Tensor], Tensor] | None) -> Gradients:
        T = FixedPointProblem(built.step_map(f), built.vjp, first_adjoint=w0)
        solution = implicit_fixed_point(T, f.detach(), ANDERSON, on_adjoint=adjoints.append)
        return problem.gradients(built, f, problem.loss(solution.value))

    assert_same_gradients(gradients(None), expected, rtol=1e-12)
    assert_same_gradients(gradients(lambda g: normal(tuple(g.shape), 9)), expected, rtol=1e-9)
    assert_same_gradients(gradients(lambda g: adjoints[0].value), expected, rtol=1e-9)
    cold, anywhere, warm = (adjoint.steps.tolist() for adjoint in adjoints)
    assert warm == [1] * BATCH
    assert min(cold) > 3
    assert min(anywhere) > 3


@EVERY_TASK
@EVERY_MODEL
def test_images_that_have_stopped_are_left_out_of_both_solves(model: str, task: str, side: int) -> None:
    """Solution, adjoint and gradients are those of solves that evaluate all images to the end."""
    built, f = make_problem(model, task, side).build()
    start = f.detach().clone()
    start[0] = fixed_point(built.step_map(f), start, ANDERSON).value[0]
    forward, backward = list[int](), list[int]()

    def restrict(images: Tensor) -> StepMap:
        forward.append(len(images))
        return built.step_map(f.index_select(-4, images))

    def vjp(u: Tensor) -> StepMap:
        backward.append(len(u))
        return built.vjp(u)

    def solved(restrict: Callable[[Tensor], StepMap] | None = None) -> tuple[list[Solution], list[Tensor]]:
        built.zero_grad()
        found: list[Solution] = []
        T = FixedPointProblem(built.step_map(f), vjp, restrict)
        solution = implicit_fixed_point(T, start, ANDERSON, on_adjoint=found.append)
        # The first image's adjoint is zero.
        solution.value[1].square().sum().backward()
        return [solution, *found], [p.grad.clone() for p in built.parameters() if p.grad is not None]

    solutions, gradients = solved()
    assert (forward, backward) == ([], [BATCH])
    restricted, same = solved(restrict)
    assert (forward, backward) == ([1], [BATCH, BATCH, 1])
    for solution, expected in zip(restricted, solutions, strict=True):
        assert torch.equal(solution.steps, expected.steps)
        assert torch.equal(solution.status, expected.status)
        torch.testing.assert_close(solution.value, expected.value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(same, gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("task", ["denoising", "deblurring"])
@pytest.mark.parametrize("side", [3, 5])
@EVERY_MODEL
def test_the_preconditioner_inverts_the_mean_curvature_of_periodic_images(
    model: str, side: int, task: str
) -> None:
    """The inverse of `tau (lambda (K^T K + ridge) + gamma s/2 |C^T A|)` with dense circulant matrices."""
    A, C = normal((2, FILTERS, side, side), 0)
    operator = forward_operator(task, HEIGHT, WIDTH, faces=True, blur=3)
    numbers = {"tau": TAU, "lam": LAM, "gamma": GAMMA}
    built = build_conv_model(model, operator, (A, C), smoothed_sign(SHARPNESS), **numbers)
    n = HEIGHT * WIDTH
    units = torch.eye(n, dtype=torch.float64).view(n, 1, HEIGHT, WIDTH)

    def circulant(kernels: Tensor) -> Tensor:
        padded = functional.pad(units, [side // 2] * 4, mode="circular")
        return functional.conv2d(padded, kernels[:, None]).flatten(1).T

    product = circulant(A if model == "bilevel" else C).T @ circulant(A)
    # The modulus of a normal matrix has its singular values and its vectors.
    U, singular, _ = torch.linalg.svd(product)
    modulus = U @ singular.diag() @ U.T
    data = operator.normal(units).flatten(1) + PRECONDITIONER_RIDGE * torch.eye(n)
    curvature = TAU * (LAM * data + GAMMA * SHARPNESS / 2 * modulus)
    P = built.preconditioner(units.shape[1:])
    assert P.shape == (HEIGHT, WIDTH // 2 + 1)
    inverted = built.precondition(curvature.view(n, 1, HEIGHT, WIDTH), P).flatten(1)
    torch.testing.assert_close(inverted, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-9)


@EVERY_MODEL
@pytest.mark.parametrize("task", ["denoising", "deblurring"])
def test_preconditioned_solves_have_the_same_gradients_in_fewer_steps(model: str, task: str) -> None:
    """Fixed point, adjoint and gradients do not depend on `P`; a mask has none."""
    problem = make_problem(model, task, 3)
    built, f = problem.build()
    P = built.preconditioner(f.shape[-3:])
    steps: list[int] = []

    def gradients(P: Tensor | None) -> Gradients:
        adjoint: list[Solution] = []
        T = replace(built.problem(f, P), first_adjoint=None)
        solution = implicit_fixed_point(T, f.detach(), ANDERSON, on_adjoint=adjoint.append)
        found = problem.gradients(built, f, problem.loss(solution.value))
        for solve in (solution, *adjoint):
            assert solve.status.eq(Status.CONVERGED).all()
            steps.append(int(solve.steps.max()))
        return found

    expected = gradients(None)
    assert_same_gradients(gradients(P), expected, rtol=1e-9)
    forward, backward, fewer_forward, fewer_backward = steps
    assert fewer_forward < 0.8 * forward
    assert fewer_backward < 0.8 * backward
    masked, _ = make_problem(model, "inpainting", 3).build()
    with pytest.raises(ValueError, match="preconditioner: allowed for tied"):
        masked.preconditioner(f.shape[-3:])


@EVERY_TASK
def test_plain_iteration_descends_the_lower_level(task: str, side: int) -> None:
    """A step of at most one over the Lipschitz constant of the gradient never increases the energy."""
    built, f = make_problem("bilevel", task, side).build()
    u, energies = f.detach(), list[Tensor]()
    with torch.no_grad():
        T = built.step_map(f)
        for _ in range(60):
            energies.append(built.lower_level(u, f))
            u = T(u)
    for before, after in itertools.pairwise(energies):
        assert (after <= before + 1e-12 * before.abs()).all()
    assert (energies[-1] < 0.9 * energies[0]).all()
    assert (energies[1] < energies[0]).all()


@pytest.mark.parametrize("task", TASKS)
def test_the_lower_levels_gradient_vanishes_at_the_fixed_point(task: str) -> None:
    """The bilevel model's fixed point is stationary, and no other point near it has less energy."""
    built, f = make_problem("bilevel", task, 3).build()
    f = f.detach()
    solution = fixed_point(built.step_map(f), f, ANDERSON)
    u = solution.value.requires_grad_()
    energy = built.lower_level(u, f)
    (gradient,) = torch.autograd.grad(energy.sum(), u)
    assert gradient.norm() < 1e-9
    for seed in range(10):
        elsewhere = u + 1e-2 * normal(tuple(u.shape), seed)
        assert (built.lower_level(elsewhere, f) > energy).all()


def test_denoising_is_an_independent_solution_of_smoothed_total_variation() -> None:
    """SciPy's L-BFGS minimizes the same energy, written in NumPy, to the bilevel model's fixed point."""
    side, sharpness, lam, gamma = 8, 5.0, 4.0, 0.7
    kernels = difference_kernels(1, 2, 3).double()
    truth = np.sign(np.arange(side)[:, None] - np.arange(side)[None] + 0.5)
    noisy = truth + 0.3 * np.random.default_rng(0).standard_normal((side, side))

    def energy(x: np.ndarray) -> tuple[float, np.ndarray]:
        u = x.reshape(side, side)
        beyond = np.pad(u, ((0, 1), (0, 1)))
        right, down = beyond[:-1, 1:] - u, beyond[1:, :-1] - u
        logcosh = sum((np.logaddexp(sharpness * z, -sharpness * z) - np.log(2)).sum() for z in (right, down))
        p, q = np.tanh(sharpness * right), np.tanh(sharpness * down)
        gradient = lam * (u - noisy) - gamma * (p + q)
        gradient[:, 1:] += gamma * p[:, :-1]
        gradient[1:] += gamma * q[:-1]
        return lam / 2 * ((u - noisy) ** 2).sum() + gamma * logcosh / sharpness, gradient.ravel()

    options = {"maxiter": 10_000, "maxcor": 50, "ftol": 1e-16, "gtol": 1e-11}
    theirs = minimize(energy, noisy.ravel(), jac=True, method="L-BFGS-B", options=options)
    f = torch.from_numpy(noisy)[None, None]
    operator = forward_operator("denoising", side, side)
    numbers = {"tau": 1 / (lam + gamma * sharpness * 8), "lam": lam, "gamma": gamma}
    model = build_conv_model("bilevel", operator, (kernels, kernels), smoothed_sign(sharpness), **numbers)
    solution = fixed_point(model.step_map(f), f, ANDERSON)
    assert solution.status.item() == Status.CONVERGED
    ours = solution.value[0, 0].numpy()
    np.testing.assert_allclose(ours, theirs.x.reshape(side, side), rtol=0, atol=1e-6)
    assert model.lower_level(solution.value, f).item() == pytest.approx(theirs.fun, rel=1e-12)
    assert np.linalg.norm(ours - truth) < 0.9 * np.linalg.norm(noisy - truth)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("side", "height", "width"), [(3, 8, 7), (11, 15, 12)])
def test_kernels_are_scaled_to_the_norm_of_the_gradient(
    side: int, height: int, width: int, tied: bool
) -> None:
    """Each of `A` and `C`, of every member, on images of this size; the parameters stay as they are."""
    sizes = torch.tensor([1.0, 20.0, 0.01], dtype=torch.float64)[:, None, None, None]
    A, C = sizes * normal((3, FILTERS, side, side), 0), normal((3, FILTERS, side, side), 1)
    start = normal((3, 1, 1, height, width), 2)
    regularizer = ConvFieldsOfExperts(A, None if tied else C, smoothed_sign(SHARPNESS), start)
    weights = regularizer.weights()
    assert weights.keys() == ({"A"} if tied else {"A", "C"})
    for name, given_kernels in (("A", A), ("C", C))[: len(weights)]:
        assert torch.equal(getattr(regularizer, name), given_kernels)
        for kernels, drawn in zip(weights[name], given_kernels, strict=True):
            assert not kernels.requires_grad
            norm = image_norm(kernels, height, width).item()
            assert (1 - 1e-9) * GRADIENT_NORM < norm < (1 + 2e-3) * GRADIENT_NORM
            torch.testing.assert_close(kernels / kernels.norm(), drawn / drawn.norm())


@pytest.mark.parametrize("tied", [True, False])
def test_scales_follow_the_kernels(tied: bool) -> None:
    """After a change the old scales hold until `refresh`, and then the norms are right again, `C`'s too."""
    A, C = normal((2, 2, FILTERS, 5, 5), 0)
    start = normal((2, 1, 1, HEIGHT, WIDTH), 2)
    regularizer = ConvFieldsOfExperts(A, None if tied else C, smoothed_sign(SHARPNESS), start)
    before = regularizer.scales.clone()
    with torch.no_grad():
        for factor, parameter in zip((4.0, 0.5), regularizer.parameters(), strict=False):
            parameter *= factor
            parameter += 0.02 * normal(tuple(parameter.shape), 3)
    assert torch.equal(regularizer.scales, before)
    regularizer.refresh()
    for name, kernels in regularizer.weights().items():
        assert (regularizer.scales != before).all()
        for member in kernels:
            norm = image_norm(member, HEIGHT, WIDTH).item()
            assert norm == pytest.approx(GRADIENT_NORM, rel=1e-3), name


def test_kernels_without_a_direction_stay_as_they_are() -> None:
    """No scales, before and after a refresh."""
    A, C = normal((2, FILTERS, 3, 3), 0)
    regularizer = ConvFieldsOfExperts(A, C, smoothed_sign(SHARPNESS))
    for _ in range(2):
        weights = regularizer.weights()
        assert torch.equal(weights["A"], A)
        assert torch.equal(weights["C"], C)
        regularizer.refresh()


@EVERY_MODEL
def test_the_scale_is_a_constant_for_the_gradient(model: str) -> None:
    """The gradient is that for the scaled kernels times the scale, and not the derivative of a quotient.

    The latter would be orthogonal to the kernels, since their size changes nothing.
    """
    problem = make_problem(model, "denoising", 3)
    A, C = 3.0 * problem.leaves["A"], 0.2 * problem.leaves.get("C", problem.leaves["A"])
    start = normal((1, 1, HEIGHT, WIDTH), 7)
    operator = forward_operator("denoising", HEIGHT, WIDTH)
    numbers = {"tau": TAU, "lam": LAM, "gamma": GAMMA}
    built = build_conv_model(model, operator, (A, C), smoothed_sign(SHARPNESS), start, **numbers)
    f = problem.leaves["f"].clone().requires_grad_()
    solution = implicit_fixed_point(built.problem(f), f.detach(), ANDERSON)
    found = problem.gradients(built, f, problem.loss(solution.value))
    regularizer = built.regularizer
    assert isinstance(regularizer, ConvFieldsOfExperts)
    scaled = Problem(model, "denoising", regularizer.weights() | {"f": f.detach()}, problem.truth)
    expected = scaled.implicit_gradients()
    scales = dict(zip(("A", "C"), regularizer.scales.tolist(), strict=False)) | {"f": 1.0}
    assert_same_gradients(found, {name: scales[name] * g for name, g in expected.items()}, rtol=1e-9)
    assert not regularizer.scales.requires_grad
    radial = (found["A"] * A).sum() / (found["A"].norm() * A.norm())
    assert radial.abs() > 1e-2


@pytest.mark.parametrize("task", TASKS)
def test_both_models_start_equal(task: str) -> None:
    """Untrained, `C` is `A`, and so are its scale, up to rounding, the steps and the products."""
    A = normal((1, FILTERS, 5, 5), 0)
    start = normal((1, 1, 1, HEIGHT, WIDTH), 1)
    operator = forward_operator(task, HEIGHT, WIDTH, faces=True, blur=3)
    numbers = {"tau": TAU, "lam": LAM, "gamma": GAMMA}
    tied, free = (
        build_conv_model(model, operator, (A, A.clone()), smoothed_sign(SHARPNESS), start, **numbers)
        for model in MODELS
    )
    names = [set(dict(model.regularizer.named_parameters())) for model in (tied, free)]
    assert names == [{"A"}, {"A", "C"}]
    assert isinstance(free.regularizer.C, nn.Parameter)
    assert torch.equal(free.regularizer.C, free.regularizer.A)
    kernels, (tied_kernels,) = free.regularizer.weights(), tied.regularizer.weights().values()
    f, w = 0.3 * normal((2, 1, BATCH, 1, HEIGHT, WIDTH), 2)
    pairs = [(kernels[name], tied_kernels) for name in ("A", "C")]
    pairs += [(tied.step_map(f)(w), free.step_map(f)(w)), (tied.vjp(f)(w), free.vjp(f)(w))]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_an_unknown_model_is_refused() -> None:
    """In one line that names the two."""
    A = normal((FILTERS, 3, 3), 0)
    operator = forward_operator("denoising", HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"^model: got 'unet', allowed: bilevel, deq$"):
        build_conv_model("unet", operator, (A, A), smoothed_sign(5.0), tau=TAU, lam=LAM, gamma=GAMMA)


@given(st.sampled_from(MODELS), st.sampled_from(TASKS), st.floats(0.5, 50.0), st.integers(0, 2**32 - 1))
def test_the_whole_hypergradient_is_that_of_finite_differences(
    model: str, task: str, lam: float, seed: int
) -> None:
    """Through normalization and weight, of kernels `A` and `C` and of `lambda`, for any mask and blur.

    The models of all directions and both signs are one stack. Fixed points do not depend on the step, which
    follows the weight.
    """
    draws = torch.Generator().manual_seed(seed)
    A, other = torch.randn(2, FILTERS, 3, 3, generator=draws, dtype=torch.float64)
    C = A + 0.3 * other
    direction = torch.randn(1, 1, HEIGHT, WIDTH, generator=draws, dtype=torch.float64)
    truth, noise = torch.randn(2, BATCH, 1, HEIGHT, WIDTH, generator=draws, dtype=torch.float64)
    mask = (torch.rand(HEIGHT, WIDTH, generator=draws) > 0.3).double()
    blur = torch.rand(3, 3, generator=draws, dtype=torch.float64)
    operators: dict[str, Operator] = {
        "denoising": Identity(),
        "inpainting": Mask(mask),
        "deblurring": CircularBlur(blur / blur.sum()),
    }
    operator = operators[task]
    f = operator.forward(truth) + 0.1 * noise

    def built(A: Tensor, C: Tensor, lam: Tensor, stack: tuple[int, ...] = ()) -> FixedPointModel:
        start = direction.expand(*stack, *direction.shape)
        learned = {"learn_weight": True, "differentiate_norm": True}
        numbers = {"tau": torch.ones(stack), "lam": lam, "gamma": torch.ones(stack)}
        return build_conv_model(
            model, operator, (A, C), smoothed_sign(SHARPNESS), start, **numbers, **learned
        )

    alone = built(A, C, torch.tensor(lam, dtype=torch.float64))
    solver = Anderson(tol=1e-13, max_steps=5000, memory=10, regularization=1e-8)
    solution = implicit_fixed_point(alone.problem(f), f, solver)
    assume(solution.status.eq(Status.CONVERGED).all())
    (solution.value - truth).square().mean().backward()
    gradients = {name: p.grad for name, p in alone.named_parameters()}
    names = ["regularizer.A", "weight", *["regularizer.C"] * (model == "deq")]
    assert set(gradients) == set(names)
    h, parameters = 1e-5, dict(alone.named_parameters())
    moved = {
        name: parameters[name].detach().expand(2 * len(names), *parameters[name].shape).clone()
        for name in names
    }
    directions = {}
    for i, name in enumerate(names):
        d = torch.randn(parameters[name].shape, generator=draws, dtype=torch.float64)
        directions[name] = d / d.norm()
        moved[name][2 * i] += h * directions[name]
        moved[name][2 * i + 1] -= h * directions[name]
    lams = torch.exp(WEIGHT_PACE * moved["weight"])
    kernels = moved["regularizer.A"], moved.get("regularizer.C", moved["regularizer.A"])
    stacked = built(*kernels, lams, (2 * len(names),))
    data = f.expand(2 * len(names), *f.shape)
    solutions = fixed_point(stacked.problem(data), data, solver)
    assume(solutions.status.eq(Status.CONVERGED).all())
    losses = (solutions.value - truth).square().mean((-4, -3, -2, -1)).tolist()
    for i, name in enumerate(names):
        gradient = gradients[name]
        assert gradient is not None
        expected = (losses[2 * i] - losses[2 * i + 1]) / (2 * h)
        derivative = (gradient * directions[name]).sum().item()
        assert derivative == pytest.approx(expected, rel=1e-3, abs=1e-3 * gradient.norm().item()), name
    if model == "bilevel":
        # The size of kernels that are normalized changes nothing.
        radial = (gradients["regularizer.A"] * A).sum()
        assert radial.abs() <= 1e-7 * gradients["regularizer.A"].norm() * A.norm()
