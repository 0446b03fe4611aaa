"""Runs: trained once, keyed by all that matters, made again when damaged, and unharmed by kill -9."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Barrier, Thread
from types import SimpleNamespace
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from lib.experiments import data, problem, processes, runs
from lib.experiments.config import RunConfig
from lib.experiments.runs import (
    STACK_NUMBERS,
    Progress,
    Run,
    code_version,
    get_run,
    get_runs,
    is_stored,
    read_record,
    run_folder,
    run_key,
    stack_size,
    stacks,
    syntax,
    train_runs,
    train_stack,
)
from lib.experiments.store import REPOSITORY, read_sealed, write_sealed
from lib.experiments.trainer import Member, Trainer, read_checkpoint, shared, total_steps

SMALL: dict[str, Any] = {
    "size": 7,
    "train_images": 60,
    "test_images": 50,
    "batch_size": 20,
    "epochs": 2,
    "noise": 0.5,
    "model": "deq",
}
CONFIG = RunConfig(**SMALL)
UNSTABLE = RunConfig(**SMALL | {"sigma": "identity", "solver": "plain", "tau": 2.1, "gamma": 1.0})
"""Diverges before it is trained: the step map expands."""
TINY: dict[str, Any] = SMALL | {"size": 4, "epochs": 4, "model": "bilevel"}
"""Of the smallest images on which the weights can be learned, so that many are trained in no time."""
ENDLESS = [RunConfig(**TINY | {"epochs": 10**6, "sigma": sigma}) for sigma in ("softshrink", "relu")]
"""Two stacks that are still trained whenever they are interrupted."""
STACK = [
    RunConfig(**TINY | {"sigma": "identity", "solver": "plain", "learning_rate": 0.03} | values)
    for values in ({}, {"noise": 1.0}, {"tau": 2.1, "gamma": 1.0}, {"tau": 0.9, "gamma": 1.45}, {"lam": 0.9})
]
"""Five that train together: the third one diverges before it is trained, the fourth in its first epoch."""
STATUSES = ["completed", "completed", "diverged", "diverged", "completed"]
STEPS = total_steps(STACK[0])

DYING = """
import itertools, os, signal, sys
from lib.experiments import runs
from lib.experiments.config import RunConfig

class Dying(runs.Trainer):
    def train(self, on_epoch, on_step):
        steps = itertools.count(1)

        def step():
            on_step()
            if next(steps) == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        return super().train(on_epoch, step)

runs.Trainer = Dying
runs.get_run(RunConfig(), sys.argv[1])
"""
"""Trains a run until the middle of its second epoch."""

TELL_IMPORTS = """
import json, os, sys
from lib.experiments import runs
from lib.experiments.config import RunConfig

class Telling(runs.Trainer):
    def train(self, *args, **kwargs):
        print("trained")
        return super().train(*args, **kwargs)

runs.Trainer = Telling
"""

OTHER_VALUES: dict[str, Any] = {
    "model": "bilevel",
    "task": "inpainting",
    "noise": 0.25,
    "tau": 0.25,
    "gamma": 0.2,
    "lam": 0.9,
    "sigma": "softshrink",
    "size": 14,
    "train_images": 61,
    "test_images": 51,
    "batch_size": 21,
    "epochs": 3,
    "learning_rate": 2e-3,
    "final_learning_rate": 1e-5,
    "solver": "plain",
    "adjoint": "neumann",
    "neumann_steps": 3,
    "adjoint_tol": 1e-4,
    "precondition": True,
    "precision": "tf32",
    "tol": 1e-4,
    "max_steps": 51,
    "memory": 4,
    "regularization": 1e-5,
    "beta": 0.9,
    "patience": 5,
    "schedule": "linear",
    "start": "zero",
    "test_every": 2,
    "seed": 1,
    "time_budget": 3601.0,
}
"""A valid value for each field, which is not `CONFIG`'s."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """Results with the run of `CONFIG`, and the run."""
    results = tmp_path_factory.mktemp("results")
    return results, get_run(CONFIG, results)


@pytest.fixture
def results(tmp_path: Path, stored: tuple[Path, Run]) -> Path:
    """A copy of the results with the run of `CONFIG`, to be damaged."""
    return shutil.copytree(stored[0], tmp_path / "results")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the sources that `code_version` reads."""
    shutil.copytree(REPOSITORY / "lib", tmp_path / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(runs, "REPOSITORY", tmp_path)
    runs.code_with.cache_clear()
    yield tmp_path / "lib"
    runs.code_with.cache_clear()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process does what others would be asked for, where nothing is said about them."""
    monkeypatch.setattr(runs, "in_processes", lambda jobs, count, hear: [job(hear) for job in jobs])


class NoTrainer:
    """Stands in for the trainer where nothing may be trained."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise AssertionError("a run was trained that should have been loaded")


def folder_of(config: RunConfig, results: Path) -> Path:
    return results / "runs" / run_key(config)


def asides(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.damaged-*"))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def assert_same_bits(one: Run, other: Run) -> None:
    """Everything but the seconds is the same."""
    assert (one.key, one.config, one.status, one.reason) == (
        other.key,
        other.config,
        other.status,
        other.reason,
    )
    first, second = (run.history.drop(columns="seconds") for run in (one, other))
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def strict(path: Path) -> Any:
    """Content of a JSON file, read by the letter of the standard: without NaN and infinities."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_a_run_is_trained_once(
    results: Path, stored: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second request, with the folder given as text, loads what the first one stored."""
    monkeypatch.setattr(runs, "Trainer", NoTrainer)
    loaded = get_run(RunConfig(**CONFIG.model_dump()), str(results))
    assert_same_bits(loaded, stored[1])
    assert loaded.provenance == stored[1].provenance
    pd.testing.assert_frame_equal(loaded.history, stored[1].history, check_exact=True)
    with pytest.raises(AssertionError, match="should have been loaded"):
        get_run(CONFIG.model_copy(update={"seed": 1}), results)


def test_a_finished_run_leaves_no_checkpoint(stored: tuple[Path, Run]) -> None:
    """The run's folder, named by its key, holds the record, the weights and the lock."""
    results, run = stored
    assert run.key == run_key(CONFIG)
    assert {path.name for path in folder_of(CONFIG, results).iterdir()} == {"run.json", "weights.pt", "lock"}


def test_a_run_says_where_it_comes_from(stored: tuple[Path, Run]) -> None:
    """The provenance has the data's digests, the code's version, the packages' and the time it took."""
    run = stored[1]
    assert run.provenance["data"] == data.MNIST_FILES
    assert run.provenance["code"] == code_version()
    assert run.provenance["environment"]["packages"]["torch"] == version("torch")
    assert run.provenance["seconds"] == run.history["seconds"].iloc[-1] > 0


def test_a_run_is_what_the_trainer_made(stored: tuple[Path, Run]) -> None:
    """Storing and loading changes no bit of the member that was trained."""
    run = stored[1]
    (member,) = Trainer([CONFIG]).train()
    assert (run.status, run.reason) == (member.status, member.reason) == ("completed", "")
    history = pd.DataFrame(member.history).drop(columns="seconds")
    pd.testing.assert_frame_equal(run.history.drop(columns="seconds"), history, check_exact=True)
    assert all(torch.equal(run.weights[name], weight) for name, weight in member.weights.items())
    assert run.weights.keys() == member.weights.keys()


@pytest.mark.parametrize("values", [{}, {"model": "bilevel", "sigma": "identity", "task": "inpainting"}])
def test_a_loaded_model_reproduces_its_test_loss(results: Path, values: dict[str, Any]) -> None:
    """The model of a run, on the run's test images and test noise, has the last row's loss and PSNR."""
    config = RunConfig(**SMALL | values)
    run = get_run(config, results)
    images = data.mnist("test", config.test_images, config.size)
    last = run.history.iloc[-1]
    for model, noise in ((run.model(), config.noise), (run.model(stacked=True), [config.noise])):
        n = problem.test_noise(config)
        f = problem.observe(problem.make_operator(config), images, torch.tensor(noise), n)
        mse = (problem.solve(model, f, config).value - images).square().mean((-3, -2, -1))
        assert mse.mean().item() == pytest.approx(last["test_loss"], rel=1e-5)
        assert problem.psnr(mse).mean().item() == pytest.approx(last["test_psnr"], rel=1e-5)
    assert last["test_loss"] != pytest.approx(run.history["test_loss"].iloc[0], rel=1e-4)


def test_the_key_depends_on_every_field() -> None:
    """Changing any one field of the configuration gives a key of its own."""
    assert OTHER_VALUES.keys() == RunConfig.model_fields.keys() - {"dataset"}
    others = [RunConfig(**CONFIG.model_dump() | {name: value}) for name, value in OTHER_VALUES.items()]
    keys = {run_key(config) for config in (CONFIG, *others)}
    assert len(keys) == 1 + len(OTHER_VALUES)
    assert run_key(RunConfig(**CONFIG.model_dump())) == run_key(CONFIG)


def test_the_key_depends_on_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other images under the same name are another run."""
    before = run_key(CONFIG)
    other = data.MNIST_FILES | {"train-images-idx3-ubyte": "md5:00000000000000000000000000000000"}
    monkeypatch.setitem(runs.DATA_DIGESTS, "mnist", other)
    assert run_key(CONFIG) != before


def test_the_key_depends_on_the_code(sources: Path) -> None:
    """A changed operator is another version of the code, and with it another key."""
    version, key = code_version(), run_key(CONFIG)
    path = sources / "operators.py"
    source = path.read_text()
    path.write_text(source.replace("mask[: -(-height // 3)] = 0", "mask[: -(-height // 4)] = 0"))
    assert path.read_text() != source
    runs.code_with.cache_clear()
    assert code_version() != version
    assert run_key(CONFIG) != key
    path.write_text(source)
    runs.code_with.cache_clear()
    assert (code_version(), run_key(CONFIG)) == (version, key)


def test_the_code_version_ignores_comments_and_docstrings(sources: Path) -> None:
    """What a reader is told changes nothing that is computed."""
    version = code_version()
    path = sources / "operators.py"
    source = path.read_text()
    edited = source.replace('"""`K u = u`: denoising."""', '"""Nothing is lost but clarity."""')
    edited = edited.replace("    return mask\n", "\n    # As in the paper.\n    return mask  # (H, W)\n", 1)
    assert edited.count("Nothing is lost") == edited.count("As in the paper") == 1
    path.write_text(edited + "\n\n# The end.\n")
    runs.code_with.cache_clear()
    assert code_version() == version


def test_the_files_that_can_change_a_result_count_and_no_others(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new statement in one of them is another version, and in any other file of `lib` it is not."""
    monkeypatch.setattr(runs, "syntax", cache(syntax))
    version, counting = code_version(), set[str]()
    for path in sources.rglob("*.py"):
        source = path.read_text()
        path.write_text(source + "\nNEW = 1\n")
        runs.code_with.cache_clear()
        if code_version() != version:
            counting.add(str(path.relative_to(sources)))
        path.write_text(source)
    assert counting == set(runs.RESULT_FILES)


SYNTAX = r'''
"""A module."""

async def f(a, /, *b: int, c=1.5, **d) -> None:
    """A function."""

class C(Base, metaclass=type):
    """A class."""

    x: str = f"{a!r:>{width}}{{}}" "b" rf'\d{c}' ''
    def g(self): return [*self.x, -1 ** 2, 1_000, 1e-3, 2j, ..., b"c", None, True, {**d, "k": ()}]

@decorated
def h(x):
    match x:
        case {"a": [1, *_], **rest} | C(y=2) as z if z: raise E from None
        case _: (n := lambda a, *, b: yield_(a)); del x[1:, ::2]
    try:
        with open(f"{x=}") as y, z: pass
    except* (A, B): global q
    finally: return {i: j async for i in z if i for j in i}
'''
"""All that Python's grammar had in version 3.11 and was changed since, and more."""


def test_the_syntax_is_the_same_for_every_python() -> None:
    """Its digest was computed once, by another version than the one at hand, perhaps."""
    assert hashlib.sha256(syntax(SYNTAX).encode()).hexdigest()[:16] == "c1fb35b5ee532e7b"


def test_no_file_that_training_uses_is_forgotten() -> None:
    """All that the trainer imports counts, but the configuration, which is in the key, and the store."""
    found, waiting = set[str](), ["lib.experiments.trainer"]
    while waiting:
        module = waiting.pop()
        path = Path(*module.split(".")[1:]).with_suffix(".py")
        if module == "lib" or str(path) in found or not (REPOSITORY / "lib" / path).exists():
            continue
        found.add(str(path))
        for node in ast.walk(ast.parse((REPOSITORY / "lib" / path).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lib"):
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    assert found - {"experiments/config.py", "experiments/store.py"} == set(runs.RESULT_FILES)


def in_the_seal(content: bytes) -> int:
    return content.index(b'"sha256": "') + 20


def in_a_loss(content: bytes) -> int:
    return content.index(b'"test_loss": 0.') + 16


def in_the_status(content: bytes) -> int:
    return content.index(b'"completed"') + 3


def at_the_start(content: bytes) -> int:
    return 0


@pytest.mark.parametrize("place", [in_the_seal, in_a_loss, in_the_status, at_the_start])
def test_a_flipped_bit_in_the_record_is_noticed(
    results: Path, stored: tuple[Path, Run], capsys: pytest.CaptureFixture[str], place: Callable[[bytes], int]
) -> None:
    """The damaged record is kept aside and named, and the run is made again with the same bits."""
    path = folder_of(CONFIG, results) / "run.json"
    flip(path, place(path.read_bytes()))
    damaged = path.read_bytes()
    assert_same_bits(get_run(CONFIG, results), stored[1])
    (aside,) = asides(path.parent)
    assert aside.name.startswith("run.json.damaged-")
    assert aside.read_bytes() == damaged
    assert f"set aside {path} as {aside.name}: " in capsys.readouterr().err
    assert strict(path)["run"]["config"] == CONFIG.model_dump()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '"run"', "{}", '{"run": 1}', '{"sha256": 1, "run": 1}']
)
def test_a_record_that_is_no_record_is_noticed(
    results: Path, stored: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    """A record that is cut, or is some other JSON, is set aside rather than believed."""
    path = folder_of(CONFIG, results) / "run.json"
    path.write_text(content)
    monkeypatch.setattr(runs, "Trainer", NoTrainer)
    with pytest.raises(AssertionError, match="a run was trained"):
        get_run(CONFIG, results)
    (aside,) = asides(path.parent)
    assert aside.read_text() == content
    assert not path.exists()


def test_a_record_of_another_configuration_is_noticed(
    results: Path, stored: tuple[Path, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole record in the wrong folder is set aside as what it is, and the right run is made."""
    other = CONFIG.model_copy(update={"seed": 1})
    foreign = get_run(other, results)
    folder = folder_of(CONFIG, results)
    for name in ("run.json", "weights.pt"):
        shutil.copy(folder_of(other, results) / name, folder / name)
    run = get_run(CONFIG, results)
    assert_same_bits(run, stored[1])
    assert not torch.equal(run.weights["A"], foreign.weights["A"])
    (aside,) = asides(folder)
    assert strict(aside)["run"]["config"]["seed"] == 1
    told = capsys.readouterr().err
    assert f"set aside {folder / 'run.json'} as {aside.name}: " in told
    assert "another configuration" in told


def flip_weights(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def truncate_weights(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def test_weights_of_another_run_are_noticed(
    results: Path, stored: tuple[Path, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole weights in the wrong folder, as a copy by hand leaves them, are not taken for the run's own."""
    other = CONFIG.model_copy(update={"seed": 1})
    get_run(other, results)
    folder = folder_of(CONFIG, results)
    shutil.copy(folder_of(other, results) / "weights.pt", folder)
    assert_same_bits(get_run(CONFIG, results), stored[1])
    assert "weights.pt: it belongs to another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", [flip_weights, truncate_weights, Path.unlink], ids=["flipped", "truncated", "missing"]
)
def test_damaged_weights_are_noticed(
    results: Path,
    stored: tuple[Path, Run],
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    """A record without its weights is set aside, the weights are named, and the run is made again."""
    folder = folder_of(CONFIG, results)
    damage(folder / "weights.pt")
    assert_same_bits(get_run(CONFIG, results), stored[1])
    (aside,) = (path for path in asides(folder) if path.name.startswith("run.json.damaged-"))
    told = capsys.readouterr().err
    assert f"set aside {folder / 'run.json'} as {aside.name}: " in told
    assert str(folder / "weights.pt") in told


def test_a_truncated_checkpoint_is_noticed(
    tmp_path: Path, stored: tuple[Path, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupted run whose checkpoint was cut is trained from the start, with the same bits."""
    train_until(1, [CONFIG], tmp_path)
    path = folder_of(CONFIG, tmp_path) / "checkpoint.pt"
    assert not (path.parent / "run.json").exists()
    cut = path.read_bytes()[:-100]
    path.write_bytes(cut)
    assert_same_bits(get_run(CONFIG, tmp_path), stored[1])
    (aside,) = asides(path.parent)
    assert aside.name.startswith("checkpoint.pt.damaged-")
    assert aside.read_bytes() == cut
    assert f"set aside {path} as {aside.name}: " in capsys.readouterr().err


def test_a_diverged_run_is_stored_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its status and its reason, and is loaded, not tried again."""
    first = get_run(UNSTABLE, tmp_path)
    assert first.status == "diverged"
    assert first.reason.startswith("test loss ")
    assert first.history.empty
    monkeypatch.setattr(runs, "Trainer", NoTrainer)
    again = get_run(UNSTABLE, tmp_path)
    assert (again.status, again.reason) == (first.status, first.reason)
    assert again.provenance == first.provenance
    assert again.history.empty
    assert all(torch.equal(weight, again.weights[name]) for name, weight in first.weights.items())
    assert strict(folder_of(UNSTABLE, tmp_path) / "run.json")["run"]["reason"] == first.reason


def test_a_run_out_of_time_is_stored_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its status, its reason and the rows it came to, and is loaded, not tried again."""
    config = CONFIG.model_copy(update={"time_budget": 1e-6})
    first = get_run(config, tmp_path)
    monkeypatch.setattr(runs, "Trainer", NoTrainer)
    for run in (first, get_run(config, tmp_path)):
        assert (run.status, run.reason) == ("out of time", "time budget of 1e-06 s spent in epoch 1")
        assert run.history["epoch"].tolist() == [0]


def test_the_record_is_strict_json(stored: tuple[Path, Run]) -> None:
    """A reader that knows the standard only can read the record of a run."""
    results, run = stored
    record = strict(folder_of(CONFIG, results) / "run.json")["run"]
    assert [row["epoch"] for row in record["history"]] == [0, 1, 2]
    assert record["config"] == CONFIG.model_dump()
    assert record["status"] == run.status


def test_numbers_that_json_lacks_are_stored_as_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN and infinities in a history are null in the record and missing in the table."""

    class Overflowing(Trainer):
        def train(self, *args: Any, **kwargs: Any) -> list[Member]:
            members = super().train(*args, **kwargs)
            members[0].history[1].update(forward_residual=math.inf, backward_residual=math.nan)
            return members

    monkeypatch.setattr(runs, "Trainer", Overflowing)
    history = get_run(CONFIG, tmp_path).history
    row = strict(folder_of(CONFIG, tmp_path) / "run.json")["run"]["history"][1]
    assert row["forward_residual"] is row["backward_residual"] is None
    assert history.loc[1, ["forward_residual", "backward_residual"]].isna().all()
    assert history.loc[2].notna().all()


def test_a_killed_run_ends_with_the_same_bits(
    tmp_path: Path, stored: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After kill -9 in mid training, the next request goes on and gives what an undisturbed run gives."""
    request = DYING.replace("RunConfig()", f"RunConfig(**{CONFIG.model_dump()})")
    killed = subprocess.run([sys.executable, "-c", request, str(tmp_path)], cwd=REPOSITORY)
    assert killed.returncode == -signal.SIGKILL
    assert not is_stored(CONFIG, tmp_path)
    trained = watch_trainings(monkeypatch)
    assert_same_bits(get_run(CONFIG, tmp_path), stored[1])
    assert trained == [(1, [CONFIG])]
    assert not (folder_of(CONFIG, tmp_path) / "checkpoint.pt").exists()


def test_two_processes_train_a_run_once(
    tmp_path: Path, two_at_once: Callable[[str, str, Path], list[tuple[str, str]]]
) -> None:
    """Of two requests at the same moment one trains and one waits, and both have the same run."""
    body = f"""
run = runs.get_run(RunConfig(**{CONFIG.model_dump()}), sys.argv[1])
record = os.path.join(sys.argv[1], "runs", run.key, "run.json")
print(json.dumps([run.key, run.provenance, run.history["test_loss"].tolist(), os.stat(record).st_ino]))
"""
    outputs = [output.splitlines() for output, _ in two_at_once(TELL_IMPORTS, body, tmp_path)]
    assert sorted(len(lines) for lines in outputs) == [1, 2]
    assert ["trained"] in [lines[:-1] for lines in outputs]
    first, second = (json.loads(lines[-1]) for lines in outputs)
    assert first == second
    assert first[0] == run_key(CONFIG)


@pytest.fixture
def own_children() -> Callable[[], list[psutil.Process]]:
    """The processes that this one has started in a test and that have not ended."""
    before = set(psutil.Process().children())
    return lambda: [child for child in psutil.Process().children() if child not in before]


def test_runs_trained_at_the_same_time_are_those_trained_alone(
    results: Path, stored: tuple[Path, Run], own_children: Callable[[], list[psutil.Process]]
) -> None:
    """Several requests, one made twice, come back in their order, as single ones, and are loaded then."""
    configs = [CONFIG.model_copy(update=values) for values in ({"seed": 1}, {}, {"model": "bilevel"})]
    configs.append(configs[2])
    found = get_runs(configs, results)
    assert [run.config for run in found] == configs
    assert found[1].provenance == stored[1].provenance
    assert_same_bits(found[1], stored[1])
    alone = get_run(configs[2], results.with_name("alone"))
    assert_same_bits(found[2], alone)
    assert found[2].provenance == found[3].provenance
    assert [run.provenance for run in get_runs(configs, results)] == [run.provenance for run in found]
    assert own_children() == []


def test_a_failed_training_is_reported_in_one_line_and_stops_the_others(
    tmp_path: Path, own_children: Callable[[], list[psutil.Process]]
) -> None:
    """The line says which training failed and why; the one beside it is stopped, not waited for."""
    (folder_of(CONFIG, tmp_path) / "checkpoint.pt").mkdir(parents=True)
    with pytest.raises(
        RuntimeError, match=r"^deq denoising: IsADirectoryError: .*" + run_key(CONFIG)
    ) as caught:
        get_runs([CONFIG, *ENDLESS], tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert own_children() == []


def test_a_killed_training_process_is_reported(
    tmp_path: Path, own_children: Callable[[], list[psutil.Process]]
) -> None:
    """When the system kills one, the error says so and that the work is not lost; the others are stopped."""
    path = run_folder(ENDLESS[0], tmp_path) / "checkpoint.pt"

    def kill() -> None:
        wait_for(path.exists)
        own_children()[0].kill()

    killer = Thread(target=kill)
    killer.start()
    with pytest.raises(RuntimeError, match=r"^a training process was killed; run again to resume it$"):
        train_runs(ENDLESS[:1], tmp_path)
    killer.join()
    assert own_children() == []
    assert path.exists()
    assert not is_stored(ENDLESS[0], tmp_path)


def wait_for(condition: Callable[[], object], seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lasting(config: RunConfig, results: Path) -> dict[str, Any]:
    """The record of a run without what no two trainings share."""
    record = read_record(config, results)
    assert record is not None
    del record["provenance"]["seconds"], record["provenance"]["finished"]
    for row in record["history"]:
        del row["seconds"]
    return record


def checkpointed(config: RunConfig, results: Path) -> dict[str, Any]:
    return read_checkpoint(read_sealed(run_folder(config, results) / "checkpoint.pt"))


def has_come_to(epoch: int, config: RunConfig, results: Path) -> bool:
    path = run_folder(config, results) / "checkpoint.pt"
    return path.exists() and checkpointed(config, results)["epoch"] >= epoch


def train_until(epoch: int, configs: Sequence[RunConfig], results: Path) -> None:
    """Train a stack that is interrupted when its first member's checkpoint is of this epoch."""

    def report(progress: Progress) -> None:
        if has_come_to(epoch, configs[0], results):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "CHECKPOINT_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            train_stack(configs, results, report)


def watch_trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[RunConfig]]]:
    """A list that grows, with each training of this process, by its first epoch and its configurations."""
    trained: list[tuple[int, list[RunConfig]]] = []

    class Watched(Trainer):
        def train(self, *args: Any, **kwargs: Any) -> list[Member]:
            trained.append((self.epoch, [member.config for member in self.members]))
            return super().train(*args, **kwargs)

    monkeypatch.setattr(runs, "Trainer", Watched)
    return trained


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Progress]]:
    """Results with all members of `STACK`, and the reports of their training."""
    results, reports = tmp_path_factory.mktemp("undisturbed"), list[Progress]()
    train_stack(STACK, results, reports.append)
    return results, reports


def test_a_stack_stores_each_member(
    undisturbed: tuple[Path, list[Progress]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is stored with its ending, its numbers and its weights, also those that diverged."""
    results = undisturbed[0]
    members = Trainer(STACK).train()
    monkeypatch.setattr(runs, "Trainer", NoTrainer)
    for config, member, status in zip(STACK, members, STATUSES, strict=True):
        run = get_run(config, results)
        assert (run.status, run.reason) == (member.status, member.reason)
        assert run.status == status
        assert bool(run.reason) == (status == "diverged")
        histories = [run.history, pd.DataFrame(member.history)]
        first, second = (history.drop(columns="seconds", errors="ignore") for history in histories)
        pd.testing.assert_frame_equal(first, second, check_exact=True)
        assert all(torch.equal(run.weights[name], weight) for name, weight in member.weights.items())
        folder = run_folder(config, results)
        assert {path.name for path in folder.iterdir()} == {"run.json", "weights.pt", "lock"}


def test_the_reports_of_a_stack_add_up(undisturbed: tuple[Path, list[Progress]]) -> None:
    """All steps are told, those that a diverged member need not take too, and each ending once."""
    reports = undisturbed[1]
    assert sum(progress.steps for progress in reports) == len(STACK) * STEPS
    assert all(progress.steps >= 0 for progress in reports)
    assert sum(progress.resumed for progress in reports) == 0
    assert Counter(status for progress in reports for status in progress.ended) == Counter(STATUSES)


def test_steps_that_nobody_takes_are_told_too(tmp_path: Path) -> None:
    """A stack whose members all diverged leaves none of its steps open."""
    reports = list[Progress]()
    train_stack(STACK[2:4], tmp_path, reports.append)
    assert sum(progress.steps for progress in reports) == 2 * STEPS
    assert [status for progress in reports for status in progress.ended] == ["diverged"] * 2


def test_a_run_is_stored_as_soon_as_it_ends(tmp_path: Path) -> None:
    """While the others train on, what diverged is in the store and needs no checkpoint."""
    train_until(2, STACK, tmp_path)
    assert [is_stored(config, tmp_path) for config in STACK] == [False, False, True, True, False]
    assert [has_come_to(2, config, tmp_path) for config in STACK] == [True, True, False, False, True]


def test_a_stack_leaves_busy_and_stored_runs_alone(
    tmp_path: Path, undisturbed: tuple[Path, list[Progress]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that another process holds is skipped without waiting, the rest is trained as without it."""
    folder = run_folder(STACK[1], tmp_path)
    folder.mkdir(parents=True)
    get_run(STACK[4], tmp_path)
    holder = f"""
import sys
from filelock import FileLock
with FileLock({str(folder / "lock")!r}):
    print("held", flush=True)
    input()
"""
    trained, reports = watch_trainings(monkeypatch), list[Progress]()
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", holder], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        train_stack(STACK, tmp_path, reports.append)
        process.communicate("\n")
    rest = [STACK[0], STACK[2], STACK[3]]
    assert trained == [(0, rest)]
    assert not is_stored(STACK[1], tmp_path)
    assert sum(progress.steps for progress in reports) == len(rest) * STEPS
    train_stack(STACK, tmp_path, reports.append)
    assert trained[1:] == [(0, [STACK[1]])]
    for config in STACK:
        assert lasting(config, tmp_path) == lasting(config, undisturbed[0])


def test_a_stored_stack_is_not_trained_again(
    undisturbed: tuple[Path, list[Progress]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to do and nothing to report."""
    monkeypatch.setattr(runs, "Trainer", NoTrainer)
    train_stack(STACK, undisturbed[0], refuse_report)
    train_runs(STACK, undisturbed[0])


def test_what_a_process_left_that_was_killed_behind_its_record_is_removed(results: Path) -> None:
    """A checkpoint beside the record of its run, and nothing else."""
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    (folder_of(CONFIG, results) / "checkpoint.pt").touch()
    train_runs([CONFIG], results)
    assert {path: path.read_bytes() for path in results.rglob("*") if path.is_file()} == before


def refuse_report(progress: Progress) -> None:
    raise AssertionError(f"{progress} was reported where nothing was to do")


def resume_alone(configs: Sequence[RunConfig], results: Path) -> None:
    for config in configs:
        get_run(config, results)


def resume_in_other_stacks(configs: Sequence[RunConfig], results: Path) -> None:
    for stack in (configs[3:], configs[:3][::-1]):
        train_stack(stack, results, lambda progress: None)


@pytest.mark.parametrize("resume", [train_runs, resume_alone, resume_in_other_stacks])
def test_an_interrupted_stack_is_resumed(
    tmp_path: Path,
    undisturbed: tuple[Path, list[Progress]],
    here: None,
    resume: Callable[[Sequence[RunConfig], Path], None],
) -> None:
    """All at once, one by one or in other stacks: the records are those of an undisturbed training."""
    train_until(2, STACK, tmp_path)
    living = [config for config in STACK if not is_stored(config, tmp_path)]
    before = {config: checkpointed(config, tmp_path)["history"] for config in living}
    ended = {config: read_record(config, tmp_path) for config in STACK if config not in living}
    assert (len(living), len(ended)) == (3, 2)
    resume(STACK, tmp_path)
    for config in STACK:
        assert lasting(config, tmp_path) == lasting(config, undisturbed[0])
        assert not (run_folder(config, tmp_path) / "checkpoint.pt").exists()
    for config, history in before.items():
        record = read_record(config, tmp_path)
        assert record is not None
        assert record["history"][:3] == history
        assert record["provenance"]["seconds"] > history[-1]["seconds"]
    assert {config: read_record(config, tmp_path) for config in ended} == ended


def test_a_resumed_stack_tells_what_was_done_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members of different epochs go on in groups; the steps taken before are told as resumed."""
    train_until(1, [STACK[4]], tmp_path)
    train_until(3, STACK[:4], tmp_path)
    trained, reports = watch_trainings(monkeypatch), list[Progress]()
    train_stack(STACK, tmp_path, reports.append)
    assert trained == [(1, [STACK[4]]), (3, STACK[:2])]
    assert sum(progress.steps for progress in reports) == 3 * STEPS
    assert [progress.resumed for progress in reports if progress.resumed] == [STEPS // 4, 2 * STEPS * 3 // 4]
    assert all(progress.steps >= progress.resumed for progress in reports)
    assert Counter(status for progress in reports for status in progress.ended) == {"completed": 3}


def cut_checkpoint(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_checkpoint(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [cut_checkpoint, flip_checkpoint])
def test_a_damaged_checkpoint_sets_one_member_back(
    tmp_path: Path,
    undisturbed: tuple[Path, list[Progress]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    """It is kept aside and named, and its member starts again, while the neighbours go on."""
    train_until(2, STACK, tmp_path)
    path = run_folder(STACK[1], tmp_path) / "checkpoint.pt"
    damage(path)
    damaged = path.read_bytes()
    trained, reports = watch_trainings(monkeypatch), list[Progress]()
    train_stack(STACK, tmp_path, reports.append)
    assert trained == [(0, [STACK[1]]), (2, [STACK[0], STACK[4]])]
    assert sum(progress.steps for progress in reports) == 3 * STEPS
    assert sum(progress.resumed for progress in reports) == 2 * STEPS // 2
    (aside,) = asides(path.parent)
    assert aside.name.startswith("checkpoint.pt.damaged-")
    assert aside.read_bytes() == damaged
    assert f"set aside {path} as {aside.name}: " in capsys.readouterr().err
    for config in STACK:
        assert lasting(config, tmp_path) == lasting(config, undisturbed[0])


CONFIGS = st.builds(
    RunConfig,
    model=st.sampled_from(["bilevel", "deq"]),
    size=st.just(7),
    noise=st.floats(0, 1),
    tau=st.floats(0.1, 2),
    gamma=st.floats(0, 1),
    lam=st.floats(0.5, 1),
)


MANY = st.integers(0, 60).flatmap(lambda n: st.lists(CONFIGS, min_size=n, max_size=n, unique=True))


@given(MANY, st.integers(1, 16))
def test_stacks_are_full_and_even(configs: list[RunConfig], limit: int) -> None:
    """Every configuration is in one stack, with its like, and no stack is much smaller than another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "stack_size", lambda config, device: limit)
        found = stacks(iter(configs), torch.device("cpu"))
    assert Counter(config for stack in found for config in stack) == Counter(configs)
    assert all(1 <= len(stack) <= limit for stack in found)
    chunks: dict[RunConfig, list[list[RunConfig]]] = {}
    turns = []
    for stack in found:
        (common,) = {shared(config) for config in stack}
        chunks.setdefault(common, []).append(stack)
        turns.append(len(chunks[common]))
    assert turns == sorted(turns)
    for group in chunks.values():
        sizes = [len(stack) for stack in group]
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == -(-sum(sizes) // limit)
        taus = [config.tau for stack in group for config in stack]
        assert taus == sorted(taus)


@given(
    CONFIGS,
    st.sampled_from([7, 28]),
    st.integers(0, 2**32),
    st.integers(0, 2**32),
    st.sampled_from(["cpu", "cuda"]),
)
def test_a_stack_fits_the_memory(config: RunConfig, side: int, one: int, other: int, kind: str) -> None:
    """More memory allows more members, up to what the device gains from; one is always allowed."""
    config = config.model_copy(update={"size": side})
    little, much = sorted((one, other))

    def size(free: int, cores: int = 1, **values: Any) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
            patch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**40))
            patch.setattr(runs, "cores", lambda: cores)
            return stack_size(config.model_copy(update=values), torch.device(kind))

    largest = max(1, STACK_NUMBERS[kind] // (config.batch_size * side**2))
    assert 1 <= size(little) <= size(much) <= largest
    assert size(0) == 1
    assert size(2**50) == largest
    assert size(much, batch_size=1000) <= size(much)
    assert size(much, memory=50) <= size(much)
    weights = 4 * 4 * (2 if config.model == "deq" else 1) * config.size**4
    assert size(much) == 1 or size(much) * weights <= much / 2
    if kind == "cpu":
        assert size(much, cores=8) == size(much // 8)


@pytest.mark.parametrize("model", ["bilevel", "deq"])
def test_the_weights_are_counted(model: str) -> None:
    """As many numbers as are learned, and stored."""
    config = RunConfig(**SMALL | {"model": model})
    parameters = problem.make_model([config]).parameters()
    assert runs.weight_count(config) == sum(parameter.numel() for parameter in parameters)


def test_a_stack_shrinks_with_the_memory() -> None:
    """Between one member and the most there are sizes in between."""
    found = set()
    for free in range(0, 2**28, 2**21):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
            patch.setattr(runs, "cores", lambda: 1)
            config = RunConfig(model="deq", size=14, batch_size=20)
            found.add(stack_size(config, torch.device("cpu")))
    assert found == set(range(1, STACK_NUMBERS["cpu"] // (20 * 14**2) + 1))


def test_the_bar_counts_runs_and_steps(tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends full, at the steps that were left to take, and says how the runs ended, stored ones too."""
    bars = []

    class Recorded(tqdm):  # type: ignore[type-arg]
        postfix_text, end = "", (0.0, 0.0)

        def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
            self.postfix_text = s
            super().set_postfix_str(s, refresh)

        def close(self) -> None:
            self.end = (self.n, self.total)
            super().close()

    def bar(**values: Any) -> Recorded:
        bars.append(Recorded(**values))
        return bars[-1]

    monkeypatch.setattr(runs, "tqdm", bar)
    train_until(1, [STACK[0]], tmp_path)
    get_run(STACK[2], tmp_path)
    get_run(STACK[1], tmp_path)
    late = STACK[4].model_copy(update={"time_budget": 1e-6})
    train_runs([*STACK, late], tmp_path)
    (only,) = bars
    assert only.postfix_text == "runs 6/6, diverged 2, out of time 1"
    left = 4 * STEPS - STEPS // 4
    assert only.end == (left, left)


def test_a_run_that_another_process_trains_is_waited_for(
    tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its lock is held it is looked at now and then; what the other one leaves is trained."""
    folder = run_folder(STACK[0], tmp_path)
    folder.mkdir(parents=True)
    lock, naps = FileLock(folder / "lock"), list[float]()

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        assert not is_stored(STACK[0], tmp_path)
        lock.release()

    monkeypatch.setattr(time, "sleep", sleep)
    with lock:
        train_runs(STACK[:1], tmp_path)
    assert naps == [runs.POLL_SECONDS]
    assert is_stored(STACK[0], tmp_path)


def test_two_sweeps_train_each_run_once(
    tmp_path: Path, two_at_once: Callable[[str, str, Path], list[tuple[str, str]]]
) -> None:
    """Of two processes whose lists overlap, each leaves to the other what that one has begun, and waits."""
    configs = [
        RunConfig(**TINY | {"epochs": 10, "sigma": sigma, "noise": noise, "train_images": 200})
        for sigma in ("relu", "identity")
        for noise in (0.1, 0.2, 0.3)
    ]
    imports = """
import json, os, sys
from lib.experiments import runs
from lib.experiments.config import RunConfig

told, train = [], runs._train_in_processes
runs._train_in_processes = lambda todo, results, report: train(todo, results, told.append)
"""
    body = f"""
configs = [RunConfig(**values) for values in {[config.model_dump() for config in configs]}]
try:
    os.mkdir(sys.argv[1] + "/first")
    mine = configs[:5]
except FileExistsError:
    mine = configs[:0:-1]
runs.train_runs(mine, sys.argv[1])
stored = sum(runs.is_stored(config, sys.argv[1]) for config in mine)
print(json.dumps([stored, sum(p.steps for p in told), sum(len(p.ended) for p in told)]))
"""
    outputs = [json.loads(output) for output, _ in two_at_once(imports, body, tmp_path)]
    assert [stored for stored, _, _ in outputs] == [5, 5]
    assert sum(steps for _, steps, _ in outputs) == sum(map(total_steps, configs))
    assert sum(ended for _, _, ended in outputs) == len(configs)
    assert all(lasting(config, tmp_path)["status"] == "completed" for config in configs)


def sweep_in_a_group(
    folder: Path, stack: ExitStack, training: bool = True
) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A process group that trains `ENDLESS`, its training processes started or with a checkpoint each.

    It is a script of another folder that does no more than to train, without a guard against being imported.
    """
    script = f"""
from lib.experiments.config import RunConfig
from lib.experiments.runs import train_runs
train_runs([RunConfig(**values) for values in {[c.model_dump() for c in ENDLESS]}], {str(folder)!r})
"""
    (folder / "script.py").write_text(script)
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "script.py"],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    )
    stack.callback(process.kill)
    busy = min(runs.cores(), 2)
    if training:
        wait_for(lambda: sum(has_come_to(1, c, folder) for c in ENDLESS) >= busy or process.poll())
    else:
        wait_for(lambda: len(psutil.Process(process.pid).children()) >= busy or process.poll())
    return process, psutil.Process(process.pid).children(recursive=True)


def assert_gone(processes: Sequence[psutil.Process]) -> None:
    wait_for(lambda: all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes))


@pytest.mark.parametrize("training", [False, True], ids=["at its start", "on its way"])
def test_an_interrupted_sweep_stops_quietly(
    tmp_path: Path, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends it at once, with its training processes and without their tracebacks; it can go on."""
    with ExitStack() as stack:
        process, children = sweep_in_a_group(tmp_path, stack, training)
        assert len(children) == min(runs.cores(), 2)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate()
    assert process.returncode != 0
    assert told.count("Traceback") == 1
    assert told.rstrip().endswith("KeyboardInterrupt")
    assert_gone(children)
    trained = watch_trainings(monkeypatch)
    for config in ENDLESS[: len(children)] if training else ():
        before = checkpointed(config, tmp_path)
        train_until(before["epoch"] + 1, [config], tmp_path)
        after = checkpointed(config, tmp_path)
        assert after["history"][: len(before["history"])] == before["history"]
        assert trained.pop() == (before["epoch"], [config])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds nothing to cores")
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_what_threads_start_has_cores_of_its_own(count: int) -> None:
    """All cores are given away, each to one of them, and this thread keeps its own."""
    mine = os.sched_getaffinity(0)
    threads = min(count, len(mine))
    all_are_there = Barrier(threads)

    def share(_: int) -> set[int]:
        all_are_there.wait(60)
        ask = [sys.executable, "-c", "import os; print(*os.sched_getaffinity(0))"]
        return {int(core) for core in subprocess.check_output(ask, text=True).split()}

    with processes.threads_with_cores(count) as pool:
        shares = list(pool.map(share, range(threads)))
    assert sorted(core for own in shares for core in own) == sorted(mine)
    assert all(shares)
    assert os.sched_getaffinity(0) == mine


def test_training_processes_keep_the_last_epoch_when_their_parent_goes(tmp_path: Path) -> None:
    """Each has written one checkpoint, for the next one was due in a minute, and then that of the end."""
    with ExitStack() as stack:
        process, children = sweep_in_a_group(tmp_path, stack)
        before = [child.cpu_times().user for child in children]
        wait_for(lambda: all(c.cpu_times().user > b + 1 for c, b in zip(children, before, strict=True)))
        process.terminate()
        process.communicate()
    assert_gone(children)
    assert all(checkpointed(config, tmp_path)["epoch"] > 1 for config in ENDLESS[: len(children)])


def test_checkpoints_are_written_once_a_minute_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first epoch's at once, and what a stop would lose when it comes, whatever stops the training."""
    written: list[tuple[float, int]] = []
    now, stop = [0.0], BaseException

    def write(path: Path, content: bytes) -> None:
        write_sealed(path, content)
        if path.name == "checkpoint.pt":
            written.append((now[0], read_checkpoint(content)["epoch"]))

    def report(progress: Progress) -> None:
        now[0] += 25 * (progress.steps - progress.resumed) / (STEPS // 4)
        if now[0] > 25 * 9.5:
            raise stop

    monkeypatch.setattr(runs, "write_sealed", write)
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    config = STACK[0].model_copy(update={"epochs": 20})
    for stop, epochs in ((KeyboardInterrupt, [1, 4, 7, 9]), (RuntimeError, [10, 13, 16, 18])):
        now[0] = 0.0
        with pytest.raises(stop):
            train_stack([config], tmp_path, report)
        assert [epoch for _, epoch in written] == epochs
        assert [time for time, _ in written[:-1]] == pytest.approx([25, 100, 175])
        assert checkpointed(config, tmp_path)["epoch"] == epochs[-1]
        written.clear()


def test_code_that_changes_during_a_sweep_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training processes that have read other code than the asking one say so, and store nothing."""
    monkeypatch.setattr(runs, "code_version", lambda: "0" * 16)
    with pytest.raises(RuntimeError, match="the code of lib was changed while it ran; run again"):
        train_runs([CONFIG], tmp_path)
    assert not list(tmp_path.glob("runs/*/run.json"))
