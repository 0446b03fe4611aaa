"""The environment: pinned versions, and `make` in a fresh clone."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib.experiments.store import REPOSITORY

PROGRAMS = {
    "python3.11": "exit 127",
    "python3.12": """case "$1" in -c) echo "$0" ;; *) mkdir -p "$2/bin"
        for tool in python ruff mypy lint-imports; do cp "${0%/*}/tool" "$2/bin/$tool"; done
        { pwd -P; cat requirements.lock; } > "$2/installed" ;; esac""",
    "tool": 'case "$0" in *mypy) exit 3 ;; esac',
}
"""Stubs: a Python that fails, a Python that creates an environment, and its tools, of which mypy fails."""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone in a folder with a space in its name, with stubs for Python and the tools."""
    folder, programs = tmp_path / "my clone", tmp_path / "programs"
    shutil.copytree(REPOSITORY / ".ci", folder / ".ci")
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(REPOSITORY / name, folder)
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    return folder


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{folder.parent / 'programs'}:{os.environ['PATH']}", "HOME": str(folder.parent)}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_lock_has_pinned_versions_of_environment() -> None:
    lock = (REPOSITORY / "requirements.lock").read_text().lower().splitlines()
    pins = re.findall(r"- (\S+==\S+)", (REPOSITORY / "environment.yml").read_text().lower())
    assert set(pins) <= set(lock)


def test_environment_is_rebuilt_for_another_folder_or_lock(clone: Path) -> None:
    """The first Python that runs makes it; another folder or lock rebuilds it once."""
    assert make(clone, "theory").stdout == "setting up .venv (once, some minutes)\n"
    moved = clone.rename(clone.with_name("moved"))
    assert f"made for the folder {clone}:" in make(moved, "theory").stdout
    with (moved / "requirements.lock").open("a") as lock:
        lock.write("more==1\n")
    assert "made for other packages" in make(moved, "theory").stdout
    assert make(moved, "theory").stdout == ""


def test_concurrent_setups_make_one_environment(tmp_path: Path) -> None:
    """`.venv` may be a link to another disk."""
    for name in (".ci/environment.py", "lib/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "requirements.lock").touch()
    (tmp_path / "disk").mkdir()
    (tmp_path / ".venv").symlink_to(tmp_path / "disk")
    command = [sys.executable, ".ci/environment.py", ".venv"]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate()[0] for process in both}
    assert printed == {"", "another make is setting up .venv: waiting for it\n"}
    assert [process.returncode for process in both] == [0, 0]
    imported = "import lib; print(lib.__file__)"
    shown = subprocess.check_output([".venv/bin/python", "-c", imported], cwd=tmp_path, text=True)
    assert shown.strip() == str(tmp_path / "lib" / "__init__.py")


def test_invalid_python_is_reported(clone: Path) -> None:
    assert make(clone, "PYTHON=/none/python", "theory").stdout.startswith("/none/python has no Python 3.11")


def test_make_test_runs_and_reports_every_part(clone: Path) -> None:
    parts = {"lint", "format", "imports", "types", "tests", "notebooks"}
    outcome = make(clone, "test")
    assert outcome.returncode
    assert set(outcome.stdout.splitlines()[-6:]) == {f"{part}: passed" for part in parts - {"types"}} | {
        "types: FAILED"
    }


def test_clean_keeps_trained_runs(clone: Path) -> None:
    for name in ("runs", "reference", "quick"):
        (clone / "results" / name).mkdir(parents=True)
    make(clone, "clean")
    assert sorted(path.name for path in (clone / "results").iterdir()) == ["reference", "runs"]


def test_pip_uses_only_package_sources_of_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.conf").write_text(
        "[global]\nuser = true\nindex-url = https://other\n[install]\nfind_links =\n  /one\n  /two\n"
    )
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror")
    monkeypatch.setenv("PIP_TARGET", "/elsewhere")
    sources = runpy.run_path(str(REPOSITORY / ".ci" / "environment.py"))["sources"]
    variables = sources(Path(sys.executable))
    assert variables["PIP_INDEX_URL"] == "https://mirror"
    assert variables["PIP_FIND_LINKS"] == "/one /two"
    assert not {"PIP_TARGET", "PIP_USER"} & set(variables)
