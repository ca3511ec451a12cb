"""Objects of a real store: whole or not at all, once, and read as other clients read them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import s3fs

import shards
from shards import storage
from shards.errors import ChangedError, DamagedError, StoreError, UserError
from shards.storage import objects, s3
from tests.shards import data
from tools.s3.server import Server

pytestmark = pytest.mark.timeout(120)
SMALL_PART = 5 << 20  # the smallest that S3 takes
NAMES = ("plain", "a b+c%2F&=", "Grüße", "x" * 200, "deep/er/est")


@pytest.fixture
def other(server: Server) -> s3fs.S3FileSystem:
    """Another client, which shares no request of ours."""
    access = server.environment()
    return s3fs.S3FileSystem(
        key=access["AWS_ACCESS_KEY_ID"],
        secret=access["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=server.endpoint,
        use_listings_cache=False,
        skip_instance_cache=True,
    )


@pytest.mark.parametrize("name", NAMES)
def test_two_clients_read_the_same(root: str, other: s3fs.S3FileSystem, name: str) -> None:
    ours, theirs = storage.join(root, "ours", name), storage.join(root, "theirs", name)
    storage.publish(ours, b"one" * 1000)
    other.pipe_file(theirs, b"two" * 1000)
    assert other.cat_file(ours) == b"one" * 1000
    assert storage.read_bytes(theirs) == b"two" * 1000
    assert storage.read_range(theirs, 1, 5) == b"wotw"
    assert storage.size(theirs) == 3000 and storage.exists(theirs)
    assert storage.list(root) == ["ours", "theirs"]
    assert storage.list(storage.join(root, "theirs")) == [name.split("/")[0]]


def test_publish_is_once_unless_told_otherwise(root: str) -> None:
    url = storage.join(root, "record.json")
    assert not storage.exists(url)
    storage.publish(url, b"first")
    with pytest.raises(FileExistsError):
        storage.publish(url, b"second")
    assert storage.read_bytes(url) == b"first"
    storage.publish(url, b"third", replace=True)
    assert storage.read_bytes(url) == b"third"


def test_what_many_publish_at_once_is_what_a_winner_sent(root: str) -> None:
    """Swift may let two of them win; a loser's bytes never show, and no object is a mixture."""

    def publish(number: int) -> bool:
        try:
            storage.publish(storage.join(root, "a"), bytes([number]) * 100_000)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        won = [n for n, one in enumerate(pool.map(publish, range(4))) if one]
    found = storage.read_bytes(storage.join(root, "a"))
    assert found in [bytes([number]) * 100_000 for number in won]


def test_a_range_has_the_length_asked_for_or_is_an_error(root: str) -> None:
    url = storage.join(root, "a")
    storage.publish(url, bytes(range(100)))
    assert storage.read_range(url, 10, 13) == bytes([10, 11, 12])
    assert storage.read_range(url, 99, 100) == bytes([99])
    assert storage.read_range(url, 5, 5) == b""
    with pytest.raises(DamagedError, match=r"\[90, 110\), but the object has 100"):
        storage.read_range(url, 90, 110)
    with pytest.raises(DamagedError, match="ends before"):
        storage.read_range(url, 100, 110)
    assert b"".join(storage.read_chunks(url, 7)) == bytes(range(100))
    storage.publish(storage.join(root, "empty"), b"")
    assert storage.read_bytes(storage.join(root, "empty")) == b""


def test_a_range_of_a_known_version_is_of_no_other(root: str) -> None:
    url = storage.join(root, "a")
    storage.publish(url, b"first")
    size, etag = storage.stat(url)
    assert (size, storage.read_range(url, 0, 5, etag=etag)) == (5, b"first")
    storage.publish(url, b"other", replace=True)
    with pytest.raises(ChangedError):
        storage.read_range(url, 0, 5, etag=etag)


def test_folders_are_listed_over_many_pages_and_nothing_else_is(root: str) -> None:
    with ThreadPoolExecutor(8) as pool:  # the store's pages have 20
        urls = [storage.join(root, "a", f"{n:03}") for n in range(30)]
        beside = [storage.join(root, *place) for place in (("ab",), ("a", "sub", "x"), ("b", "y"))]
        list(pool.map(lambda url: storage.publish(url, b""), [*urls, *beside]))
    assert storage.list(storage.join(root, "a")) == [*(f"{n:03}" for n in range(30)), "sub"]
    assert storage.list(root) == ["a", "ab", "b"]
    assert storage.list(storage.join(root, "none")) == []
    assert storage.exists(storage.join(root, "b")) and storage.exists(root)
    assert not storage.exists(storage.join(root, "0"))


def test_a_folder_is_complete_while_its_parts_are_what_the_manifest_says(root: str) -> None:
    for images in (900, 1000):
        folder = storage.join(root, f"img-{images}")
        storage.publish(storage.join(folder, "deep", "part"), b"12345")
        storage.publish(storage.join(folder, "weights"), b"abc")
        storage.publish(storage.join(folder, ".hidden"), b"")
        assert storage.read_complete(folder) is None
        storage.publish_folder(folder, extra={"images": images})
    found = storage.read_complete(folder, verify="hashes")
    assert found is not None and found["images"] == 1000
    assert [(f["name"], f["bytes"]) for f in found["files"]] == [("deep/part", 5), ("weights", 3)]
    with pytest.raises(FileExistsError):
        storage.publish_folder(folder, extra={})
    assert storage.newest_complete(root) == folder
    storage.publish(storage.join(folder, "weights"), b"abd", replace=True)
    assert storage.read_complete(folder) and not storage.read_complete(folder, verify="hashes")
    storage.publish(storage.join(folder, "weights"), b"ab", replace=True)
    assert storage.newest_complete(root) == storage.join(root, "img-900")


def test_large_data_goes_up_in_parts_and_once(
    root: str, other: s3fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART", SMALL_PART)
    content, url = os.urandom(2 * SMALL_PART + 12_345), storage.join(root, "large")
    storage.publish(url, content)
    size, etag = storage.stat(url)
    assert size == len(content) and str(etag).endswith('-3"')
    assert storage.read_bytes(url) == content == other.cat_file(url)
    with pytest.raises(FileExistsError):
        storage.publish(url, content[::-1])
    assert storage.read_bytes(url) == content
    storage.publish(url, content[::-1], replace=True)
    assert storage.read_bytes(url) == content[::-1]
    assert storage.sweep(root, older=0) == []


PUBLISHER = """
import sys
from shards import storage
from shards.storage import objects, s3
s3.PART, s3.SENDERS = 5 << 20, 1
send = s3._md5_base64
def slowly(data):
    print("part", flush=True)
    sys.stdin.readline()
    return send(data)
s3._md5_base64 = slowly
storage.publish(sys.argv[1], bytes(11 << 20))
"""


def test_a_killed_upload_is_never_seen_and_ends_with_a_sweep(root: str) -> None:
    url = storage.join(root, "sub", "large")
    child = subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdin and child.stdout
        assert child.stdout.readline() == "part\n"
        child.stdin.write("go\n")
        child.stdin.flush()
        assert child.stdout.readline() == "part\n"  # the first one is up
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert storage.list(root) == [] and not storage.exists(url)
    assert storage.sweep(root) == []  # its publisher could be alive
    assert storage.sweep(storage.join(root, "su"), older=0) == []
    assert storage.sweep(root, older=0) == [url]
    assert storage.sweep(root, older=0) == []
    storage.publish(url, b"later")


def test_a_child_by_fork_has_connections_of_its_own(root: str) -> None:
    url = storage.join(root, "a")
    storage.publish(url, b"data")
    ours = objects.store(url)
    pid = os.fork()
    if not pid:
        own = objects.store(url) is not ours
        os._exit(0 if own and storage.read_bytes(url) == b"data" else 1)
    assert storage.read_bytes(url) == b"data"
    assert os.waitpid(pid, 0)[1] == 0


def test_the_store_checks_signatures(root: str, environment: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):  # one wrong, then both
        environment.setenv(name, "selfguide:nobody")
        storage.reconnect()
        for call in (storage.read_bytes, storage.exists, storage.list, _publish):
            with pytest.raises(PermissionError, match=r"credentials .* are refused"):
                call(storage.join(root, "a"))
        with pytest.raises(UserError, match="are refused"):
            _open(root)


def _publish(url: str) -> None:
    storage.publish(url, b"")


def _open(root: str) -> None:
    shards.open(root, global_batch=1, micro_batch=1, rank=0, world=1, seed=0)


@contextmanager
def _closed_port() -> Iterator[int]:
    """Taken, so that no other process listens there, and nobody does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield int(probe.getsockname()[1])


@pytest.mark.parametrize(
    "call",
    [storage.read_bytes, storage.exists, storage.list, storage.read_complete, _publish, _open],
)
def test_what_is_wrong_with_an_address_is_named(
    server: Server, environment: pytest.MonkeyPatch, call: Callable[[str], object]
) -> None:
    with pytest.raises(UserError, match=r"no bucket 'nowhere' at http://127.0.0.1:\d+; create it"):
        call("s3://nowhere/a")
    for name in ("no!bucket", "Up_Per"):  # no client sends the first, no store has the second
        with pytest.raises(UserError, match="no name for S3: give s3://BUCKET/FOLDER"):
            call(f"s3://{name}/a")
    with pytest.raises(UserError, match="names no bucket"):
        call("s3:///a")

    url = f"s3://{server.bucket}/a"
    with _closed_port() as port:
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        storage.reconnect()
        began = time.monotonic()
        with pytest.raises(StoreError, match=r"gave up after \d tries .* EndpointConnectionError"):
            call(url)
    assert time.monotonic() - began < 60

    for name, value, told in (
        ("AWS_ENDPOINT_URL", "nonsense", "Invalid endpoint"),
        ("AWS_PROFILE", "nobody", r"\(nobody\) could not be found"),
    ):
        environment.setenv(name, value)
        storage.reconnect()
        with pytest.raises(UserError, match=told):
            call(url)
        environment.delenv(name)


def test_without_credentials_the_cure_is_named(root: str, environment: pytest.MonkeyPatch) -> None:
    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    storage.reconnect()
    with pytest.raises(PermissionError, match="set AWS_ACCESS_KEY_ID"):
        storage.read_bytes(root)


def test_shards_are_written_and_read_as_on_a_file_system(root: str, tmp_path: Path) -> None:
    local, remote = data.write(tmp_path), data.write(root)  # type: ignore[arg-type]
    assert local.hash == remote.hash
    for shard in local.shards:
        assert storage.sha256(storage.join(root, shard.name)) == shard.sha256
