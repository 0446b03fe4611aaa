"""Why the paper's setting stays behind total variation on photographs, and what a learned weight changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib.experiments.build import Weights, solve, trained_model
from lib.experiments.config import FacesConfig
from lib.experiments.processes import cores
from lib.experiments.profiles import OURS, faces_config, our_config
from lib.experiments.records import Run
from lib.experiments.runs import get_runs
from lib.experiments.store import Results
from lib.figures.comparison import paired_test
from lib.figures.hypergradients import exact_hypergradient, training_loss, training_problem
from lib.figures.reconstructions import test_data
from lib.figures.style import MODEL_COLORS, STYLE, TEXT_WIDTH, note
from lib.solvers import Anderson
from lib.training import one_thread, psnr

ADAM: dict[str, Any] = {"optimizer": "adam", "learning_rate": 0.02, "final_learning_rate": 2e-4}
ADAM |= {"sharpness": 100.0, "initial": "first"}
"""In the place of L-BFGS, with the paper's sharpness and first differences."""

STEPS = {
    "the paper's: random kernels": None,
    "first differences": ADAM | {"learn_weight": False, "differentiate_norm": False},
    "learned weight": ADAM | {"differentiate_norm": False},
    "through the norm": ADAM,
    "L-BFGS": {"sharpness": 100.0, "initial": "first"},
    "cosine basis": {"sharpness": 100.0},
    "twice the sharpness: ours": {},
}
"""The way from the paper's setting to ours, one step after the other."""


def get_steps(profile: str, task: str, results: Results = None, **values: Any) -> dict[str, Run]:
    """The bilevel runs of `STEPS` by name, trained where they are not stored and tested every second epoch.

    Adam takes twice as many epochs as L-BFGS, whose line search looks at two points, has iterations.

    Args:
        profile, task, values: as in `faces_config`.
    """
    epochs = our_config(profile, task, **values).epochs
    values |= {"test_every": 2}
    kernels = {name: OURS[name] for name in ("filters", "filter_size")}
    configs = []
    for changes in STEPS.values():
        if changes is None:
            configs.append(faces_config(profile, task, **values | kernels))
        else:
            doubled = {"epochs": 2 * epochs} if "optimizer" in changes else {}
            configs.append(our_config(profile, task, **values | doubled | changes))
    return dict(zip(STEPS, get_runs(configs, results), strict=True))


def steps_table(steps: Mapping[str, Run]) -> pd.DataFrame:
    """How each of them ended: `status`, `psnr` (dB) of the test images, learned `lambda`, `seconds`."""
    rows = {
        name: {"status": run.status, "psnr": run.history["test_psnr"].iloc[-1]}
        | {
            "lambda": float(run.weights.get("lam", run.config.lam)),
            "seconds": run.history["seconds"].iloc[-1],
        }
        for name, run in steps.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("image")


def psnr_by_weight(
    config: FacesConfig, kernels: Mapping[str, Weights], lams: Sequence[float]
) -> pd.DataFrame:
    """Mean PSNR (dB) over the test images of some kernels with each of some weights `lambda`.

    Args:
        config: gives the task, its images and the solver; the step follows the weight.
        kernels: normalized, by name.
        lams: the weights.

    Returns:
        A row per weight `lambda`, a column per name.
    """
    config = config.model_copy(update={"learn_weight": True})
    models = {name: "deq" if "C" in weights else "bilevel" for name, weights in kernels.items()}
    truth, f = test_data(config)

    def measured(name: str, lam: float) -> float:
        own = config.model_copy(update={"model": models[name]})
        model = trained_model(own, dict(kernels[name]) | {"lam": torch.tensor(lam)})
        with torch.no_grad():
            u = solve(model, f, own).value
        return psnr((u - truth).square().mean((-3, -2, -1))).mean().item()

    with one_thread(), ThreadPoolExecutor(cores()) as pool:
        columns = {name: pool.map(lambda lam, name=name: measured(name, lam), lams) for name in kernels}
        return pd.DataFrame(
            {name: list(values) for name, values in columns.items()}, pd.Index(lams, name="lambda")
        )


@dataclass(frozen=True)
class NormDirections:
    """What it costs to take the norm of the kernels for a constant, at the start of a training.

    Attributes:
        angle: between both gradients, in degrees.
        along: of each gradient the share that lies along the kernels, where nothing changes.
        losses: a row per step length, relative to the kernels' norm, and a column per gradient: the training
            loss after a step against it.
    """

    angle: float
    along: dict[str, float]
    losses: pd.DataFrame


@one_thread()
def norm_directions(config: FacesConfig, lengths: Sequence[float], images: int = 2) -> NormDirections:
    """Both gradients of the kernels `A` of a bilevel model, and the loss along them.

    Args:
        config: gives the kernels at the start, the data and `lambda`.
        lengths: of the steps, relative to the kernels' norm.
        images: how many of the training images the loss is taken over.
    """
    names = {"norm a constant": False, "through the norm": True}
    gradients = {}
    for name, differentiated in names.items():
        own = config.model_copy(update={"learn_weight": False, "differentiate_norm": differentiated})
        given = training_problem(own, images)
        gradients[name] = exact_hypergradient(given)
    kernels = given.model.regularizer.A
    A = kernels.detach().clone()
    constant, through = gradients.values()
    losses: dict[str, list[float]] = {name: [] for name in names}
    for name, gradient in gradients.items():
        direction = (gradient / gradient.norm() * A.norm()).view_as(A)
        for length in lengths:
            kernels.data = A - length * direction
            losses[name].append(training_loss(given, Anderson(1e-8, 1_000, memory=10)))
    cosine = torch.nn.functional.cosine_similarity(constant, through, dim=0)
    return NormDirections(
        angle=math.degrees(math.acos(cosine.clamp(-1, 1).item())),
        along={name: float((g @ A.flatten()).abs() / (g.norm() * A.norm())) for name, g in gradients.items()},
        losses=pd.DataFrame(losses, index=pd.Index(lengths, name="length")),
    )


def check_directions(norms: Mapping[str, NormDirections]) -> None:
    """Print that nothing of the true gradient lies along the kernels, whose length the norm takes away.

    Raises:
        AssertionError: something does.
    """
    for task, norm in norms.items():
        share = norm.along["through the norm"]
        assert share <= 1e-4, f"{task}: {share} of the gradient through the norm lies along the kernels"
        print(f"{task}: the gradient through the norm is orthogonal to the kernels")


def weight_figure(curves: Mapping[str, pd.DataFrame], paper: float, text: str) -> Figure:
    """PSNR over the weight, a panel per task; the paper's weight is marked.

    Args:
        curves: what `psnr_by_weight` returned, by task.
        paper: the paper's weight.
        text: for the line below.
    """
    styles = [("0.55", ":", "v"), ("0.3", "-.", "D"), (MODEL_COLORS["bilevel"], "-", "o")]
    styles += [(MODEL_COLORS["deq"], "--", "s")]
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, len(curves), figsize=(TEXT_WIDTH, 3.0), squeeze=False)
        fig.subplots_adjust(left=0.075, right=0.99, top=0.92, bottom=0.24, wspace=0.2)
        for axis, (task, table) in zip(axes[0], curves.items(), strict=True):
            for name, (color, line, marker) in zip(table, styles, strict=False):
                axis.plot(
                    table.index, table[name], line, color=color, marker=marker, markersize=3, label=name
                )
            axis.axvline(paper, color="0.7", linewidth=0.8, zorder=0)
            axis.annotate(
                "the paper's", (paper, axis.get_ylim()[0]), (2, 3), textcoords="offset points", size=7
            )
            axis.set(xscale="log", xlabel=r"weight $\lambda$ of the data", title=task)
            axis.grid(alpha=0.3, linewidth=0.5)
        axes[0, 0].set_ylabel("PSNR in dB")
        axes[0, -1].legend(frameon=False, fontsize=7, loc="lower right")
        note(fig, text)
    return fig


def steps_figure(
    steps: Mapping[str, Mapping[str, Run]], norms: Mapping[str, NormDirections], text: str
) -> Figure:
    """Above, test PSNR over the seconds of training of each of `STEPS`, a panel per task; below, the training
    loss along both gradients at the start.

    Args:
        steps: what `get_steps` returned, by task.
        norms: what `norm_directions` returned, by task.
        text: for the line below.
    """
    lines = [
        ("0.6", ":"),
        ("0.35", "-."),
        ("#009e73", (0, (5, 1))),
        ("#cc79a7", "--"),
        ("#56b4e9", "-"),
        ("#d55e00", "-."),
        ("k", "-"),
    ]
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(2, len(steps), figsize=(TEXT_WIDTH, 5.0), squeeze=False)
        fig.subplots_adjust(left=0.1, right=0.99, top=0.95, bottom=0.14, wspace=0.24, hspace=0.36)
        for axis, (task, runs) in zip(axes[0], steps.items(), strict=True):
            for (name, run), (color, line) in zip(runs.items(), lines, strict=True):
                tested = run.history.dropna(subset="test_psnr")
                axis.plot(tested["seconds"], tested["test_psnr"], color=color, linestyle=line, label=name)
            axis.set(xlabel="seconds of training", title=task)
        for axis, norm in zip(axes[1], norms.values(), strict=True):
            for name, line in (("norm a constant", "--"), ("through the norm", "-")):
                axis.plot(norm.losses.index, norm.losses[name], line, color="0.2", label=name)
            axis.set(xlabel="length of the step / norm of the kernels")
            axis.annotate(
                f"angle {norm.angle:.0f}°", (0.97, 0.06), xycoords="axes fraction", size=8, ha="right"
            )
        axes[0, 0].set_ylabel("test PSNR in dB")
        axes[1, 0].set_ylabel("training loss")
        for axis in axes[:, 0]:
            axis.legend(frameon=False, fontsize=7)
        for axis in axes.flat:
            axis.grid(alpha=0.3, linewidth=0.5)
        note(fig, text)
    return fig


def learned_kernels_figure(rows: Mapping[str, Tensor], text: str) -> Figure:
    """Kernels `(F, k, k)` in rows with their names; those of a row share a grey scale, whose middle is 0."""
    count = max(len(kernels) for kernels in rows.values())
    with plt.rc_context(STYLE):
        side = (TEXT_WIDTH - 1.6) / count
        size = (TEXT_WIDTH, len(rows) * side + 0.45)
        fig, axes = plt.subplots(len(rows), count, figsize=size, squeeze=False)
        fig.subplots_adjust(left=1.55 / size[0], right=0.99, top=1 - 0.05 / size[1], bottom=0.36 / size[1])
        for line, (name, kernels) in zip(axes, rows.items(), strict=True):
            limit = kernels.abs().max().item()
            for axis, kernel in zip(line, kernels, strict=False):
                axis.imshow(kernel, cmap="gray", vmin=-limit, vmax=limit)
                axis.set(xticks=[], yticks=[])
            line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        note(fig, text)
    return fig


def print_gain(by_photograph: Mapping[str, pd.DataFrame]) -> None:
    """Print whether a DEQ is better than bilevel learning once both have learned their weight, and the rule.

    Args:
        by_photograph: what `photographs.photograph_by_photograph` returned for ours, by task.
    """
    for task, table in by_photograph.items():
        difference = (table["psnr DEQ, ours"] - table["psnr bilevel, ours"]).groupby("photograph").median()
        test = paired_test(difference.to_numpy(float))
        answer = "YES" if test["low"] > 0 else "NO" if test["high"] < 0 else "NOT DECIDED"
        print(
            f"{answer}: {task}: does freeing C gain PSNR? {test['pairs']:.0f} photographs, median "
            f"{test['median']:+.3f} dB, 95 % interval [{test['low']:+.3f}, {test['high']:+.3f}]"
        )
    print(
        "Rule: yes when the 95 % bootstrap interval of the median difference over the photographs (of seeds\n"
        "a photograph has the median) is above zero, no when it is below, else not decided."
    )
