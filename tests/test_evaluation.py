"""Kernels on a folder of images: each at its own size, weights chosen alike, bad input refused."""

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
from skimage.restoration import denoise_tv_chambolle

from lib.experiments import __main__ as command
from lib.experiments.config import ConfigError, FacesConfig
from lib.experiments.data import DataError, faces
from lib.experiments.problem import generator, load_images, psnr
from lib.experiments.profiles import faces_config, profile_config
from lib.experiments.runs import get_run, stored_kernels, trained_kernels
from lib.figures import baselines, evaluation
from lib.figures.evaluation import (
    INPUT,
    MEGAPIXEL,
    TV,
    WeightChoice,
    choose_weights,
    chosen_runs,
    deviation,
    evaluate,
    kernels_method,
    pictures,
    reweighted,
)
from lib.pages import notebooks

pytestmark = pytest.mark.usefixtures("one_thread")


def save_face(path: Path, index: int, rows: slice, columns: slice, mode: str = "L") -> None:
    pixels = ((faces("test", 10)[index, 0, rows, columns] + 1) * 127.5).round().byte().numpy()
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three faces of different sizes, one of them in colour, and what is no image."""
    made = tmp_path / "faces"
    made.mkdir()
    save_face(made / "a.png", 0, slice(20, 60), slice(20, 50))
    save_face(made / "b.jpg", 1, slice(20, 52), slice(20, 68), "RGB")
    save_face(made / "c.tif", 2, slice(0, 112), slice(0, 92))
    (made / "notes.txt").write_text("none")
    (made / ".hidden.png").write_bytes(b"none")
    return made


RUNS = chosen_runs("denoising", 2)


def test_every_image_is_there_at_its_own_size(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = pictures(str(folder), list(RUNS.values()))
    assert {p.name: p.shape for p in found} == {"a": (40, 30), "b": (32, 48), "c": (112, 92)}
    assert all(picture.read().shape[-2:] == picture.shape for picture in found)
    capsys.readouterr()
    evaluation.print_pictures(found)
    assert capsys.readouterr().out == "3 images, 40x30 to 112x92 pixels\nin colour, made grey: b (1)\n"


def test_names_are_told_apart(folder: Path) -> None:
    save_face(folder / "a.bmp", 3, slice(0, 20), slice(0, 20))
    assert [picture.name for picture in pictures(str(folder), [])] == ["a.bmp", "a.png", "b", "c"]


def test_the_default_needs_no_network() -> None:
    """All its images are grey files of the wheel, below a megapixel."""
    found = pictures("scikit-image", [])
    assert [picture.name for picture in found] == list(evaluation.SCIKIT_IMAGES)
    assert not any(picture.coloured for picture in found)
    assert {picture.name: picture.shape for picture in found}["camera"] == (512, 512)


def test_only_what_is_larger_than_a_megapixel_is_reduced(tmp_path: Path) -> None:
    """To just below it, with its proportions; or to the side that is asked for."""
    for name, size in {"large": (1500, 1000), "small": (1000, 1000)}.items():
        Image.new("L", size).save(tmp_path / f"{name}.png")
    large, small = pictures(str(tmp_path), [])
    assert small.shape == (1000, 1000)
    assert 0.99 * MEGAPIXEL < math.prod(large.shape) <= MEGAPIXEL
    assert large.shape[1] / large.shape[0] == pytest.approx(1.5, abs=0.002)
    assert [picture.shape for picture in pictures(str(tmp_path), [], 300)] == [(200, 300), (300, 300)]


def test_sigma_is_the_literatures() -> None:
    """25 of 255 is the PSNR of 20.17 dB that its papers name for the input."""
    noise = deviation(None, 25)
    assert noise is not None
    assert psnr(torch.tensor(noise**2)).item() == pytest.approx(20.17, abs=0.01)
    assert deviation(0.3, None) == 0.3
    assert deviation(None, None) is None
    with pytest.raises(ConfigError, match=r"^sigma: got 25 beside noise = 0.1, allowed: one of them$"):
        deviation(0.1, 25)


def test_a_row_is_what_each_method_makes_of_its_own_data(folder: Path) -> None:
    """Against scikit-image and a fixed point computed here; noise depends on the seed and the name alone."""
    weights = WeightChoice(0.2, {TV: 0.15, **dict.fromkeys(RUNS, 7.0)})
    found = pictures(str(folder), list(RUNS.values()))
    table = evaluate(found, RUNS, weights, seed=3)
    assert list(table.index) == ["a", "b", "c"]
    for picture in found:
        truth, row = picture.read(), table.loc[picture.name]
        f = truth + 0.2 * torch.randn(truth.shape, generator=generator(3, "evaluation", picture.name))
        smooth = torch.from_numpy(denoise_tv_chambolle(f[0, 0].numpy(), weight=0.15, eps=1e-5))
        images = {INPUT: f, TV: smooth} | {name: kernels_method(run)(f, 7.0) for name, run in RUNS.items()}
        for name, image in images.items():
            assert row[f"psnr {name}"] == pytest.approx(
                psnr((image - truth).square().mean()).item(), abs=1e-3
            )
    again = evaluate(found[1:2], RUNS, weights, seed=3)
    numbers = [column for column in table if not column.startswith("seconds")]
    pd.testing.assert_frame_equal(again[numbers], table.loc[["b"], numbers])
    other = evaluate(found[1:2], RUNS, weights, seed=4)
    assert other["psnr input"].item() != again["psnr input"].item()
    assert (table["status DEQ"] == "converged").all()
    assert (table["steps DEQ"] >= 1).all()


@pytest.mark.parametrize(("name", "lam"), [("DEQ", 2.0), ("DEQ", 5000.0), ("bilevel", 100.0)])
def test_another_weight_has_its_own_fixed_point(name: str, lam: float) -> None:
    """`lambda K^T (K u - f) + field(u) = 0` there, which does not depend on the step."""
    run = reweighted(RUNS[name], lam)
    f = faces("test", 1)[..., 30:60, 30:60] + 0.1 * torch.randn(1, 1, 30, 30, generator=generator(0, "test"))
    u = kernels_method(RUNS[name])(f, lam)
    model = run.model(shape=(30, 30))
    assert model.lam == lam
    gradient = lam * (u - f) + model.regularizer.field(u, model.gamma, model.tau)
    allowed = 20 * run.config.tol * u.norm() / model.tau
    assert gradient.norm() <= allowed
    far = 2 * lam * (u - f) + model.regularizer.field(u, model.gamma, model.tau)
    assert far.norm() > gradient.norm()


def test_a_learned_weight_is_replaced_as_well() -> None:
    """Of a run whose `lambda` was learned with the kernels; its step follows."""
    run = RUNS["DEQ"]
    config = run.config.model_copy(update={"learn_weight": True})
    learned = type(run)(
        run.key, config, "completed", "", run.history, run.weights | {"lam": torch.tensor(30.0)}, {}
    )
    assert learned.model().lam.item() == pytest.approx(30, rel=1e-5)
    model = reweighted(learned, 300.0).model()
    assert model.lam.item() == pytest.approx(300, rel=1e-5)
    assert model.tau < learned.model().tau


@pytest.mark.parametrize("task", ["denoising", "deblurring"])
def test_weights_are_the_best_ones_on_training_images(task: str) -> None:
    """No method's is beaten by one half or twice as large, and those of kernels fall as the noise grows."""
    runs, falling = {name: smaller(run) for name, run in chosen_runs(task, 2).items()}, []
    config = runs["DEQ"].config
    assert isinstance(config, FacesConfig)
    for noise in (config.noise, 3 * config.noise):
        weights = choose_weights(runs, noise)
        truth = load_images(config)["train"][:4]
        n = torch.randn(truth.shape, generator=generator(config.seed, "noise of the baseline"))
        operator = runs["DEQ"].model(shape=(truth.shape[-2], truth.shape[-1])).operator
        f = operator.forward(truth) + noise * n
        methods = {TV: baselines.tv_method(config, (truth.shape[-2], truth.shape[-1]))}
        methods |= {name: kernels_method(run) for name, run in runs.items()}
        with torch.no_grad():
            for name, method in methods.items():
                best = weights.values[name]
                assert best is not None
                errors = [(method(f, factor * best) - truth).square().mean() for factor in (0.5, 1, 2)]
                assert errors[1] <= min(errors) * 1.001, (name, best, errors)
        falling.append(weights.values)
    for name in runs:
        assert falling[1][name] < falling[0][name]


def smaller(run: Any) -> Any:
    """The same kernels with a configuration whose images are a third as large."""
    return type(run)(
        run.key,
        run.config.model_copy(update={"reduction": 3, "blur": 5, "max_steps": 100}),
        run.status,
        run.reason,
        run.history,
        run.weights,
        run.provenance,
    )


def test_kernels_can_keep_their_weight() -> None:
    """At the noise of their training; total variation has its best one all the same."""
    weights = choose_weights(RUNS, None, tune=False)
    assert weights.noise == RUNS["DEQ"].config.noise
    assert weights.values[TV] is not None
    assert [weights.values[name] for name in RUNS] == [None, None]
    with pytest.raises(
        ConfigError, match=r"^tune: got False, allowed: True, or the noise of the training, 0.1$"
    ):
        choose_weights(RUNS, 0.2, tune=False)


TABLE = pd.DataFrame(
    {
        "height": [8, 8, 8],
        "width": [9, 9, 9],
        "psnr input": [20.0, 20.0, 20.0],
        "ssim input": [0.2, 0.3, 0.4],
        "psnr total variation": [25.0, 26.0, 27.0],
        "ssim total variation": [0.5, 0.6, 0.7],
        "psnr DEQ": [28.0, 26.0, 30.0],
        "ssim DEQ": [0.6, 0.6, 0.9],
        "steps DEQ": [10, 20, 60],
        "status DEQ": ["converged", "converged", "max steps"],
    },
    index=pd.Index(["one", "two", "three"], name="image"),
)


def test_means_differences_and_ranks_are_those_of_the_table() -> None:
    means, differences = evaluation.means(TABLE), evaluation.differences(TABLE)
    assert list(means.index) == ["input", "total variation", "DEQ"]
    assert means.loc["DEQ", ["psnr", "steps", "unconverged"]].tolist() == pytest.approx([28, 30, 1 / 3])
    assert differences.index.tolist() == [("DEQ minus total variation", m) for m in ("psnr", "ssim")]
    assert differences["median"].tolist() == pytest.approx([3, 0.1])
    assert (differences["low"] <= differences["median"]).all()
    assert evaluation.ranked(TABLE) == {"best": "three", "median": "one", "worst": "two"}


@pytest.mark.usefixtures("drawing")
def test_the_figure_shows_the_ranked_images(folder: Path) -> None:
    """In rows, under each picture the quality that its table has."""
    weights = WeightChoice(0.1, {TV: 0.06, **dict.fromkeys(RUNS)})
    found = pictures(str(folder), list(RUNS.values()))
    table = evaluate(found, RUNS, weights)
    fig = evaluation.evaluation_figure(found, RUNS, weights, table, 0, "a note")
    names = list(evaluation.ranked(table).values())
    assert len(fig.axes) == 15
    for row, name in enumerate(names):
        assert fig.axes[5 * row].get_ylabel().endswith(name)
        for column, method in enumerate((INPUT, TV, *RUNS), 1):
            said = fig.axes[5 * row + column].get_xlabel()
            assert said.startswith(f"{table.loc[name, f'psnr {method}']:.1f} dB")


def written(path: Path, size: tuple[int, int] | None) -> None:
    if size is None:
        path.write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    else:
        Image.new("L", size, 99).save(path)


@pytest.mark.parametrize(
    ("sizes", "task", "said"),
    [
        ([], "denoising", "holds no images"),
        ([(40, 40), None], "denoising", "1.png cannot be read as an image"),
        ([(40, 40), (6, 40)], "denoising", "1.png: got 40x6 pixels, allowed: 7x7 or more"),
        ([(40, 40), (40, 10)], "deblurring", "1.png: blur: got 11, allowed: at most the images' 10 pixels"),
    ],
)
def test_bad_images_are_refused_before_any_work(
    sizes: list[tuple[int, int] | None], task: str, said: str, tmp_path: Path
) -> None:
    for index, size in enumerate(sizes):
        written(tmp_path / f"{index}.png", size)
    with pytest.raises((ConfigError, DataError), match=said) as refusal:
        pictures(str(tmp_path), list(chosen_runs(task, 2).values()))
    assert "\n" not in str(refusal.value)


def test_a_folder_that_is_not_there_is_refused() -> None:
    with pytest.raises(DataError, match="allowed: scikit-image, celeba or a folder of images"):
        pictures("nowhere", [])


SMALL = {"filters": 2, "filter_size": 3, "model": "deq"}


def test_runs_of_the_store_are_found_by_their_keys(tmp_path: Path) -> None:
    """Of both kinds; several of one model bear their keys; what does not belong together is refused."""
    runs = [get_run(faces_config("smoke", "denoising", seed=seed, **SMALL), tmp_path) for seed in (0, 1)]
    other = get_run(faces_config("smoke", "denoising", noise=0.3, **SMALL), tmp_path)
    digits = get_run(profile_config("smoke", "denoising", epochs=1), tmp_path)
    for run in runs:
        found = stored_kernels(run.key, tmp_path)
        assert found.config == run.config
        assert all(torch.equal(found.weights[name], run.weights[name]) for name in run.weights)
    keys = [run.key for run in runs]
    assert list(chosen_runs("denoising", 30, keys[0], tmp_path)) == ["DEQ"]
    assert list(chosen_runs("denoising", 30, keys, tmp_path)) == [f"DEQ {key[:8]}" for key in keys]
    for wrong, said in (
        ([keys[0], other.key], "^run: got runs with noise = 0.1 and 0.3, allowed: one noise$"),
        ([digits.key], f"^run: got {digits.key}, of digits, allowed: "),
        (["0" * 20], f"^run: got '{'0' * 20}', allowed: the key of a run in "),
        (["../runs"], "^run: got '../runs', allowed: "),
    ):
        with pytest.raises(ConfigError, match=said):
            chosen_runs("denoising", 30, wrong, tmp_path)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([("modl", "deq")], "modl: no such parameter, allowed: model, task, "),
        ([("dataset", "faces"), ("sigma", "relu")], "sigma: no such parameter, allowed: model, "),
        ([("epochs", "0")], "epochs: got 0, allowed: greater than or equal to 1"),
        ([("dataset", "faces"), ("filter_size", "4")], "filter_size: got 4, allowed: an odd number"),
        ([("dataset", "nowhere")], "dataset: got 'nowhere', but "),
        ([("task", "super")], "task: got 'super', allowed: 'denoising', "),
        ([("profile", "smoke")], "profile: got it among the parameters, allowed: --profile"),
    ],
)
def test_make_train_refuses_in_one_line(
    given: list[tuple[str, str]], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [part for name, text in given for part in ("-p", name, text)]
    assert command.main(["train", "--profile", "smoke", *arguments]) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith(f"train: {said}")
    assert err.count("\n") == 1


def test_make_train_takes_any_parameter() -> None:
    """Of digits and of photographs, on top of the profile's."""
    digits = command.one_config("smoke", [("tau", "0.3"), ("patience", "None"), ("model", "deq")])
    assert digits == profile_config("smoke", "denoising", tau=0.3, model="deq").model_copy(
        update={"patience": None}
    )
    texts = [("dataset", "faces"), ("task", "deblurring"), ("initial", "denoising"), ("learn_weight", "true")]
    assert command.one_config("quick", texts) == faces_config(
        "quick", "deblurring", dataset="faces", initial="denoising", learn_weight=True
    )


def test_train_evaluate_reconstruct(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole circle on images of one's own: what is trained is found by the key that was printed."""
    config = faces_config("smoke", "denoising", **SMALL)
    assert command.train_one(config, tmp_path) == 0
    out = capsys.readouterr().out
    key = out.split()[1].rstrip(":")
    assert out.startswith(f"run {key}: deq, denoising, faces\n")
    assert "completed\n" in out
    assert out.rstrip().endswith(str(tmp_path / "runs" / key))
    chosen = {"run": key, "dataset": str(folder), "sigma": 15.0}
    made = notebooks.run("evaluate", "smoke", chosen, tmp_path)
    assert made == tmp_path / "smoke" / f"evaluate-faces-{key[:8]}-noise-0.1176"
    table = pd.read_csv(made / f"{made.name}.csv", index_col="image")
    assert list(table.index) == ["a", "b", "c"]
    assert table["psnr input"].to_numpy() == pytest.approx(np.full(3, 24.61), abs=0.5)
    assert {"psnr DEQ", "ssim DEQ", "seconds DEQ", "steps DEQ", "status DEQ"} <= set(table)
    record = json.loads((made / "provenance.json").read_text())
    assert list(record["runs"]) == [key]
    assert set(record["settings"]["images"]) == {"a.png", "b.jpg", "c.tif"}
    assert {"means.csv", "differences.csv", "weights.csv", f"{made.name}.png"} <= set(record["sha256"])
    picture = notebooks.run("reconstruct", "smoke", {"run": key, "image": str(folder / "c.tif")}, tmp_path)
    with Image.open(picture / "reconstruction.png") as image:
        assert image.size == (92, 112)


def test_a_committed_run_is_a_method_too() -> None:
    assert {name: run.key for name, run in RUNS.items()} == {
        "bilevel": trained_kernels("denoising", "bilevel", 2).key,
        "DEQ": trained_kernels("denoising", "deq", 2).key,
    }
