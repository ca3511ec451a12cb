"""Samples of a listing that hold, as a source: from what was kept of them, or read again and compared."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from shards.errors import BadInputError, DamagedError
from shards.format.pictures import Picture, Stored, as_png
from shards.sources.listing import Listing
from shards.sources.source import Lazy
from shards.write.kept import Kept, KeptSample

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Scanned(Lazy):
    """The samples of a listing that hold, as the writer takes them: a `Source`."""

    listing: Listing
    rows: NDArray[np.int64]  # of the listing
    hashes: NDArray[np.uint8]  # (N, 32) sha256 of the inputs
    shape: tuple[int, ...]
    dtype: np.dtype
    kept: Kept | None = None

    @property
    def name(self) -> str:
        return self.listing.name

    @cached_property
    def keys(self) -> NDArray[np.bytes_]:
        return self.listing.keys[self.rows]

    @cached_property
    def labels(self) -> NDArray[np.int64] | None:
        return None if self.listing.labels is None else self.listing.labels[self.rows]

    @property
    def classes(self) -> int:
        return self.listing.classes

    @cached_property
    def fingerprint(self) -> str:
        decided = hashlib.sha256(self.listing.decode.rule.encode())
        for key in self.keys.tolist():
            decided.update(len(key).to_bytes(4, "little") + key)
        decided.update(repr(self.classes).encode())
        if self.labels is not None:
            decided.update(self.labels.astype("<i8").tobytes())
        decided.update(self.hashes.tobytes())
        for row in self.rows.tolist() if self.listing.about else ():
            decided.update(self.listing.about[row])
        return decided.hexdigest()

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.generic]:
        """Samples (len(rows), *shape); read in the order in which they lie.

        Raises:
            DamagedError: an input is not what it was at the first look.
        """
        x = np.empty((len(rows), *self.shape), dtype=self.dtype)
        for place in self._as_they_lie(rows):
            at = int(rows[place])
            kept = self._kept(at)
            x[place] = self._decoded(at, self.listing.decode) if kept is None else kept.x
        return x

    def _as_they_lie(self, rows: NDArray[np.int64]) -> list[int]:
        """Places in `rows`, in the order of the inputs."""
        return np.argsort(self.rows[rows], kind="stable").tolist()

    def _kept(self, at: int) -> KeptSample | None:
        """Sample `at`, where it was kept."""
        if self.kept is None:
            return None
        return self.kept.sample(int(self.rows[at]), self.shape, self.dtype)

    def _decoded(self, at: int, decode: Callable[[bytes], T]) -> T:
        """What `decode` makes of the input of sample `at`, which must be what it was."""
        row = int(self.rows[at])
        with contextlib.suppress(BadInputError):
            data = self.listing.store.read(row)
            if hashlib.sha256(data).digest() == self.hashes[at].tobytes():
                return decode(data)
        raise DamagedError(
            f"input {self.listing.keys[row].decode()!r} of {self.name!r} changed since it was first "
            "read: write to a new folder"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures(Scanned):
    """Those whose inputs are encoded pictures, which may be kept as they are: a `PictureSource`."""

    picture: Picture

    @property
    def channels(self) -> int:
        return self.picture.channels

    def pictures(self, rows: NDArray[np.int64]) -> list[Stored]:
        """Read in the order in which they lie; raises as `images` does."""
        found = {place: self._stored(int(rows[place])) for place in self._as_they_lie(rows)}
        pictures = [found[place] for place in range(len(rows))]
        if not self.listing.about:
            return pictures
        about = [self.listing.about[row] for row in self.rows[rows].tolist()]
        return [p._replace(about=text) for p, text in zip(pictures, about, strict=True)]

    def _stored(self, at: int) -> Stored:
        kept = self._kept(at)
        if kept is None:
            return self._decoded(at, self.picture.stored)
        if not kept.own:
            return as_png(kept.x)
        return Stored(kept.own, self._decoded(at, bytes), kept.x)
