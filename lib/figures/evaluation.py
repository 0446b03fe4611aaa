"""Evaluation of trained kernels: which kernels, on which images, with which weight of the data term."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import skimage.data
import torch
from IPython.display import clear_output
from PIL import Image, ImageMode
from torch import Tensor
from tqdm import tqdm

from lib.experiments.build import make_operator, solve
from lib.experiments.config import MODELS, ConfigError
from lib.experiments.data import IMAGE_SUFFIXES, DataError, photograph, photograph_files
from lib.experiments.records import Run, stored_kernels, trained_kernels
from lib.experiments.store import Results
from lib.figures.baselines import Method
from lib.figures.style import MODEL_NAMES

SCIKIT_IMAGE = "scikit-image"
SCIKIT_IMAGES = ("brick", "camera", "cell", "coins", "grass", "gravel", "moon", "page", "text")
"""The grey photographs in scikit-image's wheel."""

MEGAPIXEL = 1_000_000
"""Images with more pixels are reduced to this number unless another size is requested."""

UNBOUNDED = 2**31
"""Largest side that leaves an image at its size."""

SMALLEST = 7
"""Side of the SSIM window in pixels."""

TV = "total variation"

Item = TypeVar("Item")


def progress(items: Sequence[Item], description: str) -> Iterator[Item]:
    """Yield the items with a progress bar, which a notebook's cell clears together with its output."""
    interval = 0.2 if sys.stderr.isatty() else 5.0
    yield from tqdm(items, desc=description, mininterval=interval, leave=False, delay=2)
    if "ipykernel" in sys.modules:
        clear_output()


@dataclass(frozen=True)
class Picture:
    """An image file to evaluate.

    Attributes:
        name: its name in the tables, unique in its folder.
        path: of the file.
        largest: side in pixels to which it is reduced if one is longer.
        shape: height and width after the reduction.
        coloured: whether it was made grey.
        digest: SHA-256 of the file.
    """

    name: str
    path: Path
    largest: int
    shape: tuple[int, int]
    coloured: bool
    digest: str

    def read(self) -> Tensor:
        """Return the image in grey, `(1, 1, H, W)` in [-1, 1]."""
        return photograph(self.path, self.largest)


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


def read_pictures(dataset: str, runs: Sequence[Run], largest: int | None = None) -> list[Picture]:
    """Read the images to evaluate and check that they are large enough.

    Args:
        dataset: as in `image_files`.
        runs: the kernels to evaluate.
        largest: side in pixels to which longer ones are reduced; None reduces to a megapixel.

    Raises:
        DataError: an image cannot be read.
        ConfigError: an image is smaller than the blur or the SSIM window.
    """
    files = image_files(dataset)
    stems = [path.stem for path in files]
    pictures = []
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
            coloured = ImageMode.getmode(image.mode).basemode != "L"
        name = path.stem if stems.count(path.stem) == 1 else path.name
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        pictures.append(Picture(name, path, side, (height, width), coloured, digest))
    return pictures


def deviation(noise: float | None, sigma: float | None) -> float | None:
    """Return the standard deviation of the noise for images in [-1, 1]; `sigma` is for images up to 255."""
    return noise if sigma is None else 2 * sigma / 255


def chosen_runs(
    task: str, filters: int, keys: str | Sequence[str] | None = None, results: Results = None
) -> dict[str, Run]:
    """Return trained kernels by their names in the tables.

    Args:
        task, filters: of the committed kernels, of both models.
        keys: of one or several runs of the store, in place of the committed ones.
        results: folder of the store.

    Raises:
        ConfigError: a run does not exist, or the runs differ in task, noise or blur.
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
    """Return a run with another weight `lambda` of the data term, and a step that is short enough for it.

    The step is `1 / (1 / tau + max(0, lambda - trained lambda))`: a step map that contracted still does.
    """
    trained = float(run.weights.get("lam", torch.tensor(run.config.lam)))
    tau = 1 / (1 / run.config.tau + max(0.0, lam - trained))
    config = run.config.model_copy(update={"tau": tau})
    return replace(run, config=config, weights=run.weights | {"lam": torch.tensor(lam)})


def kernels_method(run: Run) -> Method:
    """Reconstruction with a run's kernels, whose weight is `lambda`."""

    def method(f: Tensor, weight: float) -> Tensor:
        chosen = reweighted(run, weight)
        return solve(chosen.model(shape=(f.shape[-2], f.shape[-1])), f, chosen.config).value

    return method


def evaluation_name(
    dataset: str, task: str, filters: int, keys: str | Sequence[str] | None, noise: float | None, tune: bool
) -> str:
    """Return the name of an evaluation's folder: `evaluate`, and each value that is not the default."""
    parts = {
        Path(dataset).name[:60]: dataset != SCIKIT_IMAGE,
        "-".join(key[:8] for key in _listed(keys or [])): keys is not None,
        f"{task}-{filters}": keys is None and (task, filters) != ("denoising", 8),
        f"noise-{noise or 0:.4g}": noise is not None,
        "as-trained": not tune,
    }
    return "-".join(["evaluate", *(part for part, differs in parts.items() if differs)])


def _listed(keys: str | Sequence[str]) -> Sequence[str]:
    return [keys] if isinstance(keys, str) else keys
