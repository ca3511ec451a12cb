"""Data at rest and in flight: WebDataset shards with a manifest, read in an order that survives all.

No torch anywhere in here, and nothing heavy until a function is called.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shards.format.manifest import Manifest
    from shards.format.order import Mode
    from shards.read.blocks import Arrays
    from shards.read.reader import OnDamage
    from shards.read.stream import Scan, Stream

__all__ = ["open", "read_all", "scan"]


def open(
    root: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    seed: int,
    position: int = 0,
    mode: Mode = "window",
    window: int = 64,
    weights: Sequence[float] | None = None,
    threads: int = 4,
    decoders: int = 0,
    cache: str | os.PathLike[str] | None = None,
    cache_bytes: int = 64 << 30,
    on_damage: OnDamage = "fail",
    damaged: float = 0.01,
    loaded: Sequence[Manifest] | None = None,
) -> Stream:
    """An endless iterator over one rank's micro-batches; `close` it, or use it in a `with`.

    Args:
        root: a folder or s3:// prefix that `python -m tools.shards` wrote; or several, of the same kind of
            samples, to be mixed by `weights`, one each: of 1,000 positions in a row every source has exactly
            its weight's share. Batches then say by `source` (b,) int64 whose `ordinal` is meant.
        global_batch: samples a step takes over all ranks; a multiple of micro_batch x world.
        micro_batch: samples in each item.
        rank, world: data-parallel ones, as plain numbers; nothing is read from the environment.
        seed: of the order; with `mode` and `window` it fixes which sample stands at which position.
        position: where to begin, as `Stream.state()["position"]` said; any number of ranks may go on.
        mode: `window` permutes blocks and the samples of `window` blocks in a row, `global` everything.
        threads: that read. They change nothing but the speed.
        decoders: processes that decode the pictures of shards that hold one sample per key; 0 decodes in a
            thread. A script that asks for some starts its work under `if __name__ == "__main__"`.
        cache: a folder on a disk of this node, where all its processes keep blocks of remote shards, at
            most `cache_bytes`; None keeps nothing. Local shards need none.
        on_damage: `fail` ends reading at a damaged block; `substitute` puts the samples of a sound block
            in its place, says so, counts them, and ends when more than the share `damaged` of all
            samples would be substituted.
        loaded: which data sets are meant, as `shards.format.manifest.load` returned them for each root; None asks the
            roots for their current ones, which a writer may replace meanwhile.

    Raises:
        UserError: no shards at `root`, numbers that do not divide, an unknown mode, roots that cannot be mixed.
        DamagedError: while iterating, a tar or block that is not what was written; or an epoch ended
            of which not each sample was there once.
    """
    from shards.read.stream import open_stream

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
        weights=weights,
        threads=threads,
        decoders=decoders,
        cache=cache,
        cache_bytes=cache_bytes,
        on_damage=on_damage,
        damaged=damaged,
        loaded=loaded,
    )


def scan(root: str | os.PathLike[str], *, micro_batch: int, rank: int, world: int) -> Scan:
    """One pass in the order of ordinals, for validation: batches as of `open`, with `mask` (b,) bool.

    Every rank has `steps` batches; rows where the mask is false fill up the last ones, so that each
    sample counts once over all ranks.
    """
    from shards.read.stream import scan

    return scan(root, micro_batch=micro_batch, rank=rank, world=world)


def read_all(root: str | os.PathLike[str]) -> Arrays:
    """Every sample in the order of ordinals, as arrays: `x`, `y` if any, `key`, `ordinal`."""
    from shards.read.stream import read_all

    return read_all(root)
