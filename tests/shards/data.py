"""Small data sets for the tests of this folder."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np

from shards.format import manifest as manifests
from shards.format.header import Header
from shards.format.manifest import Manifest
from shards.sources.source import ArraySource
from shards.write import writer

LATENT = Header(kind="latent", scale=0.5, encoder="test")


def source(
    count: int = 1000, shape: tuple[int, int, int] = (2, 3, 4), labels: bool = True
) -> ArraySource:
    """Every sample different; labels are not sorted by row."""
    x = np.random.default_rng(count).standard_normal((count, *shape)).astype(np.float16)
    return ArraySource.of(
        "test", x, labels=np.arange(count) * 7 % 5 if labels else None, classes=5 if labels else 0
    )


def write(
    root: Path, count: int = 1000, *, shard_bytes: int = 40_000, labels: bool = True
) -> Manifest:
    """`count` samples, several shards: a block has 14 to 18 kB."""
    manifest, new = writer.write(
        root, source(count, labels=labels), header=LATENT, seed=3, shard_bytes=shard_bytes
    )
    assert new
    return manifest


def flip(path: Path, at: int) -> None:
    """Turns over one bit of one byte."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def names(folder: Path) -> list[str]:
    """Sorted names in a folder, hidden ones included."""
    return sorted(p.name for p in folder.iterdir())


def payload(root: Path, block: int, field: str) -> tuple[Path, int]:
    """The tar that holds a field of a block, and at which byte."""
    manifest = manifests.load(root)
    row = manifest.blocks[block]
    return root / manifest.shards[row["shard"]].name, int(row["offset"][manifest.column(field)])


def no_links(*_: object) -> None:
    """`os.link` of a file system without hard links."""
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
