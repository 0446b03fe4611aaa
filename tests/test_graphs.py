"""Solves whose kernels do not depend on values: the same as plain ones, without a question, and replayed.

There need be no GPU: tensors of the CPU are taken for those of a device that is asked seldom, and a tape of
what was computed stands in for a CUDA graph, which is replayed into the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lib import graphs, solvers
from lib.experiments.config import ConfigError, RunConfig
from lib.experiments.trainer import Trainer
from lib.graphs import RecordedSolves
from lib.products import products_in
from lib.solvers import (
    FIRST_LOOKS,
    LOOKS_APART,
    Anderson,
    FixedPointProblem,
    PlainIteration,
    Solution,
    Solver,
    fixed_point,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"size": 7, "train_images": 40, "test_images": 20, "batch_size": 20, "epochs": 2}
SPREAD: list[dict[str, float]] = [
    {},
    {"noise": 1.0},
    {"tau": 0.9, "gamma": 1.0},
    {"tau": 2.1},
    {"gamma": 0.5},
]
"""Members whose samples converge, stagnate, diverge and come to the last step."""
SOLVERS = [Anderson(max_steps=50, patience=10), Anderson(tol=1e-5, beta=0.5), PlainIteration(max_steps=33)]
QUESTIONS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"}
"""Operations that a GPU would be waited for."""


class Asked(TorchDispatchMode):
    """Counts the questions, with those that hide in an index of booleans."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        chosen = name in ("index", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        self.count += name in QUESTIONS or chosen
        return func(*args, **kwargs or {})


class Tape(TorchDispatchMode):
    """What is computed under it, to be done again in the same memory, as a CUDA graph does.

    A graph's work is only noted at first: what an earlier part of a solve left is put back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # The memory, not a parameter that may get another one.
        args, kwargs = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, (args, kwargs or {}))
        if func._schema.is_mutable:
            target = kwargs.get("out", args[0])
            self._save(target)
        result = func(*args, **kwargs)
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        new = [t for t in tensors if t.untyped_storage().data_ptr() not in given]
        self.made |= {t.untyped_storage().data_ptr() for t in new}
        self.noted.append((func, args, kwargs, tensors))
        return result

    def _save(self, target: Tensor) -> None:
        place = target.untyped_storage().data_ptr()
        if place not in self.made and place not in self.before:
            whole = torch.empty(0, dtype=target.dtype).set_(target.untyped_storage())
            self.before[place] = whole, whole.clone()

    def put_back(self) -> None:
        for whole, kept in self.before.values():
            whole.copy_(kept)

    def replay(self) -> None:
        for func, args, kwargs, before in self.noted:
            after = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            for old, new in zip(before, after, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are taken for those of a device that is asked seldom."""
    for module in (solvers, graphs):
        monkeypatch.setattr(module, "at_once", lambda u: False)


@pytest.fixture
def taped(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """The tapes that stand in for CUDA graphs, in the order of their recording."""
    tapes: list[Tape] = []

    def record(work: Callable[[], Any], pool: object) -> tuple[Callable[[], object], Any]:
        tape = Tape()
        with tape:
            result = work()
        tape.put_back()
        tapes.append(tape)
        return tape.replay, result

    monkeypatch.setattr(graphs, "new_pool", lambda: None)
    monkeypatch.setattr(graphs, "record", record)
    return tapes


def stack(**values: Any) -> list[RunConfig]:
    return [RunConfig(**SMALL | values | more) for more in SPREAD]


def posed(task: str, model: str, seed: int) -> tuple[Trainer, Tensor]:
    """A stack of models and data for it; some are zero or so large that their solves diverge."""
    trained = Trainer(stack(task=task, model=model, sigma="relu"))
    f = torch.randn(len(SPREAD), 20, 1, 7, 7, generator=torch.Generator().manual_seed(seed))
    f[:, 3] = 0
    f[:, 4] *= 1e30
    return trained, f


def assert_same(one: Solution, other: Solution) -> None:
    """To the bit; one of them may have gone on for some evaluations after its samples had stopped."""
    for name in ("value", "residual", "steps", "status"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0, equal_nan=True)
    n = len(one.residuals)
    torch.testing.assert_close(other.residuals[:n], one.residuals, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(
        other.residuals[n:], one.residuals[-1:].expand_as(other.residuals[n:]), rtol=0, atol=0, equal_nan=True
    )


CASES = list(product(("denoising", "inpainting", "deblurring"), ("bilevel", "deq")))


@pytest.mark.parametrize(("task", "model"), CASES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_masked_form_is_the_plain_one_sample_by_sample(
    task: str, model: str, solver: Solver, request: pytest.FixtureRequest
) -> None:
    """To the bit: samples that have stopped are evaluated on and stay what they are."""
    trained, f = posed(task, model, 0)
    problem = trained.model.problem(f)
    plain = fixed_point(problem, f, solver)
    request.getfixturevalue("elsewhere")
    masked = fixed_point(problem, f, solver)
    assert plain.status.unique().numel() >= 2
    assert_same(plain, masked)


def test_between_the_looks_nothing_is_asked(elsewhere: None) -> None:
    """One question after each of the first evaluations, and then seldom: none of it hides in an index."""
    trained, f = posed("inpainting", "bilevel", 0)
    problem = trained.model.problem(f)
    with Asked() as asked:
        solution = fixed_point(problem, f, Anderson(tol=1e-30, max_steps=50))
    assert solution.steps.max() == 50
    assert asked.count == FIRST_LOOKS + (50 - 1) // LOOKS_APART - FIRST_LOOKS // LOOKS_APART


@pytest.mark.parametrize(("task", "model"), CASES)
def test_a_replayed_solve_is_a_plain_one(taped: list[Tape], task: str, model: str) -> None:
    """To the bit, for other data, other weights in the same place, and when more parts are needed."""
    trained, _ = posed(task, model, 0)
    solve = RecordedSolves(trained.model)
    for seed, scale in ((1, 1e-3), (2, 1.0), (3, 1e-3), (4, 1.0)):
        _, f = posed(task, model, seed)
        trained.model.regularizer.A.data.mul_(1 + 0.1 * seed)
        f *= scale
        for solver in SOLVERS[:2]:
            problem = trained.model.problem(f)
            plain = fixed_point(problem, f, solver)
            assert_same(plain, solve(problem, f, solver))
            recorded = len(taped)
            assert_same(plain, solve(problem, f, solver))
            assert len(taped) == recorded > 0
    assert len(solve.recordings) == 2


def test_replaced_weights_are_not_forgotten(taped: list[Tape]) -> None:
    """A recording of weights that are not the model's any more is made anew."""
    trained, f = posed("denoising", "deq", 0)
    solve, solver = RecordedSolves(trained.model), Anderson()
    solve(trained.model.problem(f), f, solver)
    before = len(taped)
    A = trained.model.regularizer.A
    A.data = A.data * 2
    problem = trained.model.problem(f)
    assert_same(fixed_point(problem, f, solver), solve(problem, f, solver))
    assert len(taped) > before


def test_a_solution_outlives_the_next_solve(taped: list[Tape]) -> None:
    """It is no part of what is replayed."""
    trained, f = posed("denoising", "deq", 0)
    solve = RecordedSolves(trained.model)
    first = solve(trained.model.problem(f), f, Anderson())
    kept = first.value.clone()
    solve(trained.model.problem(f / 2), f / 2, Anderson())
    assert torch.equal(first.value.nan_to_num(), kept.nan_to_num())


def test_what_cannot_be_recorded_is_solved_and_said(
    taped: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, in a warning; the solution is the same."""

    def fail(*arguments: object) -> object:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphs, "record", fail)
    trained, f = posed("denoising", "deq", 0)
    solve, problem = RecordedSolves(trained.model), trained.model.problem(f)
    with pytest.warns(UserWarning, match=r"^solves are not recorded as CUDA graphs .* capturing$"):
        solution = solve(problem, f, Anderson())
    assert_same(fixed_point(problem, f, Anderson()), solution)
    assert_same(solution, solve(problem, f, Anderson()))


@pytest.fixture
def as_on_a_gpu(taped: list[Tape], monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Trainer]]:
    """A trainer that records its solves, and looks at its losses once an epoch."""

    class Recording(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.solve, self.often = RecordedSolves(self.model), False

    return Recording


@pytest.mark.parametrize(
    "values",
    [
        {"task": "denoising", "model": "deq"},
        {"task": "inpainting", "model": "deq"},
        {"task": "deblurring", "model": "bilevel", "precondition": True},
        {"task": "denoising", "model": "bilevel", "precondition": True},
    ],
)
def test_a_training_with_recorded_solves_is_the_plain_one(
    values: dict[str, Any], as_on_a_gpu: type[Trainer], taped: list[Tape]
) -> None:
    """To the bit, for members that complete; one that diverges does at the same step of the same epoch."""
    configs = stack(**values)
    with pytest.MonkeyPatch.context() as patch:
        for module in (solvers, graphs):
            patch.setattr(module, "at_once", lambda u: True)
        plain = Trainer(configs).train()
    recorded = as_on_a_gpu(configs).train()
    assert len(taped) > 0
    for one, other in zip(plain, recorded, strict=True):
        assert (one.status, one.reason) == (other.status, other.reason)
        histories = [
            [{k: v for k, v in row.items() if k != "seconds"} for row in member.history]
            for member in (one, other)
        ]
        assert histories[0] == histories[1]
        if one.status == "completed":
            assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())
    assert {member.status for member in plain} >= {"completed"}


def test_an_optimizer_step_asks_nothing_beside_its_solves(
    as_on_a_gpu: type[Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read of losses and solver steps is read once an epoch, however many steps it has."""
    lists: list[object] = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: lists.append(tensor) or tolist(tensor))

    def questions(steps: int) -> tuple[int, int]:
        config = RunConfig(**SMALL | {"train_images": 20 * steps, "epochs": 1})
        trained, in_solves, solves = as_on_a_gpu([config]), 0, 0

        def solve(problem: FixedPointProblem, u0: Tensor, solver: Solver) -> Solution:
            nonlocal in_solves, solves
            before = asked.count
            solution = fixed_point(problem, u0, solver)
            in_solves, solves = in_solves + asked.count - before, solves + 1
            return solution

        trained.solve = solve
        # Adam's number of the step is on the CPU here, and on a GPU with the rest.
        trained.optimizer.step = lambda: None  # type: ignore[assignment, method-assign]
        lists.clear()
        with Asked() as asked:
            trained.train()
        return asked.count - in_solves + len(lists), solves

    (few, solves), (many, more_solves) = questions(2), questions(6)
    assert few == many > 0
    assert more_solves == solves + 2 * 4


def test_tf32_is_refused_without_a_gpu() -> None:
    """In one line, before any work."""
    config = RunConfig(**SMALL | {"precision": "tf32"})
    with pytest.raises(ConfigError, match=r"^precision: got 'tf32', allowed: float32 where there is no GPU$"):
        Trainer([config])


@pytest.mark.parametrize("left", ["ieee", "tf32"])
def test_the_precision_is_that_of_the_configuration_whatever_was_left_behind(left: str) -> None:
    """Inside what was asked for, outside what was there; also when the work fails."""
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = left
        for precision, expected in (("float32", "ieee"), ("tf32", "tf32")):
            with suppress(ZeroDivisionError), products_in(precision):
                assert [setting.fp32_precision for setting in settings] == [expected, "ieee"]
                raise ZeroDivisionError
            assert [setting.fp32_precision for setting in settings] == [left, left]
    finally:
        for setting, chosen in zip(settings, before, strict=True):
            setting.fp32_precision = chosen


def test_a_training_does_not_depend_on_the_precision_left_behind() -> None:
    """On a CPU that multiplies rounded factors where it is allowed to."""
    config = RunConfig(**SMALL | {"size": 28, "train_images": 40, "batch_size": 40, "epochs": 1})
    (expected,) = Trainer([config]).train()
    seen: list[str] = []
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        trained = Trainer([config])
        (member,) = trained.train(on_step=lambda: seen.append(torch.backends.mkldnn.matmul.fp32_precision))
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert set(seen) == {"ieee"}
    assert all(torch.equal(weight, expected.weights[name]) for name, weight in member.weights.items())
