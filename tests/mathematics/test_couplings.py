"""Syntheses `C` that are functions of `A`: weighted experts, and `C` tied on the kernel of `K`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    ANDERSON,
    BATCH,
    HEIGHT,
    OPERATORS,
    PIXELS,
    SHARPNESS,
    WIDTH,
    assert_converged,
    assert_differences,
    make_problem,
    matrix_of,
    normal,
)
from torch import Tensor, nn
from torch.nn import functional

from lib.implicit import implicit_fixed_point
from lib.models import WEIGHT_PACE, FixedPointModel
from lib.operators import Identity
from lib.regularizer import (
    GRADIENT_NORM,
    LINEAR,
    SOFTSHRINK,
    ConvFieldsOfExperts,
    DenseFieldsOfExperts,
    FieldsOfExperts,
    LearnedSpline,
    TiedOnKernel,
    WeaklyConvexExperts,
    WeightedExperts,
    smoothed_sign,
)
from lib.solvers import Anderson

SEEDS = st.integers(0, 2**32 - 1)
STACKS = st.sampled_from([(), (2,), (2, 3)])
EVERY_KIND = pytest.mark.parametrize("kind", ["dense", "kernels", "normalized"])
EVERY_OPERATOR = pytest.mark.parametrize("operator", OPERATORS)
ONE = torch.tensor(1.0, dtype=torch.float64)


def draw_field(kind: str, stack: tuple[int, ...], weighted: bool, t: Tensor, seed: int) -> FieldsOfExperts:
    """Return a tied field, or the one whose three experts have weights `exp(t)`."""
    C = WeightedExperts(t.clone()) if weighted else None
    if kind == "dense":
        A, b = normal(*stack, 3, PIXELS, seed=seed) / WIDTH, normal(*stack, 3, seed=seed + 1)
        return DenseFieldsOfExperts(A, b, C, SOFTSHRINK)
    start = normal(*stack, 1, 1, HEIGHT, WIDTH, seed=seed + 1) if kind == "normalized" else None
    return ConvFieldsOfExperts(normal(*stack, 3, 3, 3, seed=seed) / 3, C, smoothed_sign(SHARPNESS), start)


def symmetric_part(M: Tensor) -> Tensor:
    return (M + M.mT) / 2


@EVERY_KIND
@given(STACKS, SEEDS)
@settings(max_examples=10)
def test_unit_weights_give_bilevel_model(kind: str, stack: tuple[int, ...], seed: int) -> None:
    u, numbers = normal(*stack, BATCH, 1, HEIGHT, WIDTH, seed=seed), 2 * [ONE.expand(stack)]
    t = torch.zeros(*stack, 3, dtype=torch.float64)
    tied, weighted = (draw_field(kind, stack, own, t, seed) for own in (False, True))
    assert torch.equal(weighted.field(u, *numbers), tied.field(u, *numbers))
    assert torch.equal(weighted.vjp(u, *numbers)(u), tied.vjp(u, *numbers)(u))


@EVERY_KIND
@given(STACKS, SEEDS)
@settings(max_examples=10)
def test_weighted_field_is_gradient_of_energy(kind: str, stack: tuple[int, ...], seed: int) -> None:
    u, numbers = normal(*stack, BATCH, 1, HEIGHT, WIDTH, seed=seed), 2 * [ONE.expand(stack)]
    field = draw_field(kind, stack, True, normal(*stack, 3, seed=seed + 2), seed)
    energy, w = field.energy(u.requires_grad_(), *numbers), normal(*u.shape, seed=seed + 3)
    assert energy.shape == (*stack, BATCH)
    (gradient,) = torch.autograd.grad(energy.sum(), u)
    value = field.field(u, *numbers)
    torch.testing.assert_close(value, gradient, rtol=1e-10, atol=1e-10)
    (expected,) = torch.autograd.grad(value, u, w)
    torch.testing.assert_close(field.vjp(u, *numbers)(w), expected, rtol=1e-10, atol=1e-10)


def test_step_with_learned_weight_follows_largest_expert() -> None:
    field = draw_field("normalized", (), True, torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64), 0)
    model = FixedPointModel(Identity(), field, 1.0, 4.0, 1.0, learn_weight=True)
    expected = 1 / (4 + math.e * SHARPNESS * GRADIENT_NORM**2)
    assert model.weight is not None
    assert torch.exp(WEIGHT_PACE * model.weight).item() == pytest.approx(4)
    assert model.tau.item() == pytest.approx(expected, rel=1e-12)


@given(st.floats(0.1, 3), st.floats(0.1, 2), st.floats(-3, 3), SEEDS)
@settings(max_examples=20)
def test_weakly_convex_experts_satisfy_bound(concavity: float, bound: float, scale: float, seed: int) -> None:
    """No Hessian of `R` has an eigenvalue below `-bound`; weights below the bound are `exp(t)`."""
    A = normal(3, 3, 3, seed=seed)
    C = WeaklyConvexExperts(normal(3, seed=seed + 1) + scale, concavity, bound)
    weights = C.weights(A).detach()
    units = torch.eye(PIXELS, dtype=torch.float64).view(PIXELS, 1, HEIGHT, WIDTH)
    matrix = functional.conv2d(units, A[:, None], padding=1).flatten(2).permute(1, 2, 0)
    slopes = concavity * normal(*matrix.shape[:2], seed=seed + 2).sign()
    for d in (slopes, torch.full_like(slopes, -concavity)):
        hessian = torch.einsum("ixu,ix,ixv->uv", matrix, weights[:, None] * d, matrix)
        assert torch.linalg.eigvalsh(hessian).min() >= -bound * (1 + 1e-10)
    assert (weights <= C.t.exp() * (1 + 1e-12)).all()
    assert torch.equal(WeaklyConvexExperts(C.t - 20, concavity, bound).weights(A), (C.t - 20).exp())


def test_bounded_weights_follow_normalized_kernels() -> None:
    """Field and energy have the weights of the scaled kernels, not those of the parameters."""
    A, start = normal(3, 3, 3, seed=0), normal(1, 1, HEIGHT, WIDTH, seed=1)
    C = WeaklyConvexExperts(torch.zeros(3, dtype=torch.float64), concavity=1.0, bound=0.9)
    field = ConvFieldsOfExperts(A, C, smoothed_sign(SHARPNESS), start)
    u = normal(BATCH, 1, HEIGHT, WIDTH, seed=2).requires_grad_()
    (gradient,) = torch.autograd.grad(field.energy(u, ONE, ONE).sum(), u)
    torch.testing.assert_close(field.field(u, ONE, ONE), gradient, rtol=1e-10, atol=1e-10)
    steepest = SHARPNESS * C.weights(field.weights()["A"]).max()
    torch.testing.assert_close(field.steepest(), steepest)
    assert steepest > 2 * SHARPNESS * C.weights(A).max()


def test_hypergradient_of_learned_potentials_matches_differences() -> None:
    """Directional derivatives of a training loss with respect to kernels, weights, knots and slopes."""
    truth = normal(2, 1, HEIGHT, WIDTH, seed=0)
    f = truth + 0.5 * normal(*truth.shape, seed=1)
    sigma = LearnedSpline(torch.tensor([0.2, 1.5]).double(), torch.tensor([6.0]).double(), concave=True)
    C = WeaklyConvexExperts(torch.zeros(3, dtype=torch.float64), 1.0, 0.9)
    model = FixedPointModel(
        Identity(), ConvFieldsOfExperts(normal(3, 3, 3, seed=2), C, sigma), 0.05, 1.0, 1.0
    )

    def loss() -> Tensor:
        model.refresh()
        problem = model.problem(f, model.preconditioner(f.shape[-3:]))
        solution = implicit_fixed_point(problem, f, Anderson(1e-13, 500, memory=10))
        assert_converged(solution)
        return (solution.value - truth).square().mean()

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    assert len(parameters) == 4
    for seed, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
        direction, values = normal(*parameter.shape, seed=seed), []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                parameter += step * direction
                values.append(loss())
        with torch.no_grad():
            parameter += 1e-6 * direction
        assert (gradient * direction).sum().item() == pytest.approx(
            ((values[0] - values[1]) / 2e-6).item(), rel=1e-5, abs=1e-9
        )


@EVERY_OPERATOR
@pytest.mark.parametrize("name", ["t", "E"])
def test_hypergradient_of_coupling_matches_differences(name: str, operator: str) -> None:
    problem = make_problem("linear", operator, tied=True)
    shape = (PIXELS,) if name == "t" else (PIXELS, *problem.leaves["f"].shape[1:])
    tensors = {key: problem.leaves[key] for key in "Ab"} | {name: 0.02 * normal(*shape, seed=9)}

    def solve(tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, nn.Parameter]]:
        leaf = tensors[name].clone()
        C = WeightedExperts(leaf) if name == "t" else TiedOnKernel(problem.operator, leaf)
        field = DenseFieldsOfExperts(tensors["A"].clone(), tensors["b"].clone(), C, LINEAR)
        stack = tensors["b"].shape[:-1]
        f = problem.leaves["f"].expand(*stack, *problem.leaves["f"].shape)
        numbers = {key: torch.tensor(value).expand(stack) for key, value in problem.numbers.items()}
        model = FixedPointModel(problem.operator, field, **numbers)
        solution = implicit_fixed_point(model.problem(f), problem.start(f), ANDERSON)
        assert_converged(solution)
        return problem.loss(solution.value), dict(zip(("A", "b", name), field.parameters(), strict=True))

    loss, leaves = solve(tensors)
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    with torch.no_grad():
        assert_differences(gradients, tensors, lambda points: solve(points)[0])


@EVERY_OPERATOR
@given(st.floats(0.1, 2), st.floats(0.1, 2), st.floats(0, 1), SEEDS)
@settings(max_examples=10)
def test_tied_on_kernel_is_monotone(operator: str, lam: float, gamma: float, share: float, seed: int) -> None:
    """`lambda K^T K + gamma C^T D A` is monotone for slopes in [0, 1] if `gamma ||E||^2 <= 4 lambda`."""
    K = OPERATORS[operator]()
    M = matrix_of(K)
    A, E = normal(9, PIXELS, seed=seed), normal(9, len(M), seed=seed + 1)
    E *= 2 * share * math.sqrt(lam / gamma) / torch.linalg.matrix_norm(E, 2)
    C = TiedOnKernel(K, E.view(9, *K.forward(normal(1, HEIGHT, WIDTH)).shape))(A)
    torch.testing.assert_close(C, A + E @ M)
    slopes = torch.rand(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    whole = lam * M.T @ M + gamma * C.T @ (slopes[:, None] * A)
    lowest = torch.linalg.eigvalsh(symmetric_part(whole))[0]
    assert lowest >= -1e-10 * torch.linalg.matrix_norm(whole, 2)
    values, vectors = torch.linalg.eigh(M.T @ M)
    kernel = vectors[:, values < 1e-12]
    on_kernel = kernel.T @ C.T @ (slopes[:, None] * A) @ kernel
    torch.testing.assert_close(on_kernel, on_kernel.T)
    assert kernel.shape[1] > 0 or operator == "identity"


@given(st.integers(2, 6), st.floats(0.1, 3), SEEDS)
def test_expert_is_monotone_only_for_parallel_synthesis(n: int, d: float, seed: int) -> None:
    """The symmetric part of `d c a^T` has the eigenvalues `d (<a, c> +- |a| |c|) / 2`, and zeros."""
    a, c = normal(2, n, seed=seed)
    eigenvalues = torch.linalg.eigvalsh(symmetric_part(d * torch.outer(c, a)))
    ends = torch.stack([d * (a @ c + sign * a.norm() * c.norm()) / 2 for sign in (-1, 1)])
    torch.testing.assert_close(eigenvalues[[0, -1]], ends, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(eigenvalues[1:-1], torch.zeros(n - 2).double(), rtol=0, atol=1e-10)
    assert eigenvalues[0] < 0
    for p in (0.0, d):
        multiple = torch.linalg.eigvalsh(symmetric_part(d * torch.outer(p * a, a)))
        assert multiple[0] >= -1e-12 * multiple[-1].clamp_min(1)
