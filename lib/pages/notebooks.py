"""Executes the figures' notebooks: `python -m lib.pages.notebooks run fig02 --profile quick -p gamma 0.5`.

papermill runs a notebook with other parameters and stores the executed copy beside the figure. A
notebook that fails leaves the figure's folder as it was.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import papermill
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.exceptions import PapermillExecutionError

from lib.experiments.config import ConfigError, named, parse_parameters, require_name
from lib.experiments.data import DataError
from lib.experiments.profiles import PROFILES
from lib.experiments.runs import KERNELS, REFERENCE
from lib.experiments.store import REPOSITORY, RESULTS, write_atomic

NOTEBOOKS = REPOSITORY / "nbs"


def notebook_path(name: str) -> Path:
    """The notebook of a name, its file's up to the first `_`, such as `fig02`.

    Raises:
        ConfigError: there is none.
    """
    known = {path.stem.partition("_")[0]: path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    require_name("notebook", name, known)
    return known[name]


def run(name: str, profile: str, parameters: dict[str, Any], results: Path = RESULTS) -> Path:
    """Execute a figure's notebook with papermill.

    Args:
        name: of the figure.
        profile: name of the profile.
        parameters: values for the notebook's `parameters` cell.
        results: folder of the results.

    Returns:
        The figure's folder, with the executed notebook in it.

    Raises:
        ConfigError: a name is unknown, the notebook refused a value, or its data cannot be had.
        OSError: the results cannot be written.
        PapermillExecutionError: the notebook failed.
        DeadKernelError: its process was killed.
    """
    source = notebook_path(name)
    require_name("profile", profile, PROFILES)
    known = papermill.inspect_notebook(str(source))
    common = {"profile": profile, "results": str(results)}
    for parameter in parameters:
        if parameter not in known:
            raise ConfigError(
                f"{named(parameter)}: no such parameter of {source.name}, allowed: {', '.join(known)}"
            )
    folder = results / profile / name
    results.mkdir(parents=True, exist_ok=True)
    # Results that cannot be written are told now, not after minutes; such a file leaves nothing, ever.
    with tempfile.TemporaryFile(dir=results):
        pass
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as staging:
        executed = Path(staging) / f"{name}.ipynb"
        try:
            papermill.execute_notebook(
                source,
                executed,
                parameters={key: value for key, value in common.items() if key in known} | parameters,
                kernel_name="python3",
                cwd=NOTEBOOKS,
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
            )
        except PapermillExecutionError as error:
            if error.ename in (ConfigError.__name__, DataError.__name__):
                raise ConfigError(error.evalue) from None
            kept = results / profile / f"{name}.failed.ipynb"
            write_atomic(kept, executed.read_bytes())
            print(f"the notebook with its error: {kept}", file=sys.stderr)
            raise
        write_atomic(folder / executed.name, executed.read_bytes())
    (results / profile / f"{name}.failed.ipynb").unlink(missing_ok=True)
    return folder


def refresh(name: str) -> Path:
    """Execute a notebook in place with its defaults, and keep the figure under `results/reference`.

    Returns:
        The path of the notebook.
    """
    path = notebook_path(name)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": NOTEBOOKS}},
    ).execute()
    write_atomic(path, nbformat.writes(notebook).encode())
    for suffix in (f"{name}.png", f"{name}.csv", "claims.json", "provenance.json", KERNELS):
        made = RESULTS / "quick" / name / suffix
        if made.exists():
            write_atomic(REFERENCE / name / suffix, made.read_bytes())
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.pages.notebooks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="execute notebooks into results/<profile>/")
    runner.add_argument("names", nargs="+", metavar="figNN")
    runner.add_argument("--profile", default="quick")
    runner.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    refresher = commands.add_parser("refresh", help="execute notebooks in place, to be committed")
    refresher.add_argument("names", nargs="+", metavar="figNN")
    options = parser.parse_args(arguments)
    for name in options.names:
        start = time.perf_counter()
        try:
            if options.command == "run":
                made = run(name, options.profile, parse_parameters(options.p))
            else:
                made = refresh(name)
        except ConfigError as error:
            print(f"{named(name)}: {error}", file=sys.stderr)
            return 2
        except (PapermillExecutionError, CellExecutionError) as error:
            reason = f"{error.ename}: {error.evalue}".splitlines()[0]
            print(f"{name} failed, its old result is as it was: {reason}", file=sys.stderr)
            return 1
        except (DataError, OSError, DeadKernelError) as error:
            reason = " ".join(str(error).split())
            print(f"{name} failed, its old result is as it was: {reason}", file=sys.stderr)
            return 1
        print(f"{made}  ({time.perf_counter() - start:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
