"""Configurations of runs: validated and immutable."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import asdict
from functools import partial
from operator import eq
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MNIST_SIDE, MNIST_TRAIN, MNIST_TEST, BLUR_SIDE = 28, 60_000, 10_000, 5

Task = Literal["denoising", "inpainting", "deblurring"]
Model = Literal["bilevel", "deq"]

TASKS: tuple[str, ...] = get_args(Task)
MODELS: tuple[str, ...] = get_args(Model)

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]

SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}

PHRASES = {
    "greater than or equal to": "a number of at least",
    "less than or equal to": "a number of at most",
    "greater than": "a number above",
    "less than": "a number below",
    "a valid integer": "an integer",
    "a valid number": "a number",
    "a valid boolean": "True or False",
}
"""Plain words for phrases in the messages of Pydantic."""

WORDS = {"none": None, "true": True, "false": False}


class ConfigError(ValueError):
    """Invalid value; the message is one line with the parameter, the accepted values and the value."""


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


def _start(values: dict[str, Any]) -> Literal["zero", "data"]:
    """Return the start: the data in denoising, else zero as in the paper: a DEQ need not converge there."""
    return "data" if values["task"] == "denoising" else "zero"


def _adjoint(values: dict[str, Any]) -> Literal["solved", "neumann"]:
    """Return the adjoint: a series unless `K` is the identity, because the equation is ill-conditioned."""
    return "solved" if values["task"] == "denoising" else "neumann"


class TrainingConfig(Checked):
    """The parameters of every training: model, task, step map, optimizer and solver, with defaults for MNIST.

    The upper bounds exclude noise that alone counts as divergence, learning rates that exceed the images'
    range, and factors that overflow in single precision.
    """

    model: Model = Field("bilevel", description="C = A (bilevel) or C free (deq)")
    task: Task = Field("denoising", description="the operator K")
    noise: NonNegative = Field(0.1, le=10, description="standard deviation after K, images in [-1, 1]")
    tau: Positive = Field(0.5, le=1e3, description="step size; also the threshold of softshrink")
    gamma: NonNegative = Field(0.1, le=1e6, description="weight of the regularizer")
    lam: Positive = Field(1.0, le=1e6, description="weight lambda of the data term")
    epochs: Count = Field(100, description="passes over the training images")
    learning_rate: Positive = Field(1e-3, le=10, description="learning rate of Adam at the first step")
    final_learning_rate: NonNegative = Field(1e-6, description="learning rate of Adam after the last step")
    schedule: Literal["cosine", "linear"] = Field("cosine", description="decay of the learning rate")
    test_every: Count = Field(1, description="epochs from one evaluation to the next")
    solver: Literal["anderson", "plain"] = Field("anderson", description="solver of both equations")
    adjoint: Literal["solved", "neumann"] = Field(
        default_factory=_adjoint, description="solve the adjoint equation, or sum a Neumann series"
    )
    neumann_steps: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        20, description="highest power of the Jacobian in the series; 0 is Jacobian-free"
    )
    adjoint_tol: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="tol of the adjoint equation; None: tol"
    )
    precondition: bool = Field(False, description="precondition all solves with the mean curvature")
    start: Literal["zero", "data"] = Field(
        default_factory=_start, description="first iterate of the fixed point"
    )
    tol: Positive = Field(1e-3, le=1, description="relative residual at which a sample has converged")
    max_steps: Count = Field(50, description="maximum number of evaluations of the step map in a solve")
    memory: Count = Field(5, le=1_000, description="iterates that Anderson acceleration combines")
    regularization: Positive = Field(1e-4, le=1e6, description="ridge of Anderson acceleration, relative")
    beta: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="mixing of Anderson acceleration")
    patience: Count | None = Field(
        10, description="evaluations without progress after which a sample stops; None: never"
    )
    precision: Literal["float32", "tf32"] = Field(
        "float32", description="precision of products; tf32 (GPU only) rounds the factors"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="seed of all random numbers")
    time_budget: Positive = Field(3600.0, le=1e9, description="seconds after which a training is stopped")

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        if self.final_learning_rate > self.learning_rate:
            most = f"learning_rate = {self.learning_rate}"
            raise ValueError(f"`final_learning_rate` must be at most {most}, got {self.final_learning_rate}.")
        return self


def _default(name: str, default: Any) -> Any:
    """Return a field as `TrainingConfig` declares it, with another default."""
    field = copy(TrainingConfig.model_fields[name])
    field.default, field.default_factory = default, None
    return field


class RunConfig(TrainingConfig):
    """A training run on MNIST with dense fields of experts. The defaults are the paper's.

    `precondition`, `patience`, `adjoint` and the `start` of denoising are ours. `precondition` applies to the
    bilevel model alone, with a few accelerated steps instead of a nonzero Neumann series. If `K` is not
    injective, the map need not contract with a free `C`, and `patience` saves the steps after the residual
    stagnates. The adjoint equation is ill-conditioned then: 50 steps of the paper's Anderson acceleration,
    whose ridge exceeds the squared residuals, have the hypergradient of about 20 terms of the cheaper Neumann
    series (`results/bench/adjoints.csv`).
    """

    dataset: Literal["mnist"] = Field("mnist", description="data set")
    sigma: Literal["relu", "softshrink", "identity"] = Field("relu", description="activation of the experts")
    size: Annotated[int, Field(ge=1, le=MNIST_SIDE)] = Field(
        MNIST_SIDE, description="side in pixels; below 28 MNIST is averaged over blocks"
    )
    train_images: Annotated[int, Field(ge=1, le=MNIST_TRAIN)] = Field(
        MNIST_TRAIN, description="number of training images"
    )
    test_images: Annotated[int, Field(ge=1, le=MNIST_TEST)] = Field(
        MNIST_TEST, description="number of test images"
    )
    batch_size: Count = Field(100, description="images in an optimizer step")
    initial: Literal["independent", "tied"] | RunConfig = Field(
        "independent", description="initial C: independent random numbers, A, or the weights of a run"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if MNIST_SIDE % self.size:
            raise ValueError(f"`size` must be a divisor of {MNIST_SIDE}, got {self.size}.")
        if self.task == "deblurring" and self.size < BLUR_SIDE:
            raise ValueError(f"`size` must be at least {BLUR_SIDE}, the side of the blur, got {self.size}.")
        if self.batch_size > self.train_images:
            most = f"train_images = {self.train_images}"
            raise ValueError(f"`batch_size` must be at most {most}, got {self.batch_size}.")
        if self.initial == "tied" and self.model == "bilevel":
            raise ValueError("`initial` must be 'independent' with model = bilevel, where C = A, got 'tied'.")
        if isinstance(self.initial, RunConfig) and self.initial.size != self.size:
            raise ValueError(f"`initial` must have size = {self.size}, got {self.initial.size}.")
        return self


class FacesConfig(TrainingConfig):
    """A training run on photographs with convolutional fields of experts. The defaults are the paper's.

    The solver and its tolerance are ours: `make bench` compares loss and hypergradient with a solution at
    1e-10 (`results/bench/tolerances.csv`). Denoising needs 1e-4, deblurring 1e-5.
    """

    dataset: str = Field("faces", description="faces (AT&T), natural, celeba or the path of a folder")
    reduction: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="side of the blocks of pixels over which the images are averaged"
    )
    train_images: Count = Field(10, description="number of training images")
    test_images: Count = Field(10, description="number of test images")
    blur: Annotated[int, Field(ge=1, le=99)] = Field(
        11, description="side of the motion kernel in deblurring"
    )
    filters: Annotated[int, Field(ge=1, le=1_000)] = Field(2, description="number of kernels")
    filter_size: Annotated[int, Field(ge=3, le=31)] = Field(
        11, description="side of the kernels in pixels, odd"
    )
    initial: Literal["first", "second", "cosine", "random"] | FacesConfig = Field(
        "random", description="initial kernels: differences, cosines, random ones or those of a run"
    )
    # Newer than the first stored runs: without its default these keep their keys.
    coupling: Literal["free", "weighted"] = Field(
        "free",
        description="C of a DEQ: free, or P A with a positive weight for each kernel",
        exclude_if=partial(eq, "free"),
    )
    sharpness: Positive = Field(100.0, le=1e6, description="s of sigma(z) = tanh(s z)")
    learn_weight: bool = Field(False, description="learn lambda too; the step size then depends on it")
    differentiate_norm: bool = Field(False, description="differentiate through the norm of the kernels")
    optimizer: Literal["adam", "lbfgs"] = Field("adam", description="lbfgs does one iteration per epoch")
    warm_start: bool = Field(
        True, description="images keep their noise, and solves start from the last epoch's solutions"
    )
    tau: Positive = _default("tau", 1 / 800)
    gamma: NonNegative = _default("gamma", 1.0)
    lam: Positive = _default("lam", 18.156)
    epochs: Count = _default("epochs", 500)
    learning_rate: Positive = _default("learning_rate", 1e-2)
    final_learning_rate: NonNegative = _default("final_learning_rate", 1e-4)
    schedule: Literal["cosine", "linear"] = _default("schedule", "linear")
    adjoint: Literal["solved", "neumann"] = _default("adjoint", "solved")
    test_every: Count = _default("test_every", 10)
    start: Literal["zero", "data"] = _default("start", "data")
    tol: Positive = _default("tol", 1e-5)
    max_steps: Count = _default("max_steps", 500)
    memory: Count = _default("memory", 10)
    patience: Count | None = _default("patience", None)
    time_budget: Positive = _default("time_budget", 36_000.0)

    @property
    def batch_size(self) -> int:
        """All training images at once."""
        return self.train_images

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.precondition and self.task == "inpainting":
            raise ValueError(
                "`precondition` must be False in inpainting: a mask is not a convolution, got True."
            )
        if self.optimizer == "lbfgs" and not self.warm_start:
            raise ValueError("`optimizer` must be 'adam' with warm_start = False, got 'lbfgs'.")
        if self.filter_size % 2 == 0:
            raise ValueError(f"`filter_size` must be an odd number, got {self.filter_size}.")
        if self.dataset == "mnist" or not self.dataset or "\0" in self.dataset:
            accepted = "faces, natural, celeba or a folder of images"
            raise ValueError(f"`dataset` must be {accepted}, got {self.dataset!r}.")
        if isinstance(self.initial, str) and self.initial != "random":
            # Imported here: the import of torch takes seconds, and a rejection should not.
            from lib.kernels import count_differences

            side, order = self.filter_size, 1 if self.initial == "first" else 2
            most = side**2 - 1 if self.initial == "cosine" else count_differences(order, side)
            if self.filters > most:
                raise ValueError(f"`filters` must be at most {most} for these kernels, got {self.filters}.")
        if (weighted := self.coupling == "weighted") and self.model == "bilevel":
            raise ValueError("`coupling` must be 'free' with model = bilevel, where C = A, got 'weighted'.")
        if isinstance(self.initial, FacesConfig):
            # With P = 1 the DEQ of a weighted C is bilevel learning.
            own = {name: getattr(self, name) for name in ("model", "filters", "filter_size")}
            for name, ours in (own | {"model": "bilevel"} if weighted else own).items():
                if ours != (theirs := getattr(self.initial, name)):
                    raise ValueError(f"`initial` must have {name} = {ours!r}, got {theirs!r}.")
        return self


def _one_line(error: ValidationError, kind: type[Checked]) -> str:
    problems: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        name = named(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "default_factory_not_called":
            # The default depends on a value that is reported itself.
            continue
        if problem["type"] == "value_error":
            said = f"`{name}`: " * bool(name) + str(problem["ctx"]["error"])
        elif problem["type"] == "extra_forbidden":
            said = f"`{name}` is not a parameter; choose from {', '.join(kind.model_fields)}."
        else:
            accepted = problem["msg"].removeprefix("Input should be ").partition(", unable")[0]
            for words, plain in PHRASES.items():
                accepted = accepted.replace(words, plain)
            said = f"`{name}` must be {accepted}, got {shown(problem['input'])}."
        # For a union, report the first alternative.
        problems.setdefault(name, said)
    return " ".join(problems.values())


def shown(value: object) -> str:
    """Return the representation of a value in one short line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def named(name: object) -> str:
    """Return a name for one short line, quoted if it is empty, long or not printable."""
    text = str(name)
    return text if text.isprintable() and 0 < len(text) <= 80 else shown(text)


def described(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return a type and its limits as text, such as `float > 0, <= 1000` or `bilevel | deq`."""
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return described(parts[0], parts[1].metadata)
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, parts))
    if get_origin(annotation) in (Union, UnionType):
        # A configuration cannot be passed on a command line.
        return " | ".join(described(part) for part in parts if part not in (RunConfig, FacesConfig))
    limits: dict[str, str] = {}
    for name, value in (item for limit in metadata for item in asdict(limit).items()):
        limits.setdefault(name, f"{SIGNS[name]} {value:g}")
    name = "None" if annotation is NoneType else annotation.__name__
    return f"{name} {', '.join(limits.values())}".strip()


def require_name(name: str, value: object, known: Collection[str]) -> None:
    """Raise `ConfigError` unless a value is one of the known names."""
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"`{name}` must be one of {', '.join(known)}, got {shown(value)}.")


def require_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise `ConfigError` unless a number is in `[low, high]`."""
    if not low <= value <= high:
        limits = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ConfigError(f"`{name}` must be a number {limits}, got {shown(value)}.")


def axis_types() -> dict[str, Any]:
    """Return the types of a grid's parameters, each of which may be a list."""
    return {name: field.annotation | list[Any] | None for name, field in RunConfig.model_fields.items()}


def parse_parameters(
    pairs: Sequence[Sequence[str]], types: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Convert names and texts of a command line to values of the types of the parameters.

    Numbers, booleans, None and lists in brackets are converted if the parameter accepts them; other texts
    remain texts, which the configuration validates.

    Args:
        pairs: names and texts.
        types: annotations by name; None takes those of `axis_types`.
    """
    types = axis_types() if types is None else types
    return {name: _value(text, _kinds(types.get(name, str))) for name, text in pairs}


def _kinds(annotation: Any) -> set[Any]:
    """Return the Python types that values of an annotated type have."""
    parts = get_args(annotation)
    if not parts:
        return {annotation if isinstance(annotation, type) else type(annotation)}
    return {get_origin(annotation)}.union(*map(_kinds, parts))


def _value(text: str, kinds: set[Any]) -> object:
    bare = text.strip()
    if list in kinds and bare.startswith("[") and bare.endswith("]"):
        return [_scalar(part.strip(" '\""), kinds) for part in bare[1:-1].split(",") if part.strip()]
    return _scalar(text, kinds)


def _scalar(text: str, kinds: set[Any]) -> object:
    word = text.strip().lower()
    if word in WORDS and type(WORDS[word]) in kinds:
        return WORDS[word]
    for number in (int, float) if kinds & {int, float} else ():
        with suppress(ValueError):
            return number(word)
    return text
