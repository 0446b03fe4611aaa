"""Files of results: atomic writes and checksums."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "results"

Results = Path | str | None
"""A folder of results, with the runs in `runs/`; the repository's when None."""


def absolute(path: Path | str) -> Path:
    """Return a user's path: from the home folder after `~/`, else from the repository."""
    path = Path(path)
    # `~scan.png` is a name.
    return REPOSITORY / (path.expanduser() if path.parts[:1] == ("~",) else path)


class DamagedFile(RuntimeError):
    """Error of a file whose content is not what was written; its message names the file."""


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file and create its folder; readers see its old content or all of the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder: a rename is atomic within one file system only.
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
    """Return a line with the SHA-256 of `content`, and then `content`."""
    return hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def unsealed(file: bytes, path: Path) -> bytes:
    """Return the content of a file of `sealed`.

    Raises:
        DamagedFile: the content does not match its checksum; it names the path.
    """
    content = file.partition(b"\n")[2]
    if file != sealed(content):
        raise DamagedFile(f"{path}: its content does not match its checksum")
    return content
