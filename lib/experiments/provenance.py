"""Files together with where they come from: the method, the machine, the time and their own checksums."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lib.experiments.method import METHOD_VERSION
from lib.experiments.runs import default_device, environment
from lib.experiments.store import DamagedFile, write_atomic

PROVENANCE = "provenance.json"


def write_with_provenance(
    folder: Path,
    files: Mapping[str, bytes],
    provenance: Mapping[str, Any],
    name: str = PROVENANCE,
    device: torch.device | str | None = None,
) -> list[Path]:
    """Write files, and beside them, last, where they come from.

    Args:
        folder: where to.
        files: contents by name.
        provenance: what to say beyond method, environment, time and checksums.
        name: of the file that says it.
        device: that the environment is of; the default one when None.

    Returns:
        The paths of all files.
    """
    record = {
        **provenance,
        "method": METHOD_VERSION,
        "environment": environment(device or default_device()),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sha256": {file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
    }
    contents = {**files, name: json.dumps(record, indent=1, default=float).encode()}
    for file, content in contents.items():
        write_atomic(folder / file, content)
    return [folder / file for file in contents]


def read_described(path: Path, provenance: Mapping[str, Any]) -> bytes:
    """Content of a file beside its provenance.

    Raises:
        OSError: it cannot be read.
        DamagedFile: it is not the file that was written.
    """
    content = path.read_bytes()
    if provenance["sha256"][path.name] != hashlib.sha256(content).hexdigest():
        raise DamagedFile(f"{path}: it is not the file that its provenance describes")
    return content
