"""Training of a stack of models: configurations that share everything but their numbers.

Every tensor of the model has a leading stack dimension, so one loop trains one configuration or many.
The members never mix: each has its own loss, its own optimizer state and its own end.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lib.experiments.config import FacesConfig, TrainingConfig
from lib.experiments.problem import (
    TEST_BATCH,
    Config,
    Weights,
    first_iterate,
    generator,
    is_preconditioned,
    load_images,
    make_adjoint_solver,
    make_model,
    make_solver,
    observe,
    one_thread,
    psnr,
    require_device,
    solve,
    test_noise,
)
from lib.graphs import RecordedSolves
from lib.implicit import Solve, implicit_fixed_point
from lib.products import products_in
from lib.solvers import Solution, Status, fixed_point

COMPLETED, DIVERGED, OUT_OF_TIME = "completed", "diverged", "out of time"

LOSS_LIMIT = 1e3
"""A training loss above this is a divergence: images in [-1, 1] are at most 4 apart in mean square."""

STACKED = ("noise", "tau", "gamma", "lam")
"""What may differ between the members of a stack."""

PRECONDITIONER_AGE = 10
"""Optimizer steps after which a preconditioner is made anew; it costs about as much as 20 products."""

SEARCH, LBFGS_MEMORY = 20, 20
"""Evaluations of a line search at most, and pairs of steps and gradients that L-BFGS keeps."""

FARTHEST = 10.0
"""Largest entry of kernels, which are normalized, and of `log(lambda) / 8`, that such a search looks at."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state, which a checkpoint holds behind each parameter."""

LOOK_STEPS = 50
"""Optimizer steps from one look at losses and solver steps to the next where a look makes the device wait."""

ConfigT = TypeVar("ConfigT", bound=TrainingConfig)

Metrics = dict[str, float]
Evaluation = tuple[Tensor, Solution, Solution]


def learning_rate(config: TrainingConfig, step: int, total: int) -> float:
    """Decay from `learning_rate` to `final_learning_rate` over all optimizer steps, linear or as a cosine."""
    low, high = config.final_learning_rate, config.learning_rate
    passed = step / total
    return low + (high - low) * (
        1 - passed if config.schedule == "linear" else (1 + math.cos(math.pi * passed)) / 2
    )


def steps_per_epoch(config: Config) -> int:
    return math.ceil(config.train_images / config.batch_size)


def total_steps(config: Config) -> int:
    return config.epochs * steps_per_epoch(config)


@dataclass
class Member:
    """What is known of one configuration of a stack while it trains.

    Attributes:
        config: its configuration.
        history: a row of metrics per epoch; epoch 0 is the untrained model.
        status: `completed`, `diverged`, `out of time`, or empty while it trains.
        reason: why it did not complete.
        weights: what `FieldsOfExperts.weights` returns, once it has ended.
        seconds: of computation that it was charged with.
    """

    config: Config
    history: list[Metrics] = field(default_factory=list)
    status: str = ""
    reason: str = ""
    weights: Weights = field(default_factory=dict)
    seconds: float = 0.0


class _Meter:
    """Sums of per-sample quantities for every member, `(stack,)` each."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, count: int, **values: Tensor) -> None:
        """Add values `(stack, samples)`, or `(stack,)` means over `count` samples."""
        self.count += count
        for name, value in values.items():
            total = value.double().sum(-1) if value.dim() == 2 else value.double() * count
            self.sums[name] = self.sums.get(name, 0) + total

    def keep(self, members: list[int]) -> None:
        self.sums = {name: total[members] for name, total in self.sums.items()}

    def rows(self) -> list[Metrics]:
        """The means of each member."""
        means = [(total / self.count).tolist() for total in self.sums.values()]
        return [dict(zip(self.sums, row, strict=True)) for row in zip(*means, strict=True)]


def _solver_metrics(name: str, solution: Solution, series: bool = False) -> dict[str, Tensor]:
    metrics = {f"{name}_steps": solution.steps, f"{name}_residual": solution.residual}
    # A sum of so many terms is what was asked for, whatever its residual.
    return metrics if series else metrics | {f"{name}_unconverged": solution.status != Status.CONVERGED}


def _usable(solution: Solution, otherwise: Tensor) -> Tensor:
    """The solution as a first iterate of the next epoch; a sample that diverged starts afresh."""
    diverged = (solution.status == Status.DIVERGED)[..., None, None, None]
    return torch.where(diverged, otherwise, solution.value.detach())


def shared(config: ConfigT) -> ConfigT:
    """What a configuration has in common with every member of its stack."""
    return config.model_copy(update={name: type(config).model_fields[name].default for name in STACKED})


class Trainer:
    """Trains a stack of configurations that differ at most in `STACKED`.

    Args:
        configs: the members of the stack.
        device: where to train.
        checkpoints: for each member what `Trainer.checkpoint` returned, to go on from there. The members
            need not have been in one stack before.
        start: the weights to start from when `initial` is another run's configuration.

    Raises:
        ValueError: the configurations cannot share a stack, or the checkpoints are of different epochs.
        ConfigError: the device cannot train them.
    """

    def __init__(
        self,
        configs: Sequence[Config],
        device: torch.device | str = "cpu",
        checkpoints: Sequence[bytes] | None = None,
        start: Weights | None = None,
    ) -> None:
        self.config = configs[0]
        if any(shared(config) != shared(self.config) for config in configs):
            raise ValueError(f"a stack's members may differ in {', '.join(STACKED)} only")
        self.device = torch.device(device)
        require_device(self.config, self.device)
        self.members = [Member(config) for config in configs]
        self.alive = list(range(len(configs)))
        self.epoch = 0
        self.step = 0
        self.solver, self.adjoint_solver = make_solver(self.config), make_adjoint_solver(self.config)
        with one_thread():
            self.model = make_model(configs, start).to(self.device)
        self.noise = torch.tensor([c.noise for c in configs], device=self.device)
        self.optimizer = self._make_optimizer()
        self.warm = isinstance(self.config, FacesConfig) and self.config.warm_start
        self.solutions: dict[str, Tensor] = {}
        self.P: Tensor | None = None
        self.solve: Solve = fixed_point if self.device.type == "cpu" else RecordedSolves(self.model)
        # Number, losses and solver steps of optimizer steps that were not looked at, and when they began.
        self.unseen: list[tuple[int, Tensor, Tensor]] = []
        self.unseen_since = 0.0
        self.often = self.device.type == "cpu"
        if checkpoints is not None:
            self._restore(checkpoints)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        c, parameters = self.config, self.model.parameters()
        if isinstance(c, FacesConfig) and c.optimizer == "lbfgs":
            if len(self.members) > 1:
                raise ValueError(f"configs: got {len(self.members)}, allowed: one at a time for L-BFGS")
            return torch.optim.LBFGS(parameters, 1.0, 1, SEARCH, 0.0, 0.0, LBFGS_MEMORY, "strong_wolfe")
        # Not fused on a CPU: that kernel rounds a tensor's last numbers otherwise, and members would not be
        # equal. On a GPU it reads and writes each tensor once, not at every operation.
        fused = self.device.type != "cpu"
        return torch.optim.Adam(parameters, lr=c.learning_rate, foreach=not fused, fused=fused)

    @one_thread()
    def train(
        self,
        on_epoch: Callable[[Trainer], object] = lambda trainer: None,
        on_step: Callable[[], object] = lambda: None,
    ) -> list[Member]:
        """Train until every member has ended.

        Args:
            on_epoch: called after each epoch, when a `checkpoint` of each living member can be saved.
            on_step: called after each optimizer step.

        Returns:
            The members, in the order of their configurations.
        """
        with products_in(self.config.precision):
            return self._train(on_epoch, on_step)

    def _train(self, on_epoch: Callable[[Trainer], object], on_step: Callable[[], object]) -> list[Member]:
        loaded = load_images(self.config)
        images, test_images = loaded["train"].to(self.device), loaded["test"].to(self.device)
        if self.epoch == 0:
            self._record(self._evaluate(test_images))
        while self.alive and self.epoch < self.config.epochs:
            training = self._train_epoch(images, on_step)
            if not self.alive:
                break
            self.epoch += 1
            last = self.epoch == self.config.epochs
            tested = last or self.epoch % self.config.test_every == 0
            self._record(self._evaluate(test_images) if tested else None, training)
            on_epoch(self)
        self._end(COMPLETED, dict.fromkeys(range(len(self.alive)), ""))
        return self.members

    def _train_epoch(self, images: Tensor, on_step: Callable[[], object]) -> _Meter:
        seed = self.config.seed
        order = torch.randperm(len(images), generator=generator(seed, "order", self.epoch))
        draws = generator(seed, "noise", self.epoch)
        if self.warm:
            order, draws = torch.arange(len(images)), generator(seed, "noise")
        meter = _Meter()
        for indices in order.split(self.config.batch_size):
            batch = images[indices.to(self.device)]
            n = torch.randn(batch.shape, generator=draws).to(self.device)
            self._train_step(batch, n, meter)
            ended = self.step % steps_per_epoch(self.config) == 0
            if self.often or ended or len(self.unseen) == LOOK_STEPS:
                self._look(meter)
                self._stop_late(meter)
                if not self.alive:
                    break
            on_step()
        return meter

    def _train_step(self, images: Tensor, n: Tensor, meter: _Meter) -> None:
        start = time.perf_counter()
        f = observe(self.model.operator, images, self.noise, n)
        step = self.step - self.epoch * steps_per_epoch(self.config)
        if is_preconditioned(self.config) and step % PRECONDITIONER_AGE == 0:
            self.P = self.model.preconditioner(f.shape[-3:])
        if isinstance(self.optimizer, torch.optim.LBFGS):
            evaluation = self._search(images, f)
        else:
            evaluation = self._evaluate_gradient(images, f)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config, self.step, total_steps(self.config))
            self.optimizer.step()
        self.model.refresh()
        self.step += 1
        loss, solution, adjoint = evaluation
        if not self.unseen:
            self.unseen_since = start
        work = solution.steps.double().mean(-1) + adjoint.steps.double().mean(-1)
        self.unseen.append((step + 1, loss, work))
        meter.add(
            len(images),
            train_loss=loss,
            **_solver_metrics("forward", solution),
            **_solver_metrics("backward", adjoint, series=self.config.adjoint == "neumann"),
        )

    def _look(self, meter: _Meter) -> None:
        """Charge the members with the steps since the last look, and end those whose loss has diverged.

        On a GPU such a member trains on until then, so that its last weights are those of a later step.
        """
        steps, losses, work = zip(*self.unseen, strict=True)
        self.unseen = []
        self._charge(self.unseen_since, torch.stack(work).sum(0))
        lost: dict[int, str] = {}
        for step, values in zip(steps, torch.stack(losses).tolist(), strict=True):
            where = f"above {LOSS_LIMIT:g} in epoch {self.epoch + 1}, step {step}"
            for position, value in enumerate(values):
                if not value <= LOSS_LIMIT:
                    lost.setdefault(position, f"training loss {value:.3g} {where}")
        meter.keep([position for position in range(len(self.alive)) if position not in lost])
        self._end(DIVERGED, lost)

    def _evaluate_gradient(self, images: Tensor, f: Tensor) -> Evaluation:
        """Losses `(stack,)` and both solutions with the present weights, whose gradient is left in them."""
        problem, u0 = self.model.problem(f, self.P), first_iterate(f, self.config)
        if self.solutions:
            last = self.solutions
            problem, u0 = replace(problem, first_adjoint=lambda g: last["backward"]), last["forward"]
        adjoint: list[Solution] = []
        solution = implicit_fixed_point(
            problem, u0, self.solver, self.adjoint_solver, adjoint.append, self.solve
        )
        loss = (solution.value - images).square().mean((-4, -3, -2, -1))
        self.optimizer.zero_grad()
        # A member that diverged takes no part in the sum: its NaN stays in its own slice.
        torch.where(loss.detach() <= LOSS_LIMIT, loss, 0).sum().backward()
        if self.warm:
            self.solutions = {
                "forward": _usable(solution, first_iterate(f, self.config)),
                "backward": _usable(adjoint[0], torch.zeros_like(f)),
            }
        return loss.detach(), solution, adjoint[0]

    def _search(self, images: Tensor, f: Tensor) -> Evaluation:
        """One step of L-BFGS, whose line search evaluates as often as it needs; the first evaluation."""
        evaluations: list[Evaluation] = []

        def closure() -> float:
            # A search may look too far ahead, where nothing can be computed.
            if not all(parameter.abs().max() <= FARTHEST for parameter in self.model.parameters()):
                self.optimizer.zero_grad()
                return math.inf
            self.model.refresh()
            if is_preconditioned(self.config):
                self.P = self.model.preconditioner(f.shape[-3:])
            evaluations.append(self._evaluate_gradient(images, f))
            return evaluations[-1][0].sum().item()

        self.optimizer.step(closure)
        return evaluations[0]

    def _stop_late(self, meter: _Meter) -> None:
        """End the members whose time budget is spent."""
        budget = self.config.time_budget
        late = [p for p, index in enumerate(self.alive) if self.members[index].seconds > budget]
        if late:
            meter.keep([p for p in range(len(self.alive)) if p not in late])
            reason = f"time budget of {budget:g} s spent in epoch {self.epoch + 1}"
            self._end(OUT_OF_TIME, dict.fromkeys(late, reason))

    @torch.no_grad()
    def _evaluate(self, images: Tensor) -> _Meter:
        start = time.perf_counter()
        n = test_noise(self.config).to(self.device)
        meter = _Meter()
        steps: Tensor | float = 0.0
        P = self.model.preconditioner(images.shape[-3:]) if is_preconditioned(self.config) else None
        for batch, batch_n in zip(images.split(TEST_BATCH), n.split(TEST_BATCH), strict=True):
            f = observe(self.model.operator, batch, self.noise, batch_n)
            solution = solve(self.model, f, self.config, P, self.solve)
            mse = (solution.value - batch).square().mean((-3, -2, -1))
            meter.add(len(batch), test_loss=mse, test_psnr=psnr(mse), **_solver_metrics("test", solution))
            steps = steps + solution.steps.double().sum(-1)
        self._charge(start, torch.as_tensor(steps))
        return meter

    def _record(self, test: _Meter | None, training: _Meter | None = None) -> None:
        """Add a row to the history of every living member; one whose test loss is absurd has diverged."""
        lost = {}
        measured = [meter.rows() for meter in (test, training) if meter is not None]
        for position, index in enumerate(self.alive):
            row = {"epoch": self.epoch, "seconds": self.members[index].seconds}
            for rows in measured:
                row |= rows[position]
            if test is None or row["test_loss"] <= LOSS_LIMIT:
                self.members[index].history.append(row)
            else:
                lost[position] = (
                    f"test loss {row['test_loss']:.3g} above {LOSS_LIMIT:g} after epoch {self.epoch}"
                )
        self._end(DIVERGED, lost)

    def _charge(self, start: float, steps: Tensor) -> None:
        """Charge the time since `start` to the living members in proportion to their solver steps."""
        shares = (steps / steps.sum()).tolist()
        elapsed = time.perf_counter() - start
        for index, share in zip(self.alive, shares, strict=True):
            self.members[index].seconds += elapsed * share

    def _end(self, status: str, reasons: dict[int, str]) -> None:
        """Take the members at these positions out of the stack; from then on they cost nothing."""
        if not reasons:
            return
        weights = self.model.weights()
        for position, reason in reasons.items():
            member = self.members[self.alive[position]]
            member.status, member.reason = status, reason
            member.weights = {name: weight[position].cpu().clone() for name, weight in weights.items()}
        self._keep([position for position in range(len(self.alive)) if position not in reasons])

    def _keep(self, positions: Sequence[int]) -> None:
        index = torch.tensor(positions, dtype=torch.long, device=self.device)
        for parameter in self.model.parameters():
            parameter.data = parameter.data[index]
            parameter.grad = None
            for name, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor) and value.dim() == parameter.dim():
                    self.optimizer.state[parameter][name] = value[index]
        for module in self.model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer[index])
        self.noise = self.noise[index]
        self.solutions = {name: solution[index] for name, solution in self.solutions.items()}
        self.P = None if self.P is None else self.P[index]
        self.alive = [self.alive[position] for position in positions]

    def checkpoint(self, index: int) -> bytes:
        """Everything that a later process needs to end the living member `index`, alone or in any stack."""
        position, member = self.alive.index(index), self.members[index]
        adam, weights = isinstance(self.optimizer, torch.optim.Adam), {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            tensors = (parameter.data, *(state[moment] for moment in MOMENTS if adam))
            weights[name] = [tensor[position].cpu().clone() for tensor in tensors]
        named = dict(self.model.named_buffers()) | self.solutions
        buffers = {name: tensor[position].cpu().clone() for name, tensor in named.items()}
        content = {"epoch": self.epoch, "seconds": member.seconds, "history": member.history}
        # L-BFGS has one state for all parameters, and one member.
        content |= {} if adam else {"search": self.optimizer.state_dict()["state"][0]}
        buffer = io.BytesIO()
        torch.save(content | {"weights": weights, "buffers": buffers}, buffer)
        return buffer.getvalue()

    def _restore(self, checkpoints: Sequence[bytes]) -> None:
        states = [read_checkpoint(checkpoint) for checkpoint in checkpoints]
        self.epoch = states[0]["epoch"]
        if any(state["epoch"] != self.epoch for state in states):
            raise ValueError(f"checkpoints of a stack are of one epoch, got {[s['epoch'] for s in states]}")
        self.step = self.epoch * steps_per_epoch(self.config)
        for name, parameter in self.model.named_parameters():
            tensors = zip(*(state["weights"][name] for state in states), strict=True)
            parameter.data, *moments = (torch.stack(slices).to(self.device) for slices in tensors)
            if moments:
                step = torch.tensor(float(self.step), device=self.device)
                self.optimizer.state[parameter] = {"step": step} | dict(zip(MOMENTS, moments, strict=True))
        if "search" in states[0]:
            search = {"state": {0: states[0]["search"]}}
            self.optimizer.load_state_dict(self.optimizer.state_dict() | search)
        for name in states[0]["buffers"]:
            buffer = torch.stack([state["buffers"][name] for state in states]).to(self.device)
            if name in ("forward", "backward"):
                self.solutions[name] = buffer
            else:
                module, _, attribute = name.rpartition(".")
                setattr(self.model.get_submodule(module), attribute, buffer)
        for member, state in zip(self.members, states, strict=True):
            member.history, member.seconds = state["history"], state["seconds"]


def read_checkpoint(checkpoint: bytes) -> dict[str, Any]:
    """The content of a `Trainer.checkpoint`; its `epoch` tells which ones can share a stack."""
    state: dict[str, Any] = torch.load(io.BytesIO(checkpoint), map_location="cpu", weights_only=True)
    return state
