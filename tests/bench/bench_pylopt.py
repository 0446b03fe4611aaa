"""Comparison with PyLOpt, a library for bilevel learning of fields of experts (`make bench`).

Both train eight kernels of 3x3 on the same ten photographs with the same noise, and are measured by the mean
PSNR over the same hundred others. Ours learns the kernels and the weight of its data term, with the smoothed
total variation of the figures and L-BFGS; PyLOpt learns kernels and a weight of every expert, with its
Student-t potentials, which are not convex. Seconds are processor time of the training alone, on one thread.
PyLOpt runs in an environment of its own (`pylopt_training.py`).
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from benches import save
from tqdm import tqdm

from lib.experiments.build import load_images, make_model, make_training, solve
from lib.experiments.profiles import our_config
from lib.experiments.store import REPOSITORY
from lib.training import Training, generator, observe, one_thread, psnr

ENVIRONMENT = REPOSITORY / ".venv" / "pylopt"
PACKAGES = ["pylopt==1.0.0", "quartic_bspline_extension==0.3.0", "confuse==2.3.0", "ninja==1.13.2"]
PACKAGES += ["opencv-python-headless==5.0.0.93", "PyQt5==5.15.11", "pandas", "tensorboard==2.21.0"]
"""PyLOpt and its imports; packages without a version have that of `requirements.lock`."""

OURS = our_config("quick", "denoising", model="bilevel", test_images=100, epochs=40)
TEST_EVERY = 2

LONGER, MOST = 10, 900.0
"""PyLOpt trains until it stalls, at most ten times as long as ours, and at most 900 s."""

LBFGS = {"method": "lbfgs", "max_iter": 5, "history_size": 20, "line_search_fn": "strong_wolfe"}
ADAM = {"method": "adam", "lr": [0.3, 0.1], "alternating": True}
TUNED: dict[str, Any] = {"dct": True, "scale": 20.0, "weight": 0.3, "upper": LBFGS}
TUNED |= {"lower": {"max_num_iterations": 300, "rel_tol": 1e-3, "lip_const": 1e3}, "cg": {"abs_tol": 0.1}}
VARIANTS = {"L-BFGS": TUNED, "L-BFGS, our kernels": TUNED | {"dct": False}, "Adam": TUNED | {"upper": ADAM}}
"""Options of `pylopt_training.py`."""


def tensors() -> dict[str, Any]:
    """Return the data of both trainings, images in [-1, 1]."""
    data: dict[str, Any] = load_images(OURS)
    model, noise = make_model([OURS]), torch.tensor(OURS.noise)
    n = torch.randn(data["train"].shape, generator=generator(OURS.seed, "noise"))
    data["f_train"] = observe(model.operator, data["train"], noise, n)
    data["f_test"] = observe(model.operator, data["test"], noise, generator(OURS.seed, "test noise"))
    return data | {"kernels": model.weights()["A"].transpose(0, 1)}


def ours(data: dict[str, Any]) -> list[dict[str, float]]:
    """Return iteration, seconds and PSNR of every second iteration of our training."""
    training, rows, seconds, mark = make_training([OURS]), list[dict[str, float]](), 0.0, 0.0
    training.test = None

    def evaluate(training: Training) -> None:
        nonlocal mark
        if training.epoch % TEST_EVERY == 0:
            with torch.no_grad():
                u = solve(training.model, data["f_test"][None], OURS).value[0]
            mean = psnr((u - data["test"]).square().mean((-3, -2, -1))).mean().item()
            rows.append({"iteration": training.epoch, "seconds": seconds, "psnr": mean})
        mark = time.process_time()

    def add_time() -> None:
        nonlocal seconds
        seconds += time.process_time() - mark

    evaluate(training)
    training.run(on_epoch=evaluate, on_step=add_time)
    return rows


def pylopt(path: Path, options: dict[str, Any]) -> list[dict[str, float]]:
    script = Path(__file__).with_name("pylopt_training.py")
    command = [ENVIRONMENT / "bin" / "python", script, path, json.dumps(options)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def install() -> list[str]:
    """Make the environment of PyLOpt unless it exists, and return the versions of its packages."""
    python, made = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    if not made.exists() or made.read_text() != "\n".join(PACKAGES):
        venv.create(ENVIRONMENT, clear=True, symlinks=True, with_pip=True)
        lock = REPOSITORY / "requirements.lock"
        subprocess.run([*pip, "install", "-q", "-c", lock, *PACKAGES], check=True)
        made.write_text("\n".join(PACKAGES))
    return subprocess.run([*pip, "freeze"], check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return each training's PSNR after our time, its best one, and the seconds to our PSNR."""
    rows = []
    last = table[table["method"] == "ours"].iloc[-1]
    for (method, variant), run in table.groupby(["method", "variant"], sort=False):
        reached = run.loc[run["psnr"] >= last["psnr"], "seconds"].min()
        rows.append(
            {"method": method, "variant": variant, "seconds": run["seconds"].max()}
            | {"psnr in our time": run.loc[run["seconds"] <= last["seconds"], "psnr"].iloc[-1]}
            | {"best psnr": run["psnr"].max(), "seconds to our psnr": reached}
            | {"ratio": reached / last["seconds"]}
        )
    return pd.DataFrame(rows)


@one_thread()
def main() -> None:
    packages, data = install(), tensors()
    rows = [{"method": "ours", "variant": "L-BFGS"} | row for row in ours(data)]
    seconds = rows[-1]["seconds"]
    limits = {"least": seconds, "most": min(LONGER * seconds, MOST), "noise": OURS.noise}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.pt"
        torch.save(data, path)
        for name, options in tqdm(VARIANTS.items(), desc="PyLOpt"):
            rows += [{"method": "PyLOpt", "variant": name} | row for row in pylopt(path, options | limits)]
    table = pd.DataFrame(rows)
    provenance = {"ours": OURS.model_dump(), "variants": VARIANTS, "packages": packages}
    save("pylopt", table.set_index(["method", "variant", "iteration"]), digits=5, **provenance)
    save("pylopt_summary", summary(table).set_index(["method", "variant"]), digits=4, **provenance)


if __name__ == "__main__":
    main()
