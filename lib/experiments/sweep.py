"""Sweeps of the grid of the paper, with results in two tidy tables."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.experiments.config import RunConfig, require_name
from lib.experiments.data import DataError
from lib.experiments.profiles import SWEEPS, grid
from lib.experiments.provenance import PROVENANCE, read_described, write_with_provenance
from lib.experiments.records import COMMITTED, DATA_DIGESTS, read_record, run_folder, run_key
from lib.experiments.runs import train_runs
from lib.experiments.store import RESULTS, DamagedFile, Results
from lib.training import COMPLETED, DIVERGED, OUT_OF_TIME

NOT_RUN, IN_PROGRESS = "not run", "in progress"

TABLES = ("runs.parquet", "epochs.parquet")
"""Tables of a sweep with reconstructions (`.ci/collect.py`)."""


@dataclass(frozen=True)
class Sweep:
    """The runs of a grid as tables.

    Attributes:
        profile: name of its profile.
        runs: a row per configuration: `key`, parameters, `arm` (see `ARMS`), `status` (also `not run`),
            `reason`, `epochs_finished`, `seconds`, `accelerator` ("none" for a CPU), the metrics of the
            last epoch (`lib.training.History`).
        epochs: a row per run and epoch: `key` and metrics.
        provenance: axes, data digests, environments, counts and seconds.
    """

    profile: str
    runs: pd.DataFrame
    epochs: pd.DataFrame
    provenance: dict[str, Any]


def get_sweep(profile: str, /, results: Results = None, train: bool = True, **values: Any) -> Sweep:
    """Train the missing runs of a sweep, write its tables and return it.

    Args:
        train: False takes stored and committed runs, and marks the others as not run.
        values: parameters and axes that replace the profile's (see `grid`).

    Raises:
        ConfigError: a value is invalid.
        DataError: `train` is False, and there is no run.
    """
    configs = grid(profile, **values)
    if train:
        train_runs(configs, results)
    sweep = load_sweep(profile, configs, results, committed=not train)
    if (sweep.runs["status"] == NOT_RUN).all():
        raise DataError(f"no {profile} run is stored or committed; run `make sweep PROFILE={profile}`")
    write_tables(sweep, results)
    return sweep


def load_sweep(
    profile: str, configs: Sequence[RunConfig], results: Results = None, committed: bool = False
) -> Sweep:
    """Return the tables of some configurations of a profile from their stored runs.

    Args:
        committed: take missing runs from the committed table of the profile, if there is one.
    """
    rows, epochs, environments, methods = [], [], list[Any](), set[int]()
    known = _committed_records(profile) if committed else {}
    for config in configs:
        key, record = run_key(config), read_record(config, results)
        if record is None and config in known:
            key, record = known[config]
        row = {"key": key} | dict(config) | {"status": NOT_RUN, "reason": "", "epochs_finished": 0}
        if record is not None:
            origin = record["provenance"]
            row |= {"status": record["status"], "reason": record["reason"], "seconds": origin["seconds"]}
            machines = origin.get("environments") or [origin["environment"]]
            row["accelerator"] = ", ".join(sorted({machine["accelerator"] for machine in machines}))
            environments += [machine for machine in machines if machine not in environments]
            methods.add(origin["method"])
            for metrics in record["history"]:
                epochs.append({"key": key} | metrics)
                row["epochs_finished"] = metrics["epoch"]
                row |= {name: metrics[name] for name in metrics if name not in ("epoch", "seconds")}
        rows.append(row)
    runs = pd.DataFrame(rows)
    runs["arm"] = runs["model"].mask(runs["initial"] == "tied", "deq tied")
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
    names = [name for row in epochs for name in row]
    # Columns of every table, also without a finished epoch.
    names = ["key", "epoch", "seconds", "test_loss", *names, "forward_steps", "backward_steps"]
    columns = list(dict.fromkeys(names))
    kinds = {"key": str, "epoch": int} | dict.fromkeys(columns[2:], float)
    return Sweep(profile, runs, pd.DataFrame(epochs, columns=columns).astype(kinds), provenance)


def write_tables(sweep: Sweep, results: Results = None) -> list[Path]:
    """Write both tables, as Parquet and as CSV, with provenance to `results/<profile>/`; return the paths."""
    folder = Path(results or RESULTS) / sweep.profile
    files = {}
    for name, table in (("sweep_runs", sweep.runs), ("sweep_epochs", sweep.epochs)):
        files[f"{name}.parquet"] = table.to_parquet(index=False)
        files[f"{name}.csv"] = table.to_csv(index=False).encode()
    return write_with_provenance(folder, files, sweep.provenance, "sweep_provenance.json")


def table_folder(profile: str, results: Results = None) -> Path:
    """Return the folder of a profile's tables with reconstructions; some of these are committed."""
    return Path(results or RESULTS) / COMMITTED.get(profile, profile) / "sweep"


def load_table(profile: str = "quick", results: Results = None) -> Sweep:
    """Return a profile's tables with reconstructions.

    Raises:
        ConfigError: the profile is unknown.
        DataError: there is no table.
        DamagedFile: the content of a file has changed.
    """
    require_name("profile", profile, SWEEPS)
    folder = table_folder(profile, results)
    try:
        provenance = json.loads((folder / PROVENANCE).read_bytes())
        files = [io.BytesIO(read_described(folder / name, provenance)) for name in TABLES]
    except FileNotFoundError as error:
        command = f"python .ci/collect.py --profile {profile}"
        raise DataError(f"{error.filename} is missing; `{command}` makes it from a trained sweep") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DamagedFile(f"{folder / PROVENANCE}: it does not list the table's checksums") from None
    runs, epochs = map(pd.read_parquet, files)
    return Sweep(profile, runs, epochs, provenance)


def _committed_records(profile: str) -> dict[RunConfig, tuple[str, dict[str, Any]]]:
    """Return keys and records of the runs in a profile's committed table, by configuration."""
    if profile not in COMMITTED:
        return {}
    try:
        table = load_table(profile)
    except DataError:
        return {}
    histories = dict(list(table.epochs.groupby("key")))
    machines, method = table.provenance["trained_on"], table.provenance["method"]
    records = {}
    for row in table.runs[table.runs["status"] != NOT_RUN].to_dict("records"):
        history = histories.get(row["key"], table.epochs[:0]).drop(columns="key").to_dict("records")
        record = {"status": row["status"], "reason": row["reason"], "history": history}
        own = [machine for machine in machines if machine["accelerator"] == row["accelerator"]]
        record |= {"provenance": {"environments": own, "method": method, "seconds": row["seconds"]}}
        records[row_config(row)] = row["key"], record
    return records


def row_config(row: Mapping[Any, Any]) -> RunConfig:
    """Return the configuration of a row of `Sweep.runs`, with defaults for parameters that it lacks."""
    values = {name: row[name] for name in RunConfig.model_fields if name in row}
    known: dict[str, Any] = {name: None if pd.isna(value) else value for name, value in values.items()}
    return RunConfig(**known)


def status(configs: Sequence[RunConfig], results: Results = None) -> pd.DataFrame:
    """Count the configurations of each task and model by status."""
    runs = load_sweep("", configs, results).runs
    started = np.array([(run_folder(config, results) / "checkpoint.pt").exists() for config in configs])
    state = runs["status"].mask((runs["status"] == NOT_RUN) & started, IN_PROGRESS)
    counts = pd.crosstab([runs["task"], runs["model"]], state, margins=True, margins_name="all")
    states = [COMPLETED, DIVERGED, OUT_OF_TIME, IN_PROGRESS, NOT_RUN, "all"]
    return counts.reindex(columns=states, fill_value=0).rename_axis(columns=None)
