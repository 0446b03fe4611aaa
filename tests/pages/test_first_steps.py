"""The pages of the mathematics alone: short, free of machinery, and each of their checks holds."""

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
def test_a_page_of_the_mathematics_is_short_and_its_checks_hold(name: str, checks: int, lines: int) -> None:
    """It imports nothing that stores or draws for it, and its compared outputs are facts that are true."""
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
