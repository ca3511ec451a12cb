"""What is wrong with shards in a real store is said when a run is submitted, and nothing is written anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher import submit
from shards import storage
from shards.errors import UserError
from tests.shards.data import write
from tools.s3.server import Server
from tools.shards import __main__ as command


@pytest.fixture
def remote(root: str, digits: Path) -> str:
    """The digits in the store."""
    assert command.main(["copy", str(digits), root]) == 0
    return root


def refused(runs: Path, root: str, *words: str) -> str:
    """What a submission says; it leaves the store and the runs folder as they were."""
    with pytest.raises(UserError) as raised:
        submit.main(
            ["experiment=digits_dit", "cluster=local", f"data.root={root}", f"runs={runs}", *words]
        )
    assert not runs.exists() and "\n" not in str(raised.value)
    return str(raised.value)


def test_a_store_that_cannot_be_read_is_named(
    remote: str, server: Server, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    runs, before = tmp_path / "runs", storage.list(remote)
    assert "there is no bucket 'no-such-bucket'" in refused(runs, "s3://no-such-bucket/digits")
    assert "no shards at" in refused(runs, f"{remote}-not-here")
    assert "s3://BUCKET/FOLDER" in refused(runs, "s3://no bucket/digits")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    storage.reconnect()
    said = refused(runs, remote)
    key = server.environment()["AWS_ACCESS_KEY_ID"]
    assert remote in said and f"access key {key}) are refused" in said
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        environment.delenv(name)
    storage.reconnect()
    said = refused(runs, remote)
    assert "no credentials" in said and "AWS_ACCESS_KEY_ID" in said
    for name, value in server.environment().items():
        environment.setenv(name, value)
    storage.reconnect()
    assert storage.list(remote) == before


def test_shards_of_another_version_or_kind_are_named(remote: str, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    assert "data.classes=10" in refused(runs, remote, "data.classes=7")
    assert "set data.shape=[1,8,8]" in refused(
        runs, remote, "data.shape=[1,4,4]", "evaluation=none"
    )
    write(tmp_path / "latents", 50)
    assert command.main(["copy", str(tmp_path / "latents"), f"{remote}/latents"]) == 0
    said = refused(runs, f"{remote}/latents", "data.flip=true", "data.shape=[2,4,4]", "evaluation=none")  # fmt: skip
    assert "hold latents" in said
    (name,) = (n for n in storage.list(remote) if n.startswith("manifest-"))
    manifest = json.loads(storage.read_bytes(f"{remote}/{name}")) | {"version": 99}
    storage.publish(f"{remote}/{name}", json.dumps(manifest).encode(), replace=True)
    assert "has format version 99, this program reads" in refused(runs, remote)


def test_a_cache_that_is_no_use_is_named_before_the_job_is(remote: str, tmp_path: Path) -> None:
    runs, kept = tmp_path / "runs", tmp_path / "cache"
    said = refused(runs, remote, f"data.cache={kept}", "data.cache_bytes=1000")
    assert "data.cache_bytes=1000 is too small" in said and "data.mode=global" in said
    least = said.partition("give data.cache_bytes=")[2].split()[0]
    small = str(int(least) - 1)
    assert "too small" in refused(runs, remote, f"data.cache={kept}", f"data.cache_bytes={small}")
    (tmp_path / "file").touch()
    said = refused(runs, remote, f"data.cache={tmp_path / 'file'}", f"data.cache_bytes={least}")
    assert "is a file; name a folder" in said
    assert not kept.exists()
