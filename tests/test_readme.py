"""The pages of prose: their code runs as it stands, what they name exists, and the first one is short."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from lib.experiments.store import REPOSITORY
from lib.pages.report import answers_table

README = REPOSITORY / "README.md"

PAGES = [README, *(REPOSITORY / where / "README.md" for where in ("nbs", "lib/experiments", "results/bench"))]


def test_the_example_runs_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(example, {})
    assert capsys.readouterr().out.startswith("torch.Size([4, 1, 64, 48])")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    named = set(re.findall(r"(?:`|^    (?:\S+=\S+ )?)make ([a-z][a-z_0-9-]*)(?![\w-])", text, re.MULTILINE))
    assert named
    rules = subprocess.run(["make", "-n", *named], cwd=REPOSITORY, capture_output=True, text=True)
    assert rules.returncode == 0, rules.stderr


def test_the_first_page_is_short_and_begins_with_the_first_steps() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 195
    assert re.findall(r"nbs/(\w+)\.ipynb", text)[0] == "first_steps"


def test_the_answers_are_the_committed_ones() -> None:
    """`python -m lib.pages.report --answers` prints what stands between the two comments."""
    text = README.read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- answers -->\n(.*)\n<!-- /answers -->", text, re.DOTALL)
    assert table == answers_table()
