"""Figures of photographs and kernels: drawn images and numbers are the computed ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from lib.experiments.build import load_images
from lib.experiments.config import FacesConfig
from lib.experiments.profiles import faces_config
from lib.experiments.records import Run
from lib.experiments.runs import get_run
from lib.figures.baselines import chambolle
from lib.figures.photographs import (
    ZOOM,
    ahead_of,
    check_kernels,
    distance,
    get_runs_and_ours,
    kernel_figure,
    kernel_table,
    photograph_by_photograph,
    photograph_figure,
    seeds_by_size,
    starting_weights,
    total_variation,
    with_weights,
)
from lib.figures.reconstructions import reconstruct
from lib.figures.style import MODEL_COLORS, TEXT_WIDTH
from lib.regularizer import GRADIENT_NORM

pytestmark = [
    pytest.mark.usefixtures("drawing"),
    # matplotlib converts torch's tensors in a way that NumPy deprecates.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


def smoke(task: str = "denoising", **values: Any) -> FacesConfig:
    return faces_config("smoke", task, **{"filters": 3, "filter_size": 3} | values)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def trained(results: Path) -> dict[str, Run]:
    """Runs of both models on denoising, and one on deblurring from the DEQ's kernels."""
    configs = {
        "bilevel": smoke(model="bilevel"),
        "DEQ": smoke(model="deq", learning_rate=0.1),
        "nested": smoke("deblurring", model="deq", initial=smoke(model="deq", learning_rate=0.1), blur=5),
    }
    return {name: get_run(config, results) for name, config in configs.items()}


def texts(fig: Figure) -> str:
    return " ".join(" ".join(text.get_text().split()) for axis in fig.axes for text in axis.texts)


def test_distance_of_kernels_is_relative_to_norm_of_a() -> None:
    A = torch.tensor([[[3.0, 0], [0, 0]], [[0, 4.0], [0, 0]]])
    C = torch.tensor([[[3.0, 0], [0, 0]], [[0, 4.0], [0, 2.0]]])
    assert distance({"A": A, "C": C}) == pytest.approx(0.4)
    assert distance({"A": A, "C": -A}) == pytest.approx(2)
    assert distance({"A": A}) == 0


@pytest.mark.parametrize("name", ["bilevel", "DEQ", "nested"])
def test_starting_weights_have_loss_of_epoch_0(name: str, trained: dict[str, Run], results: Path) -> None:
    run = trained[name]
    start = starting_weights(run, results)
    other = with_weights(run, start, "untrained")
    assert (other.status, other.config, other.history.empty) == ("untrained", run.config, True)
    mse = reconstruct({"trained": run, "untrained": other}).table["mse"]
    losses = run.history["test_loss"]
    assert mse["untrained"] == pytest.approx(losses.iloc[0], rel=1e-2)
    assert mse["trained"] == pytest.approx(losses.iloc[-1], rel=1e-2)
    if name == "nested":
        torch.testing.assert_close(start, trained["DEQ"].weights, rtol=1e-3, atol=1e-4)


def dense_norm(kernels: Tensor, height: int, width: int) -> float:
    """Norm of `A` on whole images by the singular values of its matrix."""
    units = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
    experts = torch.nn.functional.conv2d(units, kernels[:, None].double(), padding=kernels.shape[-1] // 2)
    return torch.linalg.matrix_norm(experts.flatten(1), 2).item()


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("bilevel", "C is tied to A: the distance is 0 before and after"),
        ("DEQ", "C starts as A: the distance is 0 before"),
        ("nested", "A and C start where another training ended"),
    ],
)
def test_kernel_table_has_norms_of_dense_matrices(
    name: str, statement: str, trained: dict[str, Run], results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check also rejects another norm or distance."""
    run = trained[name]
    before = starting_weights(run, results)
    table = kernel_table(run, before)
    for label, weights in (("before", before), ("after", run.weights)):
        assert table["||A - C|| / ||A||"][label] == distance(weights)
        for key, kernels in weights.items():
            assert table[f"norm of {key}"][label] == pytest.approx(dense_norm(kernels, 28, 23), rel=2e-3)
            assert table[f"norm of {key}"][label] == pytest.approx(GRADIENT_NORM, rel=1e-2)
    check_kernels(run, table)
    assert capsys.readouterr().out.splitlines()[-1] == statement
    longer = table.copy()
    longer.loc["after", "norm of A"] *= 1.02
    with pytest.raises(AssertionError, match="norm of A"):
        check_kernels(run, longer)
    if name != "nested":
        apart = table.copy()
        apart.loc["before", "||A - C|| / ||A||"] = 0.1
        with pytest.raises(AssertionError, match="differ"):
            check_kernels(run, apart)


@pytest.mark.parametrize("chosen", [None, [2, 0]])
@pytest.mark.parametrize("name", ["bilevel", "DEQ"])
def test_kernel_figure_shows_kernels(name: str, chosen: list[int] | None, trained: dict[str, Run]) -> None:
    """Kernels of `A` and `C` share the grey scale of their row, with 0 in the middle."""
    run = trained[name]
    before = {key: 0.5 * weight for key, weight in run.weights.items()}
    fig = kernel_figure(run, before, "smoke", chosen)
    indices = [0, 1, 2] if chosen is None else chosen
    drawn = iter(axis for axis in fig.axes if axis.images)
    for weights in (before, run.weights):
        A, C = weights["A"], weights.get("C", weights["A"])
        limit = max(A[indices].abs().max().item(), C[indices].abs().max().item())
        for letter, kernels in (("A", A), (r"C^\top", C)):
            for i in indices:
                axis = next(drawn)
                np.testing.assert_array_equal(axis.images[0].get_array(), kernels[i])
                assert axis.images[0].get_clim() == pytest.approx((-limit, limit))
                assert axis.get_title() == f"${letter}_{{{i + 1}}}$"
        assert rf"$\|A-C\|/\|A\|$ = {distance(weights):.2g}" in texts(fig)


def test_photograph_figure_shows_images_crops_and_quality(trained: dict[str, Run]) -> None:
    """Every image has the same enlarged crop and a frame in its model's colour, on a page's width."""
    result = reconstruct({name: trained[name] for name in ("bilevel", "DEQ")})
    rows = [{"": {"truth": "u", "input": "f"}, "free": {"DEQ": "a DEQ"}}, {"tied": {"bilevel": "one"}}]
    fig = photograph_figure(result, rows, "smoke", 1)
    assert fig.get_figwidth() == TEXT_WIDTH
    images = {"truth": result.truth, "input": result.observed} | result.outputs
    assert [axis.get_title() for axis in fig.axes[::2]] == ["u", "f", "a DEQ", "one"]
    assert [text.get_text() for text in fig.texts[:3]] == ["", "free", "tied"]
    truth = result.truth[1].numpy()
    top, bottom, left, right = (round(z * side) for z, side in zip(ZOOM, (28, 28, 23, 23), strict=True))
    colors = ("w", "w", MODEL_COLORS["deq"], MODEL_COLORS["bilevel"])
    names = ("truth", "input", "DEQ", "bilevel")
    for whole, part, name, color in zip(fig.axes[::2], fig.axes[1::2], names, colors, strict=True):
        picture = images[name][1].numpy()
        np.testing.assert_array_equal(whole.images[0].get_array(), picture)
        np.testing.assert_array_equal(part.images[0].get_array(), picture[top:bottom, left:right])
        assert same_color(whole.spines["left"].get_edgecolor(), color)
        if name != "truth":
            decibels = peak_signal_noise_ratio(truth, picture, data_range=2)
            ssim = structural_similarity(truth, picture, data_range=2)
            assert part.get_xlabel() == f"{decibels:.1f} dB, SSIM {ssim:.2f}"


@pytest.mark.parametrize(("task", "weight"), [("denoising", "weight"), ("deblurring", "lambda")])
def test_total_variation_returns_images_and_weight(task: str, weight: str) -> None:
    config = smoke(task, blur=5)
    truth = load_images(config)["test"]
    observed = truth + 0.1 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    u, choice = total_variation(config, observed[:, 0])
    name, number = choice.split()
    assert (name, u.shape) == (weight, truth.shape)
    if task == "denoising":
        torch.testing.assert_close(u, chambolle(observed, float(number)))
        assert (u - truth).square().mean() < 0.7 * (observed - truth).square().mean()


def test_runs_are_named_by_model_and_size(results: Path) -> None:
    """There is one run for each seed; ours start from cosine kernels."""
    values: dict[str, Any] = {"initial": "second", "noise": 0.1, "seed": 4, "epochs": 1}
    first, papers, ours = get_runs_and_ours("smoke", "denoising", 2, 1, results, **values)
    assert list(first) == ["bilevel 11x11", "DEQ 11x11", "bilevel 3x3", "DEQ 3x3"]
    assert {name: same[0].key for name, same in papers.items()} == {n: r.key for n, r in first.items()}
    assert [[run.config.seed for run in same] for same in papers.values()] == 4 * [[4, 5]]
    assert [(name, [run.config.seed for run in same]) for name, same in ours.items()] == [
        ("bilevel, ours", [4]),
        ("DEQ, ours", [4]),
    ]
    configs: list[Any] = [same[0].config for same in ours.values()]
    assert {config.initial for config in configs} == {"cosine"}
    table = seeds_by_size(papers)
    assert table.index.tolist() == [("11x11", 4), ("11x11", 5), ("3x3", 4), ("3x3", 5)]
    for (size, seed), row in table.iterrows():
        psnr = papers[f"DEQ {size}"][seed - 4].history["test_psnr"].iloc[-1]
        assert (row["deq"], row["ahead"]) == (psnr, psnr - row["bilevel"])


def test_psnr_of_each_photograph_matches_scikit_image(trained: dict[str, Run]) -> None:
    """The table `ahead` has medians of the differences to total variation."""
    run = trained["DEQ"]
    few = replace(run, config=run.config.model_copy(update={"dataset": "faces"}))
    table = photograph_by_photograph({"DEQ": [few]})
    assert table.index.names == ["seed", "photograph"]
    assert list(table) == [
        f"{quantity} {name}" for quantity in ("psnr", "ssim") for name in ("input", "TV", "DEQ")
    ]
    result = reconstruct({"DEQ": run})
    for k, (u, v) in enumerate(zip(result.truth.numpy(), result.outputs["DEQ"].numpy(), strict=True), 1):
        expected = peak_signal_noise_ratio(u, v, data_range=2)
        assert table.loc[(run.config.seed, k), "psnr DEQ"] == pytest.approx(expected, abs=0.05)
    ahead = ahead_of(table)
    assert ahead.loc["TV", "ahead"] == 0
    assert ahead.loc["DEQ", "ahead"] == pytest.approx((table["psnr DEQ"] - table["psnr TV"]).median())
    assert ahead.loc["DEQ", "low"] <= ahead.loc["DEQ", "ahead"] <= ahead.loc["DEQ", "high"]
