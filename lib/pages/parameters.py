"""What the notebooks' parameters can be: one class for each kind of notebook.

A notebook's first cell says `check("fig02", globals())`, and the command that runs it checks the same
before it starts a kernel. What a configuration refuses is left to the configurations, made for that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, create_model

from lib.experiments.config import (
    CONTROL,
    Checked,
    ConfigError,
    Count,
    FacesConfig,
    Positive,
    RunConfig,
    TrainingConfig,
    require_name,
    shown,
)
from lib.experiments.profiles import (
    FILLING,
    FILTERS,
    PROFILES,
    faces_config,
    grid,
    our_config,
    profile_config,
)

T = TypeVar("T")

KEY = re.compile("[0-9a-f]{20}")


def _path(text: str) -> str:
    if not text or CONTROL.search(text):
        raise ValueError("the path of a file or a folder")
    return text


def _key(text: str) -> str:
    if not KEY.fullmatch(text):
        raise ValueError("the key of a run, which make train prints")
    return text


def _growing(values: list[float]) -> list[float]:
    if values != sorted(set(values)):
        raise ValueError("each number larger than the one before")
    return values


Listed = Annotated[list[T], Field(min_length=1)]
Growing = Annotated[list[T], Field(min_length=1), AfterValidator(_growing)]
PathName = Annotated[str, AfterValidator(_path)]
Index = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
Seeds = Annotated[int, Field(ge=1, le=1_000)]
SmallCount = Annotated[int, Field(ge=1, le=1_024)]

Axis = Annotated[list[T], BeforeValidator(lambda value: value if isinstance(value, list) else [value])]
"""One value or a list of them."""


RunKey = Annotated[str, AfterValidator(_key)]
RunKeys = Annotated[Axis[RunKey], Field(min_length=1)]


def _require_index(name: str, value: int, count: int) -> None:
    if value >= count:
        raise ConfigError(f"{name}: got {shown(value)}, allowed: 0 to {count - 1}")


class Parameters(Checked):
    """Of a notebook that has none."""

    def agree(self, **fixed: Any) -> None:
        """Refuse what the configurations refuse, with what the notebook itself fixes, such as its task."""

    def folder(self, name: str, results: Path) -> Path:
        """Where the results of the notebook of a name are, once it has been executed."""
        return results / getattr(self, "profile", "") / name

    def of(self, config: type[TrainingConfig]) -> dict[str, Any]:
        """Those that are a configuration's as well."""
        names = [name for name in type(self).model_fields if name in config.model_fields]
        return {name: getattr(self, name) for name in names}


class Digits(Parameters):
    """Figures 2 to 4."""

    profile: str
    noise: float | None
    tau: float | None
    gamma: float | None
    sigma: str | None
    epochs: int | None
    seed: int
    seeds: Seeds | None
    digits: Count
    train: bool
    results: PathName | None

    def agree(self, **fixed: Any) -> None:
        most = profile_config(self.profile, **fixed, **self.of(RunConfig)).test_images
        if self.digits > most:
            raise ConfigError(f"digits: got {self.digits}, allowed: at most the {most} test images")


class Grid(Parameters):
    """What figures 1, 5 and 6 have in common."""

    profile: str
    task: Axis[str] | None
    noise: Axis[float] | None
    tau: Axis[float] | None
    gamma: Axis[float] | None
    sigma: Axis[str] | None
    epochs: Axis[int] | None
    seed: Seed
    train: bool
    results: PathName | None

    def agree(self, **fixed: Any) -> None:
        grid(self.profile, **self.of(RunConfig))


class Faces(Parameters):
    """What the figures of photographs have in common."""

    profile: str
    dataset: str
    noise: float | None
    initial: str | None
    epochs: int | None
    train_images: int | None
    test_images: int | None
    seed: Seed
    train: bool
    results: PathName | None

    def config(self, task: str, **own: Any) -> FacesConfig:
        if self.initial == task == "denoising":
            raise ConfigError("initial: got 'denoising', allowed: 'first', 'second' or 'random'")
        return faces_config(self.profile, task, **self.of(FacesConfig), **own)


class Inpainting(Faces):
    """Figure 7."""

    filters: int
    filter_size: int
    image: Index
    iterations: Listed[Count]

    def agree(self, **fixed: Any) -> None:
        for own in ({}, FILLING):
            _require_index("image", self.image, self.config("inpainting", **own).test_images)


class Photographs(Faces):
    """Figures 8 and 13."""

    image: Index
    seeds: Seeds | None
    our_seeds: Seeds

    def agree(self, **fixed: Any) -> None:
        for filters, side in FILTERS.values():
            config = self.config(**fixed, filters=filters, filter_size=side)
            _require_index("image", self.image, config.test_images)


class Weight(Parameters):
    """Learned weights on photographs."""

    profile: str
    dataset: str
    train_images: int | None
    test_images: int | None
    lams: Growing[Positive]
    lengths: Growing[Annotated[float, Field(ge=0, le=1)]]
    seed: Seed
    our_seeds: Seeds
    results: PathName | None

    def agree(self, **fixed: Any) -> None:
        for task in ("denoising", "deblurring"):
            our_config(self.profile, task, **self.of(FacesConfig))


class Hypergradients(Parameters):
    """What takes the place of the adjoint equation's solution."""

    profile: str
    digit_epochs: Count
    photograph_epochs: Count
    seed: Seed
    results: PathName | None

    def agree(self, **fixed: Any) -> None:
        require_name("profile", self.profile, PROFILES)


class Kernels(Faces):
    """Figures 9 to 12 and 14 to 17."""

    shown: Listed[Index] | None

    def agree(self, **fixed: Any) -> None:
        filters, side = FILTERS[fixed.pop("size")]
        self.config(**fixed, filters=filters, filter_size=side)
        for index in self.shown or ():
            _require_index("shown", index, filters)


class Theory(Parameters):
    """The special case of tied kernels, on a corner of a photograph."""

    height: Annotated[int, Field(ge=1, le=72)]
    width: Annotated[int, Field(ge=1, le=62)]
    filters: int
    filter_size: int
    sharpness: float
    lam: float
    noise: float
    seed: int

    def agree(self, **fixed: Any) -> None:
        FacesConfig(**self.of(FacesConfig))


class Reconstruct(Parameters):
    """A photograph with the committed kernels."""

    image: PathName | None
    task: Literal["denoising", "deblurring"]
    noise: float | None
    clean: bool
    model: str
    filters: Literal[2, 8, 30]
    run: RunKey | None
    seed: int
    results: PathName | None

    def agree(self, **fixed: Any) -> None:
        faces_config("quick", **self.of(FacesConfig))

    def folder(self, name: str, results: Path) -> Path:
        # Imported here because a value should be refused at once, and torch takes seconds to come.
        from lib.experiments.records import stored_kernels, trained_kernels
        from lib.figures.photographs import reconstruction_folder

        committed = (self.task, self.model, self.filters)
        run = trained_kernels(*committed) if self.run is None else stored_kernels(self.run, results)
        noise = run.config.noise if self.noise is None else self.noise
        return reconstruction_folder(run, self.image, noise, self.clean, results)


class Evaluate(Parameters):
    """A folder of images with trained kernels."""

    profile: str
    dataset: PathName
    task: Literal["denoising", "inpainting", "deblurring"]
    filters: Literal[2, 8, 30]
    run: RunKeys | None
    noise: Annotated[float, Field(ge=0, le=10)] | None
    sigma: Annotated[float, Field(ge=0, le=255)] | None
    tune: bool
    largest: Annotated[int, Field(ge=7, le=65_536)] | None
    seed: Seed
    results: PathName | None

    def agree(self, **fixed: Any) -> None:
        require_name("profile", self.profile, PROFILES)
        if self.noise is not None and self.sigma is not None:
            raise ConfigError(
                f"sigma: got {self.sigma:g} beside noise = {self.noise:g}, allowed: one of the two"
            )

    def folder(self, name: str, results: Path) -> Path:
        # Imported here because a value should be refused at once, and torch takes seconds to come.
        from lib.figures.evaluation import deviation, evaluation_name

        noise = deviation(self.noise, self.sigma)
        return (
            results
            / self.profile
            / evaluation_name(self.dataset, self.task, self.filters, self.run, noise, self.tune)
        )


class Tomography(Parameters):
    """Kernels learned on denoising and trained for tomography."""

    profile: str
    side: Annotated[int, Field(ge=16, le=92)]
    angles: Annotated[int, Field(ge=1, le=360)]
    noise: Annotated[float, Field(ge=0, le=10)]
    filters: Literal[2, 8, 30]
    train_images: Annotated[int, Field(ge=1, le=300)]
    test_images: Annotated[int, Field(ge=1, le=100)]
    epochs: Count
    learning_rate: Annotated[float, Field(gt=0, le=10)]
    image: Index
    seed: Seed
    results: PathName | None

    def agree(self, **fixed: Any) -> None:
        require_name("profile", self.profile, PROFILES)
        _require_index("image", self.image, self.test_images)


class Explore(Parameters):
    """What of a grid is looked at first."""

    profile: str
    results: PathName | None
    task: str | None
    noise: float | None
    sigma: str | None
    gamma: float | None
    tau: float | None

    def agree(self, **fixed: Any) -> None:
        grid(self.profile, **self.of(RunConfig))


class Scaling(Parameters):
    """The sizes of which the cost is measured."""

    profile: str
    sides: Growing[SmallCount]
    filters: Growing[SmallCount]
    batches: Growing[SmallCount]
    digit_sides: Growing[Annotated[int, Field(ge=1, le=112)]]
    stacks: Growing[SmallCount]
    solver_steps: Growing[SmallCount]
    results: PathName | None

    def agree(self, **fixed: Any) -> None:
        require_name("profile", self.profile, PROFILES)


def _also(kind: type[Parameters], **types: Any) -> type[Parameters]:
    """A kind of notebook with more parameters of these types."""
    fields: dict[str, Any] = {name: (annotation, ...) for name, annotation in types.items()}
    return create_model(kind.__name__, __base__=kind, **fields)


class Mathematics(Parameters):
    """The pages that train small models on drawn images."""

    noise: Annotated[float, Field(ge=0, le=10)]
    epochs: Count
    seed: Seed


DENOISING, INPAINTING, DEBLURRING = ({"task": task} for task in ("denoising", "inpainting", "deblurring"))

DECLARED: dict[str, tuple[type[Parameters], dict[str, Any]]] = {
    "fig01": (_also(Grid, seeds=Seeds, threshold=Positive), {}),
    "fig02": (Digits, DENOISING),
    "fig03": (Digits, INPAINTING),
    "fig04": (Digits, DEBLURRING),
    "fig05": (_also(Grid, seeds=Seeds), {}),
    "fig06": (_also(Grid, threshold=Positive, seconds=Positive | None), {}),
    "fig07": (Inpainting, {}),
    "fig08": (Photographs, DENOISING),
    **{name: (Kernels, DENOISING | {"size": "11x11"}) for name in ("fig09", "fig10")},
    **{name: (Kernels, DENOISING | {"size": "3x3"}) for name in ("fig11", "fig12")},
    "fig13": (Photographs, DEBLURRING),
    **{name: (Kernels, DEBLURRING | {"size": "11x11"}) for name in ("fig14", "fig15")},
    **{name: (Kernels, DEBLURRING | {"size": "3x3"}) for name in ("fig16", "fig17")},
    **{name: (Mathematics, {}) for name in ("first_steps", "your_own")},
    "theory": (Theory, {}),
    "weight": (Weight, {}),
    "hypergradients": (Hypergradients, {}),
    "reconstruct": (Reconstruct, {}),
    "evaluate": (Evaluate, {}),
    "tomography": (Tomography, {}),
    "explore": (Explore, {}),
    "scaling": (Scaling, {}),
}
"""What the parameters of each notebook can be, and what it fixes itself; one that has none is not here."""


def types(notebook: str) -> dict[str, Any]:
    """Annotations of a notebook's parameters, by name."""
    kind, _ = DECLARED.get(notebook, (Parameters, {}))
    return {name: field.annotation for name, field in kind.model_fields.items()}


def validated(notebook: str, values: Mapping[str, Any]) -> Parameters:
    """The parameters of a notebook, all of which make sense.

    Raises:
        ConfigError: names the parameter, what it was and what is allowed.
    """
    kind, fixed = DECLARED.get(notebook, (Parameters, {}))
    parameters = kind(**values)
    parameters.agree(**fixed)
    return parameters


def check(notebook: str, variables: Mapping[str, Any]) -> None:
    """Refuse parameters that make no sense, among all variables of a notebook: see `validated`."""
    validated(notebook, {name: variables[name] for name in types(notebook) if name in variables})
