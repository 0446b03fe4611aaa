"""The page on the learned weight: what it draws is what was computed, and the mathematics behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from lib.experiments import data
from lib.experiments.config import FacesConfig
from lib.experiments.problem import load_images, solve
from lib.experiments.profiles import OURS_EPOCHS, our_config
from lib.experiments.runs import Run
from lib.figures import photographs, reconstructions, weight
from lib.figures.baselines import tv_model, tv_reconstruction
from lib.figures.comparison import paired_test
from lib.models import MODELS
from lib.operators import CircularBlur, diagonal_motion_kernel
from lib.solvers import Anderson, fixed_point

pytestmark = [
    pytest.mark.usefixtures("one_thread", "drawing"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SEEDS = [2, 3]


@pytest.fixture(scope="module", autouse=True)
def images_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "faces", cache(data.faces))
        yield


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory, images_read_once: None) -> dict[str, list[Run]]:
    return photographs.get_our_runs("smoke", "denoising", SEEDS, tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def table(ours: dict[str, list[Run]]) -> pd.DataFrame:
    return photographs.photograph_by_photograph(ours, 3)


def test_ours_are_both_models_of_each_seed(ours: dict[str, list[Run]]) -> None:
    """With what `our_config` says, and a weight that was learned."""
    assert list(ours) == ["bilevel, ours", "DEQ, ours"]
    for model, runs in zip(MODELS, ours.values(), strict=True):
        assert [run.config for run in runs] == [
            our_config("smoke", "denoising", model=model, seed=seed) for seed in SEEDS
        ]
        for run in runs:
            assert isinstance(run.config, FacesConfig)
            assert (run.status, run.config.epochs) == ("completed", OURS_EPOCHS["smoke"])
            assert run.weights["lam"].item() != pytest.approx(run.config.lam, rel=1e-3)


def test_each_photograph_is_measured_as_others_measure_it(
    ours: dict[str, list[Run]], table: pd.DataFrame
) -> None:
    """The models', by scikit-image, from the data of their seed; a row for each seed and photograph."""
    assert table.index.tolist() == [(seed, photograph) for seed in SEEDS for photograph in (1, 2, 3)]
    assert list(table) == [
        f"{quantity} {name}" for quantity in ("psnr", "ssim") for name in ("input", "TV", *ours)
    ]
    for position, seed in enumerate(SEEDS):
        for name, runs in ours.items():
            config = runs[position].config.model_copy(update={"test_images": 3})
            truth, f = reconstructions.test_data(config)
            assert torch.equal(truth, load_images(config)["test"])
            with torch.no_grad():
                u = solve(runs[position].model(), f, config).value
            for photograph in (1, 2, 3):
                pair = [images[photograph - 1, 0].numpy() for images in (truth, u)]
                row = table.loc[(seed, photograph)]
                assert row[f"psnr {name}"] == pytest.approx(
                    peak_signal_noise_ratio(*pair, data_range=2), abs=1e-3
                )
                assert row[f"ssim {name}"] == pytest.approx(
                    structural_similarity(*pair, data_range=2), abs=1e-6
                )
        tv, _ = photographs.total_variation(config, f[:, 0])
        pairs = [(truth[i, 0].numpy(), tv[i, 0].numpy()) for i in range(3)]
        expected = [peak_signal_noise_ratio(*pair, data_range=2) for pair in pairs]
        assert table.loc[seed]["psnr TV"].tolist() == pytest.approx(expected, abs=1e-3)


def test_the_lead_is_that_of_the_photographs(table: pd.DataFrame) -> None:
    """Median over photographs of the median over seeds; total variation is not ahead of itself."""
    lead = photographs.ahead_of(table)
    assert list(lead.index) == ["input", "TV", "bilevel, ours", "DEQ, ours"]
    assert lead.loc["TV", "ahead"] == 0
    for name in lead.index:
        difference = table[f"psnr {name}"] - table["psnr TV"]
        of_photographs = [(difference[2, i] + difference[3, i]) / 2 for i in (1, 2, 3)]
        assert lead.loc[name, "ahead"] == pytest.approx(sorted(of_photographs)[1])
        assert lead.loc[name, "psnr"] == pytest.approx(table[f"psnr {name}"].median())
        assert lead.loc[name, "ssim"] == pytest.approx(table[f"ssim {name}"].median())
        if name != "TV":
            assert lead.loc[name, "low"] <= lead.loc[name, "ahead"] <= lead.loc[name, "high"]


def test_total_variation_is_solved_to_the_end() -> None:
    """With a weight as deblurring needs it, within a hundredth of a decibel of a solution in float64."""
    config = our_config("smoke", "deblurring", blur=5)
    truth, f = reconstructions.test_data(config)
    operator = CircularBlur(diagonal_motion_kernel(5))
    u = tv_reconstruction(operator)(f, 2000.0)
    model = tv_model(operator, 2000.0).double()
    problem = model.problem(f.double(), model.preconditioner(f.shape[-3:]))
    exact = fixed_point(problem, f.double(), Anderson(1e-11, 5000, memory=10, regularization=1e-10))
    assert exact.status.eq(0).all()
    error, best = ((v - truth).square().mean().item() for v in (u, exact.value))
    assert abs(10 * math.log10(error / best)) < 0.01


# ------------------------------------------------------------------------------------------ the page


def test_the_curve_of_the_weight_goes_through_the_run(ours: dict[str, list[Run]]) -> None:
    """At the learned weight it has the PSNR of the run's own reconstructions; elsewhere another one."""
    for name, runs in ours.items():
        run: Any = runs[0]
        lam = run.weights["lam"].item()
        curve = weight.psnr_by_weight(run.config, {name: run.weights}, [lam, 5 * lam])[name]
        assert curve[lam] == pytest.approx(
            reconstructions.reconstruct({name: run}).table.loc[name, "psnr"], abs=1e-3
        )
        assert abs(curve[5 * lam] - curve[lam]) > 0.1


@pytest.mark.parametrize("task", ["denoising", "deblurring"])
def test_the_true_gradient_is_orthogonal_to_the_kernels(
    task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their length has no say; the constant norm's gradient has a part along them, and the loss falls along
    both at first, along the true one the fastest."""
    config = our_config("smoke", task, blur=5)
    step = 1e-4
    norms = weight.norm_directions(config, [0.0, step])
    assert norms.along["through the norm"] < 1e-6 < 0.01 < norms.along["norm a constant"]
    falls = norms.losses.loc[0.0] - norms.losses.loc[step]
    assert (falls > 0).all()
    assert falls["norm a constant"] == pytest.approx(
        falls["through the norm"] * math.cos(math.radians(norms.angle)), rel=0.05
    )
    weight.check_directions({task: norms})
    assert capsys.readouterr().out == f"{task}: the gradient through the norm is orthogonal to the kernels\n"
    norms.along["through the norm"] = 0.01
    with pytest.raises(AssertionError, match=task):
        weight.check_directions({task: norms})


def test_the_steps_lead_from_the_papers_setting_to_ours(tmp_path: Path) -> None:
    """One change after the other, and the last one is ours."""
    values = {"train_images": 1, "test_images": 1}
    steps = weight.get_steps("smoke", "denoising", tmp_path, **values)
    configs: list[Any] = [run.config for run in steps.values()]
    assert configs[-1] == our_config("smoke", "denoising", **values, test_every=2)
    changed = [
        {name for name in FacesConfig.model_fields if getattr(a, name) != getattr(b, name)}
        for a, b in pairwise(configs[1:])
    ]
    rates = {"optimizer", "epochs", "learning_rate", "final_learning_rate"}
    assert changed == [{"learn_weight"}, {"differentiate_norm"}, rates, {"initial"}, {"sharpness"}]
    assert (configs[0].initial, configs[0].learn_weight, configs[0].optimizer) == ("random", False, "adam")
    table = weight.steps_table(steps)
    assert table["lambda"].iloc[:2].tolist() == pytest.approx([18.156, 18.156])
    assert (table["lambda"].iloc[2:] != table["lambda"].iloc[0]).all()
    assert table["psnr"].notna().all()


@pytest.mark.parametrize(("shift", "answer"), [(0.1, "YES"), (-0.1, "NO"), (0.0, "NOT DECIDED")])
def test_the_gain_is_decided_by_its_rule(
    shift: float, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the interval of the photographs' medians, not by their number over the seeds."""
    index = pd.MultiIndex.from_product([[0, 1], range(1, 21)], names=["seed", "photograph"])
    spread = [0.05 * (-1) ** photograph for _, photograph in index]
    deq = [30 + shift + d for d in spread]
    table = pd.DataFrame({"psnr bilevel, ours": 30.0, "psnr DEQ, ours": deq}, index)
    weight.print_gain({"denoising": table})
    out = capsys.readouterr().out
    assert out.startswith(f"{answer}: denoising: ")
    test = paired_test((table["psnr DEQ, ours"] - 30).loc[0].to_numpy())
    assert f"20 photographs, median {test['median']:+.3f} dB" in out
    assert "Rule: " in out


def test_the_pictures_are_drawn(ours: dict[str, list[Run]]) -> None:
    """A row of kernels for each name, a panel for each task."""
    kernels = {name: runs[0].weights["A"] for name, runs in ours.items()}
    fig = weight.learned_kernels_figure(kernels, "text")
    assert [axis.get_ylabel() for axis in fig.axes[::8]] == list(ours)
    drawn = fig.axes[8].get_images()[0].get_array()
    assert torch.equal(torch.tensor(drawn), kernels["DEQ, ours"][0])
    curve = pd.DataFrame({"random": [1.0, 2.0], "ours": [2.0, 3.0]}, [1.0, 10.0])
    curves = {"a": curve, "b": curve}
    assert isinstance(fig, Figure)
    assert [axis.get_title() for axis in weight.weight_figure(curves, 18.0, "text").axes] == ["a", "b"]
