"""How the verbs speak of a data set: one line, one summary, one progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from shards import cli
from shards.format.manifest import Manifest

T = TypeVar("T")


def summary(manifest: Manifest) -> dict[str, object]:
    payload = int(manifest.blocks["bytes"].sum())
    stored = sum(shard.bytes for shard in manifest.shards)
    histogram = manifest.label_histogram
    # spans of single samples hold their headers: no payload to compare with
    over = {"bytes_over_payload": round(stored / payload, 6)}
    return {
        "manifest": manifest.hash,
        "samples": manifest.count,
        "shape": [*manifest.shape],
        "dtype": np.dtype(manifest.fields[0].dtype).name,
        "layout": manifest.layout + (", indexed where they lie" if manifest.indexed else ""),
        "bytes_a_sample": manifest.sample_bytes,
        "shards": len(manifest.shards),
        "bytes": stored,
        **(over if manifest.layout == "blocks" else {}),
        "header": manifest.header,
        "decode": manifest.decode,
        "mean": [*manifest.channel_mean],
        "std": [*manifest.channel_std],
        "range": [manifest.minimum, manifest.maximum],
        "classes": manifest.classes,
        "samples_per_class": {"least": min(histogram), "most": max(histogram)}
        if histogram
        else None,
        "source": manifest.source,
        "seed": manifest.seed,
    }


def line(manifest: Manifest) -> str:
    shape, stored = (
        " x ".join(map(str, manifest.shape)),
        sum(shard.bytes for shard in manifest.shards),
    )
    dtype, shards = np.dtype(manifest.fields[0].dtype).name, tars(len(manifest.shards))
    return f"{manifest.count:,} samples {shape} {dtype}, {shards}, {size(stored)}"


def tars(count: int) -> str:
    return f"{count:,} shard{'' if count == 1 else 's'}"


def size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def watch(doing: str) -> Callable[[Iterable[T], int], Iterable[T]]:
    return lambda items, total: cli.track(items, total, doing)


class Counted:
    """Shows shards go by, and counts those built here: others may have done some meanwhile."""

    def __init__(self, doing: str) -> None:
        self.count, self._doing = 0, doing

    def __call__(self, shards: Iterable[bool], total: int) -> Iterator[bool]:
        for built in watch(self._doing)(shards, total):
            self.count += built
            yield built
