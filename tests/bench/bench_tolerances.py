"""Errors of loss and hypergradient for several tolerances of the solver, against 1e-10 (`make bench`).

Steps on some training images use the committed kernels, with and without the preconditioner. The reference is
computed in float64, the others in float32.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product

import pandas as pd
import torch
from benches import Step, save, training_step
from torch import Tensor
from tqdm import tqdm

from lib.experiments.build import load_images, make_solver
from lib.experiments.config import MODELS
from lib.experiments.records import Run, committed_kernels
from lib.solvers import Anderson, Solver
from lib.training import generator, observe, one_thread

IMAGES = 2
TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6)
# With more memory or a smaller ridge the DEQ of 3x3 kernels in deblurring stagnates at 1e-6.
REFERENCE = Anderson(tol=1e-10, max_steps=5000, memory=10, regularization=1e-8)


def measure(run: Run, truth: Tensor, f: Tensor, solver: Solver, preconditioned: bool) -> Step:
    """Return a training step in the precision of the images."""
    model = run.model().to(truth.dtype)
    P = model.preconditioner(f.shape[-3:]) if preconditioned else None
    # Both variants start from the same first iterates.
    problem = replace(model.problem(f, P), first_adjoint=None)
    return training_step(model, problem, f, truth, solver)


@one_thread()
def main() -> None:
    rows = []
    for case in tqdm(list(product(("denoising", "deblurring"), MODELS, (2, 30))), desc="tolerances"):
        (run,) = committed_kernels(*case, "faces")
        truth = load_images(run.config)["train"][:IMAGES].double()
        n = torch.randn(truth.shape, generator=generator(0, "bench"), dtype=torch.float64)
        f = observe(run.model().operator, truth, torch.tensor(run.config.noise), n)
        exact = measure(run, truth, f, REFERENCE, preconditioned=True)
        for preconditioned, tol in product((True, False), TOLERANCES):
            start = time.perf_counter()
            solver = replace(make_solver(run.config), tol=tol, max_steps=2000)
            step = measure(run, truth.float(), f.float(), solver, preconditioned)
            rows.append(
                dict(zip(("task", "model", "filters"), case, strict=True))
                | {"preconditioned": preconditioned, "tol": tol, **step.errors(exact)}
                | {"forward steps": step.forward.mean().item(), "backward steps": step.backward.mean().item()}
                | {"seconds": time.perf_counter() - start, "reference residual": exact.residual}
            )
    table = pd.DataFrame(rows).set_index(["task", "model", "filters", "preconditioned", "tol"])
    save("tolerances", table, images=IMAGES)


if __name__ == "__main__":
    main()
