"""Trainings on the command line: `python -m lib.experiments run --profile quick -p tau "[0.1, 0.5]"`.

`run` trains the missing runs of the grid and writes its tables; `status` counts its runs; `plan` estimates
the time of the missing ones. `train` trains one configuration, with `-p dataset` on photographs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lib.experiments.build import Config
from lib.experiments.cluster import Jobs, job_options, train_on_cluster
from lib.experiments.command import STOPPED, Parser, command, fail
from lib.experiments.config import ConfigError, FacesConfig, RunConfig, parse_parameters
from lib.experiments.plan import duration, plan
from lib.experiments.processes import default_device, workers
from lib.experiments.profiles import faces_config, grid, profile_config
from lib.experiments.records import is_stored, run_folder
from lib.experiments.runs import get_run, train_runs
from lib.experiments.sweep import load_sweep, status, write_tables


def print_plan(configs: Sequence[RunConfig]) -> None:
    device, left = default_device(), [config for config in configs if not is_stored(config)]
    if not left:
        print(f"all {len(configs)} runs are done")
        return
    table = plan(left)
    print(table.assign(time=table["time"].map(duration)).to_string())
    print(
        f"{len(left)} of {len(configs)} runs are left, on {workers(device)} processes ({device.type}) "
        f"about {duration(table['time'].sum())}"
    )


def train(profile: str, configs: Sequence[RunConfig], jobs: Jobs | None) -> int:
    """Train missing runs, write the tables of all stored runs, and return an exit status."""
    stopped = ""
    try:
        if jobs is None:
            train_runs(configs)
        else:
            train_on_cluster(configs, jobs)
    except KeyboardInterrupt as stop:
        stopped = str(stop) or "interrupted; run the same command again to resume"
    sweep = load_sweep(profile, configs)
    for path in write_tables(sweep):
        print(path)
    print(", ".join(f"{count} {name}" for name, count in sweep.provenance["statuses"].items()))
    return fail(STOPPED, stopped) if stopped else 0


def one_config(profile: str, pairs: Sequence[tuple[str, str]]) -> Config:
    """Return the configuration of one training, on digits unless `dataset` is among the parameters."""
    digits = dict(pairs).get("dataset", "mnist") == "mnist"
    kind, make = (RunConfig, profile_config) if digits else (FacesConfig, faces_config)
    types = {name: field.annotation for name, field in kind.model_fields.items()}
    values = {"task": "denoising"} | parse_parameters(pairs, types)
    task = values.pop("task")
    config = make(profile, task, **values)
    idle = {"learning_rate", "final_learning_rate", "schedule"} & values.keys()
    if idle and getattr(config, "optimizer", "adam") == "lbfgs":
        raise ConfigError(f"`{min(idle)}` must be left out with optimizer = lbfgs.")
    # `make` replaces None by the profile's value; here it is a value, such as no `patience`.
    nothing = {name: None for name, value in values.items() if value is None}
    return kind(**dict(config) | nothing)


def train_one(config: Config) -> int:
    """Train or load one configuration, and print its first and last losses and its folder."""
    folder = run_folder(config)
    print(f"run {folder.name}: {config.model}, {config.task}, {config.dataset}", flush=True)
    run = get_run(config)
    print(f"{run.status} {run.reason}".strip())
    if len(run.history):
        shown = ["epoch", "seconds", "train_loss", "test_loss", "test_psnr"]
        rows = run.history.reindex(columns=shown).dropna(subset="test_loss")
        print(rows.iloc[sorted({0, len(rows) - 1})].to_string(index=False, float_format="{:.4g}".format))
    print(folder)
    return 0


@command
def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m lib.experiments", description=__doc__)
    parser.add_argument("command", choices=("run", "status", "plan", "train"))
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--cluster", default="none", help="none (this process), local or slurm")
    options = parser.parse(arguments, "-p", "--job")
    if options.command == "train":
        return train_one(one_config(options.profile, options.p))
    configs = grid(options.profile, **parse_parameters(options.p))
    if options.command == "run":
        return train(options.profile, configs, job_options(options.cluster, options.job))
    if options.command == "status":
        print(status(configs).to_string())
    else:
        print_plan(configs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
