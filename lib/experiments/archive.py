"""Runs that another machine trained, packed into one file there and added to the store here."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from filelock import FileLock

from lib.experiments.build import Config
from lib.experiments.config import ConfigError
from lib.experiments.records import is_stored, load_run, run_folder, run_key
from lib.experiments.store import DamagedFile, Results, write_atomic

RUN_FILES = ("weights.pt", "run.json")
"""Files of a run; a folder with a record holds a complete run, so the record comes last."""


def pack(path: Path, configs: Iterable[Config], results: Results = None) -> int:
    """Write the stored runs among some configurations to one file, and return their number."""
    stored = [config for config in configs if is_stored(config, results)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with ZipFile(path, "w") as archive:
        for config in stored:
            folder = run_folder(config, results)
            for name in RUN_FILES:
                archive.write(folder / name, f"{folder.name}/{name}")
    return len(stored)


def take(path: Path, configs: Sequence[Config], results: Results = None) -> str:
    """Store the runs of an archive that are asked for and not stored yet, and say how many they are.

    All runs are verified before the first one is stored.

    Raises:
        ConfigError: it is no such archive, or none of its runs is asked for.
        DamagedFile: one of its runs cannot be used; it names the run.
    """
    try:
        archive = ZipFile(path)
    except (BadZipFile, OSError):
        raise ConfigError(f"take: got {path}, allowed: a file that make gpu wrote") from None
    with archive, tempfile.TemporaryDirectory() as place:
        keys = {name.partition("/")[0] for name in archive.namelist()}
        wanted = [config for config in configs if run_key(config) in keys]
        if not wanted:
            raise ConfigError(f"take: got {path}, whose runs are of another method, data or grid")
        new = [config for config in wanted if not is_stored(config, results)]
        for config in new:
            for name in RUN_FILES:
                write_atomic(run_folder(config, place) / name, archive.read(f"{run_key(config)}/{name}"))
            if load_run(config, place) is None:
                raise DamagedFile(f"{path}: its run {run_key(config)} cannot be used")
        for config in new:
            folder = run_folder(config, results)
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "lock"):
                for name in RUN_FILES:
                    write_atomic(folder / name, (run_folder(config, place) / name).read_bytes())
    return f"{len(new)} of the {len(keys)} runs of {path} are new in the store"
