"""Files with their provenance: method, machine, time and checksums."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lib.experiments.method import METHOD_VERSION
from lib.experiments.processes import default_device
from lib.experiments.store import DamagedFile, write_atomic

PROVENANCE = "provenance.json"


def environment(device: torch.device | str | None = None) -> dict[str, Any]:
    """Return the versions of packages and the machine; None takes the default device."""
    device = torch.device(device or default_device())
    packages = ("torch", "torchvision", "numpy", "pandas", "matplotlib")
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
    }


def write_with_provenance(
    folder: Path,
    files: Mapping[str, bytes],
    provenance: Mapping[str, Any],
    name: str = PROVENANCE,
    device: torch.device | str | None = None,
) -> list[Path]:
    """Write files by name, then their provenance, and return all paths.

    Method, environment of the device, time and checksums are added to `provenance`.
    """
    record = {
        **provenance,
        "method": METHOD_VERSION,
        "environment": environment(device),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sha256": {file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
    }
    contents = {**files, name: json.dumps(record, indent=1, default=float).encode()}
    for file, content in contents.items():
        write_atomic(folder / file, content)
    return [folder / file for file in contents]


def read_described(path: Path, provenance: Mapping[str, Any]) -> bytes:
    """Return the content of a file, checked against its provenance.

    Raises:
        OSError: the file cannot be read.
        DamagedFile: the content does not match the checksum in its provenance.
    """
    content = path.read_bytes()
    if provenance["sha256"][path.name] != hashlib.sha256(content).hexdigest():
        raise DamagedFile(f"{path}: it is not the file that its provenance describes")
    return content
