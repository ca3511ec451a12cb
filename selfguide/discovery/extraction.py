"""Features of every sample of a set of shards, streamed into a sidecar of dense rows by any number of ranks.

The samples are cut into chunks by ordinal, and chunk c is rank c mod world's. Each chunk is a part that outlives a kill
(`selfguide.discovery.resumable`): an extraction goes on where it was, on any number of ranks, and the rank that finds
all chunks there joins them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfguide.discovery.features import FeatureNet
from selfguide.discovery.resumable import Array, Rows, Work
from shards import sidecar, storage
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.read.reader import Reader

CHUNK = 1024  # samples of a part
ROWS = 8192  # looked at together


def extract(
    root: storage.Url,
    net: FeatureNet,
    out: str | os.PathLike[str],
    *,
    rank: int = 0,
    world: int = 1,
    batch: int = 256,
    chunk: int = CHUNK,
) -> sidecar.Sidecar | None:
    """The features of every sample at `root` as a sidecar in `out`; None where other ranks' chunks are still missing.

    Ranks share the folder and nothing else: no collective is called. An extraction that is published is returned.

    Raises:
        UserError: features that are not finite or all the same, a folder that holds something else.
    """
    if not 0 <= rank < world:
        raise UserError(f"rank={rank} of world={world}: ranks go from 0 to {world - 1}")
    if batch < 1 or chunk < 1:
        raise UserError(f"batch={batch}, chunk={chunk}: give at least 1 sample")
    manifest = manifests.load(root)
    work = Work(Path(out), manifest.hash, net.provenance, {"chunk": chunk})
    done = work.published()
    if done is not None:
        return done
    sidecar.refuse_taken(work.target, {sidecar.ROWS})
    rows = Rows(folder=work.folder, prefix="", count=manifest.count, chunk=chunk, dtype=np.float32)
    reader = Reader(root, manifest)

    def features(ordinals: NDArray[np.int64]) -> Tensor:
        return net(torch.from_numpy(reader.gather(ordinals)["x"]), torch.from_numpy(ordinals))

    rows.fill(features, batch=batch, doing="extracting features", rank=rank, world=world)

    def check() -> tuple[tuple[str, ...], dict[str, Any]]:
        refuse_constant(rows)
        return (), {}

    return work.publish(rows, kind="dense", finish=check)


def checked(features: Array) -> Array:
    """`features` (N, F), memory-mapped or not, if groups can be found in them; read in pieces.

    Raises:
        UserError: no rows, a value that is not finite, or rows that are all the same.
    """
    if features.ndim != 2 or not features.size:
        raise UserError(f"features are {features.shape}: give (N, F), one row a sample")
    pieces = [features[s : s + ROWS] for s in range(0, len(features), ROWS)]
    for number, piece in enumerate(pieces):
        bad = ~np.isfinite(piece).all(axis=1)
        if bad.any():
            sample = number * ROWS + int(bad.argmax())
            raise UserError(
                f"the features of sample {sample} are NaN or infinite: extract them again"
            )
    refuse_constant(pieces)
    return features


def refuse_constant(pieces: Rows | Sequence[Array]) -> None:
    """
    Raises:
        UserError: all rows are the same: nothing distinguishes one sample from another.
    """
    first = next(iter(pieces))[:1]
    if all((piece == first).all() for piece in pieces):
        raise UserError(
            f"the features of all {sum(map(len, pieces)):,} samples are the same, so no groups are in them; take "
            "another layer, noise-time, pooling or net"
        )
