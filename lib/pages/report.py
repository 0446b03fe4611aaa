"""The report page of a profile, `results/quick/index.html`: `python -m lib.pages.report --profile quick`.

The page shows committed evidence, the figures' folders and the text of the notebooks, and computes nothing.
It needs no network; the executed notebooks become pages in the figures' folders.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from latex2mathml.converter import convert
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from lib.experiments.command import Parser, command
from lib.experiments.config import require_name
from lib.experiments.plan import duration
from lib.experiments.profiles import PROFILES
from lib.experiments.provenance import PROVENANCE, read_described
from lib.experiments.records import REFERENCE
from lib.experiments.store import RESULTS, DamagedFile, write_atomic
from lib.pages.notebooks import PAGES, notebook_path
from lib.training import COMPLETED

FINDINGS = "## Results"
"""Heading of a notebook's cell that describes its figure."""

QUESTIONS = "questions.json"

EVIDENCE = REFERENCE / "README.md"
"""Page of the committed evidence, whose tables `.ci/evidence.py` writes."""

FIGURES = [name for name in PAGES if name.startswith("fig")]

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader(__name__),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class _Renderer(IPythonRenderer):
    """Markdown with formulas as MathML, which browsers draw without a script, and tables that scroll."""

    def inline_math(self, body: str, display: str = "inline") -> str:
        return convert(body, display=display)

    def block_math(self, body: str) -> str:
        return self.inline_math(body, "block")

    def table(self, text: str) -> str:
        # A region with a name and a focus can be scrolled with the keyboard.
        region = '<div class="scroll" role="region" aria-label="Table" tabindex="0">'
        return f"{region}<table>{text}</table></div>"


def markdown(source: str) -> Markup:
    """Return Markdown as HTML with formulas and the pictures of `EVIDENCE`; raw HTML is shown as text."""
    renderer = _Renderer(exclude_anchor_links=True, embed_images=True, path=str(EVIDENCE.parent))
    return Markup(MarkdownWithMath(renderer=renderer).render(source))


def build(profile: str, results: Path = RESULTS) -> Path:
    """Write the page of a profile, and the executed notebooks as pages beside their figures.

    Args:
        profile: name of the profile.
        results: folder of the results.

    Returns:
        The path of the page.

    Raises:
        ConfigError: the profile is unknown.
    """
    require_name("profile", profile, PROFILES)
    problems: list[str] = []
    figures = [_figure(name, results / profile, problems) for name in FIGURES]
    page = TEMPLATES.get_template("report.html.j2")
    text = re.sub("<!--.*?-->", "", EVIDENCE.read_text(encoding="utf-8"))
    _, *parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    evidence = dict(zip(parts[::2], map(markdown, parts[1::2]), strict=True))
    shown = {"figures": figures, "problems": problems, "evidence": evidence, "duration": duration}
    content = page.render(profile=profile, **shown)
    write_atomic(results / profile / "index.html", content.encode())
    return results / profile / "index.html"


def _contents(folder: Path, problems: list[str]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return a figure's provenance and its files; add the first that is damaged to `problems`."""
    origin, contents = dict[str, Any](), dict[str, bytes]()
    try:
        origin = json.loads((folder / PROVENANCE).read_bytes())
        for name in origin["sha256"]:
            contents[name] = read_described(folder / name, origin)
    except (OSError, ValueError, DamagedFile) as error:
        problems.append(f"{folder.parent.name}/{folder.name} is damaged: {error}")
    return origin, contents


def _figure(name: str, results: Path, problems: list[str]) -> dict[str, Any]:
    """Return a figure for the template, and write its executed notebook as a page; name what is missing."""
    notebook = nbformat.read(notebook_path(name), as_version=4)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    title, _, text = cells[0].partition("\n")
    findings = next((cell.removeprefix(FINDINGS) for cell in cells if cell.startswith(FINDINGS)), "")
    folder, executed = results / name, results / name / f"{name}.ipynb"
    figure: dict[str, Any] = {"name": name, "title": title.lstrip("# "), "made": folder.is_dir()}
    figure["alt"] = next((cell.metadata["alt"] for cell in notebook.cells if "alt" in cell.metadata), title)
    figure |= {"caption": markdown(text.strip().partition("\n\n")[0]), "findings": markdown(findings.strip())}
    if (results / f"{name}.failed.ipynb").exists():
        problems.append(f"the last execution of {name} failed; see {results.name}/{name}.failed.ipynb")
    if not figure["made"]:
        problems.append(f"{name} is missing; run make {name} PROFILE={results.name}")
        return figure
    origin, contents = _contents(folder, problems)
    # A sweep has counts, other figures have their runs.
    ends = origin.get("statuses") or Counter(run["status"] for run in origin.get("runs", {}).values())
    problems += [f"{name}: runs with status {end!r}: {n:,}" for end, n in ends.items() if end != COMPLETED]
    if executed.exists():
        page = _page(nbformat.read(executed, as_version=4), name, figure["title"])
        write_atomic(folder / f"{name}.html", page.encode())
    figure["picture"] = base64.b64encode(contents.get(f"{name}.png", b"")).decode()
    figure |= {"origin": origin, "ends": ends, "questions": json.loads(contents.get(QUESTIONS, b"[]"))}
    return figure | {"files": sorted(path.name for path in folder.iterdir() if path.name[0] != ".")}


def _page(notebook: nbformat.NotebookNode, name: str, title: str) -> str:
    """Return an executed notebook as a page of its own: nbconvert's cells in our style."""
    for cell in notebook.cells:
        # The alternative text of the pictures.
        cell.metadata.setdefault("alt", title)
    exporter = HTMLExporter(template_name="basic", filters={"markdown2html": markdown})
    cells = Markup(exporter.from_notebook_node(notebook)[0])
    return TEMPLATES.get_template("page.html.j2").render(title=title, name=name, cells=cells)


@command
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m lib.pages.report", description=__doc__)
    parser.add_argument("--profile", default="quick")
    options = parser.parse(arguments)
    print(f"the report: {build(options.profile)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
