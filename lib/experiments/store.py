"""Files of results: atomic writes and checksums."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "results"

Results = Path | str | None
"""Folder of results, with runs in `runs/`; None takes that of the repository."""


def absolute(path: Path | str) -> Path:
    """Return an absolute path: relative to the home folder after `~/`, else to the repository."""
    path = Path(path)
    # `~scan.png` is a file name.
    return REPOSITORY / (path.expanduser() if path.parts[:1] == ("~",) else path)


class DamagedFile(RuntimeError):
    """File with changed content; the message has its path."""


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file atomically: readers see the old or the new content. Create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder: a rename is atomic only within a file system.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sealed(content: bytes) -> bytes:
    """Return a line with the SHA-256 of `content`, followed by `content`."""
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def unsealed(file: bytes, path: Path) -> bytes:
    """Return the content of a `sealed` file; raise `DamagedFile` if it does not match its checksum."""
    content = file.partition(b"\n")[2]
    if file != sealed(content):
        raise DamagedFile(f"{path}: its content does not match its checksum")
    return content
