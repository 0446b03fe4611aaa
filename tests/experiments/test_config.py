"""Configurations: the paper's defaults, validation, profiles, grids and parsed parameters."""

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

from lib.experiments.config import MODELS, TASKS, ConfigError, FacesConfig, RunConfig, parse_parameters
from lib.experiments.profiles import ARMS, GRID, PROFILES, SWEEPS, faces_config, grid, profile_config

FIELDS = sorted(RunConfig.model_fields)
FLOATS = {name for name, field in RunConfig.model_fields.items() if field.annotation is float}
INTEGERS = {name for name, field in RunConfig.model_fields.items() if field.annotation is int}

VALUES = st.one_of(
    st.none() | st.booleans() | st.integers() | st.integers(0, 120) | st.floats() | st.floats(0, 1),
    st.text() | st.binary() | st.lists(st.integers()) | st.dictionaries(st.text(), st.floats()),
    st.sampled_from(["mnist", "faces", "deq", *TASKS, "relu", "plain", "second", "linear", "zero"]),
    st.builds(FacesConfig, filters=st.integers(1, 3), epochs=st.integers(1, 5)),
)
"""Values of many types, many of them valid for some field."""


def error_line(call: Callable[..., object], /, **values: Any) -> str:
    """Return the single line of the error for some values."""
    with pytest.raises(ConfigError) as caught:
        call(**values)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def levels(configs: list[RunConfig]) -> dict[str, set[Any]]:
    """Return the values of each parameter in a grid."""
    return {name: {getattr(config, name) for config in configs} for name in FIELDS}


def test_defaults_are_those_of_paper() -> None:
    config = RunConfig()
    assert (config.size, config.train_images, config.test_images) == (28, 60_000, 10_000)
    assert (config.solver, config.memory, config.regularization, config.beta) == ("anderson", 5, 1e-4, 1.0)
    assert (config.lam, config.tol, config.max_steps) == (1.0, 1e-3, 50)
    assert (config.learning_rate, config.final_learning_rate) == (1e-3, 1e-6)
    assert (config.batch_size, config.epochs, config.time_budget) == (100, 100, 3600.0)


@pytest.mark.parametrize("task", TASKS)
def test_task_determines_start_and_adjoint(task: str) -> None:
    expected = ("data", "solved") if task == "denoising" else ("zero", "neumann")
    assert (RunConfig(task=task).start, RunConfig(task=task).adjoint) == expected
    assert {RunConfig(task=task, start=start).start for start in ("data", "zero")} == {"data", "zero"}


def test_configurations_are_immutable_and_hashable() -> None:
    """Equal numbers of different types make equal configurations with equal hashes."""
    with pytest.raises(ValidationError):
        RunConfig().noise = 0.5
    assert RunConfig(noise=1) == RunConfig(noise=1.0) != RunConfig(noise=0.5)
    assert hash(RunConfig(noise=1)) == hash(RunConfig(noise=1.0))


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        *product(sorted(FLOATS), (math.nan, math.inf), ["a finite number"]),
        *product(sorted(FLOATS), ("0.1", True, None, [0.1]), ["a number"]),
        *product(sorted(INTEGERS), ("14", True, None, 14.0), ["an integer"]),
        ("noise", -0.1, "a number of at least 0"),
        ("tau", 0.0, "a number above 0"),
        ("sigma", "tanh", "'relu', 'softshrink' or 'identity'"),
        ("task", "sharpening", "'denoising', 'inpainting' or 'deblurring'"),
        ("model", None, "'bilevel' or 'deq'"),
        ("size", 56, "a number of at most 28"),
        ("size", 10, "a divisor of 28"),
        ("train_images", 60_001, "a number of at most 60000"),
        ("batch_size", 60_001, "at most train_images = 60000"),
        ("final_learning_rate", 0.01, "at most learning_rate = 0.001"),
        ("seed", 2**63, "a number below 9223372036854775808"),
    ],
)
def test_invalid_values_are_rejected(name: str, value: object, accepted: str) -> None:
    """No value is converted; the message has the parameter, the accepted values and the value."""
    assert error_line(RunConfig, **{name: value}) == f"`{name}` must be {accepted}, got {value!r}."


def test_several_errors_share_one_line() -> None:
    message = error_line(RunConfig, noise=-1.0, sigma="tanh", **{"epo\nchs": 1})
    assert all(part in message for part in ("got -1.0.", "got 'tanh'.", "is not a parameter;"))
    assert all(name in message for name in FIELDS)
    assert len(error_line(RunConfig, seed=np.eye(99))) < 200


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            lambda: RunConfig(task="deblurring", size=4),
            "`size` must be at least 5, the side of the blur, got 4.",
        ),
        (lambda: profile_config("Quick", "denoising"), "`profile` must be one of smoke, quick, "),
        (lambda: grid("Quick"), "`profile` must be one of smoke, quick, "),
        (lambda: profile_config("quick", "denoising", nois=1.0), "`nois` is not a parameter; choose from "),
        (lambda: grid("smoke", tau=[]), "`tau` must have at least one value, got an empty list."),
        (lambda: grid("smoke", tau=[0.5, None]), "`tau` must be a number, got None."),
        (lambda: grid("smoke", size=[14, 10]), "`size` must be a divisor of 28, got 10."),
        (lambda: FacesConfig(coupling="weighted"), "`coupling` must be 'free' with model = bilevel, where "),
        (
            lambda: FacesConfig(model="deq", coupling="weighted", initial=FacesConfig(model="deq")),
            "`initial` must have model = 'bilevel', got 'deq'.",
        ),
    ],
)
def test_invalid_combinations_profiles_and_axes_are_rejected(call: Callable[[], object], line: str) -> None:
    assert error_line(call).startswith(line)


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in (RunConfig, FacesConfig) for name in kind.model_fields]
)
@given(value=VALUES)
@settings(max_examples=30)
def test_any_value_is_valid_or_rejected_by_name(
    kind: type[RunConfig | FacesConfig], name: str, value: Any
) -> None:
    """A valid value is stored unchanged and survives JSON."""
    try:
        config = kind(**{name: value})
    except ConfigError:
        assert name in error_line(kind, **{name: value})
        return
    stored = getattr(config, name)
    # A mapping is a configuration to start from.
    assert isinstance(stored, RunConfig | FacesConfig) or stored == (
        float(value) if isinstance(stored, float) else value
    )
    assert kind(**json.loads(json.dumps(config.model_dump()))) == config


def test_profiles_are_valid_and_increase_in_cost() -> None:
    """Each needs more passes over pixels than the one before, for every task and model."""
    for task, model in product(TASKS, MODELS):
        configs = [profile_config(profile, task, model=model) for profile in PROFILES]
        costs = [config.train_images * config.epochs * config.size**2 for config in configs]
        assert costs == sorted(set(costs))
        assert configs[-1] == RunConfig(task=task, model=model, noise=configs[-1].noise)
        assert all(faces_config(profile, task, model=model).task == task for profile in PROFILES)


def test_values_override_profile() -> None:
    plain = profile_config("quick", "denoising")
    assert profile_config("quick", "denoising", noise=None, seed=None) == plain
    assert profile_config("quick", "denoising", epochs=7) == plain.model_copy(update={"epochs": 7})


def test_grid_of_paper_has_all_combinations() -> None:
    """The grid has six axes with the paper's sizes, for each of the three models."""
    configs = grid("paper")
    assert len(configs) == len(set(configs)) == len(ARMS) * 3 * 5 * 6 * 3 * 3
    axes = levels(configs)
    assert (axes["model"], axes["task"]) == (set(MODELS), set(TASKS))
    assert (axes["gamma"], axes["sigma"]) == ({0.1, 0.5, 1.0}, {"relu", "softshrink", "identity"})
    assert axes["noise"] == {0.0, 0.05, 0.1, 0.5, 1.0}
    assert axes["tau"] == {0.01, 0.1, 0.5, 0.9, 1.1, 2.1}
    assert all(config == RunConfig(**{name: getattr(config, name) for name in GRID}) for config in configs)


@pytest.mark.parametrize("profile", SWEEPS)
def test_grids_pair_models_on_every_task(profile: str) -> None:
    configs = grid(profile)
    bilevel, *deqs = (
        {c for c in configs if (c.model, c.initial) == (arm["model"], arm.get("initial", "independent"))}
        for arm in ARMS.values()
    )
    for deq in deqs:
        changes = {"model": "bilevel", "initial": "independent"}
        assert {config.model_copy(update=changes) for config in deq} == bilevel
    assert levels(configs)["task"] == set(TASKS)


def test_any_parameter_can_be_an_axis() -> None:
    """A list or tuple is an axis of distinct values, a value fixes a parameter, None has no effect."""
    plain = grid("smoke")
    assert grid("smoke", **dict.fromkeys(FIELDS)) == plain
    axes: dict[str, Any] = {"patience": (5, 20), "start": ["zero", "data"], "lam": [1, 1.0, 2]}
    combinations = {tuple(getattr(config, name) for name in axes) for config in grid("smoke", **axes)}
    assert combinations == set(product(*axes.values()))
    assert len(grid("smoke", **axes)) == len(plain) * 2**3
    assert levels(grid("smoke", tau=0.25))["tau"] == {0.25}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("tau", "1e-3", 1e-3),
        ("tau", "[0.1, 1e-2]", [0.1, 0.01]),
        ("tau", "none", None),
        ("tau", "[0.1", "[0.1"),
        ("seed", "007", 7),
        ("sigma", "[relu, 'identity']", ["relu", "identity"]),
        ("sigma", "no", "no"),
        ("precondition", "[true, False]", [True, False]),
    ],
)
def test_parameter_values_are_parsed(name: str, text: str, value: object) -> None:
    parsed = parse_parameters([[name, text]])
    assert parsed == {name: value}
    assert type(parsed[name]) is type(value)


@given(st.text() | st.sampled_from(["scans #2", "2024-05-01", "a: b.jpg", "007", "yes", "[a]", "None"]))
def test_text_parameters_are_not_converted(text: str) -> None:
    assert parse_parameters([["x", text]], {"x": str}) == {"x": text}
