"""What disks and kills do to a data set, a cache and a writer: always noticed, never believed, never a hang.

docs/faults.md says which test stands for which fault at which layer; tests/s3/test_layers.py has those of stores.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import shards
from shards import storage, transfer
from shards.errors import DamagedError, UserError
from shards.format import manifest as manifests
from shards.format.manifest import Manifest
from shards.read.cache import Cache
from shards.read.reader import Reader
from shards.verify import verify
from shards.write import writer
from tests.shards import inputs
from tests.shards.data import LATENT, names, source, write
from tests.shards.disks import disk
from tools.shards.__main__ import main

pytestmark = pytest.mark.timeout(120)


def _flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def _tree(root: Path) -> dict[str, bytes]:
    paths = [p for p in sorted(root.rglob("*")) if p.is_file()]
    return {str(p.relative_to(root)): p.read_bytes() for p in paths}


def _temporary(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.name.endswith(".tmp"))


def _outside(manifest: Manifest, shard: int) -> np.ndarray:
    """Bytes of a tar that are no payload: headers of members and arrays, padding, the end."""
    rows = manifest.blocks[manifest.blocks["shard"] == shard]
    found = np.ones(manifest.shards[shard].bytes, dtype=bool)
    for start, size in zip(rows["offset"].ravel(), rows["bytes"].ravel(), strict=True):
        found[int(start) : int(start + size)] = False
    return np.flatnonzero(found)


def test_a_bit_in_any_header_of_a_tar_is_found_and_costs_no_sample(tmp_path: Path) -> None:
    """Readers of tars stop in silence at such a header; ours goes by the index, and verify tells."""
    manifest = write(tmp_path, 600)
    path, sound = tmp_path / manifest.shards[0].name, shards.read_all(tmp_path)
    whole = path.read_bytes()
    outside = _outside(manifest, 0)
    rng = np.random.default_rng(0)
    for at in [0, 150, *rng.choice(outside, 40, replace=False).tolist(), int(outside[-1])]:
        _flip(path, 8 * int(at) + int(rng.integers(8)))
        assert "the sha256 is not the manifest's" in verify(tmp_path).problems[0]
        found = shards.read_all(tmp_path)
        assert all(np.array_equal(found[name], sound[name]) for name in sound)
        path.write_bytes(whole)
    second = int(manifest.blocks[0]["offset"][1]) // 512 * 512 - 512  # header of the second member
    _flip(path, 8 * (second + 150))
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 1  # as said above: the rest is gone, without a word
    assert verify(tmp_path).problems and len(shards.read_all(tmp_path)["x"]) == 600


@pytest.mark.parametrize("name", ["LATEST", "manifest-*.json", "index-*.npy"])
def test_a_bit_or_an_end_that_is_missing_of_what_names_the_rest_is_found(
    tmp_path: Path, name: str
) -> None:
    """Each bit of LATEST and of the index's header; of longer files every few bits, and 40 ends."""
    expected = write(tmp_path, 600).hash
    path = next(tmp_path.glob(name))
    whole = path.read_bytes()
    step = 1 if name == "LATEST" else max(1, len(whole) * 8 // 300) | 1
    believed = []
    for bit in range(0, 8 * len(whole), step):
        _flip(path, bit)
        with contextlib.suppress(DamagedError, UserError):
            assert manifests.load(tmp_path).hash == expected
            believed.append(whole[bit // 8 : bit // 8 + 1])
        path.write_bytes(whole)
    assert all(byte.isspace() for byte in believed) and len(believed) <= 8
    for end in np.linspace(0, len(whole) - 2, 40).astype(int):
        path.write_bytes(whole[:end])
        with pytest.raises((DamagedError, UserError)):
            manifests.load(tmp_path)


@pytest.mark.parametrize("damage", ["bit", "end"])
def test_a_record_that_rots_while_a_writer_is_away_is_made_anew(
    tmp_path: Path, damage: str
) -> None:
    """The record is all that the next call knows of a shard: a wrong digit in it would enter the manifest."""

    def resume(root: Path) -> int:
        built: list[bool] = []

        def watch(items, total):
            for one in items:
                built.append(one)
                yield one

        given = {"header": LATENT, "seed": 3, "shard_bytes": 1, "watch": watch}
        writer.write(root, source(600), **given)
        return sum(built)

    resume(tmp_path)
    tree = _tree(tmp_path)
    record = sorted(tmp_path.glob("shards/*.json"))[1]
    rng = np.random.default_rng(1)
    size = record.stat().st_size
    for place in rng.integers(0, size, 30).tolist():
        if damage == "bit":
            _flip(record, 8 * place + int(rng.integers(8)))
        else:
            os.truncate(record, place)
        assert len(verify(tmp_path).problems) == 1
        (tmp_path / "LATEST").unlink()
        assert resume(tmp_path) == 1
        assert _tree(tmp_path) == tree


def test_a_record_of_before_that_has_no_digest_is_sound_and_is_made_anew(tmp_path: Path) -> None:
    write(tmp_path, 600)
    record = next(tmp_path.glob("shards/*.json"))
    sealed = record.read_bytes()
    plain = json.loads(sealed)
    del plain[manifests.SEAL]
    record.write_text(json.dumps(plain))
    assert verify(tmp_path).problems == ()
    (tmp_path / "LATEST").unlink()
    write(tmp_path, 600)
    assert record.read_bytes() == sealed


def test_what_a_first_look_kept_is_looked_at_again_where_it_rotted(tmp_path: Path) -> None:
    """A wrong digit in the sha256 of an input would make the input the liar."""
    pictures = inputs.image_folder(tmp_path / "in", inputs.pixels(40))
    (pictures / "a" / "bad.png").write_text("no picture")
    command = ["make", "folder", str(pictures), "--max-skipped", "1", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 0
    tree = _tree(tmp_path / "out")
    part = next((tmp_path / "out" / "source").iterdir())
    rng = np.random.default_rng(0)
    for place in [*rng.integers(0, part.stat().st_size, 8).tolist(), None]:
        (tmp_path / "out" / "LATEST").unlink()
        if place is None:
            os.truncate(part, 100)
        else:
            _flip(part, 8 * place + int(rng.integers(8)))
        assert main([*command, str(tmp_path / "out")]) == 0
        assert _tree(tmp_path / "out") == tree


READ = """
import sys
import shards
with shards.open(sys.argv[1], global_batch=64, micro_batch=64, rank=0, world=1, seed=0) as stream:
    for _ in range(3):
        next(stream)
    print("reading", flush=True)
    while True:
        next(stream)
"""


def test_a_killed_reader_leaves_no_trace_and_no_lock(tmp_path: Path) -> None:
    write(tmp_path, 600)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in _tree(tmp_path)}
    reader = subprocess.Popen(
        [sys.executable, "-c", READ, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert reader.stdout is not None and reader.stdout.readline() == "reading\n"
    finally:
        os.kill(reader.pid, signal.SIGKILL)
        reader.communicate()
    assert {n: (tmp_path / n).stat().st_mtime_ns for n in _tree(tmp_path)} == before
    assert verify(tmp_path).problems == () and len(shards.read_all(tmp_path)["x"]) == 600


PUBLISH = """
import itertools, sys
from shards import storage
print("ready", flush=True)
for i in itertools.count():
    storage.publish(sys.argv[1], bytes([i % 250]) * 4_000_000, replace=True)
"""


def test_a_killed_publisher_leaves_one_version_or_the_other(tmp_path: Path) -> None:
    url = tmp_path / "a"
    storage.publish(url, bytes(4_000_000))
    for pause in (0.05, 0.07, 0.11):
        child = subprocess.Popen(
            [sys.executable, "-c", PUBLISH, str(url)], stdout=subprocess.PIPE, text=True
        )
        try:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(pause)
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.communicate()
        found = np.fromfile(url, dtype=np.uint8)
        assert len(found) == 4_000_000 and (found == found[0]).all()
    left = [str(p) for p in _temporary(tmp_path)]
    assert list(storage.sweep(tmp_path, older=0)) == left and names(tmp_path) == ["a"]


def test_a_full_disk_is_read_as_any_other_and_keeps_its_pointer(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", 4 << 20) as small:
        root = small.path / "data"
        manifest = write(root, 600)
        small.fill()
        assert verify(root).problems == () and len(shards.read_all(root)["x"]) == 600
        other = tmp_path / "other"
        longer = write(other, 900)
        with pytest.raises(UserError, match=r"cannot be written \(No space.*make room there"):
            manifests.save(root, longer)
        assert manifests.load(root).hash == manifest.hash and _temporary(root) == []


def test_nothing_is_half_published_on_a_full_disk(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", 1 << 20) as small:
        url = small.path / "sub" / "a"
        with pytest.raises(UserError, match=r"a: its 2,000,000 bytes cannot be written \(No space"):
            storage.publish(url, bytes(2_000_000))
        assert names(small.path / "sub") == []
        storage.publish(url, b"old" * 1000)
        small.fill()
        with pytest.raises(UserError, match="the same command goes on"):
            storage.publish(url, b"new" * 100_000, replace=True)
        assert storage.read_bytes(url) == b"old" * 1000 and names(url.parent) == ["a"]
        (small.path / "filler").unlink()
        storage.publish(url, b"new" * 100_000, replace=True)
        assert storage.read_bytes(url) == b"new" * 100_000


def test_a_cache_on_a_full_disk_is_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = write(tmp_path / "data", 3000)
    expected = shards.read_all(tmp_path / "data")

    def read(folder: Path) -> dict[str, int]:
        with closing(
            Reader(tmp_path / "data", manifest, mapped=False, cache=Cache(folder))
        ) as reader:
            found = reader.gather(np.arange(3000))
            assert all(np.array_equal(found[name], expected[name]) for name in expected)
            return reader.counts

    with disk(tmp_path / "disk", 128 << 10) as small:
        folder = small.path / "cache"
        with caplog.at_level(logging.WARNING, "shards"):
            assert read(folder)["cached"] == 0
        assert caplog.text.count("No space left on device; reading goes on without it") == 1
        kept = len([*folder.glob("*/*-*")])
        assert 0 < kept < 12 and _temporary(folder) == []
        small.fill()
        with pytest.raises(
            UserError, match=r"No space left .*name a folder on a disk of this node"
        ):
            Cache(small.path / "another")  # not even the count of its bytes can be written
        (small.path / "filler").unlink()
        small.resize(2 << 20)
        assert read(folder)["cached"] == kept and read(folder)["cached"] == 12


@pytest.mark.parametrize("of", ["bytes", "files"])
def test_a_disk_that_fills_while_a_cache_is_in_use_harms_no_batch(tmp_path: Path, of: str) -> None:
    manifest = write(tmp_path / "data", 3000)
    expected = shards.read_all(tmp_path / "data")
    with disk(tmp_path / "disk", 1 << 20, files=9 if of == "files" else 1000) as small:
        cache = Cache(small.path / "cache")
        with closing(Reader(tmp_path / "data", manifest, mapped=False, cache=cache)) as reader:
            for start in range(0, 3000, 300):
                if start == 900 and of == "bytes":
                    small.fill()
                found = reader.gather(np.arange(start, start + 300))
                rows = slice(start, start + 300)
                assert all(np.array_equal(found[n], expected[n][rows]) for n in expected)
        assert cache.refused > 0 and _temporary(small.path) == []


def test_a_bit_beside_the_samples_of_a_cache_is_no_sample(tmp_path: Path) -> None:
    """Headers of later members lie in a block's piece; the count of bytes is the folder's own header."""
    manifest = write(tmp_path / "data", 1000)
    expected = shards.read_all(tmp_path / "data")
    folder = tmp_path / "cache"

    def read() -> dict[str, int]:
        with closing(
            Reader(tmp_path / "data", manifest, mapped=False, cache=Cache(folder, 10**6))
        ) as reader:
            found = reader.gather(np.arange(1000))
            assert all(np.array_equal(found[name], expected[name]) for name in expected)
            return reader.counts

    read()
    held, rng = Cache(folder).used_bytes(), np.random.default_rng(0)
    for piece in sorted(folder.glob("*/*-*")):
        tar, start = piece.parent.name, int(piece.name.split("-")[0])
        shard = [s.sha256 for s in manifest.shards].index(tar)
        outside = _outside(manifest, shard) - start
        inside = outside[(outside >= 0) & (outside < piece.stat().st_size)]
        for at in rng.choice(inside, 5).tolist():
            _flip(piece, 8 * at + int(rng.integers(8)))
    for bit in range(8):
        _flip(folder / "room", bit)
        counts = read()
        assert (counts["cached"], counts["fetched"]) == (4, 0)
        assert (folder / "room").read_text() == str(held)


def _make(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.shards", "make", "synthetic", "--out", str(out)]
    command += ["--count", "6144", "--shape", "4", "8", "8", "--shard-mb", "0.4", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def _refused(done: subprocess.CompletedProcess[str], root: Path) -> None:
    """One line and exit 2; finished shards and nothing else, and no data set."""
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(
        r"error: .*cannot be written \(No space left on device\): make room there.*\n", done.stderr
    )
    assert _temporary(root) == [] and not (root / "LATEST").exists()
    tars = {p.stem for p in root.glob("shards/*.tar")}
    records = {p.stem for p in root.glob("shards/*.json")}
    assert 0 < len(records) <= len(tars) <= len(records) + 1


def test_a_writer_on_a_full_disk_says_so_and_goes_on_where_room_is_made(tmp_path: Path) -> None:
    assert _make(tmp_path / "whole").returncode == 0
    with disk(tmp_path / "disk", 2 << 20) as small:
        root = small.path / "data"
        _refused(_make(root), root)
        small.resize(8 << 20)
        assert _make(root).returncode == 0 and _tree(root) == _tree(tmp_path / "whole")
    with disk(tmp_path / "second", 2 << 20) as small:
        root = small.path / "copy"
        with pytest.raises(UserError, match="make room there"):
            transfer.copy(tmp_path / "whole", root)
        assert _temporary(root) == [] and not (root / "LATEST").exists()
        small.resize(8 << 20)
        assert transfer.copy(tmp_path / "whole", root).kept > 0
        assert verify(root).problems == ()


def test_sweep_and_a_writers_end_are_of_what_is_a_day_old(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    write(root, 300)
    hours = {h: root / "shards" / f".a.{h:012x}.tmp" for h in (1, 23, 25, 50)}
    for age, path in hours.items():
        path.write_bytes(b"left by a writer that was killed")
        then = time.time() - 3600 * age
        os.utime(path, (then, then))
    tree = {n: c for n, c in _tree(root).items() if not n.endswith(".tmp")}
    assert main(["sweep", str(root), "--older", "30", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ended"] == [str(hours[50])]
    assert (
        main(["copy", str(root), str(root)]) == 0
    )  # nothing to copy, but it ends as all writers do
    assert f"more than a day ago: {hours[25]}\n" in capsys.readouterr().err
    assert _temporary(root) == [hours[1], hours[23]]
    assert {n: c for n, c in _tree(root).items() if not n.endswith(".tmp")} == tree
    with pytest.raises(UserError, match="--older -1: give hours"):
        main(["sweep", str(root), "--older", "-1"])
