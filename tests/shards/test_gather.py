"""Several batches gathered at once are those gathered one by one, and leave nothing behind."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import shards
from shards.errors import DamagedError
from shards.format import manifest as manifests
from shards.read.blocks import Blocks
from shards.read.mixing import Readers, make_blend
from shards.read.options import ReadOptions
from shards.read.reader import Reader
from shards.sources.source import ArraySource
from shards.write import writer
from tests.shards import data

COUNT = 1000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("gather") / "data"
    data.write(place, COUNT)
    return place


@pytest.mark.parametrize("mapped", [True, False])
def test_batches_taken_together_are_those_taken_alone(root: Path, mapped: bool) -> None:
    batches = [np.random.default_rng(i).integers(0, COUNT, 70) for i in range(7)]
    manifest = manifests.load(root)
    one = Reader(root, manifest, mapped=mapped)
    alone = []
    for batch in batches:
        one.want(batch)
        alone.append(one.take(batch)[0])
    one.close()
    several = Reader(root, manifest, mapped=mapped)
    several.want(*batches)
    first, instead = several.take(*batches[:4])
    rest, _ = several.take(*batches[4:])
    assert several.announced == 0 and not several._announced and not several._ready
    several.close()
    assert instead.shape == (280,) and not instead.any()
    for name in first:
        together = np.concatenate([first[name], rest[name]])
        assert np.array_equal(together, np.concatenate([a[name] for a in alone])), name


@pytest.mark.parametrize("mapped", [True, False])
def test_after_a_batch_that_failed_the_next_is_answered(tmp_path: Path, mapped: bool) -> None:
    manifest = data.write(tmp_path, COUNT, shard_bytes=1)  # a tar a block
    row = manifest.blocks[1]
    data.flip(tmp_path / manifest.shards[1].name, int(row["offset"][0]) + 5)
    with closing(Reader(tmp_path, manifest, mapped=mapped)) as reader:
        for good in (3, 700, 10):
            with pytest.raises(DamagedError, match="x of block 1"):
                reader.gather(np.array([20, 300, 600]))
            assert reader.gather(np.array([good]))["ordinal"].tolist() == [good]
            assert reader.announced == 0 and not (reader._announced or reader._ready)


def test_of_a_batch_that_failed_nothing_is_kept_for_those_after_it(tmp_path: Path) -> None:
    manifest = data.write(tmp_path, COUNT)  # two blocks a tar: 2 and 3 come by one range
    data.flip(tmp_path / manifest.shards[0].name, int(manifest.blocks[1]["offset"][0]) + 5)
    failing, good = np.array([300, 600]), np.array([900])
    with closing(Reader(tmp_path, manifest, mapped=False)) as reader:
        reader.want(failing, good)
        with pytest.raises(DamagedError, match="x of block 1"):
            reader.take(failing)
        assert reader.take(good)[0]["ordinal"].tolist() == [900]
        assert reader.announced == 0 and not (reader._announced or reader._ready)


def test_a_mixture_leaves_nothing_announced(root: Path, tmp_path: Path) -> None:
    data.write(tmp_path / "other", 500)
    roots = [root, tmp_path / "other"]
    found = [manifests.load(r) for r in roots]
    blend = make_blend(found, ReadOptions(weights=[2.0, 1.0], window=2), seed=3)
    readers = [Reader(r, m) for r, m in zip(roots, found, strict=True)]
    both = Readers(readers, blend)
    batches = [blend.plan(np.arange(i * 50, (i + 1) * 50))[0] for i in range(6)]
    both.want(*batches)
    taken, _ = both.take(*batches[:5])
    assert [len(r._announced) for r in readers] == [1, 1]
    both.take(batches[5])
    assert both.announced == 0
    both.close()
    source, ordinal = blend.locate(np.concatenate(batches[:5]))
    assert np.array_equal(taken["source"], source) and np.array_equal(taken["ordinal"], ordinal)


def test_keys_beyond_ascii_come_back_at_one_width(tmp_path: Path) -> None:
    keys = [f"{'é' if i == 700 else 'a'}{i}" for i in range(COUNT)]
    x = np.zeros((COUNT, 1, 2, 2), np.float16)
    writer.write(tmp_path / "data", ArraySource.of("keys", x, keys=keys), header=data.LATENT)
    widths, found = set(), {}
    with shards.open(
        tmp_path / "data", global_batch=50, micro_batch=50, rank=0, world=1, seed=0
    ) as stream:
        for _ in range(COUNT // 50):
            batch = next(stream)
            widths.add(batch["key"].dtype)
            found |= dict(zip(batch["ordinal"].tolist(), batch["key"].tolist(), strict=True))
    whole = shards.read_all(tmp_path / "data")["key"]
    assert sorted(found.values()) == sorted(keys) and len(widths) == 1
    assert [found[i] for i in range(COUNT)] == whole.tolist()


def test_what_is_mapped_says_so_and_what_is_fetched_does_not(root: Path) -> None:
    manifest = manifests.load(root)
    for mapped in (True, False):
        blocks = Blocks(root, manifest, mapped=mapped)
        held = blocks.read([1])[1]
        assert isinstance(held, dict) and blocks.is_mapped(held) == mapped
