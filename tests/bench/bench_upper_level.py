"""Comparison of upper-level methods: L-BFGS, Adam, gradient descent, MAID and HOAG (`make bench`).

All train the same denoising model, a convex field of experts with a weight for each kernel, on the same
pieces of photographs with the same noise and start, in float64. Cost is counted in evaluations of
the step map and of its transposed Jacobian, as multiples of all images. A method is measured by its exact
training loss, computed afterwards. Rates and tolerances are chosen in the same way on a seed that is not in
the result.

Rule, written before the result: after the last evaluation, one method beats another if the 95 % interval of
the paired difference over the seeds is above 0 and its mean is at least `TIE`. To judge adaptive accuracy,
MAID is compared with gradient descent with Armijo's rule, the same method at a fixed tolerance. L-BFGS is
compared with all others.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from benches import save
from scipy import stats
from torch import Tensor
from tqdm import tqdm
from upper_level import ADJOINT, CountedModel, Problem, hoag, lower_level_solver, maid

from lib.experiments.data import photograph, split_files
from lib.figures.style import STYLE, TEXT_WIDTH
from lib.kernels import cosine_kernels
from lib.regularizer import ConvFieldsOfExperts, WeightedExperts, smoothed_sign
from lib.training import LBFGS, Adam, Training, generator, one_thread, psnr

NOISE, SHARPNESS, LAMBDA = 2 * 25 / 255, 50.0, 40.0
KERNELS, KERNEL_SIDE = 24, 5

PIECES, TUNING_PIECES = (20, 96), (8, 36)
"""Number and side of the pieces of photographs for the result, and for the choice of rates and tolerances."""

SEEDS, TUNING = (0, 1, 2, 3, 4), 100
"""Seeds of pieces and noise for the result, and for the choice of rates and tolerances."""

BUDGET = 800.0
MARKS = (0.0, 50.0, 100.0, 200.0, 400.0, 600.0, BUDGET)
"""Evaluations per training, and numbers of evaluations at which it is measured."""

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Learning rates of Adam; the first steps of other methods are as long as Adam's. L-BFGS has no rate."""

TRIED = slice(1, 4)
"""Rates that are tried first. Neighbours of the best rate follow until both are worse or the list ends."""

EXACT = 1e-8
"""Tolerance of the exact loss."""

TIE = 0.01
"""Smallest difference in dB that counts."""

CANDIDATES = [(method, tol) for method in ("L-BFGS", "descent") for tol in (1e-3, 1e-4, 1e-5)]
CANDIDATES += [("Adam", tol) for tol in (1e-2, 1e-3, 1e-4)]
CANDIDATES += [(method, tol) for method in ("MAID", "HOAG") for tol in (1e-2, 1e-4)]
"""Methods and tolerances, the initial ones for MAID and HOAG. In short trials L-BFGS and descent did not
leave their start at 1e-2, where Adam was fastest."""

LINE_STYLES = {"L-BFGS": ("k", "-", "o"), "Adam": ("#0072b2", "-.", "s"), "HOAG": ("#56b4e9", ":", "v")}
LINE_STYLES |= {"descent": ("#999999", "-", "D"), "MAID": ("#d55e00", "--", "^")}
"""Color, line and marker of each method."""


class Spent(Exception):
    """Raised when a method has used all evaluations."""


@dataclass(frozen=True)
class State:
    """Parameters after an upper-level iteration, and their cost so far."""

    evaluations: float
    seconds: float
    theta: Tensor


def make_problem(seed: int) -> Problem:
    draws, pieces = generator(seed, "pieces"), []
    count, side = TUNING_PIECES if seed == TUNING else PIECES
    photographs = [path for files in split_files("natural").values() for path in files]
    for index in torch.randint(len(photographs), (count,), generator=draws).tolist():
        picture = photograph(photographs[index], changes={}).squeeze(0)
        top, left = (int(torch.randint(n - side + 1, (), generator=draws)) for n in picture.shape[-2:])
        pieces.append(picture[:, top : top + side, left : left + side])
    A, t = cosine_kernels(KERNELS, KERNEL_SIDE).double(), torch.zeros(KERNELS, dtype=torch.float64)
    experts = ConvFieldsOfExperts(A, WeightedExperts(t), smoothed_sign(SHARPNESS))
    return Problem(CountedModel(experts, LAMBDA), torch.stack(pieces).double(), NOISE, seed)


def train(
    method: str, tol: float, rate: float, problem: Problem, seed: int, on_iteration: Callable[[], None]
) -> None:
    """Run a method until `on_iteration` raises an exception or the loss is not finite."""
    length = rate * len(problem.theta()) ** 0.5
    if method in ("MAID", "descent"):
        maid(problem, tol, length, on_iteration, adaptive=method == "MAID")
    elif method == "HOAG":
        hoag(problem, tol, length, on_iteration)
    else:
        Training(
            problem.model,
            problem.images,
            NOISE,
            epochs=10**6,
            optimizer=LBFGS() if method == "L-BFGS" else Adam(rate),
            solver=lower_level_solver(tol),
            adjoint=lower_level_solver(ADJOINT * tol),
            precondition=True,
            warm_start=True,
            seed=seed,
        ).run(on_epoch=lambda training: on_iteration())


@one_thread()
def measure(method: str, tol: float, rate: float, seed: int) -> list[dict[str, Any]]:
    """Return a row for each mark, with the exact loss of the last parameters within its evaluations."""
    problem = make_problem(seed)
    path, start = [State(0.0, 0.0, problem.theta())], time.process_time()

    def on_iteration() -> None:
        evaluations = problem.model.evaluations
        path.append(State(evaluations, time.process_time() - start, problem.theta()))
        if evaluations > BUDGET:
            raise Spent

    ended = "diverged"
    try:
        train(method, tol, rate, problem, seed, on_iteration)
    except Spent:
        ended = "spent"
    rows = []
    for mark in MARKS:
        index, state = max((i, state) for i, state in enumerate(path) if state.evaluations <= mark)
        problem.move(state.theta)
        loss = problem.loss(EXACT).loss
        rows.append(
            {"method": method, "tol": tol, "seed": seed, "evaluations": mark}
            | {"rate": float("nan") if method == "L-BFGS" else rate, "iterations": index}
            | {"seconds": state.seconds, "loss": loss}
            | {"dB": psnr(torch.tensor(loss)).item(), "ended": ended}
        )
    return rows


def tune() -> pd.Series:
    """Return the final PSNR by method, tolerance and rate, on the seed of the tuning."""
    dB: dict[tuple[str, float, float], float] = {}

    def attempt(method: str, tol: float, rate: float) -> None:
        if (method, tol, rate) not in dB:
            dB[method, tol, rate] = measure(method, tol, rate, TUNING)[-1]["dB"]

    for method, tol in tqdm(CANDIDATES, desc="rates"):
        for rate in RATES[:1] if method == "L-BFGS" else RATES[TRIED]:
            attempt(method, tol, rate)
    for method in sorted(LINE_STYLES.keys() - {"L-BFGS"}):
        tried = 0
        while tried < len(dB):
            tried = len(dB)
            _, tol, rate = max((key for key in dB if key[0] == method), key=lambda key: dB[key])
            index = RATES.index(rate)
            for neighbour in RATES[max(index - 1, 0) : index + 2]:
                attempt(method, tol, neighbour)
    return pd.Series(dB, name="dB").rename_axis(["method", "tol", "rate"])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return each method's final values, and the leads of MAID and L-BFGS with 95 % intervals."""
    final = table[table["evaluations"] == BUDGET]
    by_seed = final.pivot_table(index="seed", columns="method", values="dB")
    means = final.groupby("method")[["tol", "rate", "iterations", "seconds", "dB"]].mean()
    for leader in ("MAID", "L-BFGS"):
        ahead = -by_seed.sub(by_seed[leader], axis=0)
        half = stats.t.ppf(0.975, len(ahead) - 1) * ahead.sem()
        means[f"{leader} ahead"] = ahead.mean()
        means[f"{leader} low"], means[f"{leader} high"] = ahead.mean() - half, ahead.mean() + half
    return means


def draw(table: pd.DataFrame, tuning: pd.Series) -> bytes:
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(TEXT_WIDTH, 2.7), sharey=True, layout="constrained"
        )
        for method, (color, style, marker) in LINE_STYLES.items():
            mean = table[table["method"] == method].groupby("evaluations")[["seconds", "dB"]].mean()
            look: dict[str, Any] = {"color": color, "linestyle": style, "label": method}
            look |= {"marker": marker, "markersize": 3, "linewidth": 1.2}
            left.plot(mean.index, mean["dB"], **look)
            middle.plot(mean["seconds"], mean["dB"], **look)
            best = tuning[method].groupby("tol").max()
            right.semilogx(best.index, best, **look)
        left.set(xlabel="evaluations", ylabel="training PSNR, dB", title="five seeds")
        middle.set(xlabel="seconds of one core", title="five seeds")
        right.set(xlabel="tolerance, fixed or first", title="tuning: after all evaluations")
        left.set_ylim(bottom=table.loc[table["evaluations"] == 0, "dB"].mean())
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=len(LINE_STYLES))
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=200, metadata={"Software": None})
        plt.close(figure)
    return content.getvalue()


def main() -> None:
    tuning = tune()
    save("upper_level_tuning", tuning.to_frame(), digits=5, seed=TUNING)
    chosen = sorted(tuning.groupby("method").idxmax())
    rows: list[dict[str, Any]] = []
    for seed in tqdm(SEEDS, desc="upper level"):
        for method, tol, rate in chosen:
            rows += measure(method, tol, rate, seed)
    table = pd.DataFrame(rows)
    save("upper_level", table.set_index(["method", "tol", "seed", "evaluations"]), digits=6)
    pictures = {"upper_level.png": draw(table, tuning)}
    save("upper_level_summary", summary(table), digits=6, pictures=pictures, tie=TIE)


if __name__ == "__main__":
    main()
