"""Cores, devices and worker processes of this machine."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_device() -> torch.device:
    """Return the GPU if torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def workers(device: torch.device) -> int:
    """Return the number of training processes: one per core, or one per accelerator."""
    return cores() if device.type == "cpu" else 1


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C while processes are started, so that they inherit the block."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
