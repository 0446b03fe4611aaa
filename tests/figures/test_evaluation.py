"""Evaluation on a folder of images: images at their own size, weights, fixed points and the two pages."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lib.experiments.config import ConfigError
from lib.experiments.data import DataError, faces
from lib.experiments.profiles import faces_config
from lib.experiments.runs import get_run
from lib.figures.evaluation import (
    MEGAPIXEL,
    SCIKIT_IMAGES,
    chosen_runs,
    deviation,
    evaluation_name,
    kernels_method,
    read_pictures,
    reweighted,
)
from lib.pages import notebooks
from lib.training import generator

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = chosen_runs("denoising", 2)


def save_face(path: Path, index: int, rows: slice, columns: slice, mode: str = "L") -> None:
    pixels = ((faces("test", 10)[index, 0, rows, columns] + 1) * 127.5).round().byte().numpy()
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three faces of different sizes, one of them in colour, and files that are no images."""
    made = tmp_path / "faces"
    made.mkdir()
    save_face(made / "a.png", 0, slice(20, 60), slice(20, 50))
    save_face(made / "b.jpg", 1, slice(20, 52), slice(20, 68), "RGB")
    save_face(made / "c.tif", 2, slice(0, 112), slice(0, 92))
    (made / "notes.txt").write_text("none")
    (made / ".hidden.png").write_bytes(b"none")
    return made


def test_images_of_a_folder(folder: Path) -> None:
    """Each at its own size, with a name of its own."""
    pictures = read_pictures(str(folder), list(RUNS.values()))
    assert {p.name: p.shape for p in pictures} == {"a": (40, 30), "b": (32, 48), "c": (112, 92)}
    assert [p.coloured for p in pictures] == [False, True, False]
    assert all(p.read().shape[-2:] == p.shape for p in pictures)
    save_face(folder / "a.bmp", 3, slice(0, 20), slice(0, 20))
    assert [p.name for p in read_pictures(str(folder), [])] == ["a.bmp", "a.png", "b", "c"]
    assert [p.name for p in read_pictures("scikit-image", [])] == list(SCIKIT_IMAGES)


def test_images_above_a_megapixel_are_reduced(tmp_path: Path) -> None:
    for name, size in {"large": (1500, 1000), "small": (1000, 1000)}.items():
        Image.new("L", size).save(tmp_path / f"{name}.png")
    large, small = read_pictures(str(tmp_path), [])
    assert small.shape == (1000, 1000)
    assert 0.99 * MEGAPIXEL < math.prod(large.shape) <= MEGAPIXEL
    assert [p.shape for p in read_pictures(str(tmp_path), [], 300)] == [(200, 300), (300, 300)]


@pytest.mark.parametrize(
    ("size", "task", "message"),
    [
        (None, "denoising", "0.png cannot be read as an image"),
        ((6, 40), "denoising", "0.png: got 40x6 pixels, allowed: 7x7 or more"),
        ((40, 10), "deblurring", "0.png: blur: got 11, allowed: at most the images' 10 pixels"),
    ],
)
def test_bad_images_are_refused(
    size: tuple[int, int] | None, task: str, message: str, tmp_path: Path
) -> None:
    if size is None:
        (tmp_path / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    else:
        Image.new("L", size, 99).save(tmp_path / "0.png")
    with pytest.raises((ConfigError, DataError), match=message):
        read_pictures(str(tmp_path), list(chosen_runs(task, 2).values()))
    with pytest.raises(DataError, match="allowed: scikit-image, celeba or a folder of images"):
        read_pictures("nowhere", [])


def test_sigma_is_the_literatures() -> None:
    """25 of 255 is an input of 20.17 dB."""
    assert 10 * math.log10(4 / (deviation(None, 25) or 0) ** 2) == pytest.approx(20.17, abs=0.01)
    assert (deviation(0.3, None), deviation(None, None)) == (0.3, None)


@pytest.mark.parametrize(("name", "lam"), [("DEQ", 2.0), ("DEQ", 5000.0), ("bilevel", 100.0)])
def test_another_weight_has_its_own_fixed_point(name: str, lam: float) -> None:
    """`lambda K^T (K u - f) + field(u) = 0`, whatever the step."""
    run = reweighted(RUNS[name], lam)
    f = faces("test", 1)[..., 30:60, 30:60] + 0.1 * torch.randn(1, 1, 30, 30, generator=generator(0, "test"))
    u = kernels_method(RUNS[name])(f, lam)
    model = run.model(shape=(30, 30))
    assert model.lam == lam
    field = model.regularizer.field(u, model.gamma, model.tau)
    gradient = lam * (u - f) + field
    assert gradient.norm() <= 20 * run.config.tol * u.norm() / model.tau
    assert (2 * lam * (u - f) + field).norm() > gradient.norm()


def test_names_of_evaluations() -> None:
    assert evaluation_name("scikit-image", "denoising", 8, None, None, True) == "evaluate"
    name = evaluation_name("a/BSD68", "deblurring", 2, None, 0.1, False)
    assert name == "evaluate-BSD68-deblurring-2-noise-0.1-as-trained"


def test_runs_of_the_store_are_chosen_by_key(tmp_path: Path) -> None:
    """Several of one model bear their keys; runs with different noise are refused."""
    small = {"filters": 2, "filter_size": 3, "model": "deq"}
    keys = [
        get_run(faces_config("smoke", "denoising", **small, **own), tmp_path).key
        for own in ({"seed": 0}, {"seed": 1}, {"noise": 0.3})
    ]
    assert list(chosen_runs("denoising", 30, keys[0], tmp_path)) == ["DEQ"]
    assert list(chosen_runs("denoising", 30, keys[:2], tmp_path)) == [f"DEQ {key[:8]}" for key in keys[:2]]
    with pytest.raises(ConfigError, match=r"^run: got runs with noise = 0.1 and 0.3, allowed: one noise$"):
        chosen_runs("denoising", 30, keys, tmp_path)


def test_pages_measure_images_of_a_folder(folder: Path, tmp_path: Path) -> None:
    """The table has a row for each image, and both pages write what they show."""
    chosen = {"dataset": str(folder), "filters": 2, "sigma": 15.0}
    made = notebooks.run("evaluate", "smoke", chosen, tmp_path)
    assert made == tmp_path / "smoke" / "evaluate-faces-denoising-2-noise-0.1176"
    table = pd.read_csv(made / f"{made.name}.csv", index_col="image")
    assert table.index.tolist() == ["a", "b", "c"]
    assert table["psnr input"].to_numpy() == pytest.approx(np.full(3, 24.61), abs=0.5)
    means, differences = (pd.read_csv(made / f"{name}.csv") for name in ("means", "differences"))
    assert means["psnr"].to_numpy() == pytest.approx(table.filter(like="psnr").mean().to_numpy())
    assert differences["median"].iloc[0] == pytest.approx(
        (table["psnr bilevel"] - table["psnr total variation"]).median()
    )
    weights = pd.read_csv(made / "weights.csv", index_col="method")["weight"]
    record = json.loads((made / "provenance.json").read_text())
    assert set(record["settings"]["images"]) == {"a.png", "b.jpg", "c.tif"}
    # The row of one image, computed again.
    (picture,) = (p for p in read_pictures(str(folder), []) if p.name == "b")
    truth = picture.read()
    f = truth + record["settings"]["noise"] * torch.randn(
        truth.shape, generator=generator(0, "evaluation", "b")
    )
    u = kernels_method(RUNS["DEQ"])(f, float(weights["DEQ"]))
    pair = truth[0, 0].numpy(), u[0, 0].numpy()
    assert table.loc["b", "psnr DEQ"] == pytest.approx(peak_signal_noise_ratio(*pair, data_range=2), abs=0.01)
    assert table.loc["b", "ssim DEQ"] == pytest.approx(structural_similarity(*pair, data_range=2), abs=0.001)
    made = notebooks.run("reconstruct", "smoke", {"filters": 2, "image": str(folder / "c.tif")}, tmp_path)
    assert made.parent.name.startswith("c-")
    with Image.open(made / "reconstruction.png") as image:
        assert image.size == (92, 112)
    chosen = {"filters": 2, "image": str(folder / "c.tif"), "clean": False}
    assert notebooks.run("reconstruct", "smoke", chosen, tmp_path).name == "denoising-deq-2-as-it-is"
