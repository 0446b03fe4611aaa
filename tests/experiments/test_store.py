"""Atomic writes, checksums that notice damage, and damaged files that are kept."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from lib.experiments.store import DamagedFile, read_sealed, set_aside, write_atomic, write_sealed


def test_a_write_creates_folders_and_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"old", b"", bytes(range(256))):
        write_atomic(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_any_damage_of_a_sealed_file_is_noticed(tmp_path: Path, content: bytes) -> None:
    """Every flipped bit and every lost end, in the content, the checksum or between."""
    path = tmp_path / "file"
    write_sealed(path, content)
    assert read_sealed(path) == content
    sealed = path.read_bytes()
    flipped = [bytes([*sealed[:k], sealed[k] ^ 1 << k % 8, *sealed[k + 1 :]]) for k in range(len(sealed))]
    for damaged in [*flipped, *(sealed[:k] for k in range(len(sealed) - (not content)))]:
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile, match=re.escape(str(path))):
            read_sealed(path)


def test_damaged_files_are_kept_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    asides = []
    for content in (b"first", b"second"):
        path.write_bytes(content)
        asides.append(set_aside(path, "it is broken"))
    assert [aside.read_bytes() for aside in asides] == [b"first", b"second"]
    assert [aside.name for aside in asides] == ["run.json.damaged-1", "run.json.damaged-2"]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"set aside {path} as {aside.name}: it is broken" for aside in asides]
