"""Shards of one sample per key: read as arrays are, whichever way, and no damage passes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

import shards
from shards.errors import DamagedError, UserError
from shards.format import manifest as manifests
from shards.format.manifest import Manifest
from shards.read import block_bytes as parts
from shards.read import samples
from shards.read.audit import check_epoch
from shards.read.cache import Cache
from shards.read.decoding import Decoders
from shards.read.options import ReadOptions
from shards.read.reader import Reader, tars_of
from shards.verify import verify
from tests.shards import data, foreign
from tools.shards.__main__ import main

COUNT = 700  # three blocks over seven tars


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("foreign")
    foreign.laion(path, COUNT)
    assert main(["index", str(path), "--label", "json:class"]) == 0
    return path


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, np.ndarray]:
    """By a loop that is not ours."""
    rows = [*foreign.read(sorted(root.glob("*.tar")))]
    return {name: np.array([row[name] for row in rows]) for name in ("x", "y", "key")}


def _alike(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], rows: np.ndarray) -> bool:
    return all(np.array_equal(found[n], values[rows]) for n, values in expected.items())


@pytest.mark.parametrize(
    ("way", "decoders"), [("mapped", 0), ("fetched", 0), ("cached", 0), ("fetched", 2)]
)
def test_every_way_of_reading_gives_the_samples_that_are_there(
    root: Path, expected: dict[str, np.ndarray], tmp_path: Path, way: str, decoders: int
) -> None:
    cache = Cache(tmp_path) if way == "cached" else None
    manifest = manifests.load(root)
    with closing(
        Reader(root, manifest, ReadOptions(decoders=decoders), mapped=way == "mapped", cache=cache)
    ) as reader:
        for seed in range(4):
            rows = np.random.default_rng(seed).integers(0, COUNT, 90)
            found = reader.gather(rows)
            assert _alike(found, expected, rows) and np.array_equal(found["ordinal"], rows)
            assert found["x"].dtype == np.uint8 and found["y"].dtype == np.int64
        if way == "cached":
            assert Cache(tmp_path).used_bytes() == manifest.blocks["bytes"].sum()
            assert (reader.counts["fetched"], reader.counts["cached"]) == (9, 0)  # they stay mapped


def test_another_process_reads_from_the_cache_alone(
    root: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    for turn in range(2):
        with closing(
            Reader(root, manifests.load(root), mapped=False, cache=Cache(tmp_path))
        ) as reader:
            assert _alike(reader.gather(np.arange(COUNT)), expected, np.arange(COUNT))
            assert (reader.counts["fetched"] > 0) == (turn == 0)


def test_a_small_cache_makes_room_by_the_order_though_a_block_lies_in_several_tars(
    root: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Room for two of three blocks: of the two that are there, the one needed last goes."""
    manifest = manifests.load(root)
    tars = tars_of(root, manifest, mapped=False)
    assert [len(tars.pieces(block)) for block in range(3)] == [3, 4, 2]
    needed = {0: 1.0, 1: 3.0, 2: 2.0}
    asked: list[int] = []

    def need(blocks: np.ndarray, position: int) -> np.ndarray:
        asked.extend(blocks.tolist())
        return np.array([needed[block] for block in blocks.tolist()])

    room = int(manifest.blocks["bytes"].sum()) - 1
    with closing(
        Reader(root, manifest, mapped=False, cache=Cache(tmp_path, room), needed=need)
    ) as reader:
        for block in (0, 1, 2):
            rows = np.arange(block * 256, min(block * 256 + 256, COUNT))
            assert _alike(reader.gather(rows), expected, rows)
    assert {*asked} >= {
        0,
        1,
    }  # every piece was known as its block's, and none as another data set's
    with closing(Reader(root, manifest, mapped=False, cache=Cache(tmp_path, room))) as reader:
        for block, cached in ((0, 1), (2, 1), (1, 0)):
            before = reader.counts["cached"]
            reader.gather(np.array([block * 256]))
            assert reader.counts["cached"] - before == cached


def test_a_block_is_one_range_of_each_tar_that_it_lies_in(root: Path) -> None:
    manifest = manifests.load(root)
    with closing(Reader(root, manifest, mapped=False)) as reader:
        reader.gather(np.arange(COUNT))
        assert (
            reader.counts["fetched"] == 3 + 4 + 2
        )  # samples 0-255, 256-511, 512-699 of tars of 100
        assert reader.counts["bytes"] == int(manifest.blocks["bytes"].sum())


def test_neighbours_come_together_up_to_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign.laion(tmp_path, COUNT, in_a_tar=COUNT)
    main(["index", str(tmp_path), "--label", "json:class"])
    manifest = manifests.load(tmp_path)
    sizes = manifest.blocks["bytes"][:, 0]

    def fetched() -> int:
        with closing(Reader(tmp_path, manifest, mapped=False)) as reader:
            reader.gather(np.array([0, 256, 512]))  # one of each block
            return reader.counts["fetched"]

    assert fetched() == 1
    for bound in (int(sizes[:256].sum()), 20_000, 1):
        monkeypatch.setattr(samples, "TOGETHER", bound)
        monkeypatch.setattr(parts, "TOGETHER", bound)
        tars = tars_of(tmp_path, manifest, mapped=False)
        every = [part for block in range(3) for part in tars.ranges(block)]
        assert all(p.stop - p.start <= max(bound, sizes.max()) for p in every)
        assert sum(p.stop - p.start for p in every) == sizes.sum()
        assert fetched() == len(every)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("mode", ["window", "global"])
def test_ranks_see_every_sample_once_and_the_epoch_is_proven(
    root: Path, expected: dict[str, np.ndarray], mode: str, world: int
) -> None:
    given, ended = [], []
    for rank in range(world):
        with shards.open(
            root, global_batch=84, micro_batch=14, rank=rank, world=world, seed=3, mode=mode
        ) as stream:
            for _ in range(9 * 84 // 14 // world):  # 756 positions: across an epoch's end
                batch = next(stream)
                assert _alike(batch, expected, batch["ordinal"])
                here = batch["position"] < COUNT
                given += batch["ordinal"][here].tolist()
            ended += stream.ended
    assert sorted(given) == [*range(COUNT)]
    assert check_epoch(ended, COUNT).seen == COUNT


# ---------------------------------------------------------------- damage


def _copy(root: Path, to: Path) -> Path:
    assert main(["copy", str(root), str(to)]) == 0
    return to


def _flip(root: Path, ordinal: int, at: int) -> None:
    manifest = manifests.load(root)
    row = manifest.blocks[ordinal]
    data.flip(root / manifest.shards[row["shard"]].name, int(row["offset"][0]) + at)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("at", [3, 150, 1100, -600], ids=["pax", "checksum", "name", "payload"])
def test_a_flipped_bit_ends_the_reading_or_others_stand_in(
    root: Path, expected: dict[str, np.ndarray], tmp_path: Path, at: int, mapped: bool
) -> None:
    hurt, ordinal = _copy(root, tmp_path / "hurt"), 300
    size = int(manifests.load(hurt).blocks["bytes"][ordinal, 0])
    _flip(hurt, ordinal, at % size)
    manifest = manifests.load(hurt)
    with closing(Reader(hurt, manifest, mapped=mapped)) as reader:
        whole = np.r_[0:256:15, 512:COUNT:15]
        assert _alike(reader.gather(whole), expected, whole)
        with pytest.raises(DamagedError, match=r"00003\.tar: sample 300, .*tools.shards verify"):
            reader.gather(np.array([256]))  # a block is sound or not
    with closing(
        Reader(hurt, manifest, ReadOptions(on_damage="substitute", damaged=0.5), mapped=mapped)
    ) as reader:
        found = reader.gather(np.array([10, 256, 400, 511, 699]))
        assert found["ordinal"].tolist() == [10, 512, 512 + 144, 512 + 255 - 188, 699]
        assert _alike(found, expected, found["ordinal"])
    assert any("sample 300, at byte" in problem for problem in verify(hurt).problems)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_tar_cut_short_or_gone_is_damage(
    root: Path, expected: dict[str, np.ndarray], tmp_path: Path, mapped: bool
) -> None:
    hurt = _copy(root, tmp_path / "hurt")
    path = hurt / "00006.tar"
    for spoil, said in (
        (lambda: os.truncate(path, 5000), r"00006\.tar has 5,000 bytes, its manifest promises"),
        (path.unlink, r"00006\.tar is missing"),
    ):
        spoil()
        with closing(Reader(hurt, manifests.load(hurt), mapped=mapped)) as reader:
            assert _alike(reader.gather(np.arange(512)), expected, np.arange(512))
            with pytest.raises(DamagedError, match=said):
                reader.gather(np.array([512]))  # in 00005.tar, but its block is not whole
        assert verify(hurt).problems
    assert main(["repair", str(hurt), "--from", str(root)]) == 0
    assert verify(hurt).problems == ()


def test_a_block_without_its_bytes_is_asked_for_again(
    root: Path, expected: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wire that turned a bit over once: the second answer is right."""
    manifest, spoiled = manifests.load(root), []
    right = parts.storage.read_range

    def once(url: str, start: int, stop: int, **options: object) -> bytes:
        found = right(url, start, stop, **options)  # type: ignore[arg-type]
        if not spoiled:
            spoiled.append(url)
            return found[:700] + bytes([found[700] ^ 1]) + found[701:]
        return found

    monkeypatch.setattr(parts.storage, "read_range", once)
    with closing(Reader(root, manifest, mapped=False)) as reader:
        assert _alike(reader.gather(np.arange(COUNT)), expected, np.arange(COUNT))
        assert spoiled and reader.counts["again"] == 1


def test_a_cache_that_rotted_is_fetched_again(
    root: Path, expected: dict[str, np.ndarray], tmp_path: Path
) -> None:
    manifest, counts = manifests.load(root), []
    for turn in range(3):
        with closing(Reader(root, manifest, mapped=False, cache=Cache(tmp_path))) as reader:
            assert _alike(reader.gather(np.arange(COUNT)), expected, np.arange(COUNT))
            counts.append((reader.counts["fetched"], reader.counts["cached"]))
        if turn == 0:
            data.flip(sorted(tmp_path.glob("*/*-*"))[0], 2000)
    assert counts[0] == (9, 0) and counts[1][1] == 2 and counts[2] == (0, 3)


def test_an_index_that_joins_two_samples_is_no_index(root: Path, tmp_path: Path) -> None:
    """Its hashes hold, its structure does not."""
    wrong = _copy(root, tmp_path / "wrong")
    manifest = manifests.load(wrong)
    blocks, plain = manifest.blocks.copy(), {**manifest.plain}
    blocks["bytes"][0, 0] += blocks["bytes"][1, 0]
    span = (wrong / "00000.tar").read_bytes()[: int(blocks["bytes"][0, 0])]
    blocks["xxh3"][0, 0] = np.frombuffer(xxhash.xxh3_128_digest(span), dtype=np.uint8)
    index = manifests.index_bytes(blocks)
    plain["index"] = {**plain["index"], "sha256": manifests.sha256_of(index)}
    manifests.save(wrong, Manifest.of(plain, blocks))
    assert "there is no sample 0 as the index says" in "".join(verify(wrong).problems)
    with (
        closing(Reader(wrong, manifests.load(wrong))) as reader,
        pytest.raises(DamagedError, match=r"at byte 0 .*: members of 2 samples"),
    ):
        reader.gather(np.array([0]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": "cls"}, r"no member \.cls"),
        ({"image": "jpg"}, r"no member \.jpg"),
        ({"channels": 1}, r"x is \(1, 8, 8\)"),
        ({"size": 4}, r"x is \(3, 4, 4\)"),
        ({"prefix": True}, r"id is \(\) \|S12"),
    ],
)
def test_sound_bytes_that_decode_otherwise_are_an_error_with_their_place(
    root: Path, change: dict[str, object], said: str
) -> None:
    manifest = manifests.load(root)
    other = replace(manifest, decode={**(manifest.decode or {}), **change})
    with (
        closing(Reader(root, other)) as reader,
        pytest.raises(DamagedError, match=rf"00001\.tar: the sample at byte 0 .*{said}"),
    ):
        reader.gather(np.array([100]))


def test_a_layout_that_nobody_knows_is_refused(root: Path) -> None:
    manifest = manifests.load(root)
    with pytest.raises(UserError, match=r"layout='columns' is none .*\(blocks, samples\)"):
        Manifest.of({**manifest.plain, "layout": "columns"}, manifest.blocks)


# ---------------------------------------------------------------- chosen fields


def test_chosen_fields_are_those_of_all(root: Path, expected: dict[str, np.ndarray]) -> None:
    rows = np.array([699, 3, 3, 256])
    for place in (True, False):
        with closing(Reader(root, manifests.load(root), mapped=place)) as reader:
            found = reader.gather(rows, fields=("y", "key"))
            assert found.keys() == {"y", "key", "ordinal"}
            assert np.array_equal(found["y"], expected["y"][rows])
            assert np.array_equal(found["key"], expected["key"][rows])
            with pytest.raises(UserError, match=r"field 'z' .*choose among x, y, key"):
                reader.gather(rows, fields=("y", "z"))


@pytest.mark.parametrize("mapped", [True, False])
def test_of_blocks_only_the_chosen_fields_are_read_and_checked(
    tmp_path: Path, mapped: bool
) -> None:
    manifest = data.write(tmp_path, 700)
    labels = shards.read_all(tmp_path)["y"]
    path, at = data.payload(tmp_path, 1, "x")
    data.flip(path, at)
    rows = np.random.default_rng(0).permutation(700)
    with closing(Reader(tmp_path, manifest, mapped=mapped)) as reader:
        assert np.array_equal(reader.gather(rows, fields=("y",))["y"], labels[rows])
        if not mapped:
            column = manifest.column("y")
            assert reader.counts["bytes"] == manifest.blocks["bytes"][:, column].sum() == 700 * 8
        with pytest.raises(DamagedError, match="x of block 1"):
            reader.gather(rows)
    path, at = data.payload(tmp_path, 2, "y")
    data.flip(path, at)
    with (
        closing(Reader(tmp_path, manifest, mapped=mapped)) as reader,
        pytest.raises(DamagedError, match="y of block 2"),
    ):
        reader.gather(rows, fields=("y",))


# ---------------------------------------------------------------- decoder processes


@pytest.fixture
def pool() -> Iterator[Decoders]:
    with closing(Decoders(2)) as pool:
        yield pool


def _die(item: int) -> int:
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def _refuse(item: int) -> int:
    raise KeyError(item)


def test_any_number_of_processes_keeps_the_order_and_none_is_started_in_vain() -> None:
    for workers in (0, 1, 2):
        with closing(Decoders(workers)) as pool:
            assert pool._processes == {}
            for count in (0, 1, 2, 7, 100):
                assert [*pool.map(abs, [*range(-count, 0)])] == [*range(count, 0, -1)]
            assert len(pool._processes) == workers
    with pytest.raises(UserError, match="decoders=-1"):
        Decoders(-1)


@pytest.mark.timeout(60)
def test_a_process_that_dies_is_an_error_and_never_a_hang(pool: Decoders) -> None:
    _start(pool)
    with pytest.raises(UserError, match="a process of decoders=2 died"):
        pool.map(_die, [*range(10)])
    _start(pool)  # another two
    connection, process = next(iter(pool._processes.items()))
    connection.send((bytes, [8 << 20]))  # more than a pipe holds: it waits within its answer
    assert connection.poll(30) and process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with pytest.raises(UserError, match="a process of decoders=2 died"):
        pool.map(abs, [*range(8)])


def _start(pool: Decoders) -> None:
    """Until all processes have started, this one works in their place."""
    assert pool.map(abs, [-1, -2]) == [1, 2]
    while pool._starting:
        assert pool.map(abs, [-1, -2]) == [1, 2]


@pytest.mark.timeout(60)
def test_the_first_items_wait_for_no_process(pool: Decoders) -> None:
    here = os.getpid()
    assert next(iter(pool.map(_process_of, [*range(8)]))) == here
    _start(pool)
    assert here not in pool.map(_process_of, [*range(8)])


def _process_of(item: int) -> int:
    return os.getpid()


def test_what_the_work_raises_is_raised_and_later_work_gets_its_own_answers(pool: Decoders) -> None:
    with pytest.raises(KeyError):
        pool.map(_refuse, [*range(8)])
    assert pool.map(abs, [*range(-8, 0)]) == [*range(8, 0, -1)]


ORPHANS = """
import os, signal, sys, threading, time
from shards.read.decoding import Decoders
if __name__ == "__main__":
    pool = Decoders(2)
    pool.map(abs, [1, 2, 3, 4])
    while pool._starting:
        pool.map(abs, [1, 2, 3, 4])
    print(*[process.pid for process in pool._processes.values()], flush=True)
    if sys.argv[1] == "busy":
        threading.Thread(target=pool.map, args=(time.sleep, [3600] * 4), daemon=True).start()
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("state", ["idle", "busy"])
def test_the_processes_die_with_a_parent_that_was_killed(tmp_path: Path, state: str) -> None:
    (tmp_path / "orphans.py").write_text(ORPHANS)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "orphans.py"), state],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -signal.SIGKILL and len(pids) == 2
    while any(_runs(pid) for pid in pids):  # the test's own limit is the bound
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_arrays_need_no_decoders_and_a_setting_without_effect_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = data.write(tmp_path, 10)
    with closing(Reader(tmp_path, manifest, ReadOptions(decoders=2))) as reader:
        assert len(reader.gather(np.arange(10))["x"]) == 10
    assert "decoders=2 decode nothing" in caplog.text
