"""Training: repeatable numbers, stacks whose members do not mix, honest endings and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import combinations, count, pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import assert_same_bits, timeless
from torch import Tensor

from lib.experiments import data, problem, trainer
from lib.experiments.config import RunConfig
from lib.experiments.problem import generator, make_adjoint_solver, make_solver, psnr
from lib.experiments.trainer import STACKED, Member, Trainer, learning_rate, read_checkpoint, steps_per_epoch
from lib.implicit import NeumannSeries, implicit_fixed_point
from lib.models import FixedPointModel
from lib.operators import TASKS
from lib.solvers import Solution

SMALL: dict[str, Any] = {
    "size": 7,
    "train_images": 100,
    "test_images": 50,
    "batch_size": 20,
    "epochs": 2,
    "noise": 0.5,
}
FRAGILE = SMALL | {"epochs": 3, "sigma": "identity", "solver": "plain", "learning_rate": 0.03}
UNSTABLE = {"tau": 2.1, "gamma": 1.0}
"""On top of `FRAGILE`, diverges before it is trained: the step map expands by at least 1.1."""
DOOMED = {"gamma": 1.1}
"""On top of `FRAGILE`, is sound at first and diverges in the second epoch."""


@pytest.fixture(scope="module", autouse=True)
def images_read_once() -> Iterator[None]:
    """The images are read and verified once for all trainings here, which takes most of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "mnist", cache(data.mnist))
        yield


def small(**values: Any) -> RunConfig:
    return RunConfig(**SMALL | values)


def train(*configs: RunConfig) -> list[Member]:
    return Trainer(configs).train()


@contextmanager
def ticking(seconds: float) -> Iterator[None]:
    """A clock that is this much later at every look: what is measured between two looks takes so long."""
    looks = count()
    with pytest.MonkeyPatch.context() as patch:
        clock = SimpleNamespace(perf_counter=lambda: next(looks) * seconds)
        patch.setattr(trainer, "time", clock)
        yield


def test_learning_rate_is_a_cosine_between_its_ends() -> None:
    """It falls from the first rate to the final one, half way at half time, flat at both ends."""
    config = RunConfig(learning_rate=0.1, final_learning_rate=0.02)
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[100] == pytest.approx(0.02)
    assert rates[50] == pytest.approx(0.06)
    assert rates[25] == pytest.approx(0.06 + 0.04 * math.sqrt(0.5))
    drops = [before - after for before, after in pairwise(rates)]
    assert min(drops) > 0
    assert max(drops[0], drops[-1]) < max(drops) / 50


def test_each_step_is_taken_with_its_learning_rate() -> None:
    """The optimizer's rate follows the cosine over all steps of all epochs."""
    config = small(learning_rate=0.01, final_learning_rate=0.001)
    trainer, rates = Trainer([config]), list[float]()
    trainer.train(on_step=lambda: rates.append(trainer.optimizer.param_groups[0]["lr"]))
    assert trainer.step == len(rates)
    total = 2 * steps_per_epoch(config)
    assert total == 10
    assert rates == [learning_rate(config, step, total) for step in range(total)]


def test_generators_of_different_purposes_are_independent() -> None:
    """Another seed, purpose or epoch gives unrelated numbers; the same ones give the same numbers."""
    purposes: list[tuple[object, ...]] = [
        ("order", 0),
        ("order", 1),
        ("noise", 0),
        ("noise", 1),
        ("weights",),
    ]
    labels = list(product((0, 1), purposes))
    draws = [torch.randn(20_000, generator=generator(seed, *purpose)) for seed, purpose in labels]
    for one, other in combinations(draws, 2):
        assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs() < 0.03
    for (seed, purpose), draw in zip(labels, draws, strict=True):
        assert torch.equal(torch.randn(20_000, generator=generator(seed, *purpose)), draw)


def test_training_is_repeatable_and_leaves_the_global_generator_alone() -> None:
    """Two trainings give the same bits whatever the global generator's state, which stays as it was."""
    members = []
    with torch.random.fork_rng():
        for seed in (1, 2):
            torch.manual_seed(seed)
            before = torch.random.get_rng_state()
            members += train(small(model="deq"))
            assert torch.equal(torch.random.get_rng_state(), before)
    assert_same_bits(*members)
    assert members[0].status == "completed"


def test_training_does_not_depend_on_the_number_of_threads() -> None:
    """The same bits on one core or on many, and torch computes on as many threads as before."""
    before, members = torch.get_num_threads(), list[Member]()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            members += train(small(batch_size=10)) + train(small(size=14, batch_size=10))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for k in range(2, len(members)):
        assert_same_bits(members[k], members[k % 2])


def test_another_seed_is_another_training() -> None:
    """The seed changes the first weights, and with them every number."""
    (one,), (other,) = train(small(seed=0)), train(small(seed=1))
    assert all(a["test_loss"] != b["test_loss"] for a, b in zip(one.history, other.history, strict=True))


@pytest.mark.parametrize("model", ["bilevel", "deq"])
def test_training_lowers_the_loss(model: str) -> None:
    """Denoising improves in every epoch, on the training and on the test images."""
    (member,) = train(
        small(model=model, noise=1.0, gamma=0.5, learning_rate=0.01, train_images=200, epochs=3)
    )
    test = [row["test_loss"] for row in member.history]
    training_losses = [row["train_loss"] for row in member.history[1:]]
    assert test[-1] < 0.9 * test[0]
    assert all(after < before for before, after in pairwise(test))
    assert all(after < before for before, after in pairwise(training_losses))
    assert [row["epoch"] for row in member.history] == [0, 1, 2, 3]


@pytest.mark.parametrize(("model", "names"), [("bilevel", {"A", "b"}), ("deq", {"A", "b", "C"})])
def test_a_completed_member_has_history_and_weights(model: str, names: set[str]) -> None:
    """A row per epoch with all metrics, finite; the weights without the stack's dimension."""
    (member,) = train(small(model=model))
    solves = {
        f"{solve}_{what}"
        for solve in ("forward", "backward", "test")
        for what in ("steps", "residual", "unconverged")
    }
    columns = {"epoch", "seconds", "train_loss", "test_loss", "test_psnr", *solves}
    untrained = {name for name in columns if name.startswith("test")} | {"epoch", "seconds"}
    assert [set(row) for row in member.history] == [untrained, columns, columns]
    assert all(math.isfinite(value) for row in member.history for value in row.values())
    seconds = [row["seconds"] for row in member.history]
    assert seconds == sorted(set(seconds))
    assert {name: weight.shape for name, weight in member.weights.items()} == {
        name: torch.Size([49]) if name == "b" else torch.Size([49, 49]) for name in names
    }


VARIANTS: list[dict[str, Any]] = [
    {},
    {"noise": 1.0},
    {"tau": 0.3},
    {"gamma": 0.5},
    {"lam": 0.7, "noise": 0.2},
]


@pytest.mark.parametrize(
    "shared",
    [
        {"model": "bilevel", "task": "inpainting", "sigma": "identity"},
        {"model": "deq", "task": "denoising", "sigma": "softshrink"},
        {"model": "deq", "sigma": "identity", "solver": "plain"},
        {"model": "deq", "task": "inpainting", "sigma": "relu", "learning_rate": 0.01},
        {"model": "deq", "task": "inpainting", "sigma": "identity", "size": 14, "learning_rate": 0.01},
        {"model": "bilevel", "task": "deblurring", "sigma": "relu", "size": 14},
        {"model": "bilevel", "task": "inpainting", "precondition": True, "learning_rate": 0.01},
    ],
    ids=lambda shared: "-".join(str(value) for value in shared.values()),
)
def test_a_stack_trains_each_member_as_alone(shared: dict[str, Any]) -> None:
    """Members of different noise, tau, gamma and lambda get the same bits alone and in any stack."""
    few = {"train_images": 40, "test_images": 30}
    configs = [small(**few | shared | variant) for variant in VARIANTS]
    members = train(*configs)
    assert [member.config for member in members] == configs
    assert len({member.history[-1]["test_loss"] for member in members}) == len(configs)
    others = train(*configs[::-1]) + train(configs[4], configs[0], configs[2])
    for other in others + [member for config in configs for member in train(config)]:
        assert_same_bits(other, members[configs.index(other.config)])
    if shared.get("task") == "inpainting" and shared["model"] == "deq":
        assert all(member.history[-1]["forward_unconverged"] > 0.1 for member in members)


def test_members_that_are_the_same_get_the_same_bits() -> None:
    """Where a member stands in its stack changes nothing."""
    members = train(*[small(model="deq", task="inpainting", learning_rate=0.01, train_images=40)] * 7)
    for member in members[1:]:
        assert_same_bits(member, members[0])


def test_diverging_members_do_not_disturb_their_neighbours() -> None:
    """One diverges before and one in training; both say so, and the others end as they do alone."""
    variants = [{}, UNSTABLE, {"gamma": 0.05}, DOOMED, {"noise": 0.2}]
    configs = [RunConfig(**FRAGILE | variant) for variant in variants]
    members = train(*configs)
    assert [member.config for member in members] == configs
    assert [member.status for member in members] == [
        "completed",
        "diverged",
        "completed",
        "diverged",
        "completed",
    ]
    for member in members:
        assert_same_bits(member, *train(member.config))
    unstable, doomed = members[1], members[3]
    assert unstable.reason.startswith("test loss ")
    assert unstable.reason.endswith(" above 1000 after epoch 0")
    assert unstable.history == []
    assert doomed.reason.startswith("training loss ")
    assert " above 1000 in epoch 2, step " in doomed.reason
    assert [row["epoch"] for row in doomed.history] == [0, 1]
    assert [member.reason for member in members if member.status == "completed"] == ["", "", ""]


def test_a_stack_of_diverging_members_ends() -> None:
    """When the last member has diverged, there is nothing left to train."""
    members = train(RunConfig(**FRAGILE | UNSTABLE), RunConfig(**FRAGILE | DOOMED))
    assert [member.status for member in members] == ["diverged", "diverged"]


@pytest.mark.parametrize(
    "values",
    [
        {"task": "inpainting"},
        {"model": "deq"},
        {"sigma": "softshrink"},
        {"size": 14},
        {"seed": 1},
        {"learning_rate": 0.01},
        {"epochs": 3},
        {"train_images": 99},
        {"tol": 1e-4},
        {"time_budget": 10.0},
    ],
    ids=lambda values: next(iter(values)),
)
def test_mixed_stacks_are_refused(values: dict[str, Any]) -> None:
    """Configurations that differ in anything else than a member's own numbers cannot share a stack."""
    with pytest.raises(ValueError, match="may differ in " + ", ".join(STACKED)):
        Trainer([small(), small(noise=1.0), small(**values)])


def test_a_spent_time_budget_ends_the_training() -> None:
    """All members stop, are marked, name the budget, and keep what was known: the untrained model."""
    members = train(small(time_budget=1e-6), small(time_budget=1e-6, noise=1.0))
    for member in members:
        assert member.status == "out of time"
        assert member.reason == "time budget of 1e-06 s spent in epoch 1"
        assert [row["epoch"] for row in member.history] == [0]
        assert member.weights.keys() == {"A", "b"}


@pytest.mark.parametrize(
    "configs",
    [
        [small(model="deq", task="deblurring", epochs=3, train_images=60)],
        [RunConfig(**FRAGILE | variant) for variant in ({}, UNSTABLE, DOOMED, {"noise": 0.2})],
        [small(task="deblurring", precondition=True, epochs=3, train_images=60)],
    ],
    ids=["one", "stack with dropped members", "preconditioned"],
)
def test_a_checkpoint_ends_with_the_same_bits(configs: list[RunConfig]) -> None:
    """Going on from any epoch's checkpoints, together or alone, is the uninterrupted training."""
    checkpoints: dict[int, dict[int, bytes]] = {}

    def save(trainer: Trainer) -> None:
        checkpoints[trainer.epoch] = {index: trainer.checkpoint(index) for index in trainer.alive}

    members = Trainer(configs).train(on_epoch=save)
    assert sorted(checkpoints) == [1, 2, 3]
    if len(configs) > 1:
        alive = {epoch: list(saved) for epoch, saved in checkpoints.items()}
        assert alive == {1: [0, 2, 3], 2: [0, 3], 3: [0, 3]}
    for epoch, saved in checkpoints.items():
        for indices in {tuple(saved), tuple(saved)[::-1], *((index,) for index in saved)}:
            trainer = Trainer([configs[i] for i in indices], checkpoints=[saved[i] for i in indices])
            assert trainer.epoch == epoch
            assert trainer.step == epoch * steps_per_epoch(configs[0])
            for index, resumed in zip(indices, trainer.train(), strict=True):
                assert_same_bits(resumed, members[index])
                before = members[index].history[: epoch + 1]
                assert [row["seconds"] for row in resumed.history[: epoch + 1]] == [
                    row["seconds"] for row in before
                ]


def saved_after(epoch: int, *configs: RunConfig) -> list[bytes]:
    """Checkpoints of all members of one stack after an epoch."""
    saved: list[bytes] = []

    def save(trainer: Trainer) -> None:
        if trainer.epoch == epoch:
            saved.extend(trainer.checkpoint(index) for index in trainer.alive)

    Trainer(configs).train(on_epoch=save)
    return saved


def test_checkpoints_of_different_stacks_go_on_together() -> None:
    """Members that never met before end as they do undisturbed."""
    variants = [{}, {"noise": 1.0}, {"tau": 0.3}, {"gamma": 0.5}]
    few = {"train_images": 40, "test_images": 20, "epochs": 3, "learning_rate": 0.01}
    configs = [small(model="deq", task="inpainting", **few | variant) for variant in variants]
    pair, alone = saved_after(2, configs[1], configs[3]), saved_after(2, configs[0])
    three = saved_after(2, configs[1], configs[2], configs[0])
    checkpoints = [alone[0], pair[0], three[1], pair[1]]
    resumed = Trainer(configs, checkpoints=checkpoints).train()
    for member in resumed:
        assert_same_bits(member, *train(member.config))


def test_a_checkpoint_says_what_it_holds() -> None:
    """Its epoch, its member's history and seconds, and the weights without the stack's dimension."""
    configs = [small(model="deq"), small(model="deq", noise=1.0)]
    (member,) = train(configs[1])
    state = read_checkpoint(saved_after(2, *configs)[1])
    assert state["epoch"] == 2
    assert timeless(state["history"]) == timeless(member.history)
    assert state["seconds"] == state["history"][-1]["seconds"]
    assert all(
        torch.equal(state["weights"][f"regularizer.{name}"][0], weight)
        for name, weight in member.weights.items()
    )


def test_checkpoints_of_different_epochs_are_refused() -> None:
    """Members that have come to different epochs cannot go on together."""
    configs = [small(), small(noise=1.0)]
    checkpoints = saved_after(1, configs[0]) + saved_after(2, configs[1])
    with pytest.raises(ValueError, match=r"of one epoch, got \[1, 2\]"):
        Trainer(configs, checkpoints=checkpoints)


CHEAP, DEAR = {"solver": "plain", "tau": 0.9}, {"solver": "plain", "tau": 0.2}


def test_members_share_the_time_by_their_solver_steps() -> None:
    """Each second goes to the members in proportion to the steps that they needed in it."""
    batch = {"task": "inpainting", "train_images": 40, "batch_size": 40, "test_images": 150, "epochs": 3}
    configs = [small(**batch | values) for values in ({}, {"gamma": 0.5}, {"tau": 0.9})]
    with ticking(2.0):
        members = train(*configs)
    assert len({member.seconds for member in members}) == 3

    def shares(epoch: int, *names: str) -> list[float]:
        steps = [sum(member.history[epoch][name] for name in names) for member in members]
        return [mine / sum(steps) for mine in steps]

    expected = [0.0] * len(members)
    for epoch in range(4):
        parts = [shares(epoch, "test_steps")]
        if epoch > 0:
            parts.append(shares(epoch, "forward_steps", "backward_steps"))
        expected = [t + sum(2.0 * part[k] for part in parts) for k, t in enumerate(expected)]
        assert [member.history[epoch]["seconds"] for member in members] == pytest.approx(expected)
    assert sum(member.seconds for member in members) == pytest.approx(2.0 * 7)


def test_all_time_is_charged_and_to_living_members_only() -> None:
    """Also where members diverge on the way, the charges add up to the time of all steps and tests."""
    variants = [{}, UNSTABLE, DOOMED, {"noise": 0.2}]
    configs = [RunConfig(**FRAGILE | variant) for variant in variants]
    with ticking(1.0):
        members = train(*configs)
    assert [member.status for member in members] == ["completed", "diverged", "diverged", "completed"]
    steps = 3 * steps_per_epoch(configs[0])
    assert sum(member.seconds for member in members) == pytest.approx(steps + 4)
    for member in members:
        seconds = [0.0, *(row["seconds"] for row in member.history)]
        assert all(before < after for before, after in pairwise(seconds))
    assert members[1].seconds < 1
    assert all(member.seconds == member.history[-1]["seconds"] for member in members[::3])


def test_only_the_member_that_spent_its_budget_is_ended() -> None:
    """The expensive one of a stack runs out of time; its neighbours complete with the bits they get alone."""
    variants = [CHEAP, DEAR, {"noise": 0.2} | CHEAP]
    with ticking(1.0):
        unlimited = train(*(small(**values) for values in variants))
    assert all(member.seconds < 0.5 * unlimited[1].seconds for member in unlimited[::2])
    budget = round(unlimited[1].seconds - 1.5, 3)
    configs = [small(time_budget=budget, **values) for values in variants]
    with ticking(1.0):
        members = train(*configs)
    assert [member.status for member in members] == ["completed", "out of time", "completed"]
    assert members[1].reason == f"time budget of {budget:g} s spent in epoch 2"
    assert members[1].seconds > budget > max(members[0].seconds, members[2].seconds)
    assert timeless(members[1].history) == timeless(unlimited[1].history[:2])
    with ticking(0.0):
        for member in members[::2]:
            assert_same_bits(member, *train(member.config))


def test_a_resumed_member_goes_on_with_its_seconds() -> None:
    """What was spent before a checkpoint counts towards the budget after it."""
    config = small(time_budget=9.5)
    with ticking(1.0):
        (uninterrupted,) = train(config)
        (checkpoint,) = saved_after(1, config)
        (resumed,) = Trainer([config], checkpoints=[checkpoint]).train()
    assert resumed.status == "out of time"
    assert resumed.seconds == uninterrupted.seconds == 10.0
    assert_same_bits(resumed, uninterrupted)


@pytest.mark.parametrize("model", ["bilevel", "deq"])
@problem.one_thread()
def test_the_gradient_is_that_of_the_unrolled_iteration(model: str) -> None:
    """A training step's implicit gradient is autograd's, of the loss after 100 explicit iterations."""
    config = small(
        model=model,
        train_images=10,
        batch_size=10,
        epochs=1,
        tau=0.4,
        gamma=0.8,
        lam=0.9,
        solver="plain",
        tol=1e-6,
        max_steps=100,
    )
    trainer = Trainer([config])
    named = dict(trainer.model.regularizer.named_parameters())
    weights = {name: p.detach()[0].double().requires_grad_() for name, p in named.items()}
    gradients: dict[str, Tensor] = {}
    trainer.train(on_step=lambda: gradients.update({name: p.grad[0].clone() for name, p in named.items()}))  # type: ignore[index]

    order = torch.randperm(10, generator=generator(config.seed, "order", 0))
    images = data.mnist("train", 10, 7)[order]
    n = torch.randn(images.shape, generator=generator(config.seed, "noise", 0))
    images, f = images.flatten(1).double(), (images + config.noise * n).flatten(1).double()
    A, b, C = weights["A"], weights["b"], weights.get("C", weights["A"])
    u = torch.zeros_like(f)
    for _ in range(100):
        u = u - config.tau * (config.lam * (u - f) + config.gamma * (u @ A.T + b).relu() @ C)
    (u - images).square().mean().backward()
    for name, weight in weights.items():
        assert weight.grad is not None
        scale = weight.grad.abs().max().item()
        torch.testing.assert_close(gradients[name].double(), weight.grad, rtol=1e-3, atol=1e-4 * scale)


def test_psnr_of_images_between_minus_one_and_one() -> None:
    """The peak is 2: an error of the whole range is 0 dB, a tenth of it 20 dB; no error is finite."""
    assert psnr(torch.tensor([4.0, 0.04, 0.0004])).tolist() == pytest.approx([0, 20, 40], abs=1e-4)
    mse = torch.tensor([0.123])
    assert psnr(mse).item() == pytest.approx(20 * math.log10(2 / math.sqrt(0.123)), rel=1e-6)
    assert psnr(torch.zeros(1)).isfinite().all()


def test_test_noise_is_the_same_in_every_epoch() -> None:
    """Weights that do not move have one test loss in all epochs, and a training loss that changes."""
    frozen = {"learning_rate": 1e-30, "final_learning_rate": 0.0}
    (member,) = train(small(noise=1.0, epochs=3, **frozen))
    assert len({row["test_loss"] for row in member.history}) == 1
    assert len({row["test_psnr"] for row in member.history}) == 1
    assert len({row["train_loss"] for row in member.history[1:]}) == 3


def test_test_noise_depends_on_the_seed_alone() -> None:
    """The draws are standard normal and shared by models, noises, batch sizes and epochs."""
    config = RunConfig(size=14, test_images=200)
    n = problem.test_noise(config)
    assert n.shape == (200, 1, 14, 14)
    assert n.mean().abs() < 0.02
    assert abs(n.std() - 1) < 0.02
    other = RunConfig(size=14, test_images=200, model="deq", noise=2.0, batch_size=10, epochs=1, tau=0.1)
    assert torch.equal(problem.test_noise(other), n)
    assert not torch.equal(problem.test_noise(config.model_copy(update={"seed": 1})), n)


def test_the_training_loss_is_a_mean_over_images() -> None:
    """Also where the last batch is smaller: the mean of all images' errors, each batch with its noise."""
    config = small(train_images=50, epochs=1, learning_rate=1e-30, final_learning_rate=0.0)
    (member,) = train(config)
    model = problem.make_model([config])
    draws = generator(config.seed, "noise", 0)
    order = torch.randperm(50, generator=generator(config.seed, "order", 0))
    errors = []
    for batch in data.mnist("train", 50, 7)[order].split(20):
        f = (batch + config.noise * torch.randn(batch.shape, generator=draws))[None]
        solution = problem.solve(model, f, config)
        errors.append((solution.value[0] - batch).square().mean((1, 2, 3)))
    assert len(errors[-1]) == 10
    assert member.history[1]["train_loss"] == pytest.approx(torch.cat(errors).mean().item(), rel=1e-5)


def test_batches_do_not_change_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Test metrics are means over images, whatever the batches of either loop."""
    rows = []
    for size in (7, 50, 100):
        monkeypatch.setattr(trainer, "TEST_BATCH", size)
        rows += [train(small(batch_size=batch, epochs=1))[0].history[0] for batch in (20, 100)]
    for one, other in zip(timeless(rows[::2]), timeless(rows[1::2]), strict=True):
        assert one == other
    for row in timeless(rows[1:]):
        assert row == pytest.approx(timeless(rows)[0], rel=1e-4)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_the_adjoint_is_a_neumann_series_where_it_is_asked_for(task: str, steps: int) -> None:
    """`w` is the sum of `(J^T)^j dL/du` for `j` from 0 to `neumann_steps`, with the dense Jacobian `J`."""
    config = small(
        task=task, model="deq", adjoint="neumann", neumann_steps=steps, tau=0.3, gamma=0.3, tol=1e-9
    )
    model = problem.make_model([config]).double()
    truth, n = torch.randn(2, 3, 1, 7, 7, generator=generator(0, "test"), dtype=torch.float64)
    f = problem.observe(model.operator, truth, torch.tensor([0.1], dtype=torch.float64), n)
    u0, solvers = problem.first_iterate(f, config), (make_solver(config), make_adjoint_solver(config))
    adjoints: list[Solution] = []
    solution = implicit_fixed_point(model.problem(f), u0, *solvers, adjoints.append)
    (solution.value - truth).square().mean().backward()
    u = solution.value.detach()
    g = (2 * (u - truth) / u.numel()).flatten()
    J = torch.autograd.functional.jacobian(model.step_map(f), u).view(u.numel(), u.numel())
    powers = [g]
    for _ in range(steps):
        powers.append(J.T @ powers[-1])
    assert powers[-1].norm() > 0.1 * g.norm()
    torch.testing.assert_close(adjoints[0].value.flatten(), torch.stack(powers).sum(0), rtol=1e-9, atol=1e-12)
    assert adjoints[0].steps.eq(steps).all()
    (member,) = train(config)
    assert member.history[-1]["backward_steps"] == steps
    assert "backward_unconverged" not in member.history[-1]


@pytest.mark.parametrize("task", TASKS)
def test_without_a_regularizer_the_adjoint_of_denoising_starts_at_its_solution(task: str) -> None:
    """`w = (1 - tau lambda) w + dL/du` for each member; elsewhere it starts at its right-hand side."""
    configs = [small(task=task, tau=tau, lam=lam, gamma=0.0) for tau, lam in ((0.1, 1.0), (0.5, 0.7))]
    model = problem.make_model(configs)
    u, g = torch.randn(2, 2, 3, 1, 7, 7, generator=generator(0, "test"))
    start = model.problem(u).first_adjoint
    assert (start is not None) == (task == "denoising")
    w = g if start is None else start(g)
    if task == "denoising":
        torch.testing.assert_close(model.vjp(u)(w) + g, w)
    else:
        assert torch.equal(w, g)


@pytest.mark.parametrize("values", [{"task": "denoising"}, {"task": "inpainting", "adjoint": "solved"}])
def test_otherwise_the_adjoint_equation_is_solved_as_the_fixed_point_is(values: dict[str, Any]) -> None:
    """By the same solver, with a tolerance of its own if asked for; by default a series where `K` loses
    something."""
    config = small(**values)
    assert make_adjoint_solver(config) == make_solver(config)
    looser = config.model_copy(update={"adjoint_tol": 0.1})
    assert make_adjoint_solver(looser) == replace(make_solver(config), tol=0.1)
    assert make_solver(looser) == make_solver(config)
    assert make_adjoint_solver(small(task="inpainting")) == NeumannSeries(20, config.tol)


def test_a_preconditioner_is_of_the_weights_of_its_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in an epoch's first step and each tenth after it, of the weights of then; tests make theirs."""
    made: list[tuple[int, Tensor]] = []
    make = FixedPointModel.preconditioner

    def telling(model: FixedPointModel, shape: torch.Size) -> Tensor:
        assert shape == (1, 7, 7)
        made.append((trainer.step, model.regularizer.A.detach().clone()))
        return make(model, shape)

    monkeypatch.setattr(FixedPointModel, "preconditioner", telling)
    trainer = Trainer([small(task="inpainting", precondition=True, batch_size=7, test_images=1)])
    assert steps_per_epoch(trainer.config) == 15
    trainer.train()
    assert [step for step, _ in made] == [0, 0, 10, 15, 15, 25, 30]
    assert not torch.equal(made[1][1], made[2][1])
    assert torch.equal(made[3][1], made[4][1])


@pytest.mark.parametrize("task", ["inpainting", "deblurring"])
def test_preconditioned_solves_come_nearer_to_the_solution_in_fewer_steps(task: str) -> None:
    """The fixed point and its adjoint from untrained weights, beside those of solves to 1e-7."""
    plain = small(task=task, size=14, gamma=0.5)
    config = plain.model_copy(update={"precondition": True})
    exact = plain.model_copy(update={"adjoint": "solved", "tol": 1e-7, "max_steps": 5000, "patience": None})
    model = problem.make_model([config])
    truth = problem.load_images(config)["train"][:10]
    n = torch.randn(truth.shape, generator=generator(0, "test"))
    f = problem.observe(model.operator, truth, torch.tensor([0.1]), n)

    def gradient(config: RunConfig) -> tuple[Solution, Solution, Tensor]:
        model.zero_grad()
        adjoint: list[Solution] = []
        P = model.preconditioner(f.shape[-3:]) if config.precondition else None
        u0, solvers = problem.first_iterate(f, config), (make_solver(config), make_adjoint_solver(config))
        solution = implicit_fixed_point(model.problem(f, P), u0, *solvers, adjoint.append)
        (solution.value - truth).square().mean().backward()
        assert model.regularizer.A.grad is not None
        return solution, adjoint[0], model.regularizer.A.grad.clone()

    (u, w, g), (u_plain, w_plain, g_plain), (u_exact, w_exact, g_exact) = map(
        gradient, (config, plain, exact)
    )
    assert u.residual.le(config.tol).all()
    assert u.steps.max() < u_plain.steps.max() / 2
    assert w.steps.max() <= problem.PRECONDITIONED_STEPS < w_plain.steps.max() / 2
    for ours, theirs, right in ((u, u_plain, u_exact), (w, w_plain, w_exact)):
        assert (ours.value - right.value).norm() < 0.8 * (theirs.value - right.value).norm()
    assert (g - g_exact).norm() < 0.8 * (g_plain - g_exact).norm()


def test_a_deq_is_solved_as_without_a_preconditioner() -> None:
    """It has none: the runs are the same to the bit."""
    (plain,), (other,) = (train(small(model="deq", task="inpainting", precondition=p)) for p in (False, True))
    assert_same_bits(plain, other)
