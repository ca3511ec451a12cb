"""Time to the first batch, at the beginning of an epoch and at 90 % of it, for more samples than there are.

The manifest is real in form and size, one row of the index for every block; all its blocks lie in one small tar.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np

from shards.format import manifest as manifests
from shards.format.manifest import Manifest
from shards.format.order import BLOCK
from tools.bench.harness import Variant, measure
from tools.bench.shards_data import BATCH, Figure, Latents, opened, write_ours

LATE = 0.9  # of an epoch
FEW = 10_000_000  # samples up to which a turn is over in no time
WHOLE = 8  # blocks that exist, beside the last


def starting(folder: Path, counts: tuple[int, ...], turns: int, goal: float) -> list[Figure]:
    """One figure for each number of samples; each opens shards anew, index and all, and takes one batch."""
    figures = []
    for count in counts:
        root = folder / f"start-{count}"
        synthetic(root, count)
        late = int(count * LATE) // BATCH * BATCH
        variants = [
            Variant("at 0", partial(first_batch, root, 0)),
            Variant("at 90 %", partial(first_batch, root, late)),
        ]
        many = turns if count > FEW else 5 * turns
        rows = {row.name: row for row in measure(variants, repeats=many, warmup=1)}
        then = rows["at 90 %"]
        figures.append(
            Figure(
                name=f"first batch of {count:,} samples at 90 % of an epoch over at 0",
                unit="ms",
                ours=then.median * 1e3,
                other=rows["at 0"].median * 1e3,
                ratio=then.ratio,
            ).judged(goal, most=True)
        )
        shutil.rmtree(root)
    return figures


def synthetic(root: Path, count: int) -> Manifest:
    """A data set of `count` samples at `root`, whose blocks are `WHOLE` over and over, and the last one short."""
    blocks = -(-count // BLOCK)
    last = count - (blocks - 1) * BLOCK
    real = write_ours(Latents.random(WHOLE * BLOCK + last), root)
    index = real.blocks[np.append(np.arange(blocks - 1) % WHOLE, WHOLE)]
    data = manifests.index_bytes(index)
    record = {"blocks": blocks, "bytes": len(data), "sha256": manifests.sha256_of(data)}
    shard = {**real.plain["shards"][0], "count": count, "blocks": blocks}
    plain = {**real.plain, "count": count, "index": record, "shards": [shard]}
    made = Manifest.of(plain, index)
    manifests.save(root, made)
    return made


def first_batch(root: Path, position: int) -> np.ndarray:
    """Ordinals of the first batch from `position` on."""
    with opened(root, position=position) as stream:
        return next(stream)["ordinal"]
