"""The report page of a profile, `results/quick/index.html`: `python -m lib.pages.report --profile quick`.

The page is made of what the figures' folders hold and of the notebooks' own words, and computes nothing. It
carries its pictures and its style, and is read without a network; in the figures' folders lie the executed
notebooks as pages. With `--answers` the committed answers are printed as the table of the README instead.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
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
from lib.experiments.method import METHOD_VERSION
from lib.experiments.profiles import PROFILES
from lib.experiments.provenance import PROVENANCE, read_described
from lib.experiments.runs import COMMITTED
from lib.experiments.store import REPOSITORY, RESULTS, DamagedFile, write_atomic
from lib.experiments.sweep import duration
from lib.figures.comparison import ANSWERS, Question
from lib.figures.style import sweep_budget
from lib.pages.notebooks import NOTEBOOKS
from lib.training import COMPLETED

TEMPLATES = Path(__file__).parent / "templates"

READING = "## What one sees"
"""Heading of the cell of a notebook that says what its figure shows."""

READ_PROFILE = "quick"
"""The profile whose figures these cells were written about."""

FOUND = "## What was found"
"""Heading of the section of the README that the page opens with."""

PICTURE = re.compile('<img alt="([^"]*)" src="([^"]*)"[^>]*>')

QUESTIONS = "questions.json"
"""What a figure answers, as `lib.figures.style.save` writes it."""

LONG_TABLE = 14
"""Rows from which a table is folded."""


class _Renderer(IPythonRenderer):
    """Markdown without raw HTML, and formulas as MathML, which browsers draw without a script."""

    def __init__(self) -> None:
        super().__init__(escape=True, allow_harmful_protocols=False, exclude_anchor_links=True)

    def inline_math(self, body: str) -> str:
        try:
            math = convert_to_element(body)
        except Exception:
            # latex2mathml's errors have no base class of their own.
            return f"<code>{html.escape(body)}</code>"
        for node in math.iter():
            # The converter writes signs as character references, and text as it is: both become text here.
            node.text = html.unescape(node.text) if node.text else None
        return ElementTree.tostring(math, encoding="unicode")

    def block_math(self, body: str) -> str:
        formula = self.inline_math(body).replace('display="inline"', 'display="block"', 1)
        return f'<span class="formula">{formula}</span>'


def markdown(source: str) -> Markup:
    """Markdown with formulas as HTML; whatever HTML it holds is shown as text."""
    return Markup(MarkdownWithMath(renderer=_Renderer()).render(source))


def _table(numbers: pd.DataFrame, missing: str = "") -> Markup:
    form: Any = {"classes": "numbers", "index": False, "border": 0, "float_format": "{:.4g}".format}
    return Markup(numbers.to_html(na_rep=missing, **form))


def build(profile: str, results: Path = RESULTS, notebooks: Path = NOTEBOOKS) -> Path:
    """Write the page of a profile, and the executed notebooks beside their figures as pages.

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
    folder = results / profile
    entries = [_entry(source, folder) for source in sorted(notebooks.glob("fig*.ipynb"))]
    others = [other for other in COMMITTED if other != profile]
    budgets, committed_problems = dict.fromkeys([profile, *others], ""), list[str]()
    for entry in entries:
        answers = {profile: entry["answers"]}
        answers |= {name: _committed(name, entry["name"], results, committed_problems) for name in others}
        entry["rules"] = _by_rule({name: questions for name, (questions, _) in answers.items()})
        budgets = {name: budgets[name] or budget for name, (_, budget) in answers.items()}
    origins: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for entry in entries:
        for title in ("method", "machines", "data"):
            for value in entry["origin"].get(title, []):
                origins.setdefault(title, {}).setdefault(value, []).append(entry)
    body = _rendered(
        "report.html.j2",
        profile=profile,
        found=_found(REPOSITORY / "README.md"),
        entries=entries,
        answers={a: sum(q.answer == a for e in entries for q in e["answers"][0]) for a in ANSWERS},
        budgets=budgets,
        committed_problems=committed_problems,
        read_profile=READ_PROFILE,
        long_table=LONG_TABLE,
        reproducibility=_reproducibility(results / "bench"),
        origins=origins,
    )
    title = f"Deep equilibrium models versus bilevel learning: the {profile} profile"
    write_atomic(folder / "index.html", _rendered("page.html.j2", title=title, body=body).encode())
    return folder / "index.html"


def _rendered(template: str, **words: Any) -> Markup:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"markdown": markdown, "duration": duration}
    return Markup(environment.get_template(template).render(words))


def _found(readme: Path) -> dict[str, Any]:
    """What the README says was found: `pictures`, each with its `alt` text and `data`, and the `text`."""
    section = readme.read_text(encoding="utf-8").partition(f"{FOUND}\n")[2].partition("\n## ")[0]
    pictures = [{"alt": alt, "data": _data(readme.parent / path)} for alt, path in PICTURE.findall(section)]
    return {"pictures": pictures, "text": markdown(PICTURE.sub("", section).strip())}


def _data(picture: Path) -> str:
    """A picture in the place of its address."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def answers_table(results: Path = RESULTS) -> str:
    """The committed answers of the profiles side by side, as a table in Markdown.

    Args:
        results: folder of the results, with the committed ones in `reference/`.

    Raises:
        DamagedFile: what is committed cannot be read; it names the files.
    """
    problems: list[str] = []
    lines = [["figure", "question", *COMMITTED], ["---"] * (2 + len(COMMITTED))]
    for name in sorted({path.parent.name for path in (results / "reference").rglob(QUESTIONS)}):
        answers = {profile: _committed(profile, name, results, problems)[0] for profile in COMMITTED}
        for rows in _by_rule(answers).values():
            for question, found in rows.items():
                cells = [_short(found[profile]) if profile in found else "–" for profile in COMMITTED]
                lines.append([str(int(name[3:])), question, *cells])
    if problems:
        raise DamagedFile("; ".join(problems))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _short(question: Question) -> str:
    """The answer with the numbers that decide it."""
    return f"{question.answer}: {question.numbers.partition(';')[0]}".replace("-", "−")


def _by_rule(answers: Mapping[str, Sequence[Question]]) -> dict[str, dict[str, dict[str, Question]]]:
    """The answers of several profiles to a figure's questions, by rule, question and profile."""
    found: dict[str, dict[str, dict[str, Question]]] = {}
    for profile, questions in answers.items():
        for question in questions:
            found.setdefault(question.rule, {}).setdefault(question.question, {})[profile] = question
    return found


def _committed(profile: str, name: str, results: Path, problems: list[str]) -> tuple[list[Question], str]:
    """What the committed figure of a profile answers, and its budget; problems name its folder."""
    folder = results / COMMITTED[profile] / name
    told: list[str] = []
    answers = _answers(folder, told)
    problems += [f"{folder.relative_to(results.parent)}: {problem}" for problem in told]
    return answers


def _answers(folder: Path, problems: list[str]) -> tuple[list[Question], str]:
    """What a figure answers, and the line that says at which budget; nothing where it answers nothing."""
    if (path := folder / QUESTIONS).exists():
        with _told(problems, folder / PROVENANCE):
            origin = json.loads((folder / PROVENANCE).read_bytes())
            budget = sweep_budget(origin["profile"], origin)
            with _told(problems, path):
                return [Question(**question) for question in json.loads(read_described(path, origin))], budget
    return [], ""


@contextmanager
def _told(problems: list[str], path: Path) -> Iterator[None]:
    """A file that is missing, damaged or not what is expected becomes a sentence that names it."""
    try:
        yield
        return
    except FileNotFoundError:
        said = f"{path.name} is missing"
    except DamagedFile:
        said = f"{path.name} is not the file that {PROVENANCE} describes"
    except (OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        # What an OSError says has the whole path in it.
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        said = f"{path.name} cannot be read: {type(error).__name__}: {reason}"
    if said not in problems:
        problems.append(said)


def _entry(source: Path, results: Path) -> dict[str, Any]:
    """All that there is of one figure, for the template; its executed notebook becomes a page.

    Args:
        source: its notebook.
        results: folder of the profile's results.
    """
    name = source.stem.partition("_")[0]
    cells = [c.source for c in nbformat.read(source, as_version=4).cells if c.cell_type == "markdown"]
    title, _, first = cells[0].partition("\n")
    reading = next((text.removeprefix(READING) for text in cells if text.startswith(READING)), "")
    folder, problems = results / name, list[str]()
    entry: dict[str, Any] = {"name": name, "number": int(name[3:]), "title": title.lstrip("# ")}
    entry |= {"caption": markdown(first.strip().partition("\n\n")[0]), "reading": markdown(reading.strip())}
    entry |= {"origin": {}, "picture": "", "numbers": "", "rows": 0, "answers": ([], ""), "page": ""}
    entry |= {"seconds": None, "parameters": {}, "files": [], "problems": problems}
    failed = results / f"{name}.failed.ipynb"
    if failed.exists():
        problems.append(f"its last run failed: {failed.name} has the error")
    if not folder.is_dir():
        problems.append(f"it has not been made: make {name} PROFILE={results.name} makes it")
        return entry
    with _told(problems, path := folder / PROVENANCE):
        entry["origin"] = _origin(json.loads(path.read_bytes()))
        outcomes = entry["origin"]["outcomes"]
        lost = [f"{count:,} {ending}" for ending, count in outcomes.items() if ending != COMPLETED]
        problems += [f"of {sum(outcomes.values()):,} runs {', '.join(lost)}"] if lost else []
    for file in entry["origin"].get("sha256", {}):
        with _told(problems, folder / file):
            read_described(folder / file, entry["origin"])
    with _told(problems, path := folder / f"{name}.png"):
        entry["picture"] = _data(path)
    with _told(problems, path := folder / f"{name}.csv"):
        numbers = pd.read_csv(path)
        entry |= {"numbers": _table(numbers), "rows": len(numbers)}
    entry["answers"] = _answers(folder, problems)
    page = folder / f"{name}.html"
    page.unlink(missing_ok=True)
    with _told(problems, path := folder / f"{name}.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        executed = notebook.metadata.get("papermill", {})
        given = executed.get("parameters", {})
        entry["seconds"] = executed.get("duration")
        entry["parameters"] = {key: given[key] for key in given if key not in ("profile", "results")}
        write_atomic(page, _page(notebook, name, entry["title"]).encode())
        entry["page"] = f"{name}/{page.name}"
    entry["files"] = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return entry


def _page(notebook: nbformat.NotebookNode, name: str, title: str) -> str:
    """An executed notebook as a page of its own: nbconvert's cells in our style."""
    for cell in notebook.cells:
        # Of the pictures.
        cell.metadata["alt"] = title
    back = Markup('<nav><a href="../index.html#{}">All figures</a></nav>').format(name)
    body = back + Markup("<main>{}</main>").format(Markup(_exporter().from_notebook_node(notebook)[0]))
    return _rendered("page.html.j2", title=title, body=body)


@cache
def _exporter() -> HTMLExporter:
    """nbconvert's, made once, for it translates its templates anew each time."""
    return HTMLExporter(
        template_name="basic",
        filters={"markdown2html": markdown},
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )


def _origin(stored: dict[str, Any]) -> dict[str, Any]:
    """What the page says of a figure's provenance; of a sweep there are `statuses`, else `runs`."""
    trained = stored["trained_on"]
    machines = [*(trained.values() if isinstance(trained, dict) else trained), stored["environment"]]
    return {
        "created": str(stored["created"]),
        "outcomes": stored.get("statuses") or Counter(run["status"] for run in stored["runs"].values()),
        "seconds": float(stored["training_seconds"]),
        "sha256": dict(stored["sha256"]),
        "method": [_version(stored["method"])],
        "machines": list(dict.fromkeys(map(_machine, machines))),
        "data": [f"{d}, {file}, {sha}" for d, files in stored["data"].items() for file, sha in files.items()],
    }


def _version(method: int | str) -> str:
    known = "the version that is" if method == METHOD_VERSION else "another version than the one"
    return f"{method}, {known} here"


def _machine(environment: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return (
        f"{environment['system']}, {environment['processor']}, accelerator {environment['accelerator']}; "
        f"Python {environment['python']}, {packages}"
    )


def _reproducibility(folder: Path) -> dict[str, Any]:
    """What differs between machines, by the benchmark's files, and `problems` with them."""
    problems: list[str] = []
    shown: dict[str, Any] = {"problems": problems}
    with _told(problems, path := folder / "reproducibility.csv"):
        table = pd.read_csv(path)
        shown |= {"table": _table(table, "–"), "gpu": table["machine"].str.contains("gpu", case=False).any()}
    with _told(problems, path := folder / "reproducibility_provenance.json"):
        stored = json.loads(path.read_bytes())
        shown |= {name: stored[name] for name in ("runs", "capability", "machines")}
        shown |= {"method": _version(stored["method"]), "measured_on": _machine(stored["environment"])}
    return shown


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
