"""The report page: complete, self-contained, the same when built again, and sound in a real browser."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import benches
import nbformat
import pandas as pd
import pytest
from bench_reproducibility import MACHINES, METRICS, spread
from bs4 import BeautifulSoup, Tag
from PIL import Image

from lib.experiments.provenance import read_described
from lib.experiments.store import REPOSITORY, DamagedFile
from lib.figures.comparison import NO, NOT_DECIDED, YES, Question
from lib.pages import report
from lib.pages.notebooks import NOTEBOOKS

NAMES = sorted(path.stem.partition("_")[0] for path in NOTEBOOKS.glob("fig*.ipynb"))
ABSENT = ["fig11", "fig17"]
QUESTIONS = [
    Question("the first?", YES, "median +3 [+1, +4]; 3 pairs", "by counting"),
    Question("the second?", NO, "median -3 [-4, -1]; 4 pairs", "by counting"),
    Question("the third?", NOT_DECIDED, "in 2 of 4; p = 0.4", "by a test"),
]
BUDGET = "MNIST 14x14; profile {}: 540 configurations, 320 training images, 5 epochs; 100 test images"
HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
ENVIRONMENT = {
    "python": "3.11.7",
    "packages": {"torch": "2.13.0+cpu"},
    "system": "Linux-of-the-test",
    "processor": "x86_64",
    "accelerator": "none",
}


def png(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (side, side), 128).save(buffer, "png")
    return buffer.getvalue()


def write_figure(parent: Path, name: str, questions: list[Question] | None = None, **changes: Any) -> Path:
    """A small figure's folder, as the notebooks leave it, among a profile's or among the committed ones."""
    folder = parent / name
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        f"{name}.png": png(2000),
        f"{name}.pdf": b"%PDF-1.4",
        f"{name}.csv": b"image,psnr,epochs\ninput,26.021871566772,3\nbilevel,,4\n",
    }
    if questions:
        files["questions.json"] = json.dumps([asdict(question) for question in questions]).encode()
    provenance = {
        "profile": "quick" if parent.name == "reference" else parent.name,
        "created": "2026-11-24T02:02:26Z",
        "code": "0123456789abcdef",
        "data": {"mnist": {"train-images": f"md5:{name}"}},
        "environment": ENVIRONMENT,
        "trained_on": [ENVIRONMENT],
        "training_seconds": 579.6,
        "statuses": {"completed": 540},
        "axes": {},
        "shared": {"dataset": "mnist", "size": 14, "train_images": 320, "test_images": 100, "epochs": 5},
        "sha256": {file: hashlib.sha256(content).hexdigest() for file, content in files.items()},
    }
    files["provenance.json"] = json.dumps(provenance | changes).encode()
    files[f"{name}.ipynb"] = executed(name).encode()
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return folder


HEADER = "kind,task,model,machine,test_loss,test_psnr,test_steps,test_unconverged,other ends"
ROWS = [
    "grid,denoising,deq,SSE9,3.21e-07,0.00312,12.4,0,0",
    "grid,denoising,deq,8 threads,0,0,0,0,0",
    "grid,inpainting,bilevel,SSE9,,,,,12",
]
BENCH = {
    "machines": {"this one": {}, "SSE9": {"ISA": "sse9", "ISA_OF_PRODUCTS": "SSE9"}, "8 threads": {}},
    "runs": 1234,
    "capability": "AVX777",
    "code": "fedcba9876543210",
    "environment": ENVIRONMENT | {"system": "Linux-of-the-bench"},
}


def write_bench(results: Path, rows: list[str] = ROWS, **changes: Any) -> Path:
    """The comparison of machines, as `make bench` leaves it; returns its folder."""
    folder = results / "bench"
    folder.mkdir(exist_ok=True)
    (folder / "reproducibility.csv").write_text("\n".join([HEADER, *rows, ""]), encoding="utf-8")
    (folder / "reproducibility_provenance.json").write_text(json.dumps(BENCH | changes))
    return folder


def executed(name: str, printed: str = "done", **parameters: Any) -> str:
    """A small executed notebook with a formula, a long line and a picture."""
    image = {"image/png": base64.b64encode(png(1200)).decode()}
    code = nbformat.v4.new_code_cell("x = " + " + ".join(["1"] * 200), id="code", execution_count=1)
    code.outputs = [
        nbformat.v4.new_output("display_data", data=image),
        nbformat.v4.new_output("stream", text=printed),
        nbformat.v4.new_output("display_data", data={"text/html": printed, "text/plain": "plain"}),
    ]
    words = nbformat.v4.new_markdown_cell(f"# Figure {int(name[3:])}\n\n$A^\\top$ {printed}", id="words")
    book = nbformat.v4.new_notebook(cells=[words, code])
    values = {"profile": "quick", "results": "/somewhere"} | parameters
    book.metadata["papermill"] = {"duration": 75.4, "parameters": values}
    return nbformat.writes(book)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """All figures but two, three questions, and the comparison of machines."""
    write_bench(tmp_path)
    for name in NAMES:
        if name not in ABSENT:
            write_figure(tmp_path / "quick", name, QUESTIONS if name == "fig05" else None)
    return tmp_path


def built(results: Path, profile: str = "quick", **options: Any) -> BeautifulSoup:
    path = report.build(profile, results, **options)
    assert path == results / profile / "index.html"
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def text_of(page: BeautifulSoup | Tag, selector: str) -> str:
    return " ".join(page.select_one(selector).get_text(" ").split())


def test_every_figure_is_there_in_order_with_its_words(results: Path) -> None:
    """All notebooks' figures, each with its title, its caption, its reading, its picture and its numbers."""
    page = built(results)
    assert [article["id"] for article in page.select("article")] == NAMES
    assert len(NAMES) == 17
    for article in page.select("article"):
        source = next(NOTEBOOKS.glob(f"{article['id']}_*.ipynb"))
        title = nbformat.read(source, as_version=4).cells[0].source.partition("\n")[0]
        assert f"# {article.h2.get_text()}" == title
        assert len(article.figcaption.get_text()) > 100
        assert bool(article.select("figure img")) == (article["id"] not in ABSENT)
    rows = [[td.get_text() for td in tr.select("td")] for tr in page.select("#fig02 tbody tr")]
    assert rows == [["input", "26.02", "3"], ["bilevel", "", "4"]]


def test_pages_carry_all_that_they_show(results: Path) -> None:
    """Pictures are inlined, no script, style or font is loaded, and every link leads somewhere."""
    built(results)
    pages = [results / "quick" / "index.html", *(results / "quick").glob("*/*.html")]
    assert len(pages) == 1 + len(NAMES) - len(ABSENT)
    for path in pages:
        page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        assert page.select("img[src^='data:image/png;base64,']")
        assert not page.select("link:not([rel=icon])")
        for image in page.select("img[src^=data]"):
            Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))).verify()
            assert image["alt"]
        for link in page.select("a[href]"):
            target, _, anchor = link["href"].partition("#")
            if target.startswith("https://"):
                continue
            file = (path.parent / target) if target else path
            assert file.is_file(), link
            if anchor:
                assert f'id="{anchor}"' in file.read_text(encoding="utf-8"), link


def test_formulas_are_drawn_without_a_script(results: Path) -> None:
    """Whatever the notebooks write in TeX is converted, and none of it is left as it was."""
    page = built(results)
    formula = page.select_one("header math[display=block]").get_text()
    assert formula == "T(u)=u−τ(λK⊤(Ku−f)+γC⊤σ(Au+b))."
    assert not page.select("article p code:-soup-contains('\\\\')")
    for source in NOTEBOOKS.glob("*.ipynb"):
        for cell in nbformat.read(source, as_version=4).cells:
            if cell.cell_type == "markdown":
                made = BeautifulSoup(report.markdown(cell.source), "html.parser")
                assert "\\" not in made.get_text(), cell.source
                assert "&" not in "".join(formula.get_text() for formula in made.select("math"))
                assert cell.source.count("$$") // 2 == len(made.select("math[display=block]"))


def test_a_formula_that_cannot_be_converted_is_shown_as_it_is() -> None:
    assert report.markdown(r"so $\left( <b>$ it is") == "<p>so <code>\\left( &lt;b&gt;</code> it is</p>\n"


def test_the_questions_are_complete(results: Path) -> None:
    """Question, answer and numbers in a row, under their rule, with links to figure and notebook."""
    page = built(results)
    bodies = page.select("table.questions tbody")
    found = []
    for body in bodies:
        rule = body.select_one("th")
        assert [a["href"] for a in rule.select("a")] == ["#fig05", "fig05/fig05.html"]
        for row in body.select("tr")[1:]:
            question, here, there = row.select("td")
            words = [question.get_text(), *here.stripped_strings, rule.find_all(string=True)[-1].strip()]
            found.append(Question(*words))
            assert there.get_text() == "–"
    assert found == QUESTIONS
    assert heads(page) == ["Question", f"quick {BUDGET.format('quick')}", "overnight –"]
    said = text_of(page, "#questions")
    silent = ", ".join(str(int(n[3:])) for n in NAMES if n not in [*ABSENT, "fig05"])
    assert f"figures {silent}" in said.replace(" ,", ",")
    counts = "3 questions answered by a rule: 1 yes, 1 no, 1 not decided at this budget"
    assert counts in text_of(page, "header")


def heads(page: BeautifulSoup) -> list[str]:
    return [" ".join(th.get_text(" ").split()) for th in page.select("table.questions thead th")]


def answers(page: BeautifulSoup) -> list[list[str]]:
    """The rows of the table of questions: question, and a cell per profile."""
    rows = [tr.select("td") for tr in page.select("table.questions tbody tr")]
    return [[" ".join(td.get_text(" ").split()) for td in row] for row in rows if row]


OTHERS = [
    Question("the first?", NO, "median -9 [-9, -8]; 3 pairs", "by counting"),
    Question("the third?", YES, "in 4 of 4; p = 0.01", "by a test"),
]


def test_answers_of_other_profiles_stand_beside(results: Path) -> None:
    """Those that are committed, matched by figure and question, each column with its budget."""
    write_figure(results / "reference" / "overnight", "fig05", OTHERS)
    write_figure(results / "reference" / "overnight", "fig06", OTHERS[:1])
    write_figure(results / "reference", "fig05", QUESTIONS[:1])
    page = built(results)
    assert heads(page)[1:] == [f"{name} {BUDGET.format(name)}" for name in ("quick", "overnight")]
    assert answers(page) == [
        ["the first?", "yes median +3 [+1, +4]; 3 pairs", "no median -9 [-9, -8]; 3 pairs"],
        ["the second?", "no median -3 [-4, -1]; 4 pairs", "–"],
        ["the third?", "not decided at this budget in 2 of 4; p = 0.4", "yes in 4 of 4; p = 0.01"],
        ["the first?", "–", "no median -9 [-9, -8]; 3 pairs"],
    ]
    assert "3 questions answered by a rule: 1 yes, 1 no" in text_of(page, "header")
    write_figure(results / "paper", "fig05", QUESTIONS[1:2])
    page = built(results, "paper")
    assert [head.split()[0] for head in heads(page)] == ["Question", "paper", "quick", "overnight"]
    assert answers(page)[:2] == [
        ["the second?", "no median -3 [-4, -1]; 4 pairs", "–", "–"],
        ["the first?", "–", "yes median +3 [+1, +4]; 3 pairs", "no median -9 [-9, -8]; 3 pairs"],
    ]


def test_an_answer_under_another_rule_has_its_own_row(results: Path) -> None:
    """Answers that were decided in different ways are not passed off as comparable."""
    write_figure(results / "reference" / "overnight", "fig05", [replace(OTHERS[0], rule="by tossing a coin")])
    page = built(results)
    assert [row for row in answers(page) if row[0] == "the first?"] == [
        ["the first?", "yes median +3 [+1, +4]; 3 pairs", "–"],
        ["the first?", "–", "no median -9 [-9, -8]; 3 pairs"],
    ]
    assert "by tossing a coin" in text_of(page, "table.questions")


DAMAGES = {
    "another file": ("questions.json", b"[]", "questions.json is not the file that"),
    "no provenance": ("provenance.json", None, "provenance.json is missing"),
    "another provenance": ("provenance.json", b"{}", "provenance.json cannot be read: KeyError: 'profile'"),
}


@pytest.mark.parametrize(("file", "content", "said"), DAMAGES.values(), ids=list(DAMAGES))
def test_damaged_committed_answers_are_named(
    results: Path, file: str, content: bytes | None, said: str
) -> None:
    """Among what is missing, by their folder, and instead of a table in Markdown; none of them is shown."""
    path = write_figure(results / "reference" / "overnight", "fig05", OTHERS) / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    page = built(results)
    told = f"{results.name}/reference/overnight/fig05: {said}"
    assert told in text_of(page, "#missing")
    assert {row[2] for row in answers(page)} == {"–"}
    with pytest.raises(DamagedFile, match=re.escape(told)):
        report.answers_table(results)


def test_answers_are_a_table_in_markdown(results: Path) -> None:
    """A row per question in the figures' order; the numbers that decide; dashes where nothing is."""
    assert report.answers_table(results).splitlines()[1:] == ["| --- | --- | --- | --- |"]
    write_figure(results / "reference" / "overnight", "fig05", OTHERS)
    write_figure(results / "reference" / "overnight", "fig06", OTHERS[:1])
    write_figure(results / "reference", "fig05", QUESTIONS)
    assert report.answers_table(results).splitlines() == [
        "| figure | question | quick | overnight |",
        "| --- | --- | --- | --- |",
        "| 5 | the first? | yes: median +3 [+1, +4] | no: median −9 [−9, −8] |",
        "| 5 | the second? | no: median −3 [−4, −1] | – |",
        "| 5 | the third? | not decided at this budget: in 2 of 4 | yes: in 4 of 4 |",
        "| 6 | the first? | – | no: median −9 [−9, −8] |",
    ]


def test_what_is_missing_is_named(results: Path) -> None:
    """Figures that are not made, runs that were not completed, files that are gone, changed or broken."""
    quick = results / "quick"
    statuses = {"completed": 500, "diverged": 30, "out of time": 9, "not run": 1}
    write_figure(quick, "fig01", statuses=statuses)
    runs = {"a": {"status": "completed"}, "b": {"status": "diverged"}}
    write_figure(quick, "fig02", statuses={}, runs=runs, trained_on={"a": ENVIRONMENT})
    (quick / "fig03" / "fig03.png").unlink()
    (quick / "fig04" / "fig04.csv").write_text("a,b\n1,2\n")
    (quick / "fig05" / "questions.json").write_text("[{}]")
    (quick / "fig06" / "provenance.json").unlink()
    (quick / "fig07" / "fig07.ipynb").write_text("not JSON")
    (quick / "fig08" / "fig08.csv").write_text("")
    (quick / "fig09" / "fig09.ipynb").unlink()
    (quick / "fig10" / "provenance.json").write_text("{}")
    (quick / "fig12.failed.ipynb").write_text("{}")
    page = built(results)
    items = dict(item.get_text().split(": ", 1) for item in page.select("#missing li"))
    expected = {
        1: "of 540 runs 30 diverged, 9 out of time, 1 not run",
        2: "of 2 runs 1 diverged",
        3: "fig03.png is missing",
        4: "fig04.csv is not the file that provenance.json describes",
        5: "questions.json is not the file that provenance.json describes",
        6: "provenance.json is missing",
        7: "fig07.ipynb cannot be read",
        8: "fig08.csv cannot be read",
        9: "fig09.ipynb is missing",
        10: "provenance.json cannot be read: KeyError: 'trained_on'",
        12: "its last run failed: fig12.failed.ipynb has the error",
    }
    assert sorted(items) == sorted(f"Figure {number}" for number in expected)
    for number, said in expected.items():
        assert said in items[f"Figure {number}"]
        article = page.select_one(f"#fig{number:02}").get_text()
        assert all(part in article for part in said.split("; "))
    assert "Not made, so nothing is said of: figures 11, 17" in text_of(page, "#missing").replace(" ,", ",")
    assert [a.get_text() for a in page.select("nav .absent")] == ["11", "17"]
    assert not page.select("#fig03 img")
    assert not page.select("table.questions")


def test_a_profile_of_which_nothing_is_made_has_a_page(tmp_path: Path) -> None:
    page = built(tmp_path, "paper")
    assert len(page.select("nav .absent")) == 17
    assert "0 of 17 figures made" in text_of(page, "header")
    assert "No figure has been made" in text_of(page, "#provenance")


def test_the_provenance_is_shown(results: Path) -> None:
    """Times with each figure; code, machine and data each once with the figures that it holds for."""
    write_figure(results / "quick", "fig02", code=report.code_version(), training_seconds=7250.0)
    page = built(results)
    said = text_of(page, "#provenance").replace(" ,", ",")
    assert said.count("Linux-of-the-test, x86_64, accelerator none; Python 3.11.7, torch 2.13.0+cpu") == 1
    assert f"{report.code_version()}, the version that is here: figures 2 Machines" in said
    assert "0123456789abcdef, another version than the one here: figures 1, 3, 4" in said
    for name, took in (("fig02", "2.0 h"), ("fig03", "10 min")):
        said_there = text_of(page, f"#{name}").replace(" ;", ";")
        assert f"Drawn 2026-11-24T02:02:26Z. Training runs: 540 completed; they took {took}" in said_there
        assert "The notebook ran for 75 s" in said_there
    for name in NAMES:
        assert (f"mnist, train-images, md5:{name}" in said) == (name not in ABSENT)


@pytest.mark.parametrize("machine", ["8 threads", "one GPU"])
def test_what_differs_between_machines_is_shown(tmp_path: Path, machine: str) -> None:
    """The table, the machines, which code and how many runs; a GPU if there was one."""
    write_bench(tmp_path, [row.replace("8 threads", machine) for row in ROWS], code=report.code_version())
    section = built(tmp_path).select_one("#reproducibility")
    assert section.find_next_sibling("section")["id"] == "provenance"
    assert [th.get_text() for th in section.select("thead th")] == HEADER.split(",")
    assert [[td.get_text() for td in tr.select("td")] for tr in section.select("tbody tr")] == [
        ["grid", "denoising", "deq", "SSE9", "3.21e-07", "0.00312", "12.4", "0", "0"],
        ["grid", "denoising", "deq", machine, "0", "0", "0", "0", "0"],
        ["grid", "inpainting", "bilevel", "SSE9", "–", "–", "–", "–", "12"],
    ]
    said = " ".join(section.get_text().split())
    assert "1,234 runs each, and compared with those of a machine with AVX777 (Linux-of-the-bench, " in said
    assert f"The code was {report.code_version()}, the version that is here." in said
    assert [li.get_text() for li in section.select("li")] == ["SSE9: ISA=sse9, ISA_OF_PRODUCTS=SSE9"]
    assert ("A GPU was not measured." in said) == (machine != "one GPU")


TABLE, ORIGIN = "reproducibility.csv", "reproducibility_provenance.json"


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (TABLE, None, "is missing"),
        (TABLE, b"", "cannot be read: EmptyDataError: "),
        (TABLE, b"image,psnr\ninput,26\n", "cannot be read: KeyError: 'machine'"),
        (ORIGIN, None, "is missing"),
        (ORIGIN, b"[]", "cannot be read: "),
        (ORIGIN, b"{}", "cannot be read: KeyError: 'runs'"),
        (ORIGIN, json.dumps(BENCH | {"environment": "Linux"}).encode(), "cannot be read: TypeError: "),
    ],
)
def test_a_comparison_that_cannot_be_shown_is_told_in_a_line(
    tmp_path: Path, file: str, content: bytes | None, said: str
) -> None:
    """The file, what is wrong with it and what makes it, and no table."""
    path = write_bench(tmp_path) / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    page = built(tmp_path)
    (line,) = page.select("#reproducibility > :not(h2)")
    assert line.get_text().startswith(f"Nothing to show: {file} {said}")
    assert line.get_text().endswith(". make bench measures it.")
    assert "\n" not in line.get_text()
    path.unlink(missing_ok=True)
    path.mkdir()
    page = built(tmp_path)
    assert f"{file} cannot be read: IsADirectoryError: Is a directory." in page.get_text()
    assert str(tmp_path) not in str(page)


def test_the_benchmark_writes_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every machine of `make bench`, of runs of which one diverged on one machine; the files are verified."""
    group = {"kind": "grid", "task": "denoising", "model": "deq", "tau": 0.5, "gamma": 0.1, "sigma": "relu"}
    runs = [
        group | {"machine": machine, "status": "completed"} | dict.fromkeys(METRICS, 1 + i / 8)
        for i, machine in enumerate(MACHINES)
    ]
    runs[-1] |= {"status": "diverged"} | dict.fromkeys(METRICS, None)
    monkeypatch.setattr(benches, "RESULTS", tmp_path)
    benches.save("reproducibility", spread(pd.DataFrame(runs)), machines=MACHINES, runs=1, capability="AVX")
    read_described(tmp_path / "bench" / TABLE, json.loads((tmp_path / "bench" / ORIGIN).read_text()))
    rows = [[td.get_text() for td in tr.select("td")[3:]] for tr in built(tmp_path).select("tbody tr")]
    _, *others, last = MACHINES
    expected = [[machine, *[f"{(i + 1) / 8:.3g}"] * 4, "0"] for i, machine in enumerate(others)]
    assert sorted(rows) == sorted([*expected, [last, *["–"] * 4, "1"]])


def test_other_parameters_are_told(results: Path) -> None:
    """A figure made with other parameters says which; a reading is not passed off as its own."""
    (results / "quick" / "fig02" / "fig02.ipynb").write_text(executed("fig02", gamma=0.5))
    page = built(results)
    assert "gamma = 0.5" in text_of(page, "#fig02")
    assert text_of(page, "#fig02 h3") == "What one sees at the profile quick with its own parameters"
    assert "other parameters" not in text_of(page, "#fig03")
    assert text_of(page, "#fig03 h3") == "What one sees"
    write_figure(results / "smoke", "fig03")
    page = built(results, "smoke")
    assert text_of(page, "#fig03 h3").startswith("What one sees at the profile quick")
    assert "written about the profile quick" in text_of(page, "#missing")


def make_hostile(results: Path) -> Path:
    """A figure whose every text is hostile; returns the folder of its notebook."""
    quick = results / "quick"
    questions = [Question(HOSTILE, YES, HOSTILE, HOSTILE)]
    write_figure(results / "reference" / "overnight", "fig01", questions, profile=HOSTILE)
    folder = write_figure(quick, "fig01", questions, code=HOSTILE, data={HOSTILE: {HOSTILE: HOSTILE}})
    write_figure(quick, "fig02", created=HOSTILE, statuses={HOSTILE: 1})
    (folder / "fig01.csv").write_text(f"{HOSTILE.replace(',', '')}\n{HOSTILE.replace(',', '')}\n")
    (folder / "fig01.ipynb").write_text(executed("fig01", HOSTILE, **{HOSTILE: HOSTILE}))
    (folder / "a <b>&'.txt").write_text("")
    environment = dict.fromkeys(ENVIRONMENT, HOSTILE) | {"packages": {HOSTILE: HOSTILE}}
    named = {"machines": {HOSTILE: {HOSTILE: HOSTILE}}, "capability": HOSTILE, "code": HOSTILE}
    write_bench(results, [",".join([HOSTILE] * 4 + ["0"] * 5)], **named, environment=environment)
    notebooks = results / "notebooks"
    notebooks.mkdir()
    for name in ("fig01", "fig02"):
        words = nbformat.v4.new_markdown_cell(
            f"# {HOSTILE}\n\n{HOSTILE} $\\text{{{HOSTILE}}}$ [link](javascript:alert(1)) $<b>x</b>$", id="a"
        )
        reading = nbformat.v4.new_markdown_cell(f"## What one sees\n\n{HOSTILE}\n\n{HOSTILE}", id="b")
        book = nbformat.v4.new_notebook(cells=[words, reading])
        (notebooks / f"{name}_x.ipynb").write_text(nbformat.writes(book))
    return notebooks


def test_hostile_text_stays_text(results: Path) -> None:
    """No text of a notebook, table, question or provenance becomes an element of the page."""
    page = built(results, notebooks=make_hostile(results))
    assert len(page.select("article")) == 2
    assert not page.select("script, [onerror], img:not([src^=data]), article b:not(a b), a[href^=javascript]")
    assert page.get_text().count("document.title") > 20
    assert HOSTILE in page.select_one("#reproducibility li").get_text()
    assert [a.get_text() for a in page.select("#fig01 .links a") if "txt" in a.get_text()] == ["a <b>&'.txt"]


def test_building_again_changes_no_byte_and_says_when_nothing_is_missing(results: Path) -> None:
    assert "Nothing" not in text_of(built(results), "#missing")
    for name in ABSENT:
        write_figure(results / "quick", name)
    assert "Nothing: every figure is made" in text_of(built(results), "#missing")
    pages = sorted((results / "quick").rglob("*.html"))
    before = [path.read_bytes() for path in pages]
    report.build("quick", results)
    assert [path.read_bytes() for path in pages] == before


def test_the_command_prints_where_the_page_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "build", partial(report.build, results=tmp_path))
    assert report.main(["--profile", "smoke"]) == 0
    assert report.main(["--profile", "huge"]) == 2
    out, err = capsys.readouterr()
    assert out == f"the report: {tmp_path / 'smoke' / 'index.html'}\n"
    assert err == "profile: got 'huge', allowed: smoke, quick, overnight, paper\n"


def test_the_command_prints_the_committed_answers(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing is built; what is damaged is named in one line."""
    folder = write_figure(results / "reference", "fig05", QUESTIONS)
    monkeypatch.setattr(report, "answers_table", partial(report.answers_table, results))
    assert report.main(["--answers"]) == 0
    assert capsys.readouterr().out == report.answers_table() + "\n"
    (folder / "questions.json").write_text("[]")
    assert report.main(["--answers"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(results.rglob("index.html"))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")


PROBE = """addEventListener('load', () => {
  const inner = document.querySelector('iframe').contentDocument, root = inner.documentElement;
  const math = inner.querySelector('math');
  document.title = JSON.stringify({
    images: [...inner.images].map(image => image.naturalWidth), title: inner.title,
    overflow: root.scrollWidth - root.clientWidth, math: math ? math.getBoundingClientRect().width : 0,
  });
})"""


def seen(page: Path, width: int, folder: Path) -> dict[str, Any]:
    """What Chromium makes of a page in a frame of a width in pixels, and what its console says."""
    content = html.escape(page.read_text(encoding="utf-8"))
    frame = f'<iframe width="{width}" height="900" srcdoc="{content}"></iframe>'
    (outer := folder / "frame.html").write_text(f"<!DOCTYPE html><script>{PROBE}</script>{frame}")
    options = ["headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "enable-logging=stderr"]
    options += [f"user-data-dir={folder / 'chromium'}", "virtual-time-budget=20000", "dump-dom"]
    command = [str(CHROMIUM), *(f"--{option}" for option in options), outer.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said: dict[str, Any] = json.loads(BeautifulSoup(done.stdout, "html.parser").title.get_text())
    return said | {"console": [line for line in done.stderr.splitlines() if "CONSOLE" in line]}


def test_the_page_opens_with_what_was_found(results: Path) -> None:
    """The README's words and both of its pictures, before the questions, and these before all else."""
    page = BeautifulSoup(report.build("quick", results).read_text(encoding="utf-8"), "html.parser")
    names = [section["id"] for section in page.select("main > section")]
    assert names[:3] == ["found", "questions", "missing"]
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = readme.partition(f"{report.FOUND}\n")[2].partition("\n## ")[0]
    pictures = re.findall('src="([^"]*)"', section)
    assert len(pictures) == 2
    shown = [base64.b64decode(img["src"].partition(",")[2]) for img in page.select("#found img")]
    assert shown == [(REPOSITORY / path).read_bytes() for path in pictures]
    assert all(img["alt"] for img in page.select("#found img"))
    first = section.partition("**")[2].partition("**")[0].replace("`", "").replace("\n", " ")
    assert first in " ".join(text_of(page, "#found").split())


@needs_chromium
@pytest.mark.parametrize("width", [375, 1200])
def test_the_browser_shows_the_pages(results: Path, tmp_path: Path, width: int) -> None:
    """No complaint, every image, formulas, and nothing that sticks out of the screen."""
    index = report.build("quick", results)
    for path, images in (
        (index, len(NAMES) - len(ABSENT) + 2),
        (results / "quick" / "fig05" / "fig05.html", 1),
    ):
        shown = seen(path, width, tmp_path)
        assert len(shown["images"]) == images
        assert min(shown["images"]) > 0
        assert shown["math"] > 0
        assert (shown["overflow"], shown["console"]) == (0, [])


@needs_chromium
def test_the_browser_runs_nothing_hostile(results: Path, tmp_path: Path) -> None:
    """Neither page lets an output of a notebook run; without its policy one does, and a broken image, a wide
    element and a script that fails are noticed."""
    index = report.build("quick", results, make_hostile(results))
    for path in (index, page := results / "quick" / "fig01" / "fig01.html"):
        assert seen(path, 1200, tmp_path)["title"] != "taken"
    wide = "<img src='nowhere.png'><div style='width: 900px'>wide</div><script>throw Error('no')</script>"
    page.write_text(page.read_text().replace("Content-Security-Policy", "none") + wide)
    shown = seen(page, 375, tmp_path)
    assert shown["title"] == "taken"
    assert 0 in shown["images"]
    assert shown["overflow"] > 400
    assert shown["console"]


def test_the_style_is_shipped_with_the_page() -> None:
    """The templates lie in the package, and name no address that a page would load."""
    for path in report.TEMPLATES.iterdir():
        assert path.is_relative_to(REPOSITORY / "lib")
        assert not re.search(r"(src|@import|url\()[^>]*https?:", path.read_text(encoding="utf-8"))
