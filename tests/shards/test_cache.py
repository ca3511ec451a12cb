"""A node's cache: every block fetched once, room made by the order, nothing lost or believed after a kill."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from shards.errors import DamagedError, UserError
from shards.format import manifest as manifests
from shards.format.order import Order
from shards.read import cache as caches
from shards.read.blocks import Blocks
from shards.read.cache import FOREIGN, Cache, Piece
from shards.read.reader import Reader
from shards.wait import wait_until
from tests.shards.data import flip, write

COUNT = 4000  # 16 blocks of 14 to 18 kB, two in a tar
TAR = "a" * 64


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    write(path, COUNT)
    return path


def _reader(root: Path, folder: Path | None, budget: int = 10**9, **options: object) -> Reader:
    """As of S3: ranges are fetched, here from a folder."""
    cache = None if folder is None else Cache(folder, budget)
    return Reader(root, manifests.load(root), mapped=False, cache=cache, **options)  # type: ignore[arg-type]


def _pieces(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*/*-*"))


def _keep_all(pieces: object) -> np.ndarray:
    return np.full(len(pieces), -np.inf)  # type: ignore[arg-type]


READ = """
import json, sys
import numpy as np
from pathlib import Path
from tests.shards.test_cache import COUNT, _reader
reader = _reader(Path(sys.argv[1]), Path(sys.argv[2]))
found = [reader.gather(np.arange(s, min(s + 200, COUNT))) for s in range(0, COUNT, 200)]
total = sum(int(part["x"].view(np.uint16).sum(dtype=np.int64)) for part in found)
print(json.dumps({**reader.counts, "sum": total}))
"""


def test_of_many_processes_each_block_is_fetched_by_one(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", READ, str(root), str(tmp_path / "cache")]
    readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [json.loads(r.communicate(timeout=120)[0]) for r in readers]
    manifest = manifests.load(root)
    blocks = Blocks(root, manifest, mapped=False)
    sizes = [sum(p.bytes for p in blocks.pieces(b)) for b in range(len(manifest.blocks))]
    assert 0 < sum(s["bytes"] for s in said) <= 1.01 * sum(sizes) + 8192 * len(sizes)
    x = Reader(root, manifest).gather(np.arange(COUNT))["x"]
    assert {s["sum"] for s in said} == {int(x.view(np.uint16).sum(dtype=np.int64))}
    assert len(_pieces(tmp_path / "cache")) == len(sizes)
    with closing(_reader(root, tmp_path / "cache")) as again:
        again.gather(np.arange(COUNT))
        assert again.counts == {"fetched": 0, "bytes": 0, "cached": len(sizes), "again": 0}


def test_contents_are_names_so_another_root_of_the_same_data_finds_them(
    root: Path, tmp_path: Path
) -> None:
    write(tmp_path / "copy", COUNT)
    other = write(tmp_path / "other", 700)
    folder = tmp_path / "cache"
    for where, fetched in ((root, True), (tmp_path / "copy", False), (tmp_path / "other", True)):
        manifest = manifests.load(where)
        with closing(_reader(where, folder)) as reader:
            found = reader.gather(np.arange(manifest.count))["x"]
            assert np.array_equal(
                found, Reader(where, manifest).gather(np.arange(manifest.count))["x"]
            )
            assert bool(reader.counts["fetched"]) is fetched
    assert other.shards[0].sha256 in {p.parent.name for p in _pieces(folder)}


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom shards.read.cache import Cache\n"
        f"with Cache(sys.argv[1]).fetching({TAR!r}) as mine:\n"
        "    print(mine, flush=True)\n    time.sleep(600)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        cache = Cache(tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(caches, "_LOCK_SECONDS", 0.05)
            with cache.fetching(TAR) as mine:
                assert not mine  # waits for it, but not for ever
        os.kill(holder.pid, signal.SIGKILL)
        began = time.monotonic()
        with cache.fetching(TAR) as mine:
            assert mine and time.monotonic() - began < 30
    finally:
        holder.kill()
        holder.communicate()


PUT = """
import itertools, sys
import numpy as np
from shards.read.cache import Cache, Piece
cache = Cache(sys.argv[1], 40_000_000)
data = np.full(8_000_000, 1, dtype=np.uint8)
print("ready", flush=True)
for i in itertools.count():
    data[:] = i % 250
    cache.put(Piece("a" * 64, i, i + len(data)), data.data, lambda pieces: np.zeros(len(pieces)))
"""


def test_kill_9_leaves_whole_pieces_and_nothing_else(tmp_path: Path) -> None:
    for wait in (0.3, 0.45, 0.63):
        writer = subprocess.Popen(
            [sys.executable, "-c", PUT, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
        assert wait_until(lambda: _pieces(tmp_path), timeout_s=60)
        until = time.monotonic() + wait
        while time.monotonic() < until:  # nobody ever sees a part
            for path in [p for p in _pieces(tmp_path) if not p.name.endswith(".tmp")]:
                with contextlib.suppress(FileNotFoundError):
                    assert path.stat().st_size == 8_000_000
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        assert _pieces(tmp_path)
        for path in _pieces(tmp_path):
            if not path.name.endswith(".tmp"):
                held = np.fromfile(path, dtype=np.uint8)
                assert len(held) == 8_000_000 and (held == held[0]).all()
    (tmp_path / TAR / "7-8.0123456789ab.tmp").write_bytes(b"of a writer that was killed")
    cache = Cache(tmp_path, 40_000_000)
    assert not [p for p in _pieces(tmp_path) if p.name.endswith(".tmp")]
    assert (
        cache.used_bytes() <= 40_000_000
        and int((tmp_path / "room").read_text()) == cache.used_bytes()
    )


def test_what_is_needed_last_goes_first(tmp_path: Path) -> None:
    cache, rng = Cache(tmp_path, 1000), np.random.default_rng(0)
    need = dict(enumerate(rng.permutation(1000).tolist()))

    def needed(pieces: list[Piece]) -> np.ndarray:
        return np.array([need[p.start] for p in pieces], dtype=float)

    expected: set[int] = set()
    for start in range(60):
        assert cache.put(Piece(TAR, start, start + 100), memoryview(bytes(100)), needed)
        while len(expected) > 9:  # the oracle, one at a time
            expected.remove(max(expected, key=lambda s: need[s]))
        expected.add(start)
        assert {int(p.name.split("-")[0]) for p in _pieces(tmp_path)} == expected
        assert cache.used_bytes() <= 1000


def test_what_must_stay_stays_and_strangers_go_before_all(tmp_path: Path) -> None:
    cache, data = Cache(tmp_path, 1000), memoryview(bytes(300))
    for start in range(3):
        assert cache.put(Piece(TAR, start, start + 300), data, _keep_all)
    assert not cache.put(Piece(TAR, 3, 303), data, _keep_all)
    assert [p.name for p in _pieces(tmp_path)] == ["0-300", "1-301", "2-302"]

    def one_is_strange(pieces: list[Piece]) -> np.ndarray:
        return np.array([FOREIGN if p.start == 1 else p.start for p in pieces])

    assert cache.put(Piece(TAR, 3, 303), data, one_is_strange)
    assert [p.name for p in _pieces(tmp_path)] == ["0-300", "2-302", "3-303"]
    assert not cache.put(Piece(TAR, 4, 2004), memoryview(bytes(2000)), one_is_strange)


def test_where_all_must_stay_it_is_rarely_asked_and_room_is_found_again(tmp_path: Path) -> None:
    """In mode=global with more data than room, say; a walk over 32,768 files takes half a second."""
    cache, data, walks = Cache(tmp_path, 1000), memoryview(bytes(100)), 0

    def put(start: int, need: float = -np.inf) -> bool:
        def asked(pieces: list[Piece]) -> np.ndarray:
            nonlocal walks
            walks += 1
            return np.full(len(pieces), need)

        return cache.put(Piece(TAR, start, start + 100), data, asked)

    assert all(put(i) for i in range(10)) and walks == 0
    for more in range(3):
        walks = 0
        assert not any(put(10) for _ in range(500))
        assert walks == 9, "of the 1st, 2nd, 4th, .. and 256th"
        # what was refused so often may wait as long
        assert any(put(20 + more, need=1.0) for _ in range(501))
    walks = 0
    assert not any(put(10) for _ in range(20_000)) and 20 <= walks <= 31
    for path in _pieces(tmp_path)[:5]:
        path.unlink()
    Cache(tmp_path, 1000)  # another process opens the folder, and counts what is there
    assert put(10), "where there is room nobody is asked"


def test_nothing_is_deleted_that_was_not_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.tex").write_text("the only copy")
    with pytest.raises(UserError, match=r"holds other things \(thesis.tex\): name an empty"):
        Cache(tmp_path)
    folder = tmp_path / "cache"
    cache = Cache(folder, 500)
    (folder / TAR).mkdir()
    others = [folder / "notes", folder / TAR / "notes", folder / TAR / "1-2.bak"]
    for path in others:
        path.write_bytes(bytes(400))
    for start in range(5):
        assert cache.put(
            Piece(TAR, start, start + 400), memoryview(bytes(400)), lambda p: np.zeros(len(p))
        )
    assert all(path.exists() for path in others) and cache.used_bytes() == 400
    with pytest.raises(UserError, match="name a folder on a disk"):
        Cache(tmp_path / "thesis.tex")
    monkeypatch.chdir(folder)
    for url, said in (("s3://b/x", "cache=s3://b/x is on S3"), ("gs://b", "gs://b begins with")):
        with pytest.raises(UserError, match=said):
            Cache(url)
    assert not [*folder.glob("*:")]
    with pytest.raises(UserError, match="budget=0"):
        Cache(folder, 0)


def test_a_copy_that_rots_is_fetched_again(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = Reader(root, manifests.load(root)).gather(np.arange(COUNT))
    with closing(_reader(root, tmp_path)) as reader:
        reader.gather(np.arange(COUNT))
    first, second, third = _pieces(tmp_path)[:3]
    flip(first, 5000)
    os.truncate(second, 100)
    third.unlink()
    with closing(_reader(root, tmp_path)) as reader:
        found = reader.gather(np.arange(COUNT))
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
        assert reader.counts["cached"] == 13 and "cache's copy" in caplog.text
    with closing(_reader(root, tmp_path)) as reader:
        reader.gather(np.arange(COUNT))
        assert reader.counts["cached"] == 16 and reader.counts["fetched"] == 0


FULL = """
import logging, resource, sys
import numpy as np
from pathlib import Path
from tests.shards.test_cache import COUNT, _reader, manifests, Reader
root, folder = Path(sys.argv[1]), Path(sys.argv[2])
reader = _reader(root, folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
one = reader.gather(np.arange(COUNT))
two = Reader(root, manifests.load(root)).gather(np.arange(COUNT))
assert all(np.array_equal(one[name], two[name]) for name in two)
"""


def test_a_full_disk_is_said_once_and_reading_goes_on(root: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(root), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("File too large; reading goes on without it") == 1
    assert _pieces(tmp_path) == []


def test_damage_at_the_source_never_enters_the_cache(tmp_path: Path) -> None:
    manifest = write(tmp_path / "data", 700)
    row = manifest.blocks[1]
    flip(tmp_path / "data" / manifest.shards[0].name, int(row["offset"][0]) + 10)
    with closing(_reader(tmp_path / "data", tmp_path / "cache")) as reader:
        with pytest.raises(DamagedError, match="x of block 1"):
            reader.gather(np.arange(700))
        assert reader.counts["again"] == 1  # what comes from afar is asked for twice
    assert len(_pieces(tmp_path / "cache")) == 2


@pytest.mark.parametrize("blocks", [4, 8, 12])
def test_a_small_cache_serves_what_the_order_lets_it(
    root: Path, tmp_path: Path, blocks: int
) -> None:
    """Windows of 2 of 16 blocks, four epochs: little more is fetched than by the rule that knows every use."""
    manifest = manifests.load(root)
    order = Order(count=COUNT, seed=1, window=2)
    sizes = [p.bytes for b in range(16) for p in Blocks(root, manifest, mapped=False).pieces(b)]
    budget = blocks * max(sizes)
    expected = Reader(root, manifest).gather(np.arange(COUNT))["x"]
    uses = []
    with closing(_reader(root, tmp_path, budget, needed=order.next_need)) as reader:
        reader._idle_most = 0
        for start in range(0, 4 * COUNT, 100):
            ordinals = order.ordinals(np.arange(start, start + 100))
            reader.position = start
            assert np.array_equal(reader.gather(ordinals)["x"], expected[ordinals])
            uses += list(dict.fromkeys((ordinals // 256).tolist()))
            assert Cache(tmp_path, budget).used_bytes() <= budget
    # fetches = uses - hits; ours knows windows, the oracle every single use
    least, ours = _belady(uses, blocks), len(uses) - reader.counts["cached"]
    assert least <= ours <= 1.2 * least


def _belady(uses: list[int], room: int) -> int:
    """Fetches of the rule that knows the future, by its definition."""
    held: set[int] = set()
    fetched = 0
    for i, block in enumerate(uses):
        if block in held:
            continue
        fetched += 1
        if len(held) == room:
            after = uses[i:]
            held.remove(max(held, key=lambda b: after.index(b) if b in after else len(after)))
        held.add(block)
    return fetched
