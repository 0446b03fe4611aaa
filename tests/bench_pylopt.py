"""Ours beside PyLOpt, bilevel learning of fields of experts by its own library (`make bench`).

Both train eight kernels of 3x3 on the same ten photographs with the same noise, and are measured by the mean
PSNR over the same hundred others. Ours learns the kernels and the weight of its data term, with the smoothed
total variation of the figures and L-BFGS; PyLOpt learns kernels and a weight of every expert, with its
Student-t potentials, of which the regularizer is not convex. Seconds are of the processor, on one thread, of
the training alone. PyLOpt runs in an environment of its own, which is made once, by `pylopt_training.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from benches import save
from tqdm import tqdm

from lib.experiments.problem import generator, load_images, make_model, observe, one_thread, test_noise
from lib.experiments.profiles import our_config
from lib.experiments.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv" / "pylopt"
PACKAGES = ["pylopt==1.0.0", "quartic_bspline_extension==0.3.0", "confuse==2.3.0", "ninja==1.13.2"]
PACKAGES += ["opencv-python-headless==5.0.0.93", "PyQt5==5.15.11", "pandas", "tensorboard==2.21.0"]
"""PyLOpt and what it imports; the others have the versions of `requirements.lock`."""

OURS = our_config("quick", "denoising", model="bilevel", test_images=100, test_every=2, epochs=40)

LONGER, MOST = 10, 900.0
"""PyLOpt trains until it stalls, ten times as long as we do and a quarter of an hour at most."""

LBFGS = {"method": "lbfgs", "max_iter": 5, "history_size": 20, "line_search_fn": "strong_wolfe"}
ADAM = {"method": "adam", "lr": [0.3, 0.1], "alternating": True}
TUNED: dict[str, Any] = {"dct": True, "scale": 20.0, "weight": 0.3, "upper": LBFGS}
TUNED |= {"lower": {"max_num_iterations": 300, "rel_tol": 1e-3, "lip_const": 1e3}, "cg": {"abs_tol": 0.1}}
VARIANTS: dict[str, dict[str, Any]] = {
    "L-BFGS": TUNED,
    "L-BFGS, our kernels": TUNED | {"dct": False},
    "Adam": TUNED | {"upper": ADAM},
}
"""Options of `pylopt_training.py`."""


class TimedTrainer(Trainer):
    """A trainer that knows the processor time of its training steps."""

    spent = 0.0

    def _train_epoch(self, *arguments: Any) -> Any:
        start = time.process_time()
        meter = super()._train_epoch(*arguments)
        self.spent += time.process_time() - start
        return meter


def ours() -> list[dict[str, float]]:
    rows = [{"iteration": 0, "seconds": 0.0}]
    trainer = TimedTrainer([OURS])
    (member,) = trainer.train(lambda t: rows.append({"iteration": t.epoch, "seconds": t.spent}))
    tested = zip(rows, member.history, strict=True)
    return [row | {"psnr": said["test_psnr"]} for row, said in tested if "test_psnr" in said]


def pylopt(data: Path, options: dict[str, Any]) -> list[dict[str, float]]:
    script = Path(__file__).with_name("pylopt_training.py")
    command = [ENVIRONMENT / "bin" / "python", script, data, json.dumps(options)]
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def install() -> list[str]:
    """Make the environment of PyLOpt if it is not there; the versions of its packages."""
    python, made = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    if not made.exists() or made.read_text() != "\n".join(PACKAGES):
        venv.create(ENVIRONMENT, clear=True, symlinks=True, with_pip=True)
        subprocess.run([*pip, "install", "-q", "-c", ROOT / "requirements.lock", *PACKAGES], check=True)
        made.write_text("\n".join(PACKAGES))
    return subprocess.run([*pip, "freeze"], check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()


def tensors() -> dict[str, Any]:
    """What both train with, images in [0, 1] as PyLOpt has them."""
    images, model = load_images(OURS), make_model([OURS])
    noise = {"train": torch.randn(images["train"].shape, generator=generator(OURS.seed, "noise"))}
    noise["test"] = test_noise(OURS)
    data = {split: (image + 1) / 2 for split, image in images.items()}
    for split, n in noise.items():
        f = observe(model.operator, images[split], torch.tensor(OURS.noise), n)
        data[f"f_{split}"] = (f + 1) / 2
    return data | {"kernels": model.weights()["A"].transpose(0, 1), "noise": OURS.noise / 2}


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """What each training comes to: in our time, at its best, and when it is as good as ours."""
    rows = []
    last = table[table["method"] == "ours"].iloc[-1]
    for (method, variant), run in table.groupby(["method", "variant"], sort=False):
        reached = run.loc[run["psnr"] >= last["psnr"], "seconds"]
        rows.append(
            {"method": method, "variant": variant, "seconds": run["seconds"].max()}
            | {"psnr in our time": run.loc[run["seconds"] <= last["seconds"], "psnr"].iloc[-1]}
            | {"best psnr": run["psnr"].max(), "seconds to our psnr": reached.min()}
        )
    return pd.DataFrame(rows).assign(ratio=lambda t: t["seconds to our psnr"] / last["seconds"])


@one_thread()
def main() -> int:
    packages = install()
    rows = [{"method": "ours", "variant": "L-BFGS"} | row for row in ours()]
    ended = rows[-1]["seconds"]
    limits = {"least": ended, "most": min(LONGER * ended, MOST)}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.pt"
        torch.save(tensors(), data)
        for name, options in tqdm(VARIANTS.items(), desc="PyLOpt"):
            trained = pylopt(data, options | limits)
            rows += [{"method": "PyLOpt", "variant": name} | row for row in trained]
    table = pd.DataFrame(rows)
    said = {"ours": OURS.model_dump(), "variants": VARIANTS, "packages": packages}
    save("pylopt", table.set_index(["method", "variant", "iteration"]), digits=5, **said)
    save("pylopt_summary", summary(table).set_index(["method", "variant"]), digits=4, **said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
