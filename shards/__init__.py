"""Data at rest and in flight: WebDataset shards with a manifest, read in an order that survives all.

No torch anywhere in here, and nothing heavy until a function is called.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shards.order import Mode
    from shards.reader import Arrays
    from shards.stream import Stream

__all__ = ["open", "read_all"]


def open(
    root: str | os.PathLike[str],
    *,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    seed: int,
    position: int = 0,
    mode: Mode = "window",
    window: int = 64,
) -> Stream:
    """An endless iterator over one rank's micro-batches; `close` it, or use it in a `with`.

    Args:
        root: a folder or s3:// prefix that `python -m tools.shards` wrote.
        global_batch: samples a step takes over all ranks; a multiple of micro_batch x world.
        micro_batch: samples in each item.
        rank, world: data-parallel ones, as plain numbers; nothing is read from the environment.
        seed: of the order; with `mode` and `window` it fixes which sample stands at which position.
        position: where to begin, as `Stream.state()["position"]` said; any number of ranks may go on.
        mode: `window` permutes blocks and the samples of `window` blocks in a row, `global` everything.

    Raises:
        UserError: no shards at `root`, numbers that do not divide, an unknown mode.
        DamagedError: while iterating, a tar or block that is not what was written.
    """
    from shards.stream import open_stream

    return open_stream(
        root,
        global_batch=global_batch,
        micro_batch=micro_batch,
        rank=rank,
        world=world,
        seed=seed,
        position=position,
        mode=mode,
        window=window,
    )


def read_all(root: str | os.PathLike[str]) -> Arrays:
    """Every sample in the order of ordinals, as arrays: `x`, `y` if any, `key`, `ordinal`."""
    from shards.stream import read_all

    return read_all(root)
