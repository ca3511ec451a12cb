"""Images in a real S3 store become latents in it: the bytes that come about on a disk; damaged images become none."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards import storage, transfer
from shards.errors import DamagedError
from shards.format import manifest as manifests
from shards.verify import verify
from tests.shards.data import flip, payload
from tools.shards import __main__ as command


def _encode(source: str, out: str) -> None:
    words = ["encode", source, "--encoder", "tiny", "--shard-mb", "0.05", "--out", out]
    assert command.main(words) == 0


def test_latents_of_images_in_the_store_are_those_of_a_disk(
    root: str, digits: Path, tmp_path: Path
) -> None:
    transfer.copy(str(digits), f"{root}/images")
    _encode(f"{root}/images", f"{root}/latents")
    _encode(str(digits), str(tmp_path / "latents"))
    for path in sorted((tmp_path / "latents").rglob("*.*")):
        name = path.relative_to(tmp_path / "latents").as_posix()
        assert storage.read_bytes(f"{root}/latents/{name}") == path.read_bytes(), name
    assert verify(f"{root}/latents").problems == ()

    tar, at = payload(digits, 5, "x")
    damaged = tmp_path / tar.name
    damaged.write_bytes(tar.read_bytes())
    flip(damaged, at)
    name = manifests.load(digits).shards[0].name
    storage.publish(f"{root}/images/{name}", damaged.read_bytes(), replace=True)
    with pytest.raises(DamagedError, match="block 5"):
        _encode(f"{root}/images", f"{root}/others")
    assert not storage.exists(f"{root}/others/LATEST")
