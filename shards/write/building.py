"""Builds the bytes of one shard, and the record that commits it, from the plan and the number of the shard alone.

The records of all shards together make the greater part of a manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import reduce
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.manifest import Field
from shards.format.members import KEY
from shards.format.moments import Moments
from shards.format.tar import TarBuilder
from shards.sources.source import PictureSource
from shards.write.plan import SAMPLE, Plan

Rows = NDArray[np.int64]  # of the source
Table = list[dict[str, Any]]  # what becomes rows of the index


def build_shard(plan: Plan, k: int) -> tuple[bytes, dict[str, Any]]:
    """The bytes of tar `k`, and its sidecar: sizes, hashes, table of what lies where, moments, labels."""
    tar = TarBuilder()
    table: Table = []
    moments, histograms, count = [], [], 0
    add = _add_samples if plan.layout == "samples" else _add_arrays
    last = min((k + 1) * plan.shard_blocks, -(-plan.count // plan.block))
    with ThreadPoolExecutor(1) as beside:  # sums and hashes leave Python's lock to the next block
        for block in range(k * plan.shard_blocks, last):
            here = plan.rows(block)
            entries, x = add(tar, plan, block, here)
            table += entries
            values = x.reshape(-1, *plan.fields[0].shape[-3:])
            moments.append(beside.submit(_moments, values, tar, tar.pieces))
            histograms.append(_histogram(plan, here))
            count += len(here)
    data, labelled = tar.finish(), plan.source.labels is not None
    return data, {
        "version": manifests.VERSION,
        "plan": plan.hash,
        "name": plan.tar(k),
        "bytes": len(data),
        "sha256": tar.sha256,
        "first": k * plan.shard_blocks * plan.block,  # ordinal of its first sample
        "count": count,
        "moments": reduce(Moments.merge, (each.result() for each in moments)).plain(),
        "label_histogram": np.sum(histograms, axis=0).tolist() if labelled else None,
        "blocks": table,
    }


def _moments(values: NDArray[np.generic], tar: TarBuilder, pieces: int) -> Moments:
    """Of a block, whose pieces of the tar are hashed on the way."""
    tar.hash(pieces)
    return Moments.of(values)


def _add_arrays(
    tar: TarBuilder, plan: Plan, block: int, rows: Rows
) -> tuple[Table, NDArray[np.generic]]:
    """One member a field, for all samples of the block."""
    arrays = _block(plan, rows)
    locations = {f.name: tar.add(f"{block:08d}.{f.name}.npy", arrays[f.name]) for f in plan.fields}
    return [{"rows": len(rows), "fields": {n: p.plain() for n, p in locations.items()}}], arrays[
        "x"
    ]


def _add_samples(
    tar: TarBuilder, plan: Plan, block: int, rows: Rows
) -> tuple[Table, NDArray[np.generic]]:
    """Members of each sample's own: picture, label, JSON, key. Names are ordinals, for a key may hold dots."""
    source = cast(PictureSource, plan.source)  # looked at by make_plan: to ask costs a fingerprint
    table: Table = []
    x = np.empty((len(rows), *plan.fields[0].shape), dtype=plan.fields[0].dtype)
    keys, labels = source.keys[rows], None if source.labels is None else source.labels[rows]
    for at, picture in enumerate(source.pictures(rows)):
        name = f"{block * plan.block + at:09d}"
        members = {picture.extension: picture.data}
        if labels is not None:
            members["cls"] = str(labels[at]).encode()
        if picture.about is not None:
            members["json"] = picture.about
        members[KEY] = keys[at]
        locations = tar.add_members({f"{name}.{ext}": data for ext, data in members.items()})
        table.append({"rows": 1, "fields": {SAMPLE: locations.plain()}})
        x[at] = picture.pixels
    return table, x


def _block(plan: Plan, rows: Rows) -> dict[str, NDArray[np.generic]]:
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
    return arrays if source.labels is None else {**arrays, "y": source.labels[rows].astype("<i8")}


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
