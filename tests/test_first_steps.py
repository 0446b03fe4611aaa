"""The first page for newcomers: the mathematics alone, short, and each of its checks holds."""

from __future__ import annotations

import ast

import nbformat

from lib.pages.notebooks import notebook_path

CODE = [c for c in nbformat.read(notebook_path("first_steps"), as_version=4).cells if c.cell_type == "code"]


def test_it_is_the_mathematics_alone_and_short() -> None:
    """Nothing is imported that trains, stores or draws for it, and the code fits on a page."""
    imported = set()
    for statement in ast.walk(ast.parse("\n".join(cell.source for cell in CODE))):
        if isinstance(statement, ast.ImportFrom):
            imported.add(statement.module)
        elif isinstance(statement, ast.Import):
            imported |= {name.name for name in statement.names}
    rooms = ("operators", "kernels", "regularizer", "models", "solvers", "implicit")
    assert imported == {"torch", "matplotlib", *(f"lib.{room}" for room in rooms)}
    lines = [line.strip() for cell in CODE for line in cell.source.splitlines()]
    assert sum(bool(line) and not line.startswith("#") for line in lines) <= 60


def test_what_it_checks_holds() -> None:
    """Each compared output says that something is so; numbers stand where they are not compared."""
    compared = [cell for cell in CODE if not cell.source.startswith("# NBVAL_IGNORE_OUTPUT")]
    said = "".join(out.text for cell in compared for out in cell.outputs).splitlines()
    assert len(said) == 6
    assert all(line.endswith(": True") for line in said)
