"""The layout of samples: each sample has its own members, image, label and more, as in most WebDataset tars.

A row of the index spans all members of a sample, headers included, with the xxh3 of these bytes. So what is
parsed here is what was written, and Python's tarfile may do it; `shards.format.members` decodes it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards import storage
from shards.errors import BadInputError, DamagedError
from shards.format.manifest import Manifest
from shards.format.members import Decode, Encoded, Sample, Unpack
from shards.read.block_bytes import TOGETHER, Arrays, ByteRange, Needed, Picked, Raw, Tars, cut
from shards.read.cache import Cache
from shards.read.decoding import Decoders
from shards.read.mapped_files import is_mapped

Spans = list[tuple[ByteRange, Raw]]
"""A block as its parts, out of which samples are cut when they are asked for."""


class Samples(Tars[Spans]):
    """Blocks of encoded samples; `gather` decodes them, in `decoders` processes if any."""

    def __init__(
        self,
        root: storage.Url,
        manifest: Manifest,
        *,
        mapped: bool,
        cache: Cache | None = None,
        needed: Needed = lambda blocks: np.zeros(len(blocks)),
        decoders: int = 0,
    ) -> None:
        super().__init__(root, manifest, mapped=mapped, cache=cache, needed=needed)
        self._decode = Decode.of(manifest.decode or {})
        self._decoders = Decoders(decoders)
        self._ended = False
        self._stems = [PurePosixPath(s.name).stem for s in manifest.shards]

    def ranges(self, block: int) -> list[ByteRange]:
        """Neighbours together as long as a range may be; a sample that was left out lies between two others."""
        found: list[ByteRange] = []
        for shard, start, stop in self._places(self._rows(block)):
            last = found[-1] if found else None
            if last is not None and last.shard == shard and stop - last.start <= TOGETHER:
                found[-1] = ByteRange(shard, last.start, stop)
            else:
                found.append(ByteRange(shard, start, stop))
        return found

    def open(self, block: int, data: Sequence[Raw]) -> Spans:
        return [*zip(self.ranges(block), data, strict=True)]

    def check(self, block: int, opened: Spans) -> None:
        rows = self._rows(block)
        places = self._places(rows)
        views = [(span, data.data) for span, data in opened]
        found = [xxhash.xxh3_128_digest(cut(span, views)) for span in places]
        expected = self._manifest.blocks["xxh3"][rows.start : rows.stop, 0]
        if b"".join(found) == expected.tobytes():
            return
        for ordinal, span, digest, wanted in zip(rows, places, found, expected, strict=True):
            if digest != wanted.tobytes():
                raise DamagedError(
                    f"{self.url(span.shard)}: sample {ordinal:,}, {span.stop - span.start:,} bytes at "
                    f"{span.start:,}, does not have its xxh3: run "
                    f"`python -m tools.shards verify {shlex.quote(str(self._root))}`"
                )

    def gather(self, picked: Iterable[Picked[Spans]], count: int, names: Sequence[str]) -> Arrays:
        several, ordinals = [*picked], np.empty(count, dtype=np.int64)
        for here, block, rows, _ in several:
            at = np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
            ordinals[here] = at + block * self._manifest.block
        places, spans = self._places(ordinals), [Encoded(b"", "")] * count
        for here, _, _, opened in several:
            views = [(span, data.data) for span, data in opened]
            for at in np.arange(count)[here].tolist():
                place = places[at]
                spans[at] = Encoded(bytes(cut(place, views)), self._stems[place.shard])
        samples = self._decoders.map(Unpack(decode=self._decode, names=tuple(names)), spans)
        return self._arrays(samples, places, names)

    def read_fields(self, block: int, names: Sequence[str]) -> Spans:
        """A span is checked as a whole, so it is read as a whole; its picture is not decoded."""
        found = self.read([block])[block]
        if isinstance(found, DamagedError):
            raise found
        return found

    def is_mapped(self, opened: Spans) -> bool:
        return all(is_mapped(data) for _, data in opened)

    def end(self) -> None:
        self._ended = True

    def close(self) -> None:
        self._decoders.close()

    def _arrays(
        self,
        samples: Iterable[Sample | BadInputError],
        places: Sequence[ByteRange],
        names: Sequence[str],
    ) -> Arrays:
        """Each sample is put into its row before the next is decoded: so few bytes at a time stay in the caches."""
        chosen = [
            (f.name, f.shape, np.dtype(f.dtype)) for f in self._manifest.fields if f.name in names
        ]
        arrays = {name: np.empty((len(places), *shape), kind) for name, shape, kind in chosen}
        for at, (sample, span) in enumerate(zip(samples, places, strict=True)):
            if self._ended:
                raise ValueError("this reader is closed")
            if isinstance(sample, BadInputError):
                raise self._unlike(span, str(sample))
            for name, shape, wanted in chosen:
                value = np.asarray(getattr(sample, name))
                kind = value.dtype
                alike = kind.kind == wanted.kind and kind.itemsize <= wanted.itemsize
                if not alike or value.shape != shape:
                    raise self._unlike(span, f"{name} is {value.shape} {kind}")
                arrays[name][at] = value
        return {**arrays}

    def _unlike(self, span: ByteRange, reason: str) -> DamagedError:
        """Bytes that hold, and yet are not what they were when they were indexed: another Pillow, say."""
        return DamagedError(
            f"{self.url(span.shard)}: the sample at byte {span.start:,} does not decode as it did when it was "
            f"indexed: {reason}"
        )

    def _rows(self, block: int) -> range:
        size = self._manifest.block
        return range(block * size, min((block + 1) * size, self._manifest.count))

    def _places(self, ordinals: Sequence[int] | NDArray[np.int64]) -> list[ByteRange]:
        rows = self._manifest.blocks[np.asarray(ordinals)]
        starts = rows["offset"][:, 0].astype(np.int64)
        stops = starts + rows["bytes"][:, 0].astype(np.int64)
        places = zip(rows["shard"].tolist(), starts.tolist(), stops.tolist(), strict=True)
        return [ByteRange(*place) for place in places]
