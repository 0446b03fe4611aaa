"""One training step of several implementations side by side, and the time to the same loss (`make bench`).

All have the same data, weights, tolerances and most steps, on one thread and on two:

- `ours`: `lib`, from cold;
- `ours, preconditioned`: the bilevel model where `K` loses something, with `precondition`; a step bears its
  share of the preconditioner, which serves several steps in a training;
- `ours, in training`: the steps of a training on photographs, whose solves start from the last solutions;
- `textbook`: a deep equilibrium step as it is taught, written for this comparison alone: autograd through one
  recorded step in a backward hook, Anderson acceleration with one stopping rule for the whole batch and an
  absolute ridge, a dense matrix for the mask, 1,000 plain iterations for photographs;
- `TorchDEQ`: its Anderson solver and implicit gradient with our step map;
- `DeepInverse`: its gradient descent as a deep equilibrium model, with its operators (MNIST alone).

The errors of loss and hypergradient are relative to a float64 solution at 1e-10, or to the best one
that 5,000 steps come to: its residual is in the table, and where it is not small there is nothing to compare
with.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import pairwise
from itertools import product as pairs
from statistics import median
from typing import Any

import pandas as pd
import torch
from benches import save
from torch import Tensor
from torch.nn import functional
from torchdeq import get_deq
from tqdm import tqdm

from lib.deepinverse import FieldPrior, deepinv
from lib.experiments.config import FacesConfig, RunConfig
from lib.experiments.problem import (
    Config,
    first_iterate,
    generator,
    is_preconditioned,
    load_images,
    make_adjoint_solver,
    make_model,
    make_solver,
    observe,
    one_thread,
)
from lib.experiments.profiles import faces_config
from lib.experiments.trainer import PRECONDITIONER_AGE, Trainer
from lib.implicit import NeumannSeries, implicit_fixed_point
from lib.models import MODELS, FixedPointModel
from lib.operators import TASKS, CircularBlur, Mask
from lib.products import product
from lib.solvers import Anderson, Solution, Solver

REFERENCE = Anderson(tol=1e-10, max_steps=5000, memory=20, regularization=1e-10)
PRECONDITIONED = "ours, preconditioned"

PLAIN_STEPS = 1000
"""Iterations of the textbook's solves for photographs."""


@dataclass
class Problem:
    """A batch and a model; images are `(N, 1, H, W)`.

    Attributes:
        plain_steps: of the textbook's solves for photographs.
        P: the model's preconditioner, where `ours_preconditioned` is to be compared.
    """

    config: Config
    model: FixedPointModel
    f: Tensor
    truth: Tensor
    plain_steps: int = PLAIN_STEPS
    P: Tensor | None = None

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.model.regularizer.parameters())


@dataclass
class Step:
    """What one training step came to."""

    loss: float
    gradient: Tensor
    forward: float
    backward: float
    residual: float = float("nan")


Method = Callable[[Problem], Step]


def make_problem(config: Config) -> Problem:
    """The first batch of a training with untrained weights."""
    model = make_model([config])
    truth = load_images(config)["train"][: config.batch_size]
    n = torch.randn(truth.shape, generator=generator(0, "bench"))
    return Problem(config, model, observe(model.operator, truth, torch.tensor([config.noise]), n), truth)


def exact(problem: Problem) -> Step:
    """Loss and hypergradient in float64, as good as they can be had."""
    model = deepcopy(problem.model).double()
    double = Problem(problem.config, model, problem.f.double(), problem.truth.double())
    return ours(double, REFERENCE, REFERENCE)


def finish(problem: Problem, value: Tensor, forward: float, backward: Callable[[], float]) -> Step:
    """The loss and its gradient from the fixed point that a method returned."""
    for parameter in problem.parameters:
        parameter.grad = None
    loss = (value.view_as(problem.truth) - problem.truth).square().mean()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in problem.parameters if p.grad is not None])
    return Step(loss.item(), gradient, forward, backward())


def ours(
    problem: Problem, solver: Solver | None = None, adjoint_solver: Solver | NeumannSeries | None = None
) -> Step:
    adjoint: list[Solution] = []
    P = problem.P
    if isinstance(problem.config, FacesConfig):
        # Made anew in every step, also in a training.
        P = problem.model.preconditioner(problem.truth.shape[1:])
    solution = implicit_fixed_point(
        problem.model.problem(problem.f, P if is_preconditioned(problem.config) else None),
        first_iterate(problem.f, problem.config),
        solver or make_solver(problem.config),
        adjoint_solver or make_adjoint_solver(problem.config),
        on_adjoint=adjoint.append,
    )
    steps = float(solution.steps.max())
    step = finish(problem, solution.value, steps, lambda: float(adjoint[0].steps.max()))
    return replace(step, residual=max(s.residual.max().item() for s in (solution, adjoint[0])))


def ours_preconditioned(problem: Problem) -> Step:
    return ours(replace(problem, config=problem.config.model_copy(update={"precondition": True})))


def textbook_map(problem: Problem) -> Callable[[Tensor], Tensor]:
    """The step map of images `(N, 1, H, W)` with textbook operators."""
    model, operator, f = problem.model, problem.model.operator, problem.f[0]
    tau, lam, gamma = (float(value) for value in (model.tau, model.lam, model.gamma))
    forward = adjoint = lambda u: u
    if isinstance(operator, Mask):
        M = torch.diag(operator.mask.flatten())
        forward = adjoint = lambda u: functional.linear(u.flatten(1), M).view_as(u)
    if isinstance(operator, CircularBlur):
        k, p = operator.kernel[None, None], operator.kernel.shape[-1] // 2

        def forward(u: Tensor) -> Tensor:
            return functional.conv2d(functional.pad(u, (p, p, p, p), mode="circular"), k.flip(-1, -2))

        def adjoint(v: Tensor) -> Tensor:
            return functional.conv2d(functional.pad(v, (p, p, p, p), mode="circular"), k)

    weights = [weight[0] for weight in model.regularizer.parameters()]
    if isinstance(problem.config, RunConfig):
        A, b, C = weights if len(weights) == 3 else (*weights, weights[0])

        def field(u: Tensor) -> Tensor:
            return functional.linear(functional.linear(u.flatten(1), A, b).relu(), C.T).view_as(u)
    else:
        scales = model.regularizer.scales[0]
        A, C = scales[0] * weights[0], scales[-1] * weights[-1]
        s, k = problem.config.sharpness, A.shape[-1] // 2

        def field(u: Tensor) -> Tensor:
            z = functional.conv2d(u, A[:, None], padding=k)
            return functional.conv_transpose2d(torch.tanh(s * z), C[:, None], padding=k)

    return lambda u: u - tau * (lam * adjoint(forward(u) - f) + gamma * field(u))


def textbook_anderson(
    T: Callable[[Tensor], Tensor], u0: Tensor, config: Config, ridge: float = 1e-4
) -> tuple[Tensor, int]:
    """Anderson acceleration of a batch as one problem, with a bordered system solved in each step."""
    n, d, m = len(u0), u0[0].numel(), config.memory
    X, F = torch.zeros(2, n, m, d)
    border = torch.zeros(n, m + 1, m + 1)
    border[:, 0, 1:] = border[:, 1:, 0] = 1
    right = torch.zeros(n, m + 1, 1)
    right[:, 0] = 1
    u = u0
    for k in range(config.max_steps):
        slot, count = k % m, min(k + 1, m)
        X[:, slot], F[:, slot] = u.flatten(1), T(u).flatten(1)
        residual = (F[:, slot] - X[:, slot]).norm()
        if residual <= config.tol * F[:, slot].norm():
            break
        G = F[:, :count] - X[:, :count]
        border[:, 1 : count + 1, 1 : count + 1] = torch.bmm(G, G.mT) + ridge * torch.eye(count)
        alpha = torch.linalg.solve(border[:, : count + 1, : count + 1], right[:, : count + 1])[:, 1:]
        u = (alpha.mT @ F[:, :count]).view_as(u0)
    return u, k + 1


def textbook_plain(T: Callable[[Tensor], Tensor], u0: Tensor, steps: int) -> tuple[Tensor, int]:
    u = u0
    for _ in range(steps):
        u = T(u)
    return u, steps


def textbook(problem: Problem) -> Step:
    T, config = textbook_map(problem), problem.config
    mnist = isinstance(config, RunConfig)

    def solve(step_map: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, int]:
        if mnist:
            return textbook_anderson(step_map, start, config)
        return textbook_plain(step_map, start, problem.plain_steps)

    with torch.no_grad():
        u, forward = solve(T, torch.zeros_like(problem.truth) if mnist else problem.f[0])
    value = T(u)
    start = value.detach().clone().requires_grad_()
    step = T(start)
    backward = [0]

    def hook(g: Tensor) -> Tensor:
        def adjoint_map(w: Tensor) -> Tensor:
            return torch.autograd.grad(step, start, w, retain_graph=True)[0] + g

        w, backward[0] = solve(adjoint_map, g)
        return w

    value.register_hook(hook)
    return finish(problem, value, forward, lambda: backward[0])


def torchdeq(problem: Problem) -> Step:
    config, T = problem.config, problem.model.step_map(problem.f)
    limits = {f"{side}_max_iter": config.max_steps for side in "fb"} | {f"{s}_tol": config.tol for s in "fb"}
    names = {"f_solver": "anderson", "b_solver": "anderson", "f_stop_mode": "rel", "b_stop_mode": "rel"}
    deq = get_deq(**names, **limits, ift=True)
    values, info = deq(T, first_iterate(problem.f, config))
    return finish(problem, values[-1], float(info["nstep"].max()), lambda: float("nan"))


def deepinverse(problem: Problem) -> Step:
    model, config, operator = problem.model, problem.config, problem.model.operator
    size = problem.truth.shape[1:]
    if isinstance(operator, Mask):
        physics = deepinv.physics.Inpainting(size, mask=operator.mask[None])
    elif isinstance(operator, CircularBlur):
        physics = deepinv.physics.BlurFFT(size, filter=operator.kernel[None, None])
    else:
        physics = deepinv.physics.Denoising()
    prior = FieldPrior(model)
    # Or the function is evaluated in every step.
    prior.explicit_prior = False
    accelerated = deepinv.optim.optimizers.AndersonAccelerationConfig(config.memory, config.beta, 1e-4)
    solver = deepinv.optim.GD(
        data_fidelity=deepinv.optim.L2(),
        prior=prior,
        stepsize=float(model.tau),
        lambda_reg=1.0,
        trainable_params=[],
        max_iter=config.max_steps,
        thres_conv=config.tol,
        early_stop=True,
        custom_init=lambda y, physics: {"est": (torch.zeros_like(y),)},
        anderson_acceleration=accelerated,
        DEQ=deepinv.optim.DEQConfig(anderson_acceleration_backward=True, max_iter_backward=config.max_steps),
    )
    value = solver(problem.f[0], physics)
    return finish(problem, value, float("nan"), lambda: float("nan"))


def flops(problem: Problem) -> float:
    """Floating-point operations of the products in one evaluation of the step map, or of its transpose."""
    n = problem.truth.numel()
    A = problem.model.regularizer.A[0]
    return 4.0 * n * (len(A) if isinstance(problem.config, RunConfig) else A.numel())


def product_rate(problem: Problem, repeats: int = 20) -> float:
    """Floating-point operations a second of one bare product of the shapes of the step map."""
    if isinstance(problem.config, RunConfig):
        x, W = problem.truth.flatten(1), problem.model.regularizer.A[0].detach()
        seconds = timed(lambda: product(x, W), repeats)
        return 2 * x.numel() * W.shape[1] / min(seconds)
    A = problem.model.regularizer.A.detach()[0]
    x = problem.truth
    seconds = timed(lambda: functional.conv2d(x, A[:, None], padding=A.shape[-1] // 2), repeats)
    return 2 * x.numel() * A.numel() / min(seconds)


def timed(call: Callable[[], object], repeats: int) -> list[float]:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def peak_memory(method: Method, problem: Problem) -> float:
    """Megabytes by which a step grows a process that has the problem."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def measure() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        method(problem)
        sender.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)

    process = multiprocessing.get_context("fork").Process(target=measure)
    process.start()
    grown: float = receiver.recv()
    process.join()
    return grown


def error(step: Step, exact: Step) -> dict[str, float]:
    difference = torch.linalg.vector_norm(step.gradient.double() - exact.gradient)
    return {
        "loss error": abs(step.loss / exact.loss - 1),
        "gradient error": float(difference / torch.linalg.vector_norm(exact.gradient)),
    }


def compare(name: str, config: Config, methods: dict[str, Method], rounds: int) -> list[dict[str, Any]]:
    """A row per method; the rounds of the methods take turns."""
    problem = make_problem(config)
    share = 0.0
    if PRECONDITIONED in methods:
        shape = problem.truth.shape[1:]
        problem.P = problem.model.preconditioner(shape)
        share = median(timed(lambda: problem.model.preconditioner(shape), rounds)) / PRECONDITIONER_AGE
    last: dict[str, Step] = {}
    seconds: dict[str, list[float]] = {key: [] for key in methods}
    for method in methods.values():
        # What is done once; memory does not depend on the number of iterations.
        method(replace(problem, plain_steps=10))
    for _ in range(rounds):
        for key, method in methods.items():
            start = time.perf_counter()
            last[key] = method(problem)
            seconds[key].append(time.perf_counter() - start + (share if key == PRECONDITIONED else 0))
    reference, rate = exact(problem), product_rate(problem)
    rows = [row(name, problem, key, seconds[key], step, reference, rate) for key, step in last.items()]
    if torch.get_num_threads() == 1:
        # A process that is forked cannot go on with the threads of the one it comes from.
        for measured, method in zip(rows, methods.values(), strict=True):
            measured["MB"] = peak_memory(method, replace(problem, plain_steps=10))
    return rows


def times(seconds: list[float]) -> dict[str, float]:
    return {"ms": 1e3 * median(seconds), "ms low": 1e3 * min(seconds), "ms high": 1e3 * max(seconds)}


def row(
    name: str, problem: Problem, method: str, seconds: list[float], step: Step, reference: Step, rate: float
) -> dict[str, Any]:
    """What there is to say of the times of a method's steps and of the last one."""
    rate_of_step = (step.forward + step.backward) * flops(problem) / median(seconds)
    return (
        {"problem": name, "model": problem.config.model, "method": method}
        | times(seconds)
        | {"forward": step.forward, "backward": step.backward, **error(step, reference)}
        | {"reference residual": reference.residual}
        | {"of product rate": rate_of_step / rate, "GFlop/s": rate / 1e9}
    )


def in_training(name: str, config: Config) -> dict[str, Any]:
    """What the optimizer steps of a whole training take, with its tests after the last one."""
    marks: list[float] = []
    once = config.model_copy(update={"test_every": config.epochs})
    (member,) = Trainer([once]).train(on_step=lambda: marks.append(time.perf_counter()))
    steps = pd.DataFrame(member.history)[["forward_steps", "backward_steps"]].mean()
    return (
        {"problem": name, "model": config.model, "method": "ours, in training"}
        | times([after - before for before, after in pairwise(marks)])
        | {"forward": steps["forward_steps"], "backward": steps["backward_steps"]}
    )


def time_to_loss(task: str, steps: int) -> dict[str, Any]:
    """Seconds of training in which the textbook comes to a test loss, and in which `lib` does."""
    values = {"task": task, "noise": 0.5 if task == "denoising" else 0.1, "gamma": 0.5}
    config = RunConfig(**values, train_images=100 * steps, test_images=100, epochs=1)
    images = load_images(config)
    problem = make_problem(config)
    optimizer = torch.optim.Adam(problem.parameters, lr=config.learning_rate, foreach=True)
    order = torch.randperm(len(images["train"]), generator=generator(0, "bench order"))
    draws, seconds = generator(0, "bench noise"), 0.0
    for indices in tqdm(order.split(config.batch_size), desc=f"textbook, {task}", leave=False):
        problem.truth = images["train"][indices]
        n = torch.randn(problem.truth.shape, generator=draws)
        problem.f = observe(problem.model.operator, problem.truth, torch.tensor([config.noise]), n)
        start = time.perf_counter()
        textbook(problem)
        optimizer.step()
        seconds += time.perf_counter() - start
    trainer = Trainer([config])
    trainer.model.load_state_dict(problem.model.state_dict())
    reached = trainer._evaluate(images["test"]).row(0)["test_loss"]
    changes = {"train_images": 1000, "epochs": steps, "final_learning_rate": config.learning_rate}

    def seconds_of(precondition: bool) -> float:
        own = changes | {"time_budget": seconds, "precondition": precondition}
        (member,) = Trainer([config.model_copy(update=own)]).train()
        history = pd.DataFrame(member.history)
        below = history[history["test_loss"] <= reached]
        return float(below["seconds"].iloc[0]) if len(below) else float("nan")

    plain, conditioned = seconds_of(False), seconds_of(True)
    return {
        "problem": task,
        "test loss": reached,
        "textbook s": seconds,
        "ours s": plain,
        "ratio": seconds / plain,
        "preconditioned s": conditioned,
        "preconditioned ratio": seconds / conditioned,
    }


def step_rows(threads: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of all problems on so many threads; `ratio` is that of a time to ours."""
    torch.set_num_threads(threads)
    rows = []
    everything = {"ours": ours, "textbook": textbook, "TorchDEQ": torchdeq, "DeepInverse": deepinverse}
    for task, model in tqdm(list(pairs(TASKS, MODELS)), desc=f"MNIST, {threads} threads"):
        values = {"task": task, "model": model, "gamma": 0.5}
        config = RunConfig(**values, train_images=100, test_images=1)
        able = model == "bilevel" and task != "denoising"
        methods = everything | ({PRECONDITIONED: ours_preconditioned} if able else {})
        rows += compare(f"MNIST {task}", config, methods, rounds)
    for filters, size in tqdm(((2, 11), (30, 3)), desc=f"photographs, {threads} threads"):
        photographs = faces_config("quick", "denoising", model="deq", filters=filters, filter_size=size)
        name = f"faces {filters} x {size}x{size}"
        rows += compare(name, photographs, {"ours": ours, "textbook": textbook}, 1)
        if threads == 1:
            # A training takes one thread.
            rows.append(in_training(name, photographs))
    table = pd.DataFrame(rows)
    own = table[table["method"] == "ours"].set_index(["problem", "model"])["ms"]
    table.insert(
        6, "ratio", table["ms"] / own.loc[pd.MultiIndex.from_frame(table[["problem", "model"]])].values
    )
    return table.assign(threads=threads).to_dict("records")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="times that each step is timed")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of the textbook's training")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="that a step may take")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [row for threads in options.threads for row in step_rows(threads, options.rounds)]
    steps = pd.DataFrame(rows).set_index(["threads", "problem", "model", "method"])
    save("training_steps", steps, digits=4)
    with one_thread():
        losses = pd.DataFrame([time_to_loss(task, options.steps) for task in TASKS])
    save("time_to_loss", losses.set_index("problem"), digits=4)
    return 0


if __name__ == "__main__":
    sys.exit(main())
