"""Configurations: the paper's defaults, every bad value refused in one line, the profiles and the grids."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lib.experiments.config import (
    MODELS,
    TASKS,
    ConfigError,
    FacesConfig,
    RunConfig,
    TrainingConfig,
    parse_parameters,
)
from lib.experiments.profiles import GRID, PROFILES, SWEEPS, faces_config, grid, profile_config

FIELDS = sorted(RunConfig.model_fields)
FLOATS = (
    "noise",
    "tau",
    "gamma",
    "lam",
    "learning_rate",
    "final_learning_rate",
    "tol",
    "regularization",
    "beta",
    "time_budget",
)
COUNTS = ("size", "train_images", "test_images", "batch_size", "epochs", "max_steps", "memory")
CHOICES = ("dataset", "model", "task", "sigma", "solver")

ORDINARY = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 120),
    st.floats(),
    st.floats(0, 1),
    st.text(),
    st.sampled_from(["mnist", "deq", "bilevel", *TASKS, "relu", "softshrink", "anderson", "plain"]),
    st.sampled_from(["faces", "celeba", "first", "second", "linear", "zero"]),
    st.builds(FacesConfig, filters=st.integers(1, 3), epochs=st.integers(1, 5)),
    st.binary(),
    st.complex_numbers(),
    st.decimals(),
    st.lists(st.integers()),
    st.dictionaries(st.text(), st.floats()),
)
"""Values of all sorts, many of them valid for some field."""


def refusal(**values: Any) -> str:
    """The one line with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        RunConfig(**values)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def outcome(kind: type[TrainingConfig] = RunConfig, /, **values: Any) -> TrainingConfig | str:
    """The configuration with these values, or the line with which it is refused."""
    try:
        return kind(**values)
    except ConfigError as error:
        return str(error)


def test_defaults_are_the_papers() -> None:
    """The defaults are the paper's numbers for MNIST, with an hour for each run."""
    config = RunConfig()
    assert (config.dataset, config.size) == ("mnist", 28)
    assert config.lam == 1.0
    assert (config.solver, config.memory, config.regularization, config.beta) == ("anderson", 5, 1e-4, 1.0)
    assert (config.tol, config.max_steps) == (1e-3, 50)
    assert (config.learning_rate, config.final_learning_rate) == (1e-3, 1e-6)
    assert (config.batch_size, config.epochs) == (100, 100)
    assert (config.train_images, config.test_images) == (60_000, 10_000)
    assert config.time_budget == 3600.0


@pytest.mark.parametrize("name", FIELDS)
def test_a_configuration_is_immutable(name: str) -> None:
    """No field can be set or deleted, and no new one can be added."""
    config = RunConfig()
    before = config.model_dump()
    for attribute in (name, f"new_{name}"):
        with pytest.raises(ValidationError):
            setattr(config, attribute, getattr(config, name))
    with pytest.raises(ValidationError):
        delattr(config, name)
    assert config.model_dump() == before


def test_equal_configurations_are_interchangeable() -> None:
    """Equal values make equal configurations with equal hashes, whether given as integers or floats."""
    assert RunConfig(noise=1) == RunConfig(noise=1.0)
    assert hash(RunConfig(noise=1)) == hash(RunConfig(noise=1.0))
    assert isinstance(RunConfig(noise=1).noise, float)
    assert RunConfig(noise=1) != RunConfig(noise=0.5)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("noise", -0.1, "greater than or equal to 0"),
        ("tau", 0.0, "greater than 0"),
        ("tau", -0.5, "greater than 0"),
        ("gamma", -1e-9, "greater than or equal to 0"),
        ("lam", 0, "greater than 0"),
        ("sigma", "tanh", "'relu', 'softshrink' or 'identity'"),
        ("dataset", "cifar10", "'mnist'"),
        ("model", "unet", "'bilevel' or 'deq'"),
        ("task", "superresolution", "'denoising', 'inpainting' or 'deblurring'"),
        ("solver", "newton", "'anderson' or 'plain'"),
        ("size", 0, "greater than or equal to 1"),
        ("size", 56, "less than or equal to 28"),
        ("size", 10, "a divisor of 28"),
        ("train_images", 60_001, "less than or equal to 60000"),
        ("test_images", 10_001, "less than or equal to 10000"),
        ("test_images", 0, "greater than or equal to 1"),
        ("batch_size", 0, "greater than or equal to 1"),
        ("batch_size", 60_001, "at most train_images = 60000"),
        ("epochs", 0, "greater than or equal to 1"),
        ("learning_rate", 0.0, "greater than 0"),
        ("final_learning_rate", -1e-6, "greater than or equal to 0"),
        ("final_learning_rate", 0.01, "at most learning_rate = 0.001"),
        ("tol", 0.0, "greater than 0"),
        ("tol", -1e-3, "greater than 0"),
        ("max_steps", 0, "greater than or equal to 1"),
        ("memory", 0, "greater than or equal to 1"),
        ("regularization", 0.0, "greater than 0"),
        ("beta", 0.0, "greater than 0"),
        ("beta", 1.5, "less than or equal to 1"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**63, "less than 9223372036854775808"),
        ("time_budget", 0.0, "greater than 0"),
    ],
)
def test_a_value_out_of_range_is_refused(name: str, value: object, allowed: str) -> None:
    """The line says the parameter, what it was and what is allowed."""
    message = refusal(**{name: value})
    assert message.startswith(f"{name}: got {value!r}, allowed: ")
    assert allowed in message


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *product(FLOATS, (math.nan, math.inf, -math.inf), ("a finite number",)),
        *product(FLOATS, ("0.1", True, None, [0.1]), ("a valid number",)),
        *product((*COUNTS, "seed"), ("14", True, None, 14.0), ("a valid integer",)),
        *product(CHOICES, (True, None, 1, b"relu", ["relu"]), ("'",)),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(name: str, value: object, allowed: str) -> None:
    """Nothing is converted: not a numeral, not a bool, and neither NaN nor infinity is a number."""
    message = refusal(**{name: value})
    assert message.startswith(f"{name}: got {value!r}, allowed: ")
    assert allowed in message


def test_deblurring_of_images_smaller_than_the_blur_is_refused() -> None:
    """The 5x5 blur does not fit a 4x4 image; it fits 7x7, and 4x4 is a size for the other tasks."""
    message = refusal(task="deblurring", size=4)
    assert message.startswith("task: got 'deblurring' of 4x4 images, allowed: ")
    assert "5x5" in message
    assert RunConfig(task="deblurring", size=7).size == 7
    assert RunConfig(task="inpainting", size=4).size == 4


def test_a_batch_is_no_larger_than_the_training_set() -> None:
    """The line names both numbers; a batch of all training images is allowed."""
    assert refusal(train_images=50) == "batch_size: got 100, allowed: at most train_images = 50"
    assert RunConfig(train_images=50, batch_size=50).batch_size == 50


def test_an_unknown_name_is_refused() -> None:
    """A misspelt parameter is refused by its name, with the names that exist."""
    message = refusal(lambda_=1.0)
    assert message.startswith("lambda_: no such parameter, allowed: ")
    assert all(name in message for name in FIELDS)


def test_all_problems_are_named_at_once() -> None:
    """Two bad values are two remarks in the same line."""
    message = refusal(noise=-1.0, sigma="tanh")
    assert "noise: got -1.0" in message
    assert "sigma: got 'tanh'" in message


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in (RunConfig, FacesConfig) for name in kind.model_fields]
)
@given(value=ORDINARY)
@settings(max_examples=60)
def test_any_value_is_valid_or_refused_by_name(kind: type[TrainingConfig], name: str, value: Any) -> None:
    """Whatever a field is given, it holds that and survives JSON, or a line names the field."""
    result = outcome(kind, **{name: value})
    if isinstance(result, str):
        assert name in result
        assert len(result.splitlines()) == 1
    else:
        held = getattr(result, name)
        # A mapping is a configuration to start from.
        assert isinstance(held, FacesConfig) or held == (float(value) if isinstance(held, float) else value)
        assert kind(**json.loads(json.dumps(result.model_dump()))) == result


@given(values=st.dictionaries(st.sampled_from(FIELDS), ORDINARY))
@settings(max_examples=300)
def test_any_values_together_are_valid_or_refused_by_name(values: dict[str, Any]) -> None:
    """Whatever some fields are given, the configuration is valid or a line names one of them."""
    result = outcome(**values)
    if isinstance(result, str):
        assert any(name in result for name in values)
        assert len(result.splitlines()) == 1
    else:
        assert RunConfig(**result.model_dump()) == result


@pytest.mark.parametrize("name", ["noise", "size", "batch_size", "seed", "task"])
@pytest.mark.parametrize("value", [np.eye(3), 10**5000], ids=["matrix", "huge integer"])
def test_a_value_that_prints_badly_is_refused_in_one_line(name: str, value: object) -> None:
    """A value whose text has several lines, or is too long for Python to make, is refused like others."""
    message = refusal(**{name: value})
    assert message.startswith(f"{name}: got ")
    assert len(message) < 200


def test_an_unknown_name_with_a_line_break_is_refused_in_one_line() -> None:
    """The line stays one line whatever the unknown name is."""
    assert "noise" in refusal(**{"noise\nlevel": 0.1})


@pytest.mark.parametrize(("profile", "task"), list(product(PROFILES, TASKS)))
def test_every_profile_is_valid_for_every_task(profile: str, task: str) -> None:
    """A profile and a task are enough, for both models."""
    config = profile_config(profile, task)
    assert config.task == task
    assert profile_config(profile, task, model="deq").model == "deq"


def test_the_profiles_differ_in_size() -> None:
    """Each of `smoke`, `quick`, `overnight` and `paper` costs more image passes than the one before."""
    for task in TASKS:
        costs = [
            config.train_images * config.epochs * config.size**2
            for config in (profile_config(profile, task) for profile in PROFILES)
        ]
        assert costs == sorted(set(costs))


@pytest.mark.parametrize("task", TASKS)
def test_the_paper_profile_is_the_defaults(task: str) -> None:
    """`paper` changes nothing but the task and its noise."""
    chosen = {"task", "noise"}
    defaults = RunConfig(task=task).model_dump(exclude=chosen)
    assert profile_config("paper", task).model_dump(exclude=chosen) == defaults


@pytest.mark.parametrize("task", TASKS)
def test_the_first_iterate_follows_from_the_task(task: str) -> None:
    """Denoising starts from the data, the others from zero, unless another one is asked for."""
    assert RunConfig(task=task).start == ("data" if task == "denoising" else "zero")
    assert {RunConfig(task=task, start=start).start for start in ("data", "zero")} == {"data", "zero"}


def test_a_default_that_follows_from_a_wrong_value_is_no_second_problem() -> None:
    """The line names the task alone."""
    with pytest.raises(ConfigError, match=r"^task: got 'sharpening', allowed: [^;]*$"):
        RunConfig(task="sharpening")


@pytest.mark.parametrize("profile", ["Quick", "", None, 3])
@pytest.mark.parametrize("make", [profile_config, faces_config, lambda profile, task: grid(profile)])
def test_an_unknown_profile_is_refused(make: Callable[[Any, str], object], profile: Any) -> None:
    """The line names the profile that was asked for and the four that exist."""
    with pytest.raises(ConfigError) as caught:
        make(profile, "denoising")
    assert str(caught.value) == f"profile: got {profile!r}, allowed: smoke, quick, overnight, paper"


@pytest.mark.parametrize("profile", PROFILES)
def test_values_on_top_of_a_profile(profile: str) -> None:
    """None means the profile's value; any other value wins; a bad one is refused as always."""
    plain = profile_config(profile, "denoising")
    assert profile_config(profile, "denoising", noise=None, size=None, seed=None) == plain
    changed = profile_config(profile, "denoising", noise=0.0, epochs=7, tau=None)
    assert changed == RunConfig(**plain.model_dump() | {"noise": 0.0, "epochs": 7})
    with pytest.raises(ConfigError, match=r"^noise: got -1, allowed: "):
        profile_config(profile, "denoising", noise=-1)
    with pytest.raises(ConfigError, match=r"^nois: no such parameter"):
        profile_config(profile, "denoising", nois=1.0)


@pytest.mark.parametrize("profile", PROFILES)
def test_an_unknown_task_is_refused_in_every_profile(profile: str) -> None:
    """The task is checked like any other value."""
    with pytest.raises(ConfigError, match=r"^task: got 'inpaint', allowed: 'denoising', "):
        profile_config(profile, "inpaint")


LEVELS: dict[str, tuple[Any, ...]] = {
    "dataset": ("mnist",),
    "model": ("deq", "bilevel"),
    "task": ("inpainting", "denoising"),
    "noise": (0.0, 0.25),
    "tau": (0.25, 0.75, 3.0),
    "gamma": (0.0, 0.2),
    "lam": (0.9, 1.1),
    "sigma": ("softshrink", "relu"),
    "size": (7, 14),
    "train_images": (50, 60, 70),
    "test_images": (20, 30),
    "batch_size": (5, 10),
    "epochs": (1, 3),
    "learning_rate": (1e-3, 2e-3),
    "final_learning_rate": (0.0, 1e-5),
    "schedule": ("linear", "cosine"),
    "test_every": (1, 2),
    "solver": ("plain", "anderson"),
    "adjoint": ("solved", "neumann"),
    "neumann_steps": (0, 7),
    "adjoint_tol": (1e-4, 1e-2),
    "precondition": (True, False),
    "precision": ("float32", "tf32"),
    "start": ("zero", "data"),
    "tol": (1e-4, 1e-2),
    "max_steps": (20, 30),
    "memory": (3, 4),
    "regularization": (1e-5, 1e-3),
    "beta": (0.5, 1.0),
    "patience": (5, 20),
    "seed": (0, 1, 2**62),
    "time_budget": (0.5, 60.0),
}
"""Values for each parameter, any of which the smoke profile's grid can have."""


def levels(configs: list[RunConfig]) -> dict[str, set[Any]]:
    """The values of each parameter in a grid."""
    return {name: {getattr(config, name) for config in configs} for name in FIELDS}


def grid_refusal(profile: str, **values: Any) -> str:
    """The one line with which a grid is refused."""
    with pytest.raises(ConfigError) as caught:
        grid(profile, **values)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def test_the_papers_grid_is_all_combinations() -> None:
    """1620 configurations: models x tasks x noise levels x steps x weights x activations, no two equal."""
    configs = grid("paper")
    assert len(configs) == len(set(configs)) == 2 * 3 * 5 * 6 * 3 * 3
    found = levels(configs)
    assert found["model"] == set(MODELS)
    assert found["task"] == set(TASKS)
    assert found["noise"] == {0.0, 0.05, 0.1, 0.5, 1.0}
    assert found["tau"] == {0.01, 0.1, 0.5, 0.9, 1.1, 2.1}
    assert found["gamma"] == {0.1, 0.5, 1.0}
    assert found["sigma"] == {"relu", "softshrink", "identity"}


def test_the_papers_grid_has_the_papers_sizes() -> None:
    """All but the axes is the defaults: full images, 60,000 of them, 100 epochs, an hour for each run."""
    configs = grid("paper")
    found = levels(configs)
    for config in configs:
        defaults = RunConfig(task=config.task)
        assert all(getattr(config, name) == getattr(defaults, name) for name in FIELDS if name not in GRID)
    assert found["size"] == {28}
    assert found["train_images"] == {60_000}
    assert found["epochs"] == {100}


def test_the_quick_grid_thins_nothing_but_the_steps() -> None:
    """A sixth of the paper's grid or more, with every level of every axis but tau, and two of tau."""
    configs = grid("quick")
    assert len(configs) == len(set(configs)) >= 270
    found = levels(configs)
    assert all(found[name] == set(GRID[name]) for name in GRID if name != "tau")
    assert len(found["tau"]) >= 2
    assert found["tau"] <= set(GRID["tau"])


def test_the_smoke_grid_is_a_handful() -> None:
    """At most twenty small runs, of each task and model."""
    configs = grid("smoke")
    assert len(configs) == len(set(configs)) <= 20
    found = levels(configs)
    assert found["task"] == set(TASKS)
    assert found["model"] == set(MODELS)
    assert max(found["size"]) < 28


@pytest.mark.parametrize("profile", SWEEPS)
def test_every_configuration_has_its_partner(profile: str) -> None:
    """What is trained with one model is trained with the other, all else being equal."""
    configs = set(grid(profile))
    for config in configs:
        (other,) = set(MODELS) - {config.model}
        assert config.model_copy(update={"model": other}) in configs


FOLLOWING = ("start", "adjoint")
"""Parameters whose default follows from the task."""


@pytest.mark.parametrize("name", FIELDS)
def test_any_parameter_is_a_value_or_an_axis(name: str) -> None:
    """A value fixes a parameter; a list, or a tuple, makes it an axis and leaves the others alone."""
    values = LEVELS[name]
    plain = grid("smoke")

    def rest(configs: list[RunConfig]) -> dict[str, set[Any]]:
        own = {"task", *FOLLOWING} if name == "task" else {name}
        return {other: found for other, found in levels(configs).items() if other not in own}

    for value in values:
        single = grid("smoke", **{name: value})
        assert single == grid("smoke", **{name: [value]}) == grid("smoke", **{name: (value,)})
        assert levels(single)[name] == {value}
        assert rest(single) == rest(plain)
    every = grid("smoke", **{name: list(values)})
    assert every == grid("smoke", **{name: values})
    assert levels(every)[name] == set(values)
    assert rest(every) == rest(plain)
    had = 1 if name in FOLLOWING else len(levels(plain)[name])
    assert len(every) == len(set(every)) == len(plain) // had * len(values)


@pytest.mark.parametrize("profile", SWEEPS)
def test_none_leaves_the_profiles_values(profile: str) -> None:
    """None for every parameter is the profile's grid."""
    assert grid(profile, **dict.fromkeys(FIELDS)) == grid(profile)


def test_equal_values_are_one_level() -> None:
    """A value that is given twice, or as an integer and as a float, makes no second configuration."""
    assert grid("smoke", noise=[0.1, 0.1, 1 / 10]) == grid("smoke", noise=0.1)
    assert grid("smoke", gamma=[1, 1.0], epochs=(2, 2)) == grid("smoke", gamma=1.0, epochs=2)


@pytest.mark.parametrize("profile", SWEEPS)
@pytest.mark.parametrize(
    ("name", "value", "start"),
    [
        *((name, [], f"{name}: got an empty list, allowed: one value or more") for name in FIELDS),
        *((name, (), f"{name}: got an empty list, allowed: one value or more") for name in GRID),
        ("taus", 0.5, "taus: no such parameter, allowed: "),
        ("taus", [0.5], "taus: no such parameter, allowed: "),
        ("tau", math.nan, "tau: got nan, allowed: a finite number"),
        ("tau", [0.5, math.nan], "tau: got nan, allowed: a finite number"),
        ("noise", [0.1, math.inf], "noise: got inf, allowed: a finite number"),
        ("noise", [0.1, -0.1], "noise: got -0.1, allowed: greater than or equal to 0"),
        ("gamma", -1, "gamma: got -1, allowed: greater than or equal to 0"),
        ("tau", [0.5, 0], "tau: got 0, allowed: greater than 0"),
        ("tau", [0.5, "0.9"], "tau: got '0.9', allowed: a valid number"),
        ("tau", [0.5, None], "tau: got None, allowed: a valid number"),
        ("tau", [[0.5]], "tau: got [0.5], allowed: a valid number"),
        ("tau", {0.5: 0.9}, "tau: got {0.5: 0.9}, allowed: a valid number"),
        ("epochs", [1, 2.0], "epochs: got 2.0, allowed: a valid integer"),
        ("seed", [0, -1], "seed: got -1, allowed: greater than or equal to 0"),
        ("sigma", ["relu", "tanh"], "sigma: got 'tanh', allowed: 'relu', 'softshrink' or 'identity'"),
        ("task", "inpaint", "task: got 'inpaint', allowed: 'denoising', 'inpainting' or 'deblurring'"),
        ("task", ["denoising", True], "task: got True, allowed: "),
        ("size", [14, 10], "size: got 10, allowed: a divisor of 28"),
        ("batch_size", [1, 60_001], "batch_size: got 60001, allowed: at most train_images = "),
    ],
)
def test_a_bad_axis_is_refused(profile: str, name: str, value: Any, start: str) -> None:
    """One bad value among good ones, an empty axis or a misspelt one: the line names the parameter."""
    assert grid_refusal(profile, **{name: value}).startswith(start)


@given(
    axes=st.fixed_dictionaries(
        {
            "noise": st.lists(st.floats(0, 2), min_size=1, max_size=3),
            "tau": st.lists(st.floats(0.01, 3), min_size=1, max_size=3),
            "sigma": st.lists(st.sampled_from(GRID["sigma"]), min_size=1, max_size=4),
            "model": st.lists(st.sampled_from(MODELS), min_size=1, max_size=3),
            "seed": st.lists(st.integers(0, 3), min_size=1, max_size=3),
        }
    )
)
def test_the_size_of_a_grid_is_the_product_of_its_levels(axes: dict[str, list[Any]]) -> None:
    """Every combination of distinct levels is there once, and nothing else."""
    configs = grid("smoke", task="denoising", **axes)
    combinations = set(product(*axes.values()))
    assert len(configs) == math.prod(len(set(values)) for values in axes.values())
    assert {tuple(getattr(config, name) for name in axes) for config in configs} == combinations


@pytest.mark.parametrize("name", sorted(set(FIELDS) - {"size"}))
@given(value=st.one_of(ORDINARY, st.lists(ORDINARY, max_size=4)))
@settings(max_examples=30)
def test_any_axis_is_valid_or_refused_by_name(name: str, value: Any) -> None:
    """Whatever a parameter is given, its values are the grid's or a line names the parameter."""
    try:
        configs = grid("smoke", **{name: value})
    except ConfigError as error:
        configs, message = [], str(error)
    if not configs:
        assert name in message
        assert len(message.splitlines()) == 1
    elif value is None:
        assert configs == grid("smoke")
    else:
        axis = value if isinstance(value, list) else [value]
        numbers = (*FLOATS, "adjoint_tol")
        assert levels(configs)[name] == {float(level) if name in numbers else level for level in axis}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("tau", "0.5", 0.5),
        ("tau", "1e-3", 1e-3),
        ("tau", "3", 3),
        ("tau", "[0.1, 1e-2]", [0.1, 0.01]),
        ("tau", "null", None),
        ("tau", "~", None),
        ("tau", "None", None),
        ("seed", "007", 7),
        ("sigma", "relu", "relu"),
        ("sigma", "[relu, 'identity']", ["relu", "identity"]),
        ("sigma", "None", None),
        ("sigma", "no", "no"),
        ("precondition", "True", True),
        ("precondition", "false", False),
        ("precondition", "[yes, no]", [True, False]),
    ],
)
def test_parameters_are_parsed(name: str, text: str, value: object) -> None:
    """Numbers in every notation, names, booleans, lists of them, and None: whatever the parameter can be."""
    parsed = parse_parameters([[name, text]])
    assert parsed == {name: value}
    assert type(parsed[name]) is type(value)


@given(st.one_of(st.floats(allow_nan=False), st.integers(), st.booleans(), st.none()))
def test_what_python_prints_is_read_again(value: float | bool | None) -> None:
    """Alone and in a list, where the parameter can be one."""
    annotation = type(value) | None
    assert parse_parameters([["x", str(value)]], {"x": annotation}) == {"x": value}
    assert parse_parameters([["x", str([value, value])]], {"x": list[annotation]}) == {"x": [value, value]}


TEXTS = st.one_of(
    st.text().filter(lambda text: text.strip() != "~"),
    st.sampled_from(["scans #2", "2024-05-01", "a: b.jpg", "007", "1e3", "yes", "[a]", "{a}", " a"]),
)


@given(TEXTS)
def test_a_text_is_a_text(text: str) -> None:
    """Whatever it looks like; only None is one, and only where it is allowed."""
    assert parse_parameters([["x", text]], {"x": str}) == {"x": text}
    assert parse_parameters([["x", text]], {"x": str | None}) == {"x": text}
    for none in ("None", "null", "~"):
        assert parse_parameters([["x", none]], {"x": str | None}) == {"x": None}
        assert parse_parameters([["x", none]], {"x": str}) == {"x": none}


@pytest.mark.parametrize("text", ["[0.1", "[", "[&a [*b]]", "[" * 3000, "[a]: b", '["\\UFFFFFFFF"]'])
def test_lists_that_cannot_be_parsed_are_refused(text: str) -> None:
    """In one line that names the parameter."""
    with pytest.raises(ConfigError, match=r"^tau: got ") as refusal:
        parse_parameters([["tau", text]])
    assert "\n" not in str(refusal.value)


def test_a_parameter_cannot_replace_the_profile() -> None:
    """`profile` is no parameter of a run."""
    with pytest.raises(ConfigError, match="profile: no such parameter"):
        grid("smoke", profile="quick")
