"""What reading a data set will cost, before a node is paid for: requests, bytes, memory, and how well it is mixed.

Computed from the manifest and the order alone; nothing is read. Bytes and requests are those of one node, whose
--ranks each take their share of a run over --world ranks. With a cache a block is fetched once a node as long as
there is room, and the block needed last makes room for another; without one each rank fetches for itself.
Mixing is measured on batches: how many blocks one draws from, and how many pairs of its samples share a block, over
as many as in a batch drawn from all samples at once (1 is as good).

examples:
  python -m tools.shards simulate s3://bucket/latents --batch 1024 --world 32 --ranks 8 --cache 8e9
  python -m tools.shards simulate data/digits --batch 64 --window 2 --png digits.png --json
"""

from __future__ import annotations

import argparse
import heapq
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards import cli
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.manifest import Manifest
from shards.format.order import Order
from shards.read.cache import BUDGET
from shards.read.reader import tars_of
from tools import flags
from tools.shards import ordering, report

EPOCHS = 4  # simulated; the first fills the cache
PROBES = 64  # batches whose mixing is measured
STEPS = 9  # sizes of cache between nothing and all


def add(parser: argparse.ArgumentParser) -> None:
    report.add_root(parser)
    flags.add(
        parser,
        ("--batch G", int, flags.REQUIRED, "global batch"),
        ("--world R", int, 1, "ranks of the run (default 1)"),
        ("--ranks", int, None, "ranks on a node (default all)"),
        ("--cache", float, BUDGET, f"bytes of cache on a node (default {BUDGET:.2g})"),
    )
    ordering.add_order(parser)
    flags.add(
        parser,
        ("--png FILE", str, None, "plot the bytes fetched per epoch over the size of the cache"),
    )


def run(options: argparse.Namespace) -> int:
    ranks = options.ranks or options.world
    for name, value in (("batch", options.batch), ("world", options.world), ("ranks", ranks)):
        if value < 1:
            raise UserError(f"--{name} {value}: give at least 1")
    if options.batch % options.world:
        raise UserError(f"--batch {options.batch} is no multiple of --world {options.world}")
    if ranks > options.world:
        raise UserError(f"--ranks {ranks}: a node has at most the --world {options.world} ranks")
    if options.cache < 0:
        raise UserError(f"--cache {options.cache:g}: give bytes, or 0")
    path = ordering.png(options.png) if options.png else None
    manifest = manifests.load(options.root)
    order = ordering.order_of(options, manifest)
    found = simulate(manifest, order, options.batch, ranks, int(options.cache))
    sizes = np.linspace(0, found["data_bytes"], STEPS).astype(int).tolist()
    if path:
        tracked = cli.track(sizes, len(sizes), "simulating")
        _draw(path, [(s, fetched(manifest, order, s, ranks)[-1]) for s in tracked], found)
    if report.as_json(options, {"root": options.root, **found}):
        return 0
    for name, value in found.items():
        text = (
            report.size(value) if name.endswith("bytes") and isinstance(value, int) else str(value)
        )
        print(f"{name.replace('_', ' '):32} {text}")
    return 0


def simulate(manifest: Manifest, order: Order, batch: int, ranks: int, cache: int) -> dict:
    """All numbers of the report; bytes and requests of one node."""
    blocks = tars_of("", manifest, mapped=False)
    sizes = block_bytes(manifest)
    first, steady = fetched(manifest, order, cache, ranks)[:: EPOCHS - 1]
    window = np.sort(sizes)[-min(order.window, len(sizes)) :].sum()
    inside = len(sizes) if order.mode == "global" else order.window
    one = order.ordinals(np.arange(min(inside * order.block, order.count)))
    needed = list(dict.fromkeys((one // manifest.block).tolist()))
    drawn, pairs = mixing(order, batch)
    return {
        "samples": manifest.count,
        "blocks": len(sizes),
        "data_bytes": int(sizes.sum()),
        "steps_an_epoch": round(manifest.count / batch, 2),
        "first_epoch_bytes": first,
        "later_epochs_bytes": steady,
        "requests_a_window": len(blocks.runs(needed)),
        "first_batch_bytes": int(
            sizes[np.unique(order.ordinals(np.arange(batch)) // manifest.block)].sum()
        ),
        "memory_a_rank_bytes": 2 * int(window) if order.mode == "window" else int(sizes.sum()),
        "blocks_in_a_batch": round(drawn, 2),
        "pairs_of_one_block": round(pairs, 3),
    }


def block_bytes(manifest: Manifest) -> NDArray[np.int64]:
    """What fetching each block takes: from its first payload to the end of its last, or all its samples."""
    rows = manifest.blocks
    if manifest.layout == "samples":
        starts = np.arange(0, manifest.count, manifest.block)
        return np.add.reduceat(rows["bytes"][:, 0], starts).astype(np.int64)
    last = (rows["offset"] + rows["bytes"]).max(axis=1)
    return (last - rows["offset"].min(axis=1)).astype(np.int64)


def fetched(manifest: Manifest, order: Order, cache: int, ranks: int) -> list[int]:
    """Bytes that a node fetches in each of the first epochs.

    A window's blocks are kept while it lasts, if they fit; then the ones needed last go first. In
    `global` mode every block is needed all the time, so what fits first stays, and samples of others cost
    a block each, for which the reader has no better way.
    """
    sizes = block_bytes(manifest)
    total = int(sizes.sum())
    if order.mode == "global":
        kept = int(sizes[np.cumsum(sizes) <= cache].sum())
        missed = (total - kept) * order.block
        return [kept + missed, *[missed] * (EPOCHS - 1)]
    if cache < sizes.min():
        return [ranks * total] * EPOCHS
    return _windows(sizes, order, cache)


def _windows(sizes: NDArray[np.int64], order: Order, cache: int) -> list[int]:
    """Belady's rule over windows: a heap holds what may go, the one needed last on top."""
    everything = np.arange(len(sizes))
    cached: set[int] = set()
    heap: list[tuple[float, int]] = []
    room, found = cache, []
    for epoch in range(EPOCHS):
        total = 0
        start = order.span(everything, epoch)[0]
        after = order.span(everything, epoch + 1)[0]
        for block in np.argsort(start, kind="stable").tolist():
            if block not in cached:
                total += int(sizes[block])
                while room < sizes[block] and heap:
                    _, other = heapq.heappop(heap)
                    if other in cached and order.next_need([other], int(start[block]))[0] > -np.inf:
                        cached.remove(other)
                        room += int(sizes[other])
                if room >= sizes[block]:
                    cached.add(block)
                    room -= int(sizes[block])
            if block in cached:
                heapq.heappush(heap, (-float(after[block]), block))
        found.append(total)
    return found


def mixing(order: Order, batch: int) -> tuple[float, float]:
    """Blocks in a batch, and pairs of its samples that share one, over those of a draw from all samples."""
    starts = np.linspace(0, max(order.count - batch, 0), min(PROBES, -(-order.count // batch)))
    numbers, pairs, possible = [], 0.0, 0
    for start in starts.astype(np.int64):
        of = np.bincount(order.ordinals(np.arange(start, start + batch)) // order.block)
        numbers.append(np.count_nonzero(of))
        pairs += float((of * (of - 1)).sum())
        possible += batch * (batch - 1)
    full, last = divmod(order.count, order.block)
    alike = full * order.block * (order.block - 1) + last * (last - 1)
    chance = alike / max(order.count * (order.count - 1), 1)
    return float(np.mean(numbers)), pairs / possible / chance if possible and chance else 1.0


def _draw(path: Path, points: list[tuple[int, int]], found: dict) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    unit, name = (1e9, "GB") if found["data_bytes"] >= 1e9 else (1e6, "MB")
    x, y = np.array(points).T / unit
    axes.plot(x, y, marker="o")
    axes.axhline(found["data_bytes"] / unit, color="grey", linestyle=":", label="all data, once")
    axes.set(
        xlabel=f"cache of a node, {name}",
        ylabel=f"fetched by a node in a later epoch, {name}",
        ylim=(0, None),
    )
    axes.legend()
    figure.savefig(path, dpi=120)
