"""Provides the bytes of blocks: from a mapped tar, the cache of the node, or range reads of an object.

Tars on a file system are mapped: the ranks of a node share the page cache, and one sample costs a page or two. From
S3, neighbouring blocks are read by one range. In both cases hashes are compared when a process first reads a
block, and a block from S3 is fetched a second time before it counts as damaged. The two layouts,
`shards.read.blocks` and `shards.read.samples`, interpret the bytes. Any number of threads may read.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from shards import storage
from shards.errors import ChangedError, DamagedError
from shards.format.manifest import Manifest
from shards.read.cache import FOREIGN, Cache, Piece
from shards.read.mapped_files import map_file

Arrays = dict[str, NDArray[np.generic]]
Raw = NDArray[np.uint8]
Rows = NDArray[np.int64] | slice  # numbers of samples; of neighbours, a slice with both ends
Needed = Callable[[NDArray[np.int64]], NDArray[np.float64]]  # of blocks, as `cache.Need` of pieces
T = TypeVar("T")
H = TypeVar("H")
B = TypeVar("B", NDArray[np.uint8], memoryview)

MAPS = 1024  # tars mapped at once beside those of blocks at hand
TOGETHER = 16 << 20  # bytes of neighbours that one range takes; stores like 8 to 16 MiB

_log = logging.getLogger("shards")


class ByteRange(NamedTuple):
    """Bytes [start, stop) of a tar, by its number in the manifest."""

    shard: int
    start: int
    stop: int


class Picked(NamedTuple, Generic[H]):
    """Samples of one block that a batch takes."""

    here: Rows  # in the batch
    block: int
    rows: Rows  # in the block
    opened: H


class Tars(ABC, Generic[H]):
    """Blocks of one manifest, by number, as a layout holds them: `H`."""

    together = 0  # bytes of several batches that are gathered in one go: where that costs less than one by one

    def __init__(
        self,
        root: storage.Url,
        manifest: Manifest,
        *,
        mapped: bool,
        cache: Cache | None = None,
        needed: Needed = lambda blocks: np.zeros(len(blocks)),
    ) -> None:
        """`mapped`: map tars, or fetch ranges. By `needed` a cache decides what to delete."""
        self._root, self._manifest = root, manifest
        self._mapped, self._cache, self._needed = mapped, cache, needed
        self._verified = np.zeros(manifest.block_count, dtype=bool)
        self._starts: dict[str, dict[int, int]] = {}  # of tars in the cache: blocks by first byte
        self._maps = Recent(MAPS, self._map)
        self._versions = Recent(len(manifest.shards) + 1, self._version)
        self._counting = threading.Lock()
        self.counts: Counter[str] = Counter()  # fetched, bytes, cached, again

    @abstractmethod
    def ranges(self, block: int) -> list[ByteRange]:
        """What of the tars the block takes up, in order; no part is longer than a range should be."""

    @abstractmethod
    def open(self, block: int, data: Sequence[Raw]) -> H:
        """The block in the bytes of its parts."""

    @abstractmethod
    def check(self, block: int, opened: H) -> None:
        """Raises a DamagedError where the block's bytes do not have their hashes."""

    @abstractmethod
    def gather(self, picked: Iterable[Picked[H]], count: int, names: Sequence[str]) -> Arrays:
        """The fields `names` of a batch of `count` samples."""

    @abstractmethod
    def read_fields(self, block: int, names: Sequence[str]) -> H:
        """What `gather` needs for the fields `names`, read anew; raises DamagedError."""

    @abstractmethod
    def is_mapped(self, opened: H) -> bool:
        """Whether its bytes are a file's, and not memory of our own."""

    def end(self) -> None:
        """Wakes whoever gathers, from any thread, where that takes long; it raises a ValueError."""

    def close(self) -> None:
        """Ends what a layout started."""

    def is_verified(self, block: int) -> bool:
        """Whether to read it costs no I/O worth a thread."""
        return self._mapped and bool(self._verified[block])

    def runs(self, blocks: Sequence[int]) -> list[list[int]]:
        """The blocks in groups that one call of `read` should take, in the order of their first."""
        if self._mapped:
            return [[b] for b in blocks]
        place = {b: i for i, b in enumerate(blocks)}
        groups: list[list[int]] = []
        for b in sorted(blocks):
            if groups and self._joins(groups[-1], b):
                groups[-1].append(b)
            else:
                groups.append([b])
        return sorted(groups, key=lambda group: min(place[b] for b in group))

    def read(self, run: Sequence[int]) -> dict[int, H | DamagedError]:
        """Each block, or what is wrong with it."""
        if self._mapped:
            return {b: damage_or(partial(self._view, b)) for b in run}
        if self._cache is None:
            return self._fetch(run)
        found = self._from_cache(self._cache, run)
        missing = [b for b in run if b not in found]
        if missing:
            with self._cache.fetching(self.pieces(run[0])[0].tar):
                found |= self._from_cache(self._cache, missing)  # another process was faster
                found |= self._fetch([b for b in missing if b not in found])
        return found

    def pieces(self, block: int) -> list[Piece]:
        """The block's parts by the names that a cache gives them."""
        shards = self._manifest.shards
        return [Piece(shards[p.shard].sha256, p.start, p.stop) for p in self.ranges(block)]

    def _need(self, pieces: Sequence[Piece]) -> NDArray[np.float64]:
        """When each is needed next; another data set's pieces are not ours to judge, and go first."""
        found = np.full(len(pieces), FOREIGN)
        blocks = np.array([self._number(piece) for piece in pieces], dtype=np.int64)
        ours = blocks >= 0
        found[ours] = self._needed(blocks[ours])
        return found

    def _number(self, piece: Piece) -> int:
        """Which block a piece is of; -1 of one that is none of ours."""
        if piece.tar not in self._starts:
            shard, blocks = self._tars.get(piece.tar, (-1, range(0)))
            self._starts[piece.tar] = {
                p.start: b for b in blocks for p in self.ranges(b) if p.shard == shard
            }
        return self._starts[piece.tar].get(piece.start, -1)

    @cached_property
    def _tars(self) -> dict[str, tuple[int, range]]:
        """Each tar's number, and the blocks that it has a part of, by its sha256."""
        block, shards = self._manifest.block, self._manifest.shards
        last = [*accumulate(s.count for s in shards)]
        return {
            s.sha256: (number, range((end - s.count) // block, -(-end // block)))
            for number, (s, end) in enumerate(zip(shards, last, strict=True))
        }

    def _joins(self, group: Sequence[int], block: int) -> bool:
        if block != group[-1] + 1:
            return False
        first, last, more = (self.ranges(b) for b in (group[0], group[-1], block))
        return (
            len(first) == len(last) == len(more) == 1
            and first[0].shard == more[0].shard
            and more[0].stop - first[0].start <= TOGETHER
        )

    def _view(self, block: int) -> H:
        """A block in the mapped tars."""
        opened = self.open(
            block, [self._maps[p.shard][p.start : p.stop] for p in self.ranges(block)]
        )
        if not self._verified[block]:
            self.check(block, opened)
            self._verified[block] = True
        return opened

    def _from_cache(self, cache: Cache, run: Sequence[int]) -> dict[int, H | DamagedError]:
        found: dict[int, H | DamagedError] = {}
        for block in run:
            opened = self._cached(cache, block)
            if opened is None:
                continue
            try:
                self.check(block, opened)
                found[block] = opened
                self._count(cached=1)
            except DamagedError:  # a disk's fault, which fetching again mends
                _log.warning("the cache's copy of block %d is damaged; fetched again", block)
                for piece in self.pieces(block):
                    cache.drop(piece)
        return found

    def _cached(self, cache: Cache, block: int) -> H | None:
        """A block whose parts are all in the cache, mapped."""
        data = []
        for piece in self.pieces(block):
            kept = cache.open(piece)
            if kept is None:
                return None
            data.append(kept)
        return self.open(block, data)

    def _fetch(self, run: Sequence[int]) -> dict[int, H | DamagedError]:
        """Blocks by one range read each group of neighbours; what does not hold is read once more, alone."""
        found: dict[int, H | DamagedError] = {}
        for group in self.runs(run):
            ranges = [span for block in group for span in self.ranges(block)]
            if len(group) > 1:
                ranges = [ByteRange(ranges[0].shard, ranges[0].start, ranges[-1].stop)]
            try:
                fetched = [(span, self._range(span)) for span in ranges]
            except DamagedError as error:
                found |= dict.fromkeys(group, error)
                continue
            for block in group:
                data = [cut(span, fetched) for span in self.ranges(block)]
                found[block] = damage_or(partial(self._checked, block, data))
        return found

    def _checked(self, block: int, data: list[Raw]) -> H:
        opened = self.open(block, data)
        try:
            self.check(block, opened)
        except DamagedError as error:
            _log.warning("%s; asked for again", error)
            self._count(again=1)
            data = [self._range(span) for span in self.ranges(block)]
            opened = self.open(block, data)
            self.check(block, opened)
        if self._cache is None:
            return opened
        for piece, content in zip(self.pieces(block), data, strict=True):
            if not self._cache.put(piece, content.data, self._need):
                return opened
        kept = self._cached(
            self._cache, block
        )  # pages that all processes share, not memory of our own
        return opened if kept is None else kept

    def _range(self, span: ByteRange) -> Raw:
        """The part's bytes, of one version of the object."""
        url = self.url(span.shard)
        try:
            try:
                data = self._read(span)
            except ChangedError as error:  # written again, perhaps as it was: the hashes will tell
                _log.warning("%s; asked for again", error)
                self._versions.forget(span.shard)
                data = self._read(span)
        except FileNotFoundError:
            raise DamagedError(f"{url} is missing, but the manifest names it") from None
        self._count(fetched=1, bytes=len(data))
        return np.frombuffer(data, dtype=np.uint8)

    def _read(self, span: ByteRange) -> bytes:
        etag = self._versions[span.shard]
        return storage.read_range(self.url(span.shard), span.start, span.stop, etag=etag)

    def _version(self, shard: int) -> str | None:
        return self._stat(shard).etag

    def _map(self, shard: int) -> Raw:
        self._stat(shard)
        return map_file(self.url(shard), self._manifest.shards[shard].bytes)

    def _stat(self, shard: int) -> storage.Stat:
        url, expected = self.url(shard), self._manifest.shards[shard].bytes
        try:
            found = storage.stat(url)
        except FileNotFoundError:
            raise DamagedError(f"{url} is missing, but the manifest names it") from None
        if found.size != expected:
            raise DamagedError(
                f"{url} has {found.size:,} bytes, its manifest promises {expected:,}"
            )
        return found

    def url(self, shard: int) -> str:
        """Path or url of a tar."""
        return storage.join(self._root, self._manifest.shards[shard].name)

    def _count(self, **more: int) -> None:
        with self._counting:
            self.counts.update(more)


def cut(span: ByteRange, fetched: Iterable[tuple[ByteRange, B]]) -> B:
    """The part's bytes out of those that hold it."""
    shard, start, stop = span
    for whole, data in fetched:
        if whole.shard == shard and whole.start <= start and stop <= whole.stop:
            return data[start - whole.start : stop - whole.start]
    raise ValueError(f"{span} is in none of the parts that were read")


def damage_or(read: Callable[[], H]) -> H | DamagedError:
    """What `read` returns, or the damage it raises."""
    try:
        return read()
    except DamagedError as error:
        return error


class Recent(Generic[T]):
    """The `capacity` values asked for last, by number; others are loaded again. For many threads."""

    def __init__(self, capacity: int, load: Callable[[int], T]) -> None:
        self._capacity, self._load = capacity, load
        self._held: OrderedDict[int, T] = OrderedDict()
        self._lock = threading.Lock()

    def __getitem__(self, number: int) -> T:
        with self._lock:
            if number in self._held:
                self._held.move_to_end(number)
                return self._held[number]
        value = self._load(number)  # two threads may do so at once, which harms nobody
        with self._lock:
            while len(self._held) >= self._capacity:
                self._held.popitem(last=False)
            self._held[number] = value
        return value

    def forget(self, number: int) -> None:
        with self._lock:
            self._held.pop(number, None)
