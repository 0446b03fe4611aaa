"""Tomography: one operator in two forms, weights and training that do what they say, and its page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from lib.deepinverse import PhysicsOperator, deepinv
from lib.figures import tomography
from lib.figures.baselines import TUNING_IMAGES
from lib.figures.evaluation import TV, chosen_runs
from lib.figures.tomography import (
    FBP,
    Scans,
    all_models,
    check_tomography,
    compare,
    scan,
    train_kernels,
    tuned,
)
from lib.pages import notebooks

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = chosen_runs("denoising", 2)


@pytest.fixture(scope="module")
def scans() -> Scans:
    return scan(24, 10, 0.02, {"train": 4, "test": 3}, 0)


def test_the_matrix_is_the_physics(scans: Scans) -> None:
    """`A`, and its adjoint, which the physics has by autograd and the matrix by its transpose."""
    u = scans.truth["test"]
    v = torch.randn(scans.data["test"].shape, generator=torch.Generator().manual_seed(0))
    for ours, theirs in (
        (scans.operator.forward(u), scans.scanner.forward(u)),
        (scans.operator.adjoint(v), scans.scanner.adjoint(v)),
        (scans.operator.normal(u), scans.scanner.normal(u)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_data_are_scans_with_noise(scans: Scans) -> None:
    """Of the standard deviation that was asked for; another seed makes other noise on the same images."""
    noise = scans.data["train"] - scans.operator.forward(scans.truth["train"])
    assert noise.std().item() == pytest.approx(0.02, rel=0.1)
    other = scan(24, 10, 0.02, {"train": 4, "test": 3}, 1)
    assert torch.equal(other.truth["test"], scans.truth["test"])
    assert not torch.equal(other.data["test"], scans.data["test"])


def test_back_projection_inverts_many_angles() -> None:
    """Without noise, and with many directions, to the interpolation of pixels."""
    full = scan(32, 90, 0.0, {"test": 2}, 0)
    error = (tomography.back_projection(full, full.data["test"]) - full.truth["test"])[..., 4:-4, 4:-4]
    assert error.square().mean().sqrt() < 0.2 * full.truth["test"].std()


@pytest.mark.parametrize("name", [TV, "DEQ"])
def test_a_weight_is_the_best_one_on_training_images(name: str, scans: Scans) -> None:
    """It is not beaten by one half or twice as large."""
    run = None if name == TV else RUNS[name]
    model, lam = tuned(scans, run)
    truth, f = scans.first("train", TUNING_IMAGES)
    assert model.lam.item() == pytest.approx(lam)

    def error(factor: float) -> Tensor:
        if run is None:
            other = tomography.tv_model(scans.operator, factor * lam)
        else:
            other = tomography.weighted_model(scans, run, factor * lam)
        with torch.no_grad():
            return (tomography._solve(other, f).value - truth).square().mean()

    errors = [error(factor) for factor in (0.5, 1, 2)]
    assert errors[1] <= min(errors) * 1.001


@pytest.mark.parametrize("name", list(RUNS))
def test_training_lowers_the_training_error_and_leaves_the_run(name: str, scans: Scans) -> None:
    """Its kernels are copied, or what they are compared with would change under the comparison."""
    run = RUNS[name]
    before = {key: weight.clone() for key, weight in run.weights.items()}
    truth, f = scans.first("train")

    def error(model: Any) -> float:
        with torch.no_grad():
            return float((tomography._solve(model, f).value - truth).square().mean())

    start = error(tomography.weighted_model(scans, run, 300.0))
    trained = train_kernels(scans, run, 300.0, 8, 0.01, 0)
    assert error(trained) < 0.99 * start
    assert all(torch.equal(run.weights[key], weight) for key, weight in before.items())
    assert (trained.regularizer.C is None) == (name == "bilevel")
    assert trained.tau * (trained.lam + 100 * 2.73**2) <= 1.001


@pytest.mark.usefixtures("drawing")
def test_the_table_and_the_figure_are_of_the_images(scans: Scans) -> None:
    models = {TV: tomography.tv_model(scans.operator, 500.0)}
    table, images = compare(scans, models)
    assert list(table.index) == [FBP, TV]
    for name in table.index:
        mse = (images[name] - images["truth"]).square().mean().item()
        assert table.mse[name] == pytest.approx(mse, rel=1e-5)
    assert table.psnr[TV] > table.psnr[FBP]
    assert table["lambda"][TV] == 500
    fig = tomography.tomography_figure(images, scans, 1, "a note")
    assert [axis.get_title() for axis in fig.axes] == ["truth", "data", FBP, TV]
    assert any("a note" in text.get_text() for text in fig.texts)


def test_all_models_are_compared(scans: Scans, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained ones start from the weight that was chosen for the kernels as they are."""
    started: list[float] = []
    monkeypatch.setattr(tomography, "tuned", lambda scans, run: (run, 7.0))
    monkeypatch.setattr(
        tomography, "train_kernels", lambda scans, run, lam, *rest: started.append(lam) or run
    )
    models = all_models(scans, RUNS, 1, 0.1, 0)
    names = [f"{name}, {how}" for name in RUNS for how in ("from denoising", "trained here")]
    assert list(models) == [TV, *names]
    assert started == [7.0, 7.0]


def test_the_check_notices_an_adjoint_that_is_only_near(scans: Scans) -> None:
    models = [tomography.tv_model(scans.operator, 500.0)]
    check_tomography(scans, models)
    angles = torch.arange(10) * 18.0
    near = deepinv.physics.Tomography(angles, 24, adjoint_via_backprop=False, normalize=True)
    with pytest.raises(AssertionError, match=r"<K u, v> and <u, K\^T v> differ"):
        check_tomography(replace(scans, scanner=PhysicsOperator(near)), models)


def test_the_page_is_made(tmp_path: Path) -> None:
    """With other parameters, which its provenance has."""
    chosen = {"side": 16, "angles": 5, "filters": 2, "train_images": 2, "test_images": 2, "epochs": 1}
    folder = notebooks.run("tomography", "smoke", chosen, tmp_path)
    assert folder == tmp_path / "smoke" / "tomography"
    table = pd.read_csv(folder / "tomography.csv", index_col="image")
    assert list(table.index[:2]) == [FBP, TV]
    assert len(table) == 6
    record = json.loads((folder / "provenance.json").read_text())
    assert record["settings"]["angles"] == 5
    assert {run["name"] for run in record["runs"].values()} == {"bilevel", "DEQ"}
