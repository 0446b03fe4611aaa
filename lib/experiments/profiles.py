"""Profiles, which set the size of the experiments, and the grid of the paper."""

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
"""Changes of the defaults by profile: for all tasks, then for one task."""

SEEDS = {"overnight": 3}
"""Number of seeds of figures 2 to 4, 8 and 13 by profile, if not one."""


def profile_config(profile: str, /, task: str, **values: Any) -> RunConfig:
    """Return the configuration of a profile for a task; values replace those of the profile unless None."""
    require_name("profile", profile, PROFILES)
    chosen = PROFILES[profile]["all"] | PROFILES[profile].get(task, {})
    given = {name: value for name, value in values.items() if value is not None}
    return RunConfig(**chosen | {"task": task} | given)


def profile_seeds(profile: str, seeds: int | None = None) -> int:
    """Return the number of seeds, by default that of a profile."""
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
"""Changes of the defaults for photographs by profile: for all tasks, then for one task."""

OURS: dict[str, Any] = {"filters": 8, "filter_size": 3, "initial": "cosine", "optimizer": "lbfgs"}
OURS |= {"learn_weight": True, "differentiate_norm": True, "sharpness": 200.0}
OURS |= {"tol": 1e-5, "adjoint_tol": 1e-4, "max_steps": 500, "patience": 50}
"""Our configuration for denoising and deblurring: L-BFGS learns the weight of the data term and the kernels,
starting from the cosine basis."""

OURS_EPOCHS = {"smoke": 2, "quick": 28, "overnight": 200, "paper": 200}
"""Iterations of L-BFGS by profile."""

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
    and parameters learn on denoising, for a weighted `C` by bilevel learning.

    Raises:
        ConfigError: the profile is unknown, or a value is refused by `FacesConfig`.
    """
    require_name("profile", profile, FACES_PROFILES)
    of_profile = FACES_PROFILES[profile]
    chosen = of_profile["all"] | FACES_TASKS.get(task, {}) | of_profile.get(task, {})
    given = {name: value for name, value in values.items() if value is not None}
    if given.get("initial") == "denoising":
        common = {name: given[name] for name in DENOISING_SHARES if name in given}
        common |= {"model": "bilevel"} if given.get("coupling") == "weighted" else {}
        given["initial"] = faces_config(profile, "denoising", **common)
    return FacesConfig(**chosen | {"task": task} | given)


def our_config(profile: str, task: str, **values: Any) -> FacesConfig:
    """Return the configuration `OURS` for a task; values as in `faces_config`."""
    require_name("profile", profile, FACES_PROFILES)
    given = {name: value for name, value in values.items() if value is not None}
    return faces_config(profile, task, **OURS | {"epochs": OURS_EPOCHS[profile]} | given)


DENOISING_SHARES = ["dataset", "reduction", "train_images", "test_images", "seed"]
DENOISING_SHARES += ["model", "filters", "filter_size"]
"""Parameters that a training from denoising kernels shares with the training of those kernels."""

ARMS: dict[str, dict[str, Any]] = {
    "bilevel": {"model": "bilevel"},
    "deq": {"model": "deq"},
    "deq tied": {"model": "deq", "initial": "tied"},
}
"""Arms of the comparison on MNIST: the two models of the paper, and our DEQ with `C = A` at the start."""

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
"""Axes of the paper's grid on MNIST, with the step 0.5 of its pictures and our start."""

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
"""Changes of `GRID` and of the defaults of `RunConfig` by profile."""


def grid(profile: str, /, **values: Any) -> list[RunConfig]:
    """Return the configurations of a sweep: all combinations of the values of all axes.

    A value of any parameter of `RunConfig` replaces that of the profile unless None; a list or tuple makes an
    axis. Bilevel learning has no start of `C` and appears once.
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
