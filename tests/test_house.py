"""The house: what each floor brings with it, and one meaning of each name."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lib.experiments.runs import RESULT_FILES
from lib.experiments.store import REPOSITORY

MATHEMATICS = sorted(f"lib.{Path(file).stem}" for file in RESULT_FILES if "/" not in file)
FIGURES = sorted(f"lib.figures.{path.stem}" for path in (REPOSITORY / "lib" / "figures").glob("[a-z]*.py"))


def brought(modules: list[str]) -> set[str]:
    """The packages that a bare process has after importing some modules."""
    code = f"import sys, {', '.join(modules)}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return set(process.stdout.split())


def test_the_mathematics_brings_torch_alone() -> None:
    """Nothing but this repository and what a bare `import torch` has."""
    assert len(MATHEMATICS) >= 7
    assert brought(MATHEMATICS) - brought(["torch"]) == {"lib"}


@pytest.mark.parametrize("modules", [FIGURES, ["lib.experiments.sweep"]], ids=["figures", "sweep"])
def test_drawing_brings_no_cluster(modules: list[str]) -> None:
    assert "submitit" not in brought(modules)


def test_a_public_name_means_one_thing() -> None:
    """No function, class or constant has the name of another one; commands may have their `main`."""
    names: Counter[str] = Counter()
    for path in (REPOSITORY / "lib").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names[node.name] += 1
            elif isinstance(node, ast.Assign):
                names.update(target.id for target in node.targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names[node.target.id] += 1
    del names["main"]
    assert {name for name, count in names.items() if count > 1 and not name.startswith("_")} == set()
