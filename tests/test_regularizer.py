"""Fields of experts: gradients of their energies, stacks of models, initial weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from lib.regularizer import ACTIVATIONS, DenseFieldsOfExperts, FieldsOfExperts, initial_weights

pytestmark = pytest.mark.usefixtures("one_thread")

SEEDS = st.integers(0, 2**32 - 1)
STACKS = st.lists(st.integers(1, 3), max_size=2).map(tuple)
NAMES = st.sampled_from(sorted(ACTIVATIONS))
SHAPE = (2, 3, 2)
"""Channels, rows and columns of the images here."""
PIXELS, EXPERTS, BATCH = 12, 7, 4


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_field(
    stack: tuple[int, ...], activation: str, tied: bool, seed: int
) -> tuple[FieldsOfExperts, Tensor, Tensor, Tensor]:
    """A random field with its images, weight `gamma` and step size `tau`, all with leading `stack`."""
    A, C = normal((2, *stack, EXPERTS, PIXELS), seed)
    b = normal((*stack, EXPERTS), seed + 1)
    gamma, tau = normal((2, *stack), seed + 2).abs() + 0.1
    u = normal((*stack, BATCH, *SHAPE), seed + 3)
    return DenseFieldsOfExperts(A, b, None if tied else C, activation), u, gamma, tau


@given(NAMES, st.floats(0.01, 3), SEEDS)
def test_sigma_is_the_derivative_of_its_potential(name: str, tau: float, seed: int) -> None:
    """`sigma = phi'` everywhere, at the kinks of `sigma` too, where `phi` is still differentiable."""
    threshold = torch.tensor(tau, dtype=torch.float64)
    kinks = torch.tensor([-tau, 0.0, tau], dtype=torch.float64)
    z = torch.cat([3 * normal((50,), seed), kinks]).requires_grad_()
    activation = ACTIVATIONS[name]
    (derivative,) = torch.autograd.grad(activation.potential(z, threshold).sum(), z)
    torch.testing.assert_close(activation.sigma(z, threshold), derivative, rtol=1e-13, atol=1e-13)


@given(st.floats(0.01, 3), SEEDS)
def test_activations_are_those_of_torch(tau: float, seed: int) -> None:
    """ReLU, soft shrinkage with threshold `tau`, and the identity."""
    z, threshold = 3 * normal((50,), seed), torch.tensor(tau, dtype=torch.float64)
    expected = {"relu": z.relu(), "softshrink": nn.functional.softshrink(z, tau), "identity": z}
    assert expected.keys() == ACTIVATIONS.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ACTIVATIONS[name].sigma(z, threshold), value, rtol=1e-14, atol=1e-14)


@given(STACKS, NAMES, SEEDS)
def test_tied_field_is_the_gradient_of_the_energy(stack: tuple[int, ...], name: str, seed: int) -> None:
    """With `C = A` the field is `grad R`, for every member of a stack."""
    regularizer, u, gamma, tau = draw_field(stack, name, True, seed)
    u.requires_grad_()
    energy = regularizer.energy(u, gamma, tau)
    assert energy.shape == (*stack, BATCH)
    (gradient,) = torch.autograd.grad(energy.sum(), u)
    torch.testing.assert_close(regularizer.field(u, gamma, tau), gradient, rtol=1e-12, atol=1e-12)


@given(NAMES, st.booleans(), SEEDS)
def test_field_is_the_formula(name: str, tied: bool, seed: int) -> None:
    """The field of one image is `gamma C^T sigma(A u + b)`, with `A` in place of `C` when tied."""
    regularizer, u, gamma, tau = draw_field((), name, tied, seed)
    A, b = regularizer.A, regularizer.b
    C = A if regularizer.C is None else regularizer.C
    for image, value in zip(u, regularizer.field(u, gamma, tau), strict=True):
        experts = regularizer.activation.sigma(torch.mv(A, image.flatten()) + b, tau)
        expected = gamma * torch.mv(C.T, experts)
        torch.testing.assert_close(value.flatten(), expected, rtol=1e-12, atol=1e-12)


@given(st.booleans(), SEEDS)
def test_only_the_tied_field_has_a_symmetric_jacobian(tied: bool, seed: int) -> None:
    """A smooth field is a gradient exactly where its Jacobian is symmetric; with a free `C` it is not."""
    regularizer, u, gamma, tau = draw_field((), "identity", tied, seed)
    J = jacobian(lambda x: regularizer.field(x, gamma, tau), u[:1]).view(PIXELS, PIXELS)
    asymmetry = (J - J.T).norm() / J.norm()
    assert asymmetry < 1e-12 if tied else asymmetry > 0.1


@given(STACKS, NAMES, st.booleans(), SEEDS)
def test_a_stack_is_its_members_one_at_a_time(
    stack: tuple[int, ...], name: str, tied: bool, seed: int
) -> None:
    """Field and energy of a stack hold those of every member, each with its own `gamma` and `tau`."""
    regularizer, u, gamma, tau = draw_field(stack, name, tied, seed)
    field, energy = regularizer.field(u, gamma, tau), regularizer.energy(u, gamma, tau)
    assert field.shape == u.shape
    for i in itertools.product(*map(range, stack)):
        C = None if regularizer.C is None else regularizer.C[i]
        member = DenseFieldsOfExperts(regularizer.A[i], regularizer.b[i], C, name)
        alone = member.field(u[i], gamma[i], tau[i])
        torch.testing.assert_close(field[i], alone, rtol=1e-12, atol=1e-12)
        alone = member.energy(u[i], gamma[i], tau[i])
        torch.testing.assert_close(energy[i], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_members_of_a_stack_may_differ_in_their_numbers(name: str) -> None:
    """Two members with the same weights but another `gamma` or `tau` have the fields of those numbers."""
    regularizer, u, _, _ = draw_field((), name, False, 0)
    assert regularizer.C is not None
    A, b, C = (w.detach().expand(3, *w.shape) for w in (regularizer.A, regularizer.b, regularizer.C))
    gamma = torch.tensor([0.5, 1.0, 0.5], dtype=torch.float64)
    tau = torch.tensor([0.2, 0.2, 0.9], dtype=torch.float64)
    first, doubled, shifted = DenseFieldsOfExperts(A, b, C, name).field(u.expand(3, *u.shape), gamma, tau)
    torch.testing.assert_close(doubled, 2 * first, rtol=1e-12, atol=1e-12)
    threshold_matters = (shifted - first).norm() > 1e-3 * first.norm()
    assert threshold_matters == (name == "softshrink")


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_one_parameter(tied: bool) -> None:
    """The bilevel model learns `A` and `b`; only the deep equilibrium model learns a `C`."""
    regularizer, *_ = draw_field((), "relu", tied, 0)
    assert set(dict(regularizer.named_parameters())) == ({"A", "b"} if tied else {"A", "b", "C"})


@pytest.mark.parametrize("n", [16, 100])
def test_initial_weights_fill_the_interval_of_torchs_linear_layer(n: int) -> None:
    """Entries are uniform in `[-1, 1] / sqrt(n)`: they reach its bounds, with its mean and its variance."""
    weights = initial_weights(n, torch.Generator().manual_seed(0))
    assert [tuple(w.shape) for w in weights] == [(n, n), (n,), (n, n)]
    bound = n**-0.5
    for w in (weights[0], weights[2]):
        assert 0.95 * bound < w.abs().max() <= bound
        deviation = bound / 3**0.5
        assert w.mean().abs() < 4 * deviation / n
        assert w.std().item() == pytest.approx(deviation, rel=0.1)
    assert weights[1].abs().max() <= bound
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(n, n)
    assert max(p.abs().max().item() for p in layer.parameters()) <= bound
    assert layer.weight.std().item() == pytest.approx(weights[0].std().item(), rel=0.15)


def test_initial_synthesis_is_independent_of_the_analysis() -> None:
    """`A` and `C` share no entries and their correlation is that of independent draws."""
    A, _, C = initial_weights(100, torch.Generator().manual_seed(0))
    assert not (A == C).any()
    correlation = torch.corrcoef(torch.stack([A.flatten(), C.flatten()]))[0, 1]
    assert correlation.abs() < 0.04


@given(SEEDS)
def test_initial_weights_are_a_function_of_the_generator(seed: int) -> None:
    """The same seed gives the same weights, another seed others, and torch's global state has no say."""
    with torch.random.fork_rng():
        torch.manual_seed(seed ^ 1)
        first = initial_weights(9, torch.Generator().manual_seed(seed))
        torch.manual_seed(seed ^ 2)
        again = initial_weights(9, torch.Generator().manual_seed(seed))
    other = initial_weights(9, torch.Generator().manual_seed(seed + 1))
    for w, same, different in zip(first, again, other, strict=True):
        assert torch.equal(w, same)
        assert not torch.equal(w, different)
