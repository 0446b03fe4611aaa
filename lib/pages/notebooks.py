"""Execute the notebooks: `python -m lib.pages.notebooks run fig02 --profile quick -p gamma 0.5`.

papermill runs a notebook with other parameters and stores the executed copy beside the figure. A notebook
that fails leaves the figure's folder as it was. The parameters of a notebook are the variables of its first
cell, with their types, defaults and comments, and those of its training (`lib.experiments.config`).
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from lib.experiments.config import (
    ConfigError,
    FacesConfig,
    RunConfig,
    axis_types,
    described,
    named,
    parse_parameters,
    require_name,
    shown,
)
from lib.experiments.processes import threads_with_cores
from lib.experiments.profiles import PROFILES, faces_config, grid, profile_config
from lib.experiments.store import REPOSITORY, RESULTS, write_atomic

NOTEBOOKS = REPOSITORY / "nbs"

LONGEST = "fig13"
"""The figure that takes longest to draw."""

TRAINING = "training"
"""Variable of a notebook with the parameters of its training, other than the profile's."""


class Page(NamedTuple):
    """A notebook: its file, the maker of its configurations, and parameters that it sets itself."""

    file: str
    make: Callable[..., Any] | None = None
    fixed: tuple[str, ...] = ()


PAGES = {
    "fig01": Page("fig01_mnist_losses", grid),
    "fig02": Page("fig02_mnist_denoising", profile_config, ("model",)),
    "fig03": Page("fig03_mnist_inpainting", profile_config, ("model",)),
    "fig04": Page("fig04_mnist_deblurring", profile_config, ("model",)),
    "fig05": Page("fig05_mnist_best", grid),
    "fig06": Page("fig06_mnist_epochs", grid),
    "fig07": Page("fig07_faces_inpainting", faces_config),
    "fig08": Page("fig08_faces_denoising", faces_config, ("model", "filters", "filter_size")),
    "fig09": Page("fig09_kernels_denoising_11x11_bilevel", faces_config),
    "fig10": Page("fig10_kernels_denoising_11x11_deq", faces_config),
    "fig11": Page("fig11_kernels_denoising_3x3_bilevel", faces_config),
    "fig12": Page("fig12_kernels_denoising_3x3_deq", faces_config),
    "fig13": Page("fig13_faces_deblurring", faces_config, ("model", "filters", "filter_size")),
    "fig14": Page("fig14_kernels_deblurring_11x11_bilevel", faces_config),
    "fig15": Page("fig15_kernels_deblurring_11x11_deq", faces_config),
    "fig16": Page("fig16_kernels_deblurring_3x3_bilevel", faces_config),
    "fig17": Page("fig17_kernels_deblurring_3x3_deq", faces_config),
    "theory": Page("theory_special_case"),
}
PAGES |= {
    name: Page(name)
    for name in ("first_steps", "your_own", "weight", "hypergradients", "reconstruct", "evaluate")
}
PAGES |= {name: Page(name) for name in ("tomography", "explore", "scaling")}


def notebook_path(name: str) -> Path:
    """Return the notebook of a name, such as `fig02`.

    Raises:
        ConfigError: there is none.
    """
    require_name("notebook", name, PAGES)
    return NOTEBOOKS / f"{PAGES[name].file}.ipynb"


class Parameter(NamedTuple):
    """A parameter of a notebook: its default, its type and its comment."""

    default: Any
    kind: Any
    help: str


def cell_parameters(name: str) -> dict[str, Parameter]:
    """Return the parameters of a notebook, by name, from its cell with the tag `parameters`."""
    parameters: dict[str, Parameter] = {}
    for cell in json.loads(notebook_path(name).read_text(encoding="utf-8"))["cells"]:
        if "parameters" not in cell["metadata"].get("tags", []):
            continue
        lines = "".join(cell["source"]).splitlines()
        for node in ast.parse("\n".join(lines)).body:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            default = ast.literal_eval(node.value)
            annotation = node.annotation if isinstance(node, ast.AnnAssign) else None
            kind = type(default) if annotation is None else eval(ast.unparse(annotation))
            comment = lines[(node.end_lineno or 1) - 1][node.end_col_offset :].partition("#")[2].strip()
            parameters[ast.unparse(target)] = Parameter(default, kind, comment)
    return parameters


def training_types(name: str) -> dict[str, Any]:
    """Return the types of the parameters that the training of a notebook takes; none where it has none."""
    page = PAGES[name]
    if page.make is None:
        return {}
    if page.make is grid:
        return axis_types()
    fields = (FacesConfig if page.make is faces_config else RunConfig).model_fields
    return {key: field.annotation for key, field in fields.items() if key not in page.fixed}


def parsed(name: str, pairs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return the parameters of a command line, as they are written into a notebook.

    Raises:
        ConfigError: a list cannot be parsed.
    """
    kinds = {key: parameter.kind for key, parameter in cell_parameters(name).items()}
    return parse_parameters(pairs, training_types(name) | kinds)


def require(name: str, profile: str, values: dict[str, Any], results: Path = RESULTS) -> dict[str, Any]:
    """Return what the variables of a notebook are set to.

    Args:
        name: of the notebook.
        profile: name of the profile.
        values: of its own parameters and those of its training.
        results: folder of the results.

    Raises:
        ConfigError: a name is unknown, or a value is refused.
    """
    known, own = cell_parameters(name), training_types(name)
    common = {"profile": profile, "results": str(results)}
    given: dict[str, Any] = {key: value for key, value in common.items() if key in known}
    training = dict(known[TRAINING].default) if TRAINING in known else {}
    for key, value in values.items():
        if key in known:
            given[key] = value
        elif key in own:
            training[key] = value
        else:
            names = ", ".join([*(key for key in known if key != TRAINING), *own])
            raise ConfigError(f"{named(key)}: no such parameter, allowed: {names}")
    for key, value in given.items():
        try:
            TypeAdapter(known[key].kind).validate_python(value, strict=True)
        except ValidationError as error:
            wanted = error.errors()[0]["msg"].removeprefix("Input should be ")
            raise ConfigError(f"{key}: got {shown(value)}, allowed: {wanted}") from None
    require_name("profile", given.get("profile", profile), PROFILES)
    make = PAGES[name].make
    if make is not None:
        make(given["profile"], **training)
        given[TRAINING] = training
    if given.get("results"):
        given["results"] = str(REPOSITORY / Path(given["results"]).expanduser())
    return given


def print_help(name: str, profile: str) -> None:
    """Print name, type with limits, default and meaning of each parameter of a notebook."""
    rows, make = [], PAGES[name].make
    known = cell_parameters(name)
    for key, parameter in known.items():
        if key != TRAINING:
            rows.append((key, described(parameter.kind), parameter.default, parameter.help))
    if make is not None:
        training = known[TRAINING].default
        made = make(profile, **training)
        configs = made if make is grid else [made]
        for key in training_types(name):
            field = type(configs[0]).model_fields[key]
            levels = list(dict.fromkeys(getattr(config, key) for config in configs))
            default = levels[0] if len(levels) == 1 else levels
            default = training[key] if isinstance(default, FacesConfig) else default
            rows.append((key, described(field.annotation, field.metadata), default, field.description))
    print(f'make {name} ARGS="-p NAME VALUE", profile {profile}: name, type, default, meaning')
    for key, kind, default, meaning in rows:
        print(f"  {key:<20} {kind:<32} {default!s:<14} {meaning}")


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
    given = require(name, profile, parameters, results)
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
        folder = _made_folder(executed, results / given.get("profile", ""), name)
        write_atomic(folder / executed.name, executed.read_bytes())
    kept.unlink(missing_ok=True)
    return folder


def _made_folder(executed: Path, results: Path, name: str) -> Path:
    """Return the folder that the last cell of an executed notebook names, or else that of its name."""
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"]
    for output in cells[-1].get("outputs", ()):
        text = "".join(output.get("data", {}).get("text/plain", "")).strip("'\"")
        if text and (results / text).is_dir():
            return results / text
    return results / name


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
    parser = argparse.ArgumentParser(prog="python -m lib.pages.notebooks", add_help=False)
    parser.add_argument(
        "command",
        choices=("run", "refresh", "keep"),
        help="into results/, in place, or what was run to the committed ones",
    )
    parser.add_argument("names", nargs="+", metavar="figNN")
    parser.add_argument("--profile", default="quick")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    parser.add_argument("--help", action="store_true", help="print the parameters of the notebooks")
    options = parser.parse_args(arguments)
    given = {}
    for name in options.names if options.command == "run" else ():
        try:
            require_name("notebook", name, PAGES)
            require_name("profile", options.profile, PROFILES)
            if options.help:
                print_help(name, options.profile)
                continue
            given[name] = parsed(name, options.p)
            require(name, options.profile, given[name])
        except ConfigError as error:
            return _told(2, f"{named(name)}: {error}")

    if options.help:
        return 0

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
