"""Configurations: the paper's defaults, every bad value refused in one line, and the profiles."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lib.config import PROFILES, ConfigError, RunConfig, profile_config
from lib.operators import TASKS

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


def outcome(**values: Any) -> RunConfig | str:
    """The configuration with these values, or the line with which it is refused."""
    try:
        return RunConfig(**values)
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


@pytest.mark.parametrize("name", FIELDS)
@given(value=ORDINARY)
@settings(max_examples=60)
def test_any_value_is_valid_or_refused_by_name(name: str, value: Any) -> None:
    """Whatever a field is given, it holds exactly that or is refused in a line that names the field."""
    result = outcome(**{name: value})
    if isinstance(result, str):
        assert name in result
        assert len(result.splitlines()) == 1
    else:
        assert getattr(result, name) == (float(value) if name in FLOATS else value)
        assert RunConfig(**result.model_dump()) == result


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
    """Each of `smoke`, `quick` and `paper` costs more image passes than the one before."""
    for task in TASKS:
        costs = [
            config.train_images * config.epochs * config.size**2
            for config in (profile_config(profile, task) for profile in ("smoke", "quick", "paper"))
        ]
        assert costs == sorted(set(costs))


@pytest.mark.parametrize("task", TASKS)
def test_the_paper_profile_is_the_defaults(task: str) -> None:
    """`paper` changes nothing but the task and its noise."""
    chosen = {"task", "noise"}
    assert profile_config("paper", task).model_dump(exclude=chosen) == RunConfig().model_dump(exclude=chosen)


@pytest.mark.parametrize("profile", ["Quick", "", None, 3])
def test_an_unknown_profile_is_refused(profile: Any) -> None:
    """The line names the profile that was asked for and the three that exist."""
    with pytest.raises(ConfigError) as caught:
        profile_config(profile, "denoising")
    assert str(caught.value) == f"profile: got {profile!r}, allowed: smoke, quick, paper"


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
