"""What a store does on a bad day, met by those above it: what names a data set, a node's cache, and writers.

docs/faults.md says which test stands for which fault at which layer; tests/shards/test_faults.py has those of disks.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shards
from shards import storage, transfer
from shards.errors import DamagedError, StoreError, UserError
from shards.format import manifest as manifests
from shards.format.manifest import Manifest
from shards.read.blocks import Arrays
from shards.read.cache import Cache
from shards.read.reader import Reader
from shards.storage import s3
from shards.verify import verify
from shards.write import writer
from tests.s3.proxy import Proxy
from tests.shards import data, inputs
from tools.s3.server import Server
from tools.shards.__main__ import main

pytestmark = pytest.mark.timeout(120)
SMALL_PART = 5 << 20  # the smallest that S3 takes
COUNT, BLOCKS = 600, 3  # two tars
ALWAYS = float("inf")

# what happens to answers, and what the error says when it never stops
PASSING = {
    "short": "another range than was asked for",
    "cut": "ResponseStreamingError|IncompleteReadError",
    "unavailable": "503 SlowDown",
}


@pytest.fixture
def local(tmp_path: Path) -> Path:
    data.write(tmp_path / "local", COUNT)
    return tmp_path / "local"


@pytest.fixture
def manifest(local: Path, root: str) -> Manifest:
    """Of the data set that lies at `local` and, copied, at `root`."""
    transfer.copy(local, root)
    return manifests.load(local)


def _all(root: object, manifest: Manifest, folder: Path) -> tuple[Arrays, dict[str, int]]:
    """Every sample, through a cache."""
    with closing(Reader(root, manifest, cache=Cache(folder))) as reader:  # type: ignore[arg-type]
        return reader.gather(np.arange(manifest.count)), reader.counts


def _same(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


def _pieces(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("*/*-*"))


def _gave_up(fault: str) -> str:
    return "gave up after 6 tries .*(" + PASSING[fault] + ")"


@pytest.mark.parametrize("fault", PASSING)
def test_a_manifest_survives_what_passes_and_names_what_does_not(
    root: str, manifest: Manifest, proxy: Proxy, fault: Any
) -> None:
    for name in ("LATEST", "manifest-", "index-"):
        proxy.fail(fault, times=2, method="GET", path=name)
    found = manifests.load(root)
    assert found.hash == manifest.hash and np.array_equal(found.blocks, manifest.blocks)
    assert proxy.count(fault) == 6
    for name in ("LATEST", "manifest-", "index-"):
        proxy.heal()
        proxy.fail(fault, times=ALWAYS, method="GET", path=name)
        with pytest.raises(StoreError, match=f"{name}.*{_gave_up(fault)}"):
            manifests.load(root)


def test_a_pointer_that_moves_while_it_is_read_names_one_data_set_whole(
    root: str, manifest: Manifest, proxy: Proxy, tmp_path: Path
) -> None:
    other = data.write(tmp_path / "other", 900)
    index, content = "index-", storage.read_bytes(next((tmp_path / "other").glob("index-*")))

    def republish() -> None:
        name = next(n for n in storage.list(root) if n.startswith(index))
        storage.publish(storage.join(root, name), content, replace=True)

    proxy.fail("hook", method="GET", path=index, action=republish)
    with pytest.raises(DamagedError, match="does not have the sha256 that its manifest promises"):
        manifests.load(root)
    manifests.save(root, manifest)
    proxy.fail("hook", method="GET", path="LATEST", action=lambda: manifests.save(root, other))
    found = manifests.load(root)
    assert (found.hash, len(found.blocks)) == (other.hash, len(other.blocks))
    assert proxy.count("hook") == 2


def test_an_expired_token_is_named_by_whoever_opens_a_data_set(
    root: str, manifest: Manifest, proxy: Proxy, server: Server, environment: pytest.MonkeyPatch
) -> None:
    dev = next(iter(server.secrets))
    proxy.expire(dev)
    with pytest.raises(UserError, match=f"cannot be read: .*access key {dev}.* are refused"):
        manifests.load(root)
    for name, value in server.environment(1).items():
        if name != "AWS_ENDPOINT_URL":
            environment.setenv(name, value)
    assert manifests.load(root).hash == manifest.hash


@pytest.mark.parametrize("fault", PASSING)
def test_filling_a_cache_survives_what_passes_and_keeps_nothing_of_what_does_not(
    root: str, local: Path, manifest: Manifest, proxy: Proxy, tmp_path: Path, fault: Any
) -> None:
    expected, folder = shards.read_all(local), tmp_path / "cache"
    proxy.fail(fault, times=ALWAYS, method="GET", path="00001-of")
    with pytest.raises(StoreError, match=_gave_up(fault)):
        _all(root, manifest, folder)
    whole = {f"{a}-{b}" for a, b in _spans(manifest)}
    assert set(_pieces(folder)) < whole
    proxy.heal()
    proxy.fail(fault, times=2, method="GET", path="00001-of")
    before = proxy.count(fault)
    found, counts = _all(root, manifest, folder)
    assert _same(found, expected) and counts["again"] == 0 and proxy.count(fault) == before + 2
    assert set(_pieces(folder)) == whole
    proxy.fail("unavailable", times=ALWAYS)  # nobody is asked any more
    found, counts = _all(root, manifest, folder)
    assert _same(found, expected) and counts["cached"] == BLOCKS


def _spans(manifest: Manifest) -> list[tuple[int, int]]:
    rows = manifest.blocks
    stops = (rows["offset"] + rows["bytes"]).max(axis=1)
    return [*zip(rows["offset"].min(axis=1).tolist(), stops.tolist(), strict=True)]


def test_a_tar_replaced_while_a_cache_is_filled_is_never_kept(
    root: str, local: Path, manifest: Manifest, proxy: Proxy, tmp_path: Path
) -> None:
    expected, folder = shards.read_all(local), tmp_path / "cache"
    name = manifest.shards[1].name
    url, right = storage.join(root, name), (local / name).read_bytes()

    def publish(content: bytes) -> Callable[[], None]:
        return lambda: storage.publish(url, content, replace=True)

    def wrong_for_a_moment() -> None:
        publish(right[::-1])()
        proxy.fail("hook", method="HEAD", path="00001-of", action=publish(right))

    proxy.fail("hook", method="GET", path="00001-of", action=wrong_for_a_moment)
    assert _same(_all(root, manifest, folder)[0], expected) and proxy.count("hook") == 2

    proxy.fail("hook", method="GET", path="00001-of", action=publish(right[::-1]))
    with pytest.raises(DamagedError, match="does not have its xxh3"):
        _all(root, manifest, tmp_path / "second")
    blocks = np.flatnonzero(manifest.blocks["shard"] == 0)
    assert len(_pieces(tmp_path / "second")) == len(blocks)
    publish(right)()
    assert _same(_all(root, manifest, tmp_path / "second")[0], expected)


def test_a_token_that_expires_while_a_cache_is_filled_is_named_and_what_is_kept_serves(
    root: str, manifest: Manifest, local: Path, proxy: Proxy, server: Server, tmp_path: Path,
    environment: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    expected, (dev, _) = shards.read_all(local), server.secrets
    first = np.arange(int(manifest.blocks["rows"][0]))
    with closing(Reader(root, manifest, cache=Cache(tmp_path / "cache"))) as reader:
        reader.gather(first)
        proxy.expire(dev)
        assert np.array_equal(reader.gather(first)["x"], expected["x"][first])
    with closing(Reader(root, manifest, cache=Cache(tmp_path / "cache"))) as reader:
        assert np.array_equal(reader.gather(first)["x"], expected["x"][first])
        with pytest.raises(PermissionError, match=f"access key {dev}"):
            reader.gather(np.arange(COUNT))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        environment.setenv(name, server.environment(1)[name])
    found, counts = _all(root, manifest, tmp_path / "cache")
    assert _same(found, expected) and counts["cached"] >= 1


def test_pictures_through_a_storm_are_those_that_lie_locally(
    root: str, proxy: Proxy, tmp_path: Path
) -> None:
    """One sample per key: members are found by the index and their bytes compared, headers included."""
    inputs.image_folder(tmp_path / "in", inputs.pixels(600, 6))
    pictures, make = tmp_path / "pictures", ["make", "folder", str(tmp_path / "in"), "--shard-mb"]
    assert main([*make, "0.5", "--out", str(pictures)]) == 0
    assert main(["copy", str(pictures), root]) == 0
    expected, manifest = shards.read_all(pictures), manifests.load(pictures)
    assert manifest.layout == "samples"
    for number, fault in enumerate((*PASSING, "flip")):
        proxy.fail(fault, times=3, every=2 + number, method="GET", path=".tar")  # type: ignore[arg-type]
    for turn in range(3):
        found, counts = _all(root, manifest, tmp_path / f"cache{turn}")
        assert _same(found, expected) and counts["cached"] == 0
    assert all(proxy.count(fault) for fault in (*PASSING, "flip"))
    proxy.fail("flip", times=ALWAYS, method="GET", path=".tar")
    with pytest.raises(DamagedError, match="xxh3"):
        _all(root, manifest, tmp_path / "never")
    assert _pieces(tmp_path / "never") == []


def _write(root: object, stop_after: int | None = None) -> Manifest:
    """The data set of `local`; with `stop_after` the writer ends behind as many shards."""

    def watch(items: Any, total: int) -> Any:
        for number, one in enumerate(items):
            yield one
            if number + 1 == stop_after:
                raise KeyboardInterrupt

    given = {"header": data.LATENT, "seed": 3, "shard_bytes": 40_000, "watch": watch}
    return writer.write(root, data.source(COUNT), **given)[0]  # type: ignore[arg-type]


def _as_local(root: str, local: Path) -> bool:
    paths = [p for p in sorted(local.rglob("*")) if p.is_file()]
    found = {p.relative_to(local).as_posix(): p.read_bytes() for p in paths}
    return all(storage.read_bytes(storage.join(root, n)) == found[n] for n in found)


@pytest.mark.parametrize("fault", [*PASSING, "lost", "reset", "flip_sent"])
def test_a_writer_survives_what_passes_also_when_it_goes_on(
    root: str, local: Path, proxy: Proxy, fault: Any
) -> None:
    """Short and cut answers hit the records it reads when it goes on, the others what it sends."""
    with pytest.raises(KeyboardInterrupt):
        _write(root, stop_after=1)
    assert not storage.exists(storage.join(root, "LATEST"))
    before = len(proxy.seen)
    if fault in ("short", "cut"):
        proxy.fail(fault, times=3, method="GET", path="shards/train")
    else:
        proxy.fail(fault, times=4, every=2, method="PUT")
    assert _write(root).hash == manifests.load(local).hash
    assert proxy.count(fault) >= 3 and _as_local(root, local)
    sent = [path for method, path, _ in proxy.seen[before:] if method == "PUT"]
    assert sent and not any(
        "00000-of" in path for path in sent
    )  # it believed the record, and built only what was missing


def test_a_writer_whose_store_goes_away_ends_and_goes_on_when_it_is_back(
    root: str, local: Path, proxy: Proxy
) -> None:
    for path in ("00001-of-00002.tar", "00001-of-00002.json", "manifest-", "LATEST"):
        proxy.fail("unavailable", times=ALWAYS, method="PUT", path=path)
        with pytest.raises(StoreError, match=f"{path}.*gave up after 6 tries .* 503 SlowDown"):
            _write(root)
        proxy.heal()
        assert not storage.exists(storage.join(root, "LATEST"))
    assert _write(root).hash == manifests.load(local).hash and _as_local(root, local)


def test_an_object_replaced_between_the_parts_of_an_upload_is_one_or_the_other(
    root: str, proxy: Proxy, environment: pytest.MonkeyPatch
) -> None:
    environment.setattr(s3, "PART", SMALL_PART)
    url, content = storage.join(root, "large"), bytes(SMALL_PART + 1)
    beside = lambda: storage.publish(url, b"another's", replace=True)  # noqa: E731
    proxy.fail("hook", method="PUT", path="partNumber=2", action=beside)
    with pytest.raises(FileExistsError):
        storage.publish(url, content)
    assert storage.read_bytes(url) == b"another's" and storage.sweep(root, older=0) == []
    proxy.fail("hook", method="PUT", path="partNumber=2", action=beside)
    storage.publish(url, content, replace=True)
    assert storage.read_bytes(url) == content and proxy.count("hook") == 2


def test_a_tar_replaced_while_it_is_copied_is_not_copied(
    root: str, local: Path, manifest: Manifest, proxy: Proxy, tmp_path: Path
) -> None:
    url = storage.join(root, manifest.shards[1].name)
    wrong = bytes(manifest.shards[1].bytes)
    replaced = lambda: storage.publish(url, wrong, replace=True)  # noqa: E731
    proxy.fail("hook", method="GET", path="00001-of-00002.tar", action=replaced)
    with pytest.raises(DamagedError, match="does not have its sha256: it cannot be copied"):
        transfer.copy(root, tmp_path / "back")
    assert not (tmp_path / "back" / "LATEST").exists() and proxy.count("hook") == 1
    assert transfer.repair(root, local).written == (manifest.shards[1].name,)
    assert transfer.copy(root, tmp_path / "back").kept == 1
    assert verify(tmp_path / "back").problems == ()


def test_a_token_that_expires_while_a_writer_works_is_renewed_or_named(
    root: str, local: Path, proxy: Proxy, server: Server, environment: pytest.MonkeyPatch
) -> None:
    dev, spare = server.secrets
    environment.setenv("AWS_SHARED_CREDENTIALS_FILE", str(local.parent / "none"))
    late = "00001-of-00002.tar"
    proxy.fail("hook", method="PUT", path=late, action=lambda: proxy.expire(dev))
    with pytest.raises(PermissionError, match=f"access key {dev}"):
        _write(root)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        environment.setenv(name, server.environment(1)[name])
    assert not storage.exists(storage.join(root, "LATEST"))
    assert _write(root).hash == manifests.load(local).hash and _as_local(root, local)
    proxy.expire(spare)
    with pytest.raises(PermissionError, match=f"access key {spare}"):
        _write(root)


PUBLISHER = """
import sys
from shards import transfer
from shards.storage import s3
s3.PART, s3.SENDERS = 5 << 20, 1
send = s3._md5_base64
def slowly(data):
    if len(data) > 100_000:
        print("part", flush=True)
        sys.stdin.readline()
    return send(data)
s3._md5_base64 = slowly
transfer.copy(sys.argv[1], sys.argv[2])
"""


def test_a_copy_killed_between_parts_is_no_data_set_and_sweep_ends_what_it_left(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = data.source(3000, shape=(4, 16, 16))
    writer.write(tmp_path / "big", source, header=data.LATENT, shard_bytes=16 << 20)
    tar = manifests.load(tmp_path / "big").shards[0]
    assert tar.bytes > SMALL_PART
    child = subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, str(tmp_path / "big"), root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdin and child.stdout and child.stdout.readline() == "part\n"
        child.stdin.write("go\n")
        child.stdin.flush()
        assert child.stdout.readline() == "part\n"  # the first one is up
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    with pytest.raises(UserError, match="no shards at"):
        manifests.load(root)
    assert main(["sweep", root]) == 0  # it could be alive
    assert "nothing below" in capsys.readouterr().out
    assert main(["sweep", root, "--older", "0", "--json"]) == 0
    ended = [storage.join(root, tar.name)]
    assert json.loads(capsys.readouterr().out) == {"root": root, "ended": ended}
    assert main(["copy", str(tmp_path / "big"), root]) == 0 and verify(root).problems == ()


def test_who_may_write_but_not_look_for_uploads_is_told_and_has_written(
    root: str, local: Path, proxy: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.fail("expired", times=ALWAYS, method="GET", path="uploads")
    assert main(["copy", str(local), root]) == 0
    assert f"unfinished uploads below {root} were not looked for" in capsys.readouterr().err
    assert proxy.count("expired") and verify(root).problems == ()
