"""DeepInverse beside `lib`: its adjoints, its iterations with our field, its trainer with our models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lib.deepinverse import FieldPrior, PhysicsOperator, Reconstructor, deepinv, tomography, with_operator
from lib.experiments.data import faces
from lib.experiments.problem import make_solver, psnr
from lib.experiments.runs import NO_RESULT_FILES, RESULT_FILES, trained_kernels
from lib.experiments.store import REPOSITORY
from lib.models import FixedPointModel, build_conv_model, build_model
from lib.operators import CircularBlur, Identity, Mask
from lib.regularizer import smoothed_sign
from lib.solvers import Anderson, PlainIteration, Status, fixed_point

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 12
EXACT = Anderson(tol=1e-11, max_steps=2000, memory=10, regularization=1e-12)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small_model(model: str, lam: float = 20.0) -> FixedPointModel:
    """Few kernels and a mild activation, for which everything converges to the last digit, in float64."""
    A = 0.3 * normal(3, 3, 3, seed=1)
    C = A + 0.02 * normal(3, 3, 3, seed=2)
    options = {"tau": 1 / (lam + 30), "lam": lam, "gamma": 1.0}
    return build_conv_model(model, Identity(), (A, C), smoothed_sign(5.0), **options)


def loader(x: Tensor, y: Tensor) -> DataLoader[Any]:
    """Pairs as DeepInverse has them, in batches of four."""
    pairs: Any = [{"x": image, "y": data} for image, data in zip(x, y, strict=True)]
    return DataLoader(pairs, 4)


PHYSICS = {
    "denoising": lambda: deepinv.physics.Denoising(),
    "inpainting": lambda: deepinv.physics.Inpainting(
        (1, SIDE, SIDE), mask=(normal(1, SIDE, SIDE) > 0).double()
    ),
    "blur": lambda: deepinv.physics.Blur(normal(1, 1, 3, 3), padding="circular"),
    "valid blur": lambda: deepinv.physics.Blur(normal(1, 1, 3, 3), padding="valid"),
    "downsampling": lambda: deepinv.physics.Downsampling((1, SIDE, SIDE), filter="bilinear", factor=2),
    "tomography": lambda: tomography(SIDE, 7),
}


def physics(name: str) -> Any:
    made = PHYSICS[name]()
    return made.double() if name == "downsampling" else made


@pytest.mark.parametrize("name", PHYSICS)
@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_a_physics_is_an_operator_with_its_adjoint(name: str, batch: tuple[int, ...]) -> None:
    """`<K u, v> = <u, K^T v>` and `K^T K`, for images with any leading dimensions and data of any size."""
    K, dtype = PhysicsOperator(physics(name)), torch.float32 if name == "tomography" else torch.float64
    u = normal(*batch, 1, SIDE, SIDE).to(dtype)
    f = K.forward(u)
    assert f.shape[: len(batch)] == batch
    v = normal(*f.shape, seed=1).to(dtype)
    assert K.adjoint(v).shape == u.shape
    torch.testing.assert_close((f * v).sum(), (u * K.adjoint(v)).sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(K.normal(u), K.adjoint(f), rtol=1e-5, atol=1e-5)


def test_the_exact_adjoint_of_tomography_is_asked_for() -> None:
    """DeepInverse's own back-projection fails the inner product where ours passes, so the test can fail."""
    exact = tomography(32, 10)
    u, v = normal(1, 1, 32, 32).float(), normal(1, 1, 46, 10, seed=1).float()
    other = deepinv.physics.Tomography(exact.angles, 32, adjoint_via_backprop=False, normalize=True)
    errors = [
        ((p.A(u) * v).sum() - (u * p.A_adjoint(v)).sum()).abs() / (u.norm() * v.norm())
        for p in (exact, other)
    ]
    assert errors[0] < 1e-6
    assert errors[1] > 1e-5


def test_tomography_has_norm_one() -> None:
    """Steps are made for it: the largest eigenvalue of `A^T A`, by powers from another start than theirs."""
    physics, u = tomography(32, 10), normal(1, 1, 32, 32, seed=3).float()
    for _ in range(100):
        u = physics.A_adjoint_A(u / u.norm())
    assert u.norm().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        (Identity(), "denoising"),
        (Mask((normal(1, SIDE, SIDE)[0] > 0).double()), "inpainting"),
        (CircularBlur(normal(3, 3)), "blur"),
    ],
)
def test_fixed_points_are_those_of_our_operators(ours: Any, name: str) -> None:
    """The same model with a physics as `K` and with our own."""
    model = small_model("deq")
    f = normal(2, 1, SIDE, SIDE, seed=4)
    K = CircularBlur(normal(1, 1, 3, 3)[0, 0]) if name == "blur" else ours
    both = [with_operator(model, operator, 4.0) for operator in (K, PhysicsOperator(physics(name)))]
    first, second = (fixed_point(m.problem(f), f, EXACT) for m in both)
    assert first.fraction(Status.CONVERGED) == second.fraction(Status.CONVERGED) == 1
    torch.testing.assert_close(first.value, second.value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("model", ["bilevel", "deq"])
@pytest.mark.parametrize("name", ["inpainting", "downsampling"])
def test_their_gradient_descent_with_our_prior_comes_to_our_fixed_point(model: str, name: str) -> None:
    """And our `Reconstructor` of images in [0, 1] to the same in that range."""
    ours, theirs = small_model(model), physics(name)
    clean = normal(2, 1, SIDE, SIDE, seed=4).tanh()
    f = theirs.A(clean)
    lam, tau = ours.lam.item(), ours.tau.item()
    descent = deepinv.optim.GD(
        data_fidelity=deepinv.optim.L2(),
        prior=FieldPrior(ours),
        stepsize=tau * lam,
        lambda_reg=1 / lam,
        max_iter=4000,
        thres_conv=1e-13,
        early_stop=True,
        custom_init=lambda y, physics: {"est": (physics.A_adjoint(y),)},
    )
    with torch.no_grad():
        reached = descent(f, theirs)
        reconstruct = Reconstructor(ours, EXACT)
        unit = reconstruct(theirs.A((clean + 1) / 2), theirs)
    fixed = fixed_point(with_operator(ours, PhysicsOperator(theirs)).problem(f), theirs.A_adjoint(f), EXACT)
    assert fixed.fraction(Status.CONVERGED) == 1
    torch.testing.assert_close(reached, fixed.value, rtol=0, atol=1e-6)
    torch.testing.assert_close(unit, (fixed.value + 1) / 2, rtol=0, atol=1e-6)
    assert reconstruct.solution.fraction(Status.CONVERGED) == 1


def test_a_tied_prior_is_the_gradient_of_its_function() -> None:
    """By autograd, and the proximal point that DeepInverse finds from it solves the optimality condition."""
    prior, x = FieldPrior(small_model("bilevel")), normal(2, 1, 6, 6, seed=5).requires_grad_()
    assert prior.explicit_prior
    (gradient,) = torch.autograd.grad(prior.fn(x).sum(), x)
    torch.testing.assert_close(prior.grad(x.detach()), gradient, rtol=1e-10, atol=1e-10)
    z = prior.prox(x.detach(), gamma=0.1, stepsize_inter=0.02, max_iter_inter=3000, tol_inter=1e-12)
    torch.testing.assert_close(z + 0.1 * prior.grad(z), x.detach(), rtol=0, atol=1e-6)
    assert not FieldPrior(small_model("deq")).explicit_prior


def test_a_prior_of_dense_weights_and_of_a_stack_of_one(near_orthogonal: Any) -> None:
    weights = near_orthogonal(16)
    one = build_model("deq", Identity(), weights, "relu", tau=0.1, lam=1.0, gamma=0.5)
    options = {name: torch.full((1,), value) for name, value in (("tau", 0.1), ("lam", 1.0), ("gamma", 0.5))}
    stack = build_model("deq", Identity(), tuple(w[None] for w in weights), "relu", **options)
    x = normal(3, 1, 4, 4)
    torch.testing.assert_close(FieldPrior(one).grad(x), FieldPrior(stack).grad(x))


@pytest.mark.parametrize("learned", [False, True])
def test_gradients_of_a_reconstructor_are_the_implicit_ones(learned: bool) -> None:
    """Against central differences of the loss in a kernel's entry and in the learned weight."""
    theirs, A = physics("inpainting"), 0.3 * normal(2, 3, 3, seed=1)
    direction = normal(1, 1, SIDE, SIDE) if learned else None
    options = {"tau": 1 / 50, "lam": 20.0, "gamma": 1.0, "learn_weight": learned}
    model = build_conv_model("deq", Identity(), (A, A), smoothed_sign(5.0), direction, **options)
    reconstruct, x = Reconstructor(model, EXACT).eval(), (normal(2, 1, SIDE, SIDE, seed=6).tanh() + 1) / 2
    y = theirs.A(x) + 0.05 * normal(2, 1, SIDE, SIDE, seed=7)

    def loss() -> Tensor:
        return (reconstruct(y, theirs) - x).square().mean()

    loss().backward()
    parameter = model.weight if learned else model.regularizer.C
    assert parameter is not None
    assert parameter.grad is not None
    got, eps, values = parameter.grad.flatten()[0].item(), 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.view(-1)[0] += sign * eps
            values.append(loss().item())
            parameter.view(-1)[0] -= sign * eps
    assert got == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-5)


def test_a_trained_run_is_tested_by_deepinverse() -> None:
    """Its `test` with its PSNR is our PSNR, and the committed kernels denoise."""
    run = trained_kernels("denoising", "deq", 30)
    x = (faces("test", 4)[..., 30:78, 20:60] + 1) / 2
    noisy = deepinv.physics.Denoising(deepinv.physics.GaussianNoise(run.config.noise / 2))
    reconstruct = Reconstructor(run.model(shape=(48, 40)), make_solver(run.config))
    y = x + run.config.noise / 2 * normal(*x.shape, seed=8).float()
    found = deepinv.test(
        reconstruct,
        loader(x, y),
        noisy,
        online_measurements=False,
        metrics=deepinv.metric.PSNR(),
        verbose=False,
        show_progress_bar=False,
        non_blocking_transfers=False,
    )
    with torch.no_grad():
        mse = (2 * (reconstruct(y, noisy) - x)).square().mean((1, 2, 3))
    assert found["PSNR"] == pytest.approx(psnr(mse).mean().item(), abs=1e-3)
    assert found["PSNR"] > found["PSNR no learning"] + 0.5


def test_deepinverse_trains_a_model() -> None:
    """Its trainer with its supervised loss lowers the error, for its own physics."""
    A = normal(4, 3, 3).float()
    options = {"tau": 1 / 150, "lam": 20.0, "gamma": 1.0}
    model = build_conv_model(
        "deq", Identity(), (A, A), smoothed_sign(10.0), normal(1, 1, 16, 16).float(), **options
    )
    x = (normal(8, 1, 16, 16, seed=2).cumsum(-1).tanh().float() + 1) / 2
    theirs = deepinv.physics.Inpainting((1, 16, 16), mask=(normal(1, 16, 16, seed=3) > -1).float())
    y = theirs.A(x) + 0.05 * normal(*x.shape, seed=4).float()
    reconstruct = Reconstructor(model, Anderson(1e-4, 200))

    def error() -> float:
        with torch.no_grad():
            return float((reconstruct(y, theirs) - x).square().mean())

    before = error()
    trainer = deepinv.Trainer(
        model=reconstruct,
        physics=theirs,
        train_dataloader=loader(x, y),
        losses=deepinv.loss.SupLoss(),
        optimizer=torch.optim.Adam(model.parameters(), lr=0.05),
        online_measurements=False,
        epochs=10,
        save_path=None,
        verbose=False,
        show_progress_bar=False,
        non_blocking_transfers=False,
    )
    trainer.train()
    assert error() < 0.8 * before


def test_a_step_is_made_for_the_norm() -> None:
    """A physics of norm 5 makes a map that diverges, and one that contracts when the norm is named."""
    model, f = small_model("bilevel"), normal(1, 1, SIDE, SIDE)
    impulse = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    impulse[..., 1, 1] = 5
    large = deepinv.physics.Blur(impulse, padding="circular")
    status = [
        fixed_point(
            with_operator(model, PhysicsOperator(large), norm).problem(f), f, PlainIteration(1e-6, 2000)
        )
        for norm in (1.0, 5.0)
    ]
    assert [int(solution.status) for solution in status] == [Status.DIVERGED, Status.CONVERGED]


def test_what_is_no_linear_physics_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^physics: got Identity, allowed: a LinearPhysics of DeepInverse$"):
        PhysicsOperator(Identity())
    phase = deepinv.physics.PhaseRetrieval(deepinv.physics.Denoising())
    with pytest.raises(ValueError, match=r"^physics: got PhaseRetrieval, "):
        Reconstructor(small_model("deq"), EXACT)(torch.zeros(1, 1, 4, 4), phase)


def test_no_stored_run_depends_on_it() -> None:
    """It is the one file beside the mathematics that does not count (`test_runs.py` changes each of them)."""
    files = {path.name for path in (REPOSITORY / "lib").glob("[a-z]*.py")}
    assert files - set(RESULT_FILES) == set(NO_RESULT_FILES) == {"deepinverse.py"}
