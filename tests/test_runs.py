"""Runs: trained once, keyed by all that matters, made again when damaged, and unharmed by kill -9."""

from __future__ import annotations

import ast
import json
import math
import multiprocessing
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from lib import data, runs, training
from lib.config import RunConfig
from lib.runs import Run, code_version, get_run, get_runs, run_key
from lib.store import REPOSITORY
from lib.training import Member, Trainer

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
LONG = RunConfig(**SMALL | {"size": 14, "train_images": 600, "epochs": 10, "sigma": "softshrink"})
"""Takes seconds, so that it can be killed on its way."""

REQUEST = """
from lib.config import RunConfig
from lib.runs import get_run
"""

TELL_IMPORTS = """
import json, os, sys
from lib import runs
from lib.config import RunConfig

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
    "tol": 1e-4,
    "max_steps": 51,
    "memory": 4,
    "regularization": 1e-5,
    "beta": 0.9,
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
    code_version.cache_clear()
    yield tmp_path / "lib"
    code_version.cache_clear()


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
    assert run.provenance["environment"]["packages"]["torch"] == torch.__version__
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
        n = training.test_noise(config)
        f = training.observe(training.make_operator(config), images, torch.tensor(noise), n)
        mse = (training.solve(model, f, config).value - images).square().mean((-3, -2, -1))
        assert mse.mean().item() == pytest.approx(last["test_loss"], rel=1e-5)
        assert training.psnr(mse).mean().item() == pytest.approx(last["test_psnr"], rel=1e-5)
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
    code_version.cache_clear()
    assert code_version() != version
    assert run_key(CONFIG) != key
    path.write_text(source)
    code_version.cache_clear()
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
    code_version.cache_clear()
    assert code_version() == version


@pytest.mark.parametrize("module", runs.RESULT_MODULES)
def test_each_module_counts(sources: Path, module: str) -> None:
    """A new statement in any module that can change a result is another version."""
    version = code_version()
    with (sources / f"{module}.py").open("a") as file:
        file.write("\nNEW = 1\n")
    code_version.cache_clear()
    assert code_version() != version


def test_no_module_that_training_uses_is_forgotten() -> None:
    """All that `lib.training` imports counts, but the configuration, which is in the key, and the store."""
    found, waiting = set[str](), ["training"]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        for node in ast.walk(ast.parse((REPOSITORY / "lib" / f"{module}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "lib":
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lib."):
                waiting.append(node.module.removeprefix("lib."))
    assert found - {"config", "store"} == set(runs.RESULT_MODULES)


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
    tmp_path: Path,
    stored: tuple[Path, Run],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An interrupted run whose checkpoint was cut is trained from the start, with the same bits."""

    class Interrupted(Trainer):
        def checkpoint(self) -> bytes:
            if self.epoch == 2:
                raise KeyboardInterrupt
            return super().checkpoint()

    with monkeypatch.context() as patch:
        patch.setattr(runs, "Trainer", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            get_run(CONFIG, tmp_path)
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


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After kill -9 in mid training, the next request goes on and gives what an undisturbed run gives."""
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    folder = folder_of(LONG, killed)
    request = f"{REQUEST}get_run(RunConfig(**{LONG.model_dump()}), {str(killed)!r})"
    with subprocess.Popen([sys.executable, "-c", request], cwd=REPOSITORY, stderr=subprocess.PIPE) as process:
        while not (folder / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.Random(1).uniform(0, 0.5))
        process.kill()
    assert process.returncode == -9
    assert not (folder / "run.json").exists()

    started = list[int]()

    class Watched(Trainer):
        def train(self, *args: Any, **kwargs: Any) -> list[Member]:
            started.append(self.epoch)
            return super().train(*args, **kwargs)

    monkeypatch.setattr(runs, "Trainer", Watched)
    resumed, reference = get_run(LONG, killed), get_run(LONG, undisturbed)
    assert_same_bits(resumed, reference)
    assert resumed.status == "completed"
    assert 0 < started[0] < LONG.epochs
    assert started[1:] == [0]
    assert not (folder / "checkpoint.pt").exists()


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


def test_runs_trained_at_the_same_time_are_those_trained_alone(
    results: Path, stored: tuple[Path, Run]
) -> None:
    """Several requests come back in their order, equal to single ones, and are loaded the next time."""
    configs = [CONFIG.model_copy(update={"seed": 1}), CONFIG, CONFIG.model_copy(update={"model": "bilevel"})]
    found = get_runs(configs, results)
    assert [run.config for run in found] == configs
    assert found[1].provenance == stored[1].provenance
    assert_same_bits(found[1], stored[1])
    alone = get_run(configs[2], results.with_name("alone"))
    assert_same_bits(found[2], alone)
    assert [run.provenance for run in get_runs(configs, results)] == [run.provenance for run in found]
    assert multiprocessing.active_children() == []


def test_a_failed_training_is_reported_in_one_line_and_stops_the_others(tmp_path: Path) -> None:
    """The line says which training failed and why; the one beside it is stopped, not waited for."""
    in_the_way = folder_of(CONFIG, tmp_path)
    in_the_way.parent.mkdir()
    in_the_way.write_text("a file where the run's folder should be")
    with pytest.raises(
        RuntimeError, match=r"^deq denoising: FileExistsError: .*" + run_key(CONFIG)
    ) as caught:
        get_runs([LONG, CONFIG], tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert multiprocessing.active_children() == []
    assert not (folder_of(LONG, tmp_path) / "run.json").exists()
