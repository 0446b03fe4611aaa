"""How the adjoint equation is best solved where `K` loses something (`make bench`).

The textbook's Anderson acceleration with its absolute ridge, ours with a relative one, and Neumann series:
the error of the hypergradient against a float64 solution, the angles to that one and to the textbook's, the
time of a training step, and the test loss that a training comes to.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from itertools import product

import pandas as pd
from bench_training import Method, Step, error, exact, make_problem, ours, textbook, timed
from benches import save
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from lib.experiments.config import RunConfig
from lib.experiments.problem import make_adjoint_solver, make_solver, one_thread
from lib.experiments.trainer import Trainer
from lib.implicit import NeumannSeries
from lib.models import MODELS
from lib.solvers import Solver

TASKS = ("inpainting", "deblurring")
NEUMANN = (5, 20, 50)
TRAINING = {"train_images": 10_000, "test_images": 500, "epochs": 1, "final_learning_rate": 1e-3}
"""A hundred optimizer steps at one learning rate."""


def solvers(config: RunConfig) -> dict[str, Solver | NeumannSeries]:
    """Ours of the adjoint equation, by name."""
    series = {
        f"Neumann {steps}": make_adjoint_solver(config.model_copy(update={"neumann_steps": steps}))
        for steps in NEUMANN
    }
    return series | {"Anderson": make_solver(config)}


def trained(config: RunConfig, solver: Solver | NeumannSeries) -> float:
    """The test loss after a training, NaN of one that diverged."""
    trainer = Trainer([config.model_copy(update=TRAINING)])
    trainer.adjoint_solver = solver
    (member,) = trainer.train()
    return member.history[-1]["test_loss"] if member.status == "completed" else float("nan")


@one_thread()
def main() -> int:
    rows = []
    for task, model in tqdm(list(product(TASKS, MODELS)), desc="adjoints"):
        config = RunConfig(task=task, model=model, gamma=0.5, train_images=100, test_images=1)
        problem = make_problem(config)
        reference, taught = exact(problem), textbook(problem)
        chosen = solvers(config)
        methods: dict[str, Method] = {"textbook": textbook}
        methods |= {name: partial(ours, adjoint_solver=solver) for name, solver in chosen.items()}
        for name, method in methods.items():
            step = method(problem)
            rows.append(
                {"task": task, "model": model, "adjoint": name, "steps": step.backward}
                | {"gradient error": error(step, reference)["gradient error"]}
                | {"cosine to exact": angle(step, reference), "cosine to textbook": angle(step, taught)}
                | {"ms": 1e3 * statistics.median(timed(partial(method, problem), 5))}
                | {"test loss": trained(config, chosen[name]) if name in chosen else float("nan")}
            )
    table = pd.DataFrame(rows).set_index(["task", "model", "adjoint"])
    save("adjoints", table, training={"steps": 100, "noise": 0.1, "gamma": 0.5, "sigma": "relu"})
    return 0


def angle(step: Step, other: Step) -> float:
    """Cosine of the angle between two hypergradients."""
    return float(cosine_similarity(step.gradient.double(), other.gradient.double(), dim=0))


if __name__ == "__main__":
    sys.exit(main())
