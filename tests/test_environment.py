"""The repository's own promises: one source of versions, targets that explain themselves, clean code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def lines(path: str) -> list[str]:
    return (ROOT / path).read_text(encoding="utf-8").splitlines()


def direct() -> dict[str, str]:
    """The direct dependencies that environment.yml pins."""
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in dependencies if isinstance(entry, dict))
    pins = [entry for entry in pip if not entry.startswith("-")]
    assert all("==" in pin for pin in pins), "every direct dependency is pinned"
    return dict(pin.split("==") for pin in pins)


def locked() -> dict[str, str]:
    """The resolved set that the Makefile installs from."""
    return dict(line.split("==") for line in lines("requirements.lock") if not line.startswith("#"))


def test_lock_holds_what_environment_names() -> None:
    names = {re.sub("[-_.]+", "-", name).lower(): pin for name, pin in locked().items()}
    for name, pin in direct().items():
        assert names[re.sub("[-_.]+", "-", name).lower()] == pin, name


def test_conda_is_held_to_the_lock() -> None:
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert "python=3.11" in dependencies
    pip = next(entry["pip"] for entry in dependencies if isinstance(entry, dict))
    assert "--constraint requirements.lock" in pip
    assert "-e ." in pip


def test_installed_is_what_is_locked() -> None:
    for name, pin in locked().items():
        assert version(name).partition("+")[0] == pin, name


def test_make_alone_prints_the_targets() -> None:
    printed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^make ([\w-]+)", printed, flags=re.MULTILINE)
    assert {"figures", "test", "lab", "figNN"} <= set(targets)
    assert len(targets) == len(set(targets))


@pytest.mark.parametrize(
    ("python", "expected"),
    [("/nonexistent/python3.11", "install Python 3.11"), ("false", "install Python 3.11")],
)
def test_wrong_python_gets_one_line(tmp_path: Path, python: str, expected: str) -> None:
    """A missing or wrong interpreter is named in one line before anything is installed."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", "--no-print-directory", "figures", f"PYTHON={python}"]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert outcome.returncode != 0
    said = [line for line in outcome.stdout.splitlines() if line]
    assert len(said) == 1
    assert expected in said[0]
    assert not (tmp_path / ".venv").exists()


def test_notebooks_use_the_python_of_the_environment() -> None:
    """The kernel of the notebooks is the one of the environment that runs the tests."""
    from jupyter_client.kernelspec import KernelSpecManager

    spec = KernelSpecManager().get_kernel_spec("python3")
    assert Path(spec.argv[0]).name.startswith("python")
    assert Path(spec.resource_dir).is_relative_to(sys.prefix)
