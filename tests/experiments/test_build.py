"""Construction of operators, models, solvers and trainings from configurations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lib.experiments import build
from lib.experiments.config import FacesConfig, RunConfig
from lib.experiments.data import DataError, mnist, photographs
from lib.implicit import NeumannSeries
from lib.kernels import cosine_kernels, difference_kernels
from lib.operators import CircularBlur, Identity, Mask
from lib.regularizer import LINEAR, RELU, SOFTSHRINK, ConvFieldsOfExperts, DenseFieldsOfExperts
from lib.solvers import Anderson, PlainIteration
from lib.training import LBFGS, Adam, generator, observe

DIGITS: dict[str, Any] = {"size": 14, "train_images": 20, "test_images": 10, "batch_size": 10, "epochs": 1}
FACES: dict[str, Any] = {"reduction": 8, "train_images": 2, "test_images": 2, "epochs": 1, "filter_size": 3}


def test_task_selects_operator() -> None:
    """Top rows and a blur of 5 pixels for digits, a central block and `blur` pixels for photographs."""
    ones = torch.ones(1, 1, 28, 28)
    assert isinstance(build.make_operator(RunConfig(task="denoising")), Identity)
    mask = build.make_operator(RunConfig(task="inpainting"))
    assert isinstance(mask, Mask)
    assert mask.forward(ones)[0, 0, :, 0].tolist() == [0] * 10 + [1] * 18
    blur = build.make_operator(RunConfig(task="deblurring"))
    assert isinstance(blur, CircularBlur)
    assert torch.equal(blur.kernel, torch.eye(5) / 5)
    block = build.make_operator(FacesConfig(task="inpainting"))
    expected = torch.ones(112, 92)
    expected[42:70, 34:57] = 0
    assert torch.equal(block.forward(torch.ones(112, 92)), expected)
    wide = build.make_operator(FacesConfig(task="deblurring", blur=7))
    assert isinstance(wide, CircularBlur)
    assert torch.equal(wide.kernel, torch.eye(7) / 7)
    with pytest.raises(ValueError, match=r"^`blur` must be at most 9 for these images, got 11\.$"):
        build.make_operator(FacesConfig(task="deblurring"), (9, 30))


@pytest.mark.parametrize(
    ("sigma", "activation"), [("relu", RELU), ("softshrink", SOFTSHRINK), ("identity", LINEAR)]
)
@pytest.mark.parametrize("name", ["bilevel", "deq"])
def test_model_selects_synthesis_and_activation(name: str, sigma: str, activation: object) -> None:
    """Each member of a stack has its `gamma` and `tau`."""
    config = RunConfig(model=name, sigma=sigma, **DIGITS)
    model = build.make_model([config, config.model_copy(update={"gamma": 0.25, "tau": 0.2})])
    field = model.regularizer
    assert isinstance(field, DenseFieldsOfExperts)
    assert field.activation is activation
    assert (field.C is None) == (name == "bilevel")
    assert field.A.shape == (2, 196, 196)
    assert model.gamma.tolist() == pytest.approx([config.gamma, 0.25])
    assert model.tau.tolist() == pytest.approx([config.tau, 0.2])


def test_tied_start_changes_c_alone() -> None:
    tied, independent = (
        build.make_model([RunConfig(model="deq", initial=initial, **DIGITS)]).regularizer
        for initial in ("tied", "independent")
    )
    assert torch.equal(tied.A, tied.C)
    assert torch.equal(tied.A, independent.A)
    assert torch.equal(tied.b, independent.b)
    assert not torch.equal(independent.A, independent.C)


@pytest.mark.parametrize("name", ["bilevel", "deq"])
def test_photograph_model_has_normalized_kernels(name: str) -> None:
    """`C` starts as `A`, and a learned weight at `lam`."""
    config = FacesConfig(model=name, learn_weight=True, optimizer="lbfgs", lam=7.0, **FACES)
    model = build.make_model([config])
    field = model.regularizer
    assert isinstance(field, ConvFieldsOfExperts)
    assert field.normalized
    assert field.activation.steepest == config.sharpness
    assert model.lam.item() == pytest.approx(7.0)
    assert (field.C is None) == (name == "bilevel")
    assert field.C is None or (torch.equal(field.C, field.A) and field.C is not field.A)


@pytest.mark.parametrize("initial", ["first", "second", "cosine", "random"])
def test_initial_selects_kernels(initial: str) -> None:
    config = FacesConfig(initial=initial, filters=4, seed=3, **FACES)
    kernels = build.initial_kernels(config)
    expected = {
        "first": difference_kernels(1, 4, 3),
        "second": difference_kernels(2, 4, 3),
        "cosine": cosine_kernels(4, 3),
    }
    assert torch.equal(kernels, expected.get(initial, kernels))
    other = build.initial_kernels(config.model_copy(update={"seed": 4}))
    assert torch.equal(kernels, other) == (initial != "random")


def test_kernels_start_from_another_run() -> None:
    """The weights of that run are required and copied exactly; a weighted `C` starts as `A`.

    Its learned `lam` starts a run that learns it too; a fixed one is kept.
    """
    config = FacesConfig(initial=FacesConfig(**FACES), task="deblurring", blur=3, **FACES)
    A = torch.randn(2, 3, 3)
    model = build.make_model([config], {"A": A})
    assert torch.equal(model.regularizer.A[0], A)
    for learned, lam in ((False, config.lam), (True, 3.0)):
        own = FacesConfig(**dict(config) | {"learn_weight": learned})
        assert build.make_model([own], {"A": A, "lam": torch.tensor(3.0)}).lam.item() == pytest.approx(lam)
    weighted = FacesConfig(**dict(config) | {"model": "deq", "coupling": "weighted"})
    field = build.make_model([weighted], {"A": A}).regularizer
    assert torch.equal(field.acting("C"), field.acting("A"))
    with pytest.raises(ValueError, match=r"^`start` must be the weights of the run"):
        build.make_model([config])


def test_options_select_solvers() -> None:
    """The adjoint has the solver of the fixed point, or a Neumann series where `K` loses information."""
    numbers = {"tol": 1e-4, "max_steps": 77, "patience": 9}
    plain = RunConfig(solver="plain", **DIGITS, **numbers)
    assert build.make_solver(plain) == PlainIteration(1e-4, 77, 9)
    options = {"memory": 3, "regularization": 1e-5, "beta": 0.5}
    config = RunConfig(**DIGITS, **numbers, **options)
    assert build.make_solver(config) == Anderson(1e-4, 77, 3, 1e-5, 0.5, 9)
    assert build.make_adjoint_solver(config) == build.make_solver(config)
    looser = config.model_copy(update={"adjoint_tol": 0.1})
    assert build.make_adjoint_solver(looser) == replace(build.make_solver(config), tol=0.1)
    series = RunConfig(task="inpainting", neumann_steps=7, **DIGITS, **numbers)
    assert build.make_adjoint_solver(series) == NeumannSeries(7, 1e-4)
    solved = RunConfig(task="inpainting", adjoint="solved", **DIGITS, **numbers)
    assert build.make_adjoint_solver(solved) == build.make_solver(solved)
    preconditioned = RunConfig(task="inpainting", precondition=True, **DIGITS, **numbers)
    short = replace(build.make_solver(preconditioned), max_steps=build.PRECONDITIONED_STEPS)
    assert build.make_adjoint_solver(preconditioned) == short


def test_training_follows_configurations() -> None:
    configs = [RunConfig(noise=noise, seed=5, **DIGITS) for noise in (0.1, 0.2)]
    training = build.make_training(configs)
    assert training.noise.tolist() == pytest.approx([0.1, 0.2])
    assert torch.equal(training.images, mnist("train", 20, 14))
    assert training.test is not None
    assert torch.equal(training.test, mnist("test", 10, 14))
    assert (training.steps, build.total_steps(configs[0])) == (2, 2)
    assert isinstance(training.schedule, Adam)
    assert (training.seed, training.warm_start, training.precondition) == (5, False, False)
    ours = build.make_training([FacesConfig(optimizer="lbfgs", **FACES)])
    assert isinstance(ours.schedule, LBFGS)
    assert ours.warm_start
    f = torch.ones(1, 2, 1, 14, 11)
    assert torch.equal(ours.start(f), f)


@pytest.mark.parametrize(
    "values", [{"task": "inpainting"}, {"model": "deq"}, {"seed": 1}, {"epochs": 3}, {"tol": 1e-4}]
)
def test_mixed_stacks_are_rejected(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="may differ in noise, tau, gamma, lam only"):
        build.make_training([RunConfig(**DIGITS), RunConfig(**DIGITS | values)])


WEIGHTED = {"model": "deq", "coupling": "weighted"}


@pytest.mark.parametrize("values", [{"learn_weight": True}, WEIGHTED, WEIGHTED | {"learn_weight": True}])
def test_trained_model_has_last_test_loss(values: dict[str, Any]) -> None:
    """Recompute the mean squared error on the test images with the test noise, and the step size."""
    config = FacesConfig(tol=1e-5, sharpness=20.0, **FACES, **values)
    training = build.make_training([config])
    (history,) = training.run()
    model, images = build.trained_model(config, history.weights), build.load_images(config)["test"]
    f = observe(model.operator, images, torch.tensor(config.noise), generator(config.seed, "test noise"))
    loss = (build.solve(model, f, config).value - images).square().mean().item()
    assert loss == pytest.approx(history.rows[-1]["test_loss"], rel=1e-2)
    assert model.tau.item() == pytest.approx(training.model.tau.item(), rel=1e-4)


def test_photographs_of_folder_are_split_cropped_and_averaged(tmp_path: Path) -> None:
    """The first images by name train and the last ones test, cropped to the smallest size."""
    images = [np.random.default_rng(k).integers(0, 256, (20 + k, 24), dtype=np.uint8) for k in range(4)]
    for number in (2, 0, 3, 1):
        Image.fromarray(images[number]).save(tmp_path / f"{number}.png")
    (tmp_path / "README.txt").write_text("no image")
    loaded = photographs(str(tmp_path), 2, 1)
    assert torch.equal(loaded["train"][0, 0], torch.from_numpy(images[0]) / 127.5 - 1)
    assert [split.shape for split in loaded.values()] == [(2, 1, 20, 24), (1, 1, 20, 24)]
    reduced = photographs(str(tmp_path), 2, 1, reduction=2)["train"]
    blocks = loaded["train"].reshape(2, 1, 10, 2, 12, 2).mean((3, 5))
    torch.testing.assert_close(reduced, blocks, rtol=0, atol=1e-6)
    for arguments, message in (
        ((3, 2), "must be at most 4, the images in "),
        ((1, 1, 3), "`reduction` must be at most 2 for images of 20 pixels, got 3."),
    ):
        with pytest.raises(DataError, match=message):
            photographs(str(tmp_path), *arguments)
    config = FacesConfig(dataset=str(tmp_path), train_images=2, test_images=1)
    assert build.image_shape(config) == (20, 24)
