"""`make gpu` with Python and torch alone, on a CPU, and its runs taken into a store elsewhere."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from lib.experiments import bare, gpu, runs
from lib.experiments.archive import pack, take
from lib.experiments.config import ConfigError, RunConfig
from lib.experiments.profiles import SWEEPS, grid
from lib.experiments.runs import code_with, is_stored, read_record, run_key
from lib.experiments.store import REPOSITORY, DamagedFile
from lib.experiments.trainer import Trainer

WITH_TORCH = (
    "torch",
    "torchgen",
    "typing_extensions",
    "sympy",
    "mpmath",
    "networkx",
    "jinja2",
    "markupsafe",
    "fsspec",
)
"""What comes with torch; even its lock of files may be missing."""

SMALL = ["--device", "cpu", "--size", "7", "--batch", "4", "--stacks", "2"]
CONFIGS = grid("smoke", task="denoising")

MAIN = """
import runpy, sys
sys.path[:0] = [sys.argv[1]]
sys.path.append(sys.argv[2])
sys.argv[1:] = sys.argv[3:]
runpy.run_module("lib.experiments.bare", run_name="__main__")
"""

KEYS = """
import sys
sys.path[:0] = [sys.argv[1]]
sys.path.append(sys.argv[2])
from lib.experiments import bare
with bare.provided():
    from lib.experiments.profiles import SWEEPS, grid
    from lib.experiments.runs import run_key
print(*(run_key(config) for profile in SWEEPS for config in grid(profile, learning_rate=1)), sep="\\n")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with torch and what it needs, and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    for name in WITH_TORCH:
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        place = Path(spec.origin)
        source = place.parent if place.name == "__init__.py" else place
        (folder / source.name).symlink_to(source)
    described = Path(str(distribution("torch").locate_file("")))
    for path in described.glob("torch-*.dist-info"):
        (folder / path.name).symlink_to(path)
    return folder


Bare = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run_bare(site: Path) -> Bare:
    """Runs a script without any package but torch's."""

    def run(script: str, repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", "-S", "-c", script, str(repository), str(site), *arguments]
        return subprocess.run(
            command, cwd=repository, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )

    return run


@pytest.fixture(scope="module")
def measured(run_bare: Bare, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make gpu` writes with a sweep, which goes on until all is trained."""
    out = tmp_path_factory.mktemp("out")
    more = ["--out", str(out), "--sweep", "60", "--profile", "smoke"]
    done = run_bare(MAIN, REPOSITORY, *SMALL, *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("12 of 12 runs of smoke are trained: make sweep ")
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_is_measured(measured: Path) -> None:
    """Every task and model with its time; on a CPU nothing differs from the CPU, nor is anything replayed."""
    timed, agreed = rows(measured / "stacks_gpu.csv"), rows(measured / "agreement_gpu.csv")
    kinds = {
        (task, model) for task in ("denoising", "inpainting", "deblurring") for model in ("bilevel", "deq")
    }
    assert {(row["task"], row["model"]) for row in timed} == kinds
    assert all(row["stack"] == "2" and row["device"] == "CPU" and float(row["ms"]) > 0 for row in timed)
    assert {(row["task"], row["model"]) for row in agreed} == kinds
    differences = [float(value) for row in agreed for name, value in row.items() if "loss" in name]
    assert differences == [0.0] * 3 * len(kinds)
    said = json.loads((measured / "stacks_gpu_provenance.json").read_text())
    assert said["left out"] == 0
    assert said["environment"]["packages"] | {"torch": ""} == {
        "torch": "",
        "torchvision": "none",
        "numpy": "none",
        "pandas": "none",
        "matplotlib": "none",
    }


def test_without_data_random_images_are_timed_and_nothing_is_trained(run_bare: Bare, tmp_path: Path) -> None:
    """A sweep of them would mean nothing."""
    shutil.copytree(REPOSITORY / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    done = run_bare(MAIN, tmp_path, *SMALL, "--minutes", "0.001", "--out", str(tmp_path), "--sweep", "1")
    assert done.returncode == 1
    (timed,) = rows(tmp_path / "stacks_gpu.csv")
    assert float(timed["ms"]) > 0
    missing = tmp_path / "data" / "MNIST" / "raw"
    assert done.stderr.splitlines()[-1] == f"gpu: {missing} is not there: a sweep needs it brought along"
    assert not (tmp_path / "data").exists()


def test_configurations_have_the_same_keys_with_torch_alone(run_bare: Bare) -> None:
    """Of all sweeps, also where an integer is given for a float."""
    done = run_bare(KEYS, REPOSITORY)
    expected = [run_key(config) for profile in SWEEPS for config in grid(profile, learning_rate=1)]
    assert done.stdout.split() == expected, done.stderr


def test_what_is_at_odds_is_refused_with_torch_alone() -> None:
    """By the rules that tie values together, which are those of the configurations themselves."""

    class Ordered(bare.BaseModel):
        low: float
        high: float = 1.0

        @bare.model_validator(mode="after")
        def _ordered(self) -> Ordered:
            if self.low > self.high:
                raise ValueError("low: too high")
            return self

    assert Ordered(low=0.5) == Ordered(low=0.5, high=1) != Ordered(low=0.5, high=2.0)
    assert Ordered(low=0.5).model_copy({"low": 2.0}).model_dump() == {"low": 2.0, "high": 1.0}
    for values, said in (
        ({"low": 2}, "low: too"),
        ({}, "low: it is"),
        ({"low": 0, "mid": 1}, "mid: no such"),
    ):
        with pytest.raises(ValueError, match=f"^{said}"):
            Ordered(**values)


def test_a_gpu_is_asked_for_where_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    """In one line."""
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "device: got 'cuda', allowed: cpu, for torch sees no GPU here\n"


def test_runs_are_taken_in_as_they_were_trained(measured: Path, tmp_path: Path) -> None:
    """To the bit what is trained here, under the same keys, with where they come from."""
    configs = grid("smoke")
    said = take(measured / "smoke.zip", configs, tmp_path)
    assert said.startswith(f"12 of the 12 runs of {measured / 'smoke.zip'} taken in, trained with torch ")
    assert all(is_stored(config, tmp_path) for config in configs)
    (member,) = Trainer([CONFIGS[0]]).train()
    run = runs.get_run(CONFIGS[0], tmp_path)
    assert run.status == member.status
    assert all(torch.equal(run.weights[name], weight) for name, weight in member.weights.items())
    assert run.provenance["environment"]["packages"]["numpy"] == "none"
    assert take(measured / "smoke.zip", configs, tmp_path).startswith("0 of the 12 runs ")
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def packed(path: Path, measured: Path, change: Callable[[str, bytes], tuple[str, bytes]]) -> Path:
    """A copy of the archive whose members are changed."""
    with ZipFile(measured / "smoke.zip") as old, ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(*change(name, old.read(name)))
    return path


@pytest.mark.parametrize("name", ["weights.pt", "run.json"])
def test_a_damaged_run_is_refused_and_nothing_taken_in(measured: Path, tmp_path: Path, name: str) -> None:
    """A flipped bit that the archive's own checksums do not see; not even the runs before it are stored."""
    damaged = f"{run_key(grid('smoke')[-1])}/{name}"

    def flipped(member: str, content: bytes) -> tuple[str, bytes]:
        place = len(content) // 2 if member == damaged else len(content)
        return member, content[:place] + bytes(byte ^ 1 for byte in content[place : place + 1]) + content[
            place + 1 :
        ]

    path = packed(tmp_path / "damaged.zip", measured, flipped)
    with pytest.raises(DamagedFile, match=f"its run {damaged.partition('/')[0]} is not what was trained"):
        take(path, grid("smoke"), tmp_path / "results")
    assert not list((tmp_path / "results").iterdir())


def test_runs_under_a_false_key_are_refused(measured: Path, tmp_path: Path) -> None:
    """One run in the place of another one, whose configuration is not its own."""
    one, other = (run_key(config) for config in grid("smoke")[:2])
    swap = {one: other, other: one}

    def swapped(member: str, content: bytes) -> tuple[str, bytes]:
        key, slash, name = member.partition("/")
        return swap.get(key, key) + slash + name, content

    with pytest.raises(DamagedFile, match="is not what was trained"):
        take(packed(tmp_path / "swapped.zip", measured, swapped), grid("smoke"), tmp_path / "results")


def test_runs_of_another_torch_are_taken_in_and_of_other_code_are_not(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their keys are those of the present code with that torch; a name alone does not make them so."""
    configs = grid("smoke")
    path = packed(
        tmp_path / "other.zip", measured, lambda name, content: (name, b"2.0" if name == "torch" else content)
    )
    with pytest.raises(
        ConfigError, match=r"^take: got .*, whose runs are of other code, other data or another grid$"
    ):
        take(path, configs, tmp_path / "results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "version", lambda name: "2.0+cu1")
        results = tmp_path / "elsewhere"
        runs.train_stack(CONFIGS[:1], results, lambda progress: None)
        assert pack(tmp_path / "one.zip", "2.0+cu1", configs, results) == 1
    assert take(tmp_path / "one.zip", configs, tmp_path / "results").startswith("1 of the 1 runs ")
    record = read_record(CONFIGS[0], tmp_path / "results")
    assert record is not None
    assert record["provenance"]["code"] == code_with("2.0") != runs.code_version()


@pytest.mark.parametrize("content", [None, b"", b"no archive"])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """In one line."""
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^take: got .*, allowed: a file that make gpu wrote$"):
        take(path, [], tmp_path)


def test_the_hours_of_a_grid() -> None:
    """Of 270 runs in stacks of 90 steps of 60 ms: three times 60,000 steps, and the evaluations."""
    row = {"task": "denoising", "model": "deq", "stack": 90, "ms": 60.0}
    config = RunConfig()
    batches = config.epochs * config.train_images / 100 + (config.epochs + 1) * config.test_images / 100 / 2
    assert gpu.hours([row, row]) == pytest.approx(2 * 3 * batches * 0.06 / 3600)
