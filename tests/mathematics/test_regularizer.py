"""Activations, dense and convolutional fields of experts, and the normalization of kernels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DENSE, HEIGHT, KINDS, PIXELS, SHARPNESS, WIDTH, image_norm, make_field, normal
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.nn import functional

from lib import regularizer
from lib.regularizer import (
    GRADIENT_NORM,
    ConvFieldsOfExperts,
    DenseFieldsOfExperts,
    FieldsOfExperts,
    LearnedSpline,
    initial_weights,
    smoothed_sign,
)

SEEDS = st.integers(0, 2**32 - 1)
STACKS = st.lists(st.integers(1, 3), max_size=2).map(tuple)
EVERY_KIND = pytest.mark.parametrize("kind", [*KINDS, "normalized"])
BATCH = 3


def draw_field(
    kind: str, stack: tuple[int, ...], tied: bool, seed: int
) -> tuple[FieldsOfExperts, Tensor, Tensor, Tensor]:
    """Return a random field with images, weights `gamma` and step sizes `tau`, all with leading `stack`."""
    gamma, tau = normal(2, *stack, seed=seed).abs() + 0.1
    u = normal(*stack, BATCH, 1, HEIGHT, WIDTH, seed=seed + 1)
    if kind in DENSE:
        A, C = normal(2, *stack, 9, PIXELS, seed=seed + 2) / WIDTH
        leaves = {"A": A, "b": normal(*stack, 9, seed=seed + 3)}
        return make_field(kind, leaves if tied else leaves | {"C": C}), u, gamma, tau
    A, C = normal(2, *stack, 2, 3, 3, seed=seed + 2) / 3
    start = normal(*stack, 1, 1, HEIGHT, WIDTH, seed=seed + 4) if kind == "normalized" else None
    return ConvFieldsOfExperts(A, None if tied else C, smoothed_sign(SHARPNESS), start), u, gamma, tau


def draw_spline(concave: bool) -> LearnedSpline:
    knots, slopes = torch.tensor([[0.3, 1.2], [5.0, 0.5]], dtype=torch.float64)
    return LearnedSpline(knots, slopes[: 2 - concave], concave)


ACTIVATIONS = st.one_of(
    st.sampled_from(sorted(DENSE)).map(DENSE.get),
    st.floats(0.1, 200).map(smoothed_sign),
    st.booleans().map(draw_spline),
)


@given(ACTIVATIONS, st.floats(0.01, 3), SEEDS)
def test_sigma_is_derivative_of_potential(
    activation: regularizer.Activation | LearnedSpline, tau: float, seed: int
) -> None:
    """`sigma = phi'`, at kinks too, and `slope = sigma'` in [0, steepest], or from -1 if concave."""
    z = torch.cat([3 * normal(50, seed=seed), normal(50, seed=seed + 1) / activation.steepest])
    kinks = torch.tensor([-tau, 0.0, tau], dtype=torch.float64)
    threshold, z = torch.tensor(tau, dtype=torch.float64), torch.cat([z, kinks]).requires_grad_()
    (derivative,) = torch.autograd.grad(activation.potential(z, threshold).sum(), z)
    sigma, slope = activation.sigma(z, threshold), activation.slope(z, threshold)
    torch.testing.assert_close(sigma, derivative, rtol=1e-11, atol=1e-12)
    smooth = slice(None, -3)
    (derivative,) = torch.autograd.grad(sigma.sum(), z) if sigma.requires_grad else (torch.ones_like(z),)
    torch.testing.assert_close(slope[smooth], derivative[smooth], rtol=1e-8, atol=1e-11 * activation.steepest)
    assert slope.min() >= (-1 if getattr(activation, "concave", False) else 0)
    assert slope.max() <= activation.steepest * (1 + 1e-12)


@given(st.floats(0.01, 3), st.floats(0.1, 200), SEEDS)
def test_activations_match_torch(tau: float, sharpness: float, seed: int) -> None:
    z, threshold = 3 * normal(50, seed=seed), torch.tensor(tau, dtype=torch.float64)
    expected = {"relu": z.relu(), "softshrink": functional.softshrink(z, tau), "linear": z}
    for name, value in expected.items():
        torch.testing.assert_close(DENSE[name].sigma(z, threshold), value, rtol=1e-13, atol=1e-14)
    activation, x = smoothed_sign(sharpness), sharpness * z.abs()
    torch.testing.assert_close(
        activation.sigma(z, threshold), torch.tanh(sharpness * z), rtol=1e-11, atol=1e-13
    )
    modulus = (x + functional.softplus(-2 * x) - math.log(2)) / sharpness
    torch.testing.assert_close(activation.potential(z, threshold), modulus, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smoothed_sign_does_not_overflow(dtype: torch.dtype) -> None:
    activation, tau = smoothed_sign(100.0), torch.tensor(0.5)
    z = torch.tensor([1.0, 10.0, 1e4, 1e30, -1.0, -1e30], dtype=dtype)
    assert activation.sigma(z, tau).dtype == dtype
    torch.testing.assert_close(activation.sigma(z, tau), z.sign(), rtol=1e-6, atol=0)
    torch.testing.assert_close(activation.potential(z, tau), z.abs() - math.log(2) / 100, rtol=1e-6, atol=0)


@EVERY_KIND
@given(STACKS, SEEDS)
def test_tied_field_is_gradient_of_energy(kind: str, stack: tuple[int, ...], seed: int) -> None:
    field, u, gamma, tau = draw_field(kind, stack, True, seed)
    energy = field.energy(u.requires_grad_(), gamma, tau)
    assert energy.shape == (*stack, BATCH)
    (gradient,) = torch.autograd.grad(energy.sum(), u)
    torch.testing.assert_close(field.field(u, gamma, tau), gradient, rtol=1e-10, atol=1e-10)


def test_fields_copy_weights_of_caller() -> None:
    weights = {name: normal(PIXELS, PIXELS, seed=seed) for seed, name in enumerate("AC")}
    weights["b"] = normal(PIXELS, seed=2)
    before = {name: weight.clone() for name, weight in weights.items()}
    field = DenseFieldsOfExperts(weights["A"], weights["b"], weights["C"], DENSE["relu"])
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.zero_()
    assert all(torch.equal(weights[name], before[name]) for name in weights)


@pytest.mark.parametrize("kind", KINDS)
@given(st.booleans(), SEEDS)
def test_field_matches_formula(kind: str, tied: bool, seed: int) -> None:
    """`gamma C^T sigma(A u + b)`, by matrix-vector products or by torch's convolutions."""
    field, u, gamma, tau = draw_field(kind, (), tied, seed)
    C = field.A if field.C is None else field.C
    if isinstance(field, DenseFieldsOfExperts):
        experts = [field.activation.sigma(torch.mv(field.A, x.flatten()) + field.b, tau) for x in u]
        expected = torch.stack([gamma * torch.mv(C.T, z) for z in experts]).view_as(u)
    else:
        z = torch.tanh(SHARPNESS * functional.conv2d(u, field.A[:, None], padding=1))
        expected = gamma * functional.conv_transpose2d(z, C[:, None], padding=1)
    torch.testing.assert_close(field.field(u, gamma, tau), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["linear", "kernels"])
@given(st.booleans(), SEEDS)
def test_only_tied_field_has_symmetric_jacobian(kind: str, tied: bool, seed: int) -> None:
    field, u, gamma, tau = draw_field(kind, (), tied, seed)
    J = jacobian(lambda x: field.field(x, gamma, tau), u[:1]).view(PIXELS, PIXELS)
    asymmetry = (J - J.T).norm() / J.norm()
    assert asymmetry < 1e-11 if tied else asymmetry > 0.1


@EVERY_KIND
@given(STACKS, st.booleans(), SEEDS)
@settings(max_examples=12)
def test_vjp_matches_autograd(kind: str, stack: tuple[int, ...], tied: bool, seed: int) -> None:
    field, u, gamma, tau = draw_field(kind, stack, tied, seed)
    w = normal(*u.shape, seed=seed + 6)
    (expected,) = torch.autograd.grad(field.field(u.requires_grad_(), gamma, tau), u, w)
    torch.testing.assert_close(field.vjp(u, gamma, tau)(w), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@given(STACKS, st.booleans(), SEEDS)
@settings(max_examples=12)
def test_stack_matches_members(kind: str, stack: tuple[int, ...], tied: bool, seed: int) -> None:
    """Field, energy and vector-Jacobian products, for members with their own `gamma` and `tau`."""
    stacked, u, gamma, tau = draw_field(kind, stack, tied, seed)
    w = normal(*u.shape, seed=seed + 6)

    def results(field: FieldsOfExperts, *numbers: Tensor, w: Tensor) -> list[Tensor]:
        return [field.field(*numbers), field.energy(*numbers), field.vjp(*numbers)(w)]

    together = results(stacked, u, gamma, tau, w=w)
    parameters = dict(stacked.named_parameters())
    for i in itertools.product(*map(range, stack)):
        member = make_field(kind, {name: parameter.detach()[i] for name, parameter in parameters.items()})
        alone = results(member, u[i], gamma[i], tau[i], w=w[i])
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one[i], other, rtol=1e-11, atol=1e-11)


@given(st.sampled_from([(), (2,)]), st.booleans(), SEEDS)
def test_results_are_independent_of_cache_size(stack: tuple[int, ...], tied: bool, seed: int) -> None:
    """Field, products and gradients image by image equal those of all images at once."""

    def results(cached: int) -> list[Tensor]:
        field, u, gamma, tau = draw_field("kernels", stack, tied, seed)
        u.requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(regularizer, "CACHED", cached)
            value = field.field(u, gamma, tau)
            gradients = torch.autograd.grad(value.square().sum(), [u, *field.parameters()])
            return [value.detach(), *gradients, field.vjp(u.detach(), gamma, tau)(u.detach())]

    for alone, together in zip(results(1), results(2**30), strict=True):
        torch.testing.assert_close(alone, together, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tied", [True, False])
def test_kernels_are_scaled_to_norm_of_gradient(tied: bool) -> None:
    """`A` and `C` of every member, initially and after `refresh`; the parameters do not change."""
    sizes = torch.tensor([1.0, 20.0, 0.01], dtype=torch.float64)[:, None, None, None]
    A, C = sizes * normal(3, 2, 5, 5), normal(3, 2, 5, 5, seed=1)
    start = normal(3, 1, 1, HEIGHT, WIDTH, seed=2)
    field = ConvFieldsOfExperts(A.clone(), None if tied else C, smoothed_sign(SHARPNESS), start)
    assert torch.equal(field.A, A)

    def assert_norms(tolerance: float) -> None:
        assert field.weights().keys() == ({"A"} if tied else {"A", "C"})
        for name, weights in field.weights().items():
            for kernels, parameter in zip(weights, getattr(field, name).detach(), strict=True):
                norm = image_norm(kernels).item()
                assert (1 - 1e-9) * GRADIENT_NORM < norm < (1 + tolerance) * GRADIENT_NORM
                torch.testing.assert_close(kernels / kernels.norm(), parameter / parameter.norm())

    assert_norms(2e-3)
    before = field.scales.clone()
    with torch.no_grad():
        for factor, parameter in zip((4.0, 0.5), field.parameters(), strict=False):
            parameter.copy_(factor * parameter + 0.02 * normal(*parameter.shape, seed=3))
    assert torch.equal(field.scales, before)
    field.refresh()
    assert (field.scales != before).all()
    assert_norms(5e-3)


@given(st.booleans(), SEEDS)
@settings(max_examples=5)
def test_norm_is_constant_or_differentiated(tied: bool, seed: int) -> None:
    """A constant norm scales the gradient at the scaled kernels; else it is orthogonal to the kernels."""
    A, C = normal(2, 2, 3, 3, seed=seed)
    u, start = normal(2, 1, 1, HEIGHT, WIDTH, seed=seed + 1)
    gamma = tau = torch.tensor(1.0, dtype=torch.float64)

    def gradients(field: FieldsOfExperts) -> list[Tensor]:
        value = field.field(u, gamma, tau).square().sum()
        return list(torch.autograd.grad(value, list(field.parameters())))

    constant, differentiated = (
        ConvFieldsOfExperts(A.clone(), None if tied else C, smoothed_sign(1.0), start, through)
        for through in (False, True)
    )
    scaled = make_field("kernels", constant.weights())
    scaled.activation = smoothed_sign(1.0)
    actual, expected = gradients(constant), gradients(scaled)
    for gradient, right, scale in zip(actual, expected, constant.scales, strict=True):
        torch.testing.assert_close(gradient, scale * right, rtol=1e-10, atol=1e-10)
    for gradient, parameter in zip(gradients(differentiated), differentiated.parameters(), strict=True):
        assert (gradient * parameter).sum().abs() <= 1e-10 * gradient.norm() * parameter.norm()


@pytest.mark.parametrize("n", [16, 100])
def test_initial_weights_match_linear_layer(n: int) -> None:
    """Entries are uniform in `[-1, 1] / sqrt(n)`, and `A` and `C` independent."""
    A, b, C = initial_weights(n, torch.Generator().manual_seed(0))
    assert [tuple(w.shape) for w in (A, b, C)] == [(n, n), (n,), (n, n)]
    bound = n**-0.5
    for w in (A, C):
        assert 0.95 * bound < w.abs().max() <= bound
        assert w.mean().abs() < 4 * bound / 3**0.5 / n
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(n, n)
    assert max(p.abs().max().item() for p in layer.parameters()) <= bound
    assert layer.weight.std().item() == pytest.approx(A.std().item(), rel=0.15)
    assert torch.corrcoef(torch.stack([A.flatten(), C.flatten()]))[0, 1].abs() < 4 / n
    assert torch.equal(A, initial_weights(n, torch.Generator().manual_seed(0))[0])
