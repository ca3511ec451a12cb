"""Mapped files: more of them than may be open, gone with their last view, and never read behind their end."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import shards
from shards.read import stream
from shards.read.cache import Cache
from shards.read.mapped_files import is_mapped, map_file
from shards.read.reader import Reader
from tests.shards.data import write


def _mappings(path: Path, what: str = "") -> int:
    """How often this process has mapped files below `path`, as the kernel tells."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(path) in line and line.endswith(what) for line in lines)


def _open() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def test_a_mapping_is_the_file_and_needs_no_descriptor(tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(10_000)
    (tmp_path / "a").write_bytes(content)
    before = _open()
    found = map_file(tmp_path / "a", 9_000)
    assert _open() == before
    assert found.tobytes() == content[:9_000] and found.dtype == np.uint8
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1
    with pytest.raises(ValueError, match="shorter than 10,001"):
        map_file(tmp_path / "a", 10_001)
    with pytest.raises(FileNotFoundError):
        map_file(tmp_path / "b", 1)
    with pytest.raises(OSError, match="Invalid argument"):
        map_file(tmp_path / "a", 0)
    part = np.asarray(found[100:200]).view(np.uint16).reshape(5, 10)
    assert is_mapped(found) and is_mapped(part) and not is_mapped(part.copy())
    (tmp_path / "a").unlink()
    del found
    gc.collect()
    assert part.tobytes() == content[100:200] and _mappings(tmp_path) == 1
    del part
    gc.collect()
    assert _mappings(tmp_path) == 0


FEW = """
import resource, sys
import numpy as np, shards
from shards.read import stream
from shards.read.reader import Reader
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
if sys.argv[2] == "cached":  # as of S3
    stream.Reader = lambda *given, **options: Reader(*given, mapped=False, **options)
given = {"global_batch": 200, "micro_batch": 200, "rank": 0, "world": 1, "seed": 0}
with shards.open(sys.argv[1], cache=sys.argv[3], **given) as read:
    print(len(np.unique(np.concatenate([next(read)["ordinal"] for _ in range(100)]))))
"""


@pytest.mark.parametrize("way", ["mapped", "cached"])
def test_more_tars_are_read_than_may_be_open(tmp_path: Path, way: str) -> None:
    assert len(write(tmp_path / "data", 20_000, shard_bytes=1).shards) == 79
    command = [sys.executable, "-c", FEW, str(tmp_path / "data"), way, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "20000\n"), done.stderr


def test_a_cache_that_sources_share_keeps_few_files_that_are_gone(tmp_path: Path) -> None:
    """Each of the two would fit into it; both do not, so one makes room by deleting what the other has mapped."""
    found = [write(tmp_path / name, count) for name, count in (("a", 4000), ("b", 4200))]
    sizes = [sum(s.bytes for s in manifest.shards) for manifest in found]
    budget = max(sizes) + 1000
    for beside in (True, False):
        folder = tmp_path / f"cache-{beside}"
        for i, manifest in enumerate(found):
            others = [found[1 - i]] if beside else []
            root = tmp_path / "ab"[i]
            cache = Cache(folder, budget)
            reader = Reader(root, manifest, mapped=False, cache=cache, beside=others)
            with closing(reader):
                reader.gather(np.arange(manifest.count))
                assert _mappings(folder) == (1 if beside else len(manifest.blocks))
            del reader
            gc.collect()


def test_a_mixture_larger_than_its_cache_leaves_no_deleted_file_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is deleted and mapped stays on the disk, beyond the budget."""
    monkeypatch.setattr(stream, "Reader", functools.partial(Reader, mapped=False))  # as of S3
    found = [write(tmp_path / name, count) for name, count in (("a", 4000), ("b", 3900))]
    room = max(sum(s.bytes for s in manifest.shards) for manifest in found)
    given = {"global_batch": 100, "micro_batch": 100, "rank": 0, "world": 1, "seed": 0, "window": 2}
    with shards.open(
        [tmp_path / "a", tmp_path / "b"], weights=[1, 1], cache=tmp_path / "cache", cache_bytes=room + 1, **given
    ) as read:  # fmt: skip
        most = 0
        for _ in range(160):
            next(read)
            most = max(most, _mappings(tmp_path / "cache", "(deleted)"))
        assert read.counts["fetched"] > 0 and most <= 4
