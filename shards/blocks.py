"""The layout of arrays: a block of samples is one member a field, hashed as a whole, and its payloads are arrays.

Payloads lie on page boundaries of their tar, so that a mapped block is its arrays without a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards.errors import DamagedError
from shards.manifest import Field
from shards.parts import Arrays, Part, Picked, Raw, Tars

__all__ = ["Arrays", "Blocks"]


class Blocks(Tars[Arrays]):
    """Blocks as arrays by field, (rows, *shape) each."""

    def parts(self, block: int) -> list[Part]:
        """From the block's first payload to the end of its last."""
        row = self._manifest.blocks[block]
        start, stop = int(row["offset"].min()), int((row["offset"] + row["bytes"]).max())
        return [Part(int(row["shard"]), start, stop)]

    def open(self, block: int, data: Sequence[Raw]) -> Arrays:
        row, found = self._manifest.blocks[block], {}
        start = int(row["offset"].min())
        for column, f in enumerate(self._manifest.fields):
            first = int(row["offset"][column]) - start
            payload = data[0][first : first + int(row["bytes"][column])]
            found[f.name] = _array(payload, f, int(row["rows"]))
        return found

    def check(self, block: int, held: Arrays) -> None:
        for column, f in enumerate(self._manifest.fields):
            self._compare(block, column, held[f.name])

    def gather(self, picked: Iterable[Picked[Arrays]], count: int, names: Sequence[str]) -> Arrays:
        found = {
            f.name: np.empty((count, *f.shape), dtype=f.dtype)
            for f in self._manifest.fields
            if f.name in names
        }
        for here, _, rows, held in picked:
            for name, values in found.items():
                values[here] = held[name][rows]
        return {**found}

    def choose(self, block: int, names: Sequence[str]) -> Arrays:
        """Reads the spans of those fields alone, and compares their hashes."""
        row, found = self._manifest.blocks[block], {}
        for column, f in enumerate(self._manifest.fields):
            if f.name in names:
                start = int(row["offset"][column])
                part = Part(int(row["shard"]), start, start + int(row["bytes"][column]))
                data = self._maps[part.shard][part.start : part.stop] if self._mapped else None
                found[f.name] = _array(
                    self._range(part) if data is None else data, f, int(row["rows"])
                )
                self._compare(block, column, found[f.name])
        return found

    def is_mapped(self, held: Arrays) -> bool:
        return isinstance(held["x"], np.memmap)

    def _compare(self, block: int, column: int, values: NDArray[np.generic]) -> None:
        row, field = self._manifest.blocks[block], self._manifest.fields[column]
        if xxhash.xxh3_128_digest(values.view(np.uint8).data) != row["xxh3"][column].tobytes():
            raise DamagedError(
                f"{self.url(int(row['shard']))}: {field.name} of block {block}, "
                f"{int(row['bytes'][column]):,} bytes at {int(row['offset'][column]):,}, does not have "
                f"its xxh3: run `python -m tools.shards verify {self._root}`"
            )


def _array(payload: Raw, field: Field, rows: int) -> NDArray[np.generic]:
    return payload.view(field.dtype).reshape(rows, *field.shape)
