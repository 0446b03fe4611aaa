"""Solvers of the adjoint equation where `K` loses information (`make bench`).

The benchmark compares Anderson acceleration with an absolute ridge (textbook) and a relative one (ours), and
Neumann series. The table has the error of the hypergradient, its cosine with the exact one and with the
textbook's, the time of a training step, and the test loss after a hundred optimizer steps.
"""

from __future__ import annotations

import timeit
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import pandas as pd
import torch
from bench_training import Method, textbook
from benches import exact, make_batch, ours, save
from tqdm import tqdm

from lib.experiments.build import make_training
from lib.experiments.config import MODELS, RunConfig
from lib.training import COMPLETED, one_thread

ADJOINTS: dict[str, dict[str, Any]] = {f"Neumann {steps}": {"neumann_steps": steps} for steps in (5, 20, 50)}
ADJOINTS["Anderson"] = {"adjoint": "solved"}

TRAINING = {"train_images": 10_000, "test_images": 500, "epochs": 1, "final_learning_rate": 1e-3}
"""A hundred optimizer steps at one learning rate."""


def test_loss(config: RunConfig) -> float:
    """Return the test loss after a training, NaN if it diverged."""
    (history,) = make_training([config.model_copy(update=TRAINING)]).run()
    return history.rows[-1]["test_loss"] if history.status == COMPLETED else float("nan")


@one_thread()
def main() -> None:
    rows = []
    for task, model in tqdm(list(product(("inpainting", "deblurring"), MODELS)), desc="adjoints"):
        config = RunConfig(task=task, model=model, gamma=0.5, train_images=100, test_images=1)
        batch = make_batch(config)
        variants = {name: config.model_copy(update=values) for name, values in ADJOINTS.items()}
        methods: dict[str, Method] = {"textbook": partial(textbook, batch)}
        methods |= {name: partial(ours, replace(batch, config=own)) for name, own in variants.items()}
        reference, theirs = exact(batch).gradient, textbook(batch).gradient.double()
        for name, method in methods.items():
            step = method()
            gradient = step.gradient.double()
            rows.append(
                {"task": task, "model": model, "adjoint": name, "steps": float(step.backward.max())}
                | {"gradient error": float((gradient - reference).norm() / reference.norm())}
                | {"cosine to exact": float(torch.cosine_similarity(gradient, reference, dim=0))}
                | {"cosine to textbook": float(torch.cosine_similarity(gradient, theirs, dim=0))}
                | {"ms": 1e3 * median(timeit.repeat(method, number=1, repeat=5))}
                | {"test loss": test_loss(variants[name]) if name in variants else float("nan")}
            )
    table = pd.DataFrame(rows).set_index(["task", "model", "adjoint"])
    save("adjoints", table, training={"steps": 100, "noise": 0.1, "gamma": 0.5, "sigma": "relu"})


if __name__ == "__main__":
    main()
