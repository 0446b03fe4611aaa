"""Construction of images, `K`, models, solvers and trainings from configurations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lib.experiments import data
from lib.experiments.config import BLUR_SIDE, ConfigError, FacesConfig, RunConfig, TrainingConfig
from lib.implicit import NeumannSeries
from lib.kernels import cosine_kernels, difference_kernels
from lib.models import FixedPointModel
from lib.operators import (
    CircularBlur,
    Identity,
    Mask,
    Operator,
    central_block_mask,
    diagonal_motion_kernel,
    top_rows_mask,
)
from lib.regularizer import (
    LINEAR,
    RELU,
    SOFTSHRINK,
    ConvFieldsOfExperts,
    DenseFieldsOfExperts,
    LearnedSpline,
    WeaklyConvexExperts,
    WeightedExperts,
    initial_weights,
    smoothed_sign,
)
from lib.solvers import Anderson, PlainIteration, Solution, Solver, fixed_point
from lib.training import LBFGS, Adam, Training, generator, one_thread

ACTIVATIONS = {"relu": RELU, "softshrink": SOFTSHRINK, "identity": LINEAR}

STACKED = ("noise", "tau", "gamma", "lam")
"""Parameters in which the members of a stack may differ."""

PRECONDITIONED_STEPS = 4
"""Maximum number of steps of a preconditioned adjoint solve, which replaces the Neumann series."""

SPLINE_STEP = 0.05
"""Step size of kernels with a learned potential; their solves are preconditioned and hardly depend on it."""

Config = RunConfig | FacesConfig

Weights = dict[str, Tensor]


def require_device(config: TrainingConfig, device: torch.device) -> None:
    """Raise `ConfigError` if a device cannot train a configuration."""
    if config.precision == "tf32" and device.type != "cuda":
        raise ConfigError("`precision` must be float32 without a GPU, got 'tf32'.")


def shared(config: Config) -> Config:
    """Return a configuration with the defaults of `STACKED`, the same for all members of a stack."""
    return config.model_copy(update={name: type(config).model_fields[name].default for name in STACKED})


def make_training(
    configs: Sequence[Config], device: torch.device | str = "cpu", start: Weights | None = None
) -> Training:
    """Return the training of a stack of configurations that differ at most in `STACKED`.

    Args:
        configs: configurations of the members.
        device: device of the training.
        start: initial weights if `initial` is the configuration of another run.

    Raises:
        ValueError: the configurations cannot share a stack.
        ConfigError: the device cannot train them.
    """
    config, device = configs[0], torch.device(device)
    if any(shared(other) != shared(config) for other in configs):
        raise ValueError(f"Members of a stack may differ in {', '.join(STACKED)} only.")
    require_device(config, device)
    images = {split: tensor.to(device) for split, tensor in load_images(config).items()}
    lbfgs = isinstance(config, FacesConfig) and config.optimizer == "lbfgs"
    adam = Adam(config.learning_rate, config.final_learning_rate, config.schedule)
    with one_thread():
        return Training(
            make_model(configs, start).to(device),
            images["train"],
            torch.tensor([c.noise for c in configs]),
            epochs=config.epochs,
            batch_size=config.batch_size,
            optimizer=LBFGS() if lbfgs else adam,
            solver=make_solver(config),
            adjoint=make_adjoint_solver(config),
            start=first_iterate(config),
            precondition=is_preconditioned(config),
            warm_start=isinstance(config, FacesConfig) and config.warm_start,
            test=images["test"],
            test_every=config.test_every,
            time_budget=config.time_budget,
            precision=config.precision,
            seed=config.seed,
        )


def total_steps(config: Config) -> int:
    """Return the number of optimizer steps of a training."""
    return config.epochs * math.ceil(config.train_images / config.batch_size)


def make_solver(config: TrainingConfig) -> Solver:
    """Return the solver of the fixed point."""
    if config.solver == "plain":
        return PlainIteration(config.tol, config.max_steps, config.patience)
    c = config
    return Anderson(c.tol, c.max_steps, c.memory, c.regularization, c.beta, c.patience)


def make_adjoint_solver(config: TrainingConfig) -> Solver | NeumannSeries:
    """Return the solver of the adjoint equation, or the Neumann series."""
    solver = replace(make_solver(config), tol=config.adjoint_tol or config.tol)
    if config.adjoint == "solved":
        return solver
    if isinstance(config, RunConfig) and is_preconditioned(config) and config.neumann_steps > 0:
        return replace(solver, max_steps=PRECONDITIONED_STEPS)
    return NeumannSeries(config.neumann_steps, solver.tol)


def is_preconditioned(config: TrainingConfig) -> bool:
    """Return whether both solves of a configuration are preconditioned."""
    return config.precondition and (isinstance(config, FacesConfig) or config.model == "bilevel")


def load_images(config: Config) -> dict[str, Tensor]:
    """Return the images of a configuration, `train` and `test`, `(N, 1, H, W)` in [-1, 1]."""
    if isinstance(config, FacesConfig):
        return data.photographs(config.dataset, config.train_images, config.test_images, config.reduction)
    counts = {"train": config.train_images, "test": config.test_images}
    return {split: data.mnist(split, count, config.size) for split, count in counts.items()}


def image_shape(config: Config) -> tuple[int, int]:
    """Return height and width of the images of a configuration in pixels."""
    if isinstance(config, RunConfig):
        return config.size, config.size
    height, width = load_images(config)["test"].shape[-2:]
    return height, width


def make_operator(config: Config, shape: tuple[int, int] | None = None) -> Operator:
    """Return the operator `K` of a configuration, for its images or images of another shape.

    Photographs lose a central block or are blurred over `blur` pixels; digits lose their top rows or are
    blurred over 5 pixels.

    Raises:
        ConfigError: the blur is larger than the images.
    """
    height, width = shape or image_shape(config)
    faces = isinstance(config, FacesConfig)
    if config.task == "denoising":
        return Identity()
    if config.task == "inpainting":
        return Mask((central_block_mask if faces else top_rows_mask)(height, width))
    blur = config.blur if isinstance(config, FacesConfig) else BLUR_SIDE
    if blur > min(height, width):
        raise ConfigError(f"`blur` must be at most {min(height, width)} for these images, got {blur}.")
    return CircularBlur(diagonal_motion_kernel(blur))


def initial_kernels(config: FacesConfig) -> Tensor:
    """Return the initial kernels `(filters, k, k)`, not normalized."""
    count, side = config.filters, config.filter_size
    if config.initial == "random":
        return torch.randn(count, side, side, generator=generator(config.seed, "kernels"))
    if config.initial == "cosine":
        return cosine_kernels(count, side)
    return difference_kernels(1 if config.initial == "first" else 2, count, side)


def make_model(configs: Sequence[Config], start: Weights | None = None) -> FixedPointModel:
    """Return the untrained models of a stack, with one leading dimension; arguments as in `make_training`."""
    first = configs[0]
    shape = image_shape(first)

    def stacked(weight: Tensor) -> Tensor:
        return weight.expand(len(configs), *weight.shape).clone()

    if isinstance(first, RunConfig):
        if isinstance(first.initial, str):
            A, b, C = initial_weights(first.size**2, generator(first.seed, "weights"))
            start = {"A": A, "b": b, "C": A if first.initial == "tied" else C}
    elif isinstance(first.initial, str):
        A = initial_kernels(first)
        start = {"A": A, "C": A}
    if start is None:
        raise ValueError("`start` must be the weights of the run in `initial`, got None.")
    numbers = {name: torch.tensor([getattr(c, name) for c in configs]) for name in ("tau", "lam", "gamma")}
    learned = isinstance(first, FacesConfig) and first.learn_weight
    weights = {name: stacked(weight) for name, weight in start.items() if name != "lam" or learned}
    direction = stacked(torch.randn(1, 1, *shape, generator=generator(first.seed, "direction")))
    return _model(first, numbers | weights, make_operator(first, shape), direction)


def trained_model(
    config: Config, weights: Weights, stacked: bool = False, shape: tuple[int, int] | None = None
) -> FixedPointModel:
    """Return the model with trained weights.

    Args:
        config: configuration of the training.
        weights: `A`, `b` of dense weights, `C` of a DEQ, and a learned `lam`.
        stacked: whether to add a leading dimension of size 1.
        shape: shape of the images; None takes that of the training.
    """
    numbers = {name: torch.tensor(getattr(config, name)) for name in ("tau", "lam", "gamma")}
    tensors = numbers | dict(weights)
    if stacked:
        tensors = {name: tensor[None] for name, tensor in tensors.items()}
    return _model(config, tensors, make_operator(config, shape))


def spline_experts(kernels: Mapping[str, Any]) -> ConvFieldsOfExperts:
    """Return experts with a learned potential: tensors or lists `A`, `knots`, `slopes`, and `C` or `p`."""
    names = ("A", "knots", "slopes", "C" if "C" in kernels else "p")
    A, knots, slopes, C = (torch.as_tensor(kernels[name]) for name in names)
    potential = LearnedSpline(knots, slopes, concave=len(slopes) < len(knots))
    if "C" in kernels:
        return ConvFieldsOfExperts(A, C, potential)
    weights = WeaklyConvexExperts(C.log(), 1.0, 1.0) if potential.concave else WeightedExperts(C.log())
    return ConvFieldsOfExperts(A, weights, potential)


def _model(
    config: Config, tensors: Weights, operator: Operator, direction: Tensor | None = None
) -> FixedPointModel:
    A, tau, lam, gamma = (tensors[name] for name in ("A", "tau", "lam", "gamma"))
    if "knots" in tensors:
        return FixedPointModel(operator, spline_experts(tensors), tau, lam, gamma)
    # The bilevel model is the special case C = A.
    C: Tensor | WeightedExperts | None = tensors.get("C", A) if config.model == "deq" else None
    if isinstance(config, RunConfig):
        dense = DenseFieldsOfExperts(A, tensors["b"], C, ACTIVATIONS[config.sigma])
        return FixedPointModel(operator, dense, tau, lam, gamma)
    if config.coupling == "weighted" and isinstance(C, Tensor):
        C = WeightedExperts(((C * A).sum((-2, -1)) / A.square().sum((-2, -1))).log())
    sigma = smoothed_sign(config.sharpness)
    kernels = ConvFieldsOfExperts(A, C, sigma, direction, config.differentiate_norm)
    return FixedPointModel(operator, kernels, tau, lam, gamma, config.learn_weight)


def first_iterate(config: TrainingConfig) -> Callable[[Tensor], Tensor]:
    """Return `f -> u^0`."""
    return (lambda f: f) if config.start == "data" else torch.zeros_like


def solve(model: FixedPointModel, f: Tensor, config: TrainingConfig) -> Solution:
    """Reconstruct the data `f`, `(*stack, N, C, H, W)`, with a trained model and its solver."""
    P = model.preconditioner(f.shape[-3:]) if is_preconditioned(config) else None
    return fixed_point(model.problem(f, P), first_iterate(config)(f), make_solver(config))
