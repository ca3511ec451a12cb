"""Tars of others on a real store: listed, read once, indexed where they lie, and read by ranges."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from shards import storage
from shards.errors import DamagedError, UserError
from shards.format import manifest as manifests
from shards.read.cache import Cache
from shards.read.options import ReadOptions
from shards.read.reader import Reader
from shards.verify import verify
from tests.shards import foreign
from tools.shards.__main__ import main

pytestmark = pytest.mark.timeout(120)
COUNT = 300


@pytest.fixture
def images(root: str, tmp_path: Path) -> np.ndarray:
    """Three tars at `root`; the pictures in them."""
    found = foreign.laion(tmp_path / "in", COUNT)
    for path in sorted((tmp_path / "in").glob("*.tar")):
        storage.publish(storage.join(root, path.name), path.read_bytes())
    return found


@pytest.mark.parametrize("elsewhere", [False, True])
def test_tars_on_a_store_are_indexed_there_or_from_a_folder(
    images: np.ndarray, root: str, tmp_path: Path, elsewhere: bool
) -> None:
    out = str(tmp_path / "index") if elsewhere else root
    told = ["--out", out] if elsewhere else []
    assert main(["index", root, "--label", "json:class", *told]) == 0
    manifest = manifests.load(out)
    assert [storage.is_remote(s.name) for s in manifest.shards] == [elsewhere] * 3
    for _ in range(2):
        with closing(
            Reader(out, manifest, ReadOptions(decoders=1), cache=Cache(tmp_path / "cache"))
        ) as reader:
            found = reader.gather(np.arange(COUNT))
            assert np.array_equal(found["x"].transpose(0, 2, 3, 1), images)
            assert found["y"].tolist() == [i % 7 for i in range(COUNT)]
            fetched = reader.counts["fetched"]
    assert fetched == 0 and verify(out).problems == ()


def test_a_tar_that_is_replaced_after_it_was_indexed_is_damage(
    images: np.ndarray, root: str
) -> None:
    assert main(["index", root]) == 0
    url = storage.join(root, "00001.tar")
    data = bytearray(storage.read_bytes(url))
    data[1700] ^= 1
    with closing(Reader(root, manifests.load(root))) as reader:
        storage.publish(url, bytes(data), replace=True)
        with pytest.raises(DamagedError, match=r"00001\.tar: sample 100, .*tools.shards verify"):
            reader.gather(np.arange(COUNT))


def test_a_prefix_without_tars_is_named(root: str) -> None:
    with pytest.raises(UserError, match=r"holds no \.tar objects"):
        main(["index", root])
    with pytest.raises(UserError, match=r"no\.tar does not exist"):
        main(["index", f"{root}/no.tar"])
