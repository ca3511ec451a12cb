"""The micro-batches of one rank, in an order that no rank, thread or restart can change.

Global batch t is the positions [t G, (t+1) G) from where the stream was opened; its micro-batch m, b
positions in a row, goes to rank m mod R. Batches run across the end of an epoch: none is short, none
dropped, and every rank sees the same number of them. The whole state is one integer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from shards import manifest as manifests
from shards import storage
from shards.errors import UserError
from shards.manifest import Manifest
from shards.order import WINDOW, Mode, Order
from shards.prefetch import Prefetch
from shards.reader import Arrays, Reader

AHEAD = 4  # micro-batches ready before they are asked for
_PLANNED = (
    8192  # positions whose ordinals are computed at a time; small calls cost 30 times as much
)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which positions a rank takes of each global batch."""

    global_batch: int
    micro_batch: int
    rank: int
    world: int

    def __post_init__(self) -> None:
        for name in ("global_batch", "micro_batch", "world"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: give at least 1")
        if not 0 <= self.rank < self.world:
            raise UserError(
                f"rank={self.rank} of world={self.world}: ranks go from 0 to {self.world - 1}"
            )
        unit = self.micro_batch * self.world
        if self.global_batch % unit:
            below = self.global_batch // unit * unit
            near = f"{below} or {below + unit}" if below else f"{unit}"
            raise UserError(
                f"global_batch={self.global_batch} is no multiple of micro_batch={self.micro_batch} x "
                f"world={self.world} = {unit}: give global_batch={near}, or a smaller micro_batch"
            )

    @property
    def micro_batches(self) -> int:
        """Of this rank in one global batch."""
        return self.global_batch // (self.micro_batch * self.world)

    def positions(self, start: int) -> Iterator[NDArray[np.int64]]:
        """This rank's micro-batches from position `start` on, without end; each (micro_batch,)."""
        within = np.arange(self.micro_batch) + self.rank * self.micro_batch
        step = (
            self.micro_batch * self.world
        )  # G is a multiple of it: batches need no other arithmetic
        while True:
            yield start + within
            start += step


class Stream:
    """Endless iterator over the micro-batches of one rank; made by `shards.open`.

    A batch is a dict: `x` (b, C, H, W) as stored, `y` (b,) int64 where there are labels, `key` (b,)
    str, `ordinal` (b,) int64 row in the manifest's order, `position` (b,) int64 position in the run.
    Stored values become a model's input by the manifest's header, (x - shift) * scale.
    """

    def __init__(
        self, root: storage.Url, manifest: Manifest, order: Order, share: Share, position: int
    ) -> None:
        self.manifest = manifest
        self._order, self._share, self._start = order, share, position
        self._delivered = 0
        reader = Reader(root, manifest)
        batches = _batches(reader, order, share, position)
        self._ahead = Prefetch(batches, AHEAD, f"shards-{share.rank}")

    @property
    def waited(self) -> float:
        """Seconds that `next` has spent waiting for data."""
        return self._ahead.waited

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Arrays:
        batch = next(self._ahead)
        self._delivered += 1
        return batch

    def state(self) -> dict[str, Any]:
        """What a resumed run opens with; the same on all ranks at the same step.

        `position` is the first one of the global batch after the last that was delivered in full.
        """
        batches = self._delivered // self._share.micro_batches
        return {
            "manifest": self.manifest.hash,
            "seed": self._order.seed,
            "mode": self._order.mode,
            "window": self._order.window,
            "position": self._start + batches * self._share.global_batch,
        }

    def close(self) -> None:
        """Ends the background thread. May be called twice."""
        self._ahead.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_stream(
    root: storage.Url,
    *,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world: int,
    seed: int,
    position: int = 0,
    mode: Mode = "window",
    window: int = WINDOW,
) -> Stream:
    """`shards.open`; see there."""
    share = Share(global_batch=global_batch, micro_batch=micro_batch, rank=rank, world=world)
    if position < 0:
        raise UserError(f"position={position}: positions start at 0")
    if mode not in get_args(Mode):
        raise UserError(f"mode={mode!r} is no order of samples: give 'window' or 'global'")
    manifest = manifests.load(root)
    order = Order(count=manifest.count, seed=seed, mode=mode, block=manifest.block, window=window)
    return Stream(root, manifest, order, share, position)


def _batches(reader: Reader, order: Order, share: Share, start: int) -> Iterator[Arrays]:
    mine = share.positions(start)
    together = max(1, _PLANNED // share.micro_batch)
    while True:
        positions = np.stack([next(mine) for _ in range(together)])
        for here, ordinals in zip(positions, order.ordinals(positions), strict=True):
            yield {**reader.gather(ordinals), "ordinal": ordinals, "position": here}


def read_all(root: storage.Url) -> Arrays:
    """Every sample in the order of ordinals: `x`, `y` if any, `key`, `ordinal`. For small data."""
    manifest = manifests.load(root)
    ordinals = np.arange(manifest.count)
    return {**Reader(root, manifest).gather(ordinals), "ordinal": ordinals}
