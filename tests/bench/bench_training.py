"""Training steps of several implementations, and the time to the same test loss (`make bench`).

All have the same data, weights, tolerances and maximum number of steps:

- `ours`: `lib`, without a warm start;
- `ours, preconditioned`: the bilevel model where `K` loses something; the time of a step includes its share
  of a preconditioner, which serves several steps of a training;
- `textbook`: a deep equilibrium step as it is taught: autograd through one recorded step in a backward hook,
  Anderson acceleration with one stopping criterion for the whole batch and an absolute ridge, a dense matrix
  for the mask, 1,000 plain iterations for photographs;
- `TorchDEQ`: its Anderson solver and implicit gradient with our step map, on digits.

Errors are relative to a float64 solution at 1e-10, or to the best one in 5,000 steps, whose residual is in
the table: where it is large, errors have no meaning.
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import pandas as pd
import torch
from benches import Step, differentiate, save, training_step
from torch import Tensor
from torch.nn import functional
from torchdeq import get_deq
from tqdm import tqdm

from lib.experiments import build
from lib.experiments.build import Config
from lib.experiments.config import MODELS, TASKS, FacesConfig, RunConfig
from lib.experiments.profiles import FILTERS, faces_config
from lib.models import FixedPointModel
from lib.operators import CircularBlur, Mask
from lib.solvers import Anderson, Solver
from lib.training import PRECONDITIONER_AGE, generator, observe, one_thread

REFERENCE = Anderson(tol=1e-10, max_steps=5000, memory=20, regularization=1e-10)
PRECONDITIONED = "ours, preconditioned"

PLAIN_STEPS = 1000
"""Iterations of the textbook's solves for photographs."""

THREADS, ROUNDS, STEPS = (1, 2), 7, 30
"""Threads of a step, times that it is timed on digits, and optimizer steps of the textbook's training."""

StepMap = Callable[[Tensor], Tensor]
Method = Callable[[], Step]


@dataclass
class Batch:
    """A model, and images `truth`, `(N, 1, H, W)`, with their data `f`, `(1, N, 1, H, W)`."""

    config: Config
    model: FixedPointModel
    f: Tensor
    truth: Tensor


def make_batch(config: Config) -> Batch:
    """Return the first batch of a training with untrained weights."""
    model = build.make_model([config])
    truth = build.load_images(config)["train"][: config.batch_size]
    n = torch.randn(truth.shape, generator=generator(0, "bench"))
    return Batch(config, model, observe(model.operator, truth, torch.tensor([config.noise]), n), truth)


def ours(batch: Batch, solver: Solver | None = None, P: Tensor | None = None) -> Step:
    """Return a step with the configuration's solvers, or with one solver for both equations."""
    config, model = batch.config, batch.model
    if isinstance(config, FacesConfig):
        # In a training, too, every step on photographs has its own preconditioner.
        P = model.preconditioner(batch.truth.shape[1:])
    solvers = (solver, solver) if solver else (build.make_solver(config), build.make_adjoint_solver(config))
    u0 = build.first_iterate(config)(batch.f)
    return training_step(model, model.problem(batch.f, P), u0, batch.truth, *solvers)


def exact(batch: Batch) -> Step:
    """Return loss and hypergradient in float64."""
    double = Batch(batch.config, deepcopy(batch.model).double(), batch.f.double(), batch.truth.double())
    return ours(double, REFERENCE)


def textbook_map(batch: Batch) -> StepMap:
    """Return the step map of images `(N, 1, H, W)` with textbook operators."""
    model, operator, f = batch.model, batch.model.operator, batch.f[0]
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
    if isinstance(batch.config, RunConfig):
        A, b, C = weights if len(weights) == 3 else (*weights, weights[0])

        def field(u: Tensor) -> Tensor:
            return functional.linear(functional.linear(u.flatten(1), A, b).relu(), C.T).view_as(u)
    else:
        scales = model.regularizer.scales[0]
        A, C = scales[0] * weights[0], scales[-1] * weights[-1]
        s, k = batch.config.sharpness, A.shape[-1] // 2

        def field(u: Tensor) -> Tensor:
            z = functional.conv2d(u, A[:, None], padding=k)
            return functional.conv_transpose2d(torch.tanh(s * z), C[:, None], padding=k)

    return lambda u: u - tau * (lam * adjoint(forward(u) - f) + gamma * field(u))


def textbook_anderson(T: StepMap, u0: Tensor, config: Config, ridge: float = 1e-4) -> tuple[Tensor, int]:
    """Anderson acceleration of a batch as one problem, with a bordered system in each step."""
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


def textbook(batch: Batch) -> Step:
    T, config = textbook_map(batch), batch.config
    mnist = isinstance(config, RunConfig)

    def solve(step_map: StepMap, u: Tensor) -> tuple[Tensor, int]:
        if mnist:
            return textbook_anderson(step_map, u, config)
        for _ in range(PLAIN_STEPS):
            u = step_map(u)
        return u, PLAIN_STEPS

    with torch.no_grad():
        u, forward = solve(T, torch.zeros_like(batch.truth) if mnist else batch.f[0])
    value = T(u)
    start = value.detach().clone().requires_grad_()
    step = T(start)
    backward = [0]

    def hook(g: Tensor) -> Tensor:
        w, backward[0] = solve(lambda w: torch.autograd.grad(step, start, w, retain_graph=True)[0] + g, g)
        return w

    value.register_hook(hook)
    return Step(
        *differentiate(batch.model, value, batch.truth), torch.tensor([forward]), torch.tensor(backward)
    )


def torchdeq(batch: Batch) -> Step:
    config, T = batch.config, batch.model.step_map(batch.f)
    limits = {f"{side}_max_iter": config.max_steps for side in "fb"} | {f"{s}_tol": config.tol for s in "fb"}
    names = {"f_solver": "anderson", "b_solver": "anderson", "f_stop_mode": "rel", "b_stop_mode": "rel"}
    values, info = get_deq(**names, **limits, ift=True)(T, build.first_iterate(config)(batch.f))
    nan = torch.tensor([torch.nan])
    return Step(*differentiate(batch.model, values[-1], batch.truth), info["nstep"], nan)


def methods(batch: Batch) -> dict[str, Method]:
    """Return the implementations that are compared on a batch, ours first."""
    methods: dict[str, Method] = {"ours": partial(ours, batch), "textbook": partial(textbook, batch)}
    if isinstance(batch.config, RunConfig):
        methods["TorchDEQ"] = partial(torchdeq, batch)
        if batch.config.model == "bilevel" and batch.config.task != "denoising":
            conditioned = replace(batch, config=batch.config.model_copy(update={"precondition": True}))
            P = batch.model.preconditioner(batch.truth.shape[1:])
            methods[PRECONDITIONED] = partial(ours, conditioned, P=P)
    return methods


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of some calls, after one that is not timed."""
    call()
    return median(timeit.repeat(call, number=1, repeat=repeats))


def compare(name: str, config: Config, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Return a row per method; the methods take turns."""
    batch = make_batch(config)
    compared = methods(batch)
    steps: dict[str, Step] = {}
    seconds: dict[str, list[float]] = {key: [] for key in compared}
    for key, method in compared.items():
        # The textbook's step on photographs takes minutes, and gains nothing from a first one.
        if rounds > 1 or key == "ours":
            method()
    for _, (key, method) in product(range(rounds), compared.items()):
        start = time.perf_counter()
        steps[key] = method()
        seconds[key].append(time.perf_counter() - start)
    if PRECONDITIONED in compared:
        made = median_seconds(partial(batch.model.preconditioner, batch.truth.shape[1:]), rounds)
        seconds[PRECONDITIONED] = [s + made / PRECONDITIONER_AGE for s in seconds[PRECONDITIONED]]
    reference = exact(batch)
    return [
        {"threads": threads, "problem": name, "model": config.model, "method": key}
        | {"ms": 1e3 * median(seconds[key])}
        | {"ms low": 1e3 * min(seconds[key]), "ms high": 1e3 * max(seconds[key])}
        | {"ratio": median(seconds[key]) / median(seconds["ours"])}
        | {"forward": float(step.forward.max()), "backward": float(step.backward.max())}
        | step.errors(reference)
        | {"reference residual": reference.residual}
        for key, step in steps.items()
    ]


def time_to_loss(task: str) -> dict[str, Any]:
    """Return the seconds in which a training of the textbook reaches a test loss, and those of ours."""
    values = {"task": task, "noise": 0.5 if task == "denoising" else 0.1, "gamma": 0.5}
    config = RunConfig(**values, train_images=100 * STEPS, test_images=100, epochs=1)
    images, batch = build.load_images(config), make_batch(config)
    operator, noise = batch.model.operator, torch.tensor([config.noise])
    optimizer = torch.optim.Adam(batch.model.parameters(), lr=config.learning_rate, foreach=True)
    order = torch.randperm(len(images["train"]), generator=generator(0, "bench order"))
    draws, seconds = generator(0, "bench noise"), 0.0
    for indices in tqdm(order.split(config.batch_size), desc=f"textbook, {task}", leave=False):
        truth = images["train"][indices]
        f = observe(operator, truth, noise, torch.randn(truth.shape, generator=draws))
        start = time.perf_counter()
        textbook(replace(batch, truth=truth, f=f))
        optimizer.step()
        seconds += time.perf_counter() - start
    f = observe(operator, images["test"], noise, build.test_noise(config))
    reached = (build.solve(batch.model, f, config).value - images["test"]).square().mean().item()
    # Evaluated after every ten steps at the textbook's learning rate, for as long as the textbook took.
    changes = {"train_images": 1000, "epochs": STEPS, "final_learning_rate": config.learning_rate}

    def seconds_of_ours(precondition: bool) -> float:
        update = changes | {"time_budget": seconds, "precondition": precondition}
        (history,) = build.make_training([config.model_copy(update=update)]).run()
        below = [row["seconds"] for row in history.rows if row["test_loss"] <= reached]
        return below[0] if below else float("nan")

    plain, conditioned = seconds_of_ours(False), seconds_of_ours(True)
    return (
        {"problem": task, "test loss": reached, "textbook s": seconds}
        | {"ours s": plain, "ratio": seconds / plain}
        | {"preconditioned s": conditioned, "preconditioned ratio": seconds / conditioned}
    )


def main() -> None:
    rows = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        for task, model in tqdm(list(product(TASKS, MODELS)), desc=f"digits, {threads} threads"):
            digits = RunConfig(task=task, model=model, gamma=0.5, train_images=100, test_images=1)
            rows += compare(f"MNIST {task}", digits, ROUNDS, threads)
        for filters, side in tqdm(FILTERS.values(), desc=f"photographs, {threads} threads"):
            faces = faces_config("quick", "denoising", model="deq", filters=filters, filter_size=side)
            rows += compare(f"faces {filters} x {side}x{side}", faces, 1, threads)
    steps = pd.DataFrame(rows).set_index(["threads", "problem", "model", "method"])
    save("training_steps", steps, digits=4)
    with one_thread():
        losses = pd.DataFrame([time_to_loss(task) for task in TASKS])
    save("time_to_loss", losses.set_index("problem"), digits=4)


if __name__ == "__main__":
    main()
