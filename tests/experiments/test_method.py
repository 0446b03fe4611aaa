"""Results of short trainings against a committed table; other results require the next `METHOD_VERSION`.

`python tests/experiments/test_method.py` writes the table of a new version.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from lib.experiments.build import Config, make_training
from lib.experiments.config import FacesConfig, RunConfig
from lib.experiments.method import METHOD_VERSION, METHODS
from lib.regularizer import DenseFieldsOfExperts

TABLE = Path(__file__).with_name("method.csv")

DIGITS = {"size": 7, "train_images": 40, "test_images": 20, "batch_size": 20, "epochs": 2, "tol": 1e-5}
FACES = {"reduction": 8, "train_images": 2, "test_images": 2, "epochs": 3, "test_every": 1, "tol": 1e-5}
OURS = {"filters": 4, "filter_size": 3, "initial": "cosine", "optimizer": "lbfgs", "learn_weight": True}

CONFIGS: dict[str, Config] = {
    "bilevel denoising": RunConfig(**DIGITS, gamma=0.5),
    "bilevel inpainting": RunConfig(
        **DIGITS, task="inpainting", sigma="softshrink", tau=0.1, precondition=True
    ),
    "bilevel deblurring": RunConfig(**DIGITS, task="deblurring", sigma="identity"),
    "deq denoising": RunConfig(**DIGITS, model="deq", sigma="identity", solver="plain"),
    "deq inpainting": RunConfig(**DIGITS, model="deq", task="inpainting", max_steps=12, neumann_steps=5),
    "deq deblurring": RunConfig(
        **DIGITS, model="deq", task="deblurring", sigma="softshrink", max_steps=12, adjoint="solved"
    ),
    "kernels bilevel denoising": FacesConfig(**FACES, precondition=True, filters=3, filter_size=3),
    "kernels deq inpainting": FacesConfig(
        **FACES, model="deq", task="inpainting", sharpness=20.0, warm_start=False
    ),
    "kernels deq deblurring": FacesConfig(
        **FACES, model="deq", task="deblurring", sharpness=20.0, max_steps=20, blur=3
    ),
    "kernels bilevel lbfgs": FacesConfig(**FACES, **OURS, differentiate_norm=True, sharpness=20.0),
}

TOLERANCES = {"loss": 1e-3, "moved": 1e-2, "steps": 0.1}
"""Largest relative differences, far above those between processors."""


def results_of(config: Config) -> dict[str, float]:
    """Train a configuration, and return its last losses, its solver steps and the changes of its weights."""
    training = make_training([config])
    start = {name: weight[0].clone() for name, weight in training.model.weights().items()}
    (member,) = training.run()
    last = member.rows[-1]
    names = ("train_loss", "test_loss", "forward_steps", "backward_steps")
    moved = {f"{name} moved": float((weight - start[name]).norm()) for name, weight in member.weights.items()}
    return {name: last[name] for name in names} | moved


def differences(name: str) -> list[str]:
    """Return the columns that differ from the table by more than another processor can explain."""
    expected = pd.read_csv(TABLE, index_col="configuration").loc[name].dropna()
    result = results_of(CONFIGS[name])
    assert result.keys() == set(expected.index)
    return [
        f"{column}: {result[column]}, expected {value}"
        for column, value in expected.items()
        if abs(result[column] - value) > TOLERANCES[re.split("[ _]", column)[-1]] * abs(value)
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_results_match_method_version(name: str) -> None:
    assert METHODS[METHOD_VERSION]
    assert differences(name) == [], "trainings have other results; add a version to lib/experiments/method.py"


@pytest.mark.parametrize("name", ["bilevel denoising", "deq deblurring"])
def test_change_of_mathematics_is_detected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    analysis = DenseFieldsOfExperts.analysis
    monkeypatch.setattr(DenseFieldsOfExperts, "analysis", lambda self, u: 1.02 * analysis(self, u))
    assert differences(name) != []


if __name__ == "__main__":
    rows = {name: results_of(config) for name, config in CONFIGS.items()}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("configuration")
    table.to_csv(TABLE, float_format="%.6g")
