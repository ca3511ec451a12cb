"""Every epoch is proven whole, damage is stood in for alike everywhere, and a scan counts each sample once."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

import shards
from shards.errors import DamagedError, UserError
from shards.format import manifest as manifests
from shards.format.order import Order
from shards.read.audit import EpochAudit, check_epoch, complete_epoch
from shards.read.mixing import Blend
from shards.read.options import ReadOptions
from shards.read.reader import Reader
from shards.read.stream import Share, Stream
from tests.shards.data import flip, payload, write

G = 24


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    write(path, 700)
    return path


@pytest.mark.parametrize(("world", "micro"), [(1, 24), (2, 4), (3, 8), (12, 1)])
@pytest.mark.parametrize("start", [0, 1000, 1400])
def test_all_ranks_together_prove_each_epoch(
    root: Path, world: int, micro: int, start: int
) -> None:
    """And an epoch that an earlier attempt began, with what that one carried over."""
    first = start // 700
    behind = Order(count=700, seed=2).ordinals(np.arange(first * 700, start))
    carried = EpochAudit(epoch=first).add(behind, 0)
    ended: list[list[EpochAudit]] = []
    for rank in range(world):
        with shards.open(
            root, global_batch=G, micro_batch=micro, rank=rank, world=world, seed=2, position=start
        ) as stream:
            while stream.position < 700 * (first + 4):
                next(stream)
            ended.append(stream.ended)
            assert [a.key for a in stream.under_way()] == [(0, first + 4)]
    for epoch, *accounts in zip(range(first, first + 4), *ended, strict=True):
        assert {a.key for a in accounts} == {(0, epoch)}
        total = check_epoch([*accounts, carried] if epoch == first else accounts, 700)
        assert (total.seen, total.substituted) == (700, 0)
        if world > 1:
            with pytest.raises(DamagedError, match=f"epoch {epoch}: .* not all of them once each"):
                check_epoch(accounts[1:], 700)


def test_an_epoch_ends_with_its_last_batch_not_with_the_next_one(root: Path) -> None:
    with shards.open(root, global_batch=70, micro_batch=35, rank=0, world=1, seed=2) as stream:
        for step in range(20):
            assert stream.ended == [] and len(stream.under_way()) == (step > 1)
            next(stream)
        assert [a.total for a in stream.ended] == [700] and stream.under_way() == []


class Faulty(Order):
    """Sample 5 stands where another one should, once in an epoch."""

    def ordinals(self, positions: ArrayLike) -> NDArray[np.int64]:
        found = super().ordinals(positions)
        return np.where(np.asarray(positions) % self.count == 123, 5, found)


@pytest.mark.parametrize("start", [0, 720])
def test_one_that_reads_alone_proves_its_epochs_itself(root: Path, start: int) -> None:
    """Each that it read from its beginning on."""
    manifest = manifests.load(root)
    share = Share(global_batch=G, micro_batch=G, rank=0, world=1)
    order = Faulty(count=700, seed=2)
    with (
        Stream(Reader(root, manifest), [manifest], Blend(orders=(order,)), share, start) as stream,
        pytest.raises(DamagedError, match=f"epoch {2 * (start > 0)}: 700 samples seen and 0"),
    ):
        for _ in range(100):
            next(stream)


def test_a_batch_may_end_several_epochs(tmp_path: Path) -> None:
    write(tmp_path, 10)
    ended = []
    for rank in range(2):
        with shards.open(
            tmp_path, global_batch=64, micro_batch=16, rank=rank, world=2, seed=5
        ) as stream:
            next(stream)
            assert stream.ended == []
            next(stream)
            assert [a.epoch for a in stream.ended] == [*range(6)]
            ended.append([*stream.ended, *stream.under_way()])
    for accounts in zip(*ended, strict=True):
        if accounts[0].epoch < 6:
            check_epoch(accounts, 10)
        else:
            assert sum(a.total for a in accounts) == 4


@given(count=st.integers(2, 3000), data=st.data())
def test_a_sample_in_anothers_place_is_found(count: int, data: st.DataObject) -> None:
    ordinals = np.arange(count)
    parts = np.array_split(ordinals, 3)
    assert check_epoch((EpochAudit(epoch=3).add(p, 0) for p in parts), count).total == count
    wrong, other = data.draw(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)))
    ordinals[wrong] = other
    account = EpochAudit(epoch=3).add(ordinals, 0)
    if wrong != other:
        with pytest.raises(DamagedError, match="epoch 3"):
            check_epoch([account], count)


def test_closed_forms_hold_where_words_run_over() -> None:
    count = 300_000
    big = complete_epoch(0, count)
    assert big.first == sum(range(count)) % 2**64
    assert big.second == sum(n * n for n in range(count)) % 2**64
    assert (
        sum(n * n for n in range(4_000_000, 4_000_010)) % 2**64
        == (complete_epoch(0, 4_000_010).second - complete_epoch(0, 4_000_000).second) % 2**64
    )


def test_a_batch_that_is_lost_or_comes_twice_is_noticed_at_once(root: Path) -> None:
    with shards.open(root, global_batch=G, micro_batch=12, rank=1, world=2, seed=2) as stream:
        next(stream)
        next(stream._ahead)  # a batch that nobody was given
        with pytest.raises(DamagedError, match="positions 60 to 71 instead of 36 to 47"):
            next(stream)


def test_accounts_of_other_epochs_and_sources_do_not_add_up() -> None:
    for other in (EpochAudit(epoch=2), EpochAudit(epoch=1, source=1)):
        with pytest.raises(ValueError, match="do not add up"):
            EpochAudit(epoch=1) + other
    assert EpochAudit(epoch=1).with_sums((1, 2, 2**64 - 1, 5)) + EpochAudit(epoch=1).with_sums(
        (1, 0, 3, 0)
    ) == EpochAudit(epoch=1).with_sums((2, 2, 2, 5))


def test_substitutes_are_the_same_for_every_rank_and_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 2000)  # 8 blocks, the last of 208
    path, at = payload(tmp_path, 7, "x")
    sound = shards.read_all(tmp_path)
    flip(path, at)
    path, at = payload(tmp_path, 0, "id")  # so that block 7's substitute is not its neighbour
    flip(path, at)
    order = Order(count=2000, seed=11)
    options = {"global_batch": 100, "seed": 11, "on_damage": "substitute", "damaged": 0.25}
    seen: dict[int, int] = {}
    for world, micro, start in ((1, 100, 0), (2, 25, 700), (4, 5, 1900)):
        for rank in range(world):
            with shards.open(
                tmp_path, micro_batch=micro, rank=rank, world=world, position=start, **options
            ) as stream:
                while stream.position < 4000:
                    batch = next(stream)
                    for name in ("x", "y", "key"):
                        assert np.array_equal(batch[name], sound[name][batch["ordinal"]])
                    for p, o in zip(
                        batch["position"].tolist(), batch["ordinal"].tolist(), strict=True
                    ):
                        assert seen.setdefault(p, o) == o
                if world == 1:
                    assert [(a.seen, a.substituted) for a in stream.ended] == [(1536, 464)] * 2
                    assert stream.substituted == 2 * 464
    asked = order.ordinals(np.arange(4000))
    got = np.array([seen[p] for p in range(4000)])
    hit = (asked // 256 == 7) | (asked // 256 == 0)
    assert np.array_equal(got[~hit], asked[~hit])
    assert np.array_equal(got[hit], 256 + asked[hit] % 256)  # the next sound block is 1 for both
    assert "others stand in for its 208 samples" in caplog.text
    assert "1,536 seen + 464 substituted = 2,000" in caplog.text


def test_too_much_damage_ends_it_after_all(tmp_path: Path) -> None:
    write(tmp_path, 2000)
    for block in (2, 5):
        flip(*payload(tmp_path, block, "y"))
    options = {"global_batch": 100, "micro_batch": 100, "rank": 0, "world": 1, "seed": 0}
    with (
        shards.open(tmp_path, **options, on_damage="substitute", damaged=0.2) as stream,
        pytest.raises(
            DamagedError, match=r"512 of 2,000 samples are damaged, more than the share of 0.2"
        ),
    ):
        for _ in range(20):
            next(stream)
    with pytest.raises(UserError, match="on_damage='ignore'"):
        shards.open(tmp_path, **options, on_damage="ignore")
    with pytest.raises(UserError, match="threads=0"):
        shards.open(tmp_path, **options, threads=0)


def test_a_missing_tar_can_be_stood_in_for(tmp_path: Path) -> None:
    manifest = write(tmp_path, 2000)
    (tmp_path / manifest.shards[1].name).unlink()
    with shards.open(
        tmp_path, global_batch=100, micro_batch=100, rank=0, world=1, seed=0,
        on_damage="substitute", damaged=0.5,
    ) as stream:  # fmt: skip
        for _ in range(20):
            next(stream)
        assert [a.substituted for a in stream.ended] == [manifest.shards[1].count]


@pytest.mark.parametrize(
    ("count", "micro", "world"), [(700, 8, 3), (700, 100, 7), (10, 64, 2), (96, 8, 4)]
)
def test_a_scan_has_the_same_steps_everywhere_and_each_sample_once(
    tmp_path: Path, count: int, micro: int, world: int
) -> None:
    write(tmp_path, count)
    everything, found, steps = shards.read_all(tmp_path), [], set()
    for rank in range(world):
        with shards.scan(tmp_path, micro_batch=micro, rank=rank, world=world) as scan:
            batches = list(scan)
        assert len(batches) == scan.steps
        steps.add(scan.steps)
        for batch in batches:
            assert batch["x"].shape[0] == micro and batch["mask"].shape == (micro,)
            assert np.array_equal(batch["key"], everything["key"][batch["ordinal"]])
            found += batch["ordinal"][batch["mask"]].tolist()
    assert steps == {-(-count // (micro * world))} and sorted(found) == list(range(count))


def test_neighbours_come_by_one_range_and_no_byte_twice(tmp_path: Path) -> None:
    manifest = write(tmp_path, 3000, shard_bytes=80_000)  # four blocks in a tar, twelve in all
    with closing(Reader(tmp_path, manifest, mapped=False)) as reader:
        reader.gather(np.arange(3000))
        payload = int(manifest.blocks["bytes"].sum())
        assert reader.counts["fetched"] == len(manifest.shards) == 3
        assert payload < reader.counts["bytes"] < payload + 12 * 8192
        reader.gather(np.arange(3000))  # still at hand
        assert reader.counts["fetched"] == 3
    with closing(Reader(tmp_path, manifest, mapped=False)) as reader:
        reader.gather(np.array([10, 600, 700, 2999]))  # blocks 0, 2, 2 and 11
        assert reader.counts["fetched"] == 3


def test_one_damaged_block_of_a_range_does_not_spoil_its_neighbours(tmp_path: Path) -> None:
    manifest = write(tmp_path, 1000, shard_bytes=80_000)
    flip(*payload(tmp_path, 1, "x"))
    with closing(
        Reader(tmp_path, manifest, ReadOptions(on_damage="substitute", damaged=0.3), mapped=False)
    ) as r:
        r.want(np.arange(1000))
        batch, stands_in = r.take(np.arange(1000))
    assert np.flatnonzero(stands_in).tolist() == [*range(256, 512)]
    assert np.array_equal(batch["ordinal"][256:512], np.arange(512, 768))
