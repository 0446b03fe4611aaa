"""What a solver's tolerance costs: errors of loss and hypergradient against 1e-10 (`make bench`).

With the committed kernels, on some training images; the reference is computed in float64, the others in
float32 with the solver of the training, preconditioned and not.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product

import pandas as pd
import torch
from benches import save
from torch import Tensor
from tqdm import tqdm

from lib.experiments.problem import generator, load_images, make_solver, observe, one_thread
from lib.experiments.records import Run, trained_kernels
from lib.implicit import implicit_fixed_point
from lib.models import MODELS
from lib.solvers import Anderson, Solution, Solver

IMAGES = 2
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6)
REFERENCE = Anderson(tol=1e-10, max_steps=5000, memory=10, regularization=1e-10)


def measure(
    run: Run, truth: Tensor, f: Tensor, solver: Solver, preconditioned: bool
) -> tuple[Tensor, Tensor, Solution, Solution]:
    """Loss, hypergradient and both solutions, in the precision of the images."""
    model = run.model().to(truth.dtype)
    P = model.preconditioner(f.shape[-3:]) if preconditioned else None
    adjoint: list[Solution] = []
    # Both solves start as everywhere else, where nothing is known.
    problem = replace(model.problem(f, P), first_adjoint=None)
    solution = implicit_fixed_point(problem, f, solver, on_adjoint=adjoint.append)
    loss = (solution.value - truth).square().mean()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.regularizer.parameters()])
    return loss.detach(), gradient, solution, adjoint[0]


@one_thread()
def main() -> int:
    rows = []
    for task, model, filters in tqdm(
        list(product(("denoising", "deblurring"), MODELS, (2, 30))), desc="bench"
    ):
        run = trained_kernels(task, model, filters)
        truth = load_images(run.config)["train"][:IMAGES].double()
        n = torch.randn(truth.shape, generator=generator(0, "bench"), dtype=torch.float64)
        f = observe(run.model().operator, truth, torch.tensor(run.config.noise), n)
        exact, gradient, *solutions = measure(run, truth, f, REFERENCE, preconditioned=True)
        reached = max(solution.residual.max().item() for solution in solutions)
        for preconditioned, tol in product((True, False), TOLERANCES):
            start = time.perf_counter()
            solver = replace(make_solver(run.config), tol=tol, max_steps=2000)
            single = truth.float(), f.float()
            loss, approximate, forward, backward = measure(run, *single, solver, preconditioned)
            error = torch.linalg.vector_norm(approximate.double() - gradient) / torch.linalg.vector_norm(
                gradient
            )
            rows.append(
                {"task": task, "model": model, "filters": filters}
                | {"preconditioned": preconditioned, "tol": tol}
                | {"loss error": abs(loss.double() / exact - 1).item(), "gradient error": error.item()}
                | {"forward steps": forward.steps.double().mean().item()}
                | {"backward steps": backward.steps.double().mean().item()}
                | {"seconds": time.perf_counter() - start, "reference residual": reached}
            )
    table = pd.DataFrame(rows).set_index(["task", "model", "filters", "preconditioned", "tol"])
    save("tolerances", table, images=IMAGES)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
