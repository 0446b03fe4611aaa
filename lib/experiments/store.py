"""Files that survive anything: atomic writes, checksums, and damaged files set aside by name."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "results"

Results = Path | str | None
"""A folder of results, with the runs in `runs/`; the repository's when None."""


class DamagedFile(RuntimeError):
    """A file whose content is not what was written; it names the file."""


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees either its old content or all of the new one.

    Raises:
        OSError: the file cannot be written; it names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    handle, temporary = _locked_temporary(path)
    try:
        # The lock is held until the file has its name: nobody takes it for a leftover before.
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            # mkstemp's files are private; a result is as readable as any other new file.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def _locked_temporary(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, open for writing, whose lock says that its writer lives."""
    while True:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except BaseException:
            os.close(handle)
            Path(temporary).unlink(missing_ok=True)
            raise
        # Between its creation and its lock another process may have taken it for a leftover.
        if os.fstat(handle).st_nlink:
            return handle, Path(temporary)
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, if there is one, and what killed writers left of it."""
    path.unlink(missing_ok=True)
    remove_leftovers(path)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of writers of `path` that were killed; those of living ones are locked."""
    pattern = re.compile(re.escape(f".{path.name}.") + "[a-z0-9_]{8}")
    for leftover in [other for other in path.parent.iterdir() if pattern.fullmatch(other.name)]:
        try:
            handle = os.open(leftover, os.O_RDWR)
        except (FileNotFoundError, PermissionError):
            # Another process was faster, or it is another user's.
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink(missing_ok=True)
        except BlockingIOError:
            continue
        finally:
            os.close(handle)


def set_aside(path: Path, reason: str) -> Path:
    """Rename a file that cannot be used, say so in one line, and return its new path."""
    stamp = time.time_ns()
    # A clock that stands still or was set back must not make a second damaged file replace the first one.
    while (aside := path.with_name(f"{path.name}.damaged-{stamp}")).exists():
        stamp += 1
    path.replace(aside)
    print(f"set aside {path} as {aside.name}: {reason}", file=sys.stderr)
    return aside


def write_sealed(path: Path, content: bytes) -> None:
    """Write `content` behind a line with its SHA-256, atomically."""
    seal = hashlib.sha256(content).hexdigest().encode()
    write_atomic(path, seal + b"\n" + content)


def read_sealed(path: Path) -> bytes:
    """Content of a file written by `write_sealed`.

    Raises:
        DamagedFile: the content does not match its seal.
    """
    seal, _, content = path.read_bytes().partition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != seal:
        raise DamagedFile(f"{path}: its content does not match its checksum")
    return content
