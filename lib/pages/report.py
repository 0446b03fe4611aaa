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
from collections.abc import Collection, Mapping
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
from lib.figures.comparison import Question
from lib.pages.notebooks import PAGES, notebook_path, read_notebook
from lib.training import COMPLETED

READING = "## What one sees"
"""Heading of a notebook's cell that describes its figure."""

QUESTIONS = "questions.json"

FIGURES = [name for name in PAGES if name.startswith("fig")]

Answers = dict[tuple[str, str, str], dict[str, Question]]
"""Answered questions by figure, question and rule, and by profile."""


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
    committed = {name: results / where for name, where in COMMITTED.items() if name != profile}
    answers = _answers({profile: results / profile, **committed}, problems)
    body = _rendered(
        "report.html.j2",
        profile=profile,
        figures=figures,
        questions=markdown(_table(answers, [profile, *committed])),
        rules=dict.fromkeys((name, rule) for name, _, rule in answers),
        problems=dict.fromkeys(problems),
    )
    title = f"Deep equilibrium models versus bilevel learning: the {profile} profile"
    path = results / profile / "index.html"
    write_atomic(path, _rendered("page.html.j2", title=title, body=body).encode())
    return path


def answers_table(results: Path = RESULTS) -> str:
    """Return the committed answers of the profiles side by side, as a table in Markdown.

    Args:
        results: folder of the results, with the committed ones in `reference/`.

    Raises:
        DamagedFile: what is committed cannot be read; it names the files.
    """
    problems: list[str] = []
    answers = _answers({name: results / where for name, where in COMMITTED.items()}, problems)
    if problems:
        raise DamagedFile("; ".join(problems))
    return _table(answers, list(COMMITTED))


def _answers(folders: Mapping[str, Path], problems: list[str]) -> Answers:
    """Return the answers in the folders of some profiles."""
    answers: Answers = {}
    for name, (profile, folder) in product(FIGURES, folders.items()):
        if (folder / name / QUESTIONS).exists():
            content = _contents(folder / name, problems, [QUESTIONS])[1].get(QUESTIONS, b"[]")
            for question in [Question(**stored) for stored in json.loads(content)]:
                answers.setdefault((name, question.question, question.rule), {})[profile] = question
    return answers


def _table(answers: Answers, profiles: list[str]) -> str:
    """Return a row per question, with the numbers that decide it."""
    lines = [["figure", "question", *profiles], ["---"] * (2 + len(profiles))]
    for (name, text, _), by_profile in answers.items():
        line = [str(int(name.removeprefix("fig"))), text]
        for profile in profiles:
            answer = by_profile.get(profile)
            numbers = f"{answer.answer}: {answer.numbers.partition(';')[0]}" if answer else "–"
            line.append(numbers.replace("-", "−"))
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _contents(
    folder: Path, problems: list[str], names: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return a figure's provenance and its files, all if none is named; add what is damaged to `problems`."""
    place = f"{folder.parent.name}/{folder.name}"
    try:
        origin: dict[str, Any] = json.loads((folder / PROVENANCE).read_bytes())
    except (FileNotFoundError, ValueError):
        problems.append(f"{place}/{PROVENANCE} is missing or damaged")
        return {}, {}
    contents = {}
    for name in names or origin["sha256"]:
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
    folder = results / name
    figure: dict[str, Any] = {"name": name, "title": title.lstrip("# "), "picture": None}
    figure |= {"caption": markdown(text.strip().partition("\n\n")[0]), "reading": markdown(reading.strip())}
    if (results / f"{name}.failed.ipynb").exists():
        problems.append(f"the last run of {name} failed: {results.name}/{name}.failed.ipynb has the error")
    if not folder.is_dir():
        problems.append(f"{name} has not been made: make {name} PROFILE={results.name} makes it")
        return figure
    origin, contents = _contents(folder, problems)
    # A sweep has counts, other figures have their runs.
    ends = origin.get("statuses") or Counter(run["status"] for run in origin.get("runs", {}).values())
    problems += [f"{name}: {n:,} runs with status {end!r}" for end, n in ends.items() if end != COMPLETED]
    executed = folder / f"{name}.ipynb"
    parameters: dict[str, Any] = {}
    if executed.exists():
        notebook = read_notebook(executed)
        parameters = notebook.metadata.get("papermill", {}).get("parameters", {})
        write_atomic(folder / f"{name}.html", _page(notebook, name, figure["title"]).encode())
    else:
        problems.append(f"{results.name}/{name}/{executed.name} is missing")
    files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    parameters = {key: value for key, value in parameters.items() if key not in ("profile", "results")}
    figure |= {"picture": contents.get(f"{name}.png"), "parameters": parameters, "files": files}
    return figure | {"origin": origin, "ends": ends}


def _page(notebook: nbformat.NotebookNode, name: str, title: str) -> str:
    """Return an executed notebook as a page of its own: nbconvert's cells in our style."""
    for cell in notebook.cells:
        # The alternative text of the pictures.
        cell.metadata["alt"] = title
    exporter = HTMLExporter(template_name="basic", filters={"markdown2html": markdown})
    main = Markup("<main>{}</main>").format(Markup(exporter.from_notebook_node(notebook)[0]))
    back = Markup('<nav><a href="../index.html#{}">All figures</a></nav>').format(name)
    return _rendered("page.html.j2", title=title, body=back + main)


def _rendered(template: str, **variables: Any) -> Markup:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"markdown": markdown, "duration": duration}
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    return Markup(environment.get_template(template).render(variables))


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
