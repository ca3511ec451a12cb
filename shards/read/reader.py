"""Reads samples by ordinal: batches are announced, their blocks are read by a few threads, and one thread gathers them.

`want` announces the next batches, so that their blocks are on their way, neighbours in one range read, while
earlier ones are used. A block stays in memory as long as an announced batch needs it. A damaged block
ends the reading, or is replaced by the next intact block, row by row: this rule gives every rank and
every restart the same substitute, since rows were shuffled before they were cut into blocks.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards import storage
from shards.errors import DamagedError, UserError
from shards.format.manifest import Manifest
from shards.format.order import WINDOW
from shards.read.block_bytes import Arrays, Needed, Picked, Rows, Tars
from shards.read.blocks import Blocks
from shards.read.cache import Cache
from shards.read.mapped_files import MOST
from shards.read.options import ReadOptions
from shards.read.samples import Samples
from shards.storage.retry import Effort

_IDLE_BYTES = 128 << 20  # bytes of fetched blocks kept after use, for those who ask at random

_log = logging.getLogger("shards")


class Reader:
    """Gathers samples of one manifest. Not thread-safe: one thread owns it; `close` it."""

    def __init__(
        self,
        root: storage.Url,
        manifest: Manifest,
        options: ReadOptions = ReadOptions(),  # noqa: B008 - it is frozen
        *,
        mapped: bool | None = None,
        cache: Cache | None = None,
        needed: Callable[[NDArray[np.int64], int], NDArray[np.float64]] | None = None,
        beside: Sequence[Manifest] = (),
    ) -> None:
        """`mapped`: map tars, or fetch ranges; None maps what is on a file system, which no cache improves.
        `cache`: opened already, since several readers may share one; `options.cache` is not looked at.
        `needed`: `Order.next_need`, by which a cache makes room; without it the oldest goes first.
        `beside`: other data sets of this process, that share the cache and what may be mapped.
        """
        if mapped is None:
            mapped = not storage.is_remote(storage.join(root, manifest.shards[0].name))
        self._manifest, self._options = manifest, options
        self.position = 0  # that is being gathered; its owner moves it on
        at = (lambda blocks: needed(blocks, self.position)) if needed is not None else _unknown
        self.blocks = tars_of(
            root, manifest, mapped=mapped, cache=cache, needed=at, decoders=options.decoders
        )
        self._names = tuple(f.name for f in manifest.fields)
        self._pool = ThreadPoolExecutor(options.threads, thread_name_prefix="shards-io")
        self._effort = Effort()  # a store that is away is away for all blocks
        self._announced: deque[list[int]] = deque()  # blocks of each batch to come
        self._wanted: dict[int, int] = {}  # announced batches that need a block
        self._coming: dict[int, Future[dict[int, Any]]] = {}  # what the layout holds of a block,
        self._ready: dict[int, Any] = {}  # or the DamagedError it met
        self._idle: OrderedDict[int, Any] = OrderedDict()
        self._cached = cache is not None
        self._idle_most = self._idle_capacity(mapped, cache, [manifest, *beside])
        self._substitutes: dict[int, tuple[int, Any]] = {}  # of damaged blocks: a sound one

    @property
    def counts(self) -> dict[str, int]:
        """Ranges `fetched`, their `bytes`, blocks `cached`, and those asked for `again`."""
        return {n: self.blocks.counts[n] for n in ("fetched", "bytes", "cached", "again")}

    def blocks_in(self, size: int, *, most: int) -> int:
        """How many blocks this many bytes hold, at least 1 and at most `most`."""
        return min(most, max(1, size // (self._manifest.sample_bytes * self._manifest.block)))

    @property
    def together(self) -> int:
        """Bytes of several batches that one `take` should make."""
        return self.blocks.together

    @property
    def announced(self) -> int:
        """Blocks that announced batches need."""
        return len(self._wanted)

    def want(self, *batches: NDArray[np.int64]) -> None:
        """Announces the batches that `take` will be asked for next after those announced before."""
        fresh = dict[int, None]()
        size = self._manifest.block
        several = [
            [*range(int(o[0]) // size, int(o[-1]) // size + 1)]
            if _follow_each_other(o)
            else list(dict.fromkeys((o // size).tolist()))
            for o in batches
        ]
        self._announced += several
        for block in (b for blocks in several for b in blocks):
            self._wanted[block] = self._wanted.get(block, 0) + 1
            if block in self._idle:
                self._ready[block] = self._idle.pop(block)
            elif block not in self._ready and block not in self._coming:
                fresh[block] = None
        for run in self.blocks.runs([*fresh]):
            if self.blocks.is_verified(run[0]):
                self._ready |= self.blocks.read(run)
            else:
                future = self._pool.submit(self._effort.do, partial(self.blocks.read, run))
                self._coming |= dict.fromkeys(run, future)

    def gather(self, ordinals: NDArray[np.int64], fields: Sequence[str] | None = None) -> Arrays:
        """The samples at any `ordinals` (n,), where nothing is announced: `take` for those who plan nothing.

        With `fields`, such as ("y",), those alone and `ordinal`. Where a block is arrays no others are read, and
        where it is pictures none is decoded for them; what is damaged is then an error.

        Raises:
            UserError: no such field. And what `take` raises.
        """
        if fields is None:
            self.want(ordinals)
            try:
                return self.take(ordinals)[0]
            except Exception:
                self._effort = Effort()  # whoever asks again may find the store back
                raise
        names = ["id" if name == "key" else name for name in fields]
        unknown = [f for f, name in zip(fields, names, strict=True) if name not in self._names]
        if unknown:
            known = ", ".join("key" if name == "id" else name for name in self._names)
            raise UserError(f"field {unknown[0]!r} is not in these shards: choose among {known}")
        parts, effort = _by_block(ordinals, self._manifest.block), Effort()
        opened = self._pool.map(
            lambda part: effort.do(partial(self.blocks.read_fields, part[1], names)), parts
        )
        picked = [Picked(*part, found) for part, found in zip(parts, opened, strict=True)]
        return _named(self.blocks.gather(picked, len(ordinals), names)) | {"ordinal": ordinals}

    def take(self, *batches: NDArray[np.int64]) -> tuple[Arrays, NDArray[np.bool_]]:
        """The samples of the batches announced first, end to end, and which of them stand in for damaged ones.

        `x` (n, C, H, W), `y` (n,) if any, `key` (n,) str, `ordinal` (n,) int64: of the sample that is
        there, which for a damaged one is another than was asked for.

        Raises:
            DamagedError: a tar or a block is not what was written, and this may not be, or no longer.
        """
        try:
            return self._take(np.concatenate(batches))
        finally:
            for _ in batches:
                self._release(self._announced.popleft())

    def end(self) -> None:
        """Gives up what is announced, from any thread: whoever waits for it in `take` is woken at once."""
        self._effort.end(ValueError("this reader is closed"))
        self.blocks.end()

    def close(self) -> None:
        """Ends the threads, at the latest when requests that are under way are answered, or fall silent."""
        self.end()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.blocks.close()

    def _take(self, ordinals: NDArray[np.int64]) -> tuple[Arrays, NDArray[np.bool_]]:
        ordinals_read, substituted = ordinals.copy(), np.zeros(len(ordinals), dtype=bool)
        picked = []
        for here, block, rows in _by_block(ordinals, self._manifest.block):
            opened = self._block(block)
            if isinstance(opened, DamagedError):
                first = block * self._manifest.block
                block, opened = self._substitute(block, opened)
                rows = (ordinals[here] - first) % self._count_of(block)
                ordinals_read[here] = block * self._manifest.block + rows
                substituted[here] = True
            picked.append(Picked(here, block, rows, opened))
        found = _named(self.blocks.gather(picked, len(ordinals), self._names))
        return {**found, "ordinal": ordinals_read}, substituted

    def _block(self, block: int) -> Any:
        if block in self._coming:
            for number, value in self._coming[block].result().items():
                if self._coming.pop(number, None) is not None:
                    self._ready[number] = value
        return self._ready[block]

    def _release(self, blocks: list[int]) -> None:
        for block in blocks:
            self._wanted[block] -= 1
            if not self._wanted[block]:
                del self._wanted[block]
                opened = self._ready.pop(block, None)
                if opened is None:  # the batch failed before it came to this block
                    self._coming.pop(block, None)
                elif self._keeps_idle(opened):
                    self._idle[block] = opened
        while len(self._idle) > self._idle_most:
            self._idle.popitem(last=False)

    def _idle_capacity(self, mapped: bool, cache: Cache | None, read: Sequence[Manifest]) -> int:
        """Blocks kept after use. A file deleted to make room lives on while it is mapped, so where a cache has not
        room for all that is `read`, few of its files stay mapped."""
        total = sum(s.bytes for m in read for s in m.shards)
        if mapped or (cache is not None and cache.budget >= total):
            parts = len(self.blocks.ranges(0)) + 1  # some blocks have one more than others
            return MOST // (parts * len(read))
        room = _IDLE_BYTES if cache is None else min(_IDLE_BYTES, cache.budget // 32)
        return self.blocks_in(room // len(read), most=WINDOW)

    def _keeps_idle(self, opened: Any) -> bool:
        """Whether to keep a block after use: mappings cost next to nothing, and a cache replaces memory."""
        mapped = not isinstance(opened, DamagedError) and self.blocks.is_mapped(opened)
        return mapped or not self._cached

    def _count_of(self, block: int) -> int:
        """Samples of a block: all but the last are full."""
        return min(self._manifest.block, self._manifest.count - block * self._manifest.block)

    def _substitute(self, block: int, error: DamagedError) -> tuple[int, Any]:
        """The next sound block after a damaged one, and what is held of it."""
        if self._options.on_damage == "fail":
            raise error
        if block not in self._substitutes:
            self._count_damage(block, error)
            self._substitutes[block] = self._next_sound(block, error)
        return self._substitutes[block]

    def _count_damage(self, block: int, error: DamagedError) -> None:
        lost = sum(map(self._count_of, [block, *self._substitutes]))
        bound = self._options.damaged
        if lost > bound * self._manifest.count:
            raise DamagedError(
                f"{error}; with it {lost:,} of {self._manifest.count:,} samples are damaged, more than the "
                f"share of {bound:g} that may be substituted"
            ) from error
        _log.warning("%s; others stand in for its %d samples", error, self._count_of(block))

    def _next_sound(self, block: int, error: DamagedError) -> tuple[int, Any]:
        total = self._manifest.block_count
        for other in ((block + k) % total for k in range(1, total)):
            found = self._effort.do(partial(self.blocks.read, [other]))[other]
            if not isinstance(found, DamagedError):
                return other, found
        raise error


def tars_of(
    root: storage.Url,
    manifest: Manifest,
    *,
    mapped: bool,
    cache: Cache | None = None,
    needed: Needed = lambda blocks: np.zeros(len(blocks)),
    decoders: int = 0,
) -> Tars[Any]:
    """The blocks of a manifest, in the layout that it names."""
    if manifest.layout == "samples":
        return Samples(root, manifest, mapped=mapped, cache=cache, needed=needed, decoders=decoders)
    if decoders:
        _log.warning("decoders=%d decode nothing: %s holds arrays, not pictures", decoders, root)
    return Blocks(root, manifest, mapped=mapped, cache=cache, needed=needed)


def _by_block(ordinals: NDArray[np.int64], size: int) -> list[tuple[Rows, int, Rows]]:
    """Rows of a batch, a block of `size` samples, and rows of the block."""
    if _follow_each_other(ordinals):
        first, end = int(ordinals[0]), int(ordinals[-1]) + 1
        blocks = range(first // size, -(-end // size))
        ends = [(b, max(first, b * size), min(end, (b + 1) * size)) for b in blocks]
        return [
            (slice(low - first, high - first), b, slice(low - b * size, high - b * size))
            for b, low, high in ends
        ]
    numbers, rows = np.divmod(ordinals, size)
    order = np.argsort(numbers, kind="stable")
    cuts = np.flatnonzero(np.diff(numbers[order])) + 1
    parts = [here for here in np.split(order, cuts) if here.size]
    return [(here, int(numbers[here[0]]), rows[here]) for here in parts]


def _follow_each_other(ordinals: NDArray[np.int64]) -> bool:
    count = len(ordinals)
    return (
        count > 0
        and int(ordinals[-1]) - int(ordinals[0]) == count - 1
        and bool((ordinals[1:] - ordinals[:-1] == 1).all())
    )


def _named(found: Arrays) -> Arrays:
    """Keys as text, under the name that batches have for them."""
    ids: Any = found.pop("id", None)
    if ids is None:
        return found
    size = ids.dtype.itemsize
    letters = np.ascontiguousarray(ids).view(np.uint8)
    if letters.max(initial=0) < 128:  # ASCII: NumPy's text is its codes in 32 bits
        return {**found, "key": letters.astype(np.uint32).view(f"U{size}")}
    return {**found, "key": np.char.decode(ids, "utf-8").astype(f"U{size}")}


def _unknown(blocks: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.zeros(len(blocks))
