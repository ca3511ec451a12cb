"""Each image's nearest others by the cosine of their features, exactly: what TEMI pairs an image with.

Adaloglou et al. 2023 (TEMI, arXiv 2303.17896) take the 50 nearest. Its index, not its distance, sets an
image apart from its copies: a copy is a neighbour like any other, the image itself is none.
"""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from selfguide.discovery.extraction import checked
from selfguide.discovery.kmeans import prepared
from shards.cli import track
from shards.errors import UserError

CHUNK = 4096  # images looked up at once; features are normalised by as many


def neighbours(
    features: NDArray[np.generic], count: int, *, chunk: int = CHUNK
) -> NDArray[np.int32]:
    """(N, count) ordinals of the images nearest to each of `features` (N, F), nearest first, never its own.

    Features may be memory-mapped and of any floating type; the index holds them as fp32, on the GPUs where faiss
    has them.

    Raises:
        UserError: fewer than `count` other images, or features in which nothing can be found.
    """
    total = len(features)
    if not 1 <= count < total:
        raise UserError(
            f"neighbours={count} of {total} images: each has {total - 1} others; give a number from 1 to that"
        )
    checked(features)
    index: faiss.Index = faiss.IndexFlatIP(features.shape[1])
    if faiss.get_num_gpus():
        index = faiss.index_cpu_to_all_gpus(index)
    starts = range(0, total, chunk)
    for start in starts:
        index.add(prepared(features[start : start + chunk], normalise=True))
    found = np.empty((total, count), dtype=np.int32)
    for start in track(starts, len(starts), "neighbours"):
        rows = prepared(features[start : start + chunk], normalise=True)
        _, near = index.search(rows, count + 1)
        own = np.arange(start, start + len(rows))[:, None]  # (B, 1)
        found[start : start + len(rows)] = _without(near, own)
    return found


def _without(near: NDArray[np.int64], own: NDArray[np.int64]) -> NDArray[np.int64]:
    """(B, n) of `near` (B, n + 1), less each row's own index, or less the last where copies have crowded it out."""
    drop = near == own
    drop[~drop.any(1), -1] = True
    return near[~drop].reshape(len(near), -1)
