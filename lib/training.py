"""Training of fixed-point models by implicit differentiation: objects in, history out.

One loop trains one model, or a stack of models whose tensors share a leading dimension. The members of a
stack never mix: each has its own loss, its own optimizer state and its own end.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lib.implicit import NeumannSeries, implicit_fixed_point
from lib.models import FixedPointModel
from lib.operators import Operator
from lib.products import products_in
from lib.solvers import Anderson, Solution, Solver, Status, fixed_point

COMPLETED, DIVERGED, OUT_OF_TIME = "completed", "diverged", "out of time"

LOSS_LIMIT = 1e3
"""A loss above this is a divergence: images in [-1, 1] are at most 4 apart in mean square."""

TEST_BATCH = 100
"""Images in a batch of an evaluation."""

PRECONDITIONER_AGE = 10
"""Optimizer steps after which a preconditioner is computed again; it costs about as much as 20 products."""

FARTHEST = 10.0
"""Largest entry of the parameters at which a line search evaluates the loss."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state in a checkpoint, behind each parameter."""

UNREAD_STEPS = 50
"""On an accelerator, where reading a loss waits for the device: optimizer steps between two readings."""

Row = dict[str, float]
Evaluation = tuple[Tensor, Solution, Solution]


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba, ICLR 2015) with a decaying learning rate.

    Attributes:
        learning_rate: at the first step.
        final_learning_rate: after the last step; None keeps the first one.
        schedule: the decay between them over all steps.
    """

    learning_rate: float = 1e-3
    final_learning_rate: float | None = None
    schedule: Literal["cosine", "linear"] = "cosine"

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate at a step of so many."""
        high = self.learning_rate
        low = high if self.final_learning_rate is None else self.final_learning_rate
        share = step / steps
        left = 1 - share if self.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
        return low + (high - low) * left


@dataclass(frozen=True)
class LBFGS:
    """L-BFGS with a strong Wolfe line search: one iteration per epoch, for one loss that stays the same.

    Attributes:
        evaluations: of the loss in a line search, at most.
        memory: pairs of steps and gradients.
    """

    evaluations: int = 20
    memory: int = 20


@dataclass
class History:
    """What the training of one model results in.

    Attributes:
        rows: a row of metrics per epoch; epoch 0 is the untrained model. Columns `epoch`, `seconds`,
            `train_loss`, `test_loss`, `test_psnr` (dB) and, for the solves `forward`, `backward` (training)
            and `test`, the means of `_steps` and `_residual` and the share `_unconverged`; a Neumann series
            has no such share.
        status: `completed`, `diverged`, `out of time`, or empty while it trains.
        reason: why it did not complete.
        weights: `FixedPointModel.weights` at its end, without a stack dimension.
        seconds: computing time.
    """

    rows: list[Row] = field(default_factory=list)
    status: str = ""
    reason: str = ""
    weights: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0


def generator(seed: int, *purpose: object) -> torch.Generator:
    """Return a generator of its own for every purpose, so that no draw depends on what was drawn before."""
    label = "/".join(str(part) for part in (seed, *purpose))
    digest = hashlib.sha256(label.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: results then do not depend on the number of cores.

    The products of a batch are too small to gain from a second thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def observe(operator: Operator, images: Tensor, noise: Tensor, n: Tensor) -> Tensor:
    """Return the data `f = K u + noise n`, `(*stack, N, C, H, W)`, with the same `n` for a whole stack.

    Args:
        operator: `K`.
        images: `u`, `(N, C, H, W)`.
        noise: standard deviations, `(*stack)`.
        n: standard normal numbers of the shape of `K u`.
    """
    return operator.forward(images) + noise[..., None, None, None, None] * n


def psnr(mse: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of mean squared errors of images in [-1, 1]."""
    return 10 * torch.log10(4 / mse.clamp_min(1e-12))


def train(model: FixedPointModel, images: Tensor, noise: float, **options: Any) -> History:
    """Train one model in place, and return its history.

    Args:
        model: without a stack dimension.
        images, noise, options: see `Training`.
    """
    return Training(model, images, noise, **options).run()[0]


class Training:
    """Minimize the mean squared error of the fixed points `u*` over the weights of a model.

    The data are `f = K u + noise n` with standard normal `n`. The gradient is the implicit one.

    Args:
        model: trained in place; with a leading stack dimension in `tau`, `lam`, `gamma` and the weights it is
            many models at once. Members that end early leave it.
        images: `u`, `(N, C, H, W)`, on the model's device.
        noise: standard deviation, a number or one for each member of the stack.
        epochs: passes over the images; of L-BFGS iterations.
        batch_size: images in an optimizer step; None takes all.
        optimizer: `Adam` or `LBFGS`.
        solver: of the fixed point.
        adjoint: solver of the adjoint equation, or a Neumann series in its place; None is `solver`.
        start: first iterate `u^0` of the data `f`; None is `K^T f`.
        precondition: whether both solves are preconditioned (`FixedPointModel.preconditioner`).
        warm_start: every image keeps its noise, and its solves start from the solutions of the last epoch;
            otherwise order and noise are drawn in each epoch. It needs all images in one batch.
        test: images of the evaluation, or None for none.
        test_every: epochs from one evaluation to the next.
        time_budget: seconds after which a member ends as `out of time`.
        precision: of the products on a GPU, `float32` or `tf32`.
        seed: of order and noise.

    Attributes:
        members: the history of each member.
        alive: indices of the members that still train, in the order of the stack.
        epoch, step: epochs and optimizer steps that have ended.

    Raises:
        ValueError: L-BFGS or a warm start is asked for with batches, or L-BFGS with a stack.
    """

    def __init__(
        self,
        model: FixedPointModel,
        images: Tensor,
        noise: float | Tensor,
        *,
        epochs: int,
        batch_size: int | None = None,
        optimizer: Adam | LBFGS = Adam(),
        solver: Solver = Anderson(),  # noqa: B008
        adjoint: Solver | NeumannSeries | None = None,
        start: Callable[[Tensor], Tensor] | None = None,
        precondition: bool = False,
        warm_start: bool = False,
        test: Tensor | None = None,
        test_every: int = 1,
        time_budget: float = math.inf,
        precision: Literal["float32", "tf32"] = "float32",
        seed: int = 0,
    ) -> None:
        self.model, self.images, self.test = model, images, test
        self.device, self.stacked = model.tau.device, model.tau.dim() > 0
        self.noise = torch.as_tensor(noise, dtype=model.tau.dtype, device=self.device)
        self.epochs, self.batch_size, self.test_every = epochs, batch_size or len(images), test_every
        self.steps_per_epoch = math.ceil(len(images) / self.batch_size)
        self.schedule, self.solver, self.adjoint = optimizer, solver, adjoint
        self.start = start or model.operator.adjoint
        self.precondition, self.warm_start, self.precision = precondition, warm_start, precision
        self.time_budget, self.seed = time_budget, seed
        self.members = [History() for _ in range(model.tau.numel())]
        self.alive = list(range(len(self.members)))
        if self.steps_per_epoch > 1 and (warm_start or isinstance(optimizer, LBFGS)):
            raise ValueError(f"batch_size: got {batch_size}, allowed: all images, for a warm start or L-BFGS")
        if isinstance(optimizer, LBFGS):
            if len(self.members) > 1:
                raise ValueError(f"model: got a stack of {len(self.members)}, allowed: one model for L-BFGS")
            search = (1.0, 1, optimizer.evaluations, 0.0, 0.0, optimizer.memory, "strong_wolfe")
            self.optimizer: torch.optim.Optimizer = torch.optim.LBFGS(model.parameters(), *search)
        else:
            # Not fused on a CPU: that kernel rounds a tensor's last numbers otherwise, and members would not
            # be equal. On a GPU it reads and writes each tensor once, not at every operation.
            fused = self.device.type != "cpu"
            rate = optimizer.learning_rate
            self.optimizer = torch.optim.Adam(model.parameters(), lr=rate, foreach=not fused, fused=fused)
        # The data need not have the shape of the images.
        self.data_shape = model.operator.forward(images[:1]).shape[1:]
        self.epoch = self.step = 0
        self.solutions: dict[str, Tensor] = {}
        self.P: Tensor | None = None
        # Step, losses and solver steps of optimizer steps whose losses were not read, and when they began.
        self.unread: list[tuple[int, Tensor, Tensor]] = []
        self.unread_since = 0.0

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.epochs * self.steps_per_epoch

    @one_thread()
    def run(
        self,
        on_epoch: Callable[[Training], object] = lambda training: None,
        on_step: Callable[[], object] = lambda: None,
    ) -> list[History]:
        """Train until every member has ended.

        Args:
            on_epoch: called after each epoch, when a `checkpoint` of each living member can be taken.
            on_step: called after each optimizer step.

        Returns:
            The history of each member.
        """
        with products_in(self.precision):
            if self.epoch == 0 and self.test is not None:
                self._record(self._evaluate(self.test))
            while self.alive and self.epoch < self.epochs:
                meter = self._train_epoch(on_step)
                if not self.alive:
                    break
                self.epoch += 1
                tested = self.epoch == self.epochs or self.epoch % self.test_every == 0
                test = self._evaluate(self.test) if tested and self.test is not None else None
                self._record(test, meter)
                on_epoch(self)
            self._end(COMPLETED, dict.fromkeys(range(len(self.alive)), ""))
        return self.members

    def _train_epoch(self, on_step: Callable[[], object]) -> _Meter:
        order = torch.randperm(len(self.images), generator=generator(self.seed, "order", self.epoch))
        draws = generator(self.seed, "noise", self.epoch)
        if self.warm_start:
            order, draws = torch.arange(len(self.images)), generator(self.seed, "noise")
        meter = _Meter()
        for indices in order.split(self.batch_size):
            images = self.images[indices.to(self.device)]
            self._train_step(images, self._draw(images, draws), meter)
            last = self.step % self.steps_per_epoch == 0
            if self.device.type == "cpu" or last or len(self.unread) == UNREAD_STEPS:
                self._read_losses(meter)
                self._end_late(meter)
                if not self.alive:
                    break
            on_step()
        return meter

    def _draw(self, images: Tensor, draws: torch.Generator) -> Tensor:
        """Draw the noise `n` of images, of the shape of their data."""
        return torch.randn(len(images), *self.data_shape, generator=draws).to(images)

    def _train_step(self, images: Tensor, n: Tensor, meter: _Meter) -> None:
        start = time.perf_counter()
        f = observe(self.model.operator, images, self.noise, n)
        step = self.step - self.epoch * self.steps_per_epoch
        if self.precondition and step % PRECONDITIONER_AGE == 0:
            self.P = self.model.preconditioner(images.shape[-3:])
        if isinstance(self.schedule, LBFGS):
            evaluation = self._search(images, f)
        else:
            evaluation = self._evaluate_gradient(images, f)
            for group in self.optimizer.param_groups:
                group["lr"] = self.schedule.rate(self.step, self.steps)
            self.optimizer.step()
        self.model.refresh()
        self.step += 1
        loss, solution, adjoint = evaluation
        if not self.unread:
            self.unread_since = start
        work = solution.steps.double().mean(-1) + adjoint.steps.double().mean(-1)
        self.unread.append((step + 1, loss, work.reshape(-1)))
        meter.add(
            len(images),
            train_loss=loss,
            **self._solver_metrics("forward", solution),
            **self._solver_metrics("backward", adjoint, series=isinstance(self.adjoint, NeumannSeries)),
        )

    def _evaluate_gradient(self, images: Tensor, f: Tensor) -> Evaluation:
        """Return the losses `(members,)` and both solutions; the gradient is left in the parameters."""
        problem, u0 = self.model.problem(f, self.P), self.start(f)
        if self.solutions:
            last = self.solutions
            problem, u0 = replace(problem, first_adjoint=lambda g: last["backward"]), last["forward"]
        adjoint: list[Solution] = []
        solution = implicit_fixed_point(problem, u0, self.solver, self.adjoint, adjoint.append)
        loss = (solution.value - images).square().mean((-4, -3, -2, -1))
        self.optimizer.zero_grad()
        # A member that diverged takes no part in the sum: its NaN stays in its own slice.
        torch.where(loss.detach() <= LOSS_LIMIT, loss, 0).sum().backward()
        if self.warm_start:
            zero = torch.zeros_like(solution.value)
            self.solutions = {
                "forward": _usable(solution, self.start(f)),
                "backward": _usable(adjoint[0], zero),
            }
        return loss.detach().reshape(-1), solution, adjoint[0]

    def _search(self, images: Tensor, f: Tensor) -> Evaluation:
        """Take one step of L-BFGS, and return its first evaluation."""
        evaluations: list[Evaluation] = []

        def closure() -> float:
            # A search may extrapolate too far, where nothing can be computed.
            if not all(parameter.abs().max() <= FARTHEST for parameter in self.model.parameters()):
                self.optimizer.zero_grad()
                return math.inf
            self.model.refresh()
            if self.precondition:
                self.P = self.model.preconditioner(images.shape[-3:])
            evaluations.append(self._evaluate_gradient(images, f))
            return evaluations[-1][0].sum().item()

        self.optimizer.step(closure)
        return evaluations[0]

    @torch.no_grad()
    def _evaluate(self, images: Tensor) -> _Meter:
        start, meter, steps = time.perf_counter(), _Meter(), torch.zeros(())
        n = self._draw(images, generator(self.seed, "test noise"))
        P = self.model.preconditioner(images.shape[-3:]) if self.precondition else None
        for batch, batch_n in zip(images.split(TEST_BATCH), n.split(TEST_BATCH), strict=True):
            f = observe(self.model.operator, batch, self.noise, batch_n)
            solution = fixed_point(self.model.problem(f, P), self.start(f), self.solver)
            mse = (solution.value - batch).square().mean((-3, -2, -1)).reshape(len(self.alive), -1)
            metrics = self._solver_metrics("test", solution)
            meter.add(len(batch), test_loss=mse, test_psnr=psnr(mse), **metrics)
            steps = steps.to(self.device) + solution.steps.double().sum(-1)
        self._charge(start, steps.reshape(-1))
        return meter

    def _solver_metrics(self, name: str, solution: Solution, series: bool = False) -> dict[str, Tensor]:
        metrics = {f"{name}_steps": solution.steps, f"{name}_residual": solution.residual}
        if not series:
            # A sum of so many terms is what was asked for, whatever its residual.
            metrics[f"{name}_unconverged"] = solution.status != Status.CONVERGED
        return {key: value.reshape(len(self.alive), -1) for key, value in metrics.items()}

    def _read_losses(self, meter: _Meter) -> None:
        """Charge the members with the steps since the last reading, and end those whose loss has diverged.

        On a GPU such a member trains on until then, so that its last weights are those of a later step.
        """
        steps, losses, work = zip(*self.unread, strict=True)
        self.unread = []
        self._charge(self.unread_since, torch.stack(work).sum(0))
        lost: dict[int, str] = {}
        for step, values in zip(steps, torch.stack(losses).tolist(), strict=True):
            where = f"above {LOSS_LIMIT:g} in epoch {self.epoch + 1}, step {step}"
            for position, value in enumerate(values):
                if not value <= LOSS_LIMIT:
                    lost.setdefault(position, f"training loss {value:.3g} {where}")
        meter.keep([position for position in range(len(self.alive)) if position not in lost])
        self._end(DIVERGED, lost)

    def _end_late(self, meter: _Meter) -> None:
        """End the members whose time budget is spent."""
        late = [p for p, index in enumerate(self.alive) if self.members[index].seconds > self.time_budget]
        if late:
            meter.keep([p for p in range(len(self.alive)) if p not in late])
            reason = f"time budget of {self.time_budget:g} s spent in epoch {self.epoch + 1}"
            self._end(OUT_OF_TIME, dict.fromkeys(late, reason))

    def _record(self, test: _Meter | None, training: _Meter | None = None) -> None:
        """Add a row to the history of every living member; one whose test loss is absurd has diverged."""
        lost = {}
        measured = [meter.rows() for meter in (test, training) if meter is not None]
        for position, index in enumerate(self.alive):
            row = {"epoch": self.epoch, "seconds": self.members[index].seconds}
            for rows in measured:
                row |= rows[position]
            if test is None or row["test_loss"] <= LOSS_LIMIT:
                self.members[index].rows.append(row)
            else:
                loss = f"test loss {row['test_loss']:.3g}"
                lost[position] = f"{loss} above {LOSS_LIMIT:g} after epoch {self.epoch}"
        self._end(DIVERGED, lost)

    def _charge(self, start: float, steps: Tensor) -> None:
        """Charge the time since `start` to the living members in proportion to their solver steps."""
        shares = (steps / steps.sum()).tolist()
        elapsed = time.perf_counter() - start
        for index, share in zip(self.alive, shares, strict=True):
            self.members[index].seconds += elapsed * share

    def _slice(self, tensor: Tensor, position: int) -> Tensor:
        """Return a copy of a member's part of a tensor."""
        return (tensor[position] if self.stacked else tensor).detach().cpu().clone()

    def _end(self, status: str, reasons: dict[int, str]) -> None:
        """End the members at these positions; the others go on without them."""
        if not reasons:
            return
        weights = self.model.weights()
        for position, reason in reasons.items():
            member = self.members[self.alive[position]]
            member.status, member.reason = status, reason
            member.weights = {name: self._slice(weight, position) for name, weight in weights.items()}
        left = [position for position in range(len(self.alive)) if position not in reasons]
        self.alive = [self.alive[position] for position in left]
        if left:
            self._keep(left)

    def _keep(self, positions: Sequence[int]) -> None:
        """Take the members at other positions out of the stack."""
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

    def checkpoint(self, index: int) -> dict[str, Any]:
        """Return all that is needed to resume the living member `index`, alone or in any stack."""
        position, member = self.alive.index(index), self.members[index]
        adam, weights = isinstance(self.schedule, Adam), {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            tensors = (parameter.data, *(state[moment] for moment in MOMENTS if adam))
            weights[name] = [self._slice(tensor, position) for tensor in tensors]
        named = dict(self.model.named_buffers()) | self.solutions
        buffers = {name: self._slice(tensor, position) for name, tensor in named.items()}
        content = {"epoch": self.epoch, "seconds": member.seconds, "history": member.rows}
        # L-BFGS has one state for all parameters, and one member.
        content |= {} if adam else {"search": self.optimizer.state_dict()["state"][0]}
        return content | {"weights": weights, "buffers": buffers}

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """Resume from a `checkpoint` of each member; they need not have been in one stack before.

        Raises:
            ValueError: the checkpoints are of different epochs.
        """
        self.epoch = states[0]["epoch"]
        if any(state["epoch"] != self.epoch for state in states):
            raise ValueError(f"checkpoints of a stack are of one epoch, got {[s['epoch'] for s in states]}")
        self.step = self.epoch * self.steps_per_epoch

        def joined(slices: Sequence[Tensor]) -> Tensor:
            return (torch.stack(list(slices)) if self.stacked else slices[0]).to(self.device)

        for name, parameter in self.model.named_parameters():
            tensors = zip(*(state["weights"][name] for state in states), strict=True)
            parameter.data, *moments = map(joined, tensors)
            if moments:
                step = torch.tensor(float(self.step), device=self.device)
                self.optimizer.state[parameter] = {"step": step} | dict(zip(MOMENTS, moments, strict=True))
        if "search" in states[0]:
            search = {"state": {0: states[0]["search"]}}
            self.optimizer.load_state_dict(self.optimizer.state_dict() | search)
        for name in states[0]["buffers"]:
            buffer = joined([state["buffers"][name] for state in states])
            if name in ("forward", "backward"):
                self.solutions[name] = buffer
            else:
                module, _, attribute = name.rpartition(".")
                setattr(self.model.get_submodule(module), attribute, buffer)
        for member, state in zip(self.members, states, strict=True):
            member.rows, member.seconds = state["history"], state["seconds"]


class _Meter:
    """Sums of per-sample quantities for every member, `(members,)` each."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, count: int, **values: Tensor) -> None:
        """Add values `(members, samples)`, or means `(members,)` over `count` samples."""
        self.count += count
        for name, value in values.items():
            total = value.double().sum(-1) if value.dim() == 2 else value.double() * count
            self.sums[name] = self.sums.get(name, 0) + total

    def keep(self, members: list[int]) -> None:
        self.sums = {name: total[members] for name, total in self.sums.items()}

    def rows(self) -> list[Row]:
        """Return the means of each member."""
        means = [(total / self.count).tolist() for total in self.sums.values()]
        return [dict(zip(self.sums, row, strict=True)) for row in zip(*means, strict=True)]


def _usable(solution: Solution, otherwise: Tensor) -> Tensor:
    """Return the solution as first iterate of the next epoch; samples that diverged start afresh."""
    diverged = (solution.status == Status.DIVERGED)[..., None, None, None]
    return torch.where(diverged, otherwise, solution.value.detach())
