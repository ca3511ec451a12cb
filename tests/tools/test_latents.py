"""What the commands do with latents that `encode` wrote: show them, encode them again, take over annotations."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import shards
from selfguide.data.autoencoders import load_autoencoder
from shards import sidecar
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.sources.source import ArraySource
from shards.write import writer
from tests.tools.latents import OWN, encode, images_of, levels, other_weights
from tools import digit_vae
from tools.annotate import adopt as adopting
from tools.shards import __main__ as command


@pytest.fixture(scope="module")
def latents(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Moments of the digits, written by one process."""
    out = tmp_path_factory.mktemp("latents")
    encode(digits, out)
    return out


# --- annotations ---------------------------------------------------------------------------------


def test_groups_found_in_images_are_the_latents_groups(
    digits: Path, latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = manifests.load(digits)
    (tmp_path / "of-images").mkdir()
    (tmp_path / "of-images" / "note.txt").write_text("attached")
    ids = np.random.default_rng(0).integers(0, 10, 1797).astype(np.int32)
    report = {"kind": "id", "groups": 10, "provenance": {"saw_labels": False, "seed": 3}}
    sidecar.write(
        tmp_path / "of-images", ids, manifest=images.hash, confidence=ids / 10,
        attached=["note.txt"], **report,
    )  # fmt: skip

    def adopt(root: Path, out: str, note: str = "of-images") -> int:
        report = {"root": str(root), "annotation": str(tmp_path / note), "out": str(tmp_path / out)}
        report["by_key"] = None
        return adopting.run(argparse.Namespace(**report))[0]["count"]

    assert adopt(latents, "of-latents") == 1797
    found = sidecar.read(tmp_path / "of-latents", manifest=manifests.load(latents).hash)
    assert np.array_equal(found.rows(), ids) and np.array_equal(
        found.column("confidence"), ids / 10
    )
    assert found.file("note.txt").read_text() == "attached" and not found.saw_labels
    assert found.provenance["seed"] == 3 and found.provenance["adopted_from"] == images.hash
    for root, note, message in (
        (digits, "of-images", "does not say which images it was encoded from"),
        (latents, "of-latents", "was encoded from"),
    ):
        with pytest.raises(UserError, match=message):
            adopt(root, "no", note)
        assert not (tmp_path / "no").exists()
    with pytest.raises(UserError, match="is taken already"):
        adopt(latents, "of-latents")


# --- looked at -----------------------------------------------------------------------------------


def shown(png: Path, tile: int) -> np.ndarray:
    """Pictures 8 x 8 side by side, magnified to `tile` pixels each, as (n, 8, 8)."""
    pixels = np.asarray(Image.open(png))
    zoom = tile // 8
    count = round((pixels.shape[1] // zoom + 1) / 9)
    return np.stack([pixels[:tile:zoom, 9 * i * zoom :: zoom][:, :8] for i in range(count)])


def test_a_latent_is_shown_as_its_image(digits: Path, latents: Path, tmp_path: Path) -> None:
    png, codec = tmp_path / "a.png", load_autoencoder("tiny")
    key = shards.read_all(latents)["key"][7]
    assert command.main(["inspect", str(latents), key, "--decode", "--png", str(png)]) == 0
    image = levels(digits)[7:8]
    expected = codec.decode(codec.encode(image)[:, :2])[0, 0].numpy().astype(int)
    (found,) = shown(png, 256)
    assert np.abs(found - expected).max() <= 2  # float16's rounding

    encode(digits, tmp_path / "flips", "--flips")
    words = ["inspect", str(tmp_path / "flips"), "position:3", "--png", str(png)]
    assert command.main([*words, "--weights", str(OWN), "--seed", "5"]) == 0
    found = shown(png, 120)  # the image and its mirror image
    assert (
        len(found) == 2
        and digit_vae.psnr(*(torch.tensor(f) for f in (found[0], found[1][:, ::-1].copy()))) > 20
    )

    words = ["explain", str(latents), "--images", "9", "--batch", "9", "--decode"]
    assert command.main([*words, "--png", str(png)]) == 0
    assert Image.open(png).size == (26 * 10, 26 * 10)


def test_what_cannot_be_decoded_is_named(digits: Path, latents: Path, tmp_path: Path) -> None:
    png, other = str(tmp_path / "a.png"), tmp_path / "other.safetensors"
    other_weights(other)
    for root, more, message in (
        (digits, ["--decode"], "these shards hold images"),
        (latents, ["--weights", str(other)], "give the weights of tiny that made the data"),
    ):
        with pytest.raises(UserError, match=message):
            command.main(["inspect", str(root), "ordinal:1", "--png", png, *more])
    assert not Path(png).exists()


# --- encoded again ---------------------------------------------------------------------------------


def verified(
    capsys: pytest.CaptureFixture[str], root: Path, source: Path, *more: str
) -> tuple[int, dict]:
    capsys.readouterr()
    words = ["verify", str(root), "--reencode", "200", "--source", str(source), "--json", *more]
    code = command.main(words)
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("more", [(), ("--flips",), ("--content", "sample", "--seed", "3")])
def test_latents_encoded_again_are_those_that_are_stored(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    encode(digits, tmp_path, *more)
    code, report = verified(capsys, tmp_path, digits)
    assert code == 0 and report["well"] and report["reencoded"]["samples"] == 200
    assert report["reencoded"]["worst"] < 2e-3  # float16, and images meet in other batches


def test_one_other_latent_among_many_is_named(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes that hold, of the wrong image: as after a mistake of whoever wrote them."""
    encode(digits, tmp_path / "good")
    good = manifests.load(tmp_path / "good")
    found = shards.read_all(tmp_path / "good")
    found["x"][[7, 8]] = found["x"][[8, 7]]
    wrong = ArraySource.of(
        "wrong", found["x"], labels=found["y"], classes=10, keys=found["key"].tolist()
    )
    notes = {n: v for n, v in good.source.items() if n not in ("name", "count", "fingerprint")}
    report = {"notes": notes, "shuffle": False}
    writer.write(tmp_path / "wrong", wrong, header=Header.of(good.header), **report)
    code, said = verified(capsys, tmp_path / "wrong", digits, "--reencode", "1797")
    assert code == 1 and not said["well"] and said["problems"] == []
    assert said["reencoded"]["worst"] > 0.1 > said["reencoded"]["mean"]
    assert said["reencoded"]["worst_key"] in found["key"][[7, 8]].tolist()


def test_what_cannot_be_encoded_again_is_named(digits: Path, latents: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    other_weights(other)
    images_of(tmp_path / "in", (1, 8, 8))
    for root, more, message in (
        (latents, ["--reencode", "5"], "without --source"),
        (latents, ["--source", str(digits)], "say how many samples"),
        (latents, ["--reencode", "0", "--source", str(digits)], "give at least 1 sample"),
        (latents, ["--reencode", "5", "--source", str(tmp_path / "in")], "of images with manifest"),
        (
            latents,
            ["--reencode", "5", "--source", str(digits), "--weights", str(other)],
            "by weights",
        ),
        (digits, ["--reencode", "5", "--source", str(digits)], "does not say how it was encoded"),
    ):
        with pytest.raises(UserError, match=message):
            command.main(["verify", str(root), *more])
