"""Training: reproducibility, independent members of a stack, statuses and checkpoints."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import HEIGHT, OPERATORS, PIXELS, WIDTH
from torch import Tensor

from lib import training
from lib.implicit import NeumannSeries
from lib.models import FixedPointModel
from lib.regularizer import (
    RELU,
    ConvFieldsOfExperts,
    DenseFieldsOfExperts,
    LearnedSpline,
    TiedOnKernel,
    smoothed_sign,
)
from lib.solvers import Anderson, PlainIteration
from lib.training import LBFGS, Adam, History, Training, generator, observe, psnr, train

IMAGES = torch.linspace(-1, 1, WIDTH).expand(24, 1, HEIGHT, WIDTH) * torch.linspace(-1, 1, 24).view(
    -1, 1, 1, 1
)
TRAIN, TEST = IMAGES[::2], IMAGES[1::2]
NOISES, GAMMAS = (0.2, 0.4, 0.6), (0.1, 0.3, 0.2)
PLAIN = PlainIteration(tol=1e-3, max_steps=60)


def make_model(
    kind: str = "dense", operator: str = "blur", members: Sequence[int] | None = (0, 1, 2), **values: Any
) -> FixedPointModel:
    """Return a stack of equal weights with a `gamma` per member; a single model if `members` is None."""
    draws = generator(0, "weights")
    stack = () if members is None else (len(members),)
    gamma = torch.tensor(GAMMAS[0] if members is None else [GAMMAS[i] for i in members])
    numbers = {"tau": torch.full(stack, 0.05), "lam": torch.full(stack, 5.0), "gamma": gamma} | values

    def stacked(*shape: int) -> Tensor:
        return (0.1 * torch.randn(shape, generator=draws)).expand(*stack, *shape).clone()

    K = OPERATORS[operator]()
    if kind == "kernels":
        field = ConvFieldsOfExperts(
            stacked(3, 3, 3), stacked(3, 3, 3), smoothed_sign(2), stacked(1, 1, HEIGHT, WIDTH), True
        )
        return FixedPointModel(K, field, **numbers, learn_weight=True)
    A, b, C = stacked(PIXELS, PIXELS), stacked(PIXELS), stacked(PIXELS, PIXELS)
    on_kernel = TiedOnKernel(K, C.unflatten(-1, (1, HEIGHT, WIDTH)))
    synthesis = {"tied": None, "dense": C, "on kernel": on_kernel}[kind]
    return FixedPointModel(K, DenseFieldsOfExperts(A, b, synthesis, RELU), **numbers)


def make_training(kind: str = "dense", members: Sequence[int] | None = (0, 1, 2), **options: Any) -> Training:
    names = ("operator", "tau", "lam")
    model = make_model(
        kind, members=members, **{name: options.pop(name) for name in names if name in options}
    )
    if kind == "kernels":
        model.double()
    noise = NOISES[0] if members is None else torch.tensor([NOISES[i] for i in members], dtype=torch.float64)
    defaults: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 5,
        "optimizer": Adam(0.01, 1e-3),
        "solver": Anderson(1e-3, 30),
    }
    images = {"images": TRAIN.to(model.tau), "test": TEST.to(model.tau)}
    return Training(model, noise=noise, **images | defaults | options)


CASES: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "inpainting": {"kind": "dense", "operator": "mask", "adjoint": NeumannSeries(5)},
    "tied on the kernel": {"kind": "on kernel", "operator": "mask", "adjoint": NeumannSeries(5)},
    "preconditioned": {"kind": "tied", "precondition": True, "test_every": 2},
    "kernels": {"kind": "kernels", "operator": "identity", "solver": PLAIN},
    "warm": {
        "kind": "kernels",
        "operator": "identity",
        "batch_size": None,
        "warm_start": True,
        "solver": PLAIN,
    },
}


def timeless(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_same(one: History, other: History, kind: str = "dense") -> None:
    """Check that histories are equal: to the bit, or for kernels up to the tolerance of their norms.

    The norms of a stack are refined until all have converged.
    """
    assert (one.status, one.reason) == (other.status, other.reason)
    if kind == "kernels":
        for row, expected in zip(timeless(one.rows), timeless(other.rows), strict=True):
            for name in row.keys() & {"train_loss", "test_loss"}:
                assert row[name] == pytest.approx(expected[name], rel=1e-2)
        for name, weight in one.weights.items():
            assert (weight - other.weights[name]).norm() <= 1e-2 * weight.norm()
        return
    assert timeless(one.rows) == timeless(other.rows)
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())


@contextmanager
def ticking(seconds: float) -> Iterator[None]:
    """Replace the clock by one that advances by `seconds` at every reading."""
    readings = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        clock = SimpleNamespace(perf_counter=lambda: next(readings) * seconds)
        patch.setattr(training, "time", clock)
        yield


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate_decays_in_every_step(schedule: Any) -> None:
    adam = Adam(0.1, 0.02, schedule)
    assert [adam.rate(step, 4) for step in (0, 2, 4)] == pytest.approx([0.1, 0.06, 0.02])
    run, rates = make_training(optimizer=adam), list[float]()
    run.run(on_step=lambda: rates.append(run.optimizer.param_groups[0]["lr"]))
    assert rates == [adam.rate(step, 9) for step in range(9)]


def test_generators_of_different_purposes_are_independent() -> None:
    labels = [(seed, purpose) for seed in (0, 1) for purpose in ("order", "noise")]
    draws = [torch.randn(20_000, generator=generator(seed, purpose)) for seed, purpose in labels]
    assert (torch.corrcoef(torch.stack(draws)) - torch.eye(4)).abs().max() < 0.04
    assert torch.equal(draws[0], torch.randn(20_000, generator=generator(0, "order")))


def test_training_is_reproducible_and_preserves_global_state() -> None:
    """Results do not depend on the global generator or the number of threads."""
    histories, threads = [], torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            for count in (1, 2):
                torch.manual_seed(count)
                torch.set_num_threads(count)
                before = torch.random.get_rng_state()
                histories.append(make_training().run()[0])
                assert torch.equal(torch.random.get_rng_state(), before)
                assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert_same(*histories)
    other = make_training(seed=1).run()[0]
    assert other.rows[0]["test_loss"] != histories[0].rows[0]["test_loss"]


@pytest.mark.parametrize("case", CASES)
def test_stack_matches_separate_trainings(case: str) -> None:
    """Members may have any order; a model without a stack dimension equals a stack of one to the bit."""
    together = make_training(**CASES[case]).run()
    assert [history.status for history in together] == ["completed"] * 3
    assert len({history.rows[-1]["train_loss"] for history in together}) == 3
    for members in ((2, 0), (1,)):
        for index, history in zip(members, make_training(members=members, **CASES[case]).run(), strict=True):
            assert_same(history, together[index], CASES[case]["kind"])
    one, single = (make_training(members=m, **CASES[case]).run()[0] for m in (None, (0,)))
    assert_same(one, single)


@pytest.mark.parametrize("case", [*CASES, "lbfgs"])
def test_resumed_training_matches_uninterrupted_training(case: str) -> None:
    """Checkpoints of any epoch resume alone and together with members of other stacks."""
    lbfgs = {"kind": "kernels", "batch_size": None, "warm_start": True, "optimizer": LBFGS(5)}
    options, members = CASES.get(case, lbfgs), (0,) if case == "lbfgs" else (0, 1)
    checkpoints: dict[int, dict[int, dict[str, Any]]] = {}

    def save(run: Training) -> None:
        states = {members[index]: run.checkpoint(index) for index in run.alive}
        checkpoints.setdefault(run.epoch, {}).update(states)

    expected = dict(zip(members, make_training(members=members, **options).run(save), strict=True))
    stacks: list[tuple[int, ...]] = [(0,)]
    if case != "lbfgs":
        expected[2] = make_training(members=(2,), **options).run(
            lambda run: checkpoints[run.epoch].update({2: run.checkpoint(0)})
        )[0]
        stacks.append((2, 0))
    for epoch, states in checkpoints.items():
        for stack in stacks:
            run = make_training(members=stack, **options)
            run.restore([states[index] for index in stack])
            assert (run.epoch, run.step) == (epoch, epoch * run.steps_per_epoch)
            for index, history in zip(stack, run.run(), strict=True):
                together = len(members) > 1 or len(stack) > 1
                assert_same(history, expected[index], options["kind"] if together else "dense")
    if case == "dense":
        with pytest.raises(ValueError, match=r"of one epoch, got \[1, 2\]"):
            make_training(members=(0, 1)).restore([checkpoints[1][0], checkpoints[2][1]])


@pytest.mark.parametrize("case", ["dense", "warm"])
def test_diverging_members_do_not_affect_others(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Member 1 diverges before the first epoch, member 2 in the second; member 0 trains as it does alone."""
    options = CASES[case] | {"operator": "identity", "solver": PLAIN}
    alone = make_training(members=(0,), **options).run()[0]
    stack = make_training(**options)
    stack.model.tau[1] = 3.0

    def limit(run: Training) -> None:
        first, last = (run.members[i].rows[-1]["train_loss"] for i in (0, 2))
        monkeypatch.setattr(training, "LOSS_LIMIT", (first + last) / 2)

    monkeypatch.setattr(training, "LOSS_LIMIT", 10.0)
    completed, unstable, lost = stack.run(limit)
    assert [history.status for history in stack.members] == ["completed", "diverged", "diverged"]
    assert unstable.reason.startswith("test loss ")
    assert (unstable.rows, len(lost.rows)) == ([], 2)
    assert " in epoch 2, step 1" in lost.reason
    assert_same(completed, alone, options["kind"])


@pytest.mark.parametrize("kind", ["dense", "kernels"])
def test_weights_that_overflow_are_a_divergence(kind: str) -> None:
    """Set a parameter of the first member to infinity after a step; the second member completes."""
    stack = make_training(kind, members=(0, 1), operator="identity", epochs=2, solver=PLAIN)
    parameter = stack.model.weight if kind == "kernels" else stack.model.regularizer.b

    def overflow() -> None:
        if len(stack.alive) == 2:
            parameter.data[0] = math.inf

    first, second = stack.run(on_step=overflow)
    assert (first.status, second.status) == ("diverged", "completed")
    assert first.reason == "weights that are not finite in epoch 1"
    assert all(weight.isfinite().all() for weight in second.weights.values())


def test_time_is_shared_by_solver_steps() -> None:
    """Active members share all of it; one that exceeds its budget ends alone, also after a checkpoint."""
    options: dict[str, Any] = {"kind": "tied", "operator": "identity", "solver": PLAIN, "batch_size": None}
    options |= {"epochs": 2, "tau": torch.tensor([0.15, 0.02, 0.15])}
    with ticking(1.0):
        unlimited = make_training(**options).run()
    assert sum(history.seconds for history in unlimited) == pytest.approx(5)
    first = [history.rows[0] for history in unlimited]
    steps = sum(row["test_steps"] for row in first)
    assert [row["seconds"] for row in first] == pytest.approx([row["test_steps"] / steps for row in first])
    budget = unlimited[1].rows[1]["seconds"] + 0.01
    assert budget > max(unlimited[0].seconds, unlimited[2].seconds)
    with ticking(1.0):
        limited, states = make_training(**options, time_budget=budget), list[dict[str, Any]]()
        histories = limited.run(lambda run: states.append(run.checkpoint(1)) if run.epoch == 1 else None)
    assert [history.status for history in histories] == ["completed", "out of time", "completed"]
    assert histories[1].reason == f"time budget of {budget:g} s spent in epoch 2"
    assert timeless(histories[1].rows) == timeless(unlimited[1].rows[:2])
    assert_same(histories[0], unlimited[0])
    with ticking(1.0):
        resumed = make_training(members=(1,), **options | {"tau": options["tau"][1:2]}, time_budget=budget)
        resumed.restore(states)
        assert resumed.run()[0].reason == histories[1].reason


@pytest.mark.parametrize(("every", "tested"), [(2, {0, 2, 4, 5}), (10, {0, 5}), (1, {0, 1, 2, 3, 4, 5})])
def test_rows_have_metrics_of_their_epoch(every: int, tested: set[int]) -> None:
    """Fewer evaluations change no weights; a Neumann series reports no convergence."""
    history = make_training(epochs=5, test_every=every, members=None).run()[0]
    names = {f"{s}_{m}" for s in ("forward", "backward") for m in ("steps", "residual", "unconverged")}
    tests = {f"test_{metric}" for metric in ("loss", "psnr", "steps", "residual", "unconverged")}
    for epoch, row in enumerate(history.rows):
        expected = {"epoch", "seconds"} | (names | {"train_loss"} if epoch else set())
        assert row.keys() == expected | (tests if epoch in tested else set())
        assert all(math.isfinite(value) for value in row.values())
    always = make_training(epochs=5, members=None).run()[0]
    assert all(torch.equal(weight, always.weights[name]) for name, weight in history.weights.items())
    series = make_training(epochs=1, adjoint=NeumannSeries(0), members=None).run()[0]
    assert "backward_unconverged" not in series.rows[-1]
    assert make_training(epochs=1, test=None, members=None).run()[0].rows[0].keys() >= {"train_loss"}


@pytest.mark.parametrize("tied", [True, False])
def test_training_gradient_matches_unrolled_iteration(tied: bool) -> None:
    """Autograd through explicit steps in float64, with the documented noise and a penalty."""
    model = make_model("tied" if tied else "dense", "identity", None).double()
    images, noise = TRAIN.double(), 0.3
    options: dict[str, Any] = {"optimizer": Adam(1e-30), "solver": Anderson(1e-12, 2000), "seed": 3}

    def penalty(model: FixedPointModel, u: Tensor) -> Tensor:
        return 1e-3 * u.square().mean() * model.regularizer.A.square().sum()

    run = Training(model, images, noise, epochs=1, penalty=penalty, **options)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.regularizer.named_parameters()}
    run.run()
    order = torch.randperm(len(images), generator=generator(3, "order", 0))
    n = torch.randn(images.shape, generator=generator(3, "noise", 0)).double()
    truth = images[order].flatten(1)
    f = observe(model.operator, images[order], torch.tensor(noise, dtype=torch.float64), n).flatten(1)
    A, b, C = weights["A"], weights["b"], weights.get("C", weights["A"])
    u = f
    for _ in range(200):
        u = u - model.tau * (model.lam * (u - f) + model.gamma * (u @ A.T + b).relu() @ C)
    loss = (u - truth).square().mean() + 1e-3 * u.detach().square().mean() * A.square().sum()
    loss.backward()
    assert run.members[0].rows[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-8)
    for name, parameter in model.regularizer.named_parameters():
        assert parameter.grad is not None
        expected = weights[name].grad
        assert (parameter.grad - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("batch_size", [None, 5])
def test_warm_start_uses_last_solutions(batch_size: int | None) -> None:
    """Solves take one step if the weights hardly change; a cold start draws new noise in each epoch."""
    frozen: dict[str, Any] = {"members": None, "optimizer": Adam(1e-30), "epochs": 3}
    warm, cold = (
        make_training("kernels", warm_start=flag, operator="identity", batch_size=batch_size, **frozen)
        .run()[0]
        .rows[1:]
        for flag in (True, False)
    )
    assert warm[0]["forward_steps"] > 2
    assert [row["forward_steps"] for row in warm[1:]] == [1, 1]
    assert len({row["train_loss"] for row in cold}) == 3
    assert cold[2]["test_loss"] == pytest.approx(cold[0]["test_loss"], rel=1e-6)


@pytest.mark.parametrize("optimizer", [Adam(0.02), LBFGS()])
def test_kernels_and_weight_are_learned(optimizer: Adam | LBFGS) -> None:
    """The loss falls, the weight moves, and the history has the model's final weights."""
    model = make_model("kernels", "identity", None)
    options: dict[str, Any] = {"solver": Anderson(1e-6, 200), "warm_start": True, "test": TEST}
    history = train(model, TRAIN, 0.4, epochs=8, optimizer=optimizer, **options)
    losses = [row["train_loss"] for row in history.rows[1:]]
    assert history.status == "completed"
    assert losses[-1] < 0.9 * losses[0]
    assert history.rows[-1]["test_loss"] < history.rows[0]["test_loss"]
    if isinstance(optimizer, LBFGS):
        assert all(after < before for before, after in itertools.pairwise(losses))
    assert history.weights.keys() == {"A", "C", "lam"}
    assert abs(math.log(history.weights["lam"].item() / 5)) > 0.01
    assert all(torch.equal(weight, model.weights()[name]) for name, weight in history.weights.items())


def test_training_accepts_data_of_another_shape() -> None:
    K, A = OPERATORS["projections"](), 0.1 * torch.randn(4, 3, 3, generator=generator(0, "kernels")).double()
    model = FixedPointModel(K, ConvFieldsOfExperts(A, A, smoothed_sign(5)), 0.02, 20, 1)
    history = train(model, TRAIN.double(), 0.05, epochs=6, optimizer=Adam(0.03), batch_size=6)
    losses = [row["train_loss"] for row in history.rows]
    assert losses[-1] < losses[0]


def test_psnr_has_data_range_of_two() -> None:
    assert psnr(torch.tensor([4.0, 0.04, 0.0004])).tolist() == pytest.approx([0, 20, 40], abs=1e-4)
    assert psnr(torch.zeros(1)).isfinite().all()


def test_invalid_combinations_are_rejected() -> None:
    with pytest.raises(ValueError, match="`batch_size` must be all images for L-BFGS, got 5"):
        make_training(optimizer=LBFGS())
    with pytest.raises(ValueError, match="`model` must be a single model for L-BFGS, got 3"):
        make_training(batch_size=None, optimizer=LBFGS())
    spline = LearnedSpline(torch.ones(2).cumsum(0), torch.ones(2), concave=False)
    stack = FixedPointModel(
        OPERATORS["identity"](), ConvFieldsOfExperts(torch.ones(3, 2, 3, 3), None, spline), *torch.ones(3, 3)
    )
    with pytest.raises(ValueError, match="Each model of a stack of 3 must have its own parameters"):
        Training(stack, TRAIN, torch.ones(3), epochs=1)
