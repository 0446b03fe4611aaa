"""The report page: figures with their provenance, missing files, and no network."""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nbformat
import pytest
from bs4 import BeautifulSoup

from lib.experiments.provenance import write_with_provenance
from lib.experiments.store import REPOSITORY
from lib.figures.comparison import NO, YES, Question
from lib.pages import notebooks, report
from lib.pages.notebooks import NOTEBOOKS, PAGES

PNG = base64.b64encode((REPOSITORY / "results" / "reference" / "fig02" / "fig02.png").read_bytes()).decode()
QUESTIONS = [
    Question("the first?", YES, "median +3 [+1, +4]; 3 pairs", "by counting"),
    Question("the second?", NO, "in 2 of 4; p = 0.4", "by a test"),
]


EVIDENCE = """# Evidence

## Results

<!-- results -->
| setting | dB |
| --- | --- |
| digits | +0.79 |
<!-- /results -->

![a face](picture.png)

## Data and licences

MNIST
"""


def notebook(name: str, text: str) -> nbformat.NotebookNode:
    """An executed notebook of a figure with a caption, results, a picture and printed text."""
    picture = nbformat.v4.new_output("display_data", data={"image/png": PNG})
    outputs = [picture, nbformat.v4.new_output("stream", text=text)]
    words = [f"# Figure {int(name[3:])}: {text}\n\n{text} $A^\\top < b$", f"## Results\n\n{text}"]
    alt = {"alt": f"a picture of {text}"}
    drawn = nbformat.v4.new_code_cell("x = 1", outputs=outputs, metadata=alt)
    cells = [*map(nbformat.v4.new_markdown_cell, words), drawn]
    return nbformat.v4.new_notebook(cells=cells)


def write_figure(parent: Path, name: str, questions: Sequence[Question] = (), **changes: Any) -> Path:
    """Write a figure's folder as its notebook does."""
    files = {f"{name}.png": base64.b64decode(PNG), f"{name}.csv": b"image,psnr\ninput,26.021871\nbilevel,\n"}
    if questions:
        files["questions.json"] = json.dumps([asdict(question) for question in questions]).encode()
    provenance: dict[str, Any] = {"training_seconds": 579.6, "statuses": {"completed": 540}}
    write_with_provenance(parent / name, files, provenance | changes)
    nbformat.write(notebook(name, "a figure"), parent / name / f"{name}.ipynb")
    return parent / name


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Figures 1 and 2 of the profile quick, the notebooks of figures 1 to 3, and evidence."""
    (tmp_path / "nbs").mkdir()
    (tmp_path / "picture.png").write_bytes(base64.b64decode(PNG))
    (tmp_path / "README.md").write_text(EVIDENCE, encoding="utf-8")
    monkeypatch.setattr(report, "EVIDENCE", tmp_path / "README.md")
    monkeypatch.setattr(notebooks, "NOTEBOOKS", tmp_path / "nbs")
    monkeypatch.setattr(report, "FIGURES", ["fig01", "fig02", "fig03"])
    for name in report.FIGURES:
        nbformat.write(notebook(name, "a figure"), tmp_path / "nbs" / f"{PAGES[name].file}.ipynb")
    write_figure(tmp_path / "quick", "fig01", QUESTIONS)
    write_figure(tmp_path / "quick", "fig02")
    return tmp_path


def built(results: Path) -> BeautifulSoup:
    path = report.build("quick", results)
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def text_of(page: BeautifulSoup, selector: str) -> str:
    return " ".join(page.select_one(selector).get_text(" ").split())


def test_report_shows_figures_with_provenance(results: Path) -> None:
    """Results come first; copies of notebooks by a user are not shown."""
    for copy in ("fig02_mine", "figures_talk"):
        (results / "nbs" / f"{copy}.ipynb").write_text("<<<<<<<")
    page = built(results)
    order = ["results", "fig01", "fig02", "fig03", "missing", "data-and-licences"]
    assert [section["id"] for section in page.select("section")] == order
    assert [cell.get_text() for cell in page.select("#results td")] == ["digits", "+0.79"]
    assert "results" not in page.select_one("#results p").get_text()
    assert page.select_one("#fig02 img")["alt"] == "a picture of a figure"
    shown = text_of(page, "#fig02")
    assert "training runs: 540 completed, in 10 min" in shown
    assert f"Python {platform.python_version()}, torch" in shown
    assert {"fig02/fig02.csv", "fig02/fig02.html"} <= {link["href"] for link in page.select("#fig02 a")}
    answers = ["the first? yes: median +3 [+1, +4]; 3 pairs", "the second? no: in 2 of 4; p = 0.4"]
    assert [item.get_text() for item in page.select("#fig01 ul:not(.small) li")] == answers
    assert [rule.get_text() for rule in page.select("#fig01 p.small")] == ["by counting", "by a test"]


def test_pages_need_no_network(results: Path) -> None:
    """Pictures are embedded with alternative texts, nothing is loaded, and links lead to files or anchors."""
    built(results)
    pages = [results / "quick" / "index.html", *(results / "quick").glob("*/*.html")]
    assert len(pages) == 3
    for path in pages:
        page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        for image in page.select("img"):
            assert image["src"].startswith("data:image/png;base64,")
            assert image["alt"]
        assert page.select("img")
        assert not page.select("script, link:not([rel=icon])")
        assert "http" not in page.style.get_text()
        for link in page.select("section a, nav a"):
            target, _, anchor = link["href"].partition("#")
            assert (path.parent / target).is_file() if target else page.find(id=anchor), link


def test_missing_and_damaged_files_are_reported(results: Path) -> None:
    """A file with a wrong checksum is not shown."""
    write_figure(results / "quick", "fig02", statuses={"completed": 2, "diverged": 1})
    (results / "quick" / "fig01" / "fig01.png").unlink()
    (results / "quick" / "fig02" / "fig02.csv").write_text("a,b\n1,2\n")
    (results / "quick" / "fig03.failed.ipynb").write_text("{}")
    page = built(results)
    missing, changed = results / "quick/fig01/fig01.png", results / "quick/fig02/fig02.csv"
    assert [item.get_text() for item in page.select("#missing li")] == [
        f"quick/fig01 is damaged: [Errno 2] No such file or directory: '{missing}'.",
        f"quick/fig02 is damaged: {changed}: it is not the file that its provenance describes.",
        "fig02: runs with status 'diverged': 1.",
        "the last execution of fig03 failed; see quick/fig03.failed.ipynb.",
        "fig03 is missing; run make fig03 PROFILE=quick.",
    ]
    assert not page.select("#fig01 img")


def test_all_formulas_of_notebooks_are_converted() -> None:
    for source in NOTEBOOKS.glob("*.ipynb"):
        for cell in nbformat.read(source, as_version=4).cells:
            if cell.cell_type == "markdown":
                page = BeautifulSoup(report.markdown(cell.source), "html.parser")
                assert "\\" not in page.get_text(), cell.source
                assert cell.source.count("$$") // 2 == len(page.select("math[display=block]"))


def test_pictures_have_alternative_texts() -> None:
    for name in report.FIGURES:
        cells = nbformat.read(notebooks.notebook_path(name), as_version=4).cells
        (alt,) = [cell.metadata["alt"] for cell in cells if "alt" in cell.metadata]
        assert alt not in cells[0].source
