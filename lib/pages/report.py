"""The report page of a profile, `results/quick/index.html`: `python -m lib.pages.report --profile quick`.

The page is made of what the figures' folders hold and of the notebooks' own words, and computes nothing. It
carries its pictures and its style, and is read without a network; in the figures' folders lie the executed
notebooks as pages.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import html
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, TypeVar
from xml.etree import ElementTree

import jinja2
import nbformat
import pandas as pd
from latex2mathml import exceptions as tex
from latex2mathml.converter import convert_to_element
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter

from lib.experiments.config import ConfigError
from lib.experiments.profiles import PROFILES
from lib.experiments.runs import code_version
from lib.experiments.store import RESULTS, write_atomic
from lib.experiments.trainer import COMPLETED
from lib.figures.comparison import VERDICTS, Claim
from lib.pages.notebooks import NOTEBOOKS

T = TypeVar("T")

TEMPLATES = Path(__file__).parent / "templates"

READING = "## What one sees"
"""Heading of the cell of a notebook that says what its figure shows."""

READ_PROFILE = "quick"
"""The profile whose figures these cells were written about."""

LONG_TABLE = 14
"""Rows from which a table is folded."""

TEX_ERRORS: tuple[type[Exception], ...] = tuple(
    error for error in vars(tex).values() if isinstance(error, type) and issubclass(error, Exception)
)
"""latex2mathml's errors, which have no base class of their own."""

CLAIMS: TypeAdapter[list[Claim]] = TypeAdapter(list[Claim])


class Provenance(BaseModel):
    """What the page shows of a figure's `provenance.json`; of a sweep there are `statuses`, else `runs`."""

    created: str
    code: str
    data: dict[str, dict[str, str]]
    environment: dict[str, Any]
    trained_on: list[dict[str, Any]] | dict[str, dict[str, Any]]
    training_seconds: float
    sha256: dict[str, str]
    runs: dict[str, dict[str, Any]] = {}
    statuses: dict[str, int] = {}

    def outcomes(self) -> dict[str, int]:
        """Number of runs with each status."""
        return self.statuses or dict(Counter(str(run["status"]) for run in self.runs.values()))

    def machines(self) -> list[str]:
        """The machines that trained and drew, each with its packages, in a line."""
        trained = self.trained_on if isinstance(self.trained_on, list) else self.trained_on.values()
        return list(dict.fromkeys(_machine(each) for each in [*trained, self.environment]))


Number = Annotated[float, BeforeValidator(lambda text: "nan" if text == "" else text)]
"""A number of a CSV file, NaN where it is empty."""


class Difference(BaseModel):
    """A row of `bench/reproducibility.csv`: what a machine changes, at most, over the runs of a group.

    Attributes:
        kind, task, model: the group.
        machine: that is compared.
        test_loss: difference relative to the loss.
        test_psnr: in dB.
        test_steps: of the solver.
        test_unconverged: difference of a share of the samples.
        other_ends: number of runs that ended with another status.
    """

    model_config = ConfigDict(extra="forbid")

    kind: str
    task: str
    model: str
    machine: str
    test_loss: Number
    test_psnr: Number
    test_steps: Number
    test_unconverged: Number
    other_ends: Number = Field(alias="other ends")


DIFFERENCES: TypeAdapter[list[Difference]] = TypeAdapter(list[Difference])


class Environment(BaseModel):
    """The machine of a provenance."""

    system: str
    processor: str
    accelerator: str
    python: str
    packages: dict[str, str]


class Reproducibility(BaseModel):
    """What the page shows of `bench/reproducibility_provenance.json`, and the table beside it.

    Attributes:
        machines: environment variables that imitate each machine.
        runs: how many each of them trained.
        capability: vector instructions of the machine that all are compared with.
        code, environment: version and machine of the comparison.
        differences: rows of the table.
    """

    machines: dict[str, dict[str, str]]
    runs: int
    capability: str
    code: str
    environment: Environment
    differences: list[Difference] = []

    @property
    def measured_on(self) -> str:
        return _machine(self.environment.model_dump())

    def by_machine(self) -> dict[str, list[Difference]]:
        """The rows of each machine, in the order of the table."""
        return _by_value((row.machine, row) for row in self.differences)

    def has_gpu(self) -> bool:
        return any("gpu" in row.machine.lower() for row in self.differences)


@dataclass
class Entry:
    """What the page says about one figure.

    Attributes:
        name: of its folder, such as `fig02`.
        title, caption, reading: of its notebook.
        picture: the figure as a data URI, or empty.
        columns, rows: the numbers behind it.
        claims: what it decides.
        provenance: where it comes from, or None.
        page: whether its executed notebook lies beside it as a page.
        parameters: those that its notebook was executed with, beyond the profile's.
        seconds: that its notebook took.
        files: names of its files, to be linked.
        problems: what is missing or wrong, in sentences.
    """

    name: str
    title: str
    caption: Markup
    reading: Markup
    made: bool = True
    picture: str = ""
    columns: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    provenance: Provenance | None = None
    page: bool = False
    parameters: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    files: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def number(self) -> int:
        return int(self.name.removeprefix("fig"))

    def rules(self) -> Iterator[tuple[str, list[Claim]]]:
        """The claims under the rule that decides them."""
        for rule, claims in groupby(self.claims, lambda claim: claim.rule):
            yield rule, list(claims)


class _Renderer(IPythonRenderer):
    """Markdown without raw HTML, and formulas as MathML, which browsers draw without a script."""

    def __init__(self) -> None:
        super().__init__(escape=True, allow_harmful_protocols=False, exclude_anchor_links=True)

    def inline_math(self, body: str) -> str:
        return _mathml(body, "inline")

    def block_math(self, body: str) -> str:
        return f'<span class="formula">{_mathml(body, "block")}</span>'


def _mathml(formula: str, display: str) -> str:
    """A formula in TeX as MathML; as it is written if it cannot be converted."""
    try:
        math = convert_to_element(formula, display=display)
    except TEX_ERRORS:
        return f"<code>{html.escape(formula)}</code>"
    for node in math.iter():
        # The converter writes its signs as character references, and text as it is: both become text here.
        node.text = html.unescape(node.text) if node.text else None
    return ElementTree.tostring(math, encoding="unicode")


def markdown(source: str) -> Markup:
    """Markdown with formulas as HTML; whatever HTML it holds is shown as text."""
    return Markup(MarkdownWithMath(renderer=_Renderer()).render(source))


def duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s" if whole < 120 else _minutes(whole)


def _minutes(seconds: int) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _machine(environment: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items())
    return (
        f"{environment.get('system')}, {environment.get('processor')}, "
        f"accelerator {environment.get('accelerator')}; Python {environment.get('python')}, {packages}"
    )


def _shown(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def brief(value: float) -> str:
    """Two significant digits, but all of a whole number's; a dash for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:.0f}" if 10 <= abs(value) < 1e5 else f"{value:.2g}"


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
    if profile not in PROFILES:
        raise ConfigError(f"profile: got {profile!r}, allowed: {', '.join(PROFILES)}")
    folder = results / profile
    entries = [_entry(source, folder) for source in sorted(notebooks.glob("fig*.ipynb"))]
    provenances = [(entry, entry.provenance) for entry in entries if entry.provenance]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"markdown": markdown, "duration": duration, "brief": brief}
    page = environment.get_template("report.html.j2").render(
        profile=profile,
        entries=entries,
        made=[entry for entry in entries if entry.made],
        verdicts={name: sum(c.verdict == name for e in entries for c in e.claims) for name in VERDICTS},
        style=_style(),
        read_profile=READ_PROFILE,
        long_table=LONG_TABLE,
        code=_by_value((p.code, entry) for entry, p in provenances),
        current_code=code_version(),
        reproducibility=_reproducibility(results / "bench"),
        machines=_by_value((machine, entry) for entry, p in provenances for machine in p.machines()),
        data=_by_value(
            ((dataset, file, digest), entry)
            for entry, p in provenances
            for dataset, files in p.data.items()
            for file, digest in files.items()
        ),
    )
    write_atomic(folder / "index.html", page.encode())
    return folder / "index.html"


def _style() -> Markup:
    return Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))


def _by_value(pairs: Iterable[tuple[Any, T]]) -> dict[Any, list[T]]:
    """Each value once, with the figures or rows that have it."""
    grouped: dict[Any, list[T]] = {}
    for value, owner in pairs:
        grouped.setdefault(value, []).append(owner)
    return grouped


def _entry(source: Path, results: Path) -> Entry:
    """Read all that there is of one figure.

    Args:
        source: its notebook.
        results: folder of the profile's results.
    """
    name = source.stem.partition("_")[0]
    cells = [c.source for c in nbformat.read(source, as_version=4).cells if c.cell_type == "markdown"]
    title, _, first = cells[0].partition("\n")
    reading = next((text.removeprefix(READING) for text in cells if text.startswith(READING)), "")
    caption = first.strip().partition("\n\n")[0]
    entry = Entry(name, title.lstrip("# "), markdown(caption), markdown(reading.strip()))
    folder = results / name
    failed = results / f"{name}.failed.ipynb"
    if failed.exists():
        entry.problems.append(f"its last run failed: {failed.name} has the error")
    if not folder.is_dir():
        entry.made = False
        entry.problems.append(f"it has not been made: make {name} PROFILE={results.name} makes it")
        return entry
    _read_provenance(entry, folder)
    _read_numbers(entry, folder)
    _read_notebook(entry, folder)
    entry.files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return entry


def _read_provenance(entry: Entry, folder: Path) -> None:
    """Read where the figure comes from, and compare its files with it."""
    path = folder / "provenance.json"
    expected: dict[str, str | None] = dict.fromkeys((f"{entry.name}.png", f"{entry.name}.csv"))
    if not path.exists():
        entry.problems.append(f"{path.name} is missing")
    else:
        try:
            entry.provenance = Provenance.model_validate_json(path.read_bytes())
        except ValueError as error:
            entry.problems.append(_unreadable(path, error))
        else:
            expected |= entry.provenance.sha256
            counts = [f"{n:,} {s}" for s, n in entry.provenance.outcomes().items() if s != COMPLETED]
            if counts:
                total = sum(entry.provenance.outcomes().values())
                entry.problems.append(f"of {total:,} runs {', '.join(counts)}")
    for file, digest in expected.items():
        if not (folder / file).exists():
            entry.problems.append(f"{file} is missing")
        elif digest and hashlib.sha256((folder / file).read_bytes()).hexdigest() != digest:
            entry.problems.append(f"{file} is not the file that provenance.json describes")


def _read_numbers(entry: Entry, folder: Path) -> None:
    """Read the picture, the table and the claims."""
    picture, table, claims = (
        folder / f"{entry.name}.png",
        folder / f"{entry.name}.csv",
        folder / "claims.json",
    )
    if picture.exists():
        entry.picture = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    if table.exists():
        try:
            numbers = pd.read_csv(table)
        except ValueError as error:
            entry.problems.append(_unreadable(table, error))
        else:
            entry.columns = [str(column) for column in numbers.columns]
            entry.rows = [[_shown(v) for v in row] for row in numbers.itertuples(index=False, name=None)]
    if claims.exists():
        try:
            entry.claims = CLAIMS.validate_json(claims.read_bytes())
        except ValueError as error:
            entry.problems.append(_unreadable(claims, error))


def _read_notebook(entry: Entry, folder: Path) -> None:
    """Write the executed notebook as a page, and read its parameters and its time."""
    path = folder / f"{entry.name}.ipynb"
    if not path.exists():
        entry.problems.append(f"its executed notebook {path.name} is missing")
        return
    try:
        notebook = nbformat.read(path, as_version=4)
    except ValueError as error:
        entry.problems.append(_unreadable(path, error))
        return
    executed = notebook.metadata.get("papermill", {})
    entry.seconds = executed.get("duration")
    given = executed.get("parameters", {})
    entry.parameters = {name: value for name, value in given.items() if name not in ("profile", "results")}
    exporter = HTMLExporter(
        template_file=str(TEMPLATES / "notebook.html.j2"),
        filters={"markdown2html": markdown},
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    words = {"style": _style(), "title": entry.title, "figure": entry.name}
    page, _ = exporter.from_notebook_node(notebook, words)
    write_atomic(folder / f"{entry.name}.html", page.encode())
    entry.page = True


def _reproducibility(folder: Path) -> Reproducibility | str:
    """Read what differs between machines, or say what is missing or wrong.

    Args:
        folder: of the benchmarks.
    """
    path = folder / "reproducibility.csv"
    try:
        table = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
        columns = [column.alias or name for name, column in Difference.model_fields.items()]
        if table.fieldnames != columns:
            raise ValueError(f"its columns are not {', '.join(columns)}")
        differences = DIFFERENCES.validate_python(list(table))
        if not differences:
            raise ValueError("it has no rows")
        path = folder / "reproducibility_provenance.json"
        measured = Reproducibility.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, csv.Error, ValueError) as error:
        return _unreadable(path, error)
    return measured.model_copy(update={"differences": differences})


def _unreadable(path: Path, error: Exception) -> str:
    # What an OSError says has the whole path in it.
    reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
    return f"{path.name} cannot be read: {reason}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.pages.report", description=__doc__)
    parser.add_argument("--profile", default="quick")
    options = parser.parse_args(arguments)
    try:
        page = build(options.profile)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"the report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
