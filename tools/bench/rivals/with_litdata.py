"""litdata: chunks of 64 MB, shuffled, one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import worker
from litdata import StreamingDataset, optimize


@cache
def array(file: str) -> Any:
    """Opened once in each process that writes."""
    return np.load(file, mmap_mode="r")


def sample(row: int, x: str, y: str) -> dict[str, Any]:
    return {"x": np.array(array(x)[row]), "y": int(array(y)[row])}


def make(x: Any, y: Any, folder: str) -> None:
    optimize(
        fn=partial(sample, x=x.filename, y=y.filename),
        inputs=list(range(len(x))),
        output_dir=folder,
        chunk_bytes="64MB",
        num_workers=1,
    )


def reader(folder: str, batch: int) -> Callable[[], worker.Batches]:
    data = StreamingDataset(folder, shuffle=True, seed=0)

    return lambda: worker.stacked(data, batch)


if __name__ == "__main__":
    worker.main(make, reader)
