"""What a run is: one validated, immutable configuration."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MNIST_SIDE, MNIST_TRAIN, MNIST_TEST, BLUR_SIDE = 28, 60_000, 10_000, 5

TASKS = ("denoising", "inpainting", "deblurring")
MODELS = ("bilevel", "deq")

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
CountOrZero = Annotated[int, Field(ge=0, le=1_000_000)]

LIMITS = {
    "noise": 10.0,
    "tau": 1e3,
    "gamma": 1e6,
    "lam": 1e6,
    "learning_rate": 10.0,
    "tol": 1.0,
    "adjoint_tol": 1.0,
    "memory": 1_000,
    "regularization": 1e6,
    "sharpness": 1e6,
    "time_budget": 1e9,
}
"""Largest values that make sense: with more noise the data alone would count as a divergence, a step of Adam
is about as long as the learning rate, larger factors overflow in single precision, and a history has to fit
into the memory."""

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, and bytes that are no text, which are in no name of a folder that one means."""


class ConfigError(ValueError):
    """A value that makes no sense, in one line: the parameter, what it was and what is allowed."""


class Checked(BaseModel):
    """Immutable values of declared types; nothing is converted.

    Raises:
        ConfigError: a value is of the wrong type, outside its range, or at odds with another one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_one_line(error, type(self))) from None


class TrainingConfig(Checked):
    """What every training run has: model, task, step map, optimizer and solver.

    Attributes:
        model: `bilevel` (`C = A`) or `deq` (free `C`).
        task: the operator `K`.
        noise: standard deviation of the Gaussian noise added after `K`, images being in [-1, 1].
        tau: step size; also the threshold of softshrink.
        gamma: weight of the regularizer.
        lam: weight `lambda` of the data term.
        train_images, test_images: how many images of each split.
        epochs: passes over the training images.
        learning_rate, final_learning_rate: Adam's, at the first step and after the last one.
        schedule: the decay between them over all steps.
        test_every: epochs from one evaluation on the test images to the next.
        solver: for the fixed point and for the adjoint equation.
        adjoint: whether the adjoint equation is `solved`, or a `neumann` series takes its solution's place.
        neumann_steps: highest power of the Jacobian in that series; 0 leaves the Jacobian out
            ("Jacobian-free").
        adjoint_tol: `tol` of the adjoint equation; the same when None.
        precondition: whether all solves are preconditioned with the mean curvature
            (`FixedPointModel.preconditioner`).
        start: first iterate of the fixed point, `zero` or the `data` `f`.
        tol: relative residual at which a sample has converged.
        max_steps: evaluations of the step map at most, in each solve.
        memory, regularization, beta: of Anderson acceleration.
        patience: evaluations after which a sample whose residual does not fall any more is given up; None
            goes on to `max_steps`.
        precision: of products of matrices: `float32`, or on a GPU alone `tf32`, whose factors are rounded.
        seed: of every random number.
        time_budget: seconds of training after which the run is stopped and marked `out of time`.
    """

    model: Literal["bilevel", "deq"] = "bilevel"
    task: Literal["denoising", "inpainting", "deblurring"] = "denoising"
    noise: NonNegative = 0.1
    tau: Positive
    gamma: NonNegative
    lam: Positive
    epochs: Count
    learning_rate: Positive
    final_learning_rate: NonNegative
    schedule: Literal["cosine", "linear"]
    test_every: Count = 1
    solver: Literal["anderson", "plain"] = "anderson"
    adjoint: Literal["solved", "neumann"] = "solved"
    neumann_steps: CountOrZero = 20
    adjoint_tol: Positive | None = None
    precondition: bool = False
    start: Literal["zero", "data"]
    tol: Positive
    max_steps: Count
    memory: Count = 5
    regularization: Positive = 1e-4
    beta: Annotated[float, Field(gt=0, le=1)] = 1.0
    patience: Count | None = None
    precision: Literal["float32", "tf32"] = "float32"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    time_budget: Positive

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        for name, limit in LIMITS.items():
            value = getattr(self, name, None)
            if value is not None and value > limit:
                raise ValueError(f"{name}: got {shown(value)}, allowed: at most {limit:g}")
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate: got {self.final_learning_rate}, allowed: at most "
                f"learning_rate = {self.learning_rate}"
            )
        return self


def _start(values: dict[str, Any]) -> Literal["zero", "data"]:
    """The data in denoising; the paper's zero where `K` loses something and a DEQ need not converge."""
    return "data" if values["task"] == "denoising" else "zero"


def _adjoint(values: dict[str, Any]) -> Literal["solved", "neumann"]:
    """A series where `K` loses something and the equation is ill-conditioned."""
    return "solved" if values["task"] == "denoising" else "neumann"


class RunConfig(TrainingConfig):
    """A training run on MNIST with dense fields of experts. The defaults are the paper's.

    `precondition`, `patience`, `adjoint` and the `start` of denoising are ours. Where `K` loses
    something, a free `C` may turn the map into no contraction, and after some steps the residual stays as it
    is: the steps after that change nothing but the time. There the adjoint equation is ill-conditioned as
    well. The paper's Anderson acceleration of it has a ridge far above the squares of its residuals and so
    averages plain iterations: its 50 steps have the hypergradient of some 20 of the Neumann series, which
    costs less (`results/bench/adjoints.csv`).

    Attributes:
        dataset: where the images come from.
        sigma: activation of the experts.
        size: side of the images in pixels; below 28, MNIST is averaged over blocks.
        batch_size: images in an optimizer step.
        precondition: for the bilevel model alone, with a few accelerated steps in the place of a Neumann
            series that is not 0; the DEQ's Jacobian has no sign to rely on, and its solves stay as they are.
    """

    dataset: Literal["mnist"] = "mnist"
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
    schedule: Literal["cosine", "linear"] = "cosine"
    adjoint: Literal["solved", "neumann"] = Field(default_factory=_adjoint)
    start: Literal["zero", "data"] = Field(default_factory=_start)
    tol: Positive = 1e-3
    max_steps: Count = 50
    patience: Count | None = 10
    time_budget: Positive = 3600.0

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
        return self


class FacesConfig(TrainingConfig):
    """A training run on photographs with convolutional fields of experts. The defaults are the paper's.

    The solver and its tolerance are ours: `make bench` compares loss and hypergradient with a solution at
    1e-10 (`results/bench/tolerances.csv`). Denoising needs 1e-4, deblurring 1e-5.

    Attributes:
        dataset: `faces` (the AT&T database), `celeba`, or the path of a folder of images.
        reduction: side of the blocks of pixels over which the images are averaged; 1 leaves them.
        blur: side of the motion kernel in pixels, for deblurring.
        filters: how many kernels `A` and `C` have.
        filter_size: their side in pixels, odd.
        initial: the kernels to start from: `first` or `second` order differences, the `cosine` basis,
            `random` ones, or those that the run of another configuration ended with.
        sharpness: `s` of `sigma(z) = tanh(s z)`.
        learn_weight: whether `lambda` is learned with the kernels, from `lam` on; the step then follows it,
            and `tau` is not used.
        differentiate_norm: whether the gradient goes through the kernels' norm, which it otherwise takes for
            a constant, as the paper does.
        optimizer: `adam`, or `lbfgs` with a line search, whose iterations are the epochs; it has no learning
            rate, and wants all images with their noise to stay (`warm_start`).
        precondition: for convolutions, which `K` is in denoising and deblurring.
        warm_start: every training image keeps its noise, and its solves start from the solutions of the last
            epoch; otherwise the noise is drawn anew in each epoch, and they start as the first ones do.
    """

    dataset: str = "faces"
    reduction: Annotated[int, Field(ge=1, le=64)] = 1
    train_images: Count = 10
    test_images: Count = 10
    blur: Annotated[int, Field(ge=1, le=99)] = 11
    tau: Positive = 1 / 800
    gamma: NonNegative = 1.0
    lam: Positive = 18.156
    filters: Annotated[int, Field(ge=1, le=1_000)] = 2
    filter_size: Annotated[int, Field(ge=3, le=31)] = 11
    initial: Literal["first", "second", "cosine", "random"] | FacesConfig = "random"
    sharpness: Positive = 100.0
    learn_weight: bool = False
    differentiate_norm: bool = False
    optimizer: Literal["adam", "lbfgs"] = "adam"
    warm_start: bool = True
    epochs: Count = 500
    learning_rate: Positive = 1e-2
    final_learning_rate: NonNegative = 1e-4
    schedule: Literal["cosine", "linear"] = "linear"
    test_every: Count = 10
    start: Literal["zero", "data"] = "data"
    tol: Positive = 1e-5
    max_steps: Count = 500
    memory: Count = 10
    time_budget: Positive = 36_000.0

    @property
    def batch_size(self) -> int:
        """All training images at once."""
        return self.train_images

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.precondition and self.task == "inpainting":
            raise ValueError("precondition: got True, allowed: False in inpainting: a mask is no convolution")
        if self.optimizer == "lbfgs" and not self.warm_start:
            raise ValueError("optimizer: got 'lbfgs', allowed: with warm_start = True, for one fixed loss")
        if self.filter_size % 2 == 0:
            raise ValueError(f"filter_size: got {self.filter_size}, allowed: an odd number")
        if self.dataset == "mnist" or not self.dataset or CONTROL.search(self.dataset):
            raise ValueError(
                f"dataset: got {shown(self.dataset)}, allowed: faces, celeba or a folder of images"
            )
        if isinstance(self.initial, str) and self.initial != "random":
            # Imported here because a value should be refused at once, and torch takes seconds to come.
            from lib.kernels import count_differences

            side, order = self.filter_size, 1 if self.initial == "first" else 2
            most = side**2 - 1 if self.initial == "cosine" else count_differences(order, side)
            if self.filters > most:
                raise ValueError(
                    f"filters: got {self.filters}, allowed: at most the {most} that start as {self.initial} "
                    f"in {self.filter_size}x{self.filter_size}"
                )
        if isinstance(self.initial, FacesConfig):
            for name in ("model", "filters", "filter_size"):
                ours, theirs = getattr(self, name), getattr(self.initial, name)
                if ours != theirs:
                    raise ValueError(f"initial: got kernels with {name} = {theirs!r}, allowed: {ours!r}")
        return self


def _one_line(error: ValidationError, kind: type[Checked]) -> str:
    problems: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        if problem["type"] == "default_factory_not_called":
            # A default that follows from the value of another problem.
            continue
        if problem["type"] == "value_error" and not problem["loc"]:
            problems.setdefault("", str(problem["ctx"]["error"]))
            continue
        part = problem["loc"][0]
        name = named(part)
        if problem["type"] == "extra_forbidden":
            said = f"{name}: no such parameter, allowed: {', '.join(kind.model_fields) or 'none'}"
        elif problem["type"] == "missing":
            said = f"{name}: it is missing"
        elif problem["type"] == "too_short":
            said = f"{name}: got an empty list, allowed: one value or more"
        else:
            message = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
            said = f"{name}: got {shown(problem['input'])}, allowed: {message}"
        # Of the alternatives of a union the first is named.
        problems.setdefault(name, said)
    return "; ".join(problems.values())


def shown(value: object) -> str:
    """A value as it can stand in one short line, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 80 else f"{text[:77]}..."


def named(name: object) -> str:
    """A name as it can stand in one short line: itself, or quoted if it is empty, long or not printable."""
    text = str(name)
    return text if text.isprintable() and 0 < len(text) <= 80 else shown(text)


def require_name(name: str, value: object, known: Collection[str]) -> None:
    """Refuse what is none of the names that exist.

    Raises:
        ConfigError: names the parameter.
    """
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name}: got {shown(value)}, allowed: {', '.join(known)}")


def parse_parameters(
    pairs: Sequence[Sequence[str]], types: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Names and values from a command line, each read as what its parameter can be.

    A text stays what it is; only numbers, booleans and None are read from it, as Python and as YAML spell
    them, where the parameter can be one, and a list in brackets where it can be a list.

    Args:
        pairs: names and texts.
        types: annotations by name, those of a grid's axes when None. Of other names texts are returned.

    Raises:
        ConfigError: a list cannot be parsed.
    """
    if types is None:
        types = {name: field.annotation | list[Any] | None for name, field in RunConfig.model_fields.items()}
    return {name: _value(name, text, _kinds(types.get(name, str))) for name, text in pairs}


def _kinds(annotation: Any) -> set[Any]:
    """The Python types that values of an annotated type have."""
    parts = get_args(annotation)
    if not parts:
        return {annotation if isinstance(annotation, type) else type(annotation)}
    return {get_origin(annotation)}.union(*map(_kinds, parts))


def _value(name: str, text: str, kinds: set[Any]) -> object:
    if list not in kinds or not text.strip().startswith("["):
        return _scalar(text, kinds)
    try:
        # Of this loader's scalars all are texts.
        return [_scalar(part, kinds) for part in yaml.load(text, yaml.BaseLoader)]
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        said = f"{named(name)}: got {shown(text)}, allowed: a value or a list of values"
        raise ConfigError(said) from None


def _scalar(text: object, kinds: set[Any]) -> object:
    if not isinstance(text, str):
        return text
    word = text.strip().lower()
    if NoneType in kinds and word in ("none", "null", "~"):
        return None
    if bool in kinds and word in ("true", "yes", "on"):
        return True
    if bool in kinds and word in ("false", "no", "off"):
        return False
    for number in (int, float) if kinds & {int, float} else ():
        try:
            return number(word)
        except ValueError:
            continue
    return text
