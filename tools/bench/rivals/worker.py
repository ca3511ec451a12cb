"""A reader that stays: it writes the data once, then reads one epoch for each line it is sent.

WORKER make X.npy Y.npy FOLDER      samples (N, C, H, W) and labels (N,)
WORKER read FOLDER BATCH            says when it is ready; then one JSON line an epoch: {"count", "labels", "x"}
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

Batches = Iterator[tuple[Any, Any]]  # samples (b, C, H, W) and labels (b,), arrays or tensors


def main(
    make: Callable[[Any, Any, str], None], reader: Callable[[str, int], Callable[[], Batches]]
) -> None:
    """`make(x, y, folder)` writes; `reader(folder, batch)()` begins an epoch."""
    if sys.argv[1] == "make":
        x, y, folder = sys.argv[2:]
        make(np.load(x, mmap_mode="r"), np.load(y, mmap_mode="r"), folder)
        return
    folder, batch = sys.argv[2:]
    epoch = reader(folder, int(batch))
    _say({"ready": True})
    for _ in sys.stdin:
        _say(touch(epoch()))


def stacked(samples: Iterable[Mapping[str, Any]], batch: int) -> Batches:
    """Batches by NumPy, which costs less than a loader's collation; asks for nothing after the last sample."""
    some: list[Mapping[str, Any]] = []
    for sample in samples:
        some.append(sample)
        if len(some) == batch:
            yield np.stack([s["x"] for s in some]), np.array([s["y"] for s in some])
            some = []
    if some:
        yield np.stack([s["x"] for s in some]), np.array([s["y"] for s in some])


def touch(batches: Batches) -> dict[str, int]:
    """What every reader is asked for: whole arrays of samples and labels. The sums show that all were there."""
    count = labels = checked = 0
    for x, y in batches:
        x, y = np.asarray(x), np.asarray(y)
        if not x.flags["C_CONTIGUOUS"]:
            raise ValueError("samples are not stacked")
        count += len(y)
        labels += int(y.sum())
        checked += int(x.reshape(len(x), -1)[:, 0].view(np.uint16).sum(dtype=np.int64))
    return {"count": count, "labels": labels, "x": checked}


def _say(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()
