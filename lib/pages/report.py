"""The report page of a profile, `results/quick/index.html`: `python -m lib.pages.report --profile quick`.

The page shows the figures' folders and the text of the notebooks, and computes nothing. It needs no network;
the executed notebooks become pages in the figures' folders. With `--answers` the committed answers are
printed as the table of the README instead.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jinja2
import nbformat
import pandas as pd
from latex2mathml.converter import convert_to_element
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from lib.experiments.config import ConfigError, require_name
from lib.experiments.plan import duration
from lib.experiments.profiles import PROFILES
from lib.experiments.provenance import PROVENANCE, read_described
from lib.experiments.records import COMMITTED
from lib.experiments.store import REPOSITORY, RESULTS, DamagedFile, write_atomic
from lib.figures.comparison import ANSWERS, Question
from lib.figures.style import sweep_budget
from lib.pages.notebooks import NOTEBOOKS
from lib.training import COMPLETED

READING = "## What one sees"
"""Heading of a notebook's cell that describes its figure."""

FINDINGS = "## What was found"
"""Heading of the README's section that opens the page."""

PICTURE = re.compile('<img alt="([^"]*)" src="([^"]*)"[^>]*>')

Answers = dict[tuple[str, str, str], dict[str, Question]]
"""Answered questions by figure, question and rule, and by profile."""


class _Renderer(IPythonRenderer):
    """Markdown without raw HTML, and formulas as MathML, which browsers draw without a script."""

    def __init__(self) -> None:
        super().__init__(escape=True, allow_harmful_protocols=False, exclude_anchor_links=True)

    def inline_math(self, body: str, display: str = "inline") -> str:
        try:
            math = convert_to_element(body, display=display)
        except Exception:
            # latex2mathml's errors have no base class of their own.
            return f"<code>{html.escape(body)}</code>"
        for node in math.iter():
            # The converter writes signs as character references but text verbatim.
            node.text = html.unescape(node.text) if node.text else None
        return ElementTree.tostring(math, encoding="unicode")

    def block_math(self, body: str) -> str:
        return self.inline_math(body, "block")


def markdown(source: str) -> Markup:
    """Return Markdown with formulas as HTML; raw HTML in it is shown as text."""
    return Markup(MarkdownWithMath(renderer=_Renderer()).render(source))


def build(profile: str, results: Path = RESULTS, notebooks: Path = NOTEBOOKS) -> Path:
    """Write the page of a profile, and the executed notebooks as pages beside their figures.

    Args:
        profile: name of the profile.
        results: folder of the results.
        notebooks: folder of the notebooks, one per figure.

    Returns:
        The path of the page.

    Raises:
        ConfigError: the profile is unknown.
    """
    require_name("profile", profile, PROFILES)
    folder, problems = results / profile, list[str]()
    figures = [_figure(source, folder, problems) for source in sorted(notebooks.glob("fig*.ipynb"))]
    committed = {name: results / where for name, where in COMMITTED.items() if name != profile}
    answers, budgets = _answers({profile: folder, **committed}, problems)
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    findings = readme.partition(FINDINGS)[2].partition("\n## ")[0]
    own = Counter(answer[profile].answer for answer in answers.values() if profile in answer)
    body = _rendered(
        "report.html.j2",
        profile=profile,
        findings=PICTURE.sub("", findings).strip(),
        pictures=[(alt, (REPOSITORY / path).read_bytes()) for alt, path in PICTURE.findall(findings)],
        figures=figures,
        counts={answer: own[answer] for answer in ANSWERS},
        questions=markdown(_table(answers, [profile, *committed], short=False)),
        rules=dict.fromkeys((name, rule) for name, _, rule in answers),
        budgets=budgets,
        problems=dict.fromkeys(problems),
    )
    title = f"Deep equilibrium models versus bilevel learning: the {profile} profile"
    write_atomic(folder / "index.html", _rendered("page.html.j2", title=title, body=body).encode())
    return folder / "index.html"


def answers_table(results: Path = RESULTS) -> str:
    """Return the committed answers of the profiles side by side, as a table in Markdown.

    Args:
        results: folder of the results, with the committed ones in `reference/`.

    Raises:
        DamagedFile: what is committed cannot be read; it names the files.
    """
    problems: list[str] = []
    answers, _ = _answers({name: results / where for name, where in COMMITTED.items()}, problems)
    if problems:
        raise DamagedFile("; ".join(problems))
    return _table(answers, list(COMMITTED), short=True)


def _answers(folders: Mapping[str, Path], problems: list[str]) -> tuple[Answers, dict[str, str]]:
    """Return the answers in the folders of some profiles, and the budgets that they hold for, by profile."""
    answers: Answers = {}
    budgets: dict[str, str] = {}
    for profile, folder in folders.items():
        for path in sorted(folder.glob("fig*/questions.json")):
            origin = _provenance(path.parent, problems)
            if content := _read(path, origin, problems):
                budgets.setdefault(profile, sweep_budget(origin["profile"], origin))
                for question in [Question(**stored) for stored in json.loads(content)]:
                    key = (path.parent.name, question.question, question.rule)
                    answers.setdefault(key, {})[profile] = question
    return {key: answers[key] for key in sorted(answers, key=lambda key: key[0])}, budgets


def _table(answers: Answers, profiles: list[str], short: bool) -> str:
    """Return a row per question; a short one has the numbers that decide alone."""
    lines = [["figure", "question", *profiles], ["---"] * (2 + len(profiles))]
    for (name, text, _), by_profile in answers.items():
        line = [str(int(name.removeprefix("fig"))), text]
        for profile in profiles:
            if question := by_profile.get(profile):
                numbers = question.numbers.partition(";")[0] if short else question.numbers
                line.append(f"{question.answer}: {numbers}".replace("-", "−"))
            else:
                line.append("–")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _provenance(folder: Path, problems: list[str]) -> dict[str, Any]:
    """Return the provenance in a folder; name it in `problems` if it is missing or damaged."""
    path = folder / PROVENANCE
    try:
        origin: dict[str, Any] = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        problems.append(f"{_place(path)} is missing or damaged")
        return {"sha256": {}}
    return origin


def _read(path: Path, origin: Mapping[str, Any], problems: list[str]) -> bytes:
    """Return the content of a file; name it in `problems` if it is missing or damaged."""
    try:
        return read_described(path, origin)
    except (FileNotFoundError, DamagedFile, KeyError):
        problems.append(f"{_place(path)} is missing or not the file that {PROVENANCE} describes")
        return b""


def _place(path: Path) -> str:
    return "/".join(path.parts[-3:])


def _figure(source: Path, results: Path, problems: list[str]) -> dict[str, Any]:
    """Return a figure for the template, and write its executed notebook as a page; name what is missing."""
    name = source.stem.partition("_")[0]
    cells = [c.source for c in nbformat.read(source, as_version=4).cells if c.cell_type == "markdown"]
    title, _, text = cells[0].partition("\n")
    reading = next((cell.removeprefix(READING) for cell in cells if cell.startswith(READING)), "")
    folder = results / name
    figure: dict[str, Any] = {"name": name, "number": int(name.removeprefix("fig"))}
    figure |= {"title": title.lstrip("# "), "caption": markdown(text.strip().partition("\n\n")[0])}
    figure |= {"reading": markdown(reading.strip()), "made": folder.is_dir(), "picture": b""}
    if (results / f"{name}.failed.ipynb").exists():
        problems.append(f"the last run of {name} failed: {results.name}/{name}.failed.ipynb has the error")
    if not figure["made"]:
        problems.append(f"{name} has not been made: make {name} PROFILE={results.name} makes it")
        return figure
    origin = _provenance(folder, problems)
    contents = {file: _read(folder / file, origin, problems) for file in origin["sha256"]}
    figure["picture"] = contents.get(f"{name}.png")
    numbers = contents.get(f"{name}.csv")
    figure["numbers"] = pd.read_csv(io.BytesIO(numbers)) if numbers else None
    figure["origin"] = _origin(origin) if contents else {}
    ends = figure["origin"].get("ends", {})
    problems += [f"{name}: {n:,} runs with status {end!r}" for end, n in ends.items() if end != COMPLETED]
    executed: dict[str, Any] = {}
    if (path := folder / f"{name}.ipynb").exists():
        notebook = nbformat.read(path, as_version=4)
        executed = notebook.metadata.get("papermill", {})
        write_atomic(folder / f"{name}.html", _page(notebook, name, figure["title"]).encode())
    else:
        problems.append(f"{_place(path)} is missing")
    parameters = executed.get("parameters", {}).items()
    figure["parameters"] = {key: value for key, value in parameters if key not in ("profile", "results")}
    figure["seconds"] = executed.get("duration")
    figure["files"] = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return figure


def _origin(stored: dict[str, Any]) -> dict[str, Any]:
    """Return a provenance with `ends`, the runs by status, and what `machines` trained and drew."""
    trained = stored["trained_on"]
    machines = [*(trained.values() if isinstance(trained, dict) else trained), stored["environment"]]
    # A sweep has counts, other figures have their runs.
    ends = stored.get("statuses") or Counter(run["status"] for run in stored["runs"].values())
    return stored | {"ends": ends, "machines": [m for i, m in enumerate(machines) if m not in machines[:i]]}


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
