"""The repository's promises: one source of versions, an environment of its own, targets that keep to it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import grimp
import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]


def locked() -> list[Requirement]:
    """The resolved set that the Makefile installs from."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def test_lock_holds_what_environment_names() -> None:
    """Every direct dependency is pinned, and the lock has it for every version of Python."""
    (pip,) = (entry["pip"] for entry in CONDA if isinstance(entry, dict))
    pins = {canonicalize_name(pin.name): pin for pin in locked()}
    for direct in map(Requirement, (entry for entry in pip if not entry.startswith("-"))):
        pin = pins[canonicalize_name(direct.name)]
        assert pin.specifier == direct.specifier, direct
        assert str(pin.specifier).startswith("=="), direct
        assert pin.marker is None, direct
    assert {"--constraint requirements.lock", "-e ."} <= set(pip)


def test_every_way_in_has_a_python_that_the_lock_serves() -> None:
    """conda and the workflow ask for versions that the project allows, the workflow for both ends."""
    allowed = SpecifierSet(PROJECT["project"]["requires-python"])
    versions = [f"3.{minor}" for minor in range(20) if f"3.{minor}" in allowed]
    (conda,) = (entry.partition("=")[2] for entry in CONDA if str(entry).startswith("python="))
    assert conda in versions
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert f'python-version: ["{versions[0]}", "{versions[-1]}"]' in workflow
    assert f"PYTHONS := {' '.join('python' + each for each in versions)}\n" in (ROOT / "Makefile").read_text()


def test_installed_is_what_is_locked() -> None:
    for pin in locked():
        if pin.marker is None or pin.marker.evaluate():
            assert version(pin.name).partition("+")[0] in pin.specifier, pin


def test_the_contract_of_the_mathematics_names_all_that_is_not_torch() -> None:
    """Whatever the floors above import from outside is forbidden to the mathematics, and all but
    DeepInverse and torchvision to the one module that imports them."""
    graph = grimp.build_graph("lib", include_external_packages=True, cache_dir=None)
    outside = {name for name in graph.modules if name.partition(".")[0] not in ("lib", "torch")}
    _, with_deepinverse, _, contract = PROJECT["tool"]["importlinter"]["contracts"]
    assert outside - sys.stdlib_module_names <= set(contract["forbidden_modules"])
    allowed = {"deepinv", "torchvision"}
    assert set(with_deepinverse["forbidden_modules"]) == set(contract["forbidden_modules"]) - allowed


PYTHON = """#!/bin/sh
case "$1" in
  -V) echo Python 3.12.0 ;;
  -c) echo "$0" ;;
  *) mkdir -p "$2/bin"; echo "$0" > "$2/made-by"
     env > "${0##*/}.env"
     for tool in python ruff mypy lint-imports; do cp "${0%/*}/tool" "$2/bin/$tool"; done ;;
esac
"""
"""Stands for a Python that the project takes: it makes an environment whose programs are `TOOL`."""

TOOL = """#!/bin/sh
echo "${0##*/} $*"
env > "${0##*/}.env"
case "${0##*/} $*" in *"${FAILS:-nothing}"*) exit 3 ;; esac
"""
"""Stands for a program of the environment: it says how it was called, and fails where it is told to."""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone's set-up, in a folder with a space in its name, with programs that only say what they are."""
    folder = tmp_path / "my clone"
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(ROOT / name, folder)
    programs = tmp_path / "programs"
    programs.mkdir()
    # Versions that are not to be taken: one that does not run, as pyenv's shims, and an older one.
    for name, text in {"python3.11": "exit 127", "python3.12": PYTHON, "tool": TOOL}.items():
        (programs / name).write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    return folder


def make(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """What make says in a clone, with its own programs first and nothing of this process's environment."""
    path = f"{folder.parent / 'programs'}{os.pathsep}{os.environ['PATH']}"
    command = ["make", "--no-print-directory", *arguments]
    env = {"PATH": path, "HOME": str(folder.parent)} | variables
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_make_alone_prints_the_targets() -> None:
    printed = make(ROOT).stdout
    targets = re.findall(r"^make ([\w-]+)", printed, flags=re.MULTILINE)
    assert {"figures", "test", "lab", "figNN"} <= set(targets)
    assert len(targets) == len(set(targets))


def test_the_first_python_that_runs_and_serves_is_taken(clone: Path) -> None:
    outcome = make(clone, "theory")
    assert outcome.returncode == 0, outcome
    assert (clone / ".venv" / "made-by").read_text().strip() == str(clone.parent / "programs" / "python3.12")
    assert make(clone, "theory").stdout.startswith("python -m lib.pages.notebooks run theory --profile quick")


@pytest.mark.parametrize("python", ["/nonexistent/python3.11", "false", "{programs}/python3.11"])
def test_wrong_python_gets_one_line(clone: Path, python: str) -> None:
    """A missing or wrong interpreter is named in one line before anything is installed."""
    named = python.format(programs=clone.parent / "programs")
    outcome = make(clone, "figures", f"PYTHON={named}")
    assert outcome.returncode != 0
    (said,) = outcome.stdout.splitlines()
    assert said.startswith(f"{named} has no Python 3.11, 3.12 or 3.13 that runs: install")
    assert not (clone / ".venv").exists()


def test_an_environment_is_of_its_folder_and_its_packages(clone: Path) -> None:
    """Copied, moved, or with another lock it is made anew, once, and says why in one line."""
    make(clone, "theory")
    copy = clone.with_name("copy")
    shutil.copytree(clone, copy, symlinks=True)
    said, *_ = make(copy, "theory").stdout.splitlines()
    assert said == f".venv was made for the folder {clone}: setting it up anew (some minutes)"
    link = clone.with_name("link")
    link.symlink_to(copy)
    assert "setting" not in make(link, "theory").stdout
    moved = clone.with_name("moved")
    clone.rename(moved)
    assert f"made for the folder {clone}:" in make(moved, "theory").stdout
    with (moved / "requirements.lock").open("a") as lock:
        lock.write("more==1\n")
    assert "made for other packages" in make(moved, "theory").stdout
    (moved / ".venv" / "bin" / "python").unlink()
    assert "setting it up anew" in make(moved, "theory").stdout
    assert "setting" not in make(moved, "theory").stdout


PARTS = {
    "lint": "ruff check",
    "format": "ruff format",
    "imports": "lint-imports",
    "types": "mypy",
    "tests": "worksteal",
    "notebooks": "--nbval",
}


@pytest.mark.parametrize("fails", [*PARTS, "none"])
def test_both_halves_run_and_are_reported(clone: Path, fails: str) -> None:
    """Whatever part fails, the later ones run, each has its line at the end, and make fails."""
    outcome = make(clone, "test", "ARGS=-k 'one or two'", FAILS=PARTS.get(fails, "nothing"))
    said = outcome.stdout.splitlines()
    assert said[-len(PARTS) :] == [f"{part}: {'FAILED' if part == fails else 'passed'}" for part in PARTS]
    assert (outcome.returncode != 0) == (fails != "none")
    (tests,) = (line for line in said if PARTS["tests"] in line)
    assert tests.endswith(" tests -k one or two")
    assert all(any(command in line for line in said) for command in PARTS.values())


@pytest.mark.parametrize("target", ["lab", "explore"])
def test_options_reach_jupyter(clone: Path, target: str) -> None:
    options = "--no-browser --port 8899 --allow-root"
    assert make(clone, target, f"ARGS={options}").stdout.splitlines()[-1].endswith(f" {options}")


def test_clean_keeps_the_trained_runs(clone: Path) -> None:
    kept = [clone / "results" / name / "a" for name in ("runs", "jobs", "reference", "bench")]
    made = [clone / "results" / "quick" / "fig02", clone / ".venv" / "bin"]
    for folder in kept + made:
        folder.mkdir(parents=True)
    make(clone, "clean")
    assert [folder.exists() for folder in kept + made] == [True] * 4 + [False] * 2
    make(clone, "delete-runs")
    assert [folder.exists() for folder in kept] == [False, False, True, True]


HOSTILE = """
PYTHON PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONWARNINGS PYTHONOPTIMIZE PIP_USER PIP_TARGET PIP_CONSTRAINT
PIP_NO_BINARY PYTEST_ADDOPTS PYTEST_PLUGINS JUPYTER_PATH JUPYTER_CONFIG_PATH JUPYTER_CONFIG_DIR
JUPYTER_DATA_DIR JUPYTER_PREFER_ENV_PATH JUPYTERLAB_DIR IPYTHONDIR MPLBACKEND MPLCONFIGDIR MATPLOTLIBRC
RUFF_CONFIG MYPYPATH HYPOTHESIS_STORAGE_DIRECTORY PANDAS_FUTURE_INFER_STRING COVERAGE_PROCESS_START
"""
"""Variables of a user that would change which packages, kernels, tests or styles are used."""

SOURCES = {"PIP_INDEX_URL": "https://mirror/simple", "PIP_CERT": "/certificate", "PIP_FIND_LINKS": "/wheels"}

OWN = {"CELEBA_DIR": "/celeba", "OMP_NUM_THREADS": "1", "HTTPS_PROXY": "http://proxy"}


def test_the_users_variables_stay_out(clone: Path) -> None:
    """No program of the environment sees them; where packages come from stays his affair."""
    outcome = make(clone, "theory", **dict.fromkeys(HOSTILE.split(), "/nonexistent"), **SOURCES, **OWN)
    assert outcome.returncode == 0, outcome
    for program in ("python3.12", "python"):
        lines = (clone / f"{program}.env").read_text().splitlines()
        assert [line for line in lines if "/nonexistent" in line] == []
        assert {f"{name}={value}" for name, value in (SOURCES | OWN).items()} <= set(lines)


def environment_module() -> Any:
    spec = spec_from_file_location("environment", ROOT / ".ci" / "environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pip_knows_the_users_sources_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked itself, pip has from files and variables only where packages come from."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PIP_TARGET", "/elsewhere")
    monkeypatch.setenv("PIP_TIMEOUT", "77")
    (tmp_path / ".config" / "pip").mkdir(parents=True)
    (tmp_path / ".config" / "pip" / "pip.conf").write_text(
        "[global]\nuser = true\nindex-url = https://mirror/simple\ntimeout = 5\n"
        "[install]\nno-deps = true\nfind_links =\n  /one\n  /two\n"
    )
    said = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        env=environment_module().sources(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    said = dict(line.split("=", 1) for line in said.splitlines())
    assert (said[":env:.index-url"], said[":env:.timeout"]) == ("'https://mirror/simple'", "'77'")
    assert said[":env:.find-links"].strip("'").split() == ["/one", "/two"]
    names = {name.rpartition(".")[2] for name in said}
    assert names <= environment_module().SOURCES | {"config-file"}


DRAW = """
import io, sys
from matplotlib import pyplot as plt
from lib.figures.style import STYLE
with plt.rc_context(STYLE):
    fig, (left, right) = plt.subplots(1, 2)
    left.plot([1, 3, 2], label="a line")
    left.legend()
    right.imshow([[0, 1], [2, 3]])
    fig.savefig(sys.stdout.buffer, format="png", metadata={"Software": None})
"""


def test_figures_are_drawn_in_our_style_alone(tmp_path: Path) -> None:
    """Whatever a user's matplotlibrc says, the same bytes come out."""
    (tmp_path / "matplotlibrc").write_text(
        "axes.facecolor: red\nlines.linewidth: 9\nimage.cmap: jet\nsavefig.bbox: tight\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "MATPLOTLIBRC"}
    plain, styled = (
        subprocess.run(
            [sys.executable, "-c", DRAW], cwd=ROOT, env=env | own, stdout=subprocess.PIPE, check=True
        )
        for own in ({}, {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc")})
    )
    assert plain.stdout == styled.stdout != b""


def test_a_notebook_of_another_kernel_is_validated_with_our_own(tmp_path: Path) -> None:
    """And without a word of the kernel's transport."""
    book = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "conda-env-imaging", "display_name": "x"}}
    )
    output = nbformat.v4.new_output(
        "execute_result", data={"text/plain": repr(sys.prefix)}, execution_count=1
    )
    book.cells = [nbformat.v4.new_code_cell("import sys\nsys.prefix", execution_count=1, outputs=[output])]
    nbformat.write(book, tmp_path / "other.ipynb")
    command = [sys.executable, "-m", "pytest", "-c", "pyproject.toml", "--nbval", str(tmp_path)]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "1 passed" in outcome.stdout, outcome
    assert "encryption" not in outcome.stdout + outcome.stderr
