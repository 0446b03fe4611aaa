"""Reconstructions of test images by several models, their quality and their checks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import skimage
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib.experiments.build import Config, load_images, make_operator, solve
from lib.experiments.processes import default_device, workers
from lib.experiments.profiles import ARMS, profile_config, profile_seeds
from lib.experiments.records import COMMITTED, Run
from lib.experiments.runs import find_runs, get_runs
from lib.experiments.store import RESULTS, Results
from lib.experiments.sweep import NOT_RUN
from lib.figures.style import ARM_NAMES, STYLE, TEXT_WIDTH, budget, note
from lib.solvers import Status
from lib.training import COMPLETED, TEST_BATCH, generator, observe, one_thread, psnr


@dataclass(frozen=True)
class Reconstructions:
    """Test images, their data and their reconstructions; images are `(N, H, W)` in [-1, 1].

    Attributes:
        runs: the run of each model.
        truth: `u`.
        observed: `f = K u + noise`.
        outputs: the fixed point `u*` of each model.
        table: a row for the input and for each model, means over the test images: `psnr` (dB), `ssim`,
            `mse`, and of the solves `steps`, `residual` and the share `unconverged`.
    """

    runs: Mapping[str, Run]
    truth: Tensor
    observed: Tensor
    outputs: dict[str, Tensor]
    table: pd.DataFrame


def test_data(config: Config) -> tuple[Tensor, Tensor]:
    """Return the test images `u` and their data `f`, `(N, 1, H, W)`, the same in every epoch and figure."""
    truth, n = load_images(config)["test"], generator(config.seed, "test noise")
    return truth, observe(make_operator(config), truth, torch.tensor(config.noise), n)


@one_thread()
def reconstruct(runs: Mapping[str, Run]) -> Reconstructions:
    """Reconstruct the runs' common test set from the same data with each model, and measure."""
    first, device = next(iter(runs.values())), default_device()
    truth, observed = test_data(first.config)
    # The batches of the training's evaluation give the same numbers to the bit.
    batches = [f[None].to(device) for f in observed.split(TEST_BATCH)]

    @torch.no_grad()
    def measured(run: Run) -> tuple[Tensor, dict[str, float]]:
        model = run.model(stacked=True).to(device)
        solutions = [solve(model, f, run.config) for f in batches]
        u = torch.cat([solution.value[0] for solution in solutions]).cpu()
        status = torch.cat([solution.status[0] for solution in solutions])
        means = {
            field: torch.cat([getattr(s, field)[0] for s in solutions]).double().mean().item()
            for field in ("steps", "residual")
        }
        unconverged = (status != Status.CONVERGED).double().mean().item()
        return u, _quality(u, truth) | means | {"unconverged": unconverged}

    rows = {"input": _quality(observed, truth)}
    outputs = {}
    with ThreadPoolExecutor(workers(device)) as pool:
        for name, (u, row) in zip(runs, pool.map(measured, runs.values()), strict=True):
            outputs[name], rows[name] = u.squeeze(1), row
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("image")
    return Reconstructions(runs, truth.squeeze(1), observed.squeeze(1), outputs, table)


def image_quality(images: Tensor, truth: Tensor) -> dict[str, Any]:
    """Return PSNR (dB), SSIM and mean squared error, `(N,)` each, of images `(N, 1, H, W)`."""
    mse = (images - truth).square().mean((-3, -2, -1))
    pairs = zip(images[:, 0].numpy(), truth[:, 0].numpy(), strict=True)
    ssim = [skimage.metrics.structural_similarity(u, v, data_range=2) for u, v in pairs]
    return {"psnr": psnr(mse), "ssim": np.array(ssim), "mse": mse}


def _quality(images: Tensor, truth: Tensor) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in image_quality(images, truth).items()}


def with_images(result: Reconstructions, name: str, images: Tensor) -> Reconstructions:
    """Return the result together with another method's reconstructions, `(N, 1, H, W)`."""
    table = result.table.copy()
    table.loc[name] = pd.Series(_quality(images, result.truth[:, None]))
    return replace(result, outputs=result.outputs | {name: images.squeeze(1)}, table=table)


def training_table(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return the status, time and losses of each run for a page."""
    last = [run.history.iloc[-1] if len(run.history) else pd.Series(dtype=float) for run in runs.values()]
    table = pd.DataFrame(last, index=list(runs)).reindex(columns=["seconds", "train_loss", "test_loss"])
    table.insert(0, "ending", [ending(run) for run in runs.values()])
    return shown(table)


def ending(run: Run) -> str:
    """Return the status of a run, with the epoch of a training that ended early."""
    return " in ".join([run.status, *re.findall(r"epoch \d+", run.reason)])


TITLES = {"psnr": "PSNR, dB", "ssim": "SSIM", "steps": "solver steps", "unconverged": "share unconverged"}
TITLES |= {"ending": "training", "seconds": "time, s", "train_loss": "training loss"}
TITLES |= {"test_loss": "test loss", "bilevel": "bilevel, dB", "deq": "DEQ, dB", "ahead": "ahead, dB"}
TITLES |= {"deq tied": "DEQ from C = A, dB", "tied ahead": "DEQ from C = A ahead, dB"}
TITLES |= {"low": "95 % interval from, dB", "high": "to, dB"}
DIGITS = {"ssim": 3, "steps": 0, "seconds": 0, "train_loss": 4, "test_loss": 4}
"""Titles of columns on a page, and their numbers of digits if not two."""


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table's columns in `TITLES` for a page: rounded, with units, and without empty cells."""

    def text(value: str | float, digits: int) -> str:
        if isinstance(value, str):
            return value
        # Adding zero removes the sign of a negative zero.
        return "–" if math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"

    columns = {TITLES[n]: [text(v, DIGITS.get(n, 2)) for v in table[n]] for n in table if n in TITLES}
    return pd.DataFrame(columns, table.index)


SPREAD = 4.0
"""Largest distance of two solves of a test set, in tolerances: eight times that of AVX2 from no AVX."""


def keeps_loss(result: Reconstructions, name: str, loss: float, unconverged: float) -> bool:
    """Return whether a run's weights give the test loss of its training, on any processor.

    Fixed points that are `d` apart in root mean square have losses `l` at most `d (2 sqrt(l) + d)` apart.
    Solves that did not converge, now or in training (`unconverged`), define none.
    """
    measured = result.table.loc[name]
    apart = SPREAD * result.runs[name].config.tol
    allowed = apart * (2 * math.sqrt(loss) + apart)
    return bool(max(measured.unconverged, unconverged) > 0 or abs(measured.mse - loss) <= allowed)


def get_runs_of_seeds(
    profile: str, task: str, seeds: int | None, results: Results = None, train: bool = True, **values: Any
) -> tuple[dict[str, Run], dict[str, list[Run]]]:
    """Return each arm's first run and its runs for all seeds, trained together so that no core waits.

    Args:
        profile, task, values: as in `profile_config`.
        seeds: number of seeds, starting with the one in `values`; the profile's number when None.
        train: False takes only stored or committed runs, and leaves out our arm if it has none.
    """
    numbers = range(values["seed"], values["seed"] + profile_seeds(profile, seeds))
    configs = {
        arm: [profile_config(profile, task, **values | chosen | {"seed": number}) for number in numbers]
        for arm, chosen in ARMS.items()
    }
    if not train and find_runs(configs["deq tied"][:1], results) == [None]:
        del configs["deq tied"]
    of_seeds = runs_by_seed(configs, results, train)
    return {arm: same[0] for arm, same in of_seeds.items()}, of_seeds


def runs_by_seed(
    configs: Mapping[str, Sequence[Config]], results: Results = None, train: bool = True, weights: int = 1
) -> dict[str, list[Run]]:
    """Return the runs of several seeds by name.

    Args:
        configs: by name, in the order of their seeds.
        train: False takes only stored or committed runs; missing ones are "not run".
        weights: number of first seeds whose runs must exist, with weights.

    Raises:
        ConfigError: `train` is False, and a run that must exist is missing.
    """
    first = [config for same in configs.values() for config in same[:weights]]
    later = [config for same in configs.values() for config in same[weights:]]
    if train:
        runs = get_runs([*first, *later], results)
    else:
        histories = zip(later, find_runs(later, results, weights=False), strict=True)
        lacking = [run or Run("", config, NOT_RUN, "", pd.DataFrame(), {}, {}) for config, run in histories]
        runs = [*get_runs(first, results, train), *lacking]
    by_config = dict(zip([*first, *later], runs, strict=True))
    return {name: [by_config[config] for config in same] for name, same in configs.items()}


def later_seeds(runs: Mapping[str, Sequence[Run]], first: int = 1) -> dict[str, Run]:
    """Return the runs of all seeds but the first ones by model and seed, without missing ones."""
    later = [(model, run) for model, same in runs.items() for run in same[first:] if run.status != NOT_RUN]
    return {f"{model}, seed {run.config.seed}": run for model, run in later}


def seed_by_seed(runs: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """Return the final `test_psnr` (dB) of each arm and seed, and the DEQs' gains over bilevel.

    A run that did not complete has its `ending` instead of a number, such as `diverged in epoch 3`.
    """

    def cell(run: Run) -> Any:
        return run.history["test_psnr"].iloc[-1] if run.status == COMPLETED else ending(run)

    columns = {arm: {run.config.seed: cell(run) for run in same} for arm, same in runs.items()}
    table = pd.DataFrame(columns).rename_axis("seed")
    numbers = table.apply(pd.to_numeric, errors="coerce")
    for arm, column in {"deq": "ahead", "deq tied": "tied ahead"}.items():
        if arm in table:
            table[column] = numbers[arm] - numbers["bilevel"]
    return table


def committed_seeds(name: str) -> pd.DataFrame:
    """Return the committed table over seeds of a figure at `overnight` (see `seed_by_seed`)."""
    table = pd.read_csv(RESULTS / COMMITTED["overnight"] / name / "seeds.csv")
    table = table.set_index([column for column in ("kernels", "seed") if column in table])
    numbers = table.apply(pd.to_numeric, errors="coerce").astype(object)
    return pd.DataFrame(numbers.where(numbers.notna(), table))


def check_weights(runs: Mapping[str, Run]) -> None:
    """Check that only the DEQs have a `C` of their own, and print the results."""
    for name, run in runs.items():
        assert ("C" in run.weights) == (run.config.model == "deq"), f"{name}: weights"
        print(f"{name}: C is {'a parameter of its own' if 'C' in run.weights else 'tied to A'}")


def check_reconstructions(result: Reconstructions) -> None:
    """Check the noise, weights and test losses of reconstructions, and print the results."""
    config = next(iter(result.runs.values())).config
    operator = make_operator(config)
    noise = (result.observed[:, None] - operator.forward(result.truth[:, None])).std().item()
    # Four standard deviations of the estimate, or a percent.
    allowed = max(0.01, 4 / math.sqrt(2 * result.truth.numel())) * config.noise
    assert abs(noise - config.noise) <= allowed, f"noise in the input: {noise}"
    level = f"{config.noise:g} ({127.5 * config.noise:.4g} of 255)"
    print(f"the input is K u + noise, standard deviation {level}")
    check_weights(result.runs)
    for name, run in result.runs.items():
        if run.status == COMPLETED:
            loss, unconverged = run.history[["test_loss", "test_unconverged"]].iloc[-1]
            kept = keeps_loss(result, name, loss, unconverged)
            assert kept, f"{name}: loss {result.table.mse[name]}, in training {loss}"
    print("where all its solves converge, a picture has the test loss that its training ended with")


def reconstruction_figure(result: Reconstructions, rows: Sequence[str], profile: str, count: int) -> Figure:
    """Draw the first test images in rows (`truth`, `input`, `K output`, `output`), one block per arm."""
    with plt.rc_context(STYLE):
        arms = list(result.runs)
        # Digits are squares.
        side = (0.905 * TEXT_WIDTH / len(arms)) / count
        size = (TEXT_WIDTH, 1.02 * side * len(rows) + 0.85)
        fig, axes = plt.subplots(len(rows), len(arms), figsize=size, squeeze=False)
        fig.subplots_adjust(wspace=0.03, hspace=0.06, left=0.09, right=0.995)
        fig.subplots_adjust(top=1 - 0.4 / fig.get_figheight(), bottom=0.42 / fig.get_figheight())
        before, operator = result.table.loc["input"], make_operator(result.runs[arms[0]].config)
        for column, arm in zip(axes.T, arms, strict=True):
            images = {
                "truth": result.truth,
                "input": result.observed,
                "K output": operator.forward(result.outputs[arm][:, None])[:, 0],
                "output": result.outputs[arm],
            }
            for axis, row in zip(column, rows, strict=True):
                strip = torch.cat(list(images[row][:count]), dim=-1)
                axis.imshow(strip, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
            after = result.table.loc[arm]
            column[0].set_title(f"{ARM_NAMES[arm]}\n{after.psnr:.1f} dB, SSIM {after.ssim:.2f}")
        for axis, row in zip(axes[:, 0], rows, strict=True):
            axis.set_ylabel(row.replace("K", "$K$"), rotation=0, ha="right", va="center")
        missing = "".join(f"; {name}: not run" for arm, name in ARM_NAMES.items() if arm not in arms)
        said = f"input {before.psnr:.1f} dB, SSIM {before.ssim:.2f}; "
        note(fig, said + budget(next(iter(result.runs.values())), profile) + missing)
    return fig
