"""WebDataset shards with a manifest: written once, verified by checksums, read in an order that is a formula.

No torch anywhere in here, and nothing heavy is imported until a function is called.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shards.format.manifest import Manifest
    from shards.read.dataset import Dataset
    from shards.read.fields import Fields
    from shards.read.options import ReadOptions
    from shards.read.stream import Scan, Stream

__all__ = ["Dataset", "open", "read_all", "scan"]


def __getattr__(name: str) -> Any:
    """`Dataset`, once it is asked for."""
    if name != "Dataset":
        raise AttributeError(f"module 'shards' has no attribute {name!r}")
    from shards.read.dataset import Dataset

    return Dataset


def open(
    root: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    seed: int,
    position: int = 0,
    options: ReadOptions | None = None,
    loaded: Sequence[Manifest] | None = None,
    **more: Any,
) -> Stream:
    """An endless iterator over one rank's micro-batches; `close` it, or use it in a `with`.

    Args:
        root: a folder or s3:// prefix that `python -m tools.shards` wrote; or several, of the same kind of
            samples, to be mixed by `weights`. Batches then say by `source` (b,) int64 whose `ordinal` is meant.
        global_batch: samples a step takes over all ranks; a multiple of micro_batch x world.
        micro_batch: samples in each item.
        rank, world: data-parallel ones, as plain numbers; nothing is read from the environment.
        seed: of the order; with `mode`, `window` and `weights` it fixes which sample stands at which position.
        position: where to begin, as `Stream.state()["position"]` said; any number of ranks may go on.
        options: how to read; `more` gives its fields by name, such as `mode`, `weights`, `threads`, `decoders`,
            `cache` and `on_damage`: `shards.read.options.ReadOptions` describes each.
        loaded: which data sets are meant, as `shards.format.manifest.load` returned them for each root; None asks the
            roots for their current ones, which a writer may replace meanwhile.

    Raises:
        UserError: no shards at `root`, numbers that do not divide, an unknown mode, roots that cannot be mixed.
        DamagedError: while iterating, a tar or block that is not what was written; or an epoch ended
            of which not each sample was there once.
    """
    from shards.read.options import ReadOptions
    from shards.read.stream import Share, open_stream

    share = Share(global_batch=global_batch, micro_batch=micro_batch, rank=rank, world=world)
    chosen = replace(options or ReadOptions(), **more)
    return open_stream(root, share, seed=seed, position=position, options=chosen, loaded=loaded)


def scan(root: str | os.PathLike[str], *, micro_batch: int, rank: int, world: int) -> Scan:
    """One pass in the order of ordinals, for validation: batches as of `open`, with `mask` (b,) bool.

    Every rank has `steps` batches; rows where the mask is false fill up the last ones, so that each
    sample counts once over all ranks.
    """
    from shards.read.stream import scan

    return scan(root, micro_batch=micro_batch, rank=rank, world=world)


def read_all(root: str | os.PathLike[str]) -> Fields:
    """Every sample in the order of ordinals, as arrays: `x`, `y` if any, `key`, `ordinal`."""
    from shards.read.stream import read_all

    return read_all(root)
