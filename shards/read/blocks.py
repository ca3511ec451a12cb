"""The layout of blocks: one member holds one field of a whole block, is hashed as one, and its payload is an array.

Payloads start on page boundaries of their tar, so that a mapped block is its arrays without a copy.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.errors import DamagedError
from shards.format.manifest import Field
from shards.read.block_bytes import Arrays, ByteRange, Picked, Raw, Rows, Tars
from shards.read.mapped_files import is_mapped

__all__ = ["Arrays", "Blocks"]

_LARGE = 1024  # bytes of a sample


class Blocks(Tars[Arrays]):
    """Blocks as arrays by field, (rows,) each, of one item a sample."""

    together = 8 << 20  # a block's samples for several batches by one copy

    def ranges(self, block: int) -> list[ByteRange]:
        """From the block's first payload to the end of its last."""
        row = self._manifest.blocks[block]
        start, stop = int(row["offset"].min()), int((row["offset"] + row["bytes"]).max())
        return [ByteRange(int(row["shard"]), start, stop)]

    def open(self, block: int, data: Sequence[Raw]) -> Arrays:
        row = self._manifest.blocks[block]
        found: Arrays = {}
        start = int(row["offset"].min())
        for column, f in enumerate(self._manifest.fields):
            first = int(row["offset"][column]) - start
            payload = data[0][first : first + int(row["bytes"][column])]
            found[f.name] = _array(payload, f)
        return found

    def check(self, block: int, opened: Arrays) -> None:
        for column, f in enumerate(self._manifest.fields):
            self._compare(block, column, opened[f.name])

    def gather(self, picked: Iterable[Picked[Arrays]], count: int, names: Sequence[str]) -> Arrays:
        fields = [f for f in self._manifest.fields if f.name in names]
        found: Arrays = {f.name: np.empty((count, *_row(f).shape), _row(f).base) for f in fields}
        for here, _, rows, opened in picked:
            to, of = _neighbours(here), _neighbours(rows)
            for name, values in found.items():
                # neighbours are copied once; others twice, which `take` does faster than an index
                some = opened[name]
                values[to] = some[of] if isinstance(of, slice) else some.take(of, axis=0)
        plain = {f.name: found[f.name].view(f.dtype) for f in fields}
        return {f.name: plain[f.name].reshape(count, *f.shape) for f in fields}

    def read_fields(self, block: int, names: Sequence[str]) -> Arrays:
        """Reads the spans of those fields alone, and compares their hashes."""
        row = self._manifest.blocks[block]
        found: Arrays = {}
        for column, f in enumerate(self._manifest.fields):
            if f.name in names:
                start = int(row["offset"][column])
                piece = ByteRange(int(row["shard"]), start, start + int(row["bytes"][column]))
                data = self._maps[piece.shard][piece.start : piece.stop] if self._mapped else None
                found[f.name] = _array(self._range(piece) if data is None else data, f)
                self._compare(block, column, found[f.name])
        return found

    def is_mapped(self, opened: Arrays) -> bool:
        return is_mapped(opened["x"])

    def _compare(self, block: int, column: int, values: NDArray[np.generic]) -> None:
        row, field = self._manifest.blocks[block], self._manifest.fields[column]
        if xxhash.xxh3_128_digest(values.view(np.uint8).data) != row["xxh3"][column].tobytes():
            raise DamagedError(
                f"{self.url(int(row['shard']))}: {field.name} of block {block}, "
                f"{int(row['bytes'][column]):,} bytes at {int(row['offset'][column]):,}, does not have "
                f"its xxh3: run `python -m tools.shards verify {shlex.quote(str(self._root))}`"
            )


def _array(payload: Raw, field: Field) -> NDArray[np.generic]:
    """The samples as rows of bytes or as items of so many bytes: the fewest steps of NumPy to gather some.

    A plain array on the same bytes, which NumPy indexes faster than a `Mapped`.
    """
    row = _row(field)
    return np.asarray(payload).view(row.base).reshape(-1, *row.shape)


def _neighbours(rows: Rows) -> Rows:
    """Numbers that follow each other as a slice, others as they are."""
    if isinstance(rows, slice):
        return rows
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows) and bool((np.diff(rows) == 1).all()):
        return slice(first, last + 1)
    return rows


@cache
def _row(field: Field) -> np.dtype[np.generic]:
    """What is copied for a sample: rows let other threads run meanwhile; items cost less where they are small."""
    if field.sample_bytes < _LARGE:
        return np.dtype((np.void, field.sample_bytes))
    return np.dtype((np.uint8, (field.sample_bytes,)))
