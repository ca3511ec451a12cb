"""tools.reference and tools.score: a reference of shards, and samples of anybody against it."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from selfguide.evaluation.features.net import FeatureNet
from selfguide.spec.weight_files import FOLDER, WEIGHT_FILES
from shards import storage
from shards.errors import UserError
from shards.format.header import PIXELS
from shards.sources.source import ArraySource
from shards.write import writer
from tests.selfguide import hub_cache
from tools import score, score_run
from tools.reference import __main__ as reference
from tools.reference import fetch
from tools.reference.make import net_of
from tools.sample_files import open_images

NET = "test_resnet.r160_in1k"


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a small net with random weights."""
    file = tmp_path_factory.mktemp("net") / "net.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model(NET).state_dict(), file)
    named = ["--net", NET, "--weights", str(file), "--sha256", storage.sha256(str(file))]
    return ["--protocol", "fd_timm", *named, "--batch", "20"]


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def data(pictures: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("data") / "colours"
    source = ArraySource.of("colours", np.moveaxis(pictures, -1, 1).copy())
    writer.write(root, source, header=PIXELS)
    return str(root)


@pytest.fixture(scope="module")
def made(data: str, net: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "colours.npz"
    assert reference.main(["make", data, *net, "--out", str(out)]) == 0
    return out


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands keep what they make where they are called."""
    monkeypatch.chdir(tmp_path)


def scores(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    assert score.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["scores"]


def test_make_writes_one_file_that_others_read_and_leaves_nothing_else(made: Path) -> None:
    with np.load(made) as file:
        assert file["mu"].shape == (file["sigma"].shape[0],)
        assert int(file["count"]) == 60
    assert [p.name for p in made.parent.iterdir()] == [made.name]


def test_make_on_two_ranks_is_the_reference_of_one(
    made: Path, data: str, net: list[str], tmp_path: Path
) -> None:
    words = ["make", data, *net, "--out", str(tmp_path / "two.npz"), "--world", "2"]
    assert reference.main([*words, "--rank", "1"]) == 0
    assert reference.main([*words, "--rank", "0"]) == 0
    with np.load(made) as one, np.load(tmp_path / "two.npz") as two:
        for name in ("mu", "sigma", "sqrt"):
            assert np.array_equal(one[name], two[name])


def test_score_of_the_real_images_themselves_is_nearly_nothing(
    made: Path,
    net: list[str],
    pictures: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    np.savez(tmp_path / "same.npz", pictures)
    np.savez(tmp_path / "dark.npz", pictures // 4)
    same = scores([str(tmp_path / "same.npz"), *net, "--reference", str(made)], capsys)
    dark = scores([str(tmp_path / "dark.npz"), *net, "--reference", str(made)], capsys)
    assert abs(same["fd_timm"]) < 1e-6
    assert dark["fd_timm"] > same["floor"] > 0


def test_score_of_a_folder_is_that_of_its_npz_and_of_the_shards(
    made: Path,
    data: str,
    net: list[str],
    pictures: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    for i, levels in enumerate(pictures // 2):
        Image.fromarray(levels).save(folder / f"{i:03d}.png")
    np.savez(tmp_path / "samples.npz", pictures // 2)
    by_folder = scores([str(folder), *net, "--reference", str(made)], capsys)
    assert scores(["samples.npz", *net, "--reference", str(made)], capsys) == by_folder
    assert scores(["samples.npz", *net, "--shards", data], capsys) == by_folder


@pytest.mark.parametrize(
    ("levels", "why"),
    [
        (np.zeros((30, 8, 8, 3), np.float32) * np.nan, "NaN"),
        (np.zeros((30, 3, 8, 8), np.uint8), "uint8"),
        (np.zeros((1, 8, 8, 3), np.uint8), "too few"),
        (np.zeros((30, 0, 8, 3), np.uint8), "uint8"),
    ],
)
def test_score_of_what_are_no_samples_is_refused(
    made: Path, net: list[str], tmp_path: Path, levels: np.ndarray, why: str
) -> None:
    np.savez(tmp_path / "bad.npz", levels)
    with pytest.raises(UserError, match=why):
        score.main([str(tmp_path / "bad.npz"), *net, "--reference", str(made)])


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "npy"])
def test_score_of_a_damaged_file_names_it(
    made: Path, net: list[str], pictures: np.ndarray, tmp_path: Path, damage: str
) -> None:
    file = tmp_path / "samples.npz"
    np.savez(file, pictures)
    whole = file.read_bytes()
    if damage == "npy":
        with file.open("wb") as out:
            np.save(out, pictures)
    else:
        changed = whole[:2000] + bytes(1000) + whole[3000:]
        file.write_bytes({"cut": whole[:2000], "changed": changed, "empty": b""}[damage])
    with pytest.raises(UserError, match=file.name):
        score.main([str(file), *net, "--reference", str(made)])


def test_score_of_more_than_8_bits_is_refused(made: Path, net: list[str], tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 2**16, (8, 8)).astype(np.uint16)
    for i in range(20):
        Image.fromarray(deep).save(tmp_path / f"{i}.png")
    with pytest.raises(UserError, match="8 bits"):
        score.main([str(tmp_path), *net, "--reference", str(made)])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--device", "banana"], "banana"),
        (["--protocol", "fd_effnet"], "fd_timm"),
        (["--shards", "data"], "--reference"),
        (["--reference", "nowhere.npz"], "nowhere.npz"),
    ],
)
def test_score_by_flags_that_do_not_fit_names_them(
    made: Path, net: list[str], pictures: np.ndarray, words: list[str], named: str
) -> None:
    np.savez("samples.npz", pictures)
    with pytest.raises(UserError, match=named):
        score.main(["samples.npz", *net, "--reference", str(made), *words])


def test_score_finds_a_reference_in_the_folder_where_it_is_called(
    made: Path,
    net: list[str],
    pictures: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    np.savez("samples.npz", pictures)
    (tmp_path / "here.npz").write_bytes(made.read_bytes())
    assert scores(["samples.npz", *net, "--reference", "here.npz"], capsys)["floor"] > 0


def test_score_that_was_killed_goes_on_from_its_parts(
    made: Path,
    net: list[str],
    pictures: np.ndarray,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    np.savez("samples.npz", pictures)
    words = ["samples.npz", *net, "--reference", str(made)]
    wanted = scores(words, capsys)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(score_run, "scores_of", killed)
        with pytest.raises(KeyboardInterrupt):
            score.main(words)
    # no part is missing
    monkeypatch.setattr(FeatureNet, "rows", killed)
    assert scores(words, capsys) == wanted
    assert not list(score_run.PARTS.iterdir())


def test_score_that_cannot_be_taken_by_these_settings_is_taken_by_others_from_the_same_parts(
    made: Path,
    net: list[str],
    pictures: np.ndarray,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    np.savez("samples.npz", pictures)
    words = ["samples.npz", *net, "--reference", str(made)]
    # what is known to be too much is refused before images are read
    asked = ["--metrics", "kid", "--setting", "kid_size=61"]
    with pytest.raises(UserError, match="kid_size=60"):
        score.main([*words, *asked])
    assert not score_run.PARTS.exists()

    def refused(*_: object, **__: object) -> None:
        raise UserError("evaluation.metrics: kid cannot be taken")

    with monkeypatch.context() as patch:
        patch.setattr(score_run, "scores_of", refused)
        with pytest.raises(UserError, match="--metrics: kid cannot be taken"):
            score.main(words)
    # no part is missing
    monkeypatch.setattr(FeatureNet, "rows", refused)
    assert scores(words, capsys)["floor"] > 0
    assert not list(score_run.PARTS.iterdir())


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"about": "[1]"}, "about"),
        ({"mu": np.array(["a"])}, "mu"),
        ({"features": np.zeros((5, 3))}, "features"),
    ],
)
def test_score_against_what_is_no_reference_names_what_is_wrong(
    made: Path,
    net: list[str],
    pictures: np.ndarray,
    tmp_path: Path,
    changed: dict[str, Any],
    named: str,
) -> None:
    np.savez("samples.npz", pictures)
    with np.load(made) as file:
        np.savez("changed.npz", **{**file, **changed})
    with pytest.raises(UserError, match=f"no reference.*{named}"):
        score.main(["samples.npz", *net, "--reference", "changed.npz"])


def test_make_never_writes_over_samples(
    data: str, net: list[str], pictures: np.ndarray, tmp_path: Path
) -> None:
    np.savez(tmp_path / "samples.npz", pictures)
    before = (tmp_path / "samples.npz").read_bytes()
    for verb in (["make", data], ["samples", "samples.npz"]):
        with pytest.raises(UserError, match="is there, and is no reference"):
            reference.main([*verb, *net, "--out", "samples.npz"])
    assert (tmp_path / "samples.npz").read_bytes() == before


def test_score_without_anything_to_compare_with_says_what_to_give(
    net: list[str], pictures: np.ndarray, tmp_path: Path
) -> None:
    np.savez(tmp_path / "samples.npz", pictures)
    with pytest.raises(UserError, match="give --reference FILE or --shards ROOT"):
        score.main(["samples.npz", *net])
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"notes\.txt is no \.npz file: write it with"):
        score.main(["notes.txt", *net, "--shards", "data"])


@pytest.mark.parametrize("count", ["0", "3"])
def test_make_of_too_few_images_leaves_nothing(
    data: str, net: list[str], tmp_path: Path, count: str
) -> None:
    with pytest.raises(UserError, match=count):
        reference.main(["make", data, *net, "--out", "few.npz", "--count", count])
    assert not list(tmp_path.iterdir())


def test_score_of_a_folder_reads_what_links_lead_to_and_names_of_any_alphabet(
    made: Path,
    net: list[str],
    pictures: np.ndarray,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, elsewhere = tmp_path / "Bilder ß 😀", tmp_path / "elsewhere"
    for place, part in ((folder / "a", pictures[:30]), (elsewhere, pictures[30:])):
        place.mkdir(parents=True)
        for i, levels in enumerate(part):
            Image.fromarray(levels).save(place / f"é{i:03d}.png")
    (folder / "b").symlink_to(elsewhere)
    # what machines leave beside images is none
    (folder / "a" / "._é000.png").write_bytes(b"of a Macintosh")
    (folder / "notes.txt").write_text("x")
    np.savez("samples.npz", pictures)
    wanted = scores(["samples.npz", *net, "--reference", str(made)], capsys)
    assert scores([str(folder), *net, "--reference", str(made)], capsys) == wanted


def lossless_webp(folder: Path, pictures: np.ndarray) -> None:
    for i, levels in enumerate(pictures[:30]):
        Image.fromarray(levels).save(folder / f"{i:02d}.webp", lossless=True, exact=True)


def opaque(folder: Path, pictures: np.ndarray) -> None:
    for i, levels in enumerate(pictures[:30]):
        Image.fromarray(levels).convert("RGBA").save(folder / f"{i:02d}.png")


def without_suffix(folder: Path, pictures: np.ndarray) -> None:
    for i, levels in enumerate(pictures[:30]):
        Image.fromarray(levels).save(folder / f"{i:02d}", format="PNG")


@pytest.mark.parametrize("written", [lossless_webp, opaque, without_suffix])
def test_images_are_read_by_what_they_are(
    pictures: np.ndarray, tmp_path: Path, written: Callable[[Path, np.ndarray], None]
) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    written(folder, pictures)
    found = open_images(folder).at(np.arange(30))
    assert np.array_equal(found.numpy(), np.moveaxis(pictures[:30], -1, 1))


def a_jpeg(file: Path, levels: np.ndarray) -> None:
    Image.fromarray(levels).save(file, format="JPEG", quality=95)


def a_lossy_webp(file: Path, levels: np.ndarray) -> None:
    Image.fromarray(levels).save(file.with_suffix(".webp"), quality=90)


def a_lossy_tiff(file: Path, levels: np.ndarray) -> None:
    Image.fromarray(levels).save(file.with_suffix(".tif"), compression="jpeg")


def a_gif(file: Path, levels: np.ndarray) -> None:
    Image.fromarray(levels).save(file.with_suffix(".gif"))


def seen_through(file: Path, levels: np.ndarray) -> None:
    alpha = np.full((*levels.shape[:2], 1), 128, np.uint8)
    Image.fromarray(np.concatenate([levels, alpha], 2)).save(file)


def of_two_frames(file: Path, levels: np.ndarray) -> None:
    frames = [Image.fromarray(x) for x in (levels, levels // 2)]
    frames[0].save(file.with_suffix(".tif"), save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("written", "why"),
    [
        (a_jpeg, "JPEG.*lossless"),
        (a_lossy_webp, "WEBP.*lossless"),
        (a_lossy_tiff, "TIFF.*lossless"),
        (a_gif, "GIF.*lossless"),
        (seen_through, "is transparent"),
        (of_two_frames, "is animated"),
    ],
)
def test_score_of_an_image_that_is_not_as_it_was_drawn_names_it(
    made: Path,
    net: list[str],
    pictures: np.ndarray,
    tmp_path: Path,
    written: Callable[[Path, np.ndarray], None],
    why: str,
) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    for i, levels in enumerate(pictures[:30]):
        Image.fromarray(levels).save(folder / f"{i:02d}.png")
    written(folder / "odd.png", pictures[30])
    with pytest.raises(UserError, match=r"odd\..* is .*") as error:
        score.main([str(folder), *net, "--reference", str(made)])
    assert re.search(why, str(error.value))


def test_score_of_jpegs_is_refused(made: Path, net: list[str], tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="lossless"):
        score.main([str(tmp_path), *net, "--reference", str(made)])


def test_fetch_of_a_file_with_another_sha256_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / "wrong.pth"
    wrong.write_bytes(b"no weights")
    monkeypatch.setenv(FOLDER, str(tmp_path / "weights"))
    with pytest.raises(UserError, match=WEIGHT_FILES["inception"].sha256):
        reference.main(["fetch", "inception", "--url", wrong.as_uri()])
    assert not list((tmp_path / "weights").iterdir())


def test_fetch_of_a_reference_says_its_sha256(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there.npz"
    there.write_bytes(b"statistics")
    name = "VIRTUAL_imagenet256_labeled.npz"
    words = ["fetch", name, "--url", there.as_uri(), "--out", str(tmp_path), "--json"]
    assert reference.main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"file": str(tmp_path / name), "sha256": storage.sha256(str(there))}


def test_fetch_of_a_net_of_timm_says_how_it_is_pinned_and_is_then_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub_cache.use(tmp_path, monkeypatch)
    there = tmp_path / "model.safetensors"
    sha256 = hub_cache.save(there)
    words = ["fetch", NET, "--url", there.as_uri()]
    with pytest.raises(UserError, match="0" * 64):
        reference.main([*words, "--sha256", "0" * 64])
    assert reference.main(words) == 0
    told = capsys.readouterr().out
    assert f"evaluation=fd_timm evaluation.net={NET} evaluation.sha256={sha256}" in told
    options = argparse.Namespace(
        protocol="fd_timm", net=NET, weights=None, sha256=None, device="cpu"
    )
    assert net_of(options).sha256 == sha256


def test_fetch_of_a_misspelt_name_suggests_one() -> None:
    assert "effnet" not in fetch.KNOWN
    with pytest.raises(UserError, match="inception"):
        reference.main(["fetch", "inceptoin"])


def test_score_of_a_folder_with_a_damaged_image_names_it_and_leaves_nothing(
    made: Path, net: list[str], pictures: np.ndarray, tmp_path: Path
) -> None:
    for i, levels in enumerate(pictures[:30]):
        Image.fromarray(levels).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "29.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"29\.png"):
        score.main([str(tmp_path), *net, "--reference", str(made)])
    assert not list(score_run.PARTS.iterdir())
