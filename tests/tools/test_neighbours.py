"""tools.neighbours: the nearest real images of each sample, against a search by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from shards import storage
from shards.errors import UserError
from shards.format.header import PIXELS
from shards.sources.source import ArraySource
from shards.write import writer
from tools import neighbours
from tools.neighbours import Space, nearest

NET = "test_resnet.r160_in1k"


@pytest.fixture(scope="module")
def reals() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8)).astype(np.uint8)


@pytest.fixture(scope="module")
def shards(reals: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("data") / "colours"
    writer.write(root, ArraySource.of("colours", reals), header=PIXELS)
    return str(root)


def stored(shards: str, count: int) -> np.ndarray:
    """The real images by ordinal, which is another order than the source's."""
    from shards import read_all

    return read_all(shards)["x"][:count]


def samples(folder: Path, images: np.ndarray) -> str:
    """Samples (N, C, H, W) as a .npz of ADM's layout."""
    file = folder / "samples.npz"
    np.savez(file, arr_0=np.moveaxis(images, 1, -1))
    return str(file)


def distance(x: torch.Tensor, y: torch.Tensor, angles: bool) -> float:
    """By hand: of unit vectors 1 - cosine is half of the squared distance."""
    square = float(((x - y) ** 2).sum())
    return square / 2 if angles else square**0.5


def asked(tmp_path: Path, *words: str) -> list[dict]:
    out = tmp_path / "near.png"
    assert neighbours.main([*words, "--out", str(out), "--json"]) == 0
    assert Image.open(out).width > 100
    return json.loads(out.with_suffix(".json").read_text())["rows"]


def test_a_search_in_parts_of_any_size_is_the_search_over_all() -> None:
    made = torch.Generator().manual_seed(0)
    queries, others = (torch.randn(n, 5, generator=made) for n in (7, 50))
    for angles in (False, True):
        space = Space("", lambda images: images, angles)
        a, b = space.vectors(queries), space.vectors(others)
        whole = torch.tensor([[distance(x, y, angles) for y in b] for x in a], dtype=torch.float64)
        wanted = whole.argsort(dim=1, stable=True)[:, :4]
        for part in (1, 13, 50):
            parts = zip(torch.arange(50).split(part), b.split(part), strict=True)
            found = nearest(space, a, parts, 4)
            assert torch.equal(found.ordinals, wanted)
            torch.testing.assert_close(found.distances, whole.gather(1, wanted))


def test_of_equals_the_first_is_nearest_in_parts_of_any_size() -> None:
    space = Space("", lambda images: images, False)
    for part in (1, 2, 6):
        parts = zip(torch.arange(6).split(part), torch.ones(6, 3).split(part), strict=True)
        assert nearest(space, torch.zeros(1, 3), parts, 3).ordinals.tolist() == [[0, 1, 2]]


def test_a_copy_is_nearest_at_distance_zero_and_others_follow_by_distance(
    shards: str, tmp_path: Path
) -> None:
    known = stored(shards, 40)
    made = samples(tmp_path, known[[17, 3]])
    rows = asked(tmp_path, made, shards, "--near", "5", "--batch", "7")
    flat = known.reshape(40, -1).astype(np.float64) / 255
    for row, ordinal in zip(rows, (17, 3), strict=True):
        by_hand = np.linalg.norm(flat - flat[ordinal], axis=1)
        assert row["ordinals"] == np.argsort(by_hand, kind="stable")[:5].tolist()
        assert row["ordinals"][0] == ordinal and row["distances"][0] < 1e-3
        np.testing.assert_allclose(row["distances"][1:], np.sort(by_hand)[1:5], rtol=1e-4)


def test_the_closest_samples_are_those_nearest_to_a_real_one(shards: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (6, 3, 8, 8)).astype(np.uint8)
    noise[4] = stored(shards, 40)[9]
    made = samples(tmp_path, noise)
    (row,) = asked(tmp_path, made, shards, "--closest", "--count", "1")
    assert (row["sample"], row["ordinals"][0]) == (4, 9)


def test_in_the_features_of_a_net_a_copy_is_nearest_and_sizes_may_differ(
    shards: str, tmp_path: Path
) -> None:
    weights = tmp_path / "net.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model(NET).state_dict(), weights)
    named = ["--protocol", "fd_timm", "--net", NET, "--weights", str(weights)]
    named += ["--sha256", storage.sha256(str(weights)), "--device", "cpu"]
    known = stored(shards, 40)
    made = samples(tmp_path, known[[5]])
    (row,) = asked(tmp_path, made, shards, *named, "--near", "3")
    assert row["ordinals"][0] == 5 and abs(row["distances"][0]) < 1e-5
    larger = samples(tmp_path, known[[5]].repeat(2, 2).repeat(2, 3))
    assert len(asked(tmp_path, larger, shards, *named)[0]["ordinals"]) == 8
    with pytest.raises(UserError, match="one size"):
        neighbours.main([larger, shards])


@pytest.mark.parametrize(
    "words", [("--near", "41"), ("--near", "0"), ("--net", NET), ("--count", "0")]
)
def test_what_cannot_be_shown_is_refused(
    words: tuple[str, ...], shards: str, tmp_path: Path
) -> None:
    made = samples(tmp_path, stored(shards, 2))
    with pytest.raises(UserError):
        neighbours.main([made, shards, *words])
    with pytest.raises(UserError):
        neighbours.main([str(tmp_path / "none.npz"), shards])
