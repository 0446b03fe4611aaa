"""The mathematics imports torch alone, also at run time, which import-linter does not check."""

from __future__ import annotations

import subprocess
import sys

from lib.experiments.store import REPOSITORY


def imported(modules: list[str]) -> set[str]:
    """Return the packages that a new process has after importing some modules."""
    code = f"import sys, {', '.join(modules)}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", code]
    return set(
        subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    )


def test_mathematics_imports_torch_alone() -> None:
    files = (REPOSITORY / "lib").glob("[a-z]*.py")
    modules = [f"lib.{path.stem}" for path in files if path.stem != "deepinverse"]
    assert imported(modules) - imported(["torch"]) == {"lib"}
