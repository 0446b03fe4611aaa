"""Files that survive anything: atomic writes, checksums, and damaged files set aside by name."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "results"


class DamagedFile(RuntimeError):
    """A file whose content is not what was written; it names the file."""


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees either its old content or all of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's files are private; a result is as readable as any other new file.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def set_aside(path: Path, reason: str) -> Path:
    """Rename a file that cannot be used, say so in one line, and return its new path."""
    aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
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
