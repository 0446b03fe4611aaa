"""Trained kernels on every image of a folder, each at its own size, beside total variation."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import matplotlib.pyplot as plt
import pandas as pd
import skimage.data
import torch
from IPython.display import clear_output
from matplotlib.figure import Figure
from PIL import Image, ImageMode
from skimage.metrics import structural_similarity
from torch import Tensor
from tqdm import tqdm

from lib.experiments.build import make_operator, solve
from lib.experiments.config import MODELS, ConfigError, FacesConfig
from lib.experiments.data import IMAGE_SUFFIXES, DataError, photograph, photograph_files
from lib.experiments.records import Run, stored_kernels, trained_kernels
from lib.experiments.store import Results
from lib.figures.baselines import Method, best_tv_weight, best_weight, tuning_data, tv_method
from lib.figures.comparison import paired_test
from lib.figures.style import MODEL_NAMES, STYLE, TEXT_WIDTH, note
from lib.solvers import Status
from lib.training import generator, observe, one_thread, psnr

SCIKIT_IMAGE = "scikit-image"
SCIKIT_IMAGES = ("brick", "camera", "cell", "coins", "grass", "gravel", "moon", "page", "text")
"""The grey photographs that travel in scikit-image's wheel."""

MEGAPIXEL = 1_000_000
"""Images with more pixels are reduced to it, if no other size is asked for."""

UNBOUNDED = 2**31
"""As the largest side: leave an image as it is."""

SMALLEST = 7
"""Side of the window of SSIM in pixels."""

TV, INPUT = "total variation", "input"

DETAIL = 128
"""Side in pixels of what of an image is drawn: its middle, in which single pixels can be seen."""

LAMBDA_RANGE = 100.0
"""Up to which factor from `(trained noise / noise)^2` the data weight of kernels is looked for."""


Item = TypeVar("Item")


def progress(items: Sequence[Item], what: str) -> Iterator[Item]:
    """The items, with a bar of how many are done; a notebook's cell loses it and its output in the end."""
    interval = 0.2 if sys.stderr.isatty() else 5.0
    yield from tqdm(items, desc=what, mininterval=interval, leave=False, delay=2)
    if "ipykernel" in sys.modules:
        clear_output()


@dataclass(frozen=True)
class Picture:
    """An image file that can be evaluated.

    Attributes:
        name: what it is called in the tables, unique in its folder.
        path: where it is.
        largest: side in pixels to which it is reduced where one is longer.
        shape: height and width that it then has.
        mode: how PIL calls its colours.
        digest: SHA-256 of the file.
    """

    name: str
    path: Path
    largest: int
    shape: tuple[int, int]
    mode: str
    digest: str

    def read(self) -> Tensor:
        """The image in grey, `(1, 1, H, W)` in [-1, 1]."""
        return photograph(self.path, self.largest)

    @property
    def coloured(self) -> bool:
        return ImageMode.getmode(self.mode).basemode != "L"


def image_files(dataset: str) -> list[Path]:
    """All images of a folder by name, or those of scikit-image's wheel.

    Args:
        dataset: `scikit-image`, `celeba`, or the path of a folder (see `lib.experiments.data.photographs`).

    Raises:
        DataError: there is no such folder, or it holds no images.
    """
    if dataset == SCIKIT_IMAGE:
        folder = Path(skimage.data.__file__).parent
        return [folder / f"{name}.png" for name in SCIKIT_IMAGES]
    try:
        folder = photograph_files(dataset, 1, 0)[0].parent
    except DataError as error:
        raise DataError(str(error).replace("allowed: faces, ", f"allowed: {SCIKIT_IMAGE}, ")) from None
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    return [folder / name for name in names if name[0] != "." and not (folder / name).is_dir()]


def pictures(dataset: str, runs: Sequence[Run], largest: int | None = None) -> list[Picture]:
    """The images to evaluate, all of which can be read and are large enough.

    Args:
        dataset: as in `image_files`.
        runs: the kernels to be evaluated.
        largest: side in pixels to which images with a longer one are reduced; None reduces to a megapixel.

    Raises:
        DataError: an image cannot be read.
        ConfigError: an image is smaller than the blur, or than the window of SSIM.
    """
    files = image_files(dataset)
    stems = [path.stem for path in files]
    found = []
    for path in progress(files, "reading"):
        side = largest or UNBOUNDED
        height, width = photograph(path, side).shape[-2:]
        if largest is None and height * width > MEGAPIXEL:
            side = math.floor(max(height, width) * math.sqrt(MEGAPIXEL / (height * width)))
            height, width = photograph(path, side).shape[-2:]
        if min(height, width) < SMALLEST:
            raise ConfigError(f"{path}: got {height}x{width} pixels, allowed: {SMALLEST}x{SMALLEST} or more")
        for run in runs:
            try:
                make_operator(run.config, (height, width))
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
        with Image.open(path) as image:
            mode = image.mode
        name = path.stem if stems.count(path.stem) == 1 else path.name
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found.append(Picture(name, path, side, (height, width), mode, digest))
    return found


def print_pictures(found: Sequence[Picture]) -> None:
    """Print how many images of which sizes there are, and which of them were in colour or reduced."""
    ends = (min, max) if len({picture.shape for picture in found}) > 1 else (min,)
    shapes = [end((picture.shape for picture in found), key=math.prod) for end in ends]
    print(f"{len(found)} images, {' to '.join(f'{height}x{width}' for height, width in shapes)} pixels")
    for what, names in (
        ("in colour, made grey", [picture.name for picture in found if picture.coloured]),
        ("reduced", [picture.name for picture in found if picture.largest == max(picture.shape)]),
    ):
        if names:
            print(f"{what}: {', '.join(names[:5])}{' and others' * (len(names) > 5)} ({len(names)})")


def deviation(noise: float | None, sigma: float | None) -> float | None:
    """The noise as a standard deviation for images in [-1, 1], given as that or in the literature's of 255.

    Raises:
        ConfigError: both are given.
    """
    if noise is not None and sigma is not None:
        raise ConfigError(f"sigma: got {sigma:g} beside noise = {noise:g}, allowed: one of them")
    return noise if sigma is None else 2 * sigma / 255


def chosen_runs(
    task: str, filters: int, keys: str | Sequence[str] | None = None, results: Results = None
) -> dict[str, Run]:
    """Kernels by the names that they have in the tables.

    Args:
        task, filters: of the committed kernels, of both models.
        keys: of a run of the store, or of several, in the place of the committed ones.
        results: whose store.

    Raises:
        ConfigError: there are none such, or the runs do not belong together.
    """
    if keys is None:
        return {MODEL_NAMES[model]: trained_kernels(task, model, filters) for model in MODELS}
    runs = [stored_kernels(key, results) for key in dict.fromkeys(_listed(keys))]
    for run in runs:
        for name in ("task", "noise", "blur"):
            first, other = (getattr(r.config, name) for r in (runs[0], run))
            if first != other:
                raise ConfigError(f"run: got runs with {name} = {first!r} and {other!r}, allowed: one {name}")
    models = [run.config.model for run in runs]
    return {
        MODEL_NAMES[model] if models.count(model) == 1 else f"{MODEL_NAMES[model]} {run.key[:8]}": run
        for run, model in zip(runs, models, strict=True)
    }


def reweighted(run: Run, lam: float) -> Run:
    """A run's model with another weight `lambda` of the data term, and a step that is short enough for it.

    The step is `1 / (1 / tau + max(0, lambda - trained lambda))`, so that what contracted still does.
    """
    trained = float(run.weights.get("lam", torch.tensor(run.config.lam)))
    tau = 1 / (1 / run.config.tau + max(0.0, lam - trained))
    config = run.config.model_copy(update={"tau": tau})
    return replace(run, config=config, weights=run.weights | {"lam": torch.tensor(lam)})


def kernels_method(run: Run) -> Method:
    """Reconstruction with a run's kernels, the weight being `lambda`."""

    def method(f: Tensor, weight: float) -> Tensor:
        chosen = reweighted(run, weight)
        return solve(chosen.model(shape=_shape(f)), f, chosen.config).value

    return method


@dataclass(frozen=True)
class WeightChoice:
    """The weights that an evaluation uses.

    Attributes:
        noise: standard deviation that they are for.
        values: by method; None leaves kernels as they were trained.
    """

    noise: float
    values: Mapping[str, float | None]

    def table(self) -> pd.DataFrame:
        """A row per method."""
        return pd.DataFrame({"weight": self.values, "noise": self.noise}).rename_axis("method")


@torch.no_grad()
@one_thread()
def choose_weights(runs: Mapping[str, Run], noise: float | None = None, tune: bool = True) -> WeightChoice:
    """The weights of all methods for a noise: the best ones on the same training images with that noise.

    The `lambda` of kernels has to follow the noise, about as `(trained noise / noise)^2`, and that of total
    variation is as good as it can be: chosen alike, no method has an advantage.

    Args:
        runs: the kernels, of one task and noise.
        noise: standard deviation; None is that of the training.
        tune: False leaves the kernels with the weight of their training, at its noise.

    Raises:
        ConfigError: another noise, and the weights are not to be tuned.
    """
    config = _config(runs)
    trained = config.noise
    noise = trained if noise is None else noise
    if not tune and noise != trained:
        raise ConfigError(f"tune: got False, allowed: True, or the noise of the training, {trained:g}")
    truth, f = tuning_data(config, noise)
    values: dict[str, float | None] = {TV: best_tv_weight(config, f, truth)}
    for name, run in runs.items():
        middle = run.model().lam.item() * (trained / max(noise, trained / 100)) ** 2
        low, high = middle / LAMBDA_RANGE, middle * LAMBDA_RANGE
        values[name] = best_weight(kernels_method(run), f, truth, low, high) if tune else None
    return WeightChoice(noise, values)


def print_weights(weights: WeightChoice) -> None:
    """Print which weights are used, and why."""
    for name, value in weights.values.items():
        chosen = "as trained" if value is None else f"{value:g}, the best one on training images"
        print(f"{name}: weight {chosen}, for noise {weights.noise:g}")


@torch.no_grad()
@one_thread()
def reconstruct_picture(
    picture: Picture, runs: Mapping[str, Run], weights: WeightChoice, seed: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An image `truth`, its data `input` and what each method makes of it, `(H, W)`, and a row of numbers.

    Args:
        picture: the image.
        runs: the kernels.
        weights: what `choose_weights` returned.
        seed: of the noise, of which every image has its own by its name.
    """
    truth = picture.read()
    config = _config(runs)
    n = torch.randn(truth.shape, generator=generator(seed, "evaluation", picture.name))
    f = observe(make_operator(config, picture.shape), truth, torch.tensor(weights.noise), n)
    images, row = (
        {"truth": truth, INPUT: f},
        dict[str, Any](zip(("height", "width"), picture.shape, strict=True)),
    )

    def measure(name: str, call: Callable[[], Tensor]) -> None:
        start = time.perf_counter()
        images[name] = call()
        seconds = time.perf_counter() - start
        image, reference = images[name][0, 0], truth[0, 0]
        row[f"psnr {name}"] = psnr((image - reference).square().mean()).item()
        row[f"ssim {name}"] = structural_similarity(image.numpy(), reference.numpy(), data_range=2)
        if name != INPUT:
            row[f"seconds {name}"] = seconds

    def kernels(name: str, run: Run) -> Tensor:
        weight = weights.values[name]
        chosen = run if weight is None else reweighted(run, weight)
        solution = solve(chosen.model(shape=picture.shape), f, chosen.config)
        row[f"steps {name}"] = int(solution.steps.item())
        row[f"status {name}"] = Status(int(solution.status.item())).name.lower().replace("_", " ")
        return solution.value

    weight = weights.values[TV]
    assert weight is not None
    measure(INPUT, lambda: f)
    measure(TV, lambda: tv_method(config, picture.shape)(f, weight))
    for name, run in runs.items():
        measure(name, lambda name=name, run=run: kernels(name, run))  # type: ignore[misc]
    return {name: image[0, 0] for name, image in images.items()}, row


def evaluate(
    found: Sequence[Picture], runs: Mapping[str, Run], weights: WeightChoice, seed: int = 0
) -> pd.DataFrame:
    """A row per image: its size and, for the input and each method, `psnr` (dB) and `ssim`; `seconds` of each
    method; of the kernels' solves `steps` and `status`."""
    rows = {
        picture.name: reconstruct_picture(picture, runs, weights, seed)[1]
        for picture in progress(found, "reconstructing")
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("image")


def means(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the images of `evaluate`'s table, a row for each method, and the share `unconverged`."""
    rows = {}
    for name in _methods(table):
        columns = [f"{what} {name}" for what in ("psnr", "ssim", "seconds", "steps")]
        rows[name] = {c.split()[0]: table[c].mean() for c in columns if c in table}
        if f"status {name}" in table:
            rows[name]["unconverged"] = (table[f"status {name}"] != "converged").mean()
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("image")


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """`paired_test` over the images for each two methods: PSNR (dB) and SSIM of one minus the other."""
    rows = {
        (f"{second} minus {first}", what): paired_test(
            (table[f"{what} {second}"] - table[f"{what} {first}"]).to_numpy(float)
        )
        for first, second in combinations([name for name in _methods(table) if name != INPUT], 2)
        for what in ("psnr", "ssim")
    }
    return (
        pd.DataFrame.from_dict(rows, orient="index")
        .rename_axis(["methods", "measure"])
        .astype({"pairs": int})
    )


def _methods(table: pd.DataFrame) -> list[str]:
    return [name.removeprefix("psnr ") for name in map(str, table) if name.startswith("psnr ")]


def ranked(table: pd.DataFrame) -> dict[str, str]:
    """The images that the last method is best on, worst on, and in the middle, by its PSNR."""
    order = table[f"psnr {_methods(table)[-1]}"].sort_values(ascending=False, kind="stable").index
    return {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}


def evaluation_figure(
    found: Sequence[Picture],
    runs: Mapping[str, Run],
    weights: WeightChoice,
    table: pd.DataFrame,
    seed: int,
    text: str,
) -> Figure:
    """The best, the median and the worst image in rows: truth, input and each method, with its quality.

    Of an image its middle is drawn; the quality is that of the whole.

    Args:
        found, runs, weights, seed: as in `evaluate`.
        table: what it returned.
        text: for the line below.
    """
    by_name = {picture.name: picture for picture in found}
    # Of few images one may be two of them.
    labels = {name: label for label, name in reversed(ranked(table).items())}
    chosen = {labels[name]: by_name[name] for name in reversed(labels)}
    columns = 3 + len(runs)
    side = TEXT_WIDTH / columns
    ratios = [min(p.shape[0], DETAIL) / min(p.shape[1], DETAIL) for p in chosen.values()]
    height = side * sum(ratios) + 0.36 * len(chosen) + 0.45
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(
            len(chosen), columns, figsize=(TEXT_WIDTH, height), squeeze=False, height_ratios=ratios
        )
        fig.subplots_adjust(
            left=0.035, right=0.995, wspace=0.04, hspace=0.36 * len(ratios) / (side * sum(ratios))
        )
        fig.subplots_adjust(top=1 - 0.2 / height, bottom=0.6 / height)
        for line, (label, picture) in zip(axes, chosen.items(), strict=True):
            images, row = reconstruct_picture(picture, runs, weights, seed)
            for axis, (name, image) in zip(line, images.items(), strict=True):
                detail = image[
                    tuple(slice(max(0, (n - DETAIL) // 2), (n + DETAIL) // 2) for n in image.shape)
                ]
                axis.imshow(detail.numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                axis.set_title(name, pad=3)
                if name != "truth":
                    quality = f"{row[f'psnr {name}']:.1f} dB, SSIM {row[f'ssim {name}']:.2f}"
                    axis.set_xlabel(quality, size=7.5, labelpad=2)
            line[0].set_ylabel(f"{label}: {picture.name[:24]}", size=7.5)
        note(fig, text)
    return fig


def evaluation_name(
    dataset: str, task: str, filters: int, keys: str | Sequence[str] | None, noise: float | None, tune: bool
) -> str:
    """The name of an evaluation's folder: `evaluate`, and what is not the default."""
    given = {
        Path(dataset).name[:60]: dataset != SCIKIT_IMAGE,
        "-".join(key[:8] for key in _listed(keys or [])): keys is not None,
        f"{task}-{filters}": keys is None and (task, filters) != ("denoising", 8),
        f"noise-{noise or 0:.4g}": noise is not None,
        "as-trained": not tune,
    }
    return "-".join(["evaluate", *(part for part, differs in given.items() if differs)])


def evaluation_settings(
    found: Sequence[Picture], noise: float, tune: bool, largest: int | None, seed: int
) -> dict[str, Any]:
    """What an evaluation was made with beside the kernels, for its provenance: also the images' digests."""
    images = {picture.path.name: f"sha256:{picture.digest}" for picture in found}
    return {"images": images, "noise": noise, "tune": tune, "largest": largest, "seed": seed}


def check_evaluation(table: pd.DataFrame, found: Sequence[Picture], weights: WeightChoice, task: str) -> None:
    """Print what must hold of every evaluation.

    Raises:
        AssertionError: an image is missing or of another size, or its noise is another one.
    """
    assert list(table.index) == [picture.name for picture in found], f"images: {list(table.index)}"
    shapes = list(zip(table["height"], table["width"], strict=True))
    assert shapes == [picture.shape for picture in found], f"sizes: {shapes}"
    print("every image has a row, at its own size")
    if task == "denoising" and weights.noise > 0:
        expected = 10 * math.log10(4 / weights.noise**2)
        # Five standard deviations of the estimate, in dB.
        allowed = 5 * 10 / math.log(10) * (2 / (table["height"] * table["width"])) ** 0.5
        assert ((table[f"psnr {INPUT}"] - expected).abs() <= allowed).all(), "noise of the input"
        print("the PSNR of the input is that of the noise")
    weighed = [name for name, value in weights.values.items() if value is not None]
    assert TV in weighed, f"weights: {weighed}"
    assert len(weighed) in (1, len(weights.values)), f"weights: {weighed}"
    print(
        "the weights are chosen alike"
        if len(weighed) > 1
        else "the kernels have the weight of their training"
    )


def _listed(keys: str | Sequence[str]) -> Sequence[str]:
    return [keys] if isinstance(keys, str) else keys


def _config(runs: Mapping[str, Run]) -> FacesConfig:
    config = next(iter(runs.values())).config
    assert isinstance(config, FacesConfig)
    return config


def _shape(f: Tensor) -> tuple[int, int]:
    height, width = f.shape[-2:]
    return height, width
