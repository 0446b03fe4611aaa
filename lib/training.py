"""Training of fixed-point models by implicit differentiation.

One loop trains one model, or a stack of models whose tensors share a leading dimension. The members of a
stack are independent: each has its own loss, optimizer state and status.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
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
"""Loss above which a member has diverged; the mean squared error of two images in [-1, 1] is at most 4."""

TEST_BATCH = 100
"""Batch size of an evaluation."""

PRECONDITIONER_AGE = 10
"""Number of optimizer steps that share a preconditioner, which costs about as much as 20 products."""

FARTHEST = 10.0
"""Largest entry of the parameters at which a line search evaluates the loss."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state of a parameter in a checkpoint."""

Row = dict[str, float]
Evaluation = tuple[Tensor, Solution, Solution]


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba, ICLR 2015) with a decaying learning rate.

    Attributes:
        learning_rate: learning rate at the first step.
        final_learning_rate: learning rate after the last step; None keeps the first one.
        schedule: decay between them over all steps.

    >>> [round(Adam(0.1, 0.02, "linear").rate(step, 4), 3) for step in range(5)]
    [0.1, 0.08, 0.06, 0.04, 0.02]
    """

    learning_rate: float = 1e-3
    final_learning_rate: float | None = None
    schedule: Literal["cosine", "linear"] = "cosine"

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate at a step of `steps` steps."""
        high = self.learning_rate
        low = high if self.final_learning_rate is None else self.final_learning_rate
        share = step / steps
        left = 1 - share if self.schedule == "linear" else (1 + math.cos(math.pi * share)) / 2
        return low + (high - low) * left


@dataclass(frozen=True)
class LBFGS:
    """L-BFGS with a strong Wolfe line search: one iteration per epoch, for a fixed loss.

    Attributes:
        evaluations: maximum number of evaluations of the loss in a line search.
        memory: number of pairs of steps and gradients.
    """

    evaluations: int = 20
    memory: int = 20


@dataclass
class History:
    """Result of the training of one model.

    Attributes:
        rows: metrics of each epoch; epoch 0 is the untrained model. Columns `epoch`, `seconds`, `train_loss`,
            `test_loss`, `test_psnr` (dB) and, for the solves `forward`, `backward` (training) and `test`, the
            means `_steps` and `_residual` and the share `_unconverged`, which a Neumann series lacks.
        status: `completed`, `diverged` or `out of time`; empty during the training.
        reason: why it did not complete.
        weights: `FixedPointModel.weights` at the end, without a stack dimension.
        seconds: computing time.
    """

    rows: list[Row] = field(default_factory=list)
    status: str = ""
    reason: str = ""
    weights: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0


def generator(seed: int, *purpose: object) -> torch.Generator:
    """Return an independent generator for a purpose, so that draws do not depend on earlier ones."""
    label = "/".join(str(part) for part in (seed, *purpose))
    digest = hashlib.sha256(label.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: results do not depend on the number of cores, and batches are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def observe(operator: Operator, images: Tensor, noise: Tensor, n: Tensor | torch.Generator) -> Tensor:
    """Return the data `f = K u + noise n`, `(*stack, N, C, H, W)`, with the same `n` for all members.

    Args:
        operator: `K`.
        images: `u`, `(N, C, H, W)`.
        noise: standard deviations, `(*stack)`.
        n: standard normal numbers of the shape of `K u`, or a generator that draws them.
    """
    data = operator.forward(images)
    if isinstance(n, torch.Generator):
        n = torch.randn(data.shape, generator=n).to(images)
    return data + noise[..., None, None, None, None] * n


def psnr(mse: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of mean squared errors of images in [-1, 1].

    >>> psnr(torch.tensor([4.0, 0.04])).round(decimals=2)
    tensor([ 0., 20.])
    """
    return 10 * torch.log10(4 / mse.clamp_min(1e-12))


def train(model: FixedPointModel, images: Tensor, noise: float, **options: Any) -> History:
    """Train one model in place and return its history.

    Args:
        model: a model without a stack dimension.
        images, noise, options: see `Training`.

    >>> from lib.kernels import cosine_kernels
    >>> from lib.operators import Identity
    >>> from lib.regularizer import ConvFieldsOfExperts, smoothed_sign
    >>> A, images = cosine_kernels(4, 3), torch.zeros(8, 1, 6, 6)
    >>> model = FixedPointModel(Identity(), ConvFieldsOfExperts(A, None, smoothed_sign(5)), 0.005, 4, 1)
    >>> history = train(model, images, noise=0.3, epochs=5, optimizer=Adam(0.1), warm_start=True)
    >>> history.status, history.rows[-1]["train_loss"] < history.rows[1]["train_loss"]
    ('completed', True)
    """
    return Training(model, images, noise, **options).run()[0]


class Training:
    """Minimize the mean squared error of the fixed points `u*` over the weights of a model.

    The data are `f = K u + noise n` with standard normal `n`. Gradients are implicit.

    Args:
        model: trained in place. `tau`, `lam`, `gamma` and the weights may have a leading dimension: a stack
            of models; members that diverge or run out of time leave it.
        images: `u`, `(N, C, H, W)`, on the model's device.
        noise: standard deviation, a number or one for each member of the stack.
        epochs: passes over the images, or iterations of L-BFGS.
        batch_size: images per optimizer step; None takes all.
        optimizer: `Adam` or `LBFGS`.
        solver: solver of the fixed point.
        adjoint: solver of the adjoint equation, or a Neumann series; None uses `solver`.
        start: maps the data `f` to the first iterate; None uses `K^T f`.
        penalty: added to the loss, `(model, u*) -> (*stack)`; its gradient goes to the weights alone.
        precondition: whether both solves are preconditioned (`FixedPointModel.preconditioner`).
        warm_start: whether solves start from the solutions of the last epoch; every image then keeps its
            batch and its noise, as L-BFGS always has it. Otherwise each epoch draws order and noise.
        test: images of the evaluation, of any size if the weights are kernels; None skips it.
        test_every: epochs from one evaluation to the next.
        time_budget: seconds after which a member ends as `out of time`.
        precision: precision of products on a GPU, `float32` or `tf32`.
        seed: seed of order and noise.

    Attributes:
        members: history of each member.
        alive: indices of the members that still train, in the order of the stack.
        epoch, step: number of finished epochs and optimizer steps.

    Raises:
        ValueError: L-BFGS with batches or with a stack; a stack that shares a parameter (`LearnedSpline`).
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
        penalty: Callable[[FixedPointModel, Tensor], Tensor | float] = lambda model, u: 0.0,
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
        noise = torch.as_tensor(noise, dtype=model.tau.dtype, device=self.device)
        self.noise = noise.expand(model.tau.shape)
        self.epochs, self.batch_size, self.test_every = epochs, batch_size or len(images), test_every
        self.steps_per_epoch = math.ceil(len(images) / self.batch_size)
        self.schedule, self.solver, self.adjoint = optimizer, solver, adjoint
        self.start, self.penalty = start or model.operator.adjoint, penalty
        self.precondition, self.precision = precondition, precision
        self.warm_start = warm_start or isinstance(optimizer, LBFGS)
        self.time_budget, self.seed = time_budget, seed
        self.members = [History() for _ in range(model.tau.numel())]
        self.alive = list(range(len(self.members)))
        if any(p.shape[: model.tau.dim()] != model.tau.shape for p in model.parameters()):
            raise ValueError(f"Each model of a stack of {len(self.members)} must have its own parameters.")
        if self.steps_per_epoch > 1 and isinstance(optimizer, LBFGS):
            raise ValueError(f"`batch_size` must be all images for L-BFGS, got {batch_size}.")
        if isinstance(optimizer, LBFGS):
            if len(self.members) > 1:
                raise ValueError(f"`model` must be a single model for L-BFGS, got {len(self.members)}.")
            search = (1.0, 1, optimizer.evaluations, 0.0, 0.0, optimizer.memory, "strong_wolfe")
            self.optimizer: torch.optim.Optimizer = torch.optim.LBFGS(model.parameters(), *search)
        else:
            # Fused on a GPU alone: on a CPU the fused kernel rounds depending on the position in a tensor,
            # and members of a stack would differ from models trained alone.
            fused = self.device.type != "cpu"
            rate = optimizer.learning_rate
            self.optimizer = torch.optim.Adam(model.parameters(), lr=rate, foreach=not fused, fused=fused)
        self.epoch = self.step = 0
        self.solutions: dict[str, Tensor] = {}
        self.P: Tensor | None = None

    @property
    def steps(self) -> int:
        """Total number of optimizer steps."""
        return self.epochs * self.steps_per_epoch

    @one_thread()
    def run(
        self,
        on_epoch: Callable[[Training], object] = lambda training: None,
        on_step: Callable[[], object] = lambda: None,
    ) -> list[History]:
        """Train until every member has ended.

        Args:
            on_epoch: called after each epoch, for instance to take a `checkpoint` of each living member.
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
            self._train_step(images, draws, meter)
            if not self.alive:
                break
            on_step()
        return meter

    def _train_step(self, images: Tensor, draws: torch.Generator, meter: _Meter) -> None:
        start = time.perf_counter()
        f = observe(self.model.operator, images, self.noise, draws)
        step = self.step % self.steps_per_epoch
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
        meter.add(
            len(images),
            train_loss=loss,
            **self._solver_metrics("forward", solution),
            **self._solver_metrics("backward", adjoint, series=isinstance(self.adjoint, NeumannSeries)),
        )
        steps = solution.steps.double().mean(-1) + adjoint.steps.double().mean(-1)
        self._charge(start, steps.reshape(-1))
        where = f"above {LOSS_LIMIT:g} in epoch {self.epoch + 1}, step {step + 1}"
        losses = enumerate(loss.tolist())
        diverged = {p: f"training loss {value:.3g} {where}" for p, value in losses if not value <= LOSS_LIMIT}
        self._end(DIVERGED, diverged, meter)
        reason = f"time budget of {self.time_budget:g} s spent in epoch {self.epoch + 1}"
        late = [p for p, index in enumerate(self.alive) if self.members[index].seconds > self.time_budget]
        self._end(OUT_OF_TIME, dict.fromkeys(late, reason), meter)

    def _evaluate_gradient(self, images: Tensor, f: Tensor) -> Evaluation:
        """Compute the gradient, and return the losses `(members,)` and both solutions."""
        problem, u0 = self.model.problem(f, self.P), self.start(f)
        forward, backward = (f"{name} {self.step % self.steps_per_epoch}" for name in ("forward", "backward"))
        if forward in self.solutions:
            w0, u0 = self.solutions[backward], self.solutions[forward]
            problem = replace(problem, first_adjoint=lambda g: w0)
        adjoint: list[Solution] = []
        solution = implicit_fixed_point(problem, u0, self.solver, self.adjoint, adjoint.append)
        loss = (solution.value - images).square().mean((-4, -3, -2, -1))
        loss = loss + self.penalty(self.model, solution.value.detach())
        self.optimizer.zero_grad()
        # Members that diverged are left out of the sum: their NaN stay in their own slices.
        torch.where(loss.detach() <= LOSS_LIMIT, loss, 0).sum().backward()
        if self.warm_start:
            ends = ((forward, solution, self.start(f)), (backward, adjoint[0], torch.zeros_like(images)))
            for name, end, otherwise in ends:
                diverged = (end.status == Status.DIVERGED)[..., None, None, None]
                self.solutions[name] = torch.where(diverged, otherwise, end.value.detach())
        return loss.detach().reshape(-1), solution, adjoint[0]

    def _search(self, images: Tensor, f: Tensor) -> Evaluation:
        """Take one step of L-BFGS, and return its first evaluation."""
        evaluations: list[Evaluation] = []

        def closure() -> float:
            # A line search may extrapolate to weights that overflow.
            if evaluations and not all(p.abs().max() <= FARTHEST for p in self.model.parameters()):
                self.optimizer.zero_grad()
                return LOSS_LIMIT
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
        shape = len(images), *self.model.operator.forward(images[:1]).shape[1:]
        n = torch.randn(shape, generator=generator(self.seed, "test noise")).to(images)
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
            # A truncated series is no failure, whatever its residual.
            metrics[f"{name}_unconverged"] = solution.status != Status.CONVERGED
        return {key: value.reshape(len(self.alive), -1) for key, value in metrics.items()}

    def _record(self, test: _Meter | None, training: _Meter | None = None) -> None:
        """Add a row to the history of every living member, or end it if its test loss exceeds the limit."""
        diverged = {}
        measured = [meter.rows() for meter in (test, training) if meter is not None]
        weights = [weight.reshape(len(self.alive), -1) for weight in self.model.weights().values()]
        finite = torch.stack([weight.isfinite().all(1) for weight in weights]).all(0).tolist()
        for position, index in enumerate(self.alive):
            row = {"epoch": self.epoch, "seconds": self.members[index].seconds}
            for rows in measured:
                row |= rows[position]
            if not finite[position]:
                diverged[position] = f"weights that are not finite in epoch {self.epoch}"
            elif test is None or row["test_loss"] <= LOSS_LIMIT:
                self.members[index].rows.append(row)
            else:
                loss = f"test loss {row['test_loss']:.3g}"
                diverged[position] = f"{loss} above {LOSS_LIMIT:g} after epoch {self.epoch}"
        self._end(DIVERGED, diverged)

    def _charge(self, start: float, steps: Tensor) -> None:
        """Charge the time since `start` to the living members in proportion to their solver steps."""
        shares = (steps / steps.sum()).tolist()
        elapsed = time.perf_counter() - start
        for index, share in zip(self.alive, shares, strict=True):
            self.members[index].seconds += elapsed * share

    def _slice(self, tensor: Tensor, position: int) -> Tensor:
        """Return a copy of a member's slice of a tensor."""
        return (tensor[position] if self.stacked else tensor).detach().cpu().clone()

    def _end(self, status: str, reasons: dict[int, str], *meters: _Meter) -> None:
        """End the members at these positions for these reasons, and remove them from stack and meters."""
        if not reasons:
            return
        weights = self.model.weights()
        for position, reason in reasons.items():
            member = self.members[self.alive[position]]
            member.status, member.reason = status, reason
            member.weights = {name: self._slice(weight, position) for name, weight in weights.items()}
        left = [position for position in range(len(self.alive)) if position not in reasons]
        states = [self.checkpoint(self.alive[position]) for position in left]
        self.alive = [self.alive[position] for position in left]
        for meter in meters:
            meter.sums = {name: total[left] for name, total in meter.sums.items()}
        if left:
            self.noise = self.noise[left]
            self.P = None if self.P is None else self.P[left]
            self._load(states)

    def checkpoint(self, index: int) -> dict[str, Any]:
        """Return the state of the living member `index`, to resume it alone or in any stack."""
        position, member = self.alive.index(index), self.members[index]
        weights = {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            tensors = (parameter.data, *(state[moment] for moment in MOMENTS if moment in state))
            weights[name] = [self._slice(tensor, position) for tensor in tensors]
        named = dict(self.model.named_buffers()) | self.solutions
        buffers = {name: self._slice(tensor, position) for name, tensor in named.items()}
        content = {"epoch": self.epoch, "seconds": member.seconds, "history": list(member.rows)}
        if isinstance(self.schedule, LBFGS):
            # One state for all parameters, and one member.
            content["search"] = deepcopy(self.optimizer.state_dict()["state"][0])
        return content | {"weights": weights, "buffers": buffers}

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """Resume from a `checkpoint` of each member, which may come from different stacks.

        Raises:
            ValueError: the checkpoints are of different epochs.
        """
        self.epoch = states[0]["epoch"]
        if any(state["epoch"] != self.epoch for state in states):
            raise ValueError(f"Checkpoints must be of one epoch, got {[s['epoch'] for s in states]}.")
        self.step = self.epoch * self.steps_per_epoch
        self._load(states)
        if "search" in states[0]:
            search = {"state": {0: deepcopy(states[0]["search"])}}
            self.optimizer.load_state_dict(self.optimizer.state_dict() | search)
        for member, state in zip(self.members, states, strict=True):
            member.rows, member.seconds = list(state["history"]), state["seconds"]

    def _load(self, states: Sequence[dict[str, Any]]) -> None:
        """Replace the tensors of the stack by those of the checkpoints of its members."""

        def joined(slices: Sequence[Tensor]) -> Tensor:
            return (torch.stack(list(slices)) if self.stacked else slices[0].clone()).to(self.device)

        for name, parameter in self.model.named_parameters():
            tensors = zip(*(state["weights"][name] for state in states), strict=True)
            parameter.data, *moments = map(joined, tensors)
            parameter.grad = None
            if moments:
                step = torch.tensor(float(self.step), device=self.device)
                self.optimizer.state[parameter] = {"step": step} | dict(zip(MOMENTS, moments, strict=True))
        for name in states[0]["buffers"]:
            buffer = joined([state["buffers"][name] for state in states])
            if name.split()[0] in ("forward", "backward"):
                self.solutions[name] = buffer
            else:
                module, _, attribute = name.rpartition(".")
                setattr(self.model.get_submodule(module), attribute, buffer)


class _Meter:
    """Means over samples of the metrics of every member."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, count: int, **values: Tensor) -> None:
        """Add values `(members, samples)`, or means `(members,)` over `count` samples."""
        self.count += count
        for name, value in values.items():
            total = value.double().sum(-1) if value.dim() == 2 else value.double() * count
            self.sums[name] = self.sums.get(name, 0) + total

    def rows(self) -> list[Row]:
        """Return the means of each member."""
        means = [(total / self.count).tolist() for total in self.sums.values()]
        return [dict(zip(self.sums, row, strict=True)) for row in zip(*means, strict=True)]
