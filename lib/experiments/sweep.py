"""The grid of the paper: all its configurations trained, and what came out as two tidy tables."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from lib.experiments.build import Config, make_training, shared, total_steps
from lib.experiments.config import RunConfig, require_name
from lib.experiments.data import DataError
from lib.experiments.processes import default_device, workers
from lib.experiments.profiles import SWEEPS, grid
from lib.experiments.provenance import PROVENANCE, read_described, write_with_provenance
from lib.experiments.records import COMMITTED, DATA_DIGESTS, read_record, run_folder, run_key
from lib.experiments.runs import member_bytes, stacks, train_runs, weight_count
from lib.experiments.store import RESULTS, DamagedFile, Results
from lib.training import COMPLETED, DIVERGED, OUT_OF_TIME, History

NOT_RUN, IN_PROGRESS = "not run", "in progress"

TRIED_STEPS, TRIED_MEMBERS = 2, 8
"""Of each group of configurations, for how many optimizer steps how many at least are tried."""

ROW_BYTES = 500
"""Of an epoch in a record."""

TABLES = ("runs.parquet", "epochs.parquet")
"""A sweep's tables with the images of its runs, which need neither runs nor data: see `lib.pages.explore`."""


@dataclass(frozen=True)
class Sweep:
    """What is known of the runs of a grid.

    Attributes:
        profile: name of its profile.
        runs: a row per configuration: its `key` and parameters, `status` (`not run` where it was not
            trained), `reason`, `epochs_finished`, `seconds`, and the metrics of the last finished epoch
            (see `lib.training.History`).
        epochs: a row per run and epoch: `key` and metrics.
        provenance: axes, data digests, environments, counts and seconds.
    """

    profile: str
    runs: pd.DataFrame
    epochs: pd.DataFrame
    provenance: dict[str, Any]


def get_sweep(profile: str, /, results: Results = None, train: bool = True, **values: Any) -> Sweep:
    """The sweep of a profile, trained as far as it is not stored; its tables are written beside it.

    Args:
        profile: name of the profile.
        train: False takes what is stored or in the committed table, and marks the rest as not run.
        values: parameters and axes that replace the profile's (see `lib.experiments.profiles.grid`).

    Raises:
        ConfigError: a value is refused, before any work.
        DataError: nothing is to be trained, and no run is there.
    """
    configs = grid(profile, **values)
    if train:
        train_runs(configs, results)
    sweep = load_sweep(profile, configs, results, committed=not train)
    if (sweep.runs["status"] == NOT_RUN).all():
        command = f"make sweep PROFILE={profile}"
        raise DataError(f"no {profile} run is stored or committed; `{command}` trains them")
    write_tables(sweep, results)
    return sweep


def load_sweep(
    profile: str, configs: Sequence[RunConfig], results: Results = None, committed: bool = False
) -> Sweep:
    """The tables of some configurations, of what is stored.

    Args:
        committed: whether what is not stored is taken from the profile's committed table, if there is one.
    """
    rows, epochs, environments, methods = [], [], list[Any](), set[int]()
    known = _committed_records(profile) if committed else {}
    for config in configs:
        key = run_key(config)
        record = read_record(config, results)
        if record is None and config in known:
            key, record = known[config]
        row = {"key": key} | config.model_dump() | {"status": NOT_RUN, "reason": "", "epochs_finished": 0}
        if record is not None:
            row |= {"key": key, "status": record["status"], "reason": record["reason"]}
            origin = record["provenance"]
            row["seconds"] = origin["seconds"]
            made_on = origin["environments"] if "environments" in origin else [origin["environment"]]
            environments += [machine for machine in made_on if machine not in environments]
            methods.add(origin["method"])
            for metrics in record["history"]:
                epochs.append({"key": key} | metrics)
                row["epochs_finished"] = metrics["epoch"]
                row |= {name: metrics[name] for name in metrics if name not in ("epoch", "seconds")}
        rows.append(row)
    runs = pd.DataFrame(rows)
    runs = runs.reindex(columns=list(dict.fromkeys([*runs, "seconds", "test_loss", "test_psnr"])))
    varied = [name for name in RunConfig.model_fields if runs[name].nunique() > 1]
    provenance = {
        "profile": profile,
        "axes": {name: runs[name].unique().tolist() for name in varied},
        "shared": {name: runs[name].tolist()[0] for name in RunConfig.model_fields if name not in varied},
        "statuses": runs["status"].value_counts().to_dict(),
        "training_seconds": float(runs["seconds"].sum()),
        "data": {name: DATA_DIGESTS[name] for name in runs["dataset"].unique()},
        "trained_on": environments,
        "trained_by": sorted(methods),
    }
    # Also where no run has got so far that it has them.
    names = [name for row in epochs for name in row]
    names = ["key", "epoch", "seconds", "test_loss", *names, "forward_steps", "backward_steps"]
    columns = list(dict.fromkeys(names))
    kinds = {"key": str, "epoch": int} | dict.fromkeys(columns[2:], float)
    return Sweep(profile, runs, pd.DataFrame(epochs, columns=columns).astype(kinds), provenance)


def write_tables(sweep: Sweep, results: Results = None) -> list[Path]:
    """Write both tables, as Parquet and as CSV, and their provenance to `results/<profile>/`."""
    folder = Path(results or RESULTS) / sweep.profile
    files = {}
    for name, table in (("sweep_runs", sweep.runs), ("sweep_epochs", sweep.epochs)):
        files[f"{name}.parquet"] = table.to_parquet(index=False)
        files[f"{name}.csv"] = table.to_csv(index=False).encode()
    return write_with_provenance(folder, files, sweep.provenance, "sweep_provenance.json")


def table_folder(profile: str, results: Results = None) -> Path:
    """Where the tables of a profile with images are; of some profiles they are committed."""
    return Path(results or RESULTS) / COMMITTED.get(profile, profile) / "sweep"


def load_table(profile: str = "quick", results: Results = None) -> Sweep:
    """A profile's tables, with the images of the runs.

    Raises:
        ConfigError: the profile is unknown.
        DataError: its table is not there.
        DamagedFile: a file is not what was written.
    """
    require_name("profile", profile, SWEEPS)
    folder = table_folder(profile, results)
    try:
        provenance = json.loads((folder / PROVENANCE).read_bytes())
        files = [io.BytesIO(read_described(folder / name, provenance)) for name in TABLES]
    except (FileNotFoundError, NotADirectoryError) as error:
        command = f"python -m lib.pages.explore collect --profile {profile}"
        raise DataError(f"{error.filename} is missing; `{command}` makes it from a trained sweep") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedFile(f"{folder / PROVENANCE}: it does not list the table's checksums") from None
    runs, epochs = map(pd.read_parquet, files)
    return Sweep(profile, runs, epochs, provenance)


def _committed_records(profile: str) -> dict[RunConfig, tuple[str, dict[str, Any]]]:
    """Keys and records, without weights, of the runs in a profile's committed table, by configuration."""
    if profile not in COMMITTED:
        return {}
    try:
        table = load_table(profile)
    except DataError:
        return {}
    histories = dict(list(table.epochs.groupby("key")))
    origin = {"environments": table.provenance["trained_on"], "method": table.provenance["method"]}
    found = {}
    for row in table.runs[table.runs["status"] != NOT_RUN].to_dict("records"):
        history = histories.get(row["key"], table.epochs[:0]).drop(columns="key").to_dict("records")
        record = {"status": row["status"], "reason": row["reason"], "history": history}
        record |= {"provenance": origin | {"seconds": row["seconds"]}}
        found[row_config(row)] = row["key"], record
    return found


def row_config(row: Mapping[Any, Any]) -> RunConfig:
    """The configuration of a row of `Sweep.runs`; what an old one does not have has its default."""
    values = {name: row[name] for name in RunConfig.model_fields if name in row}
    known: dict[str, Any] = {name: None if pd.isna(value) else value for name, value in values.items()}
    return RunConfig(**known)


def status(configs: Sequence[RunConfig], results: Results = None) -> pd.DataFrame:
    """How many configurations of each task and model have ended in which way; nothing is trained."""
    rows = []
    for config in configs:
        record = read_record(config, results)
        if record is not None:
            state = record["status"]
        elif (run_folder(config, results) / "checkpoint.pt").exists():
            state = IN_PROGRESS
        else:
            state = NOT_RUN
        rows.append({"task": config.task, "model": config.model, "state": state})
    frame = pd.DataFrame(rows)
    states = [COMPLETED, DIVERGED, OUT_OF_TIME, IN_PROGRESS, NOT_RUN]
    counts = pd.crosstab([frame["task"], frame["model"]], frame["state"])
    counts = counts.reindex(columns=states, fill_value=0)
    counts["all"] = counts.sum(axis="columns")
    counts.loc[("all", ""), :] = counts.sum()
    return counts.astype(int).rename_axis(columns=None)


def plan(configs: Sequence[RunConfig], results: Results = None) -> pd.DataFrame:
    """What is left to train, and how long it will take here, from some steps of every kind of run.

    The steps are those of stacks as large as they will be trained, with untrained weights, whose solves may
    need fewer or more steps than later ones. An evaluation is taken for half a training step per image.

    Returns:
        A row per task and model: runs left, seconds per run, the seconds of all on all processes, the GB that
        they will store, and the GB of memory that a stack takes.
    """
    left = [config for config in configs if read_record(config, results) is None]
    device = default_device()
    groups: dict[RunConfig, list[RunConfig]] = {}
    for config in left:
        groups.setdefault(shared(config), []).append(config)
    rows = []
    for group in tqdm(groups.values(), desc="calibration", leave=False):
        trained = stacks(group, device)
        stored = 4 * weight_count(group[0]) + ROW_BYTES * (group[0].epochs + 1)
        row: dict[str, Any] = {"task": group[0].task, "model": group[0].model, "runs": len(group)}
        row |= {"seconds": min(_seconds_per_run(trained, device), group[0].time_budget)}
        row |= {"stored": len(group) * stored / 1e9}
        row |= {"memory": max(map(len, trained)) * member_bytes(group[0]) / 1e9}
        rows.append(row)
    columns = ["task", "model", "runs", "seconds", "stored", "memory"]
    table = pd.DataFrame(rows, columns=columns)
    table["wall"] = table["runs"] * table["seconds"] / workers(device)
    kinds = table.groupby(["task", "model"], sort=False)
    sums = kinds[["runs", "wall", "stored"]].sum().join(kinds["memory"].max())
    sums.insert(1, "seconds per run", sums["wall"] * workers(device) / sums["runs"])
    return sums


def _seconds_per_run(trained: Sequence[list[Config]], device: torch.device) -> float:
    """Of the configurations of some stacks, from a few of these stacks."""
    count = math.ceil(TRIED_MEMBERS / len(trained[0]))
    tried = trained[:: max(1, len(trained) // count)][:count]
    config = trained[0][0]
    images = min(config.train_images, TRIED_STEPS * config.batch_size)
    # On a GPU the first epoch records the solves.
    epochs = 1 if device.type == "cpu" else 2
    changes = {"train_images": images, "test_images": 1, "epochs": epochs, "time_budget": 1e6}
    members, steps = list[History](), math.ceil(images / config.batch_size)
    for stack in tried:
        members += make_training([c.model_copy(update=changes) for c in stack], device).run()
    last = [member for member in members if len(member.rows) >= epochs]
    spent = sum(member.seconds - member.rows[epochs - 1]["seconds"] for member in last)
    per_step = spent / len(members) / steps
    evaluations = (config.epochs + 1) * config.test_images / config.batch_size / 2
    return per_step * (total_steps(config) + evaluations)


def duration(seconds: float) -> str:
    """A time for people: 40 s, 12 min, 3.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
