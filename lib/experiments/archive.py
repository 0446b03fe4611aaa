"""Runs that another machine trained, as one file: packed there, and taken into the store here."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from filelock import FileLock

from lib.experiments.config import ConfigError
from lib.experiments.problem import Config
from lib.experiments.runs import code_with, data_digests, is_stored, load_run, run_folder, run_key
from lib.experiments.store import RESULTS, DamagedFile, Results, write_atomic

TORCH = "torch"
"""The file that names the version of torch that all runs of an archive were trained with."""

RUN_FILES = ("weights.pt", "run.json")
"""Of a run; its record last, for with it the run is there."""


def pack(path: Path, torch_version: str, configs: Iterable[Config], results: Results = None) -> int:
    """Write those runs that are stored as one file, and return how many.

    Args:
        path: of the file.
        torch_version: that they were trained with.
        configs: of the runs.
        results: where they are stored.
    """
    stored = [config for config in configs if is_stored(config, results)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with ZipFile(path, "w") as archive:
        archive.writestr(TORCH, torch_version)
        for config in stored:
            folder = run_folder(config, results)
            for name in RUN_FILES:
                archive.write(folder / name, f"{folder.name}/{name}")
    return len(stored)


def take(path: Path, configs: Sequence[Config], results: Results = None) -> str:
    """Store those runs of an archive that are asked for and not stored yet, and say how many they are.

    Their records still tell machine, versions and code. Another version of torch is allowed: the keys in the
    archive have to be those of the present code and data with that version. Checksums, configurations and
    weights are verified, of all runs before one is stored; nothing is unpickled but tensors.

    Raises:
        ConfigError: it is no such archive, or of other code.
        DamagedFile: one of its runs is not what was trained; it names the run.
    """
    try:
        archive = ZipFile(path)
        torch_version = archive.read(TORCH).decode()
    except (BadZipFile, KeyError, UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"take: got {path}, allowed: a file that make gpu wrote") from None
    code = code_with(torch_version)
    with archive, tempfile.TemporaryDirectory(prefix=".take-", dir=_made(Path(results or RESULTS))) as place:
        names, verified = set(archive.namelist()), list[Config]()
        for config in configs:
            theirs = [f"{run_key(config, code)}/{name}" for name in RUN_FILES]
            if not names.issuperset(theirs) or is_stored(config, results):
                continue
            for name, member in zip(RUN_FILES, theirs, strict=True):
                write_atomic(run_folder(config, place) / name, _read(archive, member, path))
            run = load_run(run_folder(config, place), config)
            origin = None if run is None else [run.provenance.get(name) for name in ("code", "data")]
            if origin != [code, data_digests(config)]:
                raise DamagedFile(f"{path}: its run {theirs[0].partition('/')[0]} is not what was trained")
            verified.append(config)
        for config in verified:
            folder = run_folder(config, results)
            with FileLock(_made(folder) / "lock"):
                for name in RUN_FILES if not is_stored(config, results) else ():
                    (run_folder(config, place) / name).replace(folder / name)
    packed = Counter(name.partition("/")[2] for name in names)[RUN_FILES[-1]]
    if packed and not any(f"{run_key(config, code)}/{RUN_FILES[-1]}" in names for config in configs):
        raise ConfigError(f"take: got {path}, whose runs are of other code, other data or another grid")
    return f"{len(verified)} of the {packed} runs of {path} taken in, trained with torch {torch_version}"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _read(archive: ZipFile, member: str, path: Path) -> bytes:
    try:
        return archive.read(member)
    except BadZipFile as error:
        raise DamagedFile(f"{path}: {error}") from None
