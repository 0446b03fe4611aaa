"""Runs: trained once, stored under a key of all that can change their result, loaded ever after."""

from __future__ import annotations

import hashlib
import io
import json
import math
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from threading import RLock
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import pandas as pd
import psutil
import torch
from filelock import FileLock, Timeout
from IPython.display import clear_output
from torch import Tensor
from tqdm import tqdm

from lib.experiments.build import (
    Config,
    Weights,
    image_shape,
    load_images,
    make_operator,
    make_training,
    require_device,
    shared,
    total_steps,
    trained_model,
)
from lib.experiments.config import ConfigError, FacesConfig, RunConfig, shown
from lib.experiments.data import FACES_FILES, MNIST_FILES, photograph_files
from lib.experiments.method import METHOD_VERSION
from lib.experiments.processes import at_the_end, cores, in_processes
from lib.experiments.store import (
    RESULTS,
    DamagedFile,
    Results,
    read_sealed,
    remove,
    set_aside,
    write_atomic,
    write_sealed,
)
from lib.models import FixedPointModel
from lib.training import DIVERGED, OUT_OF_TIME, TEST_BATCH, History, Training

DATA_DIGESTS = {"mnist": MNIST_FILES, "faces": FACES_FILES}

STACK_NUMBERS = {"cpu": 2**16, "cuda": 2**24}
"""Numbers in the iterate of a whole stack at most. On a CPU a larger one leaves the cache, and its members
wait for each other: with 100 images of 28x28 a stack of 64 is up to twice slower than its members alone
(`results/bench/`). An accelerator needs millions of numbers to be busy.
"""

SOLVER_BUFFERS, EXPERT_BUFFERS = 12, 4
"""Tensors of a batch's size, and per expert, that a solve and a recorded step hold beside the history."""

KEPT_BITS = 8
"""Significant bits of digits' weights in a committed run, which change its test loss by some 0.02 %."""

POLL_SECONDS = 2.0
"""Between two looks at the runs that another process is training."""

CHECKPOINT_SECONDS = 60.0
"""From one checkpoint of a stack to the next at least: what a training that is killed loses, where its epochs
are shorter. One that is stopped loses nothing but the epoch that it is in."""


def run_key(config: Config) -> str:
    """Return the key of a run: a digest of its configuration, its data and the version of the method."""
    identity = {"config": config.model_dump(), "data": data_digests(config), "method": METHOD_VERSION}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def data_digests(config: Config) -> dict[str, str]:
    """Digests of the files that a configuration's images, and those of the run it starts from, come from."""
    if not isinstance(config, FacesConfig):
        return DATA_DIGESTS[config.dataset]
    if config.dataset == "faces":
        digests = DATA_DIGESTS["faces"]
    else:
        files = photograph_files(config.dataset, config.train_images, config.test_images)
        digests = {path.name: f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files}
    if isinstance(config.initial, FacesConfig):
        earlier = data_digests(config.initial)
        digests = digests | {f"initial/{name}": digest for name, digest in earlier.items()}
    return digests


def environment(device: torch.device | str) -> dict[str, Any]:
    """Versions and machine that a result was made with."""
    packages = ("torch", "torchvision", "numpy", "pandas", "matplotlib")
    device = torch.device(device)
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "accelerator": accelerator,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@dataclass(frozen=True)
class Run:
    """A stored training run.

    Attributes:
        key: its key in the store.
        config: its configuration.
        status: `completed`, `diverged` or `out of time`.
        reason: why it did not complete.
        history: a row per epoch, epoch 0 being the untrained model; columns `epoch`, `seconds`,
            `train_loss`, `test_loss`, `test_psnr` (dB) and, for the solves `forward`, `backward`
            (training) and `test`, the means of `_steps` and `_residual` and the share `_unconverged`; a
            Neumann series has no such share.
        weights: `A`, `b` unless they are kernels and, for a DEQ, `C`.
        provenance: data digests, version of the method, environment and seconds.
    """

    key: str
    config: Config
    status: str
    reason: str
    history: pd.DataFrame
    weights: Weights
    provenance: dict[str, Any]

    def model(self, stacked: bool = False, shape: tuple[int, int] | None = None) -> FixedPointModel:
        """The trained model; `stacked` gives it the leading dimension that it was trained with.

        Convolutional models take images of another `shape` too.
        """
        return trained_model(self.config, self.weights, stacked, shape)


REFERENCE, KERNELS = RESULTS / "reference", "kernels.json"
"""The figures that are committed, and the file of trained kernels in the folders of some of them."""

COMMITTED = {"quick": "reference", "overnight": "reference/overnight"}
"""Profiles whose figures are committed, and where among the results."""


def save_kernels(run: Run, folder: Path, name: str = KERNELS) -> None:
    """Write the kernels of a run as a small text file with their configuration and provenance.

    Args:
        run: whose kernels.
        folder: of the figure.
        name: of the file, which `trained_kernels` looks for as `kernels*.json`.
    """
    record = {
        "config": run.config.model_dump(),
        "status": run.status,
        "reason": run.reason,
        "weights": {name: weight.tolist() for name, weight in run.weights.items()},
        "provenance": run.provenance | {"run": run.key},
    }
    _write_record(folder / name, "kernels", record)


def load_kernels(path: Path) -> Run:
    """A run from its kernels alone, without a history.

    Raises:
        DamagedFile: the file is not what `save_kernels` wrote.
    """
    try:
        record = _read_record(path, "kernels")
        return Run(
            key=record["provenance"]["run"],
            config=FacesConfig(**record["config"]),
            status=record["status"],
            reason=record["reason"],
            history=pd.DataFrame(),
            weights={name: torch.tensor(weight) for name, weight in record["weights"].items()},
            provenance=record["provenance"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{path}: {error}") from None


def trained_kernels(task: str, model: str, filters: int, folder: Path = REFERENCE) -> Run:
    """The committed run of a task and a model with as many kernels.

    Raises:
        ConfigError: there is none.
    """
    found = [load_kernels(path) for path in sorted(folder.glob("fig*/kernels*.json"))]
    for run in found:
        if (run.config.task, run.config.model, getattr(run.config, "filters", 0)) == (task, model, filters):
            return run
    known = ", ".join(f"{run.config.task} {run.config.model} {len(run.weights['A'])}" for run in found)
    raise ConfigError(f"task, model, filters: got {task} {model} {filters}, allowed: {known}")


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def workers(device: torch.device) -> int:
    """Training processes at a time: one per core, or one that has the accelerator to itself."""
    return cores() if device.type == "cpu" else 1


def member_bytes(config: Config, device: torch.device) -> int:
    """Memory that a configuration takes in a stack.

    A member needs its weights, their gradient and Adam's two moments, and per image of a batch the
    solver's history and the iterates of a step.
    """
    height, width = image_shape(config)
    n = height * width
    experts = config.filters if isinstance(config, FacesConfig) else 1
    buffers = 2 * config.memory + SOLVER_BUFFERS + EXPERT_BUFFERS * experts
    images = max(config.batch_size, min(TEST_BATCH, config.test_images)) * n * buffers
    return 4 * 4 * weight_count(config) + 4 * images


def weight_count(config: Config) -> int:
    """Numbers that a configuration learns; of kernels they do not count."""
    if isinstance(config, FacesConfig):
        return 0
    n = config.size**2
    return n * n * (2 if config.model == "deq" else 1) + n


def stack_size(config: Config, device: torch.device) -> int:
    """How many configurations like this one to train together, at most.

    Half of the device's free memory is filled, as far as `STACK_NUMBERS` allows. L-BFGS trains one at a time.
    """
    if isinstance(config, FacesConfig) and config.optimizer == "lbfgs":
        return 1
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // workers(device)
    height, width = image_shape(config)
    largest = STACK_NUMBERS[device.type] // (config.batch_size * height * width)
    return max(1, min(largest, free // 2 // member_bytes(config, device)))


def stacks(configs: Iterable[Config], device: torch.device) -> list[list[Config]]:
    """Configurations in groups that train together, as large as the device allows.

    Members with like steps stay together, since they need about as many solver steps as each other.
    The groups take turns, so that a sweep's first minutes are a sample of all of it.
    """
    groups: dict[Config, list[Config]] = {}
    for config in configs:
        groups.setdefault(shared(config), []).append(config)
    chunks = []
    for group in groups.values():
        group.sort(key=lambda c: (c.tau, c.gamma, c.noise))
        count = math.ceil(len(group) / stack_size(group[0], device))
        chunks.append([group[k * len(group) // count : (k + 1) * len(group) // count] for k in range(count)])
    return [stack for turn in zip_longest(*chunks) for stack in turn if stack]


def get_runs(configs: Sequence[Config], results: Results = None, train: bool = True) -> list[Run]:
    """The runs of some configurations, in their order, trained if they are not stored (see `train_runs`).

    Args:
        train: False takes what is not stored from the committed runs, and trains nothing.

    Raises:
        ConfigError: nothing is to be trained, and a run is neither stored nor committed.
        DataError: the data cannot be had.
    """
    if train:
        train_runs(configs, results)
        return [get_run(config, results) for config in configs]
    return [_found(*pair) for pair in zip(configs, find_runs(configs, results), strict=True)]


def get_run(config: Config, results: Results = None, train: bool = True) -> Run:
    """The run of a configuration: loaded if it is stored, else trained, resuming where it was killed.

    Two processes that ask for the same run do the work once: the second one waits and loads. One that
    diverged or ran out of time is a run with that status and its reason.

    Raises:
        ConfigError: it is not to be trained, and is neither stored nor committed.
        DataError: the data cannot be had.
    """
    if not train:
        return _found(config, *find_runs([config], results))
    folder = run_folder(config, results)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        run = load_run(folder, config)
        if run is None:
            _train([config], results, lambda progress: None)
            run = load_run(folder, config)
        if run is None:
            raise DamagedFile(f"{folder}: the run that was just written cannot be read; check the disk")
        return run


def _found(config: Config, run: Run | None) -> Run:
    if run is None:
        what = f"{config.model} {config.task} of {config.epochs} epochs, seed {config.seed}"
        raise ConfigError(f"train: got False, allowed: True, for {what} is neither stored nor committed")
    return run


def find_runs(configs: Sequence[Config], results: Results = None) -> list[Run | None]:
    """The runs of some configurations that are stored, or else committed; nothing is trained.

    A committed run may be of another version of the method, which its provenance names. A run that is neither
    stored nor committed is None.
    """
    found = {config: load_run(run_folder(config, results), config) for config in configs}
    for path in sorted(REFERENCE.glob("*/runs/*.zip")):
        missing = [config for config, run in found.items() if run is None]
        if not missing:
            break
        if run := _kept_run(path, missing):
            found[run.config] = run
    return [found[config] for config in configs]


def find_histories(configs: Sequence[Config], results: Results = None) -> list[Run | None]:
    """As `find_runs`, for what needs no weights: a run that is committed without them has none."""
    kept = {run.config: run for run in map(_kept_history, sorted(REFERENCE.glob("*/runs/*.json")))}
    found = zip(configs, find_runs(configs, results), strict=True)
    return [run or kept.get(config) for config, run in found]


def _kept_history(path: Path) -> Run:
    """The run in a file of `keep_history`, without weights."""
    try:
        record = _read_record(path, "run")
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFile(f"{path}: {error}") from None
    return _run_of(path.stem, _config(record), record, {})


def _kept_run(path: Path, configs: Collection[Config]) -> Run | None:
    """The run in a file of `keep_run` if it is that of one of the configurations."""
    with ZipFile(io.BytesIO(read_sealed(path))) as archive, tempfile.TemporaryDirectory() as place:
        folder = Path(place) / path.stem
        record = _read_record(Path(archive.extract("run.json", folder)), "run")
        config = _config(record)
        if config not in configs:
            return None
        archive.extract("weights.pt", folder)
        return _run(folder, config, record)


def keep_run(key: str, folder: Path, results: Results = None) -> None:
    """Write a stored run as it is committed: as one small file, digits' weights to `KEPT_BITS`.

    Args:
        key: of the run.
        folder: of the committed runs.
        results: where it is stored.

    Raises:
        OSError: it is not stored.
        DamagedFile: it cannot be used.
    """
    stored = Path(results or RESULTS) / "runs" / key
    record = _read_record(stored / "run.json", "run")
    run = _run(stored, _config(record), record)
    dense = isinstance(run.config, RunConfig)
    weights = {name: _rounded(weight).half() if dense else weight for name, weight in run.weights.items()}
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as place, ZipFile(packed, "w") as archive:
        _write_run(Path(place), record, weights)
        for path in sorted(Path(place).iterdir()):
            # Without the time, so that it is the same file whenever it is made.
            archive.writestr(ZipInfo(path.name), path.read_bytes(), ZIP_DEFLATED)
    write_sealed(folder / f"{key}.zip", packed.getvalue())


def keep_history(key: str, folder: Path, results: Results = None) -> None:
    """As `keep_run`, where nothing needs the weights of the run: its record alone, as `key.json`."""
    record = _read_record(Path(results or RESULTS) / "runs" / key / "run.json", "run")
    _write_record(folder / f"{key}.json", "run", record)


def _rounded(weight: Tensor) -> Tensor:
    """A weight to `KEPT_BITS` significant bits: half precision has more, which do not compress."""
    mantissa, exponent = torch.frexp(weight)
    return torch.ldexp((mantissa * 2**KEPT_BITS).round() / 2**KEPT_BITS, exponent)


def _config(record: dict[str, Any]) -> Config:
    """The configuration of a record; what it does not have yet has its default."""
    kind = RunConfig if record["config"]["dataset"] == "mnist" else FacesConfig
    return kind(**record["config"])


def learned_start(config: Config, results: Results = None, train: bool = True) -> Weights | None:
    """The kernels that a run starts from, where those of another run are its initial ones."""
    initial = getattr(config, "initial", None)
    return get_run(initial, results, train).weights if isinstance(initial, FacesConfig) else None


@dataclass(frozen=True)
class Progress:
    """What a training process reports.

    Attributes:
        steps: optimizer steps, of each member, that need not be taken any more.
        resumed: of these, how many an earlier process took.
        ended: statuses of the runs that have ended.
    """

    steps: int = 0
    resumed: int = 0
    ended: tuple[str, ...] = ()


Report = Callable[[Progress], object]


def train_runs(configs: Sequence[Config], results: Results = None) -> None:
    """Train all configurations that are not stored yet, in stacks, with one process per core.

    Runs that another process is training are left to it, and waited for. When one training fails or this
    process is interrupted, all are stopped; what they trained until their last epoch is resumed next time, or
    up to a minute less where they were killed.

    Raises:
        DataError: the data cannot be had.
        RuntimeError: a training failed; the message says how.
    """
    ended = Counter(record["status"] for config in configs if (record := read_record(config, results)))
    for config in configs:
        leftover = run_folder(config, results) / "checkpoint.pt"
        # Its process was killed when it had stored the run.
        if leftover.exists() and is_stored(config, results):
            remove(leftover)
    waiting = [config for config in configs if not is_stored(config, results)]
    if not waiting:
        return
    train_runs(
        [c.initial for c in waiting if isinstance(c, FacesConfig) and isinstance(c.initial, FacesConfig)],
        results,
    )
    # Here, where data that are missing, or at odds with the configuration, are reported once.
    for config in {config.dataset: config for config in waiting}.values():
        load_images(config)
    for config in waiting:
        require_device(config, default_device())
        if isinstance(config, FacesConfig):
            make_operator(config)
    # The bar goes to the terminal or, in a notebook, into an output that is cleared in the end.
    interval = 0.2 if sys.stderr.isatty() else 5.0
    names = {f"{config.model} {config.task}" for config in waiting}
    what = " and ".join(sorted(names)) if len(names) <= 2 else "sweep"
    steps = sum(total_steps(config) for config in waiting)
    with tqdm(desc=what, total=steps, mininterval=interval, smoothing=0, leave=False) as bar:

        def report(progress: Progress) -> None:
            nonlocal steps
            ended.update(progress.ended)
            bar.total = steps = steps - progress.resumed
            bar.set_postfix_str(
                f"runs {ended.total()}/{len(configs)}, diverged {ended[DIVERGED]}, "
                f"out of time {ended[OUT_OF_TIME]}",
                refresh=False,
            )
            bar.update(progress.steps - progress.resumed)

        while waiting:
            before = len(waiting)
            _train_in_processes(stacks(waiting, default_device()), results, report)
            waiting = [config for config in waiting if not is_stored(config, results)]
            if len(waiting) == before:
                bar.set_postfix_str(f"{before} runs are being trained by another process")
                while all(is_locked(config, results) for config in waiting):
                    time.sleep(POLL_SECONDS)
    if "ipykernel" in sys.modules:
        clear_output()


def _train_in_processes(todo: Sequence[list[Config]], results: Results, report: Report) -> None:
    """Train stacks in as many processes as the device takes, each with the next stack when it is free."""

    def hear(told: Progress | str) -> None:
        if isinstance(told, str):
            raise RuntimeError(told)
        report(told)

    jobs = [partial(_work, stack, results or RESULTS) for stack in todo]
    in_processes(jobs, workers(default_device()), hear)


def _work(stack: list[Config], results: Path | str, tell: Callable[[Progress | str], object]) -> None:
    """What a training process does with a stack; that it failed, and why, is told as a text."""
    try:
        train_stack(stack, results, tell)
    except Exception as error:
        said = " ".join(str(error).split())
        tell(f"{stack[0].model} {stack[0].task}: {type(error).__name__}: {said}")


def is_locked(config: Config, results: Results) -> bool:
    """Whether another process is training a run."""
    try:
        with FileLock(run_folder(config, results) / "lock", timeout=0):
            return False
    except Timeout:
        return True


def train_stack(configs: Sequence[Config], results: Results, report: Report) -> None:
    """Train and store those configurations of a stack that no other process has stored or is training."""
    with ExitStack() as locks:
        mine = []
        for config in configs:
            folder = run_folder(config, results)
            folder.mkdir(parents=True, exist_ok=True)
            try:
                locks.enter_context(FileLock(folder / "lock", timeout=0))
            except Timeout:
                continue
            if not is_stored(config, results):
                mine.append(config)
        _train(mine, results, report)


def _train(configs: Sequence[Config], results: Results, report: Report) -> None:
    """Train configurations of one stack, whose locks are held: those of one epoch together."""
    by_epoch: dict[int, list[tuple[Config, dict[str, Any] | None]]] = {}
    for config in configs:
        epoch, checkpoint = _read_checkpoint(config, results)
        by_epoch.setdefault(epoch, []).append((config, checkpoint))
    for epoch, pairs in sorted(by_epoch.items()):
        checkpoints = [checkpoint for _, checkpoint in pairs if checkpoint is not None]
        _train_together([config for config, _ in pairs], checkpoints if epoch else None, results, report)


def _read_checkpoint(config: Config, results: Results) -> tuple[int, dict[str, Any] | None]:
    """The checkpoint of a run and its epoch, or epoch 0 and None where there is none that can be used."""
    path = run_folder(config, results) / "checkpoint.pt"
    if not path.exists():
        return 0, None
    try:
        checkpoint = read_sealed(path)
    except DamagedFile as error:
        set_aside(path, str(error))
        return 0, None
    state = torch.load(io.BytesIO(checkpoint), map_location="cpu", weights_only=True)
    return state["epoch"], state


def _train_together(
    configs: Sequence[Config], checkpoints: Sequence[dict[str, Any]] | None, results: Results, report: Report
) -> None:
    training = make_training(configs, default_device(), learned_start(configs[0], results))
    if checkpoints is not None:
        training.restore(checkpoints)
    stored: set[int] = set()
    reported = training.step * len(configs)
    report(Progress(steps=reported, resumed=reported))

    def tell(ended: Iterable[str] = ()) -> None:
        nonlocal reported
        done = sum(training.steps if member.status else training.step for member in training.members)
        report(Progress(steps=done - reported, ended=tuple(ended)))
        reported = done

    # The last epoch's checkpoints, by member, until they are written.
    waiting: dict[int, bytes] = {}
    writing, written = RLock(), -math.inf

    def write() -> None:
        nonlocal written
        with writing:
            for index in list(waiting):
                write_sealed(run_folder(configs[index], results) / "checkpoint.pt", waiting[index])
                del waiting[index]
            written = time.monotonic()

    def keep(training: Training) -> None:
        with writing:
            store(training)

    def store(training: Training) -> None:
        ended = [i for i, member in enumerate(training.members) if member.status and i not in stored]
        for index in ended:
            _store(configs[index], training.members[index], results)
            stored.add(index)
            waiting.pop(index, None)
        if training.epoch < training.epochs:
            waiting.update({index: _packed(training.checkpoint(index)) for index in training.alive})
            if time.monotonic() - written >= CHECKPOINT_SECONDS:
                write()
        tell(training.members[index].status for index in ended)

    with at_the_end(write):
        training.run(on_epoch=keep, on_step=tell)
        keep(training)


def _packed(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def run_folder(config: Config, results: Results = None) -> Path:
    """The folder of a run in the store."""
    return Path(results or RESULTS) / "runs" / run_key(config)


def is_stored(config: Config, results: Results = None) -> bool:
    return (run_folder(config, results) / "run.json").exists()


def read_record(config: Config, results: Results = None) -> dict[str, Any] | None:
    """What is stored of a run beside its weights, or None; a record that cannot be used is set aside."""
    path = run_folder(config, results) / "run.json"
    try:
        record = _read_record(path, "run")
        if _config(record) != config:
            raise DamagedFile(f"{path}: it belongs to another configuration")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, DamagedFile) as error:
        set_aside(path, str(error))
        return None
    return record


def stored_kernels(key: str, results: Results = None) -> Run:
    """The run on photographs of a key in the store, whatever version of the method it was trained by.

    Raises:
        ConfigError: there is none, or it is one on digits, whose weights fit no other images.
        DamagedFile: it cannot be used.
    """
    store = Path(results or RESULTS) / "runs"
    if key not in {path.parent.name for path in store.glob("*/run.json")}:
        raise ConfigError(f"run: got {shown(key)}, allowed: the key of a run in {store}")
    path = store / key / "run.json"
    try:
        record = _read_record(path, "run")
        if isinstance(config := _config(record), FacesConfig):
            return _run(store / key, config, record)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DamagedFile(f"{path}: {error}") from None
    raise ConfigError(
        f"run: got {key}, of digits, allowed: a run on photographs, whose kernels fit any image"
    )


def load_run(folder: Path, config: Config) -> Run | None:
    """The run that is stored in its folder, or None; what cannot be used is set aside."""
    record = read_record(config, folder.parents[1])
    if record is None:
        return None
    try:
        return _run(folder, config, record)
    except (OSError, KeyError, DamagedFile) as error:
        set_aside(folder / "run.json", f"its weights cannot be used ({error})")
        return None


def _run(folder: Path, config: Config, record: dict[str, Any]) -> Run:
    """A run from its record and the weights beside it."""
    content = read_sealed(folder / "weights.pt")
    if record["weights"] != hashlib.sha256(content).hexdigest():
        raise DamagedFile(f"{folder / 'weights.pt'}: it belongs to another run")
    weights = torch.load(io.BytesIO(content), weights_only=True)
    return _run_of(folder.name, config, record, {name: weight.float() for name, weight in weights.items()})


def _run_of(key: str, config: Config, record: dict[str, Any], weights: Weights) -> Run:
    return Run(
        key=key,
        config=config,
        status=record["status"],
        reason=record["reason"],
        history=pd.DataFrame(record["history"]),
        weights=weights,
        provenance=record["provenance"],
    )


def _store(config: Config, member: History, results: Results) -> None:
    """Write a run that has ended; its record comes last, and then its checkpoint is not needed any more."""
    folder = run_folder(config, results)
    record = {
        "config": config.model_dump(),
        "status": member.status,
        "reason": member.reason,
        "history": [
            {name: value if math.isfinite(value) else None for name, value in row.items()}
            for row in member.rows
        ],
        "provenance": {
            "data": data_digests(config),
            "method": METHOD_VERSION,
            "environment": environment(default_device()),
            "seconds": member.seconds,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    }
    _write_run(folder, record, member.weights)
    remove(folder / "checkpoint.pt")


def _write_run(folder: Path, record: dict[str, Any], weights: Weights) -> None:
    """Write a run, its record last: with it the run is there."""
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    write_sealed(folder / "weights.pt", buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    _write_record(folder / "run.json", "run", record | {"weights": digest})


def _write_record(path: Path, name: str, record: dict[str, Any]) -> None:
    write_atomic(path, json.dumps({"sha256": _digest(record), name: record}, indent=1).encode())


def _read_record(path: Path, name: str) -> dict[str, Any]:
    stored = json.loads(path.read_bytes())
    record: dict[str, Any] = stored[name]
    if stored["sha256"] != _digest(record):
        raise DamagedFile(f"{path}: its content does not match its checksum")
    return record


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
