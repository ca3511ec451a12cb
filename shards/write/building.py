"""Builds the bytes of one shard, and the record that commits it, from the plan and the number of the shard alone.

Its blocks are built one after the other, or by others, block by block, and joined: the bytes are the same.

The records of all shards together make the greater part of a manifest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import reduce
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.manifest import Field
from shards.format.members import KEY
from shards.format.moments import Moments
from shards.format.tar import TarBuilder, members
from shards.sources.source import PictureSource
from shards.write.plan import SAMPLE, Plan

Rows = NDArray[np.int64]  # of the source
Table = list[dict[str, Any]]  # what becomes rows of the index
Content = list[bytes] | dict[str, NDArray[np.generic]]
"""Of a block: the members of each sample, or an array for each field."""


class Block(NamedTuple):
    """What a shard takes of a block, wherever that was built."""

    number: int
    content: Content
    moments: Moments


def build_shard(plan: Plan, k: int) -> tuple[bytes, dict[str, Any]]:
    """The bytes of tar `k`, and its sidecar: sizes, hashes, table of what lies where, moments, labels."""
    shard = _Shard(plan, k)
    moments = []
    with ThreadPoolExecutor(1) as beside:  # sums and hashes leave Python's lock to the next block
        for number in plan.blocks(k):
            content, x = _content(plan, number)
            shard.add(number, content)
            moments.append(beside.submit(_moments, x, shard.tar, shard.tar.pieces))
    return shard.finish([each.result() for each in moments])


def build_block(plan: Plan, number: int) -> Block:
    """Block `number` of the data set, for `join_shard`."""
    content, x = _content(plan, number)
    return Block(number, content, Moments.of(x))


def join_shard(plan: Plan, k: int, blocks: Iterable[Block]) -> tuple[bytes, dict[str, Any]]:
    """What `build_shard` returns, out of all blocks of shard `k` in their order."""
    shard = _Shard(plan, k)
    moments = []
    for block in blocks:
        shard.add(block.number, block.content)
        moments.append(block.moments)
    return shard.finish(moments)


class _Shard:
    """A shard that takes up one block after the other."""

    def __init__(self, plan: Plan, k: int) -> None:
        self.tar = TarBuilder()
        self._plan, self._k = plan, k
        self._table: Table = []
        self._histograms: list[NDArray[np.int64]] = []
        self._count = 0

    def add(self, number: int, content: Content) -> None:
        rows = self._plan.rows(number)
        if isinstance(content, list):
            self._table += [
                {"rows": 1, "fields": {SAMPLE: self.tar.add_span(span).plain()}} for span in content
            ]
        else:  # one member a field, for all samples of the block
            fields = {
                name: self.tar.add(f"{number:08d}.{name}.npy", values).plain()
                for name, values in content.items()
            }
            self._table.append({"rows": len(rows), "fields": fields})
        self._histograms.append(_histogram(self._plan, rows))
        self._count += len(rows)

    def finish(self, moments: Sequence[Moments]) -> tuple[bytes, dict[str, Any]]:
        """The tar and its sidecar; `moments` are of the blocks in their order."""
        plan, data = self._plan, self.tar.finish()
        labelled = plan.source.labels is not None
        return data, {
            "version": manifests.VERSION,
            "plan": plan.hash,
            "name": plan.tar(self._k),
            "bytes": len(data),
            "sha256": self.tar.sha256,
            "first": self._k * plan.shard_blocks * plan.block,  # ordinal of its first sample
            "count": self._count,
            "moments": reduce(Moments.merge, moments).plain(),
            "label_histogram": np.sum(self._histograms, axis=0).tolist() if labelled else None,
            "blocks": self._table,
        }


def _moments(x: NDArray[np.generic], tar: TarBuilder, pieces: int) -> Moments:
    """Of a block, whose pieces of the tar are hashed on the way."""
    tar.hash(pieces)
    return Moments.of(x)


def _content(plan: Plan, number: int) -> tuple[Content, NDArray[np.generic]]:
    """What stands in a tar for a block, and its values (rows, C, H, W)."""
    rows = plan.rows(number)
    if plan.layout == "samples":
        return _encoded(plan, number, rows)
    arrays = _arrays(plan, rows)
    return arrays, arrays["x"].reshape(-1, *plan.fields[0].shape[-3:])


def _encoded(plan: Plan, number: int, rows: Rows) -> tuple[list[bytes], NDArray[np.generic]]:
    """Members of each sample's own: picture, label, JSON, key. Names are ordinals, for a key may hold dots."""
    source = cast(PictureSource, plan.source)  # looked at by make_plan: to ask costs a fingerprint
    spans = []
    x = np.empty((len(rows), *plan.fields[0].shape), dtype=plan.fields[0].dtype)
    keys, labels = source.keys[rows], None if source.labels is None else source.labels[rows]
    for at, picture in enumerate(source.pictures(rows)):
        name = f"{number * plan.block + at:09d}"
        contents = {picture.extension: picture.data}
        if labels is not None:
            contents["cls"] = str(labels[at]).encode()
        if picture.about is not None:
            contents["json"] = picture.about
        contents[KEY] = keys[at]
        spans.append(members({f"{name}.{ext}": data for ext, data in contents.items()}))
        x[at] = picture.pixels
    return spans, x


def _arrays(plan: Plan, rows: Rows) -> dict[str, NDArray[np.generic]]:
    """Of each field, the values of all samples of a block."""
    source, expected = plan.source, plan.fields[0]
    x = source.images(rows)
    if x.shape != (len(rows), *expected.shape) or x.dtype != np.dtype(source.dtype):
        raise UserError(
            f"samples of {source.name!r} are not all {expected.shape} {source.dtype}: among those of "
            f"{source.keys[rows[0]].decode()!r} there are {x.shape[1:]} {x.dtype}; bring them to one shape"
        )
    if x.dtype.kind == "f" and not _finite(x):
        row = rows[np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))[0]]
        raise UserError(
            f"sample {source.keys[row].decode()!r} holds values that are not finite: leave it out"
        )
    arrays = {"x": x.astype(expected.dtype, copy=False), "id": source.keys[rows]}
    if source.labels is not None:
        arrays["y"] = source.labels[rows].astype("<i8")
    return {f.name: arrays[f.name] for f in plan.fields}  # the order of the members


def _finite(x: NDArray[np.generic]) -> bool:
    """Whether no exponent has all its bits set, which of half floats is seen six times as fast as by `isfinite`."""
    if x.dtype.itemsize > 8:
        return bool(np.isfinite(x).all())
    bits = np.dtype(f"u{x.dtype.itemsize}")
    every = np.array(np.inf, dtype=x.dtype).view(bits)
    return not np.any((x.view(bits) & every) == every)


def manifest_fields(
    records: Sequence[Mapping[str, Any]], fields: Sequence[Field], blocks: NDArray[np.void]
) -> dict[str, Any]:
    """What every manifest says: format, fields, statistics, index and shards, from the tars' records in their order.

    `blocks` is the index, in the order of the tars.
    """
    known = (Moments.from_plain(r["moments"]) for r in records if r["moments"])
    moments = reduce(Moments.merge, known)
    index = manifests.index_bytes(blocks)
    rows = np.bincount(blocks["shard"], minlength=len(records)).tolist()
    return {
        "format": "selfguide-shards",
        "version": manifests.VERSION,
        "fields": [{**asdict(f), "shape": [*f.shape]} for f in fields],
        "statistics": {
            "mean": moments.mean.tolist(),
            "std": moments.std.tolist(),
            "minimum": moments.minimum,
            "maximum": moments.maximum,
        },
        "index": {"blocks": len(blocks), "bytes": len(index), "sha256": manifests.sha256_of(index)},
        "shards": [
            {**{n: r[n] for n in ("name", "bytes", "sha256", "count")}, "blocks": number}
            for r, number in zip(records, rows, strict=True)
        ],
    }


def _histogram(plan: Plan, rows: Rows) -> NDArray[np.int64]:
    labels = plan.source.labels
    here = np.empty(0, dtype=np.int64) if labels is None else labels[rows]
    return np.bincount(here, minlength=plan.source.classes)
