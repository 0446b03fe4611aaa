"""Costs by size: sizes are what they say, memory is counted, bad sizes are refused."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
import torch

from lib.figures import scaling
from lib.figures.scaling import SOLVER_STEPS, Size, cost_table, memory_table, problem, training_step

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Size(side=12, batch=2, filters=3, filter_size=3)


@pytest.mark.parametrize("size", [SMALL, Size(side=20, batch=3, stack=2), Size("dense", 7, 5, stack=4)])
def test_a_problem_has_its_size(size: Size) -> None:
    """Images, stack and weights; the work is the number of multiplications of both products."""
    model, f, truth = problem(size)
    assert f.shape == (size.stack, size.batch, 1, size.side, size.side)
    assert truth.shape == f.shape[1:]
    A, C = model.regularizer.A, model.regularizer.C
    assert C is not None
    assert A.shape == C.shape
    pixels = size.side**2
    if size.kind == "dense":
        assert A.shape == (size.stack, pixels, pixels)
        assert size.work == 2 * size.stack * size.batch * pixels * pixels
    else:
        assert A.shape == (size.stack, size.filters, size.filter_size, size.filter_size)
        assert size.work == 2 * size.stack * size.batch * pixels * size.filters * size.filter_size**2


def test_a_step_takes_its_solver_steps_and_leaves_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each solve evaluates `SOLVER_STEPS` times, and the weights get a gradient."""
    made = problem(SMALL)
    monkeypatch.setattr(scaling, "problem", lambda size: made)
    counts = {"forward": 0, "backward": 0}
    model = made[0]
    synthesis, adjoint = model.regularizer.synthesis, model.regularizer.adjoint_analysis

    def counted(name: str, call: Any) -> Any:
        def counting(*arguments: Any) -> Any:
            counts[name] += 1
            return call(*arguments)

        return counting

    monkeypatch.setattr(model.regularizer, "synthesis", counted("forward", synthesis))
    monkeypatch.setattr(model.regularizer, "adjoint_analysis", counted("backward", adjoint))
    training_step(SMALL)()
    assert counts == {"forward": SOLVER_STEPS + 1, "backward": SOLVER_STEPS}
    for parameter in model.regularizer.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0


def test_the_table_is_of_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates and exponents follow from the times; a time in proportion to the work has the exponent one."""
    monkeypatch.setattr(scaling, "seconds_per_step", lambda size: 1e-9 * size.work)
    table = cost_table(SMALL, "side", [8, 16, 64])
    assert table.index.name == "side"
    assert table["ms"].tolist() == pytest.approx([table["work"][side] for side in (8, 16, 64)])
    assert table["GFlop/s"].tolist() == pytest.approx([4 * SOLVER_STEPS] * 3)
    assert math.isnan(table["exponent"].iloc[0])
    assert table["exponent"].iloc[1:].tolist() == pytest.approx([1, 1])


def test_the_memory_of_the_implicit_gradient_is_constant() -> None:
    """Autograd through all steps keeps the experts of every step."""
    steps = [1, 2, 8]
    table = memory_table(SMALL, steps)
    assert table["implicit"].nunique() == 1
    growth = table["unrolled"].diff().iloc[1:] / pd.Series(steps, index=steps).diff().iloc[1:]
    experts = 4 * SMALL.batch * SMALL.filters * SMALL.side**2 / 1e6
    assert (growth >= experts).all()
    assert growth.iloc[0] == pytest.approx(growth.iloc[1], rel=0.2)


def test_the_figure_shows_the_tables() -> None:
    times = pd.DataFrame({"ms": [1.0, 2.0], "work": [1.0, 4.0], "GFlop/s": [1.0, 2.0]}, index=[1, 2])
    memory = pd.DataFrame({"implicit": [1.0, 1.0], "unrolled": [1.0, 2.0]}, index=[1, 2])
    fig = scaling.scaling_figure({"side": times}, memory, "a note")
    left, right = fig.axes
    assert left.lines[0].get_xydata() == pytest.approx(torch.tensor([[1.0, 1.0], [4.0, 2.0]]).numpy())
    assert [line.get_label() for line in right.lines] == ["implicit", "unrolled"]
    assert any("a note" in text.get_text() for text in fig.texts)
