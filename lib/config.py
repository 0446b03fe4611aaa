"""What a run is: one validated, immutable configuration, and the profiles that choose its size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MNIST_SIDE, MNIST_TRAIN, MNIST_TEST, BLUR_SIDE = 28, 60_000, 10_000, 5

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class ConfigError(ValueError):
    """A value that makes no sense, in one line: the parameter, what it was and what is allowed."""


class RunConfig(BaseModel):
    """One training run. The defaults are the paper's for MNIST.

    Attributes:
        dataset: where the images come from.
        model: `bilevel` (`C = A`) or `deq` (free `C`).
        task: the operator `K`.
        noise: standard deviation of the Gaussian noise added after `K`, images being in [-1, 1].
        tau: step size; also the threshold of softshrink.
        gamma: weight of the regularizer.
        lam: weight `lambda` of the data term.
        sigma: activation of the experts.
        size: side of the images in pixels; below 28, MNIST is averaged over blocks.
        train_images, test_images: how many images of each split, the first ones.
        batch_size: images in an optimizer step.
        epochs: passes over the training images.
        learning_rate, final_learning_rate: Adam's, with a cosine decay over all steps.
        solver: for the fixed point and for the adjoint equation.
        tol: relative residual at which a sample has converged.
        max_steps: evaluations of the step map at most, in each solve.
        memory, regularization, beta: of Anderson acceleration.
        seed: of every random number.
        time_budget: seconds of training after which the run is stopped and marked `out of time`.

    Raises:
        ConfigError: a value is of the wrong type, outside its range, or at odds with another one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    dataset: Literal["mnist"] = "mnist"
    model: Literal["bilevel", "deq"] = "bilevel"
    task: Literal["denoising", "inpainting", "deblurring"] = "denoising"
    noise: NonNegative = 0.1
    tau: Positive = 0.5
    gamma: NonNegative = 0.1
    lam: Positive = 1.0
    sigma: Literal["relu", "softshrink", "identity"] = "relu"
    size: Annotated[int, Field(ge=1, le=MNIST_SIDE)] = MNIST_SIDE
    train_images: Annotated[int, Field(ge=1, le=MNIST_TRAIN)] = MNIST_TRAIN
    test_images: Annotated[int, Field(ge=1, le=MNIST_TEST)] = MNIST_TEST
    batch_size: Count = 100
    epochs: Count = 100
    learning_rate: Positive = 1e-3
    final_learning_rate: NonNegative = 1e-6
    solver: Literal["anderson", "plain"] = "anderson"
    tol: Positive = 1e-3
    max_steps: Count = 50
    memory: Count = 5
    regularization: Positive = 1e-4
    beta: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    time_budget: Positive = 3600.0

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if MNIST_SIDE % self.size:
            raise ValueError(f"size: got {self.size}, allowed: a divisor of {MNIST_SIDE}")
        if self.task == "deblurring" and self.size < BLUR_SIDE:
            raise ValueError(
                f"task: got 'deblurring' of {self.size}x{self.size} images, allowed: images of at "
                f"least the blur's {BLUR_SIDE}x{BLUR_SIDE}"
            )
        if self.batch_size > self.train_images:
            raise ValueError(
                f"batch_size: got {shown(self.batch_size)}, allowed: at most train_images = "
                f"{self.train_images}"
            )
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate: got {self.final_learning_rate}, allowed: at most "
                f"learning_rate = {self.learning_rate}"
            )
        return self


def _one_line(error: ValidationError) -> str:
    problems = []
    for problem in error.errors(include_url=False):
        if problem["type"] == "value_error":
            problems.append(str(problem["ctx"]["error"]))
            continue
        name = ".".join(shown(part) if "\n" in str(part) else str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            problems.append(f"{name}: no such parameter, allowed: {', '.join(RunConfig.model_fields)}")
            continue
        message = problem["msg"].removeprefix("Input should be ")
        problems.append(f"{name}: got {shown(problem['input'])}, allowed: {message}")
    return "; ".join(problems)


def shown(value: object) -> str:
    """A value as it can stand in one short line, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 80 else f"{text[:77]}..."


def parse_parameters(pairs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Names and values from a command line; a value is YAML, with numbers such as 1e-3 as well.

    Raises:
        ConfigError: a value cannot be parsed.
    """
    parsed = {}
    for name, text in pairs:
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            raise ConfigError(f"{name}: got {shown(text)}, allowed: a value or a list of values") from None
        parsed[name] = [_number(v) for v in value] if isinstance(value, list) else _number(value)
    return parsed


def _number(value: object) -> object:
    """YAML takes 1e-3 for a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def require_positive(**values: object) -> None:
    """Refuse values that are not positive finite numbers; None stands for a default and passes.

    Raises:
        ConfigError: names the value.
    """
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 < float(value) < math.inf):  # type: ignore[arg-type]
            raise ConfigError(f"{name}: got {shown(value)}, allowed: a positive number")


PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    # The pipeline's parts in seconds, for the tests.
    "smoke": {
        "all": {"size": 14, "train_images": 200, "test_images": 100, "epochs": 2, "noise": 0.5},
    },
    # Pictures that one can read, in minutes on two cores.
    "quick": {
        "all": {"train_images": 3_000, "test_images": 500, "noise": 0.1},
        # Many cheap steps, on images of half the resolution: the weights that remove noise grow slowly.
        "denoising": {"size": 14, "epochs": 50, "noise": 0.5},
        # With the wider ridge a DEQ whose solves do not converge ends with smaller residuals.
        "inpainting": {"epochs": 2, "regularization": 1e-2},
        "deblurring": {"epochs": 2},
    },
    # The paper's sizes, which are the defaults of `RunConfig`.
    "paper": {
        "all": {},
        "denoising": {"noise": 0.5},
    },
}
"""What each profile changes in the defaults: for all tasks, then for one task."""


def profile_config(profile: str, task: str, **values: Any) -> RunConfig:
    """The configuration of a profile for a task, with the given values on top (None: the profile's).

    Raises:
        ConfigError: the profile is unknown, or a value is refused by `RunConfig`.
    """
    if profile not in PROFILES:
        raise ConfigError(f"profile: got {profile!r}, allowed: {', '.join(PROFILES)}")
    chosen = PROFILES[profile]["all"] | PROFILES[profile].get(task, {})
    given = {name: value for name, value in values.items() if value is not None}
    return RunConfig(**chosen | {"task": task} | given)


GRID: dict[str, tuple[Any, ...]] = {
    # The expensive tasks first, so that the last stacks of a sweep are short ones.
    "task": ("deblurring", "inpainting", "denoising"),
    "model": ("deq", "bilevel"),
    "sigma": ("relu", "softshrink", "identity"),
    "noise": (0.0, 0.05, 0.1, 0.5, 1.0),
    "tau": (0.01, 0.1, 0.5, 0.9, 1.1, 2.1),
    "gamma": (0.1, 0.5, 1.0),
}
"""The axes of the paper's grid on MNIST, and 0.5 among the steps, which its pictures use."""

SWEEPS: dict[str, dict[str, Any]] = {
    # A handful, one of whose steps is too long.
    "smoke": {"noise": 0.1, "tau": (0.5, 2.1), "gamma": 1.0, "sigma": "identity"}
    | {"size": 7, "train_images": 60, "test_images": 40, "batch_size": 20, "epochs": 2},
    # A short training of a third of the grid: 80 steps on images of half the resolution.
    "quick": {"tau": (0.1, 0.9), "size": 14, "train_images": 320, "test_images": 100}
    | {"batch_size": 20, "epochs": 5, "time_budget": 60.0},
    # The paper's sizes, which are the defaults of `RunConfig`.
    "paper": {},
}
"""What each profile changes in `GRID` and in the defaults of `RunConfig`."""


def grid(profile: str, /, **values: Any) -> list[RunConfig]:
    """The configurations of a sweep: all combinations of the values of all axes.

    Args:
        profile: name of the profile, whose sweep is the start.
        values: for any parameter of `RunConfig` a value, or a list or tuple of values to make it an axis;
            None leaves the profile's.

    Raises:
        ConfigError: the profile is unknown, an axis is empty, or a value is refused by `RunConfig`.
    """
    if profile not in SWEEPS:
        raise ConfigError(f"profile: got {profile!r}, allowed: {', '.join(SWEEPS)}")
    chosen = GRID | SWEEPS[profile] | {name: v for name, v in values.items() if v is not None}
    axes = {name: list(v) if isinstance(v, list | tuple) else [v] for name, v in chosen.items()}
    for name, levels in axes.items():
        if not levels:
            raise ConfigError(f"{name}: got an empty list, allowed: one value or more")
    return list(
        dict.fromkeys(RunConfig(**dict(zip(axes, levels, strict=True))) for levels in product(*axes.values()))
    )
