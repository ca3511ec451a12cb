"""The micro-batches of one rank, in an order that no rank, thread or restart can change.

Global batch t is the positions [t G, (t+1) G) from where the stream was opened; its micro-batch m, b
positions in a row, goes to rank m mod R. Batches run across the end of an epoch: none is short, none
dropped, and every rank sees the same number of them. The whole state is one integer. At each epoch's end the
rank proves what it was given; `scan` reads a data set once instead, padded and masked.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from shards import manifest as manifests
from shards import storage
from shards.account import Account, prove
from shards.blocks import Arrays
from shards.cache import BUDGET, Cache
from shards.errors import DamagedError, UserError
from shards.manifest import Manifest
from shards.order import WINDOW, Mode, Order
from shards.prefetch import Prefetch
from shards.reader import DAMAGED, THREADS, OnDamage, Reader

AHEAD = 4  # micro-batches ready before they are asked for
_PLANNED = (
    8192  # positions whose ordinals are computed at a time; small calls cost 30 times as much
)
_ANNOUNCED = 256  # samples announced at a time, so that their blocks' neighbours are seen
_BEYOND = 256 << 20  # bytes of blocks on their way beyond those of a window

Planned = tuple[NDArray[np.int64], NDArray[np.int64]]  # positions of a micro-batch, their ordinals

_log = logging.getLogger("shards")


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

    def given(self, positions: int) -> int:
        """How many of the first so many positions of a stream are this rank's."""
        rounds, rest = divmod(positions, self.micro_batch * self.world)
        part = min(max(rest - self.rank * self.micro_batch, 0), self.micro_batch)
        return rounds * self.micro_batch + part


class Stream:
    """Endless iterator over the micro-batches of one rank; made by `shards.open`.

    A batch is a dict: `x` (b, C, H, W) as stored, `y` (b,) int64 where there are labels, `key` (b,)
    str, `ordinal` (b,) int64 row in the manifest's order, `position` (b,) int64 position in the run.
    Stored values become a model's input by the manifest's header, (x - shift) * scale. Where a sample
    stands in for a damaged one, key and ordinal are its own.
    """

    def __init__(
        self, reader: Reader, manifest: Manifest, order: Order, share: Share, position: int
    ) -> None:
        self.manifest = manifest
        self.ended: Account | None = None  # of the last epoch that this rank ended
        self._reader, self._order, self._share, self._start = reader, order, share, position
        self._delivered = 0
        self._account = Account(epoch=position // order.count)
        batches = _batches(reader, _plan(order, share, position), share, order.window)
        self._ahead = Prefetch(batches, AHEAD, f"shards-{share.rank}")

    @property
    def waited(self) -> float:
        """Seconds that `next` has spent waiting for data."""
        return self._ahead.waited

    @property
    def account(self) -> Account:
        """Of the epoch that the last batch ended in, so far."""
        return self._account

    @property
    def counts(self) -> dict[str, int]:
        """What reading took: ranges `fetched`, their `bytes`, blocks `cached`, blocks asked for `again`."""
        return self._reader.counts

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Arrays:
        batch, asked, stands_in = next(self._ahead)
        self._delivered += 1
        epochs = batch["position"].astype(np.int64) // self._order.count
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            if epoch > self._account.epoch:
                self._end(epoch)
            here = epochs == epoch
            self._account = self._account.add(asked[here], int(stands_in[here].sum()))
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

    def _end(self, next_epoch: int) -> None:
        """An epoch ends where a later one begins: what this rank was given is what its share promises."""
        count, account = self._order.count, self._account
        for epoch in range(
            account.epoch, next_epoch
        ):  # few positions of many ranks may skip an epoch
            ended = account if epoch == account.epoch else Account(epoch=epoch)
            before = self._share.given(max(epoch * count - self._start, 0))
            expected = self._share.given((epoch + 1) * count - self._start) - before
            if ended.given != expected:
                raise DamagedError(
                    f"epoch {epoch}: rank {self._share.rank} was given {ended.given:,} samples, its share is "
                    f"{expected:,}"
                )
            if expected == count:  # all of it: then the sums are known, too
                prove([ended], count)
            level = logging.WARNING if ended.substituted else logging.INFO
            _log.log(
                level,
                "epoch %d, rank %d: %s seen + %s substituted = %s",
                *(epoch, self._share.rank, f"{ended.seen:,}", f"{ended.substituted:,}"),
                f"{expected:,}",
            )
            self.ended = ended
        self._account = Account(epoch=next_epoch)

    def close(self) -> None:
        """Ends the background threads. May be called twice."""
        self._ahead.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Scan(Iterator[Arrays]):
    """One pass over a data set in the order of ordinals, for validation; made by `scan`.

    Every rank has the same number of batches. They are a `Stream`'s, and `mask` (b,) bool is false where
    a row only fills up the last ones, so that each sample counts once.
    """

    def __init__(self, reader: Reader, count: int, share: Share) -> None:
        self.steps = -(-count // share.global_batch)
        plan = _pass(count, share, self.steps)
        batches = _batches(reader, plan, share, WINDOW)
        self._count, self._ahead = count, Prefetch(batches, AHEAD, f"shards-{share.rank}")

    def __next__(self) -> Arrays:
        batch, _, _ = next(self._ahead)
        return {**batch, "mask": np.asarray(batch["position"], dtype=np.int64) < self._count}

    def close(self) -> None:
        """Ends the background threads. May be called twice."""
        self._ahead.close()

    def __enter__(self) -> Scan:
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
    threads: int = THREADS,
    cache: storage.Url | None = None,
    cache_bytes: int = BUDGET,
    on_damage: OnDamage = "fail",
    damaged: float = DAMAGED,
) -> Stream:
    """`shards.open`; see there."""
    share = Share(global_batch=global_batch, micro_batch=micro_batch, rank=rank, world=world)
    if position < 0:
        raise UserError(f"position={position}: positions start at 0")
    if mode not in get_args(Mode):
        raise UserError(f"mode={mode!r} is no order of samples: give 'window' or 'global'")
    manifest = manifests.load(root)
    order = Order(count=manifest.count, seed=seed, mode=mode, block=manifest.block, window=window)
    reader = Reader(
        root,
        manifest,
        cache=None if cache is None else Cache(cache, cache_bytes),
        needed=order.next_need,
        threads=threads,
        on_damage=on_damage,
        damaged=damaged,
    )
    return Stream(reader, manifest, order, share, position)


def scan(root: storage.Url, *, micro_batch: int, rank: int, world: int) -> Scan:
    """`shards.scan`; see there."""
    whole = micro_batch * world
    share = Share(global_batch=whole, micro_batch=micro_batch, rank=rank, world=world)
    manifest = manifests.load(root)
    return Scan(Reader(root, manifest), manifest.count, share)


def read_all(root: storage.Url) -> Arrays:
    """Every sample in the order of ordinals: `x`, `y` if any, `key`, `ordinal`. For small data."""
    manifest = manifests.load(root)
    ordinals = np.arange(manifest.count)
    reader = Reader(root, manifest)
    try:
        return reader.gather(ordinals)
    finally:
        reader.close()


def _plan(order: Order, share: Share, start: int) -> Iterator[Planned]:
    """This rank's positions from `start` on, without end, and the samples that stand there."""
    mine = share.positions(start)
    together = max(1, _PLANNED // share.micro_batch)
    while True:
        positions = np.stack([next(mine) for _ in range(together)])
        yield from zip(positions, order.ordinals(positions), strict=True)


def _pass(count: int, share: Share, steps: int) -> Iterator[Planned]:
    """Every ordinal at its own position; what fills the last batches begins anew."""
    for positions in islice(share.positions(0), steps):
        yield positions, positions % count


def _batches(
    reader: Reader, plan: Iterator[Planned], share: Share, window: int
) -> Iterator[tuple[Arrays, NDArray[np.int64], NDArray[np.bool_]]]:
    """Batches, what was asked for, what stands in. Blocks are announced a window and some more ahead."""
    coming: deque[Planned] = deque()
    together, farthest = (max(1, n // share.micro_batch) for n in (_ANNOUNCED, _PLANNED))
    most = window + reader.blocks_in(_BEYOND, most=window)
    try:
        while True:
            while not coming or (reader.announced < most and len(coming) < farthest):
                fresh = [*islice(plan, together)]
                reader.want(*(ordinals for _, ordinals in fresh))
                coming += fresh
                if len(fresh) < together:
                    break
            if not coming:
                return
            positions, ordinals = coming.popleft()
            reader.position = int(positions[0])
            batch, stands_in = reader.take(ordinals)
            yield {**batch, "position": positions}, ordinals, stands_in
    finally:
        reader.close()
