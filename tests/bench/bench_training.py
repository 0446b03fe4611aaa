"""Training steps of several implementations, and the time to the same test loss (`make bench`).

All implementations have the same data, weights, tolerances and maximum number of steps:

- `ours`: `lib`, without a warm start;
- `ours, preconditioned`: the bilevel model where `K` loses information; the time of a step includes its share
  of a preconditioner, which several steps of a training use;
- `textbook`: autograd through one recorded step in a backward hook, Anderson acceleration with one stopping
  criterion for the whole batch and an absolute ridge, a dense matrix for the mask, 1,000 plain iterations for
  photographs;
- `TorchDEQ`: its Anderson solver and implicit gradient with our step map, on digits.

Errors are relative to a float64 solution at 1e-10, or to the best one in 5,000 steps, whose residual is in
the table: where it is large, errors have no meaning.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pandas as pd
import torch
from benches import Batch, Step, differentiate, exact, make_batch, ours, save
from torch import Tensor
from torch.nn import functional
from torchdeq import get_deq
from tqdm import tqdm

from lib.experiments import build
from lib.experiments.build import Config
from lib.experiments.config import MODELS, TASKS, RunConfig
from lib.experiments.profiles import FILTERS, faces_config
from lib.operators import CircularBlur, Mask
from lib.training import PRECONDITIONER_AGE, generator, observe, one_thread

PRECONDITIONED = "ours, preconditioned"

PLAIN_STEPS = 1000
"""Iterations of the textbook's solves for photographs."""

THREADS, ROUNDS, STEPS = (1, 2), 7, 30
"""Threads of a step, its repetitions on digits, and optimizer steps of the textbook's training."""

StepMap = Callable[[Tensor], Tensor]
Method = Callable[[], Step]


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
        pad = partial(functional.pad, pad=(p, p, p, p), mode="circular")
        forward = lambda u: functional.conv2d(pad(u), k.flip(-1, -2))  # noqa: E731
        adjoint = lambda v: functional.conv2d(pad(v), k)  # noqa: E731

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
    right, u = torch.eye(m + 1, 1).expand(n, -1, -1), u0
    for k in range(config.max_steps):
        slot, count = k % m, min(k + 1, m)
        X[:, slot], F[:, slot] = u.flatten(1), T(u).flatten(1)
        if (F[:, slot] - X[:, slot]).norm() <= config.tol * F[:, slot].norm():
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
    loss, gradient = differentiate(batch.model, value, batch.truth)
    return Step(loss, gradient, torch.tensor([forward]), torch.tensor(backward))


def torchdeq(batch: Batch) -> Step:
    config, T = batch.config, batch.model.step_map(batch.f)
    limits = {f"{side}_max_iter": config.max_steps for side in "fb"} | {f"{s}_tol": config.tol for s in "fb"}
    names = {"f_solver": "anderson", "b_solver": "anderson", "f_stop_mode": "rel", "b_stop_mode": "rel"}
    values, info = get_deq(**names, **limits, ift=True)(T, build.first_iterate(config)(batch.f))
    nan = torch.tensor([torch.nan])
    return Step(*differentiate(batch.model, values[-1], batch.truth), info["nstep"], nan)


def methods(batch: Batch) -> dict[str, Method]:
    """Return the implementations for a batch, ours first."""
    methods: dict[str, Method] = {"ours": partial(ours, batch), "textbook": partial(textbook, batch)}
    if isinstance(batch.config, RunConfig):
        methods["TorchDEQ"] = partial(torchdeq, batch)
        if batch.config.model == "bilevel" and batch.config.task != "denoising":
            config = batch.config.model_copy(update={"precondition": True})
            P = batch.model.preconditioner(batch.truth.shape[1:])
            methods[PRECONDITIONED] = partial(ours, replace(batch, config=config), P=P)
    return methods


def compare(name: str, config: Config, rounds: int) -> pd.DataFrame:
    """Return a row per method; the methods alternate."""
    batch = make_batch(config)
    reference, compared = exact(batch), methods(batch)
    steps = {key: method() for key, method in compared.items()}
    turns = [
        {key: timeit.timeit(method, number=1) for key, method in compared.items()} for _ in range(rounds)
    ]
    ms = 1e3 * pd.DataFrame(turns)
    if PRECONDITIONED in ms:
        preconditioner = partial(batch.model.preconditioner, batch.truth.shape[1:])
        ms[PRECONDITIONED] += 1e3 * timeit.timeit(preconditioner, number=rounds) / rounds / PRECONDITIONER_AGE
    rows = [
        {"threads": torch.get_num_threads(), "problem": name, "model": config.model, "method": key}
        | {"ms": ms[key].median(), "ms low": ms[key].min(), "ms high": ms[key].max()}
        | {"ratio": ms[key].median() / ms["ours"].median()}
        | {"forward": float(step.forward.max()), "backward": float(step.backward.max())}
        | step.errors(reference)
        | {"reference residual": reference.residual}
        for key, step in steps.items()
    ]
    return pd.DataFrame(rows).set_index(["threads", "problem", "model", "method"])


def time_to_loss(task: str) -> dict[str, Any]:
    """Return the test loss after a training of the textbook, and the seconds to reach it."""
    values = {"task": task, "noise": 0.5 if task == "denoising" else 0.1, "gamma": 0.5}
    config = RunConfig(**values, train_images=100 * STEPS, test_images=100, epochs=1)
    images, batch = build.load_images(config), make_batch(config)
    operator, noise = batch.model.operator, torch.tensor([config.noise])
    optimizer = torch.optim.Adam(batch.model.parameters(), lr=config.learning_rate, foreach=True)
    order = torch.randperm(len(images["train"]), generator=generator(0, "bench order"))
    draws, seconds = generator(0, "bench noise"), 0.0
    for truth in images["train"][order].split(config.batch_size):
        f = observe(operator, truth, noise, torch.randn(truth.shape, generator=draws))
        seconds += timeit.timeit(partial(textbook, replace(batch, truth=truth, f=f)), number=1)
        optimizer.step()
    f = observe(operator, images["test"], noise, generator(config.seed, "test noise"))
    reached = (build.solve(batch.model, f, config).value - images["test"]).square().mean().item()
    # Evaluated after every ten steps at the textbook's learning rate, for as long as the textbook took.
    changes = {"train_images": 1000, "epochs": STEPS, "final_learning_rate": config.learning_rate}
    row = {"problem": task, "test loss": reached, "textbook s": seconds}
    for name, precondition in (("", False), ("preconditioned ", True)):
        update = changes | {"time_budget": seconds, "precondition": precondition}
        (history,) = build.make_training([config.model_copy(update=update)]).run()
        below = [epoch["seconds"] for epoch in history.rows if epoch["test_loss"] <= reached]
        own = below[0] if below else float("nan")
        row |= {f"{name or 'ours '}s": own, f"{name}ratio": seconds / own}
    return row


def main() -> None:
    tables = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        for task, model in tqdm(list(product(TASKS, MODELS)), desc=f"digits, {threads} threads"):
            digits = RunConfig(task=task, model=model, gamma=0.5, train_images=100, test_images=1)
            tables.append(compare(f"MNIST {task}", digits, ROUNDS))
        for filters, side in tqdm(FILTERS.values(), desc=f"photographs, {threads} threads"):
            faces = faces_config("quick", "denoising", model="deq", filters=filters, filter_size=side)
            tables.append(compare(f"faces {filters} x {side}x{side}", faces, 1))
    save("training_steps", pd.concat(tables), digits=4)
    with one_thread():
        losses = pd.DataFrame([time_to_loss(task) for task in tqdm(TASKS, desc="time to loss")])
    save("time_to_loss", losses.set_index("problem"), digits=4)


if __name__ == "__main__":
    main()
