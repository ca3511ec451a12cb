"""`tools.annotate adapt` on the digits: weights that features are read with, killed or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from selfguide.discovery.vit import load_vit
from shards import sidecar
from shards.errors import UserError
from shards.format.header import Header
from shards.sources.source import ArraySource
from shards.write import writer
from tools.annotate import adapt
from tools.annotate.__main__ import main

FIT = ("--vit", "test_vit", "--weights", "random:0", "--device", "cpu")
SMALL = ("--epochs", "2", "--step-images", "4", "--prototypes", "32", "--small-crops", "1")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve grey pictures of 16 px."""
    root = tmp_path_factory.mktemp("few")
    x = np.random.default_rng(0).integers(0, 256, (12, 1, 16, 16)).astype(np.uint8)
    header = Header(kind="image", shift=127.5, scale=2 / 255)
    writer.write(root, ArraySource.of("few", x), header=header, seed=0)
    return root


@pytest.fixture(scope="module")
def adapted(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("weights") / "some" / "adapted.safetensors"
    assert main(["adapt", str(few), *FIT, *SMALL, "--out", str(out)]) == 0
    return out


def test_adapted_weights_are_a_vits_and_say_what_they_are_of(
    few: Path, adapted: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    own, before = load_vit("test_vit", adapted), load_vit("test_vit", "random:0")
    assert not own.saw_labels  # random weights saw none, and timm's name does not say so
    weight, old = own.net.blocks[0].attn.qkv.weight, before.net.blocks[0].attn.qkv.weight
    assert not np.array_equal(weight.numpy(), old.numpy())
    words = ["features", str(few), "--net", "test_vit", "--weights", str(adapted)]
    assert main([*words, "--out", str(tmp_path / "f")]) == 0
    found = sidecar.read(tmp_path / "f")
    assert found.provenance["sha256"] == own.sha256 and not found.saw_labels
    capsys.readouterr()
    # the same command again finds it
    assert main(["adapt", str(few), *FIT, *SMALL, "--out", str(adapted), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sha256"] == own.sha256 and facts["made_of"]["epochs"] == 2
    with pytest.raises(UserError, match="holds other weights"):
        main(["adapt", str(few), *FIT, *SMALL, "--seed", "1", "--out", str(adapted)])


def test_labels_that_the_weights_saw_are_still_said(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    words = ["adapt", str(few), *FIT, "--saw-labels", "yes", *SMALL, "--epochs", "1"]
    assert main([*words, "--out", str(out)]) == 0
    assert load_vit("test_vit", out).saw_labels


def test_a_killed_fit_goes_on_to_the_same_weights(
    few: Path, adapted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapt, "SAVED", 1)
    out = tmp_path / "a.safetensors"
    words = ["adapt", str(few), *FIT, *SMALL, "--out", str(out)]
    learned: list[int] = []
    learn = adapt.Fit._learn

    def dying(fit: Any, crops: Any) -> float:
        if fit.step == 4 and 4 not in learned:
            learned.append(4)
            raise KeyboardInterrupt
        learned.append(fit.step)
        return learn(fit, crops)

    monkeypatch.setattr(adapt.Fit, "_learn", dying)
    with pytest.raises(KeyboardInterrupt):
        main(words)
    assert not out.exists()
    assert main(words) == 0
    assert learned == [0, 1, 2, 3, 4, 4, 5]
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]
    for name, tensor in load_file(adapted).items():
        np.testing.assert_array_equal(load_file(out)[name].numpy(), tensor.numpy())


def test_workers_cut_the_same_crops(few: Path, adapted: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    assert main(["adapt", str(few), *FIT, *SMALL, "--workers", "2", "--out", str(out)]) == 0
    for name, tensor in load_file(adapted).items():
        np.testing.assert_array_equal(load_file(out)[name].numpy(), tensor.numpy())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--epochs", "0"], "--epochs 0: take 1 or more"),
        (["--learning-rate", "0"], "--learning-rate 0: take more than 0"),
        (["--step-images", "13"], "--step-images 13 of 12 images; take 12 or fewer"),
        (["--out", "weights.pth"], "name a .safetensors file"),
        (["--vit", "test_vit2", "--step-images", "4"], r"has no \[CLS\], which DINO's loss reads"),
    ],
)
def test_what_cannot_be_is_refused(
    few: Path, tmp_path: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        main(["adapt", str(few), *FIT, "--out", "a.safetensors", *words])
    assert not list(tmp_path.iterdir())
