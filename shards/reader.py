"""Samples by ordinal, out of a folder's tars or from S3, every block verified once per process.

On a file system a tar is mapped: payloads lie on page boundaries, ranks of a node share the page
cache, and one sample costs one page or two. From S3 a block is fetched by one range and kept in
memory while it is recent, a window's worth. Either way its xxh3 is compared when first read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards import storage
from shards.errors import DamagedError
from shards.manifest import Manifest
from shards.order import WINDOW

Arrays = dict[str, NDArray[np.generic]]
T = TypeVar("T")

MAPS = 1024  # tars mapped at once; a process may hold 65,530 mappings
VIEWS = 65_536  # blocks of mapped tars kept at hand; a view costs a hundred bytes or two
FETCHED = 2 * WINDOW  # blocks from S3 kept in memory: the window being read, and the one before


class Reader:
    """Gathers samples of one manifest. Not thread-safe: one thread owns it."""

    def __init__(
        self, root: storage.Url, manifest: Manifest, *, mapped: bool | None = None
    ) -> None:
        """`mapped`: map tars, or fetch blocks; None maps what is on a file system."""
        self._root, self._manifest = root, manifest
        self._starts = np.concatenate([[0], np.cumsum(manifest.blocks["rows"], dtype=np.int64)])
        self._verified = np.zeros(len(manifest.blocks), dtype=bool)
        if mapped is None:
            mapped = not storage.is_remote(root)
        self._blocks = Recent(VIEWS, self._view) if mapped else Recent(FETCHED, self._fetch)
        self._maps = Recent(MAPS, self._map)

    def gather(self, ordinals: NDArray[np.int64]) -> Arrays:
        """Fields of the samples at `ordinals` (n,): `x` (n, C, H, W), `y` (n,) if any, `key` (n,) str.

        Raises:
            DamagedError: a tar or a block is not what was written.
        """
        blocks = np.searchsorted(self._starts, ordinals, side="right") - 1
        rows = ordinals - self._starts[blocks]
        found = {
            f.name: np.empty((len(ordinals), *f.shape), dtype=f.dtype)
            for f in self._manifest.fields
        }
        by_block = np.argsort(blocks, kind="stable")
        cuts = np.flatnonzero(np.diff(blocks[by_block])) + 1
        for here in np.split(by_block, cuts):
            if here.size:
                for name, values in self._blocks[int(blocks[here[0]])].items():
                    found[name][here] = values[rows[here]]
        found["key"] = np.char.decode(found.pop("id"), "utf-8")
        return found

    def _view(self, block: int) -> Arrays:
        """A block's payloads where they lie in the mapped tar."""
        row = self._manifest.blocks[block]
        return self._payloads(block, self._maps[int(row["shard"])], 0)

    def _fetch(self, block: int) -> Arrays:
        """A block's payloads by one range read, from its first payload's start to its last's end."""
        row = self._manifest.blocks[block]
        start, stop = int(row["offset"].min()), int((row["offset"] + row["bytes"]).max())
        url = self._url(int(row["shard"]))
        try:
            data = storage.read_range(url, start, stop)
        except FileNotFoundError:
            raise DamagedError(f"{url} is missing, but the manifest names it") from None
        return self._payloads(block, np.frombuffer(data, dtype=np.uint8), start)

    def _map(self, shard: int) -> NDArray[np.uint8]:
        url, expected = self._url(shard), self._manifest.shards[shard].bytes
        try:
            found = storage.size(url)
        except FileNotFoundError:
            raise DamagedError(f"{url} is missing, but the manifest names it") from None
        if found != expected:  # a mapping that is longer than its file would end the process
            raise DamagedError(f"{url} has {found:,} bytes, its manifest promises {expected:,}")
        return np.memmap(url, dtype=np.uint8, mode="r")

    def _payloads(self, block: int, data: NDArray[np.uint8], start: int) -> Arrays:
        row, found = self._manifest.blocks[block], {}
        for column, f in enumerate(self._manifest.fields):
            first = int(row["offset"][column]) - start
            payload = data[first : first + int(row["bytes"][column])]
            if not self._verified[block]:
                self._check(block, column, payload)
            found[f.name] = payload.view(f.dtype).reshape(int(row["rows"]), *f.shape)
        self._verified[block] = True
        return found

    def _check(self, block: int, column: int, payload: NDArray[np.uint8]) -> None:
        row, field = self._manifest.blocks[block], self._manifest.fields[column]
        if xxhash.xxh3_128_digest(payload.data) != row["xxh3"][column].tobytes():
            raise DamagedError(
                f"{self._url(int(row['shard']))}: {field.name} of block {block}, "
                f"{int(row['bytes'][column]):,} bytes at {int(row['offset'][column]):,}, does not have "
                f"its xxh3: run `python -m tools.shards verify {self._root}`"
            )

    def _url(self, shard: int) -> str:
        return storage.join(self._root, self._manifest.shards[shard].name)


class Recent(Generic[T]):
    """The `capacity` values asked for last, by number; others are loaded again."""

    def __init__(self, capacity: int, load: Callable[[int], T]) -> None:
        self._capacity, self._load = capacity, load
        self._held: OrderedDict[int, T] = OrderedDict()

    def __getitem__(self, number: int) -> T:
        if number not in self._held:
            while len(self._held) >= self._capacity:
                self._held.popitem(last=False)
            self._held[number] = self._load(number)
        self._held.move_to_end(number)
        return self._held[number]
