"""Evaluation on a folder of images: parameters, metrics, weights and fixed points."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lib.experiments.build import solve, trained_model
from lib.experiments.config import ConfigError
from lib.experiments.data import DataError, photograph, photographs
from lib.experiments.profiles import faces_config
from lib.experiments.records import committed_kernels
from lib.experiments.runs import get_run
from lib.pages import notebooks
from lib.training import generator


def save_face(path: Path, index: int, rows: slice, columns: slice, mode: str = "L") -> None:
    face = photographs("faces", 0, 10)["test"][index, 0, rows, columns]
    Image.fromarray(((face + 1) * 127.5).round().byte().numpy()).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three faces of different sizes, one of them in colour, and other files."""
    made = tmp_path / "faces"
    made.mkdir()
    save_face(made / "a.png", 0, slice(20, 60), slice(20, 50))
    save_face(made / "b.jpg", 1, slice(20, 52), slice(20, 68), "RGB")
    save_face(made / "c.tif", 2, slice(0, 112), slice(0, 92))
    (made / "notes.txt").write_text("none")
    (made / ".hidden.png").write_bytes(b"none")
    return made


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"noise": 0.1, "sigma": 25.0}, "`sigma` and `noise` exclude each other, got 25 and 0.1."),
        ({"kernels": "flowers"}, "`kernels` must be one of natural, faces, got 'flowers'."),
        ({"run": ["0.1"], "kernels": "faces"}, "`kernels` and `run` exclude each other, got 'faces'."),
        ({"sigma": 30.0, "tune": False}, "`tune` must be True unless the noise is that of the training, "),
        ({"dataset": "small"}, "0.png must have at least 7x7 pixels, got 40x6."),
        ({"run": ["0.1", "0.3"]}, "All runs must have the same `noise`, got 0.1 and 0.3."),
        ({"run": ["0.1"], "task": "deblurring"}, "`task` must be denoising, as in run "),
    ],
)
def test_invalid_parameters_are_rejected(chosen: dict[str, Any], message: str, tmp_path: Path) -> None:
    if chosen.get("dataset") == "small":
        Image.new("L", (6, 40), 99).save(tmp_path / "0.png")
        chosen = {"dataset": str(tmp_path)}
    if "run" in chosen:
        values: Any = {"filters": 2, "filter_size": 3, "model": "deq"}
        configs = [faces_config("smoke", "denoising", **values, noise=float(n)) for n in chosen["run"]]
        chosen = chosen | {"run": [get_run(config, tmp_path).key for config in configs]}
    with pytest.raises((ConfigError, DataError), match=message):
        notebooks.run("evaluate", "smoke", chosen, tmp_path)


def test_notebooks_measure_images_of_folder(folder: Path, tmp_path: Path) -> None:
    """The table has a row for each image; `evaluate` and `reconstruct` write their results."""
    faces = {"kernels": "faces", "filters": 2}
    chosen = faces | {"dataset": str(folder), "sigma": 15.0, "largest": 100}
    made = notebooks.run("evaluate", "smoke", chosen, tmp_path)
    start, _, _ = made.name.rpartition("-")
    assert (made.parent, start) == (
        tmp_path / "smoke",
        "evaluate-faces-kernels-faces-denoising-2-noise-0.1176-largest-100",
    )
    table = pd.read_csv(made / f"{made.name}.csv", index_col="image")
    assert table[["height", "width"]].T.to_dict("list") == {"a": [40, 30], "b": [32, 48], "c": [100, 82]}
    # Noise of 15 on the scale of 255.
    assert table["psnr input"].to_numpy() == pytest.approx(np.full(3, 20 * math.log10(255 / 15)), abs=0.5)
    means, differences = (pd.read_csv(made / f"{name}.csv") for name in ("means", "differences"))
    assert means["psnr"].to_numpy() == pytest.approx(table.filter(like="psnr").mean().to_numpy())
    assert differences["median"].iloc[0] == pytest.approx(
        (table["psnr bilevel"] - table["psnr total variation"]).median()
    )
    lam = pd.read_csv(made / "weights.csv", index_col="method")["weight"]["DEQ"]
    record = json.loads((made / "provenance.json").read_text())
    assert set(record["settings"]["images"]) == {"a.png", "b.jpg", "c.tif"}
    # One row is recomputed with another step, on which the fixed point does not depend.
    (run,) = committed_kernels("denoising", "deq", 2, "faces")
    config = run.config.model_copy(update={"tau": 1 / (1 / run.config.tau + lam), "tol": 1e-5})
    truth = photograph(folder / "b.jpg")
    n = torch.randn(truth.shape, generator=generator(0, "evaluation", "b"))
    model = trained_model(config, run.weights | {"lam": torch.tensor(lam)}, shape=(32, 48))
    u = solve(model, truth + record["settings"]["noise"] * n, config).value
    pair = truth[0, 0].numpy(), u[0, 0].detach().numpy()
    assert table.loc["b", "psnr DEQ"] == pytest.approx(peak_signal_noise_ratio(*pair, data_range=2), abs=0.01)
    assert table.loc["b", "ssim DEQ"] == pytest.approx(structural_similarity(*pair, data_range=2), abs=0.001)
    made = notebooks.run("reconstruct", "smoke", faces | {"image": str(folder / "c.tif")}, tmp_path)
    assert made.parent.name.startswith("c-")
    with Image.open(made / "reconstruction.png") as image:
        assert image.size == (92, 112)
    chosen = faces | {"image": str(folder / "c.tif"), "clean": False}
    other = notebooks.run("reconstruct", "smoke", chosen, tmp_path)
    assert (other.parent, other.name[:25]) == (made.parent, "denoising-deq-2-as-it-is-")
