"""MosaicML streaming: MDS shards of 64 MB, shuffled, one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import worker
from streaming import MDSWriter, StreamingDataset


def make(x: Any, y: Any, folder: str) -> None:
    shape = ",".join(str(n) for n in x.shape[1:])
    columns = {"x": f"ndarray:{x.dtype.name}:{shape}", "y": "int"}
    with MDSWriter(out=folder, columns=columns, size_limit=1 << 26) as out:
        for row in range(len(x)):
            out.write({"x": x[row], "y": int(y[row])})


def reader(folder: str, batch: int) -> Callable[[], worker.Batches]:
    data = StreamingDataset(local=folder, shuffle=True, shuffle_seed=0, batch_size=batch)

    return lambda: worker.stacked(data, batch)


if __name__ == "__main__":
    worker.main(make, reader)
