"""Upper-level methods side by side: L-BFGS, Adam, gradient descent, MAID and HOAG (`make bench`).

All train the same denoising model, a convex field of experts with a weight for each kernel, on the same
pieces of photographs with the same noise and start, in float64. The currency is the number of evaluations of
the step map and of its transposed Jacobian, as multiples of all images. A method is measured by its exact
training loss, computed afterwards. Rates and tolerances are chosen in the same way on a seed that is not in
the result.

Rule, written before the result: after the last evaluation, one method beats another if the 95 % interval of
the paired difference over the seeds is above 0 and its mean is at least `TIE`. Adaptive accuracy is judged by
MAID beside gradient descent with Armijo's rule, the same method at a fixed tolerance; the quasi-Newton method
by L-BFGS beside all others.
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

from lib.experiments.data import FACE_IMAGES, FACE_TRAIN_PEOPLE, faces
from lib.figures.style import STYLE, TEXT_WIDTH
from lib.kernels import cosine_kernels
from lib.regularizer import ConvFieldsOfExperts, WeightedExperts, smoothed_sign
from lib.training import LBFGS, Adam, Training, generator, one_thread, psnr

NOISE, SHARPNESS, LAMBDA = 2 * 25 / 255, 50.0, 40.0
KERNELS, KERNEL_SIDE, IMAGES, SIDE = 24, 5, 8, 36

SEEDS, TUNING = (0, 1, 2, 3, 4), 100
"""Seeds of pieces and noise: of the result, and of the choice of rates and fixed tolerances."""

BUDGET = 800.0
MARKS = (0.0, 50.0, 100.0, 200.0, 400.0, 600.0, BUDGET)
"""Evaluations that a method has, and those after which it is measured."""

RATES = (0.003, 0.01, 0.03)
"""Learning rates of Adam; the others' first steps are as long as Adam's. L-BFGS has none."""

EXACT = 1e-8
"""Tolerance of the exact loss."""

TIE = 0.01
"""Difference in dB that counts, whatever its interval."""

LINES = [(method, tol) for method in ("L-BFGS", "descent") for tol in (1e-3, 1e-4, 1e-5)]
LINES += [("Adam", tol) for tol in (1e-2, 1e-3, 1e-4)]
LINES += [(method, tol) for method in ("MAID", "HOAG") for tol in (1e-2, 1e-4)]
"""Methods with their tolerance, the first one where it changes. In short trials L-BFGS and descent did not
leave their start at 1e-2, where Adam was fastest."""

LOOKS = {"L-BFGS": ("k", "-"), "MAID": ("#d55e00", "--"), "Adam": ("#0072b2", "-.")}
LOOKS |= {"descent": ("#999999", "-"), "HOAG": ("#56b4e9", ":")}


class Spent(Exception):
    """End of a method whose evaluations are spent."""


@dataclass(frozen=True)
class State:
    """Parameters after an upper-level iteration, and their cost so far."""

    evaluations: float
    seconds: float
    theta: Tensor


def make_problem(seed: int) -> Problem:
    draws, photographs = generator(seed, "pieces"), faces("train", FACE_TRAIN_PEOPLE * FACE_IMAGES)
    pieces = []
    for index in torch.randperm(len(photographs), generator=draws)[:IMAGES]:
        picture = photographs[index]
        top, left = (int(torch.randint(n - SIDE + 1, (), generator=draws)) for n in picture.shape[-2:])
        pieces.append(picture[:, top : top + SIDE, left : left + SIDE])
    A, t = cosine_kernels(KERNELS, KERNEL_SIDE).double(), torch.zeros(KERNELS, dtype=torch.float64)
    experts = ConvFieldsOfExperts(A, WeightedExperts(t), smoothed_sign(SHARPNESS))
    return Problem(CountedModel(experts, LAMBDA), torch.stack(pieces).double(), NOISE, seed)


def train(
    method: str, tol: float, rate: float, problem: Problem, seed: int, on_iteration: Callable[[], None]
) -> None:
    """Run a method until `on_iteration` raises an exception, or for as long as its loss is finite."""
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
    """Return a row for each mark: the exact loss of the last parameters that cost no more."""
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
            {"method": method, "tol": tol, "seed": seed, "evaluations": mark, "rate": rate}
            | {"iterations": index, "seconds": state.seconds, "loss": loss}
            | {"dB": psnr(torch.tensor(loss)).item(), "ended": ended}
        )
    return rows


def tune() -> pd.DataFrame:
    """Return the dB at the end of each line for each rate, on the seed of the tuning."""
    rows = []
    for method, tol in tqdm(LINES, desc="rates"):
        for rate in RATES[: 1 if method == "L-BFGS" else None]:
            rows.append(measure(method, tol, rate, TUNING)[-1])
    return pd.DataFrame(rows).pivot_table(index=["method", "tol"], columns="rate", values="dB")


def summary(table: pd.DataFrame, best: dict[str, float]) -> pd.DataFrame:
    """Return each line's dB at the end, and how far MAID and L-BFGS are ahead of it, with 95 % intervals."""
    final = table[table["evaluations"] == BUDGET]
    by_seed = final.pivot_table(index="seed", columns=["method", "tol"], values="dB")
    cost = final.groupby(["method", "tol"])[["iterations", "seconds"]].mean()
    rows = []
    for method, tol in LINES:
        row = {"method": method, "tol": tol, "chosen": best[method] == tol, **cost.loc[(method, tol)]}
        row["dB"] = by_seed[method, tol].mean()
        for leader in ("MAID", "L-BFGS"):
            ahead = by_seed[leader, best[leader]] - by_seed[method, tol]
            half = stats.t.ppf(0.975, len(ahead) - 1) * ahead.sem()
            row |= {f"{leader} ahead": ahead.mean(), f"{leader} low": ahead.mean() - half}
            row |= {f"{leader} high": ahead.mean() + half}
        rows.append(row)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, best: dict[str, float]) -> bytes:
    with plt.rc_context(STYLE):
        figure, (left, middle, right) = plt.subplots(
            1, 3, figsize=(TEXT_WIDTH, 2.5), sharey=True, layout="constrained"
        )
        for method, (color, style) in LOOKS.items():
            lines = table[table["method"] == method]
            run = lines[lines["tol"] == best[method]]
            mean = run.groupby("evaluations")[["seconds", "dB"]].mean()
            look: dict[str, Any] = {"color": color, "linestyle": style, "label": method}
            left.plot(mean.index, mean["dB"], **look)
            middle.plot(mean["seconds"], mean["dB"], **look)
            final = lines[lines["evaluations"] == BUDGET].groupby("tol")["dB"].mean()
            right.semilogx(final.index, final, marker="o", markersize=3, **look)
        left.set(xlabel="evaluations", ylabel="training PSNR, dB")
        middle.set(xlabel="seconds of one core")
        right.set(xlabel="tolerance, fixed or first")
        left.legend(loc="lower right")
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=200, metadata={"Software": None})
        plt.close(figure)
    return content.getvalue()


def main() -> None:
    tuning = tune()
    save("upper_level_tuning", tuning, digits=5, seed=TUNING)
    rates = tuning.idxmax(axis=1)
    best = dict(tuning.max(axis=1).sort_values().index)
    rows: list[dict[str, Any]] = []
    for seed in tqdm(SEEDS, desc="upper level"):
        for method, tol in LINES:
            rows += measure(method, tol, rates[method, tol], seed)
    table = pd.DataFrame(rows)
    save("upper_level", table.set_index(["method", "tol", "seed", "evaluations"]), digits=6)
    final = summary(table, best).set_index(["method", "tol"])
    pictures = {"upper_level.png": draw(table, best)}
    save("upper_level_summary", final, digits=6, pictures=pictures, tie=TIE)


if __name__ == "__main__":
    main()
