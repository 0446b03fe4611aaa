"""Runs on disk: folders in the store, and smaller files of committed runs.

Changed files raise `DamagedFile`; in the store they are set aside.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from zipfile import ZipFile

import pandas as pd
import torch

from lib.experiments.build import SPLINE_STEP, Config, Weights, trained_model
from lib.experiments.config import MODELS, ConfigError, FacesConfig, RunConfig, require_name, shown
from lib.experiments.data import FACES_FILES, MNIST_FILES, notice, photograph_files
from lib.experiments.method import METHOD_VERSION
from lib.experiments.provenance import environment
from lib.experiments.store import RESULTS, DamagedFile, Results, sealed, unsealed, write_atomic
from lib.models import FixedPointModel
from lib.training import COMPLETED, DIVERGED, History

DATA_DIGESTS = {"mnist": MNIST_FILES, "faces": FACES_FILES}

REFERENCE, KERNELS = RESULTS / "reference", "kernels.json"
"""Folder of committed figures, and name of files of trained kernels in it."""

COMMITTED_KERNELS = {"natural": ("bsd68/weakly-convex*.json", None), "faces": ("fig*/kernels*.json", 8)}
"""Files of committed kernels, and how many kernels the pages take, None for all, by training images.
The first entry is the pages' default."""

NATURAL_NOISE = {"denoising": 2 * 25 / 255, "deblurring": 0.01}
"""Tasks for which the pages take kernels of natural images, and their default noise."""

COMMITTED = {"quick": "reference", "overnight": "reference/overnight"}
"""Folders of committed figures in the results, by profile."""

Record = TypeVar("Record")


@dataclass(frozen=True)
class Run:
    """A stored training run.

    Attributes:
        key: its key in the store.
        config: its configuration.
        status: `completed`, `diverged` or `out of time`.
        reason: why it did not complete.
        history: a row per epoch (see `lib.training.History`).
        weights: `A`, `b` of dense weights, `C` of a DEQ, and a learned `lam`.
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
        """Return the trained model (see `lib.experiments.build.trained_model`)."""
        return trained_model(self.config, self.weights, stacked, shape)


def run_key(config: Config) -> str:
    """Return the key of a run: a digest of its configuration, its data and the version of the method."""
    # A parameter newer than the first stored runs: its default keeps their keys.
    newer = {"initial"} if isinstance(config, RunConfig) and config.initial == "independent" else None
    values = config.model_dump(exclude=newer)
    identity = {"config": values, "data": data_digests(config), "method": METHOD_VERSION}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]


def data_digests(config: Config) -> dict[str, str]:
    """Return the digests of the image files of a configuration and of its initial run."""
    if config.dataset in DATA_DIGESTS:
        digests = DATA_DIGESTS[config.dataset]
    else:
        files = photograph_files(config.dataset, config.train_images, config.test_images)
        digests = {path.name: file_digest(path) for path in files}
    if not isinstance(config.initial, str):
        earlier = data_digests(config.initial)
        digests = digests | {f"initial/{name}": digest for name, digest in earlier.items()}
    return digests


def run_folder(config: Config, results: Results = None) -> Path:
    """Return the folder of a run in the store."""
    return _store(results) / run_key(config)


def is_stored(config: Config, results: Results = None) -> bool:
    """Return whether an ended run is in the store."""
    return (run_folder(config, results) / "run.json").exists()


def read_record(config: Config, results: Results = None) -> dict[str, Any] | None:
    """Return the stored record of a run, or None; a damaged record is set aside."""
    path = run_folder(config, results) / "run.json"

    def read() -> dict[str, Any]:
        record = read_json(path, "run")
        if record_config(record) != config:
            raise DamagedFile(f"{path}: it belongs to another configuration")
        return record

    return _usable(path, read)


def load_run(config: Config, results: Results = None) -> Run | None:
    """Return the stored run of a configuration, or None; a run with damaged weights is set aside."""
    record, folder = read_record(config, results), run_folder(config, results)
    if record is None:
        return None
    return _usable(folder / "run.json", lambda: _run(folder.name, record, read_weights(folder)))


def store_run(config: Config, member: History, results: Results = None) -> None:
    """Write an ended run, its record last, and remove its checkpoint."""
    folder = run_folder(config, results)
    record = {
        "config": config.model_dump(),
        "status": member.status,
        "reason": member.reason,
        "history": [{k: v if math.isfinite(v) else None for k, v in row.items()} for row in member.rows],
        "provenance": {
            "data": data_digests(config),
            "method": METHOD_VERSION,
            "environment": environment(),
            "seconds": member.seconds,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    }
    write_atomic(folder / "weights.pt", packed(member.weights))
    write_atomic(folder / "run.json", sealed_json("run", record))
    (folder / "checkpoint.pt").unlink(missing_ok=True)


def write_checkpoint(config: Config, state: dict[str, Any], results: Results = None) -> None:
    """Write the state to resume a run from."""
    write_atomic(run_folder(config, results) / "checkpoint.pt", packed(state))


def read_checkpoint(config: Config, results: Results = None) -> dict[str, Any] | None:
    """Return the state to resume a run from, or None; a damaged checkpoint is set aside."""
    path = run_folder(config, results) / "checkpoint.pt"
    return _usable(path, lambda: _unpacked(path.read_bytes(), path))


def stored_kernels(key: str, results: Results = None, **asked: object) -> Run:
    """Return the stored run on photographs with a key, of any version of the method.

    Args:
        asked: parameters that the run must have, unless None.

    Raises:
        ConfigError: there is no such run, or it diverged.
        DamagedFile: its files have changed.
    """
    store = _store(results)
    if key not in {path.parent.name for path in store.glob("*/run.json")}:
        raise ConfigError(f"`run` must be the key of a run in {store}, got {shown(key)}.")
    record = read_json(store / key / "run.json", "run")
    if not isinstance(record_config(record), FacesConfig):
        raise ConfigError(f"`run` must be the key of a run on photographs, got {key} on digits.")
    for name, value in asked.items():
        if value not in (None, has := record["config"][name]):
            raise ConfigError(f"`{name}` must be {has}, as in run {key}, got {shown(value)}.")
    if record["status"] == DIVERGED:
        raise ConfigError(f"`run` must not have diverged, got {key} ({record['reason']}).")
    if record["status"] != COMPLETED:
        notice(f"run {key} has not completed, but is {record['status']}: {record['reason']}")
    return _run(key, record, read_weights(store / key))


def trained_on(run: Run, files: Sequence[Path]) -> list[str]:
    """Return the names of the images that a run was trained on."""
    seen = list(run.provenance["data"].values())[: run.config.train_images]
    return [path.name for path in files if file_digest(path) in seen]


def file_digest(path: Path) -> str:
    """Return the digest of an image file, as in the provenance of a run."""
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def save_kernels(run: Run, folder: Path, name: str = KERNELS) -> None:
    """Write the kernels of a run with their provenance to the folder of a figure, as `kernels*.json`."""
    record = {
        "config": run.config.model_dump(),
        "status": run.status,
        "reason": run.reason,
        "weights": {name: weight.tolist() for name, weight in run.weights.items()},
        "provenance": run.provenance | {"run": run.key},
    }
    write_atomic(folder / name, sealed_json("kernels", record))


def load_kernels(path: Path) -> Run:
    """Return the run in a file of `save_kernels`, without a history."""
    record = read_json(path, "kernels")
    weights = {name: torch.tensor(weight) for name, weight in record["weights"].items()}
    return _run(record["provenance"]["run"], record | {"history": []}, weights)


def load_potential(path: Path, task: str) -> Run:
    """Return the training of kernels with a learned potential, from a file of `nbs/bsd68.ipynb`.

    Its noise is that of the training, which was denoising with weight 1; `task` is what it is used for.
    """
    kernels = json.loads(path.read_bytes())
    made = kernels["settings"]
    values = {name: made[name] for name in ("filters", "filter_size", "epochs", "learning_rate", "seed")}
    values |= {"model": "deq" if "C" in kernels else "bilevel", "noise": 2 * kernels["sigma"] / 255}
    values |= {"task": task, "tau": SPLINE_STEP, "gamma": kernels["gamma"], "train_images": made["pieces"]}
    values |= {"initial": "cosine", "schedule": "cosine", "final_learning_rate": made["learning_rate"] / 50}
    config = FacesConfig(dataset="Berkeley", lam=1.0, precondition=True, regularization=1e-6, **values)
    data, seconds = {"pieces": f"sha256:{made['pieces_sha256']}"}, kernels["validation"][-1]["seconds"]
    provenance = {"data": data, "environment": kernels["environment"], "seconds": seconds, "method": 1}
    record = kernels | {"config": config.model_dump(), "history": [], "provenance": provenance}
    names = kernels.keys() & {"A", "C", "p", "knots", "slopes"}
    return _run(file_digest(path)[7:27], record, {name: torch.tensor(kernels[name]) for name in names})


def committed_kernels(
    task: str,
    model: str | None = None,
    filters: int | None = None,
    kernels: str | None = None,
    noise: float | None = None,
    folder: Path = REFERENCE,
) -> list[Run]:
    """Return the committed runs of a task, one per model, DEQ last.

    Of natural images they are those of the lowest trained level that is at least 0.8 times `noise`, or of the
    highest: those of much less noise would need a weight with which the energy is far from convex.

    Args:
        model: model of the only run; None returns the runs of all models.
        filters, kernels: number of kernels, and a key of `COMMITTED_KERNELS`; None takes the default.
        noise: noise of the data, for kernels of natural images; None takes `NATURAL_NOISE`.

    Raises:
        ConfigError: there is no such run.
    """
    kernels = kernels or next(iter(COMMITTED_KERNELS))
    require_name("kernels", kernels, COMMITTED_KERNELS)
    pattern, usual = COMMITTED_KERNELS[kernels]
    level = NATURAL_NOISE.get(task, 0.0) if noise is None else noise
    files = sorted(folder.glob(pattern))
    if kernels == "natural":
        runs = [load_potential(path, name) for name in NATURAL_NOISE for path in files]
        runs.sort(key=lambda run: (run.config.noise < 0.8 * level, abs(run.config.noise - 0.8 * level)))
    else:
        runs = [load_kernels(path) for path in files]
    known = {f"{run.config.task} {run.config.model} {len(run.weights['A'])}": run for run in reversed(runs)}
    filters = filters or usual or len(runs[0].weights["A"])
    chosen = [f"{task} {name} {filters}" for name in ([model] if model else MODELS)]
    if not known.keys() & set(chosen):
        got, accepted = " or ".join(chosen), ", ".join(reversed(known))
        raise ConfigError(f"`task`, `model`, `filters` must be one of {accepted}, got {got}.")
    return [known[name] for name in chosen if name in known]


def load_kept_run(path: Path, configs: Collection[Config]) -> Run | None:
    """Return the run in a committed file (`.ci/keep.py`) if its configuration is one of `configs`."""
    if path.suffix == ".json":
        run = _run(path.stem, read_json(path, "run"), {})
        return run if run.config in configs else None
    with ZipFile(io.BytesIO(unsealed(path.read_bytes(), path))) as archive:
        record: dict[str, Any] = json.loads(archive.read("run.json"))["run"]
        if record_config(record) not in configs:
            return None
        return _run(path.stem, record, _unpacked(archive.read("weights.pt"), path))


def record_config(record: dict[str, Any]) -> Config:
    """Return the configuration of a record, with defaults for parameters that it lacks."""
    kind = RunConfig if record["config"]["dataset"] == "mnist" else FacesConfig
    return kind(**record["config"])


def _store(results: Results) -> Path:
    return Path(results or RESULTS) / "runs"


def _usable(path: Path, read: Callable[[], Record]) -> Record | None:
    """Return the result of `read`, or None without a file; set unusable files aside."""
    try:
        return read() if path.exists() else None
    except (OSError, ConfigError, DamagedFile) as error:
        aside = path.replace(path.with_name(f"{path.name}.damaged"))
        print(f"set aside {path} as {aside.name}: {error}", file=sys.stderr)
        return None


def _run(key: str, record: dict[str, Any], weights: Weights) -> Run:
    return Run(
        key=key,
        config=record_config(record),
        status=record["status"],
        reason=record["reason"],
        history=pd.DataFrame(record["history"]),
        weights={name: weight.float() for name, weight in weights.items()},
        provenance=record["provenance"],
    )


def packed(tensors: dict[str, Any]) -> bytes:
    """Return tensors as the content of a sealed file."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return sealed(buffer.getvalue())


def _unpacked(file: bytes, path: Path) -> dict[str, Any]:
    content = io.BytesIO(unsealed(file, path))
    tensors: dict[str, Any] = torch.load(content, map_location="cpu", weights_only=True)
    return tensors


def read_weights(folder: Path) -> Weights:
    """Return the weights in the folder of a stored run."""
    path = folder / "weights.pt"
    return _unpacked(path.read_bytes(), path)


def sealed_json(name: str, record: dict[str, Any]) -> bytes:
    """Return a record as the content of a JSON file with its checksum."""
    return json.dumps({"sha256": _digest(record), name: record}, indent=1).encode()


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Return the record in a file of `sealed_json`."""
    content = path.read_bytes()
    try:
        stored = json.loads(content)
        record: dict[str, Any] = stored[name]
        intact = stored["sha256"] == _digest(record)
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise DamagedFile(f"{path}: its content does not match its checksum")
    return record


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
