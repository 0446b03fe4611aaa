"""Figures of photographs: reconstructions with their quality below, and kernels before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from lib.experiments.build import Weights, image_shape, load_images, make_model, make_operator, solve
from lib.experiments.config import MODELS, FacesConfig
from lib.experiments.data import SPLITS
from lib.experiments.processes import cores
from lib.experiments.profiles import FILTERS, faces_config, our_config, profile_seeds
from lib.experiments.records import Run
from lib.experiments.runs import get_runs, learned_start, train_runs
from lib.experiments.store import Results
from lib.figures.baselines import TUNING_IMAGES, best_tv_weight, chambolle, tv_method
from lib.figures.comparison import paired_test
from lib.figures.reconstructions import Reconstructions, image_quality, runs_by_seed, seed_by_seed, test_data
from lib.figures.style import MODEL_COLORS, MODEL_NAMES, STYLE, TEXT_WIDTH, budget, note
from lib.kernels import spectral_norm
from lib.regularizer import GRADIENT_NORM
from lib.training import generator, observe, one_thread


def face_configs(profile: str, task: str, **values: Any) -> dict[str, FacesConfig]:
    """Return the configurations of both models with each of `FILTERS` by name, such as `DEQ 3x3`.

    `profile`, `task` and `values` are as in `faces_config`.
    """
    return {
        f"{MODEL_NAMES[model]} {size}": faces_config(
            profile, task, **values | {"model": model, "filters": count, "filter_size": side}
        )
        for size, (count, side) in FILTERS.items()
        for model in MODELS
    }


def get_our_runs(
    profile: str, task: str, seeds: Sequence[int], results: Results = None, train: bool = True, **values: Any
) -> dict[str, list[Run]]:
    """Return the runs of `OURS` of both models by name, one per seed of the noise; missing ones are trained.

    Args:
        profile, task, values: as in `faces_config`.
        train: False takes only stored or committed runs.
    """
    runs = iter(get_runs(_our_configs(profile, task, seeds, **values), results, train))
    return {f"{MODEL_NAMES[model]}, ours": [next(runs) for _ in seeds] for model in MODELS}


def _our_configs(profile: str, task: str, seeds: Sequence[int], **values: Any) -> list[FacesConfig]:
    return [our_config(profile, task, **values, model=m, seed=seed) for m in MODELS for seed in seeds]


def get_runs_and_ours(
    profile: str,
    task: str,
    seeds: int | None,
    our_seeds: int,
    results: Results = None,
    train: bool = True,
    **values: Any,
) -> tuple[dict[str, Run], dict[str, list[Run]], dict[str, list[Run]]]:
    """Return the runs of `face_configs`, the same for several seeds, and the runs of `get_our_runs`.

    All are trained together so that no core waits.

    Args:
        profile, task, values: as in `faces_config`; ours have their own `initial`.
        seeds: number of seeds, starting with the one in `values`; the profile's number when None.
        our_seeds: number of seeds of ours.
        train: False takes only stored or committed runs.
    """
    common = {name: value for name, value in values.items() if name not in ("initial", "seed")}
    start = values["seed"]
    numbers = range(start, start + profile_seeds(profile, seeds))
    papers = [face_configs(profile, task, **values | {"seed": number}) for number in numbers]
    ours = range(start, start + our_seeds)
    if train:
        # Slow runs first, so that no process waits for one at the end.
        of_all = sorted((c for same in papers for c in same.values()), key=lambda config: -config.filters)
        train_runs([*of_all, *_our_configs(profile, task, ours, **common)], results)
    of_seeds = runs_by_seed({name: [same[name] for same in papers] for name in papers[0]}, results, train)
    first = {name: same[0] for name, same in of_seeds.items()}
    return first, of_seeds, get_our_runs(profile, task, ours, results, train, **common)


def photograph_by_photograph(runs: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """Measure the input, total variation and each model on every test photograph, for several seeds.

    Args:
        runs: for each model one run per seed, the same seeds for all.

    Returns:
        A row for each `seed` and `photograph`, with columns such as `psnr TV` (dB) and `ssim TV`. The weight
        of total variation is the best one on training images.
    """
    first = next(iter(runs.values()))[0].config
    images = len(SPLITS["faces"]["test"]) if first.dataset == "faces" else first.test_images

    @torch.no_grad()
    def measured(same: Sequence[Run]) -> pd.DataFrame:
        configs: list[Any] = [run.config.model_copy(update={"test_images": images}) for run in same]
        u, f = test_data(configs[0])
        outputs = {"input": f, "TV": total_variation(configs[0], f[:, 0])[0]}
        outputs |= {n: solve(r.model(), f, c).value for n, r, c in zip(runs, same, configs, strict=True)}
        qualities = {name: image_quality(output, u) for name, output in outputs.items()}
        columns = {f"{q} {n}": own[q] for q in ("psnr", "ssim") for n, own in qualities.items()}
        return pd.DataFrame(columns, pd.MultiIndex.from_product([[configs[0].seed], range(1, images + 1)]))

    with one_thread(), ThreadPoolExecutor(cores()) as pool:
        table = pd.concat(pool.map(measured, zip(*runs.values(), strict=True)))
    return table.rename_axis(["seed", "photograph"])


def ahead_of(table: pd.DataFrame) -> pd.DataFrame:
    """Return the medians of `photograph_by_photograph` and the gain over total variation by method.

    Returns:
        A row for each method: the medians of `psnr` (dB) and `ssim` over photographs and seeds; and in dB
        `ahead`, the median over the photographs of a photograph's difference (the median over the seeds),
        with the ends `low` and `high` of its 95 % bootstrap interval.
    """
    rows = {}
    for name in table.filter(like="psnr ").columns.str.removeprefix("psnr "):
        difference = (table[f"psnr {name}"] - table["psnr TV"]).groupby("photograph").median()
        test = paired_test(difference.to_numpy(float))
        rows[name] = {"psnr": table[f"psnr {name}"].median(), "ssim": table[f"ssim {name}"].median()}
        rows[name] |= {"ahead": test["median"], "low": test["low"], "high": test["high"]}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def seeds_by_size(runs: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
    """Return `seed_by_seed` for each of `FILTERS`, from the seeds' runs of `get_runs_and_ours`."""
    tables = {z: seed_by_seed({m: runs[f"{MODEL_NAMES[m]} {z}"] for m in MODELS}) for z in FILTERS}
    return pd.concat(tables, names=["kernels"])


def starting_weights(run: Run, results: Results = None, train: bool = True) -> Weights:
    """Return the normalized kernels that a training started from; `train` as in `get_run`."""
    with one_thread():
        weights = make_model([run.config], learned_start(run.config, results, train)).regularizer.weights()
    return {name: weight[0] for name, weight in weights.items()}


def with_weights(run: Run, weights: Weights, status: str) -> Run:
    """Return a run with other weights, described by its status."""
    return replace(run, weights=weights, status=status, reason="", history=pd.DataFrame())


@one_thread()
def total_variation(config: FacesConfig, observed: Tensor) -> tuple[Tensor, str]:
    """Reconstruct data by total variation with the weight that is best on training images.

    Args:
        config: task, noise and training images.
        observed: data, `(N, H, W)`.

    Returns:
        The reconstructions, `(N, 1, H, W)`, and the weight as text.
    """
    truth, n = load_images(config)["train"][:TUNING_IMAGES], generator(config.seed, "noise of the baseline")
    f = observe(make_operator(config), truth, torch.tensor(config.noise), n)
    weight = best_tv_weight(config, f, truth)
    method = tv_method(config, (observed.shape[-2], observed.shape[-1]))
    return method(observed[:, None], weight), f"{'weight' if method is chambolle else 'lambda'} {weight:g}"


ZOOM = (0.42, 0.6, 0.07, 0.5)
"""Top, bottom, left and right of the enlarged part, as shares of the sides: an eye in the AT&T faces."""


def photograph_figure(
    result: Reconstructions, rows: Sequence[Mapping[str, Mapping[str, str]]], profile: str, image: int = 0
) -> Figure:
    """Draw rows of reconstructions of a test image, each over its enlarged `ZOOM`, PSNR and SSIM.

    A frame has the colour of its model.

    Args:
        result: reconstructions.
        rows: titles of images by name (`truth`, `input`, or an output's) and heading, for each row.
        profile: name of the profile, for the line below.
        image: index of the test image.
    """
    images = {"truth": result.truth, "input": result.observed} | result.outputs
    truth = result.truth[image]
    top, bottom, left, right = (round(share * truth.shape[i // 2]) for i, share in enumerate(ZOOM))
    side = TEXT_WIDTH / max(sum(map(len, row.values())) for row in rows)
    wide = side - 0.08
    tall, low = wide * truth.shape[0] / truth.shape[1], wide * (bottom - top) / (right - left)
    height = len(rows) * (tall + low + 0.82) + 0.37
    with plt.rc_context(STYLE | {"axes.titlesize": 8, "axes.labelsize": 7}):
        fig = plt.figure(figsize=(TEXT_WIDTH, height))

        def draw(shades: Tensor, x: float, y: float, tallness: float, color: str) -> Axes:
            place = (x / TEXT_WIDTH, y / height, wide / TEXT_WIDTH, tallness / height)
            axis = fig.add_axes(place, xticks=[], yticks=[])
            axis.imshow(shades, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            axis.spines[:].set(color=color, linewidth=1.5)
            return axis

        for line, row in enumerate(rows):
            x, y = 0.04, height - 0.57 - line * (tall + low + 0.82)
            for heading, titles in row.items():
                ends = (x / TEXT_WIDTH, (x + side * len(titles) - 0.08) / TEXT_WIDTH)
                fig.text(sum(ends) / 2, (y + 0.41) / height, heading, ha="center", size=8.5)
                if heading:
                    fig.add_artist(Line2D(ends, [(y + 0.38) / height] * 2, color="0.4", linewidth=0.6))
                for name, title in titles.items():
                    picture = images[name][image]
                    color = next((MODEL_COLORS[m] for m, n in MODEL_NAMES.items() if name.startswith(n)), "w")
                    draw(picture, x, y - tall, tall, color).set_title(title, pad=3)
                    below = draw(picture[top:bottom, left:right], x, y - tall - low - 0.03, low, color)
                    below.set_xlabel("" if name == "truth" else quality(picture, truth), labelpad=2)
                    x += side
        corner = (left - 0.5, top - 0.5)
        fig.axes[0].add_patch(Rectangle(corner, right - left, bottom - top, fill=False, edgecolor="w"))
        configs: list[Any] = [run.config for run in result.runs.values()]
        learned = {f"; {c.epochs} iterations with a learned weight" for c in configs if c.learn_weight}
        note(fig, budget(next(iter(result.runs.values())), profile, "kernels as above") + "".join(learned))
    return fig


def quality(image: Tensor, truth: Tensor) -> str:
    """Return PSNR and SSIM of an image `(H, W)` as text."""
    measured = image_quality(image[None, None], truth[None, None])
    return f"{measured['psnr'].item():.1f} dB, SSIM {measured['ssim'].item():.2f}"


def distance(weights: Weights) -> float:
    """Return `||A - C|| / ||A||` of kernels; 0 if they are tied."""
    A, C = weights["A"], weights.get("C", weights["A"])
    return float(torch.linalg.vector_norm(A - C) / torch.linalg.vector_norm(A))


def kernel_figure(run: Run, before: Weights, profile: str, chosen: Sequence[int] | None = None) -> Figure:
    """Draw kernels of `A` and of `C^T` before (first row) and after (second row) training.

    The kernels in one row share a grey scale, whose middle is 0. `C^T` is drawn by the kernels of `C`, so
    that tied kernels look alike.

    Args:
        chosen: indices of the kernels; None draws all.
    """
    chosen = list(range(len(run.weights["A"])) if chosen is None else chosen)
    count = len(chosen)
    with plt.rc_context(STYLE):
        side = min(1.25, (TEXT_WIDTH - 1.2) / (2 * count))
        size = (max(2 * count * side + 1.2, 4.6), 2 * (side + 0.42) + 0.62)
        ratios = [*[1] * count, 0.2, *[1] * count, 0.09]
        fig, axes = plt.subplots(2, 2 * count + 2, figsize=size, squeeze=False, width_ratios=ratios)
        fig.subplots_adjust(left=0.075, right=1 - 0.5 / size[0], wspace=0.08, hspace=0.42 / side)
        fig.subplots_adjust(top=1 - 0.25 / size[1], bottom=0.64 / size[1])
        for line, weights, label in zip(axes, (before, run.weights), ("before", "after"), strict=True):
            A, C = weights["A"], weights.get("C", weights["A"])
            limit = max(A[chosen].abs().max().item(), C[chosen].abs().max().item())
            drawn = [*[("A", i, A) for i in chosen], None, *[("C^\\top", i, C) for i in chosen]]
            for axis, kernel in zip(line, drawn, strict=False):
                axis.set(xticks=[], yticks=[])
                if kernel is None:
                    axis.set_axis_off()
                    continue
                name, i, kernels = kernel
                picture = axis.imshow(kernels[i], cmap="gray", vmin=-limit, vmax=limit)
                axis.set_title(rf"${name}_{{{i + 1}}}$", pad=5)
            line[0].set_ylabel(label)
            line[count].text(0.5, -0.03, rf"$\|A-C\|/\|A\|$ = {distance(weights):.2g}", size=8)
            line[count].texts[0].set(ha="center", va="top", transform=line[count].transAxes)
            fig.colorbar(picture, cax=line[-1], ticks=[-limit, 0, limit], format="%.2g")
        note(fig, budget(run, profile))
    return fig


def kernel_table(run: Run, before: Weights) -> pd.DataFrame:
    """Return norms of the kernels on images, and the distance of `C` from `A`, before and after training."""
    shape = image_shape(run.config)
    direction = torch.randn(1, 1, *shape, generator=generator(0, "direction of the check"))
    rows = {}
    for label, weights in (("before", before), ("after", run.weights)):
        with one_thread():
            acting = [(name, kernels) for name, kernels in weights.items() if name != "lam"]
            norms = {f"norm of {n}": spectral_norm(k, direction, 500, 1e-4)[0].item() for n, k in acting}
        rows[label] = norms | {"||A - C|| / ||A||": distance(weights)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("kernels")


def check_kernels(run: Run, table: pd.DataFrame) -> None:
    """Check the norms of kernels and whether they are tied, and print the results."""
    for name in (name for name in run.weights if name != "lam"):
        worst = (table[f"norm of {name}"] / GRADIENT_NORM - 1).abs().max()
        assert worst <= 0.01, f"norm of {name}: {table[f'norm of {name}'].tolist()}, not {GRADIENT_NORM}"
        print(f"{name} has norm {GRADIENT_NORM:.2f} on the images, before and after, to 1 %")
    before, after = table["||A - C|| / ||A||"]
    if run.config.model == "bilevel":
        assert before == after == 0, f"tied kernels differ: {before}, {after}"
        print("C is tied to A: the distance is 0 before and after")
    elif not isinstance(run.config.initial, str):
        print("A and C start where another training ended")
    else:
        assert before == 0, f"before training C differs from A: {before}"
        print("C starts as A: the distance is 0 before")
