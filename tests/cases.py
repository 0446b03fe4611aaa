"""Shared by the tests of trainings and sweeps: a sweep with each outcome, and when members are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lib.experiments.trainer import Member, Metrics

TINY: dict[str, Any] = {
    "task": ["inpainting", "denoising"],
    "solver": "plain",
    "time_budget": [3600.0, 1e-6],
    "train_images": 20,
    "test_images": 10,
    "batch_size": 10,
}
"""For the grid of `smoke`: some diverge, for the step 2.1 is too long for the plain iteration, and some run
out of time."""


def timeless(history: Sequence[Metrics]) -> list[Metrics]:
    """A history without the seconds, which no two trainings share."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def assert_same_bits(one: Member, other: Member) -> None:
    assert (one.status, one.reason) == (other.status, other.reason)
    assert timeless(one.history) == timeless(other.history)
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())
