"""Inpainting: iterates, residuals and eigenvalues in the mask, measured in a second way."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib.experiments.problem import load_images
from lib.experiments.profiles import FACES_PROFILES, FILLING, faces_config
from lib.experiments.runs import Run
from lib.figures import inpainting, reconstructions
from lib.figures.baselines import harmonic_inpainting, tv_model
from lib.kernels import initial_kernels, spectral_norm
from lib.operators import central_block_mask
from lib.regularizer import GRADIENT_NORM
from lib.solvers import Anderson, PlainIteration, Status, fixed_point

pytestmark = [
    pytest.mark.usefixtures("one_thread", "drawing"),
    # matplotlib hands torch's tensors to NumPy in a way that NumPy will not take for ever.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

HEIGHT, WIDTH = 28, 23
LOST = central_block_mask(HEIGHT, WIDTH) == 0


@cache
def make_run(model: str = "bilevel", task: str = "inpainting", seed: int = 0, **values: Any) -> Run:
    """A run that was never trained, with random kernels in float64 of the training's norm."""
    own: dict[str, Any] = {"model": model, "filters": 2, "filter_size": 3}
    config = faces_config("smoke", task, **FILLING | own | values)
    draws = torch.Generator().manual_seed(seed)
    weights = {}
    for name in ("A", "C") if model == "deq" else ("A",):
        kernels = initial_kernels("random", config.filters, config.filter_size, draws).double()
        kernels = kernels - kernels.mean((-2, -1), keepdim=True)
        norm, _ = spectral_norm(kernels, torch.randn(1, 1, HEIGHT, WIDTH, generator=draws).double(), 300)
        weights[name] = kernels * GRADIENT_NORM / norm
    if model == "deq":
        weights["C"] = 0.8 * weights["A"] + 0.2 * weights["C"]
    return Run("key", config, "completed", "", pd.DataFrame(), weights, {})


def single(run: Run) -> Run:
    """The same in single precision, which the images have."""
    return replace(run, weights={name: weight.float() for name, weight in run.weights.items()})


def problem(run: Run) -> tuple[Tensor, Tensor]:
    truth, f = reconstructions.test_data(run.config)
    return truth.double(), f.double()


def jacobian(run: Run, u: Tensor) -> Tensor:
    """`dT/du`, `(n, n)`, at one image by autograd."""
    T = run.model().step_map(torch.zeros_like(u))
    J: Tensor = torch.autograd.functional.jacobian(T, u)
    return J.view(u.numel(), u.numel())


def test_the_lost_pixels_are_the_masks() -> None:
    """The central block of a quarter of each side; another task has none."""
    lost = inpainting.lost_pixels(make_run())
    assert lost.dtype == torch.bool
    assert torch.equal(lost, LOST)
    assert lost.sum() == 7 * 5
    with pytest.raises(ValueError, match=r"task: got 'denoising'.*inpainting"):
        inpainting.lost_pixels(make_run(task="denoising"))


def test_the_data_are_the_masked_images_and_noise() -> None:
    """The noise is the run's, and the truth the test images."""
    run = make_run(noise=0.05)
    truth, f = reconstructions.test_data(run.config)
    assert torch.equal(truth, load_images(run.config)["test"])
    noise = f - truth * ~LOST
    assert noise.std().item() == pytest.approx(0.05, rel=0.1)
    assert noise[..., LOST].std().item() == pytest.approx(0.05, rel=0.4)


def test_noiseless_data_are_the_masked_images() -> None:
    truth, f = reconstructions.test_data(make_run(noise=0.0).config)
    assert torch.equal(f[..., ~LOST], truth[..., ~LOST])
    assert not f[..., LOST].any()


@given(shown=st.lists(st.integers(1, 5000), min_size=1, max_size=6))
def test_counts_are_those_shown_and_others_up_to_the_largest(shown: list[int]) -> None:
    """In order, without repetition, from the first iterate on, and no gap on the log axis."""
    numbers = inpainting.counts(shown)
    assert numbers == sorted(set(numbers))
    assert set(shown) <= set(numbers)
    assert numbers[0] == 1
    assert numbers[-1] == max(shown)
    assert all(isinstance(number, int) for number in numbers)
    assert all(b <= max(1.5 * a, a + 1) for a, b in pairwise(numbers))


@pytest.mark.parametrize("model", ["bilevel", "deq"])
def test_plain_iterates_are_those_of_the_plain_solver(model: str) -> None:
    """`u^k` is what the solver returns after `k` evaluations of the step map."""
    run = make_run(model)
    _, f = problem(run)
    iterates = inpainting.plain_iterates(run, f, [7, 1, 30])
    assert sorted(iterates) == [1, 7, 30]
    T = run.model().step_map(f)
    with torch.no_grad():
        assert torch.equal(iterates[1], T(f))
    for k, u in iterates.items():
        solution = fixed_point(T, f, PlainIteration(1e-300, k))
        # The solver's value is of its best iterate, which is the last one as long as the residuals fall.
        assert (solution.residuals.diff(dim=0) < 0).all()
        assert torch.equal(u, solution.value)
        assert not u.requires_grad


def test_the_solution_is_converged() -> None:
    run = make_run()
    truth, f = reconstructions.test_data(run.config)
    solution = inpainting.converged(single(run), f)
    assert solution.status.tolist() == [Status.CONVERGED] * len(truth)
    u = solution.value.double()
    residual = run.model().step_map(f.double())(u) - u
    assert (torch.linalg.vector_norm(residual, dim=(1, 2, 3)) < 3e-6 * 25).all()


@pytest.mark.parametrize("sharpness", [2.0, 20.0, 100.0])
def test_the_gap_is_that_of_the_dense_jacobian(sharpness: float) -> None:
    """One minus the largest eigenvalue of `dT/du` by autograd, of the rows and columns in the mask."""
    run = make_run(sharpness=sharpness)
    _, f = problem(run)
    for u in (f[:1], 0.02 * f[1:]):
        J = jacobian(run, u)[LOST.flatten()][:, LOST.flatten()]
        torch.testing.assert_close(J, J.T, rtol=0, atol=1e-12)
        expected = 1 - np.linalg.eigvalsh(J.numpy())[-1]
        found = inpainting.condition(run, u, LOST)["gap"]
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)
        assert -1e-12 <= found < 1


def test_the_gap_of_free_weights_is_that_of_the_symmetric_part() -> None:
    run = make_run("deq")
    _, f = problem(run)
    J = jacobian(run, f[:1])[LOST.flatten()][:, LOST.flatten()]
    assert (J - J.T).abs().max() > 1e-3
    expected = 1 - np.linalg.eigvalsh((J + J.T).numpy() / 2)[-1]
    assert inpainting.condition(run, f[:1], LOST)["gap"] == pytest.approx(expected, rel=1e-6)
    # It bounds how close to 1 the eigenvalues of `J` itself come.
    assert expected <= 1 - np.linalg.eigvals(J.numpy()).real.max() + 1e-12


def test_the_gap_of_a_saturated_model_is_next_to_nothing() -> None:
    """With steep experts and an image full of edges there is hardly any curvature in the mask."""
    run = make_run(sharpness=1000.0)
    noise = torch.randn(1, 1, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    saturated = inpainting.condition(run, 10 * noise, LOST)
    assert saturated["saturated"] > 0.95
    flat = inpainting.condition(run, 0 * noise, LOST)
    assert flat["saturated"] == 0
    assert saturated["gap"] < 0.1 * flat["gap"]


@pytest.mark.parametrize("filter_size", [3, 5])
@pytest.mark.parametrize("sharpness", [20.0, 100.0])
def test_saturated_experts_are_counted_by_convolution(filter_size: int, sharpness: float) -> None:
    """Those whose window meets the mask; the sum over the experts is `conv2d`'s."""
    run = make_run(filter_size=filter_size, sharpness=sharpness)
    _, f = problem(run)
    # A patch of another kind outside the mask, which must not count.
    u = f[:1].clone()
    u[..., :8, :] = 5 * torch.sin(7.0 * torch.arange(8.0 * WIDTH)).view(8, WIDTH)
    A = run.weights["A"][:, None]
    z = torch.nn.functional.conv2d(u, A, padding=filter_size // 2)[0]
    slope = 1 - torch.tanh(sharpness * z).square()
    window = torch.ones(1, 1, filter_size, filter_size, dtype=torch.float64)
    near = torch.nn.functional.conv2d(LOST[None, None].double(), window, padding=filter_size // 2)[0, 0] > 0.5
    grown = filter_size - 1
    assert near.sum() == (7 + grown) * (5 + grown)
    share = (slope[:, near] < 0.01).double().mean().item()
    assert 0 < share < 1
    assert share != pytest.approx((slope < 0.01).double().mean().item(), abs=1e-3)
    assert inpainting.condition(run, u, LOST)["saturated"] == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize("model", ["bilevel", "deq"])
def test_backward_residuals_of_plain_iteration(model: str) -> None:
    """`w <- J^T w + dL/du` by hand with a dense `J`, its relative residual after each step."""
    run = make_run(model)
    truth, f = problem(run)
    u, truth = f[:1], truth[:1]
    found = inpainting.backward_residuals(run, u, truth, PlainIteration(1e-300, 12))
    J, g = jacobian(run, u), 2 * (u - truth).flatten() / u.numel()
    w, expected = g, []
    for _ in range(12):
        step = J.T @ w + g
        expected.append((torch.linalg.vector_norm(step - w) / torch.linalg.vector_norm(step)).item())
        w = step
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_backward_residuals_end_where_the_equation_is_solved() -> None:
    """The last one is under the tolerance, all before are above; and the dense solution has none."""
    run = make_run(sharpness=5.0, seed=1)
    truth, f = problem(run)
    u = inpainting.converged(run, f[:1]).value
    found = inpainting.backward_residuals(run, u, truth[:1], Anderson(1e-8, 3000, 10, 1e-10))
    assert found.ndim == 1
    assert found[-1] <= 1e-8 < found[:-1].min()
    J, g = jacobian(run, u), 2 * (u - truth[:1]).flatten() / u.numel()
    w = torch.linalg.solve(torch.eye(len(J)).double() - J.T, g)
    from_solution = fixed_point(
        lambda v: (J.T @ v.flatten() + g).view_as(v), w.view_as(u), PlainIteration(1e-8, 2)
    )
    assert from_solution.residuals[0].item() < 1e-10


def test_the_largest_backward_residual_of_the_images_is_taken() -> None:
    """Of several images with the loss over all of them."""
    run = make_run()
    truth, f = problem(run)
    solver = PlainIteration(1e-300, 9)
    alone = [
        inpainting.backward_residuals(run, f[i : i + 1], truth[i : i + 1], solver) for i in range(len(f))
    ]
    together = inpainting.backward_residuals(run, f, truth, solver)
    np.testing.assert_allclose(together, np.max(alone, axis=0), rtol=1e-8)
    assert np.abs(alone[0] - alone[1]).max() > 1e-6


def test_the_baselines_are_those_of_the_data() -> None:
    """Harmonic images to the bit; total variation has converged with the run's `lambda`."""
    run = make_run()
    _, f = reconstructions.test_data(run.config)
    found = inpainting.baselines(run, f)
    assert list(found) == ["harmonic", "TV"]
    assert torch.equal(found["harmonic"], harmonic_inpainting(f, (~LOST).float()))
    u = found["TV"].double()
    model = tv_model(run.model().operator, run.config.lam).double()
    v = u.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.lower_level(v, f.double()).sum(), v)
    assert gradient.abs().max() < 0.05


def test_fill_uses_the_solver_of_the_training() -> None:
    """After two evaluations of the step map its value is the second iterate."""
    run = make_run(solver="plain", max_steps=2, tol=1e-12)
    _, f = problem(run)
    T = run.model().step_map(f)
    with torch.no_grad():
        assert torch.equal(inpainting.fill(run, f), T(T(f)))


def test_quality_inside_and_outside() -> None:
    """PSNR of a known error in the mask, and of another one elsewhere, as means over the images."""
    truth = torch.zeros(2, 1, HEIGHT, WIDTH, dtype=torch.float64)
    inside, outside = torch.tensor([0.2, 0.4]), torch.tensor([0.1, 0.3])
    u = truth + torch.where(LOST, inside[:, None, None, None], outside[:, None, None, None])
    table = inpainting.quality({"u": u, "exact outside": torch.where(LOST, u, truth)}, truth, LOST)
    assert list(table.index) == ["u", "exact outside"]
    share = LOST.double().mean().item()

    def decibels(*errors: float) -> float:
        return float(np.mean([10 * math.log10(4 / error) for error in errors]))

    assert table["psnr inside"].tolist() == pytest.approx([decibels(0.04, 0.16)] * 2)
    whole = [share * i**2 + (1 - share) * o**2 for i, o in ((0.2, 0.1), (0.4, 0.3))]
    assert table["psnr"]["u"] == pytest.approx(decibels(*whole))
    assert table["psnr"]["exact outside"] == pytest.approx(decibels(0.04 * share, 0.16 * share))


def test_the_check_fires_where_weights_are_not_the_models() -> None:
    """A bilevel model with a `C` of its own, and a DEQ without one."""
    tied, free = make_run(), make_run("deq")
    for wrong in (replace(tied, weights=free.weights), replace(free, weights=tied.weights)):
        with pytest.raises(AssertionError, match="ours: weights"):
            reconstructions.check_weights({"ours": wrong})


@pytest.mark.parametrize("profile", FACES_PROFILES)
def test_the_step_of_filling_is_admissible(profile: str) -> None:
    """`1 / (lambda + s ||A||^2)` to 1 %, for kernels of the norm that training gives them."""
    config = faces_config(profile, "inpainting", **FILLING)
    longest = 1 / (config.lam + config.sharpness * GRADIENT_NORM**2)
    assert config.tau == pytest.approx(longest, rel=0.01)
    assert config.tau < 2 * longest
    naive = faces_config(profile, "inpainting")
    assert naive.solver == "plain"
    assert naive.warm_start is False


def test_the_figure_shows_pictures_errors_and_residuals() -> None:
    """Each picture under its title with its PSNR inside the mask, and the curves that were given."""
    run = make_run()
    truth, f = reconstructions.test_data(run.config)
    face = truth[0, 0]
    off = face + 0.2 * LOST
    images = {"truth": face, "input": f[0, 0], "off by 0.2": off}
    errors = {"naive": {1: 0.5, 10: 0.25}, "ours": {1: 0.5, 10: 0.05}}
    residuals = {"naive, plain": np.array([1.0, 0.5, 0.1])}
    fig = inpainting.inpainting_figure(images, face, LOST, errors, residuals, run, "smoke")
    pictures = [axis for axis in fig.axes if axis.images]
    assert [axis.get_title() for axis in pictures] == list(images)
    for axis, picture in zip(pictures, images.values(), strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), picture)
        assert axis.images[0].get_clim() == (-1, 1)
    assert pictures[0].get_xlabel() == ""
    error = (f[0, 0] - face)[LOST].square().mean().item()
    assert pictures[1].get_xlabel() == f"{10 * math.log10(4 / error):.1f} dB inside"
    assert pictures[2].get_xlabel() == "20.0 dB inside"
    left, right = (axis for axis in fig.axes if axis.lines)
    assert {line.get_label(): list(line.get_ydata()) for line in left.lines} == {
        name: list(error.values()) for name, error in errors.items()
    }
    assert list(left.lines[0].get_xdata()) == [1, 10]
    (curve,) = right.lines
    assert list(curve.get_xdata()) == [1, 2, 3]
    assert list(curve.get_ydata()) == [1.0, 0.5, 0.1]
    assert curve.get_label() == "naive, plain"
