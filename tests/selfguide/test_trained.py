"""`selfguide.load`: a trained model as Python code uses it, and what it costs to import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import selfguide
import shards
from selfguide.discovery.features import SnapshotFeatures
from selfguide.sampling.queries import labels
from selfguide.spec.config import LabelGuidance
from selfguide.trained import TrainedModel
from shards.errors import UserError
from tests.selfguide.test_training import attempt, config
from tools import sample
from tools.ranks import run_ranks

NAMES = ("zero", "one", "two", "7", "four", "five", "six", "3", "eight", "nine")


@pytest.fixture(scope="module")
def folder(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was conditioned on labels."""
    root = tmp_path_factory.mktemp("runs") / "digits" / "labelled"
    cfg = config(digits)
    run_ranks(
        1,
        attempt,
        replace(cfg, guidance=LabelGuidance(), data=replace(cfg.data, classes=10)),
        str(root),
    )
    return root


@pytest.fixture
def model(folder: Path) -> Iterator[TrainedModel]:
    """It, with names for its labels."""
    loaded = selfguide.load(folder)
    loaded.snapshot.data["class_names"] = NAMES
    yield loaded


def test_selfguide_imported_loads_nothing_heavy() -> None:
    code = "import selfguide, sys; print([m for m in ('torch', 'numpy', 'hydra', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sample_equals_the_commands_images_bit_for_bit(
    model: TrainedModel, folder: Path, tmp_path: Path
) -> None:
    for number, (words, settings) in enumerate(
        (
            ([], {}),
            (["--label", "3", "5", "--g", "1.5", "--seed", "7"], {"label": [3, 5], "g": 1.5, "seed": 7}),
            (["--uncond", "--sampler", "heun", "--batch", "3"], {"unconditional": True, "name": "heun", "batch": 3}),
        )
    ):  # fmt: skip
        out = tmp_path / str(number)
        assert (
            sample.main([str(folder), "--out", str(out), "--count", "6", "--steps", "4", *words])
            == 0
        )
        ours = model.images(model.sample(6, steps=4, **settings))  # type: ignore[arg-type]
        theirs = [Image.open(file) for file in sorted((out / "images").iterdir())]
        assert len(ours) == len(theirs) == 6
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_a_label_by_name_is_its_number(model: TrainedModel) -> None:
    by_name = model.sample(3, label="five", steps=2)
    torch.testing.assert_close(by_name, model.sample(3, label=5, steps=2), rtol=0, atol=0)
    assert by_name.shape == (3, *model.shape) == (3, 1, 8, 8) and by_name.dtype == torch.float32
    assert model.classes == NAMES


def test_labels_that_are_no_class_or_two_are_refused(model: TrainedModel) -> None:
    with pytest.raises(UserError, match="did you mean 'five'"):
        model.sample(2, label="fiv")
    # class 3 is called 7, and class 7 is called 3
    with pytest.raises(UserError, match="number:3"):
        model.sample(2, label="3")
    a_number = model.sample(2, label=[3], steps=2)
    torch.testing.assert_close(a_number, model.sample(2, label="name:7", steps=2), rtol=0, atol=0)
    assert labels(model.snapshot, ["8", "one", "name:3"]).tolist() == [8, 1, 7]
    with pytest.raises(UserError, match="10"):
        model.sample(2, label=10)


def test_what_it_is_conditioned_on_is_said_once(model: TrainedModel) -> None:
    with pytest.raises(UserError, match="label and row"):
        model.sample(2, label=1, row=3)
    with pytest.raises(UserError, match="prior"):
        model.sample(2, label=1, prior="uniform")
    with pytest.raises(UserError, match="count=0"):
        model.sample(0)
    with pytest.raises(UserError, match="gg"):
        model.sample(2, gg=2)


def test_images_encoded_and_decoded_are_the_images(model: TrainedModel) -> None:
    x = model.sample(4, steps=2)
    images = model.decode(x)
    assert images.dtype == torch.uint8 and images.shape == (4, 1, 8, 8)
    torch.testing.assert_close(model.decode(model.encode(images)), images, rtol=0, atol=0)
    assert [picture.mode for picture in model.images(images)] == ["L"] * 4


def test_features_are_those_that_annotate_finds(model: TrainedModel) -> None:
    stored = torch.as_tensor(shards.read_all(model.snapshot.data["root"])["x"][:3])
    ordinals = torch.arange(3)
    known = SnapshotFeatures(model.snapshot, model.header, layer=2, noise_time=0.3, pooling="mean")
    x0 = known.normaliser.encode(stored)
    found = model.features(x0, 2, 0.3, pooling="mean")
    torch.testing.assert_close(found, known(stored, ordinals), rtol=0, atol=0)
    tokens = model.features(x0, model.layers[1], 0.3)
    assert tokens.shape == (3, 16, 64)
    torch.testing.assert_close(tokens.mean(1), found)
    # pictures are encoded first
    torch.testing.assert_close(model.features(model.decode(x0), 2, 0.3), tokens, rtol=0, atol=0)
    with pytest.raises(UserError, match="shape"):
        model.features(torch.zeros(1, 1, 16, 16), 2)


def test_load_of_what_is_no_run_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run"):
        selfguide.load("nothing", runs=tmp_path)
    with pytest.raises(UserError, match="snapshots at 256, 512"):
        selfguide.load(folder, images=300)
    with pytest.raises(UserError, match="average 9"):
        selfguide.load(folder, average=9)
    early = selfguide.load("labelled", images=256, runs=folder.parent.parent)
    again = selfguide.load(folder / "snapshots" / "img-000000256")
    assert early.snapshot.images == again.snapshot.images == 256


def test_what_is_no_number_of_images_or_no_seed_is_refused(model: TrainedModel) -> None:
    for words in (
        {"count": 2.5},
        {"count": 0},
        {"seed": 2**63},
        {"seed": 2**63 - 1},
        {"seed": 0.5},
    ):
        with pytest.raises(UserError):
            model.sample(**({"count": 2, "steps": 1} | words))


def test_numbers_of_numpy_and_of_tensors_are_those_of_python(model: TrainedModel) -> None:
    plain = model.sample(3, label=[3, 5], seed=4, g=1.5, steps=2)
    for words in (
        {"count": np.int64(3), "seed": np.int32(4), "steps": np.int64(2), "g": np.float32(1.5)},
        {"label": np.array([3, 5]), "batch": np.uint8(64)},
        {"label": torch.tensor([3, 5]), "g": torch.tensor(1.5)},
        {"label": (np.int64(3), 5)},
    ):
        given = {"count": 3, "label": [3, 5], "seed": 4, "g": 1.5, "steps": 2} | words
        torch.testing.assert_close(model.sample(**given), plain, rtol=0, atol=0)  # type: ignore[arg-type]
    row = model.sample(2, row=5, steps=1)
    for number in (np.int64(5), torch.tensor(5), np.array([5])):
        torch.testing.assert_close(model.sample(2, row=number, steps=1), row, rtol=0, atol=0)  # type: ignore[arg-type]
    x = model.sample(1, steps=1)
    torch.testing.assert_close(model.features(x, np.int64(2)), model.features(x, 2))  # type: ignore[arg-type]


def test_several_labels_that_do_not_divide_the_count_are_all_shown(model: TrainedModel) -> None:
    drawn = model.sample(7, label=[8, 1, 4], steps=1)
    one_each = [
        model.sample(1, label=each, seed=i, steps=1) for i, each in enumerate((8, 8, 8, 1, 1, 4, 4))
    ]
    torch.testing.assert_close(drawn, torch.cat(one_each))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"label": []}, "label names 0, and count=2: name 1 to 2"),
        ({"label": range(3)}, "label names 3, and count=2"),
        ({"label": 1.5}, "1.5"),
        ({"row": ()}, "row names 0"),
        ({"row": "0"}, "numbers of training images"),
        ({"row": 0.5}, "numbers of training images"),
        ({"prior": "empiric"}, "empirical, uniform, quota"),
    ],
)
def test_conditions_that_are_none_are_refused(
    model: TrainedModel, words: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        model.sample(2, steps=1, **words)


def test_load_refuses_a_device_that_is_none_and_an_autoencoder_of_images(folder: Path) -> None:
    with pytest.raises(UserError, match=r"device=cudaa: .* give cpu"):
        selfguide.load(folder, device="cudaa")
    with pytest.raises(UserError, match="trained on images"):
        selfguide.load(folder, autoencoder="vae.safetensors")


def test_tensors_that_are_no_samples_or_images_are_refused(model: TrainedModel) -> None:
    x = torch.zeros(2, *model.shape)
    images = torch.zeros(2, *model.shape, dtype=torch.uint8)
    for wrong in (x.numpy(), x[0], x[..., :-1], x[:0], images.int(), None):
        for read in (model.features, model.decode, model.encode, model.images):
            with pytest.raises(UserError):
                read(wrong)
    for wrong in (x, images[0], images[..., :-1], images[:0]):
        with pytest.raises(UserError):
            model.encode(wrong)
    with pytest.raises(UserError, match="not finite"):
        model.images(x * torch.nan)
