"""Where the bytes of blocks come from: a mapped tar, the node's cache, or one range of an object.

On a file system a tar is mapped: payloads lie on page boundaries, ranks of a node share the page cache, and
one sample costs one page or two. From S3, blocks that lie one after the other come by one range. Either way the
xxh3 is compared when a process first reads a block, and what comes from afar is asked for a second time
before it counts as damaged. Any number of threads may read.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import accumulate
from typing import Generic, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards import storage
from shards.cache import FOREIGN, Cache, Piece
from shards.errors import ChangedError, DamagedError
from shards.manifest import Manifest

Arrays = dict[str, NDArray[np.generic]]
Raw = NDArray[np.uint8]
Needed = Callable[[NDArray[np.int64]], NDArray[np.float64]]  # of blocks, as `cache.Need` of pieces
T = TypeVar("T")

MAPS = 1024  # tars mapped at once; a process may hold 65,530 mappings
TOGETHER = 16 << 20  # bytes of neighbouring blocks that one range takes; stores like 8 to 16 MiB

_log = logging.getLogger("shards")


class Blocks:
    """Blocks of one manifest, by number."""

    def __init__(
        self,
        root: storage.Url,
        manifest: Manifest,
        *,
        mapped: bool,
        cache: Cache | None = None,
        needed: Needed = lambda blocks: np.zeros(len(blocks)),
    ) -> None:
        """`mapped`: map tars, or fetch ranges. `needed` tells a cache what it may give up."""
        self._root, self._manifest = root, manifest
        self._mapped, self._cache, self._needed = mapped, cache, needed
        self._verified = np.zeros(len(manifest.blocks), dtype=bool)
        self._starts: dict[str, dict[int, int]] = {}  # of tars in the cache: blocks by first byte
        self._maps = Recent(MAPS, self._map)
        self._versions = Recent(len(manifest.shards) + 1, self._version)
        self._counting = threading.Lock()
        self.counts: Counter[str] = Counter()  # fetched, bytes, cached, again

    def known(self, block: int) -> bool:
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

    def read(self, run: Sequence[int]) -> dict[int, Arrays | DamagedError]:
        """Each block's payloads, or what is wrong with it."""
        if self._mapped:
            return {b: _settled(partial(self._view, b)) for b in run}
        found: dict[int, Arrays | DamagedError] = self._from_cache(run)
        missing = [b for b in run if b not in found]
        if missing and self._cache is not None:
            shard = int(self._manifest.blocks["shard"][run[0]])
            with self._cache.fetching(self._manifest.shards[shard].sha256):
                found |= self._from_cache(missing)  # another process was faster
                missing = [b for b in missing if b not in found]
                found |= self._fetch(missing)
        else:
            found |= self._fetch(missing)
        return found

    def piece(self, block: int) -> Piece:
        """What of its tar the block's payloads span."""
        shard = self._manifest.shards[int(self._manifest.blocks["shard"][block])]
        return Piece(shard.sha256, *self._span(block))

    def _span(self, block: int) -> tuple[int, int]:
        """Bytes of the tar, from the block's first payload to the end of its last."""
        row = self._manifest.blocks[block]
        return int(row["offset"].min()), int((row["offset"] + row["bytes"]).max())

    def _need(self, pieces: Sequence[Piece]) -> NDArray[np.float64]:
        """When each is needed next; another data set's pieces are not ours to judge, and go first."""
        found = np.full(len(pieces), FOREIGN)
        blocks = np.array([self._number(piece) for piece in pieces], dtype=np.int64)
        ours = blocks >= 0
        found[ours] = self._needed(blocks[ours])
        return found

    def _number(self, piece: Piece) -> int:
        """Which block a piece is; -1 of one that is none of ours."""
        if piece.tar not in self._starts:
            blocks = self._tars.get(piece.tar, range(0))
            offsets = self._manifest.blocks["offset"][blocks.start : blocks.stop]
            starts = offsets.min(axis=1).tolist() if blocks else []
            self._starts[piece.tar] = dict(zip(starts, blocks, strict=True))
        return self._starts[piece.tar].get(piece.start, -1)

    @cached_property
    def _tars(self) -> dict[str, range]:
        """The blocks of each tar, by its sha256."""
        ends = accumulate(shard.blocks for shard in self._manifest.shards)
        return {
            s.sha256: range(e - s.blocks, e)
            for s, e in zip(self._manifest.shards, ends, strict=True)
        }

    def _joins(self, group: Sequence[int], block: int) -> bool:
        shard, last = self._manifest.blocks["shard"], group[-1]
        return bool(
            block == last + 1
            and shard[block] == shard[last]
            and self._span(block)[1] - self._span(group[0])[0] <= TOGETHER
        )

    def _view(self, block: int) -> Arrays:
        """A block's payloads where they lie in the mapped tar."""
        return self._payloads(block, self._maps[int(self._manifest.blocks["shard"][block])], 0)

    def _from_cache(self, run: Sequence[int]) -> dict[int, Arrays | DamagedError]:
        found: dict[int, Arrays | DamagedError] = {}
        for block in run if self._cache is not None else ():
            assert self._cache is not None
            piece = self.piece(block)
            data = self._cache.open(piece)
            if data is None:
                continue
            try:
                found[block] = self._payloads(block, data, piece.start)
                self._count(cached=1)
            except DamagedError:  # a disk's fault, which fetching again mends
                _log.warning("the cache's copy of block %d is damaged; fetched again", block)
                self._cache.drop(piece)
        return found

    def _fetch(self, run: Sequence[int]) -> dict[int, Arrays | DamagedError]:
        """Blocks by one range read each group of neighbours; what does not hold is read once more, alone."""
        found: dict[int, Arrays | DamagedError] = {}
        for group in self.runs(run):
            try:
                start, data = self._span(group[0])[0], self._range(group)
            except DamagedError as error:
                found |= dict.fromkeys(group, error)
                continue
            for block in group:
                found[block] = _settled(partial(self._checked, block, data, start))
        return found

    def _checked(self, block: int, data: Raw, start: int) -> Arrays:
        try:
            arrays = self._payloads(block, data, start)
        except DamagedError as error:
            _log.warning("%s; asked for again", error)
            self._count(again=1)
            data, start = self._range([block]), self._span(block)[0]
            arrays = self._payloads(block, data, start)
        if self._cache is None:
            return arrays
        piece = self.piece(block)
        if self._cache.put(piece, data[piece.start - start : piece.stop - start].data, self._need):
            kept = self._cache.open(piece)  # pages that all processes share, not memory of our own
            return arrays if kept is None else self._placed(block, kept, piece.start)
        return arrays

    def _range(self, group: Sequence[int]) -> Raw:
        """From the first block's start to the last one's end, of one version of the object."""
        shard = int(self._manifest.blocks["shard"][group[0]])
        start, stop = self._span(group[0])[0], self._span(group[-1])[1]
        url = self._url(shard)
        try:
            try:
                data = storage.read_range(url, start, stop, etag=self._versions[shard])
            except ChangedError as error:  # written again, perhaps as it was: the hashes will tell
                _log.warning("%s; asked for again", error)
                self._versions.forget(shard)
                data = storage.read_range(url, start, stop, etag=self._versions[shard])
        except FileNotFoundError:
            raise DamagedError(f"{url} is missing, but the manifest names it") from None
        self._count(fetched=1, bytes=len(data))
        return np.frombuffer(data, dtype=np.uint8)

    def _version(self, shard: int) -> str | None:
        return self._stat(shard).etag

    def _map(self, shard: int) -> Raw:
        self._stat(shard)  # a mapping that is longer than its file would end the process
        return np.memmap(os.fspath(self._url(shard)), dtype=np.uint8, mode="r")

    def _stat(self, shard: int) -> storage.Stat:
        url, expected = self._url(shard), self._manifest.shards[shard].bytes
        try:
            found = storage.stat(url)
        except FileNotFoundError:
            raise DamagedError(f"{url} is missing, but the manifest names it") from None
        if found.size != expected:
            raise DamagedError(
                f"{url} has {found.size:,} bytes, its manifest promises {expected:,}"
            )
        return found

    def _payloads(self, block: int, data: Raw, start: int) -> Arrays:
        """The fields of a block, compared with their hashes; `data` begins at byte `start` of the tar."""
        found = self._placed(block, data, start)
        if not (self._mapped and self._verified[block]):
            for column, f in enumerate(self._manifest.fields):
                self._check(block, column, found[f.name])
            self._verified[block] = True
        return found

    def _placed(self, block: int, data: Raw, start: int) -> Arrays:
        row, found = self._manifest.blocks[block], {}
        for column, f in enumerate(self._manifest.fields):
            first = int(row["offset"][column]) - start
            payload = data[first : first + int(row["bytes"][column])]
            found[f.name] = payload.view(f.dtype).reshape(int(row["rows"]), *f.shape)
        return found

    def _check(self, block: int, column: int, values: NDArray[np.generic]) -> None:
        row, field = self._manifest.blocks[block], self._manifest.fields[column]
        if xxhash.xxh3_128_digest(values.view(np.uint8).data) != row["xxh3"][column].tobytes():
            raise DamagedError(
                f"{self._url(int(row['shard']))}: {field.name} of block {block}, "
                f"{int(row['bytes'][column]):,} bytes at {int(row['offset'][column]):,}, does not have "
                f"its xxh3: run `python -m tools.shards verify {self._root}`"
            )

    def _url(self, shard: int) -> str:
        return storage.join(self._root, self._manifest.shards[shard].name)

    def _count(self, **more: int) -> None:
        with self._counting:
            self.counts.update(more)


def _settled(read: Callable[[], Arrays]) -> Arrays | DamagedError:
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
