"""A real store behind a node's cache: samples as of local shards, the store asked once, kills harm nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import shards
import shards.format.manifest
from shards import storage, transfer
from shards.errors import UserError
from shards.read.blocks import Arrays
from shards.read.cache import Cache
from shards.verify import verify
from tests.s3.proxy import Proxy
from tests.shards import data
from tools.shards.__main__ import main

pytestmark = pytest.mark.timeout(120)
COUNT, BLOCKS = 4000, 16


@pytest.fixture
def local(root: str, tmp_path: Path) -> Path:
    data.write(tmp_path / "data", COUNT, shard_bytes=80_000)  # four blocks in a tar
    transfer.copy(tmp_path / "data", root)
    return tmp_path / "data"


def _batches(
    place: object, steps: int = 90, **options: object
) -> tuple[list[Arrays], dict[str, int]]:
    with shards.open(
        place, global_batch=100, micro_batch=50, rank=1, world=2, seed=7, **options
    ) as stream:  # type: ignore[arg-type]
        return [next(stream) for _ in range(steps)], stream.counts


def _same(one: list[Arrays], other: list[Arrays]) -> bool:
    return all(
        a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("mode", ["window", "global"])
@pytest.mark.parametrize("threads", [1, 4])
def test_cache_on_and_off_are_local_bit_for_bit(
    local: Path, root: str, tmp_path: Path, mode: str, threads: int
) -> None:
    expected, _ = _batches(local, mode=mode, window=4)
    options = {"mode": mode, "threads": threads, "window": 4}
    off, _ = _batches(root, **options)
    on, first = _batches(root, cache=tmp_path / "cache", **options)
    again, second = _batches(root, cache=tmp_path / "cache", **options)
    assert _same(expected, off) and _same(expected, on) and _same(expected, again)
    assert first["fetched"] > 0 and first["again"] == 0
    assert (second["fetched"], second["bytes"]) == (0, 0)
    small, counts = _batches(root, cache=tmp_path / "small", cache_bytes=100_000, **options)
    assert _same(expected, small) and counts["fetched"] >= first["fetched"]
    assert Cache(tmp_path / "small", 100_000).used_bytes() <= 100_000


READ = """
import json, sys
import shards
import shards.format.manifest
with shards.open(sys.argv[1], global_batch=100, micro_batch=100, rank=0, world=1, seed=int(sys.argv[3]),
                 cache=sys.argv[2], window=4) as stream:
    print("open", flush=True)
    total = sum(int(next(stream)["ordinal"].sum()) for _ in range(40))
    print(json.dumps({**stream.counts, "sum": total}))
"""


def _reader(root: str, cache: Path, seed: int = 7) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READ, root, str(cache), str(seed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_of_a_node_fetch_each_block_once(local: Path, root: str, tmp_path: Path) -> None:
    readers = [_reader(root, tmp_path / "cache", seed) for seed in (1, 2, 3)]
    said = [json.loads(r.communicate(timeout=100)[0].split("\n")[1]) for r in readers]
    payload = sum(s.bytes for s in shards.format.manifest.load(local).shards)
    assert 0 < sum(s["bytes"] for s in said) <= payload
    assert {s["sum"] for s in said} == {COUNT * (COUNT - 1) // 2}


def test_a_killed_downloader_leaves_a_cache_that_is_good(
    local: Path, root: str, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.fail("delay", times=float("inf"), method="GET", path=".tar", seconds=0.3)
    reader = _reader(root, tmp_path / "cache")
    assert reader.stdout is not None and reader.stdout.readline() == "open\n"
    time.sleep(0.5)  # in the middle of fetching, locks held
    os.kill(reader.pid, signal.SIGKILL)
    reader.communicate()
    proxy.heal()
    began = time.monotonic()
    found, _ = _batches(root, cache=tmp_path / "cache", window=4)
    assert _same(found, _batches(local, window=4)[0]) and time.monotonic() - began < 30


def test_copy_and_repair_go_both_ways(
    local: Path, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["copy", root, str(tmp_path / "back"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 0
    for name in storage.list(storage.join(local, "shards")):
        assert (local / "shards" / name).read_bytes() == (
            tmp_path / "back/shards" / name
        ).read_bytes()
    tar = shards.format.manifest.load(root).shards[2].name
    storage.publish(storage.join(root, tar), b"not a tar", replace=True)
    assert verify(root).problems
    assert main(["repair", root, "--from", str(local)]) == 0
    assert verify(root).problems == () and f"written again: {tar}" in capsys.readouterr().out
    assert main(["diff", root, str(local)]) == 0
    assert main(["inspect", root, "test-0042", "--json"]) == 0
    with pytest.raises(UserError, match="no shards at"):
        main(["copy", storage.join(root, "none"), str(tmp_path / "x")])


def test_a_scan_of_the_store_is_every_sample_once(local: Path, root: str) -> None:
    found = []
    for rank in range(3):
        with shards.scan(root, micro_batch=64, rank=rank, world=3) as scan:
            found += [o for b in scan for o in b["ordinal"][b["mask"]].tolist()]
    assert sorted(found) == list(range(COUNT)) and np.sum(found) > 0
