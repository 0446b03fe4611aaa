"""DeepInverse: adjoints of its physics, its iterations with our field, its trainer with our models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import normal
from torch import Tensor
from torch.utils.data import DataLoader

from lib.deepinverse import FieldPrior, PhysicsOperator, PriorField, Reconstructor, deepinv
from lib.implicit import implicit_fixed_point
from lib.models import FixedPointModel
from lib.operators import CircularBlur, Identity, Mask
from lib.regularizer import ConvFieldsOfExperts, smoothed_sign
from lib.solvers import Anderson, PlainIteration, Status, fixed_point
from lib.training import Adam, train

SIDE = 12
EXACT = Anderson(tol=1e-11, max_steps=2000, memory=10, regularization=1e-12)
MASK, KERNEL = (normal(1, SIDE, SIDE) > 0).double(), normal(1, 1, 3, 3)
PHYSICS = {
    "denoising": lambda: deepinv.physics.Denoising(),
    "inpainting": lambda: deepinv.physics.Inpainting((1, SIDE, SIDE), mask=MASK),
    "blur": lambda: deepinv.physics.Blur(KERNEL, padding="circular"),
    "valid blur": lambda: deepinv.physics.Blur(KERNEL, padding="valid"),
    "downsampling": lambda: deepinv.physics.Downsampling(
        (1, SIDE, SIDE), filter="bilinear", factor=2
    ).double(),
}
OURS = {"denoising": Identity(), "inpainting": Mask(MASK[0]), "blur": CircularBlur(KERNEL[0, 0])}


def small_model(tied: bool, **options: Any) -> FixedPointModel:
    A = 0.3 * normal(3, 3, 3, seed=1)
    C = None if tied else A + 0.02 * normal(3, 3, 3, seed=2)
    direction = normal(1, 1, SIDE, SIDE) if options else None
    field = ConvFieldsOfExperts(A, C, smoothed_sign(5.0), direction)
    return FixedPointModel(Identity(), field, 1 / 50, 20.0, 1.0, **options)


@pytest.mark.parametrize("name", PHYSICS)
@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_adjoint_of_physics_passes_inner_product(name: str, batch: tuple[int, ...]) -> None:
    """Images may have any leading dimensions, and data any size."""
    K, u = PhysicsOperator(PHYSICS[name]()), normal(*batch, 1, SIDE, SIDE)
    f = K.forward(u)
    assert f.shape[: len(batch)] == batch
    v = normal(*f.shape, seed=1)
    assert K.adjoint(v).shape == u.shape
    torch.testing.assert_close((f * v).sum(), (u * K.adjoint(v)).sum(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(K.normal(u), K.adjoint(f), rtol=1e-9, atol=1e-9)
    if name in OURS:
        torch.testing.assert_close(OURS[name].forward(u), f, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(OURS[name].adjoint(v), K.adjoint(v), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["inpainting", "downsampling"])
def test_gradient_descent_of_deepinverse_reaches_fixed_point(tied: bool, name: str) -> None:
    """`Reconstructor` gives the same images, in [0, 1]."""
    ours, theirs = small_model(tied), PHYSICS[name]()
    clean = normal(2, 1, SIDE, SIDE, seed=4).tanh()
    f, lam, tau = theirs.A(clean), ours.lam.item(), ours.tau.item()
    descent = deepinv.optim.GD(
        data_fidelity=deepinv.optim.L2(),
        prior=FieldPrior(ours),
        stepsize=tau * lam,
        lambda_reg=1 / lam,
        max_iter=4000,
        thres_conv=1e-10,
        early_stop=True,
        custom_init=lambda y, physics: {"est": (physics.A_adjoint(y),)},
    )
    reconstruct = Reconstructor(ours, EXACT)
    with torch.no_grad():
        reached = descent(f, theirs)
        unit = reconstruct(theirs.A((clean + 1) / 2), theirs)
    model = FixedPointModel(PhysicsOperator(theirs), ours.regularizer, ours.tau, ours.lam, ours.gamma)
    fixed = fixed_point(model.problem(f), theirs.A_adjoint(f), EXACT)
    assert fixed.fraction(Status.CONVERGED) == reconstruct.solution.fraction(Status.CONVERGED) == 1
    torch.testing.assert_close(reached, fixed.value, rtol=0, atol=1e-6)
    torch.testing.assert_close(unit, (fixed.value + 1) / 2, rtol=0, atol=1e-6)


def test_tied_prior_is_gradient_of_function() -> None:
    """Compare with autograd; DeepInverse's proximal point solves the optimality condition."""
    prior, x = FieldPrior(small_model(True)), normal(2, 1, 6, 6, seed=5).requires_grad_()
    assert prior.explicit_prior
    assert not FieldPrior(small_model(False)).explicit_prior
    (gradient,) = torch.autograd.grad(prior.fn(x).sum(), x)
    torch.testing.assert_close(prior.grad(x.detach()), gradient, rtol=1e-9, atol=1e-9)
    z = prior.prox(x.detach(), gamma=0.1, stepsize_inter=0.02, max_iter_inter=3000, tol_inter=1e-12)
    torch.testing.assert_close(z + 0.1 * prior.grad(z), x.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_gradient_of_reconstructor_matches_differences(learned: bool) -> None:
    """Derivative with respect to an entry of `C`, or to the learned weight."""
    theirs, model = PHYSICS["inpainting"](), small_model(False, **{"learn_weight": True} if learned else {})
    reconstruct, x = Reconstructor(model, EXACT).eval(), (normal(2, 1, SIDE, SIDE, seed=6).tanh() + 1) / 2
    y = theirs.A(x) + 0.05 * normal(2, 1, SIDE, SIDE, seed=7)

    def loss() -> Tensor:
        return (reconstruct(y, theirs) - x).square().mean()

    loss().backward()
    parameter = model.weight if learned else model.regularizer.C
    assert parameter is not None
    assert parameter.grad is not None
    h, values = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.view(-1)[0] += sign * h
            values.append(loss().item())
            parameter.view(-1)[0] -= sign * h
    difference = (values[0] - values[1]) / (2 * h)
    assert abs(parameter.grad.flatten()[0].item() - difference) <= 1e-4 * parameter.grad.norm().item()


def test_trainer_of_deepinverse_lowers_error() -> None:
    """Supervised loss and inpainting of DeepInverse."""
    A = normal(4, 3, 3).float()
    field = ConvFieldsOfExperts(A, A, smoothed_sign(10.0), normal(1, 1, 16, 16).float())
    model = FixedPointModel(Identity(), field, 1 / 150, 20.0, 1.0)
    x = (normal(8, 1, 16, 16, seed=2).cumsum(-1).tanh().float() + 1) / 2
    theirs = deepinv.physics.Inpainting((1, 16, 16), mask=(normal(1, 16, 16, seed=3) > -1).float())
    y = theirs.A(x) + 0.05 * normal(*x.shape, seed=4).float()
    reconstruct = Reconstructor(model, Anderson(1e-4, 200))

    def error() -> float:
        with torch.no_grad():
            return float((reconstruct(y, theirs) - x).square().mean())

    pairs: Any = [{"x": image, "y": data} for image, data in zip(x, y, strict=True)]
    before = error()
    deepinv.Trainer(
        model=reconstruct,
        physics=theirs,
        train_dataloader=DataLoader(pairs, 4),
        losses=deepinv.loss.SupLoss(),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.05),
        online_measurements=False,
        epochs=10,
        save_path=None,
        verbose=False,
        show_progress_bar=False,
        non_blocking_transfers=False,
    ).train()
    assert error() < 0.8 * before


class Ridges(torch.nn.Module):
    """`sum sqrt(1 + (w * x)^2)` of every image."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = torch.nn.Parameter(0.3 * normal(3, 1, 3, 3, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        return (1 + torch.nn.functional.conv2d(x, self.kernels, padding=1) ** 2).sqrt().sum((1, 2, 3))


def their_field(name: str) -> PriorField:
    """A learned prior of DeepInverse, explicit or a denoiser's, as a field in float64."""
    if name == "explicit":
        return PriorField(deepinv.optim.Prior(Ridges()))
    torch.manual_seed(0)
    denoiser = deepinv.models.DnCNN(1, 1, depth=3, nf=4, pretrained=None).double()
    denoiser.out_conv.weight.data /= 20
    return PriorField(deepinv.optim.RED(denoiser), 0.1)


@pytest.mark.parametrize(
    ("prior", "physics"),
    [("explicit", "inpainting"), ("explicit", "downsampling"), ("denoiser", "denoising")],
)
def test_hypergradient_of_priors_matches_differences(prior: str, physics: str) -> None:
    """Directional derivative with respect to all parameters."""
    field, K, u = their_field(prior), PhysicsOperator(PHYSICS[physics]()), normal(2, 1, SIDE, SIDE, seed=6)
    model = FixedPointModel(K, field, 1 / 8, 5.0, 0.8)
    f = K.forward(u) + 0.1 * normal(*K.forward(u).shape, seed=7)
    parameters = list(field.parameters())
    directions = [normal(*parameter.shape, seed=8 + i) for i, parameter in enumerate(parameters)]

    def loss(step: float) -> Tensor:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += step * direction
        solution = implicit_fixed_point(model.problem(f), K.adjoint(f), EXACT)
        assert solution.fraction(Status.CONVERGED) == 1
        return (solution.value - u).square().mean()

    gradients = torch.autograd.grad(loss(0.0), parameters)
    size = sum(gradient.square().sum() for gradient in gradients) ** 0.5
    h = 1e-6
    difference = (loss(h) - loss(-2 * h)).item() / (2 * h)
    derivative = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    assert size > 1e-6
    assert abs(derivative - difference) <= 1e-5 * size * sum(d.square().sum() for d in directions) ** 0.5


def test_field_as_prior_gives_same_model() -> None:
    """The energies agree, and trainings take the same steps up to rounding errors."""
    ours, u = small_model(True), normal(4, 1, SIDE, SIDE, seed=6).tanh()
    theirs = FixedPointModel(Identity(), PriorField(FieldPrior(small_model(True))), 1 / 50, 20.0, 1.0)
    torch.testing.assert_close(theirs.lower_level(u, u), ours.lower_level(u, u), rtol=1e-12, atol=0)
    options = {"epochs": 3, "optimizer": Adam(0.05), "solver": EXACT}
    histories = [train(model, u, 0.3, **options) for model in (ours, theirs)]
    losses = [[row["train_loss"] for row in history.rows] for history in histories]
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    assert list(histories[1].weights) == ["model.regularizer.A"]
    with pytest.raises(ValueError, match=r"^`learn_weight` must be False for a prior"):
        FixedPointModel(Identity(), theirs.regularizer, 1.0, 1.0, 1.0, learn_weight=True)
    with pytest.raises(
        ValueError, match=r"^Images must have shape \(N, C, H, W\), got \(2, 4, 1, 12, 12\)\.$"
    ):
        theirs.problem(u.expand(2, *u.shape))
    with pytest.raises(ValueError, match=r"^A preconditioner requires tied dense weights, "):
        theirs.preconditioner(u.shape[-3:])


@pytest.mark.parametrize("name", ["denoising", "blur"])
def test_preconditioner_of_physics_is_that_of_our_operator(name: str) -> None:
    operators, field = (OURS[name], PhysicsOperator(PHYSICS[name]())), small_model(True).regularizer
    ours, theirs = (FixedPointModel(K, field, 1 / 50, 20.0, 1.0) for K in operators)
    shape = (1, SIDE, SIDE)
    torch.testing.assert_close(theirs.preconditioner(shape), ours.preconditioner(shape), rtol=1e-9, atol=0)


def test_step_follows_norm_of_physics() -> None:
    """With a physics of norm 5 the map diverges, unless the norm is passed."""
    model, f, impulse = small_model(True), normal(1, 1, SIDE, SIDE), torch.zeros(1, 1, 3, 3).double()
    impulse[..., 1, 1] = 5
    large = deepinv.physics.Blur(impulse, padding="circular")
    status = []
    for norm in (1.0, 5.0):
        reconstruct = Reconstructor(model, PlainIteration(1e-6, 2000), norm=norm)
        with torch.no_grad():
            reconstruct(f, large)
        status.append(int(reconstruct.solution.status))
    assert status == [Status.DIVERGED, Status.CONVERGED]


def test_nonlinear_physics_is_rejected() -> None:
    with pytest.raises(
        ValueError, match=r"^`physics` must be a LinearPhysics of DeepInverse, got Identity\.$"
    ):
        PhysicsOperator(Identity())
