"""Runs: trained once, stored by key, resumed to the same bits, and repaired when damaged."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image

from lib.experiments import records, runs
from lib.experiments.build import Config, make_model, make_training, total_steps
from lib.experiments.config import ConfigError, FacesConfig, RunConfig, parse_parameters
from lib.experiments.method import METHOD_VERSION
from lib.experiments.provenance import PROVENANCE, read_described, write_with_provenance
from lib.experiments.records import Run, data_digests, is_stored, run_folder, run_key
from lib.experiments.runs import find_runs, get_run, get_runs, train_runs, train_stack
from lib.experiments.store import REPOSITORY, DamagedFile
from lib.training import History, Training

TINY: dict[str, Any] = {"size": 4, "train_images": 60, "test_images": 50, "batch_size": 20, "epochs": 4}
UNSTABLE: dict[str, Any] = {"sigma": "identity", "solver": "plain", "learning_rate": 0.03, "noise": 0.5}
STACK = [
    RunConfig(**TINY | UNSTABLE | values)
    for values in ({}, {"noise": 1.0}, {"tau": 2.1, "gamma": 1.0}, {"tau": 0.9, "gamma": 1.45}, {"lam": 0.9})
]
"""Five that train together; the third diverges before training, the fourth in its first epoch."""
STATUSES = ["completed", "completed", "diverged", "diverged", "completed"]
LATE = STACK[0].model_copy(update={"time_budget": 1e-6})
ALL = [*STACK, LATE]

ENDLESS = [RunConfig(**TINY | {"epochs": 10**6, "sigma": sigma}) for sigma in ("softshrink", "relu")]

KERNELS = FacesConfig(epochs=1, reduction=8, train_images=1, test_images=1, filter_size=3, max_steps=5)
FROM_KERNELS = KERNELS.model_copy(update={"task": "deblurring", "blur": 3, "initial": KERNELS})

OTHER_VALUES = """
model deq initial tied task inpainting noise 0.25 tau 0.25 gamma 0.2 lam 0.9 sigma softshrink size 14
train_images 61
test_images 51 batch_size 21 epochs 3 learning_rate 2e-3 final_learning_rate 1e-5 solver anderson
adjoint neumann neumann_steps 3 adjoint_tol 1e-4 precondition true precision tf32 tol 1e-4 max_steps 51
memory 4 regularization 1e-5 beta 0.9 patience 5 schedule linear start zero test_every 2 seed 1
time_budget 3601.0
"""
"""For each field, a valid value other than that of `STACK[0]`."""


@pytest.fixture(autouse=True)
def single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in this process."""
    monkeypatch.setattr(runs, "workers", lambda device: 1)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Run]]:
    """A store with the runs of `ALL`, and the runs."""
    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "workers", lambda device: 1)
        return results, get_runs(ALL, results)


@pytest.fixture
def results(tmp_path: Path, stored: tuple[Path, list[Run]]) -> Path:
    """A copy of the store that tests may change."""
    return shutil.copytree(stored[0], tmp_path / "results")


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "make_training", None)


def assert_same(run: Run, other: Run) -> None:
    """Assert that two runs are equal to the bit, except for seconds."""
    assert (run.key, run.config) == (other.key, other.config)
    assert (run.status, run.reason) == (other.status, other.reason)
    first, second = (r.history.drop(columns="seconds", errors="ignore") for r in (run, other))
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert run.weights.keys() == other.weights.keys()
    assert all(torch.equal(weight, other.weights[name]) for name, weight in run.weights.items())


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def stop_after(epoch: int, configs: list[Config], results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train configurations until the middle of the epoch after `epoch`, with a checkpoint after each."""
    steps = total_steps(configs[0]) // configs[0].epochs * epoch + 1
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0)
    done = 0

    def report(progress: int, ended: tuple[str, ...]) -> None:
        nonlocal done
        done += progress
        if done >= steps * len(configs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_stack(configs, results, report)


def test_stack_stores_members_as_trained_alone(stored: tuple[Path, list[Run]]) -> None:
    """The bits do not depend on the stack or on storing, also for diverged members."""
    results, all_runs = stored
    assert [run.status for run in all_runs] == [*STATUSES, "out of time"]
    for config, run in zip(STACK, all_runs, strict=False):
        (member,) = make_training([config]).run()
        rows = pd.DataFrame(member.rows)
        assert_same(run, Run(run.key, config, member.status, member.reason, rows, member.weights, {}))
        assert bool(run.reason) == (run.status != "completed")
        names = {path.name for path in run_folder(config, results).iterdir()}
        assert names == {"run.json", "weights.pt", "lock"}


def test_runs_are_trained_once(results: Path, stored: tuple[Path, list[Run]], no_training: None) -> None:
    for run, loaded in zip(stored[1], get_runs(ALL, str(results)), strict=True):
        assert_same(loaded, run)
        assert loaded.provenance == run.provenance
        assert (run.provenance["data"], run.provenance["method"]) == (
            data_digests(run.config),
            METHOD_VERSION,
        )
    with pytest.raises(TypeError):
        get_run(STACK[0].model_copy(update={"seed": 1}), results)


def test_key_depends_on_every_field_data_and_method(monkeypatch: pytest.MonkeyPatch) -> None:
    config = STACK[0]
    words = OTHER_VALUES.split()
    values = parse_parameters(list(zip(words[::2], words[1::2], strict=True)))
    assert values.keys() == RunConfig.model_fields.keys() - {"dataset"}
    first = RunConfig(**config.model_dump() | {"model": "deq"})
    others = [RunConfig(**first.model_dump() | {name: value}) for name, value in values.items()]
    keys = {run_key(other) for other in (config, *others)}
    assert len(keys) == 1 + len(values)
    assert run_key(RunConfig(**config.model_dump())) == run_key(config)
    monkeypatch.setattr(records, "METHOD_VERSION", METHOD_VERSION + 1)
    keys.add(run_key(config))
    monkeypatch.setitem(records.DATA_DIGESTS, "mnist", {"images": "md5:0"})
    assert len(keys | {run_key(config)}) == 3 + len(values)


def test_new_parameters_preserve_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter at its default does not change the keys of older runs."""
    monkeypatch.setattr(records, "METHOD_VERSION", 1)
    assert run_key(RunConfig()) == "016c7d909e24301c35e2"


def test_key_depends_on_photographs(tmp_path: Path) -> None:
    """Photographs of an initial run count as well."""
    for k in range(2):
        Image.fromarray(np.full((40, 40), k, np.uint8)).save(tmp_path / f"{k}.png")
    config = KERNELS.model_copy(update={"dataset": str(tmp_path)})
    later = config.model_copy(update={"initial": config})
    before = run_key(config), run_key(later)
    Image.fromarray(np.full((40, 40), 9, np.uint8)).save(tmp_path / "1.png")
    assert {run_key(config), run_key(later)}.isdisjoint(before)
    assert {"1.png", "initial/1.png"} <= data_digests(later).keys()


def test_stopped_stack_resumes_to_same_bits(
    tmp_path: Path, stored: tuple[Path, list[Run]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members stopped at different epochs resume separately, for the remaining steps alone."""
    stop_after(1, STACK[4:], tmp_path, monkeypatch)
    stop_after(3, [STACK[0], STACK[1]], tmp_path, monkeypatch)
    resumed = []

    class Watched(Training):
        def restore(self, states: Sequence[dict[str, Any]]) -> None:
            resumed.append((len(states), states[0]["epoch"]))
            super().restore(states)

    monkeypatch.setattr("lib.experiments.build.Training", Watched)
    reports: list[tuple[int, tuple[str, ...]]] = []
    train_stack(STACK, tmp_path, lambda *progress: reports.append(progress))
    assert resumed == [(1, 1), (2, 3)]
    assert sum(steps for steps, _ in reports) == sum(map(total_steps, STACK))
    assert sorted(status for _, ended in reports for status in ended) == sorted(STATUSES)
    for run, loaded in zip(stored[1], get_runs(STACK, tmp_path), strict=False):
        assert_same(loaded, run)


KILLED_SCRIPT = f"""
import itertools, os, signal, sys
from lib.experiments import config, runs
calls = itertools.count()
os.fsync = lambda descriptor: next(calls) == 2 and os.kill(os.getpid(), signal.SIGKILL)
runs.CHECKPOINT_SECONDS = 0
runs.train_stack([config.RunConfig(**{STACK[0].model_dump()})], sys.argv[1], lambda *progress: None)
"""


def test_training_killed_while_writing_resumes_to_same_bits(
    tmp_path: Path, stored: tuple[Path, list[Run]]
) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED_SCRIPT, tmp_path], cwd=REPOSITORY)
    assert killed.returncode == -signal.SIGKILL
    assert (records.read_checkpoint(STACK[0], tmp_path) or {}).get("epoch") == 2
    assert_same(get_run(STACK[0], tmp_path), stored[1][0])


def test_short_training_writes_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is written after the first epoch."""
    epochs = []

    def write(config: Config, state: dict[str, Any], results: Path) -> None:
        epochs.append(state["epoch"])

    monkeypatch.setattr(runs, "write_checkpoint", write)
    train_stack(STACK[:1], tmp_path, lambda steps, ended: None)
    assert epochs == [1]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize("name", ["run.json", "weights.pt", "checkpoint.pt"])
def test_damaged_files_are_set_aside_and_recomputed(
    results: Path,
    stored: tuple[Path, list[Run]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], None],
) -> None:
    folder = run_folder(STACK[0], results)
    if name == "checkpoint.pt":
        (folder / "run.json").unlink()
        stop_after(2, STACK[:1], results, monkeypatch)
    damage(folder / name)
    assert_same(get_run(STACK[0], results), stored[1][0])
    aside = "checkpoint.pt" if name == "checkpoint.pt" else "run.json"
    (path,) = folder.glob("*.damaged")
    assert path.name.startswith(aside)
    assert f"set aside {folder / aside} as {path.name}: " in capsys.readouterr().err


def train_concurrently(place: Path, reverse: bool) -> int:
    """Train all configurations next to another process, and return the number trained here."""
    trained: list[Config] = []
    with pytest.MonkeyPatch.context() as patch:

        def store(config: Config, *rest: Any) -> None:
            trained.append(config)
            records.store_run(config, *rest)

        patch.setattr(runs, "store_run", store)
        patch.setattr(runs, "workers", lambda device: 1)
        (place / f"ready {reverse}").touch()
        wait_for(lambda: len(list(place.glob("ready *"))) == 2)
        train_runs(SHORT[:: -1 if reverse else 1], place)
    assert all(is_stored(config, place) for config in SHORT)
    return len(trained)


SHORT = [
    RunConfig(**TINY | {"epochs": 20, "sigma": sigma, "noise": noise})
    for sigma in ("relu", "softshrink", "identity")
    for noise in (0.1, 0.2)
]


def test_concurrent_processes_train_each_run_once(tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        counts = list(pool.map(train_concurrently, [tmp_path] * 2, [False, True]))
    assert sum(counts) == len(SHORT)
    assert min(counts) > 0


SCRIPT = f"""
from lib.experiments import runs
from lib.experiments.config import RunConfig
if __name__ == "__main__":
    runs.workers = lambda device: 2
    configs = [RunConfig(**values) for values in {[config.model_dump() for config in ENDLESS]}]
    runs.train_runs(configs, "results")
"""


@pytest.mark.parametrize("who", ["group", "worker"])
def test_stopped_sweep_leaves_no_process(tmp_path: Path, who: str) -> None:
    """Stop it by Ctrl-C, or by `kill -9` of a worker; workers print no traceback."""
    (tmp_path / "script.py").write_text(SCRIPT)
    options: Any = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(REPOSITORY)}}
    options |= {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([sys.executable, "script.py"], **options) as command:
        try:
            wait_for(lambda: len(list(tmp_path.glob("results/runs/*/checkpoint.pt"))) == 2)
            children = psutil.Process(command.pid).children(recursive=True)
            if who == "group":
                os.killpg(command.pid, signal.SIGINT)
            else:
                max(children, key=lambda child: child.cpu_times().user).kill()
            error = command.communicate(timeout=60)[1]
        finally:
            command.kill()
    wait_for(lambda: not any(c.is_running() and c.status() != psutil.STATUS_ZOMBIE for c in children))
    last = {
        "group": "KeyboardInterrupt",
        "worker": "RuntimeError: a training process was killed; run again to resume it",
    }
    assert error.count("Traceback") == 1
    assert error.rstrip().endswith(last[who])


def test_worker_processes_train_to_same_bits(
    tmp_path: Path, stored: tuple[Path, list[Run]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "workers", lambda device: 2)
    for run, loaded in zip(stored[1], get_runs(ALL, tmp_path), strict=True):
        assert_same(loaded, run)


def test_deq_starts_from_bilevel_run(tmp_path: Path) -> None:
    """The DEQ starts with `C = A`."""
    earlier = STACK[0]
    later = RunConfig(**earlier.model_dump() | {"model": "deq", "initial": earlier})
    get_run(later, tmp_path)
    start = runs.learned_start(later, tmp_path)
    assert start is not None
    field = make_model([later], start).regularizer
    assert torch.equal(field.A[0], start["A"])
    assert torch.equal(field.A, field.C)


def test_incomplete_and_diverged_kernels_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A diverged run is rejected; a run out of time and images of its training are named."""
    late = get_run(KERNELS.model_copy(update={"time_budget": 1e-6}), tmp_path)
    records.stored_kernels(late.key, tmp_path)
    warning = f"run {late.key} has not completed, but is out of time: {late.reason}"
    assert warning in capsys.readouterr().err.splitlines()
    lost = History(status="diverged", reason="the loss is not finite", weights=late.weights)
    records.store_run(KERNELS, lost, tmp_path)
    with pytest.raises(ConfigError, match=r"must not have diverged, got .* \(the loss is not finite\)\.$"):
        records.stored_kernels(records.run_key(KERNELS), tmp_path)
    files = [tmp_path / name for name in ("seen.png", "test.png", "copy.png", "new.png")]
    for path, content in zip(files, (b"1", b"2", b"1", b"3"), strict=True):
        path.write_bytes(content)
    data = {path.name: records.file_digest(path) for path in files[:2]}
    config = KERNELS.model_copy(update={"train_images": 1})
    assert records.trained_on(replace(late, config=config, provenance={"data": data}), files) == [
        "seen.png",
        "copy.png",
    ]


def test_initial_run_is_trained_first_and_loaded_by_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = get_run(FROM_KERNELS, tmp_path)
    first = get_run(KERNELS, tmp_path)
    start = runs.learned_start(FROM_KERNELS, tmp_path)
    assert start is not None
    assert torch.equal(start["A"], first.weights["A"])
    assert_same(records.stored_kernels(run.key, tmp_path), run)
    for key in ("nothing", get_run(STACK[2], tmp_path).key):
        with pytest.raises(ConfigError, match=f"^`run` must be .*, got '?{key}"):
            records.stored_kernels(key, tmp_path)
    assert_same(records.stored_kernels(run.key, tmp_path, task="deblurring", filters=None), run)
    with pytest.raises(ConfigError, match=r"^`task` must be deblurring, as in run .*, got 'denoising'\.$"):
        records.stored_kernels(run.key, tmp_path, task="denoising")
    folder = tmp_path / "fig09"
    records.save_kernels(run, folder)
    (loaded,) = records.committed_kernels("deblurring", "bilevel", 2, "faces", folder=tmp_path)
    assert (loaded.key, loaded.config) == (run.key, run.config)
    assert torch.equal(loaded.weights["A"], run.weights["A"])
    with pytest.raises(ConfigError, match=r"must be one of deblurring bilevel 2, got denoising deq 8\.$"):
        records.committed_kernels("denoising", "deq", 8, "faces", folder=tmp_path)
    monkeypatch.setattr(
        records, "COMMITTED_KERNELS", {"own": ("own/kernels*.json", 2)} | records.COMMITTED_KERNELS
    )
    deq = replace(run, config=run.config.model_copy(update={"model": "deq", "initial": "random"}))
    for name, one in {"kernels_deq.json": deq, "kernels_bilevel.json": run}.items():
        records.save_kernels(one, tmp_path / "own", name)
    committed = records.committed_kernels("deblurring", folder=tmp_path)
    assert [own.config.model for own in committed] == ["bilevel", "deq"]
    (own,) = records.committed_kernels("deblurring", kernels="faces", filters=2, folder=tmp_path)
    assert own.key == run.key
    flip(folder / records.KERNELS)
    with pytest.raises(DamagedFile, match=f"^{folder / records.KERNELS}: "):
        records.load_kernels(folder / records.KERNELS)


def test_natural_kernels_match_file_of_noise_level() -> None:
    """Select the lowest trained level of at least 0.8 times the noise, else the highest."""
    files = [json.loads(path.read_bytes()) for path in records.REFERENCE.glob("bsd68/weakly-convex*.json")]
    for own in files:
        model, noise = "deq" if "C" in own else "bilevel", 1.9 * own["sigma"] / 255
        (run,) = records.committed_kernels("deblurring", model, kernels="natural", noise=noise)
        assert run.config.noise == pytest.approx(2 * own["sigma"] / 255)
        experts, A = run.model(shape=(16, 16)).regularizer, torch.tensor(own["A"])
        knots, slopes = experts.activation.shape()
        C = torch.tensor(own["C"]) if "C" in own else torch.tensor(own["p"])[:, None, None] * A
        pairs = {"A": A, "C": C, "knots": torch.tensor(own["knots"])}
        for name, value in (experts.weights() | {"knots": knots}).items():
            torch.testing.assert_close(value, pairs[name], rtol=1e-4, atol=1e-7)
        assert slopes.tolist() == pytest.approx([*own["slopes"], -1.0])
    highest = max(own["sigma"] for own in files)
    (run,) = records.committed_kernels("denoising", "bilevel", noise=2.0)
    assert run.config.noise == pytest.approx(2 * highest / 255)


def test_committed_runs_are_loaded_without_training(
    tmp_path: Path, stored: tuple[Path, list[Run]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense weights are rounded. Runs of any method version load, but none replaces a training."""
    whole, alone, missing = stored[1][0], stored[1][1], STACK[4]
    folder = tmp_path / "reference" / "overnight" / "runs"
    keep_run = runpy.run_path(str(REPOSITORY / ".ci" / "keep.py"))["keep_run"]
    keep_run(folder / f"{whole.key}.zip", stored[0])
    keep_run(folder / f"{alone.key}.json", stored[0])
    monkeypatch.setattr(runs, "REFERENCE", tmp_path / "reference")
    monkeypatch.setattr(records, "METHOD_VERSION", METHOD_VERSION + 1)
    (run,) = get_runs([whole.config], tmp_path, train=False)
    assert (run.key, run.provenance) == (whole.key, whole.provenance)
    for name, weight in whole.weights.items():
        step = weight.std() / 32 if weight.ndim == 2 else 0
        assert ((run.weights[name] - weight).abs() <= step / 2 + 2**-10 * weight.abs() + 2**-25).all()
    asked = [missing, alone.config, whole.config]
    assert [r and r.key for r in find_runs(asked, tmp_path)] == [None, None, whole.key]
    assert [r and r.key for r in find_runs(asked, tmp_path, weights=False)] == [None, alone.key, whole.key]
    with pytest.raises(ConfigError, match=r"^`train` must be True to train bilevel denoising of 4 "):
        get_run(missing, tmp_path, train=False)
    monkeypatch.setattr(runs, "make_training", None)
    with pytest.raises(TypeError):
        get_run(whole.config, tmp_path)
    flip(folder / f"{whole.key}.zip")
    with pytest.raises(DamagedFile, match=f"^{folder / whole.key}.zip: "):
        find_runs(asked, tmp_path)


def test_files_match_provenance(tmp_path: Path) -> None:
    write_with_provenance(tmp_path, {"a.csv": b"1"}, {"note": "x"}, device="cpu")
    provenance = json.loads((tmp_path / PROVENANCE).read_bytes())
    assert (provenance["note"], provenance["method"]) == ("x", METHOD_VERSION)
    assert read_described(tmp_path / "a.csv", provenance) == b"1"
    (tmp_path / "a.csv").write_bytes(b"2")
    with pytest.raises(DamagedFile, match=f"^{tmp_path / 'a.csv'}: "):
        read_described(tmp_path / "a.csv", provenance)
