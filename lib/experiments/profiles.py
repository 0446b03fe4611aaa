"""The profiles that choose the size of the experiments, and the grid of the paper: data."""

from __future__ import annotations

from itertools import product
from typing import Any

from lib.experiments.config import ConfigError, FacesConfig, RunConfig, named, require_name, require_range

PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    # The pipeline's parts in seconds, for the tests.
    "smoke": {"all": {"size": 14, "train_images": 200, "test_images": 100, "epochs": 2, "noise": 0.5}},
    # Pictures that one can read, in minutes on two cores.
    "quick": {
        "all": {"train_images": 3_000, "test_images": 500, "noise": 0.1},
        # Many cheap steps, on images of half the resolution: the weights that remove noise grow slowly.
        "denoising": {"size": 14, "epochs": 50, "noise": 0.5},
        "inpainting": {"epochs": 2},
        "deblurring": {"epochs": 2},
    },
    # The paper's images and a tenth of its epochs: a night on two cores.
    "overnight": {"all": {"epochs": 10, "time_budget": 36_000.0}, "denoising": {"noise": 0.5}},
    # The paper's sizes, which are the defaults of `RunConfig`.
    "paper": {"all": {}, "denoising": {"noise": 0.5}},
}
"""What each profile changes in the defaults: for all tasks, then for one task."""

SEEDS = {"overnight": 3}
"""For how many seeds figures 2 to 4, 8 and 13 train where it is not one."""


def profile_config(profile: str, /, task: str, **values: Any) -> RunConfig:
    """The configuration of a profile for a task, with the given values on top (None: the profile's).

    Raises:
        ConfigError: the profile is unknown, or a value is refused by `RunConfig`.
    """
    require_name("profile", profile, PROFILES)
    chosen = PROFILES[profile]["all"] | PROFILES[profile].get(task, {})
    given = {name: value for name, value in values.items() if value is not None}
    return RunConfig(**chosen | {"task": task} | given)


def profile_seeds(profile: str, seeds: int | None = None) -> int:
    """For how many seeds a profile trains what it shows, or the given number."""
    if seeds is not None:
        require_range("seeds", seeds, 1)
    return seeds or SEEDS.get(profile, 1)


FACES_PROFILES: dict[str, dict[str, dict[str, Any]]] = {
    # The pipeline's parts in seconds, for the tests.
    "smoke": {
        "all": {"reduction": 4, "train_images": 2, "test_images": 2, "epochs": 2, "tol": 1e-3},
        "inpainting": {"max_steps": 50},
    },
    # Kernels that have taken shape, in minutes on two cores: fewer and larger steps than the paper's.
    "quick": {
        "all": {"epochs": 60, "learning_rate": 0.1, "final_learning_rate": 1e-3, "tol": 1e-4},
        "deblurring": {"epochs": 20, "learning_rate": 1e-3, "final_learning_rate": 1e-4}
        | {"tol": 1e-5, "max_steps": 200},
        "inpainting": {"reduction": 2, "epochs": 60, "max_steps": 200}
        | {"learning_rate": 0.03, "final_learning_rate": 3e-3},
    },
    # The paper's sizes, which are the defaults of `FacesConfig`; they take a night as well.
    "overnight": {"all": {}},
    "paper": {"all": {}},
}
"""What each profile changes in the defaults for photographs: for all tasks, then for one task."""

OURS: dict[str, Any] = {"filters": 8, "filter_size": 3, "initial": "cosine", "optimizer": "lbfgs"}
OURS |= {"learn_weight": True, "differentiate_norm": True, "sharpness": 200.0}
OURS |= {"tol": 1e-5, "adjoint_tol": 1e-4, "max_steps": 500, "patience": 50}
"""Ours for denoising and deblurring: the weight of the data is learned with the kernels, which start as the
cosine basis, and the training is solved by a quasi-Newton method."""

OURS_EPOCHS = {"smoke": 2, "quick": 28, "overnight": 200, "paper": 200}
"""Iterations of that method in each profile."""

FACES_TASKS: dict[str, dict[str, Any]] = {
    "denoising": {"noise": 0.1, "patience": 50, "precondition": True},
    "inpainting": {"noise": 0.01, "solver": "plain", "tol": 1e-14, "max_steps": 1000, "warm_start": False},
    "deblurring": {"noise": 0.01, "final_learning_rate": 1e-3, "precondition": True},
}
"""The paper's values for one task on photographs, naive ones for inpainting; `patience` and `precondition`
are ours."""

FILTERS = {"11x11": (2, 11), "3x3": (30, 3)}
"""How many kernels of which side the paper's figures have."""


def faces_config(profile: str, /, task: str, **values: Any) -> FacesConfig:
    """The configuration of a profile for a task on photographs, with the given values on top.

    A value of None is the profile's. An `initial` of `denoising` stands for the kernels that the same profile
    and parameters learn on denoising.

    Raises:
        ConfigError: the profile is unknown, or a value is refused by `FacesConfig`.
    """
    require_name("profile", profile, FACES_PROFILES)
    of_profile = FACES_PROFILES[profile]
    chosen = of_profile["all"] | FACES_TASKS.get(task, {}) | of_profile.get(task, {})
    given = {name: value for name, value in values.items() if value is not None}
    if given.get("initial") == "denoising":
        common = {name: given[name] for name in DENOISING_SHARES if name in given}
        given["initial"] = faces_config(profile, "denoising", **common)
    return FacesConfig(**chosen | {"task": task} | given)


def our_config(profile: str, task: str, **values: Any) -> FacesConfig:
    """The configuration of `OURS` for a task, with the given values on top; as in `faces_config`."""
    require_name("profile", profile, FACES_PROFILES)
    given = {name: value for name, value in values.items() if value is not None}
    return faces_config(profile, task, **OURS | {"epochs": OURS_EPOCHS[profile]} | given)


DENOISING_SHARES = ["dataset", "reduction", "train_images", "test_images", "seed"]
DENOISING_SHARES += ["model", "filters", "filter_size"]
"""What a training from denoising kernels has in common with the training of those kernels."""

ARMS: dict[str, dict[str, Any]] = {
    "bilevel": {"model": "bilevel"},
    "deq": {"model": "deq"},
    "deq tied": {"model": "deq", "initial": "tied"},
}
"""What is compared on MNIST: the paper's two models, and ours, the DEQ whose `C` starts as `A`."""

GRID: dict[str, tuple[Any, ...]] = {
    # The expensive tasks first, so that the last stacks of a sweep are short ones.
    "task": ("deblurring", "inpainting", "denoising"),
    "model": ("deq", "bilevel"),
    "initial": ("independent", "tied"),
    "sigma": ("relu", "softshrink", "identity"),
    "noise": (0.0, 0.05, 0.1, 0.5, 1.0),
    "tau": (0.01, 0.1, 0.5, 0.9, 1.1, 2.1),
    "gamma": (0.1, 0.5, 1.0),
}
"""The axes of the paper's grid on MNIST, with 0.5 among the steps, which its pictures use, and our start."""

SWEEPS: dict[str, dict[str, Any]] = {
    # A handful, one of whose steps is too long.
    "smoke": {"noise": 0.1, "tau": (0.5, 2.1), "gamma": 1.0, "sigma": "identity"}
    | {"size": 7, "train_images": 60, "test_images": 40, "batch_size": 20, "epochs": 2},
    # A short training of a third of the grid: 80 steps on images of half the resolution.
    "quick": {"tau": (0.1, 0.9), "size": 14, "train_images": 320, "test_images": 100}
    | {"batch_size": 20, "epochs": 5, "time_budget": 600.0},
    # The same third of the grid, 500 steps on images as large as the paper's.
    "overnight": {"tau": (0.1, 0.9), "train_images": 10_000, "test_images": 1_000, "epochs": 5},
    # The paper's sizes, which are the defaults of `RunConfig`.
    "paper": {},
}
"""What each profile changes in `GRID` and in the defaults of `RunConfig`."""


def grid(profile: str, /, **values: Any) -> list[RunConfig]:
    """The configurations of a sweep: all combinations of the values of all axes.

    For any parameter of `RunConfig` there may be a value in the place of the profile's, or a list or tuple of
    values to make it an axis; None leaves the profile's. Bilevel learning, where `C` is `A`, has no start of
    `C`, and takes part once.

    Raises:
        ConfigError: the profile is unknown, an axis is empty, or a value is refused by `RunConfig`.
    """
    require_name("profile", profile, SWEEPS)
    chosen = GRID | SWEEPS[profile] | {name: v for name, v in values.items() if v is not None}
    axes = {name: list(v) if isinstance(v, list | tuple) else [v] for name, v in chosen.items()}
    for name, levels in axes.items():
        if not levels:
            raise ConfigError(f"`{named(name)}` must have at least one value, got an empty list.")
    rows = [dict(zip(axes, levels, strict=True)) for levels in product(*axes.values())]
    for row in rows:
        if row["model"] == "bilevel" and row["initial"] == "tied":
            row["initial"] = "independent"
    return list(dict.fromkeys(RunConfig(**row) for row in rows))
