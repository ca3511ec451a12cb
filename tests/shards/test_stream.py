"""The same samples whatever the ranks, resumable anywhere, damage loud, threads gone after close."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import shards
from shards.errors import DamagedError, UserError
from shards.format import manifest as manifests
from shards.format.manifest import Manifest
from shards.format.order import Order
from shards.read.blocks import Arrays
from shards.read.options import ReadOptions
from shards.read.prefetch import Prefetch
from shards.read.reader import Reader
from tests.shards.data import flip, payload, write

G = 24


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream")
    write(path, 700)
    return path


def _threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("shards-")]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> None:
    yield
    assert _threads() == []


def _read(root: Path, world: int, micro: int, steps: int, **options: object) -> dict[int, int]:
    """position -> ordinal over all ranks and `steps` global batches; no position may come twice."""
    found: dict[int, int] = {}
    states = []
    for rank in range(world):
        given = {"global_batch": G, "micro_batch": micro, "seed": 11, "rank": rank, "world": world}
        given |= options
        with shards.open(root, **given) as stream:
            for _ in range(steps * given["global_batch"] // (micro * world)):
                batch = next(stream)
                assert len(batch["ordinal"]) == micro
                pairs = dict(
                    zip(batch["position"].tolist(), batch["ordinal"].tolist(), strict=True)
                )
                assert not pairs.keys() & found.keys()
                found |= pairs
            states.append(stream.state())
    assert all(state == states[0] for state in states)
    return found


@pytest.mark.parametrize("mode", ["window", "global"])
def test_order_is_the_same_for_every_world_and_micro_batch(root: Path, mode: str) -> None:
    steps = 40  # 960 positions: across the end of an epoch of 700
    expected = Order(count=700, seed=11, mode=mode).ordinals(np.arange(steps * G)).tolist()
    for world, micro in [(1, 24), (1, 4), (2, 12), (2, 1), (3, 8), (3, 2), (4, 6), (6, 4), (6, 1)]:
        found = _read(root, world, micro, steps, mode=mode)
        assert [found[p] for p in range(steps * G)] == expected
    assert sorted(expected[:700]) == list(range(700))


@pytest.mark.parametrize("mode", ["window", "global"])
def test_resuming_anywhere_with_other_ranks_goes_on_as_if_nothing_happened(
    root: Path, mode: str
) -> None:
    whole = _read(root, 2, 6, 60, mode=mode)
    resumed: dict[int, int] = {}
    position = 0
    for world, micro, steps in [(3, 4, 7), (1, 24, 1), (4, 2, 25), (6, 4, 27)]:
        part = _read(root, world, micro, steps, mode=mode, position=position)
        assert min(part) == position and not part.keys() & resumed.keys()
        resumed |= part
        position += steps * G
    assert resumed == whole


def test_a_position_that_is_no_multiple_of_the_batch_is_as_good(root: Path) -> None:
    assert set(_read(root, 2, 6, 3, position=1001)) == set(range(1001, 1001 + 3 * G))


def test_batches_carry_the_sample_of_each_ordinal(root: Path) -> None:
    everything = shards.read_all(root)
    with shards.open(root, global_batch=50, micro_batch=50, rank=0, world=1, seed=5) as stream:
        for batch in itertools.islice(stream, 30):
            for name in ("x", "y", "key"):
                assert np.array_equal(batch[name], everything[name][batch["ordinal"]])
            assert batch["x"].dtype == np.float16 and batch["y"].dtype == np.int64
            assert batch["key"].dtype.kind == "U" and batch["position"].dtype == np.int64


def test_state_counts_global_batches_delivered_in_full(root: Path) -> None:
    with shards.open(
        root, global_batch=G, micro_batch=4, rank=1, world=2, seed=9, position=48
    ) as stream:
        expected = {
            "manifest": manifests.load(root).hash,
            "seed": 9,
            "mode": "window",
            "window": 64,
        }
        for delivered in range(8):  # 3 micro-batches of this rank a step
            assert stream.state() == {**expected, "position": 48 + delivered // 3 * G}
            next(stream)


def test_a_batch_may_be_larger_than_the_data(tmp_path: Path) -> None:
    write(tmp_path, 10)
    with shards.open(tmp_path, global_batch=64, micro_batch=64, rank=0, world=1, seed=5) as stream:
        ordinals = next(stream)["ordinal"]
    assert all(sorted(ordinals[i : i + 10].tolist()) == list(range(10)) for i in range(0, 60, 10))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"global_batch": 100, "micro_batch": 32, "world": 2},
            r"global_batch=100 .*micro_batch=32 x world=2 = 64: give global_batch=64 or 128",
        ),
        ({"global_batch": 8, "micro_batch": 8, "world": 2}, "give global_batch=16"),
        ({"micro_batch": 0}, "micro_batch=0"),
        ({"rank": 2, "world": 2}, "rank=2 of world=2"),
        ({"position": -1}, "position=-1"),
        ({"mode": "random"}, "mode='random'"),
        ({"position": 2**64}, "position=18446744073709551616: give at most"),
        ({"global_batch": 16.0}, r"global_batch=16\.0: give a whole number"),
        ({"seed": "a"}, "seed='a': give a whole number"),
        ({"damaged": 2}, "damaged=2: give a share of all samples, from 0 to 1"),
        ({"cache_bytes": -1}, "cache_bytes=-1: give a number of bytes"),
    ],
)
def test_what_cannot_be_opened_is_named(root: Path, wrong: dict[str, object], message: str) -> None:
    given = {"global_batch": 16, "micro_batch": 4, "rank": 0, "world": 1, "seed": 0}
    with pytest.raises(UserError, match=message):
        shards.open(root, **{**given, **wrong})


@pytest.mark.parametrize("field", ["x", "y", "id"])
def test_a_flipped_bit_reaches_the_consumer_as_an_error(tmp_path: Path, field: str) -> None:
    write(tmp_path, 700)
    path, at = payload(tmp_path, 1, field)
    flip(path, at)
    with (
        shards.open(tmp_path, global_batch=700, micro_batch=10, rank=0, world=1, seed=0) as stream,
        pytest.raises(DamagedError, match=f"{field} of block 1.*tools.shards verify"),
    ):
        for _ in range(70):
            next(stream)
    with pytest.raises(DamagedError):
        shards.read_all(tmp_path)


def _gather(root: Path, manifest: Manifest, ordinals: np.ndarray, mapped: bool) -> Arrays:
    with closing(Reader(root, manifest, mapped=mapped)) as reader:
        return reader.gather(ordinals)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_truncated_and_a_missing_tar_are_errors(tmp_path: Path, mapped: bool) -> None:
    manifest, everything = write(tmp_path, 700), np.arange(700)
    path = tmp_path / manifest.shards[-1].name
    os.truncate(path, int(manifest.blocks[-1]["offset"][0]) + 100)
    with pytest.raises(DamagedError, match=f"{path.name}.* bytes"):
        _gather(tmp_path, manifest, everything, mapped)
    path.unlink()
    with pytest.raises(DamagedError, match="is missing"):
        _gather(tmp_path, manifest, everything, mapped)


def test_fetched_blocks_are_those_that_lie_mapped(tmp_path: Path) -> None:
    """What S3 is read by, here against a folder."""
    manifest = write(tmp_path, 2000)
    asked = np.random.default_rng(0).integers(0, 2000, (20, 50))
    for ordinals in asked:
        one, other = (_gather(tmp_path, manifest, ordinals, m) for m in (False, True))
        assert all(np.array_equal(one[name], other[name]) for name in other)
    path, at = payload(tmp_path, 3, "x")
    flip(path, at)
    with pytest.raises(DamagedError, match="x of block 3"):
        _gather(tmp_path, manifest, np.arange(2000), False)


def test_what_the_thread_raises_comes_after_what_it_made_and_again() -> None:
    def items():
        yield from (1, 2)
        raise OSError("the disk is gone")

    ahead = Prefetch(items(), 4, "shards-test")
    assert [next(ahead), next(ahead)] == [1, 2]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(ahead)
    ahead.close()


def test_the_thread_stays_only_a_few_items_ahead() -> None:
    made = []

    def items():
        for i in itertools.count():
            made.append(i)
            yield i

    ahead = Prefetch(items(), 3, "shards-test")
    for i in range(10):
        assert next(ahead) == i
        assert len(made) <= i + 1 + 3 + 1  # taken, held, and one in the making
    ahead.close()


def test_close_ends_the_thread_from_every_state(root: Path) -> None:
    given = {"global_batch": 8, "micro_batch": 8, "rank": 0, "world": 1, "seed": 0}
    fresh, used = shards.open(root, **given), shards.open(root, **given)
    next(used)
    assert used.waited > 0
    assert {"shards-0"} < set(_threads())
    for stream in (fresh, used, used):
        stream.close()
    assert _threads() == []
    with pytest.raises(ValueError, match="closed"):
        next(used)


def test_close_wakes_a_consumer_that_waits() -> None:
    gate, raised = threading.Event(), []

    def items():
        gate.wait()
        yield 1

    ahead = Prefetch(items(), 1, "shards-test")

    def consume() -> None:
        try:
            next(ahead)
        except ValueError as error:
            raised.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    closer = threading.Thread(target=ahead.close)  # waits for the producer, which waits at the gate
    closer.start()
    consumer.join(timeout=30)
    assert len(raised) == 1
    gate.set()
    closer.join(timeout=30)
    assert not closer.is_alive()


def test_a_forgotten_stream_ends_its_thread(root: Path) -> None:
    stream = shards.open(root, global_batch=8, micro_batch=8, rank=0, world=1, seed=0)
    thread = next(t for t in threading.enumerate() if t.name == "shards-0")
    del stream
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_what_was_loaded_is_read_whatever_the_folder_holds_by_now(tmp_path: Path) -> None:
    meant = write(tmp_path / "data", 700)
    write(tmp_path / "other", 900)
    for name in ("LATEST", "manifest-*.json", "index-*.npy"):  # tars of before stay
        for path in (tmp_path / "other").glob(name):
            shutil.copy(path, tmp_path / "data")
    given = {"global_batch": G, "micro_batch": G, "rank": 0, "world": 1, "seed": 0}
    with shards.open(tmp_path / "data", loaded=[meant], **given) as stream:
        assert stream.manifest is meant and stream.state()["manifest"] == meant.hash
        found = np.concatenate([next(stream)["ordinal"] for _ in range(30)])
    assert set(found.tolist()) == set(range(700))
    with shards.open(tmp_path / "data", **given) as stream:
        assert stream.manifest.count == 900


def test_options_and_keywords_of_the_same_values_open_the_same_stream(root: Path) -> None:
    given = {"global_batch": 16, "micro_batch": 16, "rank": 0, "world": 1, "seed": 5}
    options = ReadOptions(mode="global", threads=2)
    with (
        shards.open(root, options=options, **given) as one,
        shards.open(root, mode="global", threads=2, **given) as other,
        shards.open(root, options=options, mode="window", **given) as third,
    ):
        ordinals = [next(stream)["ordinal"].tolist() for stream in (one, other, third)]
    assert ordinals[0] == ordinals[1] != ordinals[2]
    with pytest.raises(TypeError, match="treads"):
        shards.open(root, treads=2, **given)


def test_options_of_a_config_are_its_attributes_of_the_same_names() -> None:
    config = SimpleNamespace(mode="global", cache="/local", root="data")
    assert ReadOptions.of(config, weights=[1, 2]) == ReadOptions(
        mode="global", cache="/local", weights=[1, 2]
    )
    with pytest.raises(UserError, match="threads=0"):
        ReadOptions(threads=0)
