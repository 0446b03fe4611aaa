"""Reconstructions of test images: quality, agreement with the training, and seeds."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.experiments.build import make_operator
from lib.experiments.config import MODELS, RunConfig
from lib.experiments.records import Run, run_folder
from lib.figures.reconstructions import (
    SPREAD,
    Reconstructions,
    check_reconstructions,
    get_runs_of_seeds,
    keeps_loss,
    later_seeds,
    reconstruct,
    reconstruction_figure,
    seed_by_seed,
    shown,
    training_table,
    with_images,
)

SMALL = {"size": 7, "train_images": 50, "test_images": 20, "batch_size": 25, "seed": 3}


@given(
    loss=st.floats(0, 4),
    tol=st.sampled_from([1e-3, 1e-5]),
    apart=st.floats(0, 1.5).filter(lambda apart: abs(apart - 1) > 1e-3),
)
def test_loss_tolerance_follows_solver_tolerance(loss: float, tol: float, apart: float) -> None:
    """A loss may differ by `SPREAD` tolerances, and by any amount if a solve did not converge."""
    mse = (math.sqrt(loss) + apart * SPREAD * tol) ** 2
    run = Run("key", RunConfig(tol=tol), "completed", "", pd.DataFrame(), {}, {})
    for unconverged in (0.0, 0.01):
        table = pd.DataFrame({"mse": [mse], "unconverged": [unconverged]}, index=["deq"])
        result = Reconstructions({"deq": run}, torch.zeros(1), torch.zeros(1), {}, table)
        assert keeps_loss(result, "deq", loss, 0.0) == (apart < 1 or unconverged > 0)
        assert keeps_loss(result, "deq", loss, 0.01)


def test_shown_table_rounds_numbers_and_fills_gaps() -> None:
    table = pd.DataFrame(
        {"ahead": [-0.001, 2.346], "mse": [1.0, 2.0], "deq": ["diverged in epoch 3", math.nan]}
    )
    expected = {"ahead, dB": ["0.00", "2.35"], "DEQ, dB": ["diverged in epoch 3", "–"]}
    assert shown(table).to_dict("list") == expected


def test_table_of_seeds_has_psnr_or_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs are trained or loaded; an incomplete run shows its end in place of its PSNR."""
    first, of_seeds = get_runs_of_seeds("smoke", "denoising", 2, tmp_path, **SMALL)
    assert [[run.config.seed for run in same] for same in of_seeds.values()] == [[3, 4]] * 3
    table = seed_by_seed(of_seeds)
    assert {arm: (run.config.model, run.config.initial) for arm, run in first.items()} == {
        "bilevel": ("bilevel", "independent"),
        "deq": ("deq", "independent"),
        "deq tied": ("deq", "tied"),
    }
    for model, same in of_seeds.items():
        assert table[model].tolist() == [run.history["test_psnr"].iloc[-1] for run in same]
    assert table["ahead"].tolist() == (table["deq"] - table["bilevel"]).tolist()
    assert table["tied ahead"].tolist() == (table["deq tied"] - table["bilevel"]).tolist()
    assert list(later_seeds(of_seeds)) == ["bilevel, seed 4", "deq, seed 4", "deq tied, seed 4"]
    lost = replace(of_seeds["deq"][1], status="diverged", reason="training loss 6e+03 in epoch 3, step 9")
    partial = seed_by_seed(of_seeds | {"deq": [of_seeds["deq"][0], lost]})
    assert partial["deq"].tolist() == [table["deq"].iloc[0], "diverged in epoch 3"]
    assert partial["ahead"].isna().tolist() == [False, True]
    assert training_table({"lost": lost})["training"].tolist() == ["diverged in epoch 3"]
    _, drawn = get_runs_of_seeds("smoke", "denoising", 3, tmp_path, train=False, **SMALL)
    assert set(seed_by_seed(drawn).loc[5, ["bilevel", "deq", "deq tied"]]) == {"not run"}
    shutil.rmtree(run_folder(first["deq tied"].config, tmp_path))
    _, papers = get_runs_of_seeds("smoke", "denoising", 1, tmp_path, train=False, **SMALL)
    assert list(papers) == ["bilevel", "deq"]
    # Reconstructions pass the checks; those with another loss do not.
    result = reconstruct(first)
    check_reconstructions(result)
    assert "deq tied: C is a parameter of its own\nwhere all its solves converge" in capsys.readouterr().out
    more = with_images(result, "other", 0.9 * result.truth[:, None])
    assert more.table.loc["other", "mse"] == pytest.approx(
        0.01 * result.truth.square().mean().item(), rel=1e-4
    )
    pd.testing.assert_frame_equal(more.table.drop("other"), result.table)
    history = first["deq"].history.assign(test_loss=9.0, test_unconverged=0.0)
    wrong = replace(result, runs=first | {"deq": replace(first["deq"], history=history)})
    assert result.table.loc["deq", "unconverged"] == 0
    with pytest.raises(AssertionError, match="deq: loss"):
        check_reconstructions(wrong)


@pytest.mark.usefixtures("drawing")
# matplotlib converts torch's tensors in a way that NumPy deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_reconstruction_figure_has_column_per_model() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, observed, *images = torch.rand(4, 5, 7, 7, generator=generator) * 2 - 1
    runs = {
        model: Run("key", RunConfig(model=model, task="inpainting", size=7), "", "", pd.DataFrame(), {}, {})
        for model in MODELS
    }
    operator = make_operator(runs["deq"].config)
    outputs = dict(zip(MODELS, images, strict=True))
    table = pd.DataFrame({"psnr": [10.0, 20.0, 30.0], "ssim": [0.1, 0.2, 0.3]}, index=["input", *MODELS])
    result = Reconstructions(runs, truth, observed, outputs, table)
    fig = reconstruction_figure(result, ["truth", "input", "K output", "output"], "quick", count=3)
    panels = np.array(fig.axes).reshape(4, 2)
    assert [axes.get_title() for axes in panels[0]] == [
        "bilevel\n20.0 dB, SSIM 0.20",
        "DEQ\n30.0 dB, SSIM 0.30",
    ]
    assert " ".join(fig.texts[0].get_text().split()).endswith("DEQ from $C = A$, ours: not run")
    for column, model in zip(panels.T, MODELS, strict=True):
        forwarded = operator.forward(outputs[model][:, None])[:, 0]
        for axes, row in zip(column, (truth, observed, forwarded, outputs[model]), strict=True):
            strip = np.concatenate(list(row[:3].numpy()), axis=1)
            assert np.array_equal(np.asarray(axes.images[0].get_array()), strip)
