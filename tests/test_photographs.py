"""Figures of photographs and kernels: what they show is what was computed, and kernels survive their file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from lib.experiments import data
from lib.experiments.config import ConfigError, FacesConfig
from lib.experiments.data import DataError
from lib.experiments.problem import Weights, load_images, solve
from lib.experiments.profiles import faces_config, profile_config
from lib.experiments.runs import KERNELS, Run, get_run, load_kernels, save_kernels, trained_kernels
from lib.experiments.store import DamagedFile
from lib.experiments.trainer import Trainer
from lib.figures import baselines, photographs, reconstructions
from lib.figures.baselines import chambolle
from lib.figures.photographs import (
    check_kernels,
    distance,
    get_face_runs,
    kernel_figure,
    kernel_table,
    photograph_figure,
    photograph_reconstruction_figure,
    print_reconstruction,
    reconstruct_photograph,
    save_reconstruction,
    seeds_by_size,
    starting_weights,
    total_variation,
    with_weights,
)
from lib.figures.reconstructions import SSIM_WINDOW, Reconstructions, image_quality, reconstruct, with_images
from lib.regularizer import GRADIENT_NORM
from lib.solvers import Status

pytestmark = [
    pytest.mark.usefixtures("one_thread", "drawing"),
    # matplotlib hands torch's tensors to NumPy in a way that NumPy will not take for ever.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def images_read_once() -> Iterator[None]:
    """The photographs are read and verified once for all trainings here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "faces", cache(data.faces))
        yield


def smoke(task: str = "denoising", **values: Any) -> FacesConfig:
    return faces_config("smoke", task, **{"filters": 3, "filter_size": 3} | values)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def trained(results: Path, images_read_once: None) -> dict[str, Run]:
    """A run of each model on denoising, and one on deblurring that starts from the DEQ's kernels."""
    configs = {
        "bilevel": smoke(model="bilevel"),
        "DEQ": smoke(model="deq", learning_rate=0.1),
        "nested": smoke("deblurring", model="deq", initial=smoke(model="deq", learning_rate=0.1), blur=5),
    }
    return {name: get_run(config, results) for name, config in configs.items()}


@pytest.fixture(scope="module")
def shown(trained: dict[str, Run]) -> Reconstructions:
    return reconstruct({name: trained[name] for name in ("bilevel", "DEQ")})


def texts(fig: Figure) -> list[str]:
    return [text.get_text() for text in fig.findobj(plt.Text) if text.get_text()]


# ------------------------------------------------------------------------------------------ kernels


def test_the_distance_of_kernels() -> None:
    """`||A - C|| / ||A||` over all kernels, and 0 without a `C`."""
    A = torch.tensor([[[3.0, 0], [0, 0]], [[0, 4.0], [0, 0]]])
    C = torch.tensor([[[3.0, 0], [0, 0]], [[0, 4.0], [0, 2.0]]])
    assert distance({"A": A, "C": C}) == pytest.approx(0.4)
    assert distance({"A": 7 * A, "C": 7 * C}) == pytest.approx(0.4)
    assert distance({"A": A, "C": -A}) == pytest.approx(2)
    assert distance({"A": A, "C": A}) == distance({"A": A}) == 0


@pytest.mark.parametrize("name", ["bilevel", "DEQ", "nested"])
def test_starting_weights_are_the_trainers(name: str, trained: dict[str, Run], results: Path) -> None:
    """To the bit those with which the training's first step is taken."""
    run = trained[name]
    start = trained["DEQ"].weights if name == "nested" else None
    expected = Trainer([run.config], start=start).model.regularizer.weights()
    found = starting_weights(run, results)
    assert set(found) == set(expected) == set(run.weights)
    for key, weight in found.items():
        assert torch.equal(weight, expected[key][0])
        assert not torch.equal(weight, run.weights[key])
    if name == "nested":
        torch.testing.assert_close(found, trained["DEQ"].weights, rtol=1e-3, atol=1e-4)


def test_the_seeds_of_each_size_stand_under_it(results: Path) -> None:
    """For each size and seed what both models' trainings ended with."""
    runs = {seed: get_face_runs("smoke", "denoising", results, epochs=1, seed=seed) for seed in (3, 5)}
    table = seeds_by_size({name: [of_seed[name] for of_seed in runs.values()] for name in runs[3]})
    assert table.index.names == ["kernels", "seed"]
    assert table.index.tolist() == [("11x11", 3), ("11x11", 5), ("3x3", 3), ("3x3", 5)]
    for (size, seed), row in table.iterrows():
        bilevel, deq = (
            runs[seed][f"{name} {size}"].history["test_psnr"].iloc[-1] for name in ("bilevel", "DEQ")
        )
        assert (row["bilevel"], row["deq"], row["ahead"], row["reason"]) == (bilevel, deq, deq - bilevel, "")
    assert table["deq"].nunique() == table["bilevel"].nunique() == 4


def test_with_weights_is_the_same_model_of_other_weights(trained: dict[str, Run], results: Path) -> None:
    """It reconstructs as the untrained model does, and has no history of its own."""
    run = trained["DEQ"]
    start = starting_weights(run, results)
    other = with_weights(run, start, "untrained")
    assert (other.status, other.reason, other.config) == ("untrained", "", run.config)
    assert other.weights is start
    assert other.history.empty
    assert not run.history.empty
    assert run.status == "completed"
    table = reconstruct({"trained": run, "untrained": other}).table
    assert table.mse["untrained"] == pytest.approx(run.history.test_loss.iloc[0], rel=1e-5)
    assert table.mse["trained"] == pytest.approx(run.history.test_loss.iloc[-1], rel=1e-5)
    assert table.mse["trained"] != pytest.approx(table.mse["untrained"], rel=1e-4)


def dense_norm(kernels: Tensor, height: int, width: int) -> float:
    """Norm of `A` on whole images, by the singular values of its matrix."""
    units = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
    experts = torch.nn.functional.conv2d(units, kernels[:, None].double(), padding=kernels.shape[-1] // 2)
    return torch.linalg.matrix_norm(experts.flatten(1), 2).item()


@pytest.mark.parametrize("name", ["bilevel", "DEQ", "nested"])
def test_the_table_of_kernels(
    name: str, trained: dict[str, Run], results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Norms of the dense matrices and distances, before and after; the check passes and says so."""
    run = trained[name]
    before = starting_weights(run, results)
    table = kernel_table(run, before)
    assert list(table.index) == ["before", "after"]
    for label, weights in (("before", before), ("after", run.weights)):
        assert table["||A - C|| / ||A||"][label] == distance(weights)
        for key, kernels in weights.items():
            assert table[f"norm of {key}"][label] == pytest.approx(dense_norm(kernels, 28, 23), rel=2e-3)
    assert len(table.columns) == len(run.weights) + 1
    check_kernels(run, table)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(run.weights) + 1
    assert (
        said[-1]
        == {
            "bilevel": "C is tied to A: the distance is 0 before and after",
            "DEQ": "C starts as A: the distance is 0 before",
            "nested": "A and C start where another training ended",
        }[name]
    )
    start, end = table["||A - C|| / ||A||"]
    assert (end > 0) == (name != "bilevel")
    assert (start > 0) == (name == "nested")


@pytest.mark.parametrize("label", ["before", "after"])
@pytest.mark.parametrize("key", ["A", "C"])
@pytest.mark.parametrize("factor", [0.98, 1.02])
def test_the_check_of_kernels_fires_for_another_norm(
    label: str, key: str, factor: float, trained: dict[str, Run]
) -> None:
    """By 2 % in either direction, of either set, before or after training."""
    good = pd.DataFrame(
        {"norm of A": GRADIENT_NORM, "norm of C": GRADIENT_NORM, "||A - C|| / ||A||": [0.0, 0.3]},
        index=["before", "after"],
    )
    check_kernels(trained["DEQ"], good)
    good.loc[label, f"norm of {key}"] *= factor
    with pytest.raises(AssertionError, match=f"norm of {key}"):
        check_kernels(trained["DEQ"], good)


@pytest.mark.parametrize("distances", [(0.0, 0.1), (0.1, 0.0), (0.1, 0.1)])
def test_the_check_of_kernels_fires_for_distances(
    distances: tuple[float, float], trained: dict[str, Run]
) -> None:
    """Tied kernels never differ; free ones do not before training, unless another one came before."""
    norms = {"norm of A": GRADIENT_NORM, "norm of C": GRADIENT_NORM}
    table = pd.DataFrame(norms | {"||A - C|| / ||A||": distances}, index=["before", "after"])
    with pytest.raises(AssertionError, match="tied kernels differ"):
        check_kernels(trained["bilevel"], table)
    check_kernels(trained["nested"], table)
    if distances[0]:
        with pytest.raises(AssertionError, match=r"before training C differs from A: 0\.1"):
            check_kernels(trained["DEQ"], table)
    else:
        check_kernels(trained["DEQ"], table)


@pytest.mark.parametrize("chosen", [None, [1], [2, 0]])
@pytest.mark.parametrize("name", ["bilevel", "DEQ"])
def test_the_figure_of_kernels(
    name: str, chosen: list[int] | None, trained: dict[str, Run], results: Path
) -> None:
    """Each chosen kernel of `A` and of `C`, unchanged, in the greys of its row, with 0 in the middle."""
    run = trained[name]
    before = {key: 0.5 * weight for key, weight in starting_weights(run, results).items()}
    fig = kernel_figure(run, before, "smoke", chosen)
    indices = [0, 1, 2] if chosen is None else chosen
    drawn = [axis for axis in fig.axes if axis.images]
    count = len(indices)
    assert len(drawn) == 4 * count
    for row, weights, label in ((0, before, "before"), (1, run.weights, "after")):
        line = drawn[2 * count * row : 2 * count * (row + 1)]
        A, C = weights["A"], weights.get("C", weights["A"])
        expected = [A[i] for i in indices] + [C[i] for i in indices]
        limit = max(kernel.abs().max().item() for kernel in expected)
        for axis, kernel in zip(line, expected, strict=True):
            np.testing.assert_array_equal(axis.images[0].get_array(), kernel)
            assert axis.images[0].get_clim() == pytest.approx((-limit, limit))
        titles = [f"$A_{{{i + 1}}}$" for i in indices] + [rf"$C^\top_{{{i + 1}}}$" for i in indices]
        assert [axis.get_title() for axis in line] == titles
        assert line[0].get_ylabel() == label
        assert rf"$\|A-C\|/\|A\|$ = {distance(weights):.2g}" in texts(fig)
    assert any("3 kernels 3x3; profile smoke" in text for text in texts(fig))


def test_greys_are_of_the_chosen_kernels() -> None:
    """A large kernel that is not drawn does not make the others pale."""
    config = smoke(model="deq")
    A = torch.stack([size * torch.ones(3, 3) for size in (1.0, 9.0, 2.0)])
    run = Run("key", config, "completed", "", pd.DataFrame(), {"A": A, "C": -3 * A}, {})
    fig = kernel_figure(run, {"A": A, "C": A}, "smoke", [0, 2])
    limits = [axis.images[0].get_clim() for axis in fig.axes if axis.images]
    assert limits == [(-2, 2)] * 4 + [(-6, 6)] * 4


# ---------------------------------------------------------------------------------------- photographs


def test_other_images_are_measured_in_the_same_way(shown: Reconstructions) -> None:
    """The row's PSNR and SSIM are scikit-image's, the others stay, and `K` is applied."""
    images = 0.9 * shown.truth[:, None] + 0.05
    more = with_images(shown, "other", images)
    pairs = [(u.numpy(), v.numpy()) for u, v in zip(shown.truth, images[:, 0], strict=True)]
    psnr = np.mean([peak_signal_noise_ratio(u, v, data_range=2) for u, v in pairs])
    ssim = np.mean([structural_similarity(u, v, data_range=2) for u, v in pairs])
    row = more.table.loc["other"]
    assert row.psnr == pytest.approx(psnr, rel=1e-5)
    assert row.ssim == pytest.approx(ssim, rel=1e-5)
    assert row.mse == pytest.approx(np.mean([(u - v) ** 2 for u, v in pairs]), rel=1e-5)
    pd.testing.assert_frame_equal(more.table.drop("other"), shown.table)
    assert more.table.index.name == "image"
    assert torch.equal(more.outputs["other"], images[:, 0])
    assert torch.equal(more.forwarded["other"], images[:, 0])
    assert set(more.outputs) == {"bilevel", "DEQ", "other"}
    assert "other" not in shown.outputs
    assert "other" not in shown.table.index


def test_the_operator_is_applied_to_other_images(trained: dict[str, Run]) -> None:
    """Of deblurring the blurred images stand beside them."""
    result = reconstruct({"nested": trained["nested"]})
    more = with_images(result, "truth again", result.truth[:, None])
    noise = result.observed - more.forwarded["truth again"]
    assert noise.std().item() == pytest.approx(0.01, rel=0.1)


@given(
    st.integers(SSIM_WINDOW, 20),
    st.integers(SSIM_WINDOW, 20),
    st.integers(1, 5),
    st.sampled_from([1, 500, 2000]),
)
def test_quality_of_many_images_is_that_of_each(height: int, width: int, count: int, pixels: int) -> None:
    """However many of them are measured in one call: no image's SSIM depends on those beside it."""
    generator = torch.Generator().manual_seed(height + 100 * width)
    images, truth = torch.rand(2, count, 1, height, width, generator=generator) * 2 - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstructions, "SSIM_PIXELS", pixels)
        measured = image_quality(images, truth)
    for k, (u, v) in enumerate(zip(images[:, 0].numpy(), truth[:, 0].numpy(), strict=True)):
        assert measured["ssim"][k] == pytest.approx(structural_similarity(u, v, data_range=2), abs=1e-5)
        assert measured["psnr"][k].item() == pytest.approx(
            peak_signal_noise_ratio(v, u, data_range=2), abs=1e-3
        )


@pytest.mark.parametrize("shape", [(SSIM_WINDOW - 1, 20), (20, SSIM_WINDOW - 1)])
def test_images_smaller_than_the_window_are_refused(shape: tuple[int, int]) -> None:
    """Also below each other, where together they would be large enough."""
    with pytest.raises(ValueError, match=r"images: got .*, allowed: at least 7x7"):
        image_quality(torch.zeros(3, 1, *shape), torch.zeros(3, 1, *shape))


def test_reconstructions_are_the_same_on_any_number_of_cores(
    trained: dict[str, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, each under its own name."""
    runs = {name: trained[name] for name in ("bilevel", "DEQ")}
    made = []
    for count in (1, 3):
        monkeypatch.setattr(reconstructions, "workers", lambda device, count=count: count)
        made.append(reconstruct(runs))
    pd.testing.assert_frame_equal(made[0].table, made[1].table, check_exact=True)
    for name in runs:
        assert torch.equal(made[0].outputs[name], made[1].outputs[name])
        assert torch.equal(made[0].forwarded[name], made[1].forwarded[name])
    assert not torch.equal(*made[1].outputs.values())


@pytest.mark.parametrize("image", [0, 1])
def test_photographs_stand_above_their_quality(image: int, shown: Reconstructions) -> None:
    """Each named image of one test image, with its PSNR and SSIM, the truth without."""
    rows = [{"truth": "u", "input": "f", "DEQ": "a DEQ"}, {"bilevel": "tied"}]
    fig = photograph_figure(shown, rows, "smoke", image)
    images = {"truth": shown.truth, "input": shown.observed} | shown.outputs
    drawn = [axis for axis in fig.axes if axis.images]
    assert len(fig.axes) == 6
    assert [axis.get_title() for axis in drawn] == ["u", "f", "a DEQ", "tied"]
    truth = shown.truth[image].numpy()
    for axis, name in zip(drawn, ("truth", "input", "DEQ", "bilevel"), strict=True):
        picture = images[name][image].numpy()
        np.testing.assert_array_equal(axis.images[0].get_array(), picture)
        assert axis.images[0].get_clim() == (-1, 1)
        said = [text.get_text() for text in axis.texts]
        if name == "truth":
            assert said == []
            continue
        decibels = peak_signal_noise_ratio(truth, picture, data_range=2)
        ssim = structural_similarity(truth, picture, data_range=2)
        assert said == [f"{decibels:.1f} dB, SSIM {ssim:.2f}"]
    lines = [" ".join(text.split()) for text in texts(fig)]
    assert any("denoising, noise 0.1" in line and "profile smoke" in line for line in lines)


@pytest.mark.parametrize(
    ("task", "weight", "low", "high"), [("denoising", "weight", 0.005, 1), ("deblurring", "lambda", 10, 3000)]
)
def test_the_weight_of_total_variation_is_chosen_on_training_images(
    task: str, weight: str, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other test images change nothing, other training images do; the images are better than their data."""
    config = smoke(task, blur=5)
    loaded = load_images(config)
    observed = loaded["test"][:, 0] + 0.1 * torch.randn(2, 28, 23, generator=torch.Generator().manual_seed(0))
    u, chosen = total_variation(config, observed)
    assert u.shape == loaded["test"].shape
    name, number = chosen.split()
    assert name == weight
    assert low <= float(number) <= high
    if task == "denoising":
        torch.testing.assert_close(u, chambolle(observed[:, None], float(number)))
        error, before = ((v - loaded["test"]).square().mean() for v in (u, observed[:, None]))
        assert error < 0.7 * before
    monkeypatch.setattr(
        baselines, "load_images", lambda c: loaded | {"test": torch.zeros_like(loaded["test"])}
    )
    again, same = total_variation(config, observed)
    assert same == chosen
    assert torch.equal(again, u)
    monkeypatch.setattr(baselines, "load_images", lambda c: loaded | {"train": 0.05 * loaded["train"]})
    assert total_variation(config, observed)[1] != chosen


def test_the_weight_is_chosen_on_so_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training images behind them have no say."""
    config = smoke(train_images=3)
    loaded = load_images(config)
    observed = loaded["test"][:, 0]
    expected = {count: total_variation(config, observed, count)[1] for count in (1, 3)}
    spoilt = loaded["train"].clone()
    spoilt[1:] = 0
    monkeypatch.setattr(baselines, "load_images", lambda c: loaded | {"train": spoilt})
    assert total_variation(config, observed, 1)[1] == expected[1]
    assert total_variation(config, observed, 3)[1] != expected[3]


def test_runs_of_the_figures_are_named_by_model_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and sizes in order, each with its own run, trained or not as it is asked."""
    asked: list[tuple[bool, list[FacesConfig]]] = []

    def train(configs: list[FacesConfig], results: object, train: bool) -> list[str]:
        assert results == "folder"
        asked.append((train, configs))
        return [f"{config.model} {config.filters} {config.filter_size}" for config in configs]

    monkeypatch.setattr(photographs, "get_runs", train)
    runs = get_face_runs("smoke", "deblurring", "folder", noise=0.03, epochs=None)
    assert list(runs.items()) == [
        ("bilevel 11x11", "bilevel 2 11"),
        ("DEQ 11x11", "deq 2 11"),
        ("bilevel 3x3", "bilevel 30 3"),
        ("DEQ 3x3", "deq 30 3"),
    ]
    own = {"filters": 30, "filter_size": 3}
    assert asked[0][1][2] == faces_config("smoke", "deblurring", noise=0.03, model="bilevel", **own)
    one = get_face_runs("smoke", "denoising", "folder", ["deq"], ["3x3"], train=False)
    assert list(one) == ["DEQ 3x3"]
    assert [train for train, _ in asked] == [True, False]


@pytest.mark.parametrize("train", [True, False])
def test_the_papers_runs_and_ours_are_trained_together(
    train: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call, the slow ones first; ours start from their own kernels whatever the others start from."""
    trained: list[list[FacesConfig]] = []
    found: list[bool] = []

    def load(configs: list[FacesConfig], results: object, train: bool = True) -> list[FacesConfig]:
        found.append(train)
        return configs

    monkeypatch.setattr(photographs, "train_runs", lambda configs, results: trained.append(configs))
    for module in (photographs, reconstructions):
        monkeypatch.setattr(module, "get_runs", load)
    monkeypatch.setattr(reconstructions, "find_histories", lambda configs, results: configs)
    values: dict[str, Any] = {"initial": "second", "noise": 0.03, "seed": 4}
    first, papers, ours = photographs.get_runs_and_ours(
        "smoke", "deblurring", 3, 2, tmp_path, train, **values
    )
    assert [[config.filters for config in configs] for configs in trained] == train * [
        6 * [30] + 6 * [2] + 4 * [8]
    ]
    assert set(found) == {train}
    for position, seed in enumerate((4, 5, 6)):
        expected = get_face_runs("smoke", "deblurring", tmp_path, **values | {"seed": seed})
        assert {name: same[position] for name, same in papers.items()} == expected
    assert first == {name: same[0] for name, same in papers.items()}
    assert ours == photographs.get_our_runs("smoke", "deblurring", (4, 5), tmp_path, noise=0.03)
    assert {config.initial for same in papers.values() for config in same} == {"second"}
    assert {config.initial for same in ours.values() for config in same} == {"cosine"}
    shown = [config for of_both in (papers, ours) for same in of_both.values() for config in same]
    assert not train or set(shown) == set(trained[0])


# ------------------------------------------------------------------------------- photographs of one's own


@pytest.fixture(scope="module")
def png(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A picture of another size in a file, and its values in [-1, 1]."""
    rows, columns = np.mgrid[:20, :31]
    pixels = ((3 * rows + 5 * columns) % 256).astype(np.uint8)
    path = tmp_path_factory.mktemp("pictures") / "a picture.png"
    Image.fromarray(pixels).save(path)
    return path, torch.from_numpy(pixels / 127.5 - 1)[None, None].float()


def test_the_photograph_of_no_path_is_a_test_face(trained: dict[str, Run]) -> None:
    """With the run's noise, and solved by the run's solver to its tolerance."""
    run = trained["bilevel"]
    result = reconstruct_photograph(run)
    assert result.truth is not None
    assert torch.equal(result.truth, load_images(run.config)["test"][:1])
    assert result.noise == run.config.noise == 0.1
    assert (result.f - result.truth).std().item() == pytest.approx(0.1, rel=0.1)
    assert result.run is run
    u = result.solution.value
    with torch.no_grad():
        step = run.model().step_map(result.f)(u)
        expected = solve(run.model(), result.f, run.config)
    assert torch.equal(u, expected.value)
    assert result.solution.residual.item() == expected.residual.item()
    residual = torch.linalg.vector_norm(step - u) / torch.linalg.vector_norm(step)
    # The residual reported is that of the iterate before the value, which was not worse.
    assert 0.9 * result.solution.residual.item() <= residual.item() <= result.solution.residual.item()
    assert (residual <= 1.01 * run.config.tol) == (result.solution.status.item() == Status.CONVERGED)
    assert not torch.equal(u, result.f)


@pytest.mark.parametrize("name", ["bilevel", "nested"])
def test_a_photograph_is_read_from_its_file(
    name: str, trained: dict[str, Run], png: tuple[Path, Tensor]
) -> None:
    """Of any size, degraded by the run's operator with the noise that was asked for, or none."""
    path, u = png
    result = reconstruct_photograph(trained[name], str(path), noise=0)
    assert result.truth is not None
    torch.testing.assert_close(result.truth, u, rtol=0, atol=1e-6)
    assert result.noise == 0
    expected = u
    if name == "nested":
        expected = torch.stack([u.roll((s, s), (-2, -1)) for s in range(-2, 3)]).mean(0)
    torch.testing.assert_close(result.f, expected, rtol=0, atol=1e-5)
    assert result.solution.value.shape == u.shape
    noisy = reconstruct_photograph(trained[name], str(path), noise=0.3)
    assert (noisy.f - result.f).std().item() == pytest.approx(0.3, rel=0.15)
    assert noisy.noise == 0.3


def test_a_degraded_photograph_is_the_data(trained: dict[str, Run], png: tuple[Path, Tensor]) -> None:
    """Nothing is done to it, whatever the noise; nothing is known of the truth."""
    path, u = png
    for noise in (None, 0.5):
        result = reconstruct_photograph(trained["nested"], str(path), noise, clean=False)
        assert result.truth is None
        assert result.noise == 0
        torch.testing.assert_close(result.f, u, rtol=0, atol=1e-6)
        assert not torch.equal(result.solution.value, u)


def test_a_photograph_that_cannot_be_read_is_refused(trained: dict[str, Run], tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for name in ("text.png", "missing.png", "."):
        with pytest.raises(DataError, match=str(tmp_path)):
            reconstruct_photograph(trained["bilevel"], str(tmp_path / name))


def test_total_variation_stands_beside_with_its_best_weight(
    trained: dict[str, Run], png: tuple[Path, Tensor]
) -> None:
    """For the noise that is added, or said to be there, on the run's training photographs."""
    path, _ = png
    for noise, clean in ((0.1, True), (0.3, True), (0.3, False)):
        result = reconstruct_photograph(trained["bilevel"], str(path), noise, clean)
        expected, _ = total_variation(smoke(model="bilevel", noise=noise), result.f[:, 0])
        assert torch.equal(result.tv, expected)


def test_the_noise_of_a_photograph_is_drawn_from_the_seed(trained: dict[str, Run]) -> None:
    first, again, other = (reconstruct_photograph(trained["bilevel"], seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.f, again.f)
    assert torch.equal(first.solution.value, again.solution.value)
    assert (first.f - other.f).abs().max() > 0.1


def test_the_figure_of_a_reconstruction(trained: dict[str, Run], png: tuple[Path, Tensor]) -> None:
    """Truth, data and reconstructions with their quality; of degraded photographs without the truth."""
    path, _ = png
    result = reconstruct_photograph(trained["bilevel"], str(path))
    assert result.truth is not None
    fig = photograph_reconstruction_figure(result)
    pictures = {"truth": result.truth, "data": result.f, "total variation": result.tv}
    pictures |= {"reconstruction": result.solution.value}
    assert [axis.get_title() for axis in fig.axes] == list(pictures)
    for axis, (name, picture) in zip(fig.axes, pictures.items(), strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), picture[0, 0])
        assert axis.images[0].get_clim() == (-1, 1)
        pair = result.truth[0, 0].numpy(), picture[0, 0].numpy()
        said = (
            ""
            if name == "truth"
            else f"{peak_signal_noise_ratio(*pair, data_range=2):.1f} dB, "
            f"SSIM {structural_similarity(*pair, data_range=2):.2f}"
        )
        assert "".join(text.get_text() for text in axis.texts) == said
    fig = photograph_reconstruction_figure(reconstruct_photograph(trained["bilevel"], str(path), clean=False))
    assert [axis.get_title() for axis in fig.axes] == ["data", "total variation", "reconstruction"]
    assert not any("dB" in text for text in texts(fig))


def test_what_is_said_of_a_reconstruction(
    trained: dict[str, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    """How the solve ended and, where the truth is known, the quality."""
    result = reconstruct_photograph(trained["bilevel"])
    assert result.truth is not None
    solution = replace(result.solution, value=result.truth + 1, status=torch.tensor([Status.MAX_STEPS]))
    worse = replace(result, f=result.truth + 0.2, tv=result.truth - 0.1, solution=solution)
    print_reconstruction(worse)
    print_reconstruction(replace(worse, truth=None))
    ended = "the solve ended as max steps"
    said = ["data: 20.00 dB", "total variation: 26.02 dB", "reconstruction: 6.02 dB"]
    assert capsys.readouterr().out.splitlines() == [ended, *said, ended]


def test_a_reconstruction_is_saved(trained: dict[str, Run], tmp_path: Path) -> None:
    """The figure, and the reconstruction pixel by pixel, what is beyond black and white cut off."""
    result = reconstruct_photograph(trained["bilevel"])
    value = result.solution.value.clone()
    value[..., 0, :4] = torch.tensor([-1.5, -1.0, 1.0, 3.0])
    result = replace(result, solution=replace(result.solution, value=value))
    folder = save_reconstruction(photograph_reconstruction_figure(result), result, tmp_path)
    assert folder == tmp_path / "reconstruct" / "face" / "denoising-bilevel-3-noise-0.1"
    assert {path.name for path in folder.iterdir()} == {"figure.png", "reconstruction.png"}
    with Image.open(folder / "reconstruction.png") as picture:
        pixels = np.array(picture)
    assert pixels.shape == (28, 23)
    assert pixels.dtype == np.uint8
    assert pixels[0, :4].tolist() == [0, 0, 255, 255]
    expected = (value[0, 0].double().numpy().clip(-1, 1) + 1) / 2 * 255
    assert np.abs(pixels - expected).max() <= 0.501
    first = (folder / "figure.png").read_bytes()
    with Image.open(folder / "figure.png") as picture:
        assert picture.width > 1000
    save_reconstruction(photograph_reconstruction_figure(result), result, tmp_path)
    assert (folder / "figure.png").read_bytes() == first


def test_each_photograph_has_a_folder(trained: dict[str, Run], tmp_path: Path) -> None:
    """And each task in it; photographs of the same name are told apart, and found again."""
    result = reconstruct_photograph(trained["bilevel"])
    fig = photograph_reconstruction_figure(result)

    def folder(image: str, run: str = "bilevel", **changes: Any) -> str:
        kept = save_reconstruction(fig, replace(result, image=image, run=trained[run], **changes), tmp_path)
        return kept.relative_to(tmp_path / "reconstruct").as_posix()

    first = folder("/a/x.png")
    assert first.startswith("x/denoising-bilevel-")
    second = folder("/b/x.png")
    assert re.fullmatch(r"x-[0-9a-f]{8}", second.partition("/")[0])
    others = [folder("/a/y.png"), folder("/a/x.png", "DEQ"), folder("/a/x.png", noise=0.3)]
    others.append(folder("/a/x.png", truth=None))
    assert len({first, second, *others}) == 6
    assert [folder("/a/x.png"), folder("/b/x.png")] == [first, second]
    assert len(list((tmp_path / "reconstruct").glob("*/*/reconstruction.png"))) == 6


# ---------------------------------------------------------------------------------- files of kernels


@pytest.mark.parametrize("name", ["bilevel", "DEQ", "nested"])
def test_kernels_survive_their_file(name: str, trained: dict[str, Run], tmp_path: Path) -> None:
    """To the bit, with configuration, status and key; a model that reads them reconstructs the same."""
    run = trained[name]
    save_kernels(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [KERNELS]
    loaded = load_kernels(tmp_path / KERNELS)
    assert loaded.config == run.config
    assert isinstance(loaded.config, FacesConfig)
    assert isinstance(loaded.config.initial, FacesConfig) == (name == "nested")
    assert (loaded.key, loaded.status, loaded.reason) == (run.key, run.status, run.reason)
    assert loaded.provenance == run.provenance | {"run": run.key}
    assert set(loaded.weights) == set(run.weights)
    for key, weight in run.weights.items():
        assert loaded.weights[key].dtype == weight.dtype
        assert torch.equal(loaded.weights[key], weight)
    first, second = (reconstruct_photograph(r).solution.value for r in (run, loaded))
    assert torch.equal(first, second)


def sealed(record: object) -> str:
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return json.dumps({"sha256": digest, "kernels": record})


def without(name: str) -> Callable[[str], str]:
    """Leaves out a part of a record, with a checksum that is right."""
    return lambda text: sealed({k: v for k, v in json.loads(text)["kernels"].items() if k != name})


DAMAGE: dict[str, Callable[[str], str | bytes]] = {
    "empty": lambda text: "",
    "cut off": lambda text: text[: len(text) // 2],
    "not JSON": lambda text: f"x{text}",
    "bytes": lambda text: b"\xff\xfe\x00",
    "a list": lambda text: "[1, 2]",
    "null": lambda text: "null",
    "a foreign object": lambda text: '{"weights": [1]}',
    "another status": lambda text: text.replace('"completed"', '"diverged"'),
    "another seed": lambda text: text.replace('"seed": 0', '"seed": 1'),
    "another digit": lambda text: text.replace("0.", "0.1", 1),
    "another checksum": lambda text: text.replace('"sha256": "', '"sha256": "0', 1),
    "no weights": without("weights"),
    "no configuration": without("config"),
    "no provenance": without("provenance"),
    "no kernels": lambda text: sealed({"a": 1}),
    "a wrong configuration": lambda text: sealed(json.loads(text)["kernels"] | {"config": {"filters": -1}}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_kernels_are_refused(name: str, trained: dict[str, Run], tmp_path: Path) -> None:
    """With the name of the file."""
    save_kernels(trained["DEQ"], tmp_path)
    path = tmp_path / KERNELS
    content = DAMAGE[name](path.read_text())
    assert content != path.read_text()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DamagedFile, match=str(path)):
        load_kernels(path)


def test_the_seal_of_kernels_is_that_of_their_record(trained: dict[str, Run], tmp_path: Path) -> None:
    """What the test of the damage calls sealed can be loaded where nothing is missing."""
    save_kernels(trained["nested"], tmp_path)
    path = tmp_path / KERNELS
    path.write_text(sealed(json.loads(path.read_text())["kernels"]))
    assert load_kernels(path).config == trained["nested"].config


def hand_made(task: str, model: str, filters: int) -> Run:
    config = smoke(task, model=model, filters=filters)
    weights: Weights = {"A": torch.full((filters, 3, 3), 0.1 * filters)}
    if model == "deq":
        weights["C"] = weights["A"] + 1
    return Run(f"{task} {model} {filters}", config, "completed", "", pd.DataFrame(), weights, {})


def test_trained_kernels_are_found_by_task_model_and_number(tmp_path: Path) -> None:
    """Among the figures' folders, and nowhere else; what there is none of is refused with what there is."""
    stored = [("denoising", "bilevel", 2), ("denoising", "deq", 2), ("denoising", "deq", 5)]
    stored += [("deblurring", "deq", 2)]
    for number, which in enumerate(stored):
        save_kernels(hand_made(*which), tmp_path / f"fig{number:02}")
    (tmp_path / "fig99").mkdir()
    save_kernels(hand_made("inpainting", "deq", 2), tmp_path / "other")
    for which in stored:
        run = trained_kernels(*which, tmp_path)
        assert run.key == " ".join(map(str, which))
        assert torch.equal(run.weights["A"], hand_made(*which).weights["A"])
    for missing in (("denoising", "bilevel", 5), ("inpainting", "deq", 2), ("denoising", "deq", 3)):
        with pytest.raises(ConfigError) as caught:
            trained_kernels(*missing, tmp_path)
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        asked, _, known = message.partition(", allowed: ")
        assert asked == f"task, model, filters: got {' '.join(map(str, missing))}"
        assert known.split(", ") == [" ".join(map(str, which)) for which in stored]


def test_no_trained_kernels(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="task, model, filters: got denoising deq 2"):
            trained_kernels("denoising", "deq", 2, folder)


def test_damaged_kernels_are_not_passed_over(tmp_path: Path) -> None:
    """A file that cannot be read is said to be so, and not that there is none."""
    save_kernels(hand_made("denoising", "deq", 2), tmp_path / "fig01")
    path = tmp_path / "fig01" / KERNELS
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DamagedFile, match=str(path)):
        trained_kernels("denoising", "deq", 2, tmp_path)


def test_kernels_of_another_kind_of_run_are_refused(tmp_path: Path) -> None:
    """Dense weights of digits are no kernels of photographs."""
    config = profile_config("smoke", "denoising")
    run = Run("key", config, "completed", "", pd.DataFrame(), {"A": torch.zeros(4, 4)}, {})
    save_kernels(run, tmp_path)
    with pytest.raises(DamagedFile, match="no such parameter"):
        load_kernels(tmp_path / KERNELS)
