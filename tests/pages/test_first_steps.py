"""Notebooks of the mathematics alone: short, without infrastructure, and with checks that hold."""

from __future__ import annotations

import ast

import nbformat
import pytest

from lib.pages.notebooks import notebook_path

MATHEMATICS = (
    "operators",
    "kernels",
    "regularizer",
    "models",
    "solvers",
    "implicit",
    "training",
    "deepinverse",
)


@pytest.mark.parametrize(("name", "checks", "lines"), [("first_steps", 6, 60), ("your_own", 7, 120)])
def test_mathematics_notebook_is_short_and_passes_checks(name: str, checks: int, lines: int) -> None:
    """It imports the mathematics, torch and matplotlib alone, and its compared outputs hold."""
    cells = nbformat.read(notebook_path(name), as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    imported = {
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse("\n".join(cell.source for cell in code)))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported <= {"torch", "matplotlib", *(f"lib.{module}" for module in MATHEMATICS)}
    written = [line for cell in code for line in cell.source.splitlines() if line.strip()]
    assert sum(not line.startswith("#") for line in written) <= lines
    compared = [cell for cell in code if not cell.source.startswith("# NBVAL_IGNORE_OUTPUT")]
    printed = "".join(output.text for cell in compared for output in cell.outputs).splitlines()
    assert len(printed) == checks
    assert all(line.endswith(": True") for line in printed)
