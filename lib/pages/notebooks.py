"""Execute the notebooks: `python -m lib.pages.notebooks run fig02 --profile quick -p gamma 0.5`.

papermill runs a notebook with other parameters and stores the executed copy beside the figure. A notebook
that fails leaves the figure's folder as it was. The parameters of a notebook are the variables of its
tagged cell, with their types, defaults and comments, and those of its training (`lib.experiments.config`).
"""

from __future__ import annotations

import ast
import logging
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
from pydantic import Field, create_model
from pydantic.fields import FieldInfo
from traitlets.config import Config

from lib.experiments.command import Parser, command, fail
from lib.experiments.config import (
    Checked,
    ConfigError,
    FacesConfig,
    RunConfig,
    axis_types,
    described,
    named,
    parse_parameters,
    require_name,
)
from lib.experiments.profiles import PROFILES, faces_config, grid, profile_config
from lib.experiments.store import REPOSITORY, RESULTS, absolute, write_atomic

NOTEBOOKS = REPOSITORY / "nbs"

TRAINING = "training"
"""Variable of a notebook with the parameters of its training that differ from the profile."""

KERNEL: dict[str, Any] = {
    "kernel_name": "python3",
    # Without encryption a kernel prints a warning, and so does a kernel interrupted at its end.
    "config": Config(KernelManager={"transport_encryption": "required"}),
    "extra_arguments": ["--log-level=CRITICAL"],
}
"""Options of the kernel."""


class Page(NamedTuple):
    """Notebook: its file, the function that makes its configurations, and parameters that it sets itself."""

    file: str
    make: Callable[..., Any] | None = None
    fixed: tuple[str, ...] = ()


MAKERS: dict[str, tuple[Any, ...]] = dict.fromkeys(("fig01", "fig05", "fig06"), (grid,))
MAKERS |= dict.fromkeys(("fig02", "fig03", "fig04"), (profile_config, ("model", "initial")))
MAKERS |= {f"fig{number:02}": (faces_config,) for number in range(7, 18)}
MAKERS |= dict.fromkeys(("fig08", "fig13"), (faces_config, ("model", "filters", "filter_size")))
"""Arguments of `Page` behind the file, of notebooks that train with a profile."""

NAMES = {
    path.stem: re.sub(r"^(fig\d\d|theory)_.*", r"\1", path.stem) for path in sorted(NOTEBOOKS.glob("*.ipynb"))
}
PAGES = {name: Page(file, *MAKERS.get(name, ())) for file, name in NAMES.items()}


def notebook_path(name: str) -> Path:
    """Return the path of a notebook, such as `fig02`, or raise `ConfigError`."""
    require_name("notebook", name, PAGES)
    return NOTEBOOKS / f"{PAGES[name].file}.ipynb"


def cell_parameters(name: str) -> dict[str, tuple[Any, FieldInfo]]:
    """Return types, defaults and comments of the variables in a notebook's cell with the tag `parameters`."""
    path = notebook_path(name)
    try:
        cells = nbformat.read(path, as_version=4).cells
    except nbformat.reader.NotJSONError:
        raise ConfigError(
            f"{path} is not a valid notebook: resolve its conflicts, or check it out."
        ) from None
    source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", ()))
    comments, variables = dict(re.findall(r"^(\w+)\b.*# *(.*)", source, re.MULTILINE)), dict[str, Any]()
    exec(compile(source, name, "exec", dont_inherit=True), variables)
    kinds: dict[str, Any] = variables.pop("__annotations__", {})
    variables.pop("__builtins__")
    return {
        name: (kinds.get(name, type(default)), Field(default, description=comments.get(name, "")))
        for name, default in variables.items()
    }


def training_fields(name: str) -> dict[str, FieldInfo]:
    """Return the parameters of the training of a notebook, if it has one."""
    page = PAGES[name]
    fields = (FacesConfig if page.make is faces_config else RunConfig).model_fields
    return {key: field for key, field in fields.items() if page.make and key not in page.fixed}


def require(name: str, profile: str, values: dict[str, Any], results: Path = RESULTS) -> dict[str, Any]:
    """Validate parameters and return the values of the variables of a notebook.

    Args:
        name: name of the notebook.
        profile: name of the profile.
        values: values of its own parameters and those of its training.
        results: folder of the results.

    Raises:
        ConfigError: a name or a value is invalid.
    """
    known, make = cell_parameters(name), PAGES[name].make
    training = known.pop(TRAINING)[1].default if make else {}
    own: dict[str, Any] = known | dict.fromkeys(training_fields(name), (Any, None))
    common = {"profile": profile, "results": str(results)}
    values = {key: value for key, value in common.items() if key in known} | values
    create_model(name, __base__=Checked, **own)(**values)
    require_name("profile", values.get("profile", profile), PROFILES)
    given = {key: value for key, value in values.items() if key in known}
    if make:
        given[TRAINING] = training | {key: value for key, value in values.items() if key not in known}
        make(given["profile"], **given[TRAINING])
    if given.get("results"):
        given["results"] = str(absolute(given["results"]))
        try:
            Path(given["results"]).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"`results` {given['results']} cannot be created: {error.strerror}.") from None
    return given


def parsed(name: str, pairs: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return the parameters of a command line."""
    types = {key: kind for key, (kind, _) in cell_parameters(name).items()}
    training = {key: field.annotation for key, field in training_fields(name).items()}
    return parse_parameters(pairs, (axis_types() if PAGES[name].make is grid else training) | types)


def print_help(name: str, profile: str) -> None:
    """Print name, type with limits, default and meaning of each parameter of a notebook."""
    known, make = cell_parameters(name), PAGES[name].make
    training = known.pop(TRAINING)[1].default if make else {}
    print(f'make {name} ARGS="-p NAME VALUE", profile {profile}: name, type, default, meaning')
    row = "  {:<20} {:<32} {!s:<14} {}".format
    for key, (kind, own) in known.items():
        print(row(key, described(kind), own.default, own.description))
    made = make(profile, **training) if make else []
    for key, field in training_fields(name).items():
        levels = dict.fromkeys(getattr(config, key) for config in (made if make is grid else [made]))
        default = training[key] if key in training else ", ".join(map(str, levels))
        print(row(key, described(field.annotation, field.metadata), default, field.description))


def run(name: str, profile: str, parameters: dict[str, Any], results: Path = RESULTS) -> Path:
    """Execute a notebook with papermill.

    Args:
        name: name of the notebook, such as `fig02`.
        profile: name of the profile.
        parameters: values for the notebook's `parameters` cell.
        results: folder of the results.

    Returns:
        The folder with the results of the notebook and its executed copy.

    Raises:
        ConfigError: a name or a value is invalid, or the data are missing or unusable.
        PapermillExecutionError: the notebook failed.
    """
    given = require(name, profile, parameters, results)
    # Imported here: these imports take seconds, and a rejection should not.
    import papermill

    from lib.experiments.data import DataError

    # It warns of annotated variables.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    results = Path(given.get("results") or results) / given.get("profile", "")
    failed = results / f"{name}.failed.ipynb"
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as staging:
        executed = Path(staging) / f"{name}.ipynb"
        try:
            notebook = papermill.execute_notebook(
                notebook_path(name),
                executed,
                parameters=given,
                cwd=NOTEBOOKS,
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                **KERNEL,
            )
        except papermill.PapermillExecutionError as error:
            if error.ename in (ConfigError.__name__, DataError.__name__):
                raise ConfigError(error.evalue) from None
            write_atomic(failed, executed.read_bytes())
            print(f"the notebook with its error: {failed}", file=sys.stderr)
            raise
        write_atomic(results / _folder(notebook, name) / executed.name, executed.read_bytes())
    failed.unlink(missing_ok=True)
    return results / _folder(notebook, name)


def _folder(notebook: nbformat.NotebookNode, name: str) -> str:
    """Return the folder in the output of the last cell of an executed notebook, else its name."""
    outputs = notebook.cells[-1].get("outputs") or [{}]
    shown = outputs[-1].get("data", {}).get("text/plain", "")
    return str(ast.literal_eval(shown)) if shown[:1] in ("'", '"') else name


@command
def main(arguments: list[str] | None = None) -> int:
    """Validate all parameters, execute the notebooks in turn, and return an exit status."""
    parser = Parser(prog="python -m lib.pages.notebooks", add_help=False)
    parser.add_argument("command", choices=("run",))
    parser.add_argument("names", nargs="+", metavar="figNN")
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--help", action="store_true", help="print the parameters of the notebooks")
    options = parser.parse(arguments, "-p")
    profile, values = options.profile, dict[str, dict[str, Any]]()
    for name in options.names:
        try:
            values[name] = parsed(name, options.p)
            require_name("profile", profile, PROFILES)
            if options.help:
                print_help(name, profile)
            else:
                require(name, profile, values[name])
        except ConfigError as error:
            return fail(2, f"{named(name)}: {error}")
    if options.help:
        return 0
    try:
        return max([_make(name, profile, values[name]) for name in options.names])
    except KeyboardInterrupt:
        # nbclient does not wait for the stopped cell, and asyncio would report its error.
        logging.getLogger("asyncio").disabled = True
        raise


def _make(name: str, profile: str, parameters: dict[str, Any]) -> int:
    """Execute one notebook, print its folder or its error, and return an exit status."""
    start = time.perf_counter()
    try:
        made = run(name, profile, parameters)
    except ConfigError as error:
        return fail(2, f"{named(name)}: {error}")
    except Exception as error:
        # Continue with the next notebook. Errors of papermill have the name and text of the notebook's error.
        kind, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
        reason = f"{kind}: {text}".splitlines()[0]
        return fail(1, f"{name} failed, its old result is as it was: {reason}")
    print(f"{made}  ({time.perf_counter() - start:.0f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
