"""Files that survive anything: atomic writes, seals that notice damage, and damaged files set aside."""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lib.experiments.store import REPOSITORY, DamagedFile, read_sealed, set_aside, write_atomic, write_sealed

CONTENTS = st.binary(max_size=200)

WRITE_FOR_EVER = """
import itertools, sys
from pathlib import Path
from lib.experiments.store import write_atomic
for k in itertools.count():
    write_atomic(Path(sys.argv[1]), bytes([k % 251]) * (1_000_000 + k % 251))
"""


def is_whole(content: bytes) -> bool:
    """Whether a file is one of those that `WRITE_FOR_EVER` writes, which tell their size by their bytes."""
    return content == bytes([content[0]]) * (1_000_000 + content[0])


@pytest.fixture(scope="module")
def sealed_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that hypothesis' examples write one after the other."""
    return tmp_path_factory.mktemp("sealed") / "file"


def test_a_write_creates_folders_and_replaces_the_file(tmp_path: Path) -> None:
    """The content is what was written last, and nothing else is left in the folder."""
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"old", b"", bytes(range(256))):
        write_atomic(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_a_reader_sees_whole_files_only(tmp_path: Path) -> None:
    """While a file is written again and again, each read gives all of one content."""
    path = tmp_path / "file"
    write_atomic(path, b"a" * 100_000)

    read = threading.Event()

    def write() -> None:
        for k in itertools.count():
            write_atomic(path, b"ba"[k % 2 : k % 2 + 1] * (200_000 - k % 2 * 100_000))
            if read.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    seen, count = set(), 0
    while len(seen) < 2 or count < 200:
        content = path.read_bytes()
        seen.add((len(content), *set(content)))
        count += 1
    read.set()
    writer.join()
    assert seen == {(100_000, ord("a")), (200_000, ord("b"))}


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["full disk", "interrupt"])
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """An exception after the bytes were written leaves the old content and no temporary file."""
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_cannot_start_or_end_leaves_no_temporary_file(tmp_path: Path) -> None:
    """Content that is not bytes, and a folder in the file's place, leave the folder as it was."""
    path, folder = tmp_path / "file", tmp_path / "folder"
    write_atomic(path, b"old")
    folder.mkdir()
    text: Any = "not bytes"
    with pytest.raises(TypeError):
        write_atomic(path, text)
    with pytest.raises(OSError, match="folder"):
        write_atomic(folder, b"new")
    assert path.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == [path, folder]


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    """A process killed with SIGKILL at any moment of its writes leaves one whole content."""
    path = tmp_path / "file"
    draws = random.Random(0)
    for _ in range(6):
        path.unlink(missing_ok=True)
        command = [sys.executable, "-c", WRITE_FOR_EVER, str(path)]
        with subprocess.Popen(command, cwd=REPOSITORY) as process:
            while not path.exists() and process.poll() is None:
                time.sleep(0.001)
            time.sleep(draws.uniform(0, 0.05))
            process.kill()
        assert process.returncode == -9
        assert is_whole(path.read_bytes())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    """A file is as readable as any other new file, also one that replaces a private one."""
    before = os.umask(umask)
    try:
        for path in (tmp_path / "new", tmp_path / "replaced"):
            if path.name == "replaced":
                path.touch(mode=0o600)
            write_atomic(path, b"content")
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    finally:
        assert os.umask(before) == umask


@given(content=CONTENTS)
@settings(max_examples=100)
@example(content=b"")
@example(content=b"\n")
@example(content=b"\r\n\x00\n")
def test_sealed_content_comes_back(sealed_path: Path, content: bytes) -> None:
    """Any bytes are read as they were written."""
    write_sealed(sealed_path, content)
    assert read_sealed(sealed_path) == content


@given(content=CONTENTS, data=st.data())
@settings(max_examples=200)
def test_any_flipped_bit_is_noticed(sealed_path: Path, content: bytes, data: st.DataObject) -> None:
    """One flipped bit anywhere, be it in the content, in the seal or between, is named as damage."""
    write_sealed(sealed_path, content)
    sealed = bytearray(sealed_path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(sealed) - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    sealed_path.write_bytes(sealed)
    with pytest.raises(DamagedFile, match=re.escape(str(sealed_path))):
        read_sealed(sealed_path)


@given(content=st.binary(min_size=1, max_size=200), data=st.data())
@settings(max_examples=200)
def test_any_truncation_is_noticed(sealed_path: Path, content: bytes, data: st.DataObject) -> None:
    """A file that lost its end, be it all or the last byte, is named as damaged."""
    write_sealed(sealed_path, content)
    sealed = sealed_path.read_bytes()
    sealed_path.write_bytes(sealed[: data.draw(st.integers(0, len(sealed) - 1))])
    with pytest.raises(DamagedFile, match=re.escape(str(sealed_path))):
        read_sealed(sealed_path)


def test_a_missing_sealed_file_is_not_called_damaged(tmp_path: Path) -> None:
    """A file that is not there is reported as missing."""
    with pytest.raises(FileNotFoundError):
        read_sealed(tmp_path / "missing")


def test_damaged_files_are_kept_under_names_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each file set aside keeps its content, beside the others, and one line names it and the reason."""
    path = tmp_path / "run.json"
    contents = [b"first", b"second", b"third"]
    kept = []
    for content in contents:
        path.write_bytes(content)
        kept.append(set_aside(path, "it is broken"))
        assert not path.exists()
    assert [aside.read_bytes() for aside in kept] == contents
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert all(aside.name.startswith("run.json.damaged-") for aside in kept)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"set aside {path} as {aside.name}: it is broken" for aside in kept]
