"""Markdown pages: the example runs, links and targets exist, and generated tables are up to date."""

from __future__ import annotations

import re
import runpy
import subprocess

import pytest

from lib.experiments.store import REPOSITORY

README = REPOSITORY / "README.md"

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "nbs/README.md",
    "results/bench/README.md",
    "results/reference/README.md",
]


def test_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(example, {})
    assert capsys.readouterr().out.startswith("torch.Size([4, 1, 64, 48])")


@pytest.mark.parametrize("name", PAGES)
def test_links_and_make_targets_exist(name: str) -> None:
    page = REPOSITORY / name
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    targets = set(re.findall(r"(?:`|^    (?:\S+=\S+ )?)make ([a-z][a-z_0-9-]*)(?![\w-])", text, re.MULTILINE))
    subprocess.run(["make", "-n", *targets], cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=True)


def test_generated_tables_are_up_to_date() -> None:
    """Compare the pages with the output of `python .ci/evidence.py`."""
    evidence = runpy.run_path(str(REPOSITORY / ".ci" / "evidence.py"))
    for page in evidence["PAGES_WITH_PARTS"]:
        text = page.read_text(encoding="utf-8")
        assert text == evidence["updated"](text)
