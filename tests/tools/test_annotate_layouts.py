"""`tools.annotate lost` and `stego` on small shards with a small random ViT: rows, records, resuming, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from selfguide.data.autoencoders import load_autoencoder
from selfguide.discovery.lost import lost_boxes
from selfguide.discovery.resumable import Work
from selfguide.discovery.stego_heads import read_heads
from selfguide.discovery.vit import load_vit
from shards import cli, sidecar, storage
from shards.errors import UserError
from shards.format.header import Header
from shards.sources.source import ArraySource
from shards.write import writer
from tests.selfguide.test_masks import mean_iou
from tests.selfguide.test_stego_heads import Code, written
from tools.annotate import features, layouts, stego
from tools.annotate.__main__ import main

NET = ["--vit", "test_vit", "--weights", "random:0", "--batch", "5", "--device", "cpu"]
COUNT, EDGE = 12, 64


def picture_data() -> tuple[np.ndarray, Tensor]:
    """Three textures over two halves, (N, 3, 64, 64) uint8, and which of them each pixel has."""
    rng = np.random.default_rng(0)
    colours = np.array([[220, 30, 30], [20, 180, 60], [40, 60, 230]])
    masks = np.zeros((COUNT, EDGE, EDGE), dtype=np.int64)
    for i in range(COUNT):
        first, second = rng.permutation(3)[:2]
        edge = 16 * rng.integers(1, 4)
        masks[i] = first
        masks[i, :, edge:] = second
    x = colours[masks] + rng.integers(-15, 16, (COUNT, EDGE, EDGE, 3))
    return x.clip(0, 255).astype(np.uint8).transpose(0, 3, 1, 2), torch.from_numpy(masks)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    header = Header(kind="image", shift=127.5, scale=2 / 255)
    writer.write(root, ArraySource.of("pictures", picture_data()[0]), header=header, seed=0)
    return root


def stored(root: Path) -> np.ndarray:
    """Images by ordinal: writing has shuffled them."""
    import shards

    return shards.read_all(root)["x"]


def report(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_boxes_are_losts_on_the_images_own_pixels(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = report(capsys, "lost", pictures, *NET, "--short", 96, "--out", tmp_path / "boxes")
    found = sidecar.read(tmp_path / "boxes")
    vit = load_vit("test_vit", "random:0")
    images = layouts.scaled(torch.from_numpy(stored(pictures)), 96)
    for keys, row in zip(vit.keys(images), found.rows(), strict=True):
        patches = lost_boxes(keys.flatten(1).T[None], (6, 6))[0].tolist()
        expected = [round(edge * 16 * 64 / 96) for edge in patches]  # 96 pixels stand for 64
        assert row.tolist() == expected
    assert found.kind == "box" and found.rows().dtype == np.int32 and not found.saw_labels
    said = found.provenance
    assert (said["method"], said["image"], said["short"]) == ("LOST", [64, 64], 96)
    assert said["net"].startswith("test_vit") and said["random_seed"] == 0
    areas = [(b[2] - b[0]) * (b[3] - b[1]) / 64**2 for b in found.rows().tolist()]
    assert facts["mean_area"] == pytest.approx(np.mean(areas))
    assert facts["whole"] == pytest.approx(np.mean(np.array(areas) == 1))
    with Image.open(tmp_path / "boxes" / "box.png") as sheet:
        assert sheet.width > 8 * 96 and (np.asarray(sheet) == (255, 0, 0)).all(2).any()
    assert [p.name for p in tmp_path.iterdir()] == ["boxes"]  # nothing hidden stays


def test_weights_that_saw_labels_are_said_to_have(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(capsys, "lost", pictures, *NET, "--saw-labels", "yes", "--out", tmp_path / "boxes")
    assert sidecar.read(tmp_path / "boxes").saw_labels


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer points and pairs."""
    preset = replace(stego.PRESETS["cocostuff27"], points=4, randoms=1)
    monkeypatch.setitem(stego.PRESETS, "cocostuff27", preset)


@pytest.mark.usefixtures("quick")
def test_masks_by_stego_are_published_with_all_that_made_them(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*NET, "--groups", 3, "--epochs", 2, "--crop", 32, "--short", 64]
    facts = report(capsys, "stego", pictures, *words, "--out", tmp_path / "masks")
    found = sidecar.read(tmp_path / "masks")
    assert (found.kind, found.groups, found.shape) == ("mask", 3, (64, 64))
    assert found.provenance["method"] == facts["method"] == "STEGO"
    assert found.provenance["shifts"] == {"own": 0.08, "knn": 0.02, "random": 0.66}
    assert set(found.attached) == {"mask.png", stego.LEARNED}
    shares = np.bincount(found.rows().ravel(), minlength=3) / found.rows().size
    assert facts["largest"] == pytest.approx(shares.max())
    assert facts["used"] == pytest.approx((shares > 0).mean())
    # nothing kept on disk: the same path without fp16 in between
    live = report(capsys, "stego", pictures, *words, "--live", "--out", tmp_path / "live")
    assert live["knn_cosine"] == pytest.approx(facts["knn_cosine"], abs=0.05)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["live", "masks"]


def test_masks_by_published_heads_are_made_without_a_fit(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vit, clusters = load_vit("test_vit", "random:0"), torch.randn(5, 70)
    file = written(tmp_path / "some.ckpt", vit.net, Code(64), clusters)
    words = ["stego", pictures, *NET, "--heads", file, "--short", "32", "--out", tmp_path / "m"]
    facts = report(capsys, *words)
    found = sidecar.read(tmp_path / "m")
    assert (facts["method"], found.groups, found.kind) == ("STEGO", 5, "mask")
    record = found.provenance
    assert record["heads"] == "some.ckpt" and record["heads_sha256"] == storage.sha256(str(file))
    assert not {"steps", "shifts", "crop"} & record.keys()
    net = read_heads(file, vit.net, "test_vit")
    images = torch.from_numpy(stored(pictures)[:4])
    seen = resize(images, [32, 32], InterpolationMode.NEAREST_EXACT)
    masks = net.masks(vit.patches(seen), tuple(images.shape[-2:]), vit.patches(seen.flip(3)))
    np.testing.assert_array_equal(found.rows()[:4], masks.numpy())


def test_the_stand_in_finds_plain_colours_and_is_called_by_its_name(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*NET, "--method", "kmeans", "--groups", 3, "--short", 128]
    assert main(["stego", str(pictures), *map(str, words), "--out", str(tmp_path / "m")]) == 0
    said = capsys.readouterr().out
    assert "not STEGO" in said and "12 of 12 images" in said
    found = sidecar.read(tmp_path / "m")
    assert "not STEGO" in found.provenance["method"]
    x, masks = picture_data()
    order = [int(np.argmin([np.abs(a.astype(int) - b).sum() for b in x])) for a in stored(pictures)]
    assert mean_iou(torch.tensor(found.rows()).long(), masks[order], 3) >= 0.75


def killed_after(steps: int, monkeypatch: pytest.MonkeyPatch, doing: str) -> None:
    """The command's own progress ends it, once, in the middle of what it does."""
    track = cli.track

    def dying(items: Any, total: int, what: str) -> Any:
        for i, item in enumerate(track(items, total, what)):
            if what == doing and i == steps:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(cli, "track", dying)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("doing", "steps"), [("features of crops", 1), ("STEGO", 5), ("masks", 1)])
def test_a_killed_command_goes_on_to_the_same_masks(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doing: str, steps: int
) -> None:
    monkeypatch.setattr(stego, "SAVED", 2)
    words = ["stego", str(pictures), *NET, "--groups", "3", "--epochs", "8", "--crop", "32"]
    words += ["--step-crops", "60"]
    words += ["--short", "64", "--out"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        killed_after(steps, once, doing)
        main([*words, str(tmp_path / "parts")])
    assert not (tmp_path / "parts" / "MANIFEST.json").exists()
    learned: list[int] = []
    learn = stego.Fit._learn
    monkeypatch.setattr(
        stego.Fit, "_learn", lambda fit, c: learned.append(fit.step) or learn(fit, c)
    )
    assert main([*words, str(tmp_path / "parts")]) == 0
    assert learned == {"STEGO": [4, 5, 6, 7], "masks": []}.get(doing, list(range(8)))
    whole, parts = (sidecar.read(tmp_path / name) for name in ("whole", "parts"))
    assert np.array_equal(whole.rows(), parts.rows())
    assert whole.sha256 == parts.sha256


def test_rows_that_are_filled_are_not_made_again(tmp_path: Path) -> None:
    asked: list[int] = []

    def make(ordinals: np.ndarray) -> Tensor:
        if len(asked) >= 6:
            raise KeyboardInterrupt
        asked.extend(ordinals.tolist())
        return torch.from_numpy(ordinals)[:, None] ** 2

    def fill() -> np.ndarray:
        work = Work(tmp_path / "out", "0" * 64, {"what": "squares"})
        rows = layouts.fill(work, "rows", 10, make, np.int32, batch=3, doing="squares")
        return np.concatenate(list(rows))

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert asked == list(range(6))
    asked.clear()
    assert fill()[:, 0].tolist() == [i**2 for i in range(10)]
    assert asked == list(range(6, 10))


def test_latents_are_decoded_before_a_net_sees_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codec = load_autoencoder("tiny")
    edge = 8 * codec.factor
    images = torch.randint(0, 256, (6, 1, edge, edge), generator=torch.Generator().manual_seed(0))
    moments = codec.encode(images.byte()).numpy()
    writer.write(tmp_path / "latents", ArraySource.of("l", moments), header=codec.header(), seed=0)
    report(capsys, "lost", tmp_path / "latents", *NET, "--short", 64, "--out", tmp_path / "boxes")
    found = sidecar.read(tmp_path / "boxes")
    assert found.provenance["decoder"] == "tiny" and found.provenance["image"] == [edge, edge]
    assert int(found.rows().max()) <= edge and int(found.rows().max()) > 8


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["lost", "--k-patches", "0"], ("--k-patches 0", "1 or more")),
        (["lost", "--short", "0"], ("--short 0", "1 or more")),
        (["lost", "--batch", "0"], ("--batch 0", "1 or more")),
        (["stego", "--groups", "1"], ("--groups 1", "2 or more")),
        (["stego", "--method", "kmeans", "--live"], ("--live", "leave it out")),
        (["stego", "--method", "kmeans", "--step-crops", "8"], ("--step-crops", "leave it out")),
        (["stego", "--epochs", "2", "--steps", "9"], ("--epochs with --steps",)),
        (["stego", "--heads", "h.ckpt", "--groups", "9"], ("--groups", "fitted already")),
        (["stego", "--heads", "h.ckpt", "--method", "kmeans"], ("--heads", "leave it out")),
        (["stego", "--heads", "gone.ckpt"], ("heads=gone.ckpt", "no such file")),
        (["stego", "--steps", "0"], ("--steps 0", "1 or more")),
        (
            ["stego", "--method", "kmeans", "--groups", "9999", "--short", "16"],
            ("groups=9999", "12"),
        ),
    ],
)
def test_what_cannot_be_is_refused(
    pictures: Path, tmp_path: Path, words: list[str], parts: tuple[str, ...]
) -> None:
    verb, *flags = words
    with pytest.raises(UserError) as raised:
        main([verb, str(pictures), *NET, "--out", str(tmp_path / "out"), *flags])
    for part in parts:
        assert part in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_named(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = load_vit("test_vit", "random:0")
    vit.net.blocks[-1].attn.qkv.bias.data.fill_(torch.nan)
    monkeypatch.setattr(features, "load_vit", lambda *_, **__: vit)
    for verb in ("lost", "stego"):
        with pytest.raises(UserError, match="NaN or infinite"):
            main([verb, str(pictures), *NET, "--out", str(tmp_path / verb)])


DINO = ["--vit", "vit_small_patch16_224.dino", "--weights", "random:0", "--batch", "4"]


def begin_and_go_on(
    old: list[str], new: list[str], doing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[sidecar.Sidecar, sidecar.Sidecar]:
    """What a command under `old` flags makes, and what one under `new` flags makes of its half."""
    assert main([*old, "--out", str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as once, pytest.raises(KeyboardInterrupt):
        killed_after(1, once, doing)
        main([*old, "--out", str(tmp_path / "parts")])
    assert main([*new, "--out", str(tmp_path / "parts")]) == 0
    return sidecar.read(tmp_path / "whole"), sidecar.read(tmp_path / "parts")


def test_boxes_begun_with_other_positions_are_ended_with_them_and_say_so(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["lost", str(pictures), *DINO, "--device", "cpu"]
    old = [*words, "--positions", "timm"]
    whole, parts = begin_and_go_on(old, words, "boxes", tmp_path, monkeypatch)
    assert "positions=dino" in capsys.readouterr().err
    assert "positions" not in whole.provenance and whole.provenance == parts.provenance
    assert whole.sha256 == parts.sha256
    # nothing half made is there: DINO's
    assert main([*words, "--out", str(tmp_path / "new")]) == 0
    assert sidecar.read(tmp_path / "new").provenance["positions"] == "dino"
    assert not capsys.readouterr().err


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("doing", ["features of crops", "STEGO"])
def test_masks_begun_before_the_corrections_are_ended_as_they_were_begun(
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    doing: str,
) -> None:
    words = ["stego", str(pictures), *NET, "--groups", "3", "--epochs", "3", "--crop", "32"]
    words += ["--short", "64"]
    before = ["--step-crops", "64", "--dropouts", "one", "--resize", "smooth", "--no-mirror"]
    whole, parts = begin_and_go_on([*words, *before], words, doing, tmp_path, monkeypatch)
    assert "batch=16" in capsys.readouterr().err
    assert not {"dropouts", "resize", "mirror", "steps"} & whole.provenance.keys()
    assert (whole.provenance["batch"], whole.provenance["epochs"]) == (64, 3)
    assert whole.sha256 == parts.sha256
    # what the user chooses is not taken for another's: the half under other steps stays where it is
    assert main([*words, "--step-crops", "64", "--out", str(tmp_path / "chosen")]) == 0
    assert sidecar.read(tmp_path / "chosen").provenance["dropouts"] == "each"
