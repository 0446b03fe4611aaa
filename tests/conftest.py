"""Fixtures of several tests, and the settings of hypothesis."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import Phase, settings

# Processes that a shell starts in the background ignore interrupts, and so do their children.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Small tensors gain nothing from more threads, and pytest runs several processes.
torch.set_num_threads(1)

settings.register_profile("repeatable", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("repeatable")
settings.register_profile(
    "unshrunk", settings.get_profile("repeatable"), phases=[Phase.explicit, Phase.generate]
)
"""Stop at the first failing example without simplifying it (`--hypothesis-profile`)."""


# Benchmarks are programs, not modules with examples, and one of them needs a package of its own.
collect_ignore_glob = ["bench/bench*.py", "bench/pylopt_training.py"]


@pytest.fixture
def drawing() -> Iterator[None]:
    """Draw without a display, and close all figures at the end."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    with mpl.rc_context({"backend": "agg"}):
        yield
    plt.close("all")
