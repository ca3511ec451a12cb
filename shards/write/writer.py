"""Writes samples as WebDataset tars with a manifest; `shards.write.building` makes the bytes of each tar.

The rows of the source are shuffled once, by the seed, before they are cut into blocks, so that even one
block is a fair draw from class-sorted input; only a data set derived from another one keeps its order. Shard k
is a function of (source, seed, k), byte for byte, so any process on any node can build it. A finished shard has a
record and is not built again; the data set is complete when LATEST names its manifest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards import parallel, storage
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.format.manifest import Layout, Manifest
from shards.format.order import share
from shards.parallel import Watch
from shards.sources.source import Source
from shards.write.building import manifest_fields
from shards.write.committing import (
    commit,
    commit_by_blocks,
    committed,
    find_existing,
    has_size,
    other_data_set,
)
from shards.write.plan import SHARD_BYTES, Plan, make_plan

_MANY = 4  # shards for each worker, of which the last ones may be shared out unevenly


def write(
    root: storage.Url,
    source: Source,
    *,
    header: Header,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    class_names: tuple[str, ...] = (),
    notes: Mapping[str, Any] | None = None,
    beside: Mapping[str, Any] | None = None,
    layout: Layout = "blocks",
    shuffle: bool = True,
    workers: int = 1,
    rank: int = 0,
    world: int = 1,
    watch: Watch[bool] = lambda shards, total: shards,
) -> tuple[Manifest, bool]:
    """Writes `source` below `root`, a folder or s3:// prefix; the manifest, and whether it is new.

    If the same data set is there already, nothing is written; if it was begun, only what is
    missing. `watch` may show progress.

    Args:
        class_names: names of the labels, for the manifest.
        notes: further JSON values for the manifest's `source`.
        beside: further values for it that decide nothing: a data set with others is the same data set.
        layout: `samples` stores each encoded picture in members of its own.
        shuffle: False keeps the source's order, so that row i of it is ordinal i; `seed` is then the one that
            shuffled the source when it was written.
        workers: processes that build shards, or blocks of few shards; with more than 1 the source must pickle.
        rank, world: rank of this process and number of ranks, on any nodes; each returns when all is written.

    Raises:
        UserError: the source is empty, has several shapes, keys twice, labels out of range or values
            that are not finite; or `root` holds another data set. Found before the first byte, except
            for what only the images show.
    """
    plan = make_plan(source, header, seed, shard_bytes, class_names, notes, shuffle, layout, beside)
    share([], rank, world)
    existing = find_existing(root)
    if existing is not None and existing.plan != plan.hash:
        raise other_data_set(root, existing)
    if existing is not None and all(
        has_size(storage.join(root, s.name), s.bytes) for s in existing.shards
    ):
        return existing, False
    done = committed(root, plan)
    todo = share([k for k in range(plan.shards) if k not in done], rank, world)
    while todo:  # again only what another process left when it died between a tar and its sidecar
        for _ in watch(_built(root, plan, todo, workers), len(todo)):
            pass
        done |= committed(root, plan, known=frozenset(done))
        todo = [k for k in todo if k not in done]
    manifest = merge(plan, [done[k] for k in range(plan.shards)])
    manifests.save(root, manifest, new=existing is None)
    return manifest, True


def _built(root: storage.Url, plan: Plan, todo: list[int], workers: int) -> Iterator[bool]:
    """Builds shards; whether each was built. Workers take whole ones only where none of them is left idle for long."""
    if workers < 2 or len(todo) % workers == 0 or len(todo) >= _MANY * workers:
        return parallel.spread(partial(commit, root, plan), todo, workers)
    return commit_by_blocks(root, plan, todo, workers)


def merge(plan: Plan, sidecars: list[dict[str, Any]]) -> Manifest:
    """The manifest of all shards, from their sidecars in order."""
    labelled = plan.source.labels is not None
    blocks = _table(plan.columns, sidecars)
    plain = {
        **manifest_fields(sidecars, plan.fields, blocks),
        "plan": plan.hash,
        "count": plan.count,
        "block": plan.block,
        "header": plan.header.plain(),
        "label_histogram": (
            np.sum([s["label_histogram"] for s in sidecars], axis=0).tolist() if labelled else None
        ),
        **plan.optional_fields,
        "source": {**plan.source_record, **plan.beside},
        "seed": plan.seed,
    }
    return Manifest.of(plain, blocks)


def _table(columns: tuple[str, ...], sidecars: list[dict[str, Any]]) -> NDArray[np.void]:
    """The index. It is filled shard by shard: millions of samples as Python's numbers would take a gigabyte."""
    counts = [len(sidecar["blocks"]) for sidecar in sidecars]
    table = np.empty(sum(counts), dtype=manifests.index_dtype(len(columns)))
    table["shard"] = np.repeat(np.arange(len(sidecars)), counts)
    sections = np.split(table, np.cumsum(counts)[:-1])
    for section, blocks in zip(sections, (s["blocks"] for s in sidecars), strict=True):
        section["rows"] = [block["rows"] for block in blocks]
        for column, name in enumerate(columns):
            placed = [block["fields"][name] for block in blocks]
            section["offset"][:, column] = [p["offset"] for p in placed]
            section["bytes"][:, column] = [p["bytes"] for p in placed]
            section["xxh3"][:, column] = manifests.hashes([p["xxh3"] for p in placed])
    return table
