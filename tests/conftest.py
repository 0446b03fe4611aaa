"""Fixtures of several tests, and the settings of hypothesis."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

# Interrupts are ignored by what a shell starts in the background, and by all that is started from there.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("repeatable", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("repeatable")
settings.register_profile(
    "unshrunk", settings.get_profile("repeatable"), phases=[Phase.explicit, Phase.generate]
)
"""Fails with the first example found, without looking for a simpler one (`--hypothesis-profile`)."""


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread for torch: the mathematical tests' small tensors gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def drawing() -> Iterator[None]:
    """Draws without a display, and closes what was drawn."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    with mpl.rc_context({"backend": "agg"}):
        yield
    plt.close("all")


TwoAtOnce = Callable[[str, str, Path], list[tuple[str, str]]]


@pytest.fixture
def two_at_once() -> TwoAtOnce:
    """Runs a script in two processes; both wait behind its imports and go on at the same moment.

    It takes the imports, the rest of the script and a path, which is the script's `sys.argv[1]`, and
    returns what each process wrote to its standard output and to its standard error.
    """

    def run(imports: str, body: str, path: Path) -> list[tuple[str, str]]:
        script = f"{imports}\nprint('ready', flush=True)\ninput()\n{body}"
        command = [sys.executable, "-c", script, str(path)]
        cwd, pipe = Path(__file__).parents[1], subprocess.PIPE
        processes = []
        with ExitStack() as stack:
            for _ in range(2):
                process = subprocess.Popen(command, cwd=cwd, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
                stack.enter_context(process)
                stack.callback(process.kill)
                processes.append(process)
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
            outputs = [process.communicate() for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        return outputs

    return run
