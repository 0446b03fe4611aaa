"""What a configuration means: its images, `K`, model, solvers, data and first iterates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lib.experiments import data
from lib.experiments.config import ConfigError, FacesConfig, RunConfig, TrainingConfig
from lib.implicit import NeumannSeries, Solve
from lib.kernels import initial_kernels
from lib.models import FixedPointModel, build_conv_model, build_model, is_free
from lib.operators import Operator, forward_operator
from lib.regularizer import initial_weights, smoothed_sign
from lib.solvers import Anderson, PlainIteration, Solution, Solver, fixed_point

TEST_BATCH = 100
"""Images in a batch of the evaluation."""

PRECONDITIONED_STEPS = 4
"""Steps of a preconditioned adjoint solve at most, in the place of the Neumann series."""

Config = RunConfig | FacesConfig

Weights = dict[str, Tensor]


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A generator of its own for every purpose, so that no draw depends on what was drawn before."""
    label = "/".join(str(part) for part in (seed, *purpose))
    digest = hashlib.sha256(label.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def require_device(config: TrainingConfig, device: torch.device) -> None:
    """Refuse a configuration that a device cannot train.

    Raises:
        ConfigError: names the parameter.
    """
    if config.precision == "tf32" and device.type != "cuda":
        raise ConfigError("precision: got 'tf32', allowed: float32 where there is no GPU")


def make_solver(config: TrainingConfig) -> Solver:
    if config.solver == "plain":
        return PlainIteration(config.tol, config.max_steps, config.patience)
    c = config
    return Anderson(c.tol, c.max_steps, c.memory, c.regularization, c.beta, c.patience)


def make_adjoint_solver(config: TrainingConfig) -> Solver | NeumannSeries:
    """The solver of the adjoint equation, or what takes its place."""
    solver = replace(make_solver(config), tol=config.adjoint_tol or config.tol)
    if config.adjoint == "solved":
        return solver
    if isinstance(config, RunConfig) and is_preconditioned(config) and config.neumann_steps > 0:
        return replace(solver, max_steps=PRECONDITIONED_STEPS)
    return NeumannSeries(config.neumann_steps, solver.tol)


def is_preconditioned(config: TrainingConfig) -> bool:
    """Whether both solves of a configuration are preconditioned."""
    able = isinstance(config, FacesConfig) or not is_free(config.model)
    return config.precondition and able


def load_images(config: Config) -> dict[str, Tensor]:
    """The images of a configuration, `train` and `test`, `(N, 1, H, W)` in [-1, 1].

    Raises:
        DataError: the data cannot be had.
    """
    if isinstance(config, FacesConfig):
        return data.photographs(config.dataset, config.train_images, config.test_images, config.reduction)
    counts = {"train": config.train_images, "test": config.test_images}
    return {split: data.mnist(split, count, config.size) for split, count in counts.items()}


def image_shape(config: Config) -> tuple[int, int]:
    """Height and width of the images of a configuration in pixels."""
    if isinstance(config, RunConfig):
        return config.size, config.size
    height, width = load_images(config)["test"].shape[-2:]
    return height, width


def make_operator(config: Config, shape: tuple[int, int] | None = None) -> Operator:
    """The operator `K` of a configuration, for images of another shape where one is given.

    Raises:
        ConfigError: the blur is larger than the images.
    """
    height, width = shape or image_shape(config)
    if isinstance(config, FacesConfig):
        if config.task == "deblurring" and config.blur > min(height, width):
            raise ConfigError(
                f"blur: got {config.blur}, allowed: at most the images' {min(height, width)} pixels"
            )
        return forward_operator(config.task, height, width, faces=True, blur=config.blur)
    return forward_operator(config.task, height, width)


def make_model(configs: Sequence[Config], start: Weights | None = None) -> FixedPointModel:
    """The untrained models of a stack, with one leading dimension of `len(configs)`.

    Args:
        configs: of the members, which differ at most in `STACKED`.
        start: the weights to start from when `initial` is another run's configuration.
    """
    first = configs[0]
    shape = image_shape(first)

    def stacked(weight: Tensor) -> Tensor:
        return weight.expand(len(configs), *weight.shape).clone()

    if isinstance(first, RunConfig):
        drawn = initial_weights(first.size**2, generator(first.seed, "weights"))
        start = dict(zip(("A", "b", "C"), drawn, strict=True))
    elif isinstance(first.initial, str):
        draws = generator(first.seed, "kernels")
        A = initial_kernels(first.initial, first.filters, first.filter_size, draws)
        start = {"A": A, "C": A}
    elif start is None:
        raise ValueError("start: got None, allowed: the weights of the run that `initial` names")
    weights = {name: stacked(weight) for name, weight in start.items()}
    direction = stacked(torch.randn(1, 1, *shape, generator=generator(first.seed, "direction")))
    return _model(configs, weights, make_operator(first, shape), direction)


def trained_model(
    config: Config, weights: Weights, stacked: bool = False, shape: tuple[int, int] | None = None
) -> FixedPointModel:
    """The model with weights that a training ended with.

    Args:
        weights: `A`, `b` or none, and for a DEQ `C`.
        stacked: give it the leading dimension that it was trained with.
        shape: of the images; that of the training's when None.
    """
    if stacked:
        weights = {name: weight[None] for name, weight in weights.items()}
    return _model([config] if stacked else config, weights, make_operator(config, shape))


def _model(
    configs: Sequence[Config] | Config, weights: Weights, operator: Operator, direction: Tensor | None = None
) -> FixedPointModel:
    first = configs[0] if isinstance(configs, Sequence) else configs
    numbers = {
        name: torch.tensor(
            [getattr(c, name) for c in configs] if isinstance(configs, Sequence) else getattr(configs, name)
        )
        for name in ("tau", "lam", "gamma")
    }
    numbers |= {"lam": weights["lam"]} if "lam" in weights else {}
    C = weights.get("C", weights["A"])
    if isinstance(first, RunConfig):
        matrices = (weights["A"], weights["b"], C)
        return build_model(first.model, operator, matrices, first.sigma, **numbers)
    activation = smoothed_sign(first.sharpness)
    return build_conv_model(
        first.model,
        operator,
        (weights["A"], C),
        activation,
        direction,
        tau=numbers["tau"],
        lam=numbers["lam"],
        gamma=numbers["gamma"],
        learn_weight=first.learn_weight,
        differentiate_norm=first.differentiate_norm,
    )


def observe(operator: Operator, images: Tensor, noise: Tensor, n: Tensor) -> Tensor:
    """Data `f = K u + noise n`, `(*stack, N, C, H, W)`: the same `n` for all members of a stack.

    `u`, the `images`, and `n`, standard normal, are `(N, C, H, W)`; the deviations `noise` are `(*stack)`.
    """
    return operator.forward(images) + noise[..., None, None, None, None] * n


def first_iterate(f: Tensor, config: TrainingConfig) -> Tensor:
    """`u^0` for the data `f`."""
    return f if config.start == "data" else torch.zeros_like(f)


def solve(
    model: FixedPointModel,
    f: Tensor,
    config: TrainingConfig,
    P: Tensor | None = None,
    solver: Solve = fixed_point,
) -> Solution:
    """Reconstruct the data `f`, `(*stack, N, C, H, W)`, with a model and its configuration's solver.

    Args:
        model: as trained with `config`.
        f: data.
        config: of the training.
        P: the model's preconditioner, for a configuration that has one; made when None.
        solver: what solves, as `fixed_point` does.
    """
    if P is None and is_preconditioned(config):
        P = model.preconditioner(f.shape[-3:])
    return solver(model.problem(f, P), first_iterate(f, config), make_solver(config))


def test_noise(config: Config) -> Tensor:
    """The noise `n` of the test images, `(N, 1, H, W)`: the same in every epoch and every figure."""
    shape = (config.test_images, 1, *image_shape(config))
    return torch.randn(shape, generator=generator(config.seed, "test noise"))


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of mean squared errors of images in [-1, 1]."""
    return 10 * torch.log10(4 / mse.clamp_min(1e-12))


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: results then do not depend on how many cores there are.

    The products of a batch are too small to gain from a second thread, and threads that wait for each
    other make two trainings at once many times slower; processes use the other cores (see `runs`).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
