"""The pages of prose: the example runs, and links, targets and answers are those of the repository."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
from itertools import product

import pytest

from lib.experiments.provenance import PROVENANCE, read_described
from lib.experiments.records import COMMITTED
from lib.experiments.store import REPOSITORY, RESULTS
from lib.pages.report import FIGURES, QUESTIONS

README = REPOSITORY / "README.md"

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "nbs/README.md",
    "results/bench/README.md",
    "results/reference/README.md",
]


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(example, {})
    assert capsys.readouterr().out.startswith("torch.Size([4, 1, 64, 48])")


@pytest.mark.parametrize("name", PAGES)
def test_links_and_targets_exist(name: str) -> None:
    page = REPOSITORY / name
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    targets = set(re.findall(r"(?:`|^    (?:\S+=\S+ )?)make ([a-z][a-z_0-9-]*)(?![\w-])", text, re.MULTILINE))
    subprocess.run(["make", "-n", *targets], cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=True)


def test_generated_tables_are_those_of_the_evidence() -> None:
    """`python .ci/evidence.py` writes them."""
    evidence = runpy.run_path(str(REPOSITORY / ".ci" / "evidence.py"))
    for page in evidence["PAGES_WITH_PARTS"]:
        text = page.read_text(encoding="utf-8")
        assert text == evidence["updated"](text)


def answers_table() -> str:
    """Return the committed answers of the profiles side by side, as a table in Markdown."""
    answers: dict[tuple[int, str], dict[str, str]] = {}
    for name, (profile, where) in product(FIGURES, COMMITTED.items()):
        path = RESULTS / where / name / QUESTIONS
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


def test_the_answers_are_the_committed_ones() -> None:
    """A failure shows the table that belongs between the two comments."""
    text = README.read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- answers -->\n(.*)\n<!-- /answers -->", text, re.DOTALL)
    expected = answers_table()
    assert table == expected, expected
