"""Photographs: their configurations, their files, and the training of kernels on them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import assert_same_bits
from PIL import Image
from torch import Tensor

from lib import regularizer
from lib.experiments import data, problem, runs
from lib.experiments.config import ConfigError, FacesConfig, RunConfig
from lib.experiments.data import DataError, faces, photograph_files, photographs
from lib.experiments.problem import (
    Weights,
    first_iterate,
    generator,
    image_shape,
    load_images,
    observe,
    solve,
)
from lib.experiments.profiles import DENOISING_SHARES, FACES_PROFILES, faces_config
from lib.experiments.runs import Run, data_digests, get_run, is_stored, run_key
from lib.experiments.trainer import Member, Trainer, read_checkpoint
from lib.kernels import spectral_norm
from lib.models import MODELS
from lib.operators import TASKS
from lib.regularizer import GRADIENT_NORM

pytestmark = pytest.mark.usefixtures("one_thread")

FIELDS = sorted(FacesConfig.model_fields)
OWN_FIELDS = sorted(set(FIELDS) - {"model", "task"})


@pytest.fixture(scope="module", autouse=True)
def cheap_beginnings() -> Iterator[None]:
    """Photographs are read and verified once for all trainings here, and norms first measured less exactly.

    Both take most of the time of a short training.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "faces", cache(data.faces))
        patch.setattr(regularizer, "NORM_ITERATIONS", 100)
        yield


# ---------------------------------------------------------------------------------------- configurations


def refusal(make: Callable[..., FacesConfig] = FacesConfig, **values: Any) -> str:
    """The one line with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        make(**values)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def smoke(task: str = "denoising", **values: Any) -> FacesConfig:
    return faces_config("smoke", task, **values)


def test_defaults_are_the_papers() -> None:
    """Two kernels of 11x11, `tanh(100 z)`, steps of 1/800, Adam for 500 epochs on all 10 images at once."""
    config = FacesConfig()
    assert (config.dataset, config.reduction) == ("faces", 1)
    assert (config.train_images, config.test_images, config.batch_size) == (10, 10, 10)
    assert (config.filters, config.filter_size, config.blur) == (2, 11, 11)
    assert config.sharpness == 100.0
    assert config.tau == pytest.approx(1 / (8 * config.sharpness))
    assert (config.lam, config.gamma) == (18.156, 1.0)
    assert config.start == "data"
    assert (config.epochs, config.schedule) == (500, "linear")
    assert 3.2e-3 <= config.learning_rate <= 1e-2


def test_the_paper_profile_has_the_papers_noise_and_decay() -> None:
    """Denoising: 0.1, and to 1 % of the rate. Deblurring: 0.01, and to 10 % of it."""
    denoising, deblurring = faces_config("paper", "denoising"), faces_config("paper", "deblurring")
    assert (denoising.noise, deblurring.noise) == (0.1, 0.01)
    assert denoising.final_learning_rate == pytest.approx(0.01 * denoising.learning_rate)
    assert deblurring.final_learning_rate == pytest.approx(0.1 * deblurring.learning_rate)
    theirs = {"task", "noise", "final_learning_rate", "tol", "max_steps", "patience", "precondition"}
    for config in (denoising, deblurring):
        assert config.model_dump(exclude=theirs) == FacesConfig().model_dump(exclude=theirs)
    assert faces_config("paper", "inpainting").noise == 0.01
    patience = {task: faces_config("paper", task).patience for task in TASKS}
    assert patience == {"denoising": 50, "inpainting": None, "deblurring": None}


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("dataset", 3, "a valid string"),
        ("reduction", 0, "greater than or equal to 1"),
        ("reduction", 65, "less than or equal to 64"),
        ("blur", 0, "greater than or equal to 1"),
        ("blur", 100, "less than or equal to 99"),
        ("filters", 1001, "less than or equal to 1000"),
        ("filter_size", 1, "greater than or equal to 3"),
        ("filter_size", 33, "less than or equal to 31"),
        ("filter_size", 4, "an odd number"),
        ("sharpness", 0.0, "greater than 0"),
        ("sharpness", math.inf, "a finite number"),
        ("warm_start", 1, "a valid boolean"),
        ("final_learning_rate", 0.02, "at most learning_rate = 0.01"),
        ("schedule", "step", "'cosine' or 'linear'"),
        ("start", "mean", "'zero' or 'data'"),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, value: Any, allowed: str) -> None:
    """In one line: the parameter, what it was and what is allowed."""
    message = refusal(**{name: value})
    assert message.startswith(f"{name}: got {value!r}, allowed: "), message
    assert allowed in message


@pytest.mark.parametrize("name", ["size", "sigma", "batch_size", "filter"])
def test_parameters_of_other_runs_are_refused(name: str) -> None:
    """The line lists the parameters that there are."""
    message = refusal(**{name: 1})
    assert message.startswith(f"{name}: no such parameter, allowed: ")
    assert all(field in message for field in FIELDS)


@pytest.mark.parametrize(
    "value", ["third", "denoising", 3, None, {"epochs": 0}, {"nois": 1}, RunConfig(), ["first"]]
)
def test_bad_initial_kernels_are_refused_by_name(value: Any) -> None:
    """Anything but the three kinds and a configuration; the line says what the kinds are."""
    message = refusal(initial=value)
    assert message.startswith("initial")
    assert "'first', 'second', 'cosine' or 'random'" in message


@pytest.mark.parametrize(
    ("name", "value"), [("model", "deq"), ("filters", 3), ("filter_size", 5)], ids=lambda value: str(value)
)
def test_initial_kernels_of_another_shape_or_model_are_refused(name: str, value: Any) -> None:
    """The line says what the other configuration has and what this one needs."""
    other, default = FacesConfig(**{name: value}), getattr(FacesConfig(), name)
    assert refusal(initial=other) == f"initial: got kernels with {name} = {value!r}, allowed: {default!r}"
    config = FacesConfig(initial=other, **{name: value}, task="deblurring", epochs=3)
    assert config.initial == other


@pytest.mark.parametrize("profile", FACES_PROFILES)
@pytest.mark.parametrize("task", TASKS)
def test_every_profile_is_valid_for_every_task(profile: str, task: str) -> None:
    """A profile and a task are enough; None means the profile's value, any other value wins."""
    config = faces_config(profile, task)
    assert config.task == task
    assert faces_config(profile, task, **dict.fromkeys(OWN_FIELDS)) == config
    changed = faces_config(profile, task, noise=0.25, epochs=7)
    assert changed == FacesConfig(**config.model_dump() | {"noise": 0.25, "epochs": 7})
    assert refusal(lambda **values: faces_config(profile, task, **values), blur=-1).startswith("blur: got -1")


def test_the_profiles_differ_in_size() -> None:
    """Each of `smoke`, `quick` and `paper` costs more epochs of images than the one before."""
    for task in TASKS:
        configs = [faces_config(profile, task) for profile in ("smoke", "quick", "paper")]
        costs = [c.epochs * c.train_images / c.reduction**2 for c in configs]
        assert costs == sorted(set(costs))


@pytest.mark.parametrize("profile", FACES_PROFILES)
@pytest.mark.parametrize("model", MODELS)
def test_denoising_kernels_are_those_of_the_same_profile(profile: str, model: str) -> None:
    """What `DENOISING_SHARES` names is passed on; all else is what the profile has for denoising."""
    shares = {"dataset": "celeba", "reduction": 3, "train_images": 4, "test_images": 5}
    shares |= {"model": model, "filters": 6, "filter_size": 7, "seed": 8}
    assert shares.keys() == set(DENOISING_SHARES)
    own = {"noise": 0.02, "epochs": 11, "tol": 1e-2, "lam": 7.0, "sharpness": 30.0, "blur": 5}
    config = faces_config(profile, "deblurring", initial="denoising", **shares, **own)
    assert config.initial == faces_config(profile, "denoising", **shares)
    assert isinstance(config.initial, FacesConfig)
    assert config.initial.task == "denoising"
    assert config.initial.initial == "random"
    for name, value in (shares | own).items():
        assert getattr(config, name) == value
    plain = faces_config(profile, "deblurring", initial="denoising")
    assert plain.initial == faces_config(profile, "denoising")


def test_a_nested_configuration_survives_json() -> None:
    """Three deep: equal, with the same hash and the same key, from what a record holds."""
    inner = smoke("deblurring", initial="denoising", seed=3)
    config = smoke("inpainting", initial=inner)
    for text in (json.dumps(config.model_dump()), config.model_dump_json()):
        restored = FacesConfig(**json.loads(text))
        assert restored == config
        assert hash(restored) == hash(config)
        assert isinstance(restored.initial, FacesConfig)
        assert restored.initial == inner
        assert run_key(restored) == run_key(config)
    assert run_key(smoke("inpainting", initial=smoke(seed=1))) != run_key(
        smoke("inpainting", initial=smoke())
    )


# ------------------------------------------------------------------------------------------- photographs


def save(folder: Path, name: str, pixels: np.ndarray, mode: str | None = None) -> Path:
    """Write an image file; the format is the suffix's."""
    path = folder / name
    picture = Image.fromarray(pixels)
    (picture if mode is None else picture.convert(mode)).save(path)
    return path


def noise_image(height: int, width: int, seed: int, *channels: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def pixels_of(images: Tensor) -> np.ndarray:
    """The bytes of images in [-1, 1]."""
    return ((images[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five grey PNG files of 20x24 pixels, written in no order, beside files that are no images."""
    path = tmp_path / "photographs"
    path.mkdir()
    for number in (3, 0, 4, 2, 1):
        save(path, f"{number}.png", noise_image(20, 24, number))
    (path / "README.txt").write_text("about these")
    (path / "list").write_text("0 1 2")
    return path


def test_photographs_of_faces_are_the_data_sets() -> None:
    """The first ones of each split, whose people are not the same."""
    found = photographs("faces", 300, 100)
    assert torch.equal(found["train"], faces("train", 300))
    assert torch.equal(found["test"], faces("test", 100))
    few = photographs("faces", 3, 2)
    assert torch.equal(few["train"], found["train"][:3])
    assert torch.equal(few["test"], found["test"][:2])
    train, test = ({image.numpy().tobytes() for image in found[split]} for split in ("train", "test"))
    assert not train & test


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (301, 1, "train_images: got 301, allowed: at most the 300 of faces"),
        (1, 101, "test_images: got 101, allowed: at most the 100 of faces"),
    ],
)
def test_more_faces_than_there_are_are_refused(train: int, test: int, message: str) -> None:
    """By the name of the split, whose number of images the line says."""
    with pytest.raises(DataError) as caught:
        photographs("faces", train, test)
    assert str(caught.value) == message


@pytest.mark.parametrize("reduction", [2, 3, 4, 7])
def test_reduction_averages_blocks(reduction: int) -> None:
    """Each pixel is the mean of a block; rows and columns that fill no block are left out."""
    whole, reduced = photographs("faces", 2, 1), photographs("faces", 2, 1, reduction)
    height, width = 112 // reduction, 92 // reduction
    for split, images in whole.items():
        kept = images[..., : height * reduction, : width * reduction]
        blocks = kept.reshape(-1, 1, height, reduction, width, reduction)
        torch.testing.assert_close(reduced[split], blocks.mean((3, 5)))
    config = smoke(reduction=reduction)
    assert image_shape(config) == (height, width)


def test_a_reduction_to_nothing_is_refused(folder: Path) -> None:
    """The line says how many pixels the images have on their shorter side."""
    assert photographs(str(folder), 1, 1, 20)["test"].shape == (1, 1, 1, 1)
    with pytest.raises(DataError, match=r"^reduction: got 21, allowed: at most the images' 20 pixels$"):
        photographs(str(folder), 1, 1, 21)


def test_a_folder_is_read_in_the_order_of_names(folder: Path) -> None:
    """The first ones are for training and the last ones for testing; the order of creation has no say."""
    found = photographs(str(folder), 2, 2)
    expected = [noise_image(20, 24, number) for number in (0, 1, 3, 4)]
    assert found["train"].dtype == torch.float32
    assert np.array_equal(pixels_of(torch.cat([found["train"], found["test"]])), expected)
    assert found["train"].min() >= -1
    assert found["train"].max() <= 1
    names = [path.name for path in photograph_files(str(folder), 2, 2)]
    assert names == ["0.png", "1.png", "3.png", "4.png"]
    assert [path.name for path in photograph_files(str(folder), 2, 3)] == [f"{k}.png" for k in range(5)]


@pytest.mark.parametrize(("train", "test"), [(3, 3), (6, 1), (1, 5), (5, 1)])
def test_training_and_test_images_never_overlap(folder: Path, train: int, test: int) -> None:
    """A folder with too few images for both is refused, in a line that says how many it has."""
    with pytest.raises(DataError) as caught:
        photographs(str(folder), train, test)
    start = f"train_images, test_images: got {train} and {test}, allowed: together at most the 5 images of "
    assert str(caught.value) == f"{start}{folder}"


def test_images_of_a_folder_become_one_size(tmp_path: Path) -> None:
    """All are cut to the smallest height and width among them, around their centres."""
    images = [noise_image(*size, 0) for size in ((40, 33), (31, 26), (28, 41), (50, 50))]
    for number, image in enumerate(images):
        save(tmp_path, f"{number}.png", image)
    found = photographs(str(tmp_path), 2, 2)
    cut = [images[0][6:34, 3:29], images[1][1:29], images[2][:, 7:33], images[3][11:39, 12:38]]
    assert np.array_equal(pixels_of(torch.cat([found["train"], found["test"]])), cut)


def test_an_unreadable_image_is_named(folder: Path) -> None:
    """Files that are not asked for may be what they like."""
    (folder / "2.png").write_bytes(b"no image at all")
    photographs(str(folder), 2, 2)
    with pytest.raises(DataError, match=f"^{folder / '2.png'} cannot be read as an image: .*$"):
        photographs(str(folder), 3, 2)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    """The line says what was asked for and what may be; a file is no folder."""
    file = save(tmp_path, "0.png", noise_image(8, 8, 0))
    for path in (tmp_path / "nowhere", file):
        with pytest.raises(DataError) as caught:
            photographs(str(path), 1, 1)
        message = str(caught.value)
        assert message.startswith(
            f"dataset: got {str(path)!r}, but {path} is no folder; allowed: faces, celeba"
        )
        assert len(message.splitlines()) == 1


def test_celeba_says_how_it_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its folder the line names `CELEBA_DIR`, where it was looked for, and torchvision."""
    monkeypatch.delenv("CELEBA_DIR", raising=False)
    places = {tmp_path / "celeba" / "img_align_celeba": None, tmp_path / "missing": str(tmp_path / "missing")}
    for place, directory in places.items():
        if directory is not None:
            monkeypatch.setenv("CELEBA_DIR", directory)
        with pytest.raises(DataError) as caught:
            photographs("celeba", 1, 1, root=tmp_path)
        message = str(caught.value)
        assert message.startswith(f"dataset: got 'celeba', but {place} is no folder; ")
        assert "CELEBA_DIR=" in message
        assert "torchvision.datasets.CelebA" in message
        assert len(message.splitlines()) == 1


def test_celeba_has_the_digests_of_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELEBA_DIR", str(folder))
    numbers = {"train_images": 3, "test_images": 2}
    celeba, named = FacesConfig(dataset="celeba", **numbers), FacesConfig(dataset=str(folder), **numbers)
    assert data_digests(celeba) == data_digests(named)


def test_the_key_of_a_run_knows_its_files(folder: Path) -> None:
    """Other bytes, or another file among those used, make another key; a file that is not used does not."""
    config = FacesConfig(dataset=str(folder), train_images=2, test_images=2)
    digests, key = data_digests(config), run_key(config)
    assert list(digests) == ["0.png", "1.png", "3.png", "4.png"]
    assert len(set(digests.values())) == 4
    (folder / "2.png").write_bytes(b"not used")
    save(folder, "1a.png", noise_image(20, 24, 9))
    assert (data_digests(config), run_key(config)) == (digests, key)
    content = bytearray((folder / "3.png").read_bytes())
    for changed in (content[:-1] + bytes([content[-1] ^ 1]), content + b"\0"):
        (folder / "3.png").write_bytes(changed)
        other = data_digests(config)
        assert {name for name in digests if digests[name] != other[name]} == {"3.png"}
        assert run_key(config) != key
    (folder / "3.png").write_bytes(content)
    assert run_key(config) == key
    save(folder, "5.png", noise_image(20, 24, 5))
    assert list(data_digests(config)) == ["0.png", "1.png", "4.png", "5.png"]
    assert run_key(config) != key


def test_digests_of_faces_are_those_of_the_published_file() -> None:
    """Whatever the counts; MNIST has its own."""
    assert data_digests(FacesConfig()) == data_digests(smoke()) == data.FACES_FILES
    assert data_digests(RunConfig()) == data.MNIST_FILES


# ---------------------------------------------------------------------------------------------- training


def train(*configs: FacesConfig) -> list[Member]:
    return Trainer(configs).train()


def train_losses(member: Member) -> list[float]:
    return [row["train_loss"] for row in member.history[1:]]


@pytest.mark.parametrize(("model", "task"), [("bilevel", "denoising"), ("deq", "deblurring")])
def test_a_training_completes_and_lowers_the_loss(model: str, task: str) -> None:
    """On the smoke profile; the weights are kernels without a bias, and only the DEQ has a `C`."""
    (member,) = train(smoke(task, model=model, epochs=8, learning_rate=0.05, blur=5))
    assert (member.status, member.reason) == ("completed", "")
    losses = train_losses(member)
    assert losses[-1] < 0.98 * losses[0]
    assert member.history[-1]["test_loss"] < member.history[0]["test_loss"]
    expected = {"A"} if model == "bilevel" else {"A", "C"}
    assert {name: weight.shape for name, weight in member.weights.items()} == dict.fromkeys(
        expected, (2, 11, 11)
    )
    assert all(math.isfinite(value) for row in member.history for value in row.values())


def test_both_models_start_equal() -> None:
    """Before training the DEQ is the bilevel model; after it `C` is no longer `A`."""
    (tied,), (free,) = (train(smoke(model=model, learning_rate=0.05)) for model in MODELS)
    assert free.history[0]["test_loss"] == pytest.approx(tied.history[0]["test_loss"], rel=1e-6)
    assert free.history[1]["train_loss"] == pytest.approx(tied.history[1]["train_loss"], rel=1e-6)
    assert (free.weights["A"] - free.weights["C"]).norm() > 1e-3 * free.weights["A"].norm()
    parameters = dict(Trainer([free.config]).model.regularizer.named_parameters())
    assert torch.equal(parameters["A"], parameters["C"])
    assert parameters["A"].untyped_storage().data_ptr() != parameters["C"].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("kind", "filters", "side"), [("first", 30, 3), ("second", 2, 11), ("random", 2, 11)]
)
def test_trained_kernels_keep_the_norm_of_the_gradient(kind: str, filters: int, side: int) -> None:
    """On images of the training's size, for `A` and for `C`, after large steps too."""
    config = smoke(model="deq", initial=kind, filters=filters, filter_size=side, epochs=6, learning_rate=0.05)
    (member,) = train(config)
    start = torch.randn(1, 1, *image_shape(config), generator=torch.Generator().manual_seed(0))
    for name, kernels in member.weights.items():
        norm, _ = spectral_norm(kernels, start, 500)
        assert norm.item() == pytest.approx(GRADIENT_NORM, rel=1e-2), name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("task", ["denoising", "deblurring"])
def test_preconditioned_trainings_have_the_same_losses(model: str, task: str) -> None:
    """To the solver's tolerance and in fewer steps, also when a checkpoint goes on."""
    config = smoke(task=task, model=model, epochs=3, tol=1e-5, max_steps=2000, precondition=False)
    preconditioned = config.model_copy(update={"precondition": True})
    (plain,) = train(config)
    checkpoints: list[bytes] = []
    trainer = Trainer([preconditioned])
    (ours,) = trainer.train(on_epoch=lambda trainer: checkpoints.append(trainer.checkpoint(0)))
    assert train_losses(ours) == pytest.approx(train_losses(plain), rel=5e-3)
    for name in ("forward_steps", "backward_steps"):
        assert ours.history[1][name] < plain.history[1][name]
    (resumed,) = Trainer([preconditioned], checkpoints=checkpoints[:1]).train()
    assert train_losses(resumed) == train_losses(ours)
    for name, weight in ours.weights.items():
        assert torch.equal(weight, resumed.weights[name])


def test_a_mask_has_no_preconditioner() -> None:
    """Refused in one line."""
    said = refusal(task="inpainting", precondition=True)
    assert said == "precondition: got True, allowed: False in inpainting: a mask is no convolution"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("solver", ["anderson", "plain"])
def test_a_warm_start_gives_the_loss_of_a_cold_start(model: str, solver: str) -> None:
    """To the solver's tolerance and in fewer steps, while the kernels change."""
    config = smoke(
        model=model, solver=solver, epochs=4, tol=1e-5, max_steps=2000, sharpness=20.0, tau=1 / 160
    )
    warm, cold = Trainer([config]), Trainer([config])
    (ours,), (theirs,) = warm.train(), cold.train(on_step=lambda: cold.solutions.clear())
    assert train_losses(ours)[0] == train_losses(theirs)[0]
    accuracy = 1e-3 if solver == "plain" else 2e-4
    assert train_losses(ours) == pytest.approx(train_losses(theirs), rel=accuracy)
    assert len(set(train_losses(ours))) == 4
    for name, weight in ours.weights.items():
        assert (weight - theirs.weights[name]).norm() < 0.01 * weight.norm()
    for row, other in zip(ours.history[2:], theirs.history[2:], strict=True):
        assert row["forward_unconverged"] == other["forward_unconverged"] == 0
        assert row["backward_unconverged"] == other["backward_unconverged"] == 0
        assert row["forward_steps"] < other["forward_steps"]
        assert row["backward_steps"] < other["backward_steps"]


def test_a_warm_start_begins_where_the_last_epoch_ended() -> None:
    """With kernels that do not move, the next epoch's solves take one step."""
    frozen = {"learning_rate": 1e-30, "final_learning_rate": 0.0, "epochs": 3, "tol": 1e-4}
    (member,) = train(smoke(model="deq", **frozen))
    first, *later = member.history[1:]
    assert first["forward_steps"] > 3
    assert first["backward_steps"] > 3
    for row in later:
        assert row["forward_steps"] == 1
        assert row["backward_steps"] <= 2
        assert row["train_loss"] == pytest.approx(first["train_loss"], rel=1e-4)


def test_without_a_warm_start_the_noise_is_drawn_anew() -> None:
    """Then the loss of kernels that do not move changes, and the solves start from the data each time."""
    frozen = {"learning_rate": 1e-30, "final_learning_rate": 0.0, "epochs": 3, "tol": 1e-4}
    trainer = Trainer([smoke(warm_start=False, **frozen)])
    (member,) = trainer.train()
    assert len(set(train_losses(member))) == 3
    assert min(row["forward_steps"] for row in member.history[1:]) > 3
    assert not trainer.solutions


@pytest.mark.parametrize("warm_start", [True, False])
def test_the_training_loss_is_that_of_the_documented_noise(warm_start: bool) -> None:
    """Every image has its own noise, a warm start's from the seed alone, and is solved from its data."""
    config = smoke(warm_start=warm_start, epochs=1, tol=1e-5)
    trainer = Trainer([config])
    images = load_images(config)["train"]
    purpose = ("noise",) if warm_start else ("noise", 0)
    if not warm_start:
        images = images[torch.randperm(len(images), generator=generator(config.seed, "order", 0))]
    n = torch.randn(images.shape, generator=generator(config.seed, *purpose))
    f = observe(trainer.model.operator, images, trainer.noise, n)
    torch.testing.assert_close(f[0], images + config.noise * n)
    assert torch.equal(first_iterate(f, config), f)
    loss = (solve(trainer.model, f, config).value - images).square().mean().item()
    (member,) = trainer.train()
    assert train_losses(member) == pytest.approx([loss], rel=1e-5)


def saved(*configs: FacesConfig) -> tuple[list[Member], dict[int, list[bytes]]]:
    """Members of an uninterrupted training, and their checkpoints after each epoch."""
    checkpoints: dict[int, list[bytes]] = {}

    def keep(trainer: Trainer) -> None:
        checkpoints[trainer.epoch] = [trainer.checkpoint(index) for index in trainer.alive]

    return Trainer(configs).train(on_epoch=keep), checkpoints


@pytest.mark.parametrize(
    "values",
    [
        {"model": "deq", "learning_rate": 0.05},
        {"model": "deq", "warm_start": False, "filters": 5, "filter_size": 3},
        {"model": "bilevel", "solver": "plain", "task": "deblurring", "max_steps": 30},
    ],
    ids=lambda values: "-".join(str(value) for value in values.values()),
)
def test_a_resumed_training_has_the_same_bits(values: dict[str, Any]) -> None:
    """From the checkpoint of any epoch, with its scales, its directions and its warm starts."""
    config = smoke(**{"epochs": 3, "test_every": 2, "reduction": 6} | values)
    (member,), checkpoints = saved(config)
    assert sorted(checkpoints) == [1, 2, 3]
    for checkpoint in checkpoints.values():
        (resumed,) = Trainer([config], checkpoints=checkpoint).train()
        assert_same_bits(resumed, member)
    buffers = read_checkpoint(checkpoints[2][0])["buffers"]
    warm = {"forward", "backward"} if config.warm_start else set()
    assert {"regularizer.scales", "regularizer.directions"} | warm <= set(buffers)


VARIANTS: list[dict[str, Any]] = [{"noise": 0.1}, {"noise": 0.3}]


@pytest.mark.parametrize(("model", "filters", "side"), [("bilevel", 2, 11), ("deq", 6, 3)])
def test_a_stack_trains_each_member_as_alone(model: str, filters: int, side: int) -> None:
    """Two noise levels, to the accuracy of float32; also from checkpoints of different stacks."""
    shared = {"model": model, "filters": filters, "filter_size": side, "epochs": 3, "reduction": 6}
    configs = [smoke(**shared | variant, learning_rate=0.03) for variant in VARIANTS]
    together, checkpoints = saved(*configs)
    alone = [saved(config) for config in configs]
    mixed = [checkpoints[1][0], alone[1][1][1][0]]
    resumed = Trainer(configs, checkpoints=mixed).train()
    assert together[0].history[-1]["train_loss"] < 0.6 * together[1].history[-1]["train_loss"]
    for members in (together, resumed):
        for member, ((single,), _) in zip(members, alone, strict=True):
            assert member.config == single.config
            for row, expected in zip(member.history, single.history, strict=True):
                for name in ("train_loss", "test_loss", "test_psnr"):
                    assert (name in row) == (name in expected)
                    if name in row:
                        assert row[name] == pytest.approx(expected[name], rel=1e-3), name
            for name, weight in single.weights.items():
                torch.testing.assert_close(
                    member.weights[name], weight, rtol=0, atol=5e-3 * weight.abs().max()
                )


def test_a_member_that_diverges_takes_only_its_own_warm_start_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one goes on from its own solutions, with as many steps as alone."""
    configs = [smoke(model="deq", epochs=4, **variant) for variant in VARIANTS[::-1]]

    def limit(trainer: Trainer) -> None:
        noisy, other = (train_losses(member)[0] for member in trainer.members)
        monkeypatch.setattr("lib.experiments.trainer.LOSS_LIMIT", (noisy + other) / 2)

    lost, kept = Trainer(configs).train(on_epoch=limit)
    assert lost.status == "diverged"
    assert " in epoch 2, step 1" in lost.reason
    assert [row["epoch"] for row in lost.history] == [0, 1]
    assert kept.status == "completed"
    (alone,) = train(configs[1])
    assert train_losses(kept) == pytest.approx(train_losses(alone), rel=1e-3)
    for row, expected in zip(kept.history[1:], alone.history[1:], strict=True):
        assert row["forward_steps"] == pytest.approx(expected["forward_steps"], abs=1)
        assert row["backward_steps"] == pytest.approx(expected["backward_steps"], abs=1)
    assert kept.history[-1]["forward_steps"] < 0.7 * kept.history[1]["forward_steps"]


@pytest.mark.parametrize(
    ("epochs", "every", "tested"), [(5, 2, {0, 2, 4, 5}), (3, 10, {0, 3}), (2, 1, {0, 1, 2})]
)
def test_tests_are_where_they_are_asked_for_and_at_the_end(epochs: int, every: int, tested: set[int]) -> None:
    """Rows of other epochs have no test metrics at all, and no row has a NaN."""
    (member,) = train(smoke(epochs=epochs, test_every=every))
    assert [row["epoch"] for row in member.history] == list(range(epochs + 1))
    solves = {f"test_{what}" for what in ("loss", "psnr", "steps", "residual", "unconverged")}
    for row in member.history:
        assert all(math.isfinite(value) for value in row.values())
        found = {name for name in row if name.startswith("test")}
        assert found == (solves if row["epoch"] in tested else set())
        assert ("train_loss" in row) == (row["epoch"] > 0)


def test_rarer_tests_change_nothing_else() -> None:
    """Kernels and training losses are the same bits however often there is a test."""
    (often,), (rarely,) = (train(smoke(epochs=4, test_every=every)) for every in (1, 3))
    assert train_losses(often) == train_losses(rarely)
    assert torch.equal(often.weights["A"], rarely.weights["A"])
    assert often.history[-1]["test_loss"] == rarely.history[-1]["test_loss"]


def test_members_that_differ_in_their_kernels_cannot_share_a_stack() -> None:
    """What a stack's members may differ in does not include anything of `FacesConfig` alone."""
    for values in ({"filters": 3}, {"sharpness": 50.0}, {"warm_start": False}, {"initial": "first"}):
        with pytest.raises(ValueError, match="may differ in noise, tau, gamma, lam only"):
            Trainer([smoke(), smoke(**values)])


def test_kernels_of_another_run_are_needed() -> None:
    """A trainer of a configuration that starts from another run refuses to start from nothing."""
    with pytest.raises(ValueError, match=r"^start: got None, allowed: the weights of the run"):
        Trainer([smoke("deblurring", initial="denoising")])


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Weights]:
    """The kernels, as they are and as they act, that each training of a run in this process starts from."""
    starts: dict[str, Weights] = {}

    class Recording(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            regularizer = self.model.regularizer
            named = {
                name: parameter.detach()[0].clone() for name, parameter in regularizer.named_parameters()
            }
            acting = {f"acting {name}": weight[0].clone() for name, weight in regularizer.weights().items()}
            starts[self.config.task] = named | acting

    monkeypatch.setattr(runs, "Trainer", Recording)
    return starts


@pytest.mark.parametrize("model", MODELS)
def test_a_run_starts_from_the_kernels_of_another_run(
    tmp_path: Path, recorded: dict[str, Weights], model: str
) -> None:
    """Exactly those that it ended with, `A` and `C`; it is trained and stored if it is not there yet."""
    config = smoke("deblurring", initial="denoising", model=model, blur=5, reduction=7)
    assert isinstance(config.initial, FacesConfig)
    run = get_run(config, tmp_path)
    assert run.status == "completed"
    assert is_stored(config.initial, tmp_path)
    assert list(recorded) == ["denoising", "deblurring"]
    recorded.pop("denoising")
    first = get_run(config.initial, tmp_path)
    assert list(recorded) == ["deblurring"]
    assert first.weights.keys() == ({"A"} if model == "bilevel" else {"A", "C"})
    for name, weight in first.weights.items():
        assert torch.equal(recorded["deblurring"][name], weight)
        acting = recorded["deblurring"][f"acting {name}"]
        assert (acting - weight).norm() < 1e-2 * weight.norm()
        assert not torch.equal(run.weights[name], weight)
    untrained = get_run(smoke("deblurring", model=model, blur=5, reduction=7), tmp_path)
    assert untrained.history["test_loss"][0] != run.history["test_loss"][0]


def test_a_stored_run_of_photographs_is_loaded(
    tmp_path: Path, folder: Path, recorded: dict[str, Weights]
) -> None:
    """With its configuration, history and kernels; from other bytes it is trained again."""
    config = FacesConfig(
        dataset=str(folder), train_images=1, test_images=1, epochs=3, test_every=2, tol=1e-3, filter_size=3
    )

    def trained_now() -> tuple[Run, bool]:
        recorded.clear()
        return get_run(config, tmp_path), bool(recorded)

    first, trained = trained_now()
    assert trained
    assert first.history["test_loss"].isna().tolist() == [False, True, False, False]
    assert first.history["train_loss"].isna().tolist() == [True, False, False, False]
    again, trained = trained_now()
    assert not trained
    assert again.config == config
    assert torch.equal(again.weights["A"], first.weights["A"])
    assert again.history.equals(first.history)
    model = again.model(shape=(9, 13))
    f = torch.randn(2, 1, 9, 13, generator=torch.Generator().manual_seed(0))
    assert model.step_map(f)(f).shape == f.shape
    save(folder, "4.png", noise_image(20, 24, 44))
    other, trained = trained_now()
    assert trained
    assert other.key != first.key
    assert len(list((tmp_path / "runs").iterdir())) == 2


def ours(**values: Any) -> FacesConfig:
    """A small training of kernels and weight by L-BFGS, from first-order differences."""
    own = {
        "initial": "first",
        "filters": 2,
        "filter_size": 3,
        "learn_weight": True,
        "differentiate_norm": True,
    }
    return smoke(**own | {"optimizer": "lbfgs", "epochs": 6, "tol": 1e-6, "lam": 5.0} | values)


@pytest.mark.parametrize("model", MODELS)
def test_kernels_and_weight_are_learned_by_a_quasi_newton_method(model: str) -> None:
    """The loss falls from step to step, the weight moves, and what is stored has the last test loss."""
    config = ours(model=model)
    (member,) = Trainer([config]).train()
    losses = [row["train_loss"] for row in member.history[1:]]
    assert member.status == "completed"
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert abs(math.log(member.weights["lam"].item() / config.lam)) > 0.1
    trained = problem.trained_model(config, member.weights)
    torch.testing.assert_close(trained.lam, member.weights["lam"], rtol=1e-5, atol=0)
    images = problem.load_images(config)["test"]
    f = problem.observe(trained.operator, images, torch.tensor(config.noise), problem.test_noise(config))
    loss = (problem.solve(trained, f, config).value - images).square().mean()
    assert loss.item() == pytest.approx(member.history[-1]["test_loss"], rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_a_training_with_a_learned_weight_is_resumed_with_the_same_bits(optimizer: str) -> None:
    """Weight, step and what L-BFGS remembers are in the checkpoint of any epoch."""
    config = ours(optimizer=optimizer, epochs=4)
    (member,), checkpoints = saved(config)
    for checkpoint in checkpoints.values():
        (resumed,) = Trainer([config], checkpoints=checkpoint).train()
        assert_same_bits(resumed, member)


def test_a_quasi_newton_method_takes_one_fixed_loss_of_one_training() -> None:
    """Noise that is drawn anew and stacks are refused in one line."""
    with pytest.raises(ConfigError, match="optimizer: got 'lbfgs', allowed: with warm_start = True"):
        ours(warm_start=False)
    with pytest.raises(ValueError, match="configs: got 2, allowed: one at a time for L-BFGS"):
        Trainer([ours(), ours(noise=0.2)])
    assert runs.stack_size(ours(), torch.device("cpu")) == 1
