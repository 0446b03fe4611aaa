"""How the cost of a training step grows with the image, the kernels, the batch and the stack."""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from lib.experiments.data import faces, mnist
from lib.figures.style import STYLE, TEXT_WIDTH, note
from lib.implicit import implicit_fixed_point
from lib.models import FixedPointModel
from lib.operators import Identity
from lib.regularizer import RELU, ConvFieldsOfExperts, DenseFieldsOfExperts, initial_weights, smoothed_sign
from lib.solvers import PlainIteration
from lib.training import generator, one_thread

SOLVER_STEPS = 10
"""Evaluations of the step map in each solve whose time is taken."""


@dataclass(frozen=True)
class Size:
    """What a training step's cost depends on.

    Attributes:
        kind: `dense` fields of experts or `convolution`.
        side: of the square images in pixels.
        batch: images in an optimizer step.
        stack: configurations that are trained together.
        filters, filter_size: number and side of the kernels of a convolution.
    """

    kind: str = "convolution"
    side: int = 64
    batch: int = 10
    stack: int = 1
    filters: int = 2
    filter_size: int = 11

    @property
    def work(self) -> float:
        """Multiplications of the two products in one evaluation of the step map."""
        pixels = self.side**2
        experts = pixels if self.kind == "dense" else self.filters * self.filter_size**2
        return 2.0 * self.stack * self.batch * pixels * experts


def problem(size: Size) -> tuple[FixedPointModel, Tensor, Tensor]:
    """A denoising model with free weights, data and true images, `(stack, batch, 1, side, side)`.

    The images are photographs, or digits for dense weights, resized to `side`.
    """
    draws = generator(0, "scaling")
    source = mnist("train", size.batch) if size.kind == "dense" else faces("train", min(size.batch, 300))
    repeated = source.repeat(math.ceil(size.batch / len(source)), 1, 1, 1)[: size.batch]
    truth = functional.interpolate(repeated, (size.side, size.side), mode="bilinear", antialias=True)
    f = (truth + 0.1 * torch.randn(truth.shape, generator=draws)).expand(size.stack, *truth.shape)

    def stacked(*weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(weight.expand(size.stack, *weight.shape).clone() for weight in weights)

    tau, lam, gamma = (torch.full((size.stack,), value) for value in (0.01, 1.0, 0.1))
    if size.kind == "dense":
        A, b, C = stacked(*initial_weights(size.side**2, draws))
        return FixedPointModel(Identity(), DenseFieldsOfExperts(A, b, C, RELU), tau, lam, gamma), f, truth
    shape = (size.filters, size.filter_size, size.filter_size)
    A, C = stacked(*(torch.randn(shape, generator=draws) / size.filter_size for _ in range(2)))
    experts = ConvFieldsOfExperts(A, C, smoothed_sign(10.0))
    return FixedPointModel(Identity(), experts, tau, lam, gamma), f, truth


def training_step(size: Size) -> Callable[[], object]:
    """One training step: both solves with `SOLVER_STEPS` evaluations, and the gradient of the weights."""
    model, f, truth = problem(size)
    solver = PlainIteration(tol=1e-30, max_steps=SOLVER_STEPS)

    def step() -> None:
        model.zero_grad()
        solution = implicit_fixed_point(model.problem(f), f, solver)
        (solution.value - truth).square().mean().backward()

    return step


@one_thread()
def seconds_per_step(size: Size, repeats: int = 5) -> float:
    """Median time of a training step on one thread, after one that is not counted."""
    return median(timeit.repeat(training_step(size), number=1, repeat=repeats + 1)[1:])


def cost_table(base: Size, axis: str, values: Sequence[int]) -> pd.DataFrame:
    """The cost of a training step along one axis.

    Args:
        base: all other sizes.
        axis: name of a field of `Size`.
        values: its values.

    Returns:
        A row per value: `ms` of a training step, `work` (millions of multiplications of one evaluation),
        `GFlop/s` of the whole step, and `exponent`, that of the growth of the time over that of the work.
    """
    changes: list[Any] = [{axis: value} for value in values]
    sizes = [replace(base, **change) for change in changes]
    table = pd.DataFrame({"work": [size.work / 1e6 for size in sizes]}, index=pd.Index(values, name=axis))
    table.insert(0, "ms", [1e3 * seconds_per_step(size) for size in sizes])
    table["GFlop/s"] = 2 * 2 * SOLVER_STEPS * table["work"] / table["ms"]
    growth = np.log(table["ms"]).diff() / np.log(table["work"]).diff()
    return table.assign(exponent=growth)


def memory_table(size: Size, solver_steps: Sequence[int]) -> pd.DataFrame:
    """Megabytes that are kept for the backward pass, by the number of solver steps.

    Returns:
        A row per number of steps: `implicit`, of the implicit gradient, and `unrolled`, of autograd through
        all steps. They are counted, not measured, and the same on every machine.
    """
    model, f, _ = problem(size)
    T = model.step_map(f)
    rows = {}
    for steps in solver_steps:
        solver = PlainIteration(tol=1e-30, max_steps=steps)
        rows[steps] = {
            "implicit": _kept_megabytes(partial(implicit_fixed_point, model.problem(f), f, solver)),
            "unrolled": _kept_megabytes(partial(reduce, lambda u, _: T(u), range(steps), f)),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("solver steps")


def _kept_megabytes(call: Callable[[], object]) -> float:
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = call()
    del kept
    return sum(storages.values()) / 1e6


def scaling_figure(tables: dict[str, pd.DataFrame], memory: pd.DataFrame, text: str) -> Figure:
    """Times over the work of each table with a line of slope one, and the memory over the solver steps.

    Args:
        tables: what `cost_table` returned, by name.
        memory: what `memory_table` returned.
        text: for the line below.
    """
    with plt.rc_context(STYLE):
        fig, (left, right) = plt.subplots(1, 2, figsize=(TEXT_WIDTH, 3.1), width_ratios=(1.5, 1))
        fig.subplots_adjust(left=0.085, right=0.99, top=0.97, bottom=0.24, wspace=0.26)
        for (name, table), marker in zip(tables.items(), "osDv^P", strict=False):
            left.loglog(table["work"], table["ms"], marker=marker, markersize=4, label=name)
        every = pd.concat(tables.values())
        work = np.array([every["work"].min(), every["work"].max()])
        ideal = 2 * 2 * SOLVER_STEPS * work / every["GFlop/s"].max()
        left.loglog(work, ideal, ":", color="0.5", label="in proportion to the work")
        left.set(xlabel="million multiplications per evaluation", ylabel="ms per training step")
        for name, style in (("implicit", "o-"), ("unrolled", "s--")):
            right.loglog(memory.index, memory[name], style, markersize=4, label=name)
        right.set(xlabel="solver steps", ylabel="MB kept for the backward pass")
        for axis in (left, right):
            axis.grid(alpha=0.3, linewidth=0.5)
            axis.legend(frameon=False)
        note(fig, text)
    return fig
