"""Executes the figures' notebooks: `python -m lib.pages.notebooks run fig02 --profile quick -p gamma 0.5`.

papermill runs a notebook with other parameters and stores the executed copy beside the figure. A
notebook that fails leaves the figure's folder as it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lib.experiments.config import ConfigError, named, parse_parameters, require_name
from lib.experiments.processes import threads_with_cores
from lib.experiments.profiles import PROFILES
from lib.experiments.store import REPOSITORY, RESULTS, write_atomic
from lib.pages import parameters as declared

NOTEBOOKS = REPOSITORY / "nbs"

LONGEST = "fig13"
"""The figure that takes longest to draw."""


def names() -> dict[str, Path]:
    """All notebooks by name: the file's if that is declared (`first_steps`), else up to the first `_`."""
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    return {p.stem if p.stem in declared.DECLARED else p.stem.partition("_")[0]: p for p in paths}


def notebook_path(name: str) -> Path:
    """The notebook of a name, such as `fig02`.

    Raises:
        ConfigError: there is none.
    """
    known = names()
    require_name("notebook", name, known)
    return known[name]


def defaults(path: Path) -> dict[str, Any]:
    """The parameters of a notebook with the values that its own cell gives them."""
    values: dict[str, Any] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), {}, values)
    return values


def require(
    name: str, profile: str, parameters: dict[str, Any], results: Path = RESULTS
) -> tuple[dict[str, Any], declared.Parameters]:
    """What a notebook's parameters are set to, and all of them with its defaults.

    Raises:
        ConfigError: a name is unknown, or a value makes no sense.
    """
    require_name("profile", profile, PROFILES)
    known = defaults(notebook_path(name))
    common = {"profile": profile, "results": str(results)}
    given = {key: value for key, value in common.items() if key in known} | parameters
    checked = declared.validated(name, known | given)
    if given.get("results"):
        given["results"] = str(REPOSITORY / given["results"])
    return given, checked


def run(name: str, profile: str, parameters: dict[str, Any], results: Path = RESULTS) -> Path:
    """Execute a notebook with papermill.

    Args:
        name: of the notebook, such as `fig02`.
        profile: name of the profile.
        parameters: values for the notebook's `parameters` cell.
        results: folder of the results.

    Returns:
        The folder with what the notebook made and its executed copy.

    Raises:
        ConfigError: a name is unknown, a value makes no sense, or its data cannot be had.
        OSError: the results cannot be written.
        PapermillExecutionError: the notebook failed.
        DeadKernelError: its process was killed.
    """
    given, checked = require(name, profile, parameters, results)
    # Imported here because a value should be refused at once, and these take seconds to come.
    import papermill
    from papermill.exceptions import PapermillExecutionError

    from lib.pages.kernel import OwnKernel

    results = Path(given.get("results") or results)
    results.mkdir(parents=True, exist_ok=True)
    # Results that cannot be written are told now, not after minutes; such a file leaves nothing, ever.
    with tempfile.TemporaryFile(dir=results):
        pass
    kept = results / given.get("profile", "") / f"{name}.failed.ipynb"
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as staging:
        executed = Path(staging) / f"{name}.ipynb"
        try:
            papermill.execute_notebook(
                # papermill takes braces in a path for its parameters.
                str(notebook_path(name)).replace("{", "{{").replace("}", "}}"),
                executed,
                parameters=given,
                kernel_name="python3",
                kernel_manager_class=OwnKernel,
                cwd=NOTEBOOKS,
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
            )
        except PapermillExecutionError as error:
            from lib.experiments.data import DataError

            if error.ename in (ConfigError.__name__, DataError.__name__):
                raise ConfigError(error.evalue) from None
            write_atomic(kept, executed.read_bytes())
            print(f"the notebook with its error: {kept}", file=sys.stderr)
            raise
        folder = checked.folder(name, results)
        write_atomic(folder / executed.name, executed.read_bytes())
    kept.unlink(missing_ok=True)
    return folder


def refresh(name: str) -> Path:
    """Execute a notebook in place with its defaults, and keep the figure under `results/reference`.

    Returns:
        The path of the notebook.
    """
    import nbclient
    import nbformat

    from lib.pages.kernel import OwnKernel

    path = notebook_path(name)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        kernel_manager_class=OwnKernel,
        record_timing=False,
        resources={"metadata": {"path": NOTEBOOKS}},
    ).execute()
    write_atomic(path, nbformat.writes(notebook).encode())
    if (RESULTS / "quick" / name).is_dir():
        keep(name, "quick")
    return path


def keep(name: str, profile: str) -> Path:
    """Copy what a notebook made to the committed results, for `quick` without the runs behind it.

    Args:
        name: of the notebook, such as `fig02`.
        profile: name of the profile.

    Returns:
        The folder of the figure there.

    Raises:
        ConfigError: the profile's figures are not committed, or this one has not been made.
    """
    from lib.experiments.provenance import PROVENANCE
    from lib.experiments.records import COMMITTED, keep_history, keep_run

    require_name("profile", profile, COMMITTED)
    made, committed = RESULTS / profile / name, RESULTS / COMMITTED[profile]
    if not made.is_dir():
        raise ConfigError(f"it has not been made: make {name} PROFILE={profile} makes it")
    for path in sorted(made.iterdir()):
        if path.suffix in (".png", ".csv", ".json"):
            write_atomic(committed / name / path.name, path.read_bytes())
    if profile == "quick":
        return committed / name
    origins = [json.loads(path.read_bytes()) for path in committed.glob(f"*/{PROVENANCE}")]
    whole = {key for origin in origins for key in origin.get("runs", ())}
    alone = {key for origin in origins for key in origin.get("histories", ())} - whole
    kept = committed / "runs"
    for suffix, needed, keep_one in ((".zip", whole, keep_run), (".json", alone, keep_history)):
        for key in sorted(needed):
            if not (kept / f"{key}{suffix}").exists():
                keep_one(key, kept)
        for path in kept.glob(f"*{suffix}"):
            if path.stem not in needed:
                path.unlink()
    return committed / name


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.pages.notebooks", description=__doc__)
    parser.add_argument(
        "command",
        choices=("run", "refresh", "keep"),
        help="into results/, in place, or what was run to the committed ones",
    )
    parser.add_argument("names", nargs="+", metavar="figNN")
    parser.add_argument("--profile", default="quick")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    options = parser.parse_args(arguments)
    given = {}
    for name in options.names if options.command == "run" else ():
        try:
            given[name] = parse_parameters(options.p, declared.types(name))
            require(name, options.profile, given[name])
        except ConfigError as error:
            return _told(2, f"{named(name)}: {error}")

    def make(name: str) -> int:
        return _made(name, options.command, options.profile, given.get(name, {}))

    # One that fails stops no other.
    if not given or any(values.get("train") is not False for values in given.values()):
        return max(map(make, options.names))
    # Trainings would take all cores; where there are none, each core makes a figure. For the one that takes
    # longest none should be left to wait.
    with threads_with_cores(len(options.names)) as pool:
        return max(pool.map(make, sorted(options.names, key=LONGEST.__ne__)))


def _made(name: str, command: str, profile: str, parameters: dict[str, Any]) -> int:
    """Make one notebook's results, say where they are or why not, and return an exit status."""
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    start, failed = time.perf_counter(), f"{name} failed, its old result is as it was: "
    try:
        if command == "run":
            made = run(name, profile, parameters)
        else:
            made = refresh(name) if command == "refresh" else keep(name, profile)
    except ConfigError as error:
        return _told(2, f"{named(name)}: {error}")
    except (PapermillExecutionError, CellExecutionError) as error:
        return _told(1, failed + f"{error.ename}: {error.evalue}".splitlines()[0])
    except (OSError, DeadKernelError) as error:
        return _told(1, failed + " ".join(str(error).split()))
    print(f"{made}  ({time.perf_counter() - start:.0f} s)")
    return 0


def _told(status: int, line: str) -> int:
    print(line, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
