"""Processes that work for this one, and end without a word when it goes, whatever the moment."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection, Pipe, wait
from queue import SimpleQueue
from threading import Thread, Timer
from typing import Any

from lib.experiments.store import REPOSITORY

Job = Callable[[Callable[[Any], None]], object]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_with_cores(count: int) -> ThreadPoolExecutor:
    """Threads among which the cores are divided: processes that they start do not take each other's.

    Args:
        count: of threads, at most; there is none without a core. Where the system binds no thread to cores,
            all share them.
    """
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    count = min(count, cores())
    shares: SimpleQueue[list[int]] = SimpleQueue()
    for k in range(count):
        shares.put(mine[k::count])

    def bind() -> None:
        if share := shares.get():
            os.sched_setaffinity(0, share)

    return ThreadPoolExecutor(count, initializer=bind)


def in_processes(jobs: Sequence[Job], count: int, hear: Callable[[Any], object]) -> None:
    """Do jobs in other processes, each of which gets the next one when it is free.

    Args:
        jobs: called with a function whose argument is told to this process; both can be pickled.
        count: of processes, at most.
        hear: called here with what the jobs tell; what it raises ends all processes.

    Raises:
        RuntimeError: a process was killed.
    """
    left = iter(jobs)
    with ExitStack() as stack:
        with interrupts_ignored():
            busy = [stack.enter_context(_process()) for _ in range(min(count, len(jobs)))]
        # Before one of them is waited for, all are told.
        stack.callback(_close, busy)
        while busy:
            for connection in wait(busy):
                assert isinstance(connection, Connection)
                try:
                    told = connection.recv()
                    if told is None and (job := next(left, None)):
                        connection.send(job)
                    elif told is None:
                        connection.close()
                        busy.remove(connection)
                except (EOFError, OSError):
                    raise RuntimeError("a training process was killed; run again to resume it") from None
                if told is not None:
                    hear(told)


def _close(connections: Sequence[Connection]) -> None:
    for connection in connections:
        connection.close()


END_SECONDS = 10.0
"""In which a process that is not needed any more does its last acts."""

_last_acts: list[Callable[[], object]] = []


@contextmanager
def at_the_end(act: Callable[[], object]) -> Iterator[None]:
    """What is done when the work in here ends before its time: by an exception, or with this process, when
    the one that it works for goes; then in another thread, at any moment of the work."""
    _last_acts.append(act)
    try:
        yield
    except BaseException:
        act()
        raise
    finally:
        _last_acts.remove(act)


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Processes started in here leave Ctrl-C to the one that asked for them, which gets it afterwards."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def _process() -> Iterator[Connection]:
    """The connection to a new process."""
    ours, theirs = Pipe()
    with ours, theirs, start(theirs.fileno()) as process:
        theirs.close()
        try:
            yield ours
        finally:
            ours.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            process.kill()


def start(descriptor: int) -> subprocess.Popen[bytes]:
    """A process that does what it is told on a connection, with the modules of this one and nobody else's."""
    path = [str(REPOSITORY), *map(str, sys.path)]
    code = (
        f"import sys; sys.path[:] = {path}; from lib.experiments import processes as p; p.serve({descriptor})"
    )
    command = [sys.executable, "-I", "-c", code]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[descriptor])


def serve(descriptor: int) -> None:
    """Body of such a process. It ends when the connection does, with its last acts, even while it imports
    what a job needs."""
    connection, jobs = Connection(descriptor), SimpleQueue[bytes]()

    def listen() -> None:
        with suppress(EOFError, OSError):
            while True:
                jobs.put(connection.recv_bytes())
        # The work may be in the middle of what a last act waits for, and stand still.
        late = Timer(END_SECONDS, os._exit, (1,))
        late.daemon = True
        late.start()
        for act in list(_last_acts):
            with suppress(Exception):
                act()
        os._exit(1)

    def tell(what: Any) -> None:
        # It fails when nobody listens any more, and then the other thread ends the process.
        with suppress(OSError):
            connection.send(what)

    Thread(target=listen, daemon=True).start()
    while True:
        tell(None)
        pickle.loads(jobs.get())(tell)
