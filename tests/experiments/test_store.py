"""Atomic writes, and checksums that detect damage."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lib.experiments.store import DamagedFile, sealed, unsealed, write_atomic


def test_write_creates_folders_and_replaces_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"old", b"", bytes(range(256))):
        write_atomic(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_interrupted_write_keeps_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"\n", b"content\r\n\x00\n"])
def test_checksum_detects_any_damage(content: bytes) -> None:
    """Every flipped bit and every truncation, in the content and in the checksum."""
    path, file = Path("file"), sealed(content)
    assert unsealed(file, path) == content
    flipped = [bytes([*file[:k], file[k] ^ 1 << k % 8, *file[k + 1 :]]) for k in range(len(file))]
    for damaged in [*flipped, *(file[:k] for k in range(len(file)))]:
        with pytest.raises(DamagedFile, match=r"^file: "):
            unsealed(damaged, path)
