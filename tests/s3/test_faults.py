"""Whatever network and store do: the same bytes after some tries, or a named error; no silence, no hang."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shards
from shards import storage
from shards.errors import ChangedError, DamagedError, StoreError
from shards.read.reader import Reader
from shards.read.stream import Stream
from shards.storage import s3, s3_requests
from shards.storage.retry import RetryPolicy
from tests.s3.conftest import QUICK
from tests.s3.proxy import Proxy
from tests.shards import data
from tools.s3.server import Server

pytestmark = pytest.mark.timeout(120)
SMALL_PART = 5 << 20  # the smallest that S3 takes
CONTENT = np.random.default_rng(0).bytes(300_000)

# what happens to an answer, and what the error says when it happens each time
FAULTS = {
    "unavailable": "503 SlowDown",
    "reset": "ConnectionClosedError",
    "lost": "ConnectionClosedError",
    "cut": "ResponseStreamingError|IncompleteReadError",
    "short": "another range than was asked for",
    "understated": "an answer of another length than its range",
    "shifted": "another range than was asked for",
    "garbled": "another range than was asked for",
    "unlabelled": "200 without the range that was asked for",
}


@pytest.fixture
def url(root: str) -> str:
    storage.publish(storage.join(root, "a"), CONTENT)
    return storage.join(root, "a")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_range_survives_what_passes(url: str, proxy: Proxy, fault: Any) -> None:
    proxy.fail(fault, times=3)
    assert storage.read_range(url, 1000, 250_001) == CONTENT[1000:250_001]
    assert (proxy.count(fault), proxy.count("")) == (3, 1)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_pass_is_a_named_error_within_seconds(
    url: str, proxy: Proxy, fault: Any
) -> None:
    proxy.fail(fault, times=float("inf"))
    began = time.monotonic()
    with pytest.raises(StoreError) as raised:
        storage.read_range(url, 1000, 250_001)
    assert time.monotonic() - began < QUICK.seconds + QUICK.silence
    told = str(raised.value)
    assert told.startswith(f"{url} at {proxy.url}: gave up after 6 tries in ")
    assert any(f"6 x {reason}" in told for reason in FAULTS[fault].split("|"))
    assert proxy.count(fault) == QUICK.attempts

    proxy.heal()
    assert storage.read_range(url, 1000, 250_001) == CONTENT[1000:250_001]


@pytest.mark.parametrize("fault", ["delay", "drip"])
def test_a_store_that_answers_too_slowly_is_asked_again(
    url: str, proxy: Proxy, environment: pytest.MonkeyPatch, fault: Any
) -> None:
    """One that is silent, and one that sends a little now and then, which no socket's timeout notices."""
    environment.setattr(s3_requests, "POLICY", replace(QUICK, silence=1.0))
    proxy.fail(fault, seconds={"delay": 2.0, "drip": 0.004}[fault])
    began = time.monotonic()
    assert storage.read_range(url, 0, 300_000) == CONTENT
    assert (proxy.count(fault), proxy.count("")) == (1, 1)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_an_object_and_a_listing_survive_a_storm(url: str, proxy: Proxy, method: str) -> None:
    proxy.fail("unavailable", times=4, method=method)
    assert storage.read_bytes(url) == CONTENT
    proxy.fail("cut", times=2, method="GET", path="list-type=2")
    proxy.fail("unavailable", times=2, method="GET", path="list-type=2")
    assert storage.list(os.path.dirname(url)) == ["a"]  # noqa: PTH120 (a url)
    assert proxy.count("unavailable") == 6 and proxy.count("cut") == 2


def test_a_replacement_between_two_ranges_is_never_a_mixture(url: str, proxy: Proxy) -> None:
    new = CONTENT[::-1]

    def publish(content: bytes) -> Callable[[], None]:
        return lambda: storage.publish(url, content, replace=True)

    proxy.fail("hook", method="GET", action=publish(new))  # before the first range
    assert storage.read_bytes(url) == new

    chunks = storage.read_chunks(url, 200_000)
    assert next(chunks) == new[:200_000]
    publish(CONTENT)()
    with pytest.raises(ChangedError):
        next(chunks)

    flips = iter(range(1000))
    proxy.fail(
        "hook",
        times=float("inf"),
        method="GET",
        action=lambda: storage.publish(url, str(next(flips)).encode(), replace=True),
    )
    with pytest.raises(ChangedError):
        storage.read_bytes(url)


def _profile(path: Path, variables: dict[str, str]) -> None:
    path.write_text(
        f"[default]\naws_access_key_id = {variables['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {variables['AWS_SECRET_ACCESS_KEY']}\n"
    )


def test_an_expired_token_is_renewed_from_the_profile_or_named(
    url: str, proxy: Proxy, server: Server, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    profile, (dev, spare) = tmp_path / "credentials", server.secrets
    environment.delenv("AWS_ACCESS_KEY_ID")
    environment.delenv("AWS_SECRET_ACCESS_KEY")
    environment.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    _profile(profile, server.environment(0))
    storage.reconnect()
    assert storage.read_bytes(url) == CONTENT

    proxy.expire(dev)
    for call in (storage.read_bytes, storage.exists):  # GET says so; HEAD only says 403
        with pytest.raises(PermissionError, match=f"access key {dev}"):
            call(url)
    with pytest.raises(PermissionError, match="expired, and environment and profile hold no newer"):
        storage.read_range(url, 0, 1)

    _profile(profile, server.environment(1))
    assert storage.read_range(url, 0, 300_000) == CONTENT
    assert storage.read_bytes(url) == CONTENT
    proxy.expire(spare)
    with pytest.raises(PermissionError, match=f"access key {spare}"):
        storage.publish(url, b"", replace=True)


@pytest.mark.parametrize("fault", ["unavailable", "reset", "lost", "flip_sent"])
@pytest.mark.parametrize("replace", [True, False])
def test_an_upload_takes_effect_once_and_whole(
    root: str, proxy: Proxy, fault: Any, replace: bool
) -> None:
    """`lost`: the first try took effect, unknown to us; the second must not mistake it for another's."""
    url = storage.join(root, "a")
    proxy.fail(fault, times=2, method="PUT")
    storage.publish(url, CONTENT, replace=replace)
    assert proxy.count(fault) == 2
    assert storage.read_bytes(url) == CONTENT
    proxy.fail(fault, times=1, method="PUT")
    with pytest.raises(FileExistsError):
        storage.publish(url, CONTENT)  # the same bytes, but not this publisher's


def test_content_md5_finds_wrong_bits_where_no_signature_covers_the_body(
    root: str, proxy: Proxy, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As over https, where bodies go unsigned."""
    settings = tmp_path / "config"
    settings.write_text("[default]\ns3 =\n  payload_signing_enabled = false\n")
    environment.setenv("AWS_CONFIG_FILE", str(settings))
    environment.setattr(s3, "PART", SMALL_PART)
    storage.reconnect()
    for name, content in (("small", CONTENT), ("large", CONTENT * 20)):
        proxy.fail("flip_sent", times=2, method="PUT", path=name)
        storage.publish(storage.join(root, name), content)
        assert storage.read_bytes(storage.join(root, name)) == content
    assert proxy.count("flip_sent") == 4


@pytest.mark.parametrize("fault", ["unavailable", "reset", "lost", "flip_sent"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "uploads"), ("PUT", "partNumber=2"), ("POST", "uploadId="), ("HEAD", "large")],
)
def test_each_step_of_a_large_upload_survives(
    root: str,
    proxy: Proxy,
    environment: pytest.MonkeyPatch,
    fault: Any,
    method: str,
    path: str,
) -> None:
    environment.setattr(s3, "PART", SMALL_PART)
    url, content = storage.join(root, "large"), CONTENT * 20
    proxy.fail(fault, times=1, method=method, path=path)
    storage.publish(url, content)
    assert proxy.count(fault) == 1
    assert storage.sha256(url) == hashlib.sha256(content).hexdigest()


def test_a_large_upload_that_fails_leaves_nothing(
    root: str, proxy: Proxy, environment: pytest.MonkeyPatch
) -> None:
    environment.setattr(s3, "PART", SMALL_PART)
    url, content = storage.join(root, "large"), CONTENT * 20
    proxy.fail("unavailable", times=float("inf"), method="PUT", path="partNumber=2")
    with pytest.raises(StoreError, match="6 x 503 SlowDown"):
        storage.publish(url, content)
    proxy.heal()
    assert storage.list(root) == [] and storage.sweep(root, older=0) == []

    proxy.fail("unavailable", times=float("inf"), method="PUT", path="partNumber=2")
    proxy.fail("unavailable", times=float("inf"), method="DELETE")  # nor can it clean up
    with pytest.raises(StoreError, match="6 x 503 SlowDown"):
        storage.publish(url, content)
    proxy.heal()
    assert storage.list(root) == [] and storage.sweep(root, older=0) == [url]


def _stream(root: object, position: int = 0) -> Stream:
    return shards.open(
        root, global_batch=100, micro_batch=50, rank=0, world=2, seed=7, position=position
    )  # type: ignore[arg-type]


def test_a_stream_through_a_storm_equals_the_local_one(
    root: str, proxy: Proxy, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every fault in turn, on about half of all requests, from several positions on."""
    environment.setattr(s3_requests, "POLICY", replace(QUICK, attempts=30))
    data.write(tmp_path, 4000)
    data.write(root, 4000)  # type: ignore[arg-type]
    for number, fault in enumerate(FAULTS):
        proxy.fail(fault, times=float("inf"), every=5 + 2 * number, method="GET", path=".tar")
    proxy.fail("unavailable", times=float("inf"), every=3)
    for position in (0, 3000, 123_400):
        with _stream(tmp_path, position) as local, _stream(root, position) as remote:
            for _ in range(30):
                one, other = next(local), next(remote)
                assert one.keys() == other.keys()
                assert all(one[name].tobytes() == other[name].tobytes() for name in one)
            assert local.state() == remote.state()
    assert proxy.count("unavailable") > 10 and all(proxy.count(fault) for fault in FAULTS)


def test_bits_that_turn_on_the_way_are_detected(root: str, proxy: Proxy) -> None:
    data.write(root)  # type: ignore[arg-type]
    proxy.fail("flip", times=float("inf"), method="GET", path=".tar")
    with _stream(root) as stream, pytest.raises(DamagedError, match="xxh3"):
        for _ in range(50):
            next(stream)
    for name in ("manifest-", "index-", "LATEST"):
        proxy.heal()
        proxy.fail("flip", times=float("inf"), method="GET", path=name)
        with pytest.raises(DamagedError):
            _stream(root)


def test_a_stream_whose_store_goes_away_ends_with_an_error_and_closes(
    root: str, proxy: Proxy
) -> None:
    data.write(root)  # type: ignore[arg-type]
    stream = _stream(root)
    proxy.fail("unavailable", times=float("inf"))
    with pytest.raises(StoreError, match="6 x 503"):
        for _ in range(50):
            next(stream)
    stream.close()


def test_a_store_that_goes_away_costs_one_patience_however_many_ranges_wait(
    root: str, proxy: Proxy
) -> None:
    data.write(root, 4000, shard_bytes=1)  # type: ignore[arg-type]
    proxy.fail("unavailable", times=float("inf"), path="shards/")
    stream = _stream(root)  # 16 tars, a range each
    with pytest.raises(StoreError, match="6 x 503"):
        next(stream)
    stream.close()
    assert 6 <= proxy.count("unavailable") <= 4 * 6  # of four threads


def test_closing_waits_for_no_pause(root: str, proxy: Proxy, environment: Any) -> None:
    policy = RetryPolicy(attempts=99, seconds=1e6, first=1e4, longest=1e4)
    environment.setattr(s3_requests, "POLICY", policy)
    storage.reconnect()
    data.write(root, 4000, shard_bytes=1)  # type: ignore[arg-type]
    proxy.fail("unavailable", times=float("inf"), path="shards/")
    with shards.scan(root, micro_batch=25, rank=0, world=1), _stream(root):
        while proxy.count("unavailable") < 8:  # all threads of both are in pauses of hours
            time.sleep(0.01)


def test_a_reader_that_failed_reads_again_when_the_store_is_back(root: str, proxy: Proxy) -> None:
    manifest = data.write(root, 2000, shard_bytes=1)  # type: ignore[arg-type]
    ordinals = np.arange(0, 2000, 5)
    with closing(Reader(root, manifest)) as reader:
        proxy.fail("unavailable", times=float("inf"), path="shards/")
        for fields in (None, ["y"]):
            with pytest.raises(StoreError, match="6 x 503"):
                reader.gather(ordinals, fields)
        proxy.heal()
        assert np.array_equal(reader.gather(ordinals)["ordinal"], ordinals)
        assert len(reader.gather(ordinals, ["y"])["y"]) == 400
