"""A killed training, the extreme values of parameters, and texts that make no sense."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from lib.experiments.__main__ import one_config
from lib.experiments.build import make_training
from lib.experiments.config import ConfigError, RunConfig
from lib.experiments.records import load_run, read_checkpoint
from lib.experiments.runs import train_stack
from lib.experiments.store import REPOSITORY

CONFIG = RunConfig(size=4, train_images=4, test_images=2, batch_size=4, epochs=4, max_steps=20)

KILLED = f"""
import itertools, os, signal, sys
from lib.experiments import config, runs
calls = itertools.count()
os.fsync = lambda descriptor: next(calls) == 2 and os.kill(os.getpid(), signal.SIGKILL)
runs.CHECKPOINT_SECONDS = 0
runs.train_stack([config.RunConfig(**{CONFIG.model_dump()})], sys.argv[1], lambda *progress: None)
"""


def test_a_training_killed_while_it_writes_resumes_to_the_same_bits(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=REPOSITORY)
    assert killed.returncode == -signal.SIGKILL
    assert (read_checkpoint(CONFIG, tmp_path) or {}).get("epoch") == 2
    train_stack([CONFIG], tmp_path, lambda *progress: None)
    (undisturbed,), resumed = make_training([CONFIG]).run(), load_run(CONFIG, tmp_path)
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in undisturbed.weights.items())


@pytest.mark.parametrize("name", ["noise", "tau", "gamma", "lam", "regularization"])
def test_the_largest_and_the_smallest_values_can_be_trained(name: str) -> None:
    (largest,) = (limit.le for limit in RunConfig.model_fields[name].metadata if hasattr(limit, "le"))
    for value in (largest, 5e-324):
        (history,) = make_training([RunConfig(**CONFIG.model_dump() | {name: value})]).run()
        assert history.status in ("completed", "diverged")


@given(name=st.sampled_from(sorted(RunConfig.model_fields)) | st.text(), text=st.text("[]{}&*!'\"01e.~\n"))
@example(name="tau", text="&a [*a]")
@example(name="\x1b[2J", text="!!float ''")
def test_any_text_is_a_value_or_refused_in_one_line(name: str, text: str) -> None:
    message = "valid"
    try:
        one_config("smoke", [(name, text)])
    except ConfigError as error:
        message = str(error)
    assert message.isprintable()
