"""The micro-batches of one rank, in an order that does not depend on the number of ranks, threads or restarts.

Global batch t is the positions [t G, (t+1) G) counted from where the stream was opened; its micro-batch m, b
consecutive positions, goes to rank m mod R. Batches cross the ends of epochs: none is short, none is
dropped, and every rank sees the same number. The whole state is one integer. Each rank keeps audits of
its epochs, which are checked over all ranks; `scan` reads a data set once instead, padded and masked.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards import storage
from shards.errors import DamagedError, UserError
from shards.format import manifest as manifests
from shards.format.manifest import Manifest
from shards.format.order import WINDOW
from shards.read.audit import EpochAudit, check_epoch, source_suffix
from shards.read.blocks import Arrays
from shards.read.cache import Cache
from shards.read.fields import Fields
from shards.read.mixing import Blend, Readers, identity, load_alike, make_blend
from shards.read.options import ReadOptions, check_whole
from shards.read.prefetch import Prefetch
from shards.read.reader import Reader

if TYPE_CHECKING:
    from typing_extensions import Self

LAST = 1 << 60  # position that may be begun at: sums with it still fit 64 bits
AHEAD = 4  # micro-batches ready before they are asked for, at least
_PLANNED = (
    8192  # positions whose ordinals are computed at a time; small calls cost 30 times as much
)
_ANNOUNCED = 256  # samples announced at a time, so that their blocks' neighbours are seen
_BEYOND = 256 << 20  # bytes of blocks on their way beyond those of a window

_log = logging.getLogger("shards")


class Planned(NamedTuple):
    """A micro-batch before it is read; each (micro_batch,) int64."""

    positions: NDArray[np.int64]
    samples: NDArray[np.int64]  # as `Blend` numbers them; of one data set its ordinals
    epochs: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which positions a rank takes of each global batch."""

    global_batch: int
    micro_batch: int
    rank: int
    world: int

    def __post_init__(self) -> None:
        check_whole(**asdict(self))
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


class _Batches:
    """What is read ahead by a thread of its own; a context manager that ends it."""

    def __init__(
        self,
        reader: Reader | Readers,
        plan: Iterator[Planned],
        share: Share,
        window: int,
        blend: Blend | None = None,
    ) -> None:
        self._reader, self._share = reader, share
        batches = _batches(reader, plan, share, window, blend)
        # what two global batches take from this rank, so that whether both are there can be asked
        depth = max(AHEAD, 2 * share.micro_batches)
        self._ahead = Prefetch(batches, depth, f"shards-{share.rank}")

    def close(self) -> None:
        """Ends the background threads, and what they wait for. May be called twice."""
        self._reader.end()
        self._ahead.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Stream(_Batches):
    """Endless iterator over the micro-batches of one rank; made by `shards.open`.

    A batch is a dict: `x` (b, C, H, W) as stored, `y` (b,) int64 where there are labels, `key` (b,)
    str, `ordinal` (b,) int64 row in the manifest's order, `position` (b,) int64 position in the run, and in a
    mixture `source` (b,) int64, whose manifest that is. Stored values become a model's input by the
    manifest's header, (x - shift) * scale. Where a sample stands in for a damaged one, key and ordinal are its own.
    """

    def __init__(
        self,
        reader: Reader | Readers,
        manifests: Sequence[Manifest],
        blend: Blend,
        share: Share,
        position: int,
    ) -> None:
        self.manifests = tuple(manifests)
        self.substituted = 0  # samples given so far that stand in for damaged ones
        self.ended: list[
            EpochAudit
        ] = []  # of this rank; whoever adds them up over ranks takes them out
        window = max(order.window for order in blend.orders) * len(blend.orders)
        super().__init__(reader, _plan(blend, share, position), share, window, blend)
        self._blend, self._start = blend, position
        self._delivered = 0
        self._under_way: dict[tuple[int, int], EpochAudit] = {}
        self._begun_before = frozenset(blend.under_way(position))
        self._epochs = blend.ended(position)  # of each source, how many have ended

    @property
    def manifest(self) -> Manifest:
        """Of what is read; in a mixture, where all have its fields and header, of the first."""
        return self.manifests[0]

    @property
    def waited(self) -> float:
        """Seconds that `next` has spent waiting for data."""
        return self._ahead.waited

    def ready(self, batches: int, timeout_s: float = 0.0) -> bool:
        """Returns whether what this rank takes of the next 1 or 2 global batches is there within `timeout_s` seconds.

        So is an error that comes in their place, which `next` raises.
        """
        return self._ahead.ready(batches * self._share.micro_batches, timeout_s)

    @property
    def position(self) -> int:
        """The first position of the global batch after the last that was delivered in full."""
        return self._start + self._delivered // self._share.micro_batches * self._share.global_batch

    @property
    def counts(self) -> dict[str, int]:
        """What reading took: ranges `fetched`, their `bytes`, blocks `cached`, blocks asked for `again`."""
        return self._reader.counts

    def under_way(self) -> list[EpochAudit]:
        """This rank's audits of the epochs that have begun and not ended, asked between two global batches.

        All ranks have as many, in one order. Of an epoch that began before the stream did, what was since.
        """
        keys = self._blend.under_way(self.position)
        return [self._under_way.get((s, e), EpochAudit(source=s, epoch=e)) for s, e in keys]

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Fields:
        batch, audits = next(self._ahead)
        self._check_positions(batch["position"])
        self._delivered += 1
        for audit in audits:
            self.substituted += audit.substituted
            before = self._under_way.get(audit.key)
            self._under_way[audit.key] = audit if before is None else before + audit
        if self._delivered % self._share.micro_batches == 0:
            self._end_epochs()
        return Fields(batch)

    def state(self) -> dict[str, Any]:
        """What a resumed run opens with; the same on all ranks at the same step."""
        order, mixture = self._blend.orders[0], self._blend.mixture
        return {
            "manifest": identity(self.manifests, mixture.weights if mixture else None),
            "seed": mixture.seed if mixture else order.seed,
            "mode": order.mode,
            "window": order.window,
            "position": self.position,
        }

    def _check_positions(self, positions: NDArray[np.generic]) -> None:
        """Raises a DamagedError unless the batch has the expected positions: then one was lost or came twice."""
        b, world, rank = self._share.micro_batch, self._share.world, self._share.rank
        expected = self._start + (self._delivered * world + rank) * b
        first, last = int(positions[0]), int(positions[-1])
        if (first, last, len(positions)) != (expected, expected + b - 1, b):
            raise DamagedError(
                f"rank {rank} was given positions {first:,} to {last:,} instead of {expected:,} to {expected + b - 1:,}"
            )

    def _end_epochs(self) -> None:
        """Those that no later batch adds to; a rank that reads alone from an epoch's start on proves it here."""
        now = self._blend.ended(self.position)
        for source, (before, after) in enumerate(zip(self._epochs, now, strict=True)):
            for epoch in range(before, after):
                audit = self._under_way.pop((source, epoch), EpochAudit(source=source, epoch=epoch))
                if self._share.world == 1 and audit.key not in self._begun_before:
                    check_epoch([audit], self.manifests[source].count)
                _log.log(
                    logging.WARNING if audit.substituted else logging.INFO,
                    "epoch %d%s, rank %d: %s seen + %s substituted = %s",
                    *(epoch, source_suffix(audit), self._share.rank),
                    *(f"{n:,}" for n in (audit.seen, audit.substituted, audit.total)),
                )
                self.ended.append(audit)
        self._epochs = now


class Scan(_Batches, Iterator[Arrays]):
    """One pass over a data set in the order of ordinals, for validation; made by `scan`.

    Every rank has the same number of batches. They are a `Stream`'s, and `mask` (b,) bool is false where
    a row only fills up the last ones, so that each sample counts once.
    """

    def __init__(self, reader: Reader, count: int, share: Share) -> None:
        self.steps = -(-count // share.global_batch)
        super().__init__(reader, _pass(count, share, self.steps), share, WINDOW)
        self._count = count

    def __next__(self) -> Fields:
        batch, _ = next(self._ahead)
        mask = np.asarray(batch["position"], dtype=np.int64) < self._count
        return Fields(batch, mask=mask)


def open_stream(
    root: storage.Url | Sequence[storage.Url],
    share: Share,
    *,
    seed: int,
    position: int = 0,
    options: ReadOptions = ReadOptions(),  # noqa: B008 - it is frozen
    loaded: Sequence[Manifest] | None = None,
) -> Stream:
    """`shards.open`; see there."""
    check_whole(seed=seed, position=position)
    if position < 0:
        raise UserError(f"position={position}: positions start at 0")
    if position > LAST:
        raise UserError(f"position={position}: give at most {LAST}, more than any run will see")
    roots, found = load_alike(root, options.weights, loaded)
    sources = make_blend(found, options, seed)
    cache = None if options.cache is None else Cache(options.cache, options.cache_bytes)
    readers = [
        Reader(
            each,
            manifest,
            options,
            cache=cache,
            needed=order.next_need,
            beside=[other for other in found if other is not manifest],
        )
        for each, manifest, order in zip(roots, found, sources.orders, strict=True)
    ]
    reader = readers[0] if sources.mixture is None else Readers(readers, sources)
    return Stream(reader, found, sources, share, position)


def scan(root: storage.Url, *, micro_batch: int, rank: int, world: int) -> Scan:
    """`shards.scan`; see there."""
    whole = micro_batch * world
    share = Share(global_batch=whole, micro_batch=micro_batch, rank=rank, world=world)
    manifest = manifests.load(root)
    return Scan(Reader(root, manifest), manifest.count, share)


def read_all(root: storage.Url) -> Fields:
    """Every sample in the order of ordinals: `x`, `y` if any, `key`, `ordinal`. For small data."""
    manifest = manifests.load(root)
    ordinals = np.arange(manifest.count)
    reader = Reader(root, manifest)
    try:
        return Fields(reader.gather(ordinals))
    finally:
        reader.close()


def _plan(blend: Blend, share: Share, start: int) -> Iterator[Planned]:
    """This rank's positions from `start` on, without end, and the samples that stand there."""
    mine = share.positions(start)
    together = max(1, _PLANNED // share.micro_batch)
    while True:
        positions = np.stack([next(mine) for _ in range(together)])
        yield from map(Planned, positions, *blend.plan(positions))


def _pass(count: int, share: Share, steps: int) -> Iterator[Planned]:
    """Every ordinal at its own position; what fills the last batches begins anew."""
    for positions in islice(share.positions(0), steps):
        yield Planned(positions, positions % count, np.zeros_like(positions))


def _audits(blend: Blend, planned: Planned, substituted: NDArray[np.bool_]) -> Iterator[EpochAudit]:
    """What a batch adds to each epoch that it is of, usually one."""
    sources, ordinals = blend.locate(planned.samples)
    keys = {*zip(sources.tolist(), planned.epochs.tolist(), strict=True)}
    for source, epoch in keys:
        here = (sources == source) & (planned.epochs == epoch) if len(keys) > 1 else ...
        yield EpochAudit(source=source, epoch=epoch).add(
            ordinals[here], int(substituted[here].sum())
        )


def _batches(
    reader: Reader | Readers,
    plan: Iterator[Planned],
    share: Share,
    window: int,
    blend: Blend | None,
) -> Iterator[tuple[Arrays, Sequence[EpochAudit]]]:
    """Batches, and their audits where `blend` says what their samples are.

    Blocks are announced a window and some more ahead.
    """
    coming: deque[Planned] = deque()
    together, farthest = (max(1, n // share.micro_batch) for n in (_ANNOUNCED, _PLANNED))
    most = window + reader.blocks_in(_BEYOND, most=window)
    size = 1
    try:
        while True:
            while not coming or (reader.announced < most and len(coming) < farthest):
                fresh = [*islice(plan, together)]
                reader.want(*(planned.samples for planned in fresh))
                coming += fresh
                if len(fresh) < together:
                    break
            if not coming:
                return
            some = [coming.popleft() for _ in range(min(size, len(coming)))]
            reader.position = int(some[0].positions[0])
            found, substituted = reader.take(*(planned.samples for planned in some))
            for i, planned in enumerate(some):
                mine = slice(i * share.micro_batch, (i + 1) * share.micro_batch)
                batch = {name: values[mine] for name, values in found.items()}
                # here and not where batches are taken, where a model's step would wait for it
                audits = [*_audits(blend, planned, substituted[mine])] if blend is not None else []
                yield {**batch, "position": planned.positions}, audits
            one = sum(values.nbytes for values in found.values()) // len(some)
            size = max(
                1, min(2 * size, reader.together // one)
            )  # the first batch waits for no other
    finally:
        reader.close()
