"""The report page of a profile, `results/quick/index.html`: `python -m lib.pages.report --profile quick`.

The page shows the figures' folders and the text of the notebooks, and computes nothing. It needs no network;
the executed notebooks become pages in the figures' folders. With `--answers` the committed answers are
printed as the table of the README instead.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from latex2mathml.converter import convert
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from lib.experiments.config import ConfigError, require_name
from lib.experiments.plan import duration
from lib.experiments.profiles import PROFILES
from lib.experiments.provenance import PROVENANCE, read_described
from lib.experiments.records import COMMITTED
from lib.experiments.store import RESULTS, DamagedFile, write_atomic
from lib.pages.notebooks import PAGES, notebook_path, read_notebook
from lib.training import COMPLETED

READING = "## What one sees"
"""Heading of a notebook's cell that describes its figure."""

QUESTIONS = "questions.json"

FIGURES = [name for name in PAGES if name.startswith("fig")]


TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader(__name__),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class _Renderer(IPythonRenderer):
    """Markdown with formulas as MathML, which browsers draw without a script."""

    def inline_math(self, body: str, display: str = "inline") -> str:
        try:
            return convert(body, display=display)
        except Exception:
            # latex2mathml's errors have no base class of their own.
            return f"<code>{html.escape(body)}</code>"

    def block_math(self, body: str) -> str:
        return self.inline_math(body, "block")


def markdown(source: str) -> Markup:
    """Return Markdown with formulas as HTML; raw HTML in it is shown as text."""
    return Markup(MarkdownWithMath(renderer=_Renderer(exclude_anchor_links=True)).render(source))


def build(profile: str, results: Path = RESULTS) -> Path:
    """Write the page of a profile, and the executed notebooks as pages beside their figures.

    Args:
        profile: name of the profile.
        results: folder of the results.

    Returns:
        The path of the page.

    Raises:
        ConfigError: the profile is unknown, or a notebook cannot be read.
    """
    require_name("profile", profile, PROFILES)
    problems: list[str] = []
    figures = [_figure(name, results / profile, problems) for name in FIGURES]
    page = TEMPLATES.get_template("report.html.j2")
    content = page.render(profile=profile, figures=figures, problems=problems, duration=duration)
    write_atomic(results / profile / "index.html", content.encode())
    return results / profile / "index.html"


def answers_table(results: Path = RESULTS) -> str:
    """Return the committed answers of the profiles side by side, as a table in Markdown.

    Args:
        results: folder of the results, with the committed ones in `reference/`.

    Raises:
        DamagedFile: a file is not what was committed.
    """
    answers: dict[tuple[int, str], dict[str, str]] = {}
    for name, (profile, where) in product(FIGURES, COMMITTED.items()):
        path = results / where / name / QUESTIONS
        if path.exists():
            origin = json.loads((path.parent / PROVENANCE).read_bytes())
            for question in json.loads(read_described(path, origin)):
                answer = f"{question['answer']}: {question['numbers'].partition(';')[0]}".replace("-", "−")
                answers.setdefault((int(name[3:]), question["question"]), {})[profile] = answer
    lines = [f"| figure | question | {' | '.join(COMMITTED)} |", "| --- " * (2 + len(COMMITTED)) + "|"]
    for (number, text), own in answers.items():
        numbers = " | ".join(own.get(profile, "–") for profile in COMMITTED)
        lines.append(f"| {number} | {text} | {numbers} |")
    return "\n".join(lines)


def _contents(folder: Path, problems: list[str]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return a figure's provenance and the files that it describes; add what is damaged to `problems`."""
    place = f"{folder.parent.name}/{folder.name}"
    try:
        origin: dict[str, Any] = json.loads((folder / PROVENANCE).read_bytes())
    except (FileNotFoundError, ValueError):
        problems.append(f"{place}/{PROVENANCE} is missing or damaged")
        return {}, {}
    contents = {}
    for name in origin["sha256"]:
        try:
            contents[name] = read_described(folder / name, origin)
        except (FileNotFoundError, DamagedFile):
            problems.append(f"{place}/{name} is missing or not the file that {PROVENANCE} describes")
    return origin, contents


def _figure(name: str, results: Path, problems: list[str]) -> dict[str, Any]:
    """Return a figure for the template, and write its executed notebook as a page; name what is missing."""
    notebook = read_notebook(notebook_path(name))
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    title, _, text = cells[0].partition("\n")
    reading = next((cell.removeprefix(READING) for cell in cells if cell.startswith(READING)), "")
    folder, executed = results / name, results / name / f"{name}.ipynb"
    figure: dict[str, Any] = {"name": name, "title": title.lstrip("# "), "made": folder.is_dir()}
    figure |= {"caption": markdown(text.strip().partition("\n\n")[0]), "reading": markdown(reading.strip())}
    if (results / f"{name}.failed.ipynb").exists():
        problems.append(f"the last run of {name} failed: {results.name}/{name}.failed.ipynb has the error")
    if not figure["made"]:
        problems.append(f"{name} has not been made: make {name} PROFILE={results.name} makes it")
        return figure
    origin, contents = _contents(folder, problems)
    # A sweep has counts, other figures have their runs.
    ends = origin.get("statuses") or Counter(run["status"] for run in origin.get("runs", {}).values())
    problems += [f"{name}: {n:,} runs with status {end!r}" for end, n in ends.items() if end != COMPLETED]
    if executed.exists():
        page = _page(read_notebook(executed), name, figure["title"])
        write_atomic(folder / f"{name}.html", page.encode())
    else:
        problems.append(f"{results.name}/{name}/{executed.name} is missing")
    figure["picture"] = base64.b64encode(contents.get(f"{name}.png", b"")).decode()
    figure |= {"origin": origin, "ends": ends, "questions": json.loads(contents.get(QUESTIONS, b"[]"))}
    return figure | {"files": sorted(path.name for path in folder.iterdir() if path.name[0] != ".")}


def _page(notebook: nbformat.NotebookNode, name: str, title: str) -> str:
    """Return an executed notebook as a page of its own: nbconvert's cells in our style."""
    for cell in notebook.cells:
        # The alternative text of the pictures.
        cell.metadata["alt"] = title
    exporter = HTMLExporter(template_name="basic", filters={"markdown2html": markdown})
    cells = Markup(exporter.from_notebook_node(notebook)[0])
    return TEMPLATES.get_template("page.html.j2").render(title=title, name=name, cells=cells)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.pages.report", description=__doc__)
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--answers", action="store_true", help="print the committed answers instead")
    options = parser.parse_args(arguments)
    try:
        print(answers_table() if options.answers else f"the report: {build(options.profile)}")
    except (ConfigError, DamagedFile) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
