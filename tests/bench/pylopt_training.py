"""Train by PyLOpt in a separate environment (`bench_pylopt.py`), and print a line of JSON per evaluation.

    python tests/bench/pylopt_training.py DATA OPTIONS

DATA is a file of tensors `train`, `test` and their data `f_train`, `f_test`, `(N, 1, H, W)` with images in
[-1, 1], and `kernels` to start from, `(8, 1, 3, 3)`. OPTIONS are JSON:

    noise           standard deviation of the data
    least, most     limits of the training in seconds of processor time
    dct, scale      whether to start from PyLOpt's kernels instead of `kernels`, and their factor
    weight          weight of every expert
    lower, cg       options of the lower level and of its conjugate gradients
    upper           options of the upper level, with its `method`
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # As in `lib/deepinverse.py`: PyLOpt imports it, and calls none of the operators that do not load.
    schemas = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        schemas.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for module in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[module]

# PyPI's package of splines compiles sources that it does not contain; Student-t potentials need none.
splines = types.ModuleType("quartic_bspline_extension.functions")
splines.QuarticBSplineFunction = None  # type: ignore[attr-defined]
sys.modules |= {"quartic_bspline_extension": splines, splines.__name__: splines}

from pylopt.bilevel_problem import BilevelOptimisation, solve_bilevel  # noqa: E402
from pylopt.bilevel_problem.callbacks import Callback  # noqa: E402
from pylopt.energy import Energy, MeasurementModel  # noqa: E402
from pylopt.lower_problem.solve_lower import solve_lower  # noqa: E402
from pylopt.optimise.proximal_maps.ProximalOperator import DenoisingProx  # noqa: E402
from pylopt.regularisers.fields_of_experts import FieldsOfExperts, ImageFilter  # noqa: E402
from pylopt.regularisers.fields_of_experts.potential import StudentT  # noqa: E402

OPTIONS = json.loads(sys.argv[2])
DATA = torch.load(sys.argv[1], weights_only=True)
# PyLOpt's images are in [0, 1].
DATA |= {name: (DATA[name] + 1) / 2 for name in ("train", "test", "f_train", "f_test")}
NOISE, METHOD, IDENTITY = OPTIONS["noise"] / 2, "napg", torch.nn.Identity()
LOWER = OPTIONS["lower"] | {"prox": DenoisingProx(NOISE), "batch_optimisation": False}

APART = 1.1
"""Factor between the training times of two evaluations."""

GAIN = 0.01
"""Smallest gain in dB in the second half of the time; below it a training has stalled."""


class StoredData(MeasurementModel):
    """Use the stored data; PyLOpt draws new noise in every iteration."""

    def make_noisy_observation(self) -> Tensor:
        split = "train" if torch.equal(self.u_clean, DATA["train"]) else "test"
        f: Tensor = DATA[f"f_{split}"]
        return f


class Photographs(IterableDataset[Tensor]):
    """Yield the same whole images in every batch; PyLOpt crops them at random."""

    def __iter__(self) -> Iterator[Tensor]:
        return itertools.cycle(image[None] for image in DATA["train"])


class Finished(Exception):
    pass


class Clock(Callback):
    """Measure the processor time of the training alone, and the test PSNR in dB."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.evaluations: list[tuple[float, float]] = []

    def evaluate(self, step: int, regulariser: FieldsOfExperts) -> None:
        energy = Energy(StoredData(DATA["test"], IDENTITY, NOISE), regulariser, 1.0)
        u = solve_lower(energy, METHOD, LOWER).solution.detach()
        mse = (u - DATA["test"]).square().mean((-3, -2, -1))
        psnr = -10 * torch.log10(mse).mean().item()
        print(json.dumps({"iteration": step, "seconds": self.seconds, "psnr": psnr}), flush=True)
        self.evaluations.append((self.seconds, psnr))

    def stalled(self) -> bool:
        best = max(psnr for _, psnr in self.evaluations)
        earlier = max(psnr for seconds, psnr in self.evaluations if seconds <= self.seconds / 2)
        return self.seconds >= OPTIONS["least"] and best < earlier + GAIN

    def on_train_begin(self, regulariser: FieldsOfExperts, **_: Any) -> None:
        self.evaluate(0, regulariser)
        self.mark = time.process_time()

    def on_step(self, step: int, regulariser: FieldsOfExperts, loss: Tensor, **_: Any) -> None:
        self.seconds += time.process_time() - self.mark
        finished = self.seconds >= OPTIONS["most"]
        if finished or self.seconds >= APART * self.evaluations[-1][0]:
            self.evaluate(step, regulariser)
        if finished or self.stalled():
            raise Finished
        self.mark = time.process_time()

    def on_train_end(self) -> None:
        pass


def main() -> None:
    torch.set_num_threads(1)
    solve_bilevel.MeasurementModel = StoredData
    filters = ImageFilter(3, 1, init_options={"mode": "dct", "multiplier": OPTIONS["scale"]}).float()
    if not OPTIONS["dct"]:
        filters.filter_tensor.data.copy_(OPTIONS["scale"] * DATA["kernels"])
    potential = StudentT(len(DATA["kernels"]), {"mode": "uniform", "multiplier": OPTIONS["weight"]})
    method, upper = OPTIONS["upper"].pop("method"), OPTIONS["upper"] | {"max_num_iterations": sys.maxsize}
    data = {"batch_size": len(DATA["train"]), "crop_size": -1, "device": torch.device("cpu")}
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Finished):
        BilevelOptimisation(
            METHOD, LOWER, IDENTITY, NOISE, options_solver=OPTIONS["cg"], path_to_experiments_dir=folder
        ).learn(
            FieldsOfExperts(potential, filters),
            1.0,
            lambda truth, u: 0.5 * (u - truth).square().sum(),
            Photographs(),
            method,
            upper,
            callbacks=[Clock()],
            **data,
        )


if __name__ == "__main__":
    main()
