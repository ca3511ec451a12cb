"""The interface of what can be written: samples by row, with all keys and labels known beforehand.

Keys and labels are small, images are not: so a source holds all keys and labels, which are
checked before anything is written, and returns images by rows in any order. A source that
is made of shards returns everything by rows, since its keys and labels were checked when the shards were written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.errors import UserError
from shards.format.pictures import Stored


class Column(Protocol):
    """Values (N,) by row: an array, or what reads them of shards where they lie."""

    @property
    def dtype(self) -> np.dtype: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> Any: ...


class Source(Protocol):
    """N samples. `keys` (N,) bytes, unique; `labels` (N,) int64 in [0, classes), or None."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str:
        """Hex sha256 that changes when any sample does."""

    @property
    def keys(self) -> Column: ...
    @property
    def labels(self) -> Column | None: ...
    @property
    def classes(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (C, H, W)."""

    @property
    def dtype(self) -> np.dtype: ...
    def images(self, rows: NDArray[np.int64]) -> NDArray[np.generic]:
        """Samples (len(rows), C, H, W) of `dtype`."""


@runtime_checkable
class PictureSource(Source, Protocol):
    """A source of encoded pictures."""

    @property
    def channels(self) -> int: ...
    def pictures(self, rows: NDArray[np.int64]) -> Sequence[Stored]:
        """Of each row, what decodes to its sample without loss."""


class Lazy:
    """A dataclass whose cached properties stay in the process that made them: its pickle holds its fields."""

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, eq=False)
class ArraySource:
    """Samples that are arrays already, in memory or memory-mapped; made by `of`."""

    name: str
    x: NDArray[np.generic]
    keys: NDArray[np.bytes_]
    labels: NDArray[np.int64] | None
    classes: int

    @staticmethod
    def of(
        name: str,
        x: NDArray[np.generic] | Sequence[NDArray[np.generic]],
        *,
        labels: ArrayLike | None = None,
        classes: int = 0,
        keys: Sequence[str] | None = None,
    ) -> ArraySource:
        """`x` (N, C, H, W) or N arrays (C, H, W); keys default to `<name>-<row>`.

        Raises:
            UserError: samples of several shapes, or another number of keys or labels than of samples.
        """
        stacked = x if isinstance(x, np.ndarray) else _stack(x)
        width = len(str(len(stacked)))
        named = [f"{name}-{i:0{width}d}" for i in range(len(stacked))] if keys is None else keys
        known = None if labels is None else np.asarray(labels)
        if known is not None and known.dtype.kind not in "iu":
            raise UserError(f"labels have dtype {known.dtype}: give whole numbers, classes from 0")
        for what, values in (("keys", named), ("labels", known)):
            if values is not None and len(values) != len(stacked):
                raise UserError(
                    f"{len(values)} {what} for {len(stacked)} samples: give one for each"
                )
        return ArraySource(
            name=name,
            x=stacked,
            keys=encode_keys(named),
            labels=None if known is None else known.astype(np.int64),
            classes=classes,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return self.x.dtype

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.x.shape, self.x.dtype.str)).encode())
        for start in range(0, len(self.x), 1024):
            digest.update(np.ascontiguousarray(self.x[start : start + 1024]).data)
        digest.update(repr((self.keys.dtype.str, self.labels is not None, self.classes)).encode())
        digest.update(self.keys.tobytes())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.generic]:
        return self.x[rows]


def encode_keys(keys: Sequence[str]) -> NDArray[np.bytes_]:
    """Keys as a fixed-width array of UTF-8 bytes.

    Raises:
        UserError: a key is empty or holds a NUL, which fixed-width arrays cannot tell from their end.
    """
    bad = [i for i, key in enumerate(keys) if not key or "\0" in key]
    if bad:
        raise UserError(
            f"key {keys[bad[0]]!r} of row {bad[0]} is empty or holds a NUL: name the sample"
        )
    try:
        return np.array([key.encode() for key in keys], dtype=np.bytes_)
    except UnicodeEncodeError as error:
        raise UserError(f"key {error.object!r} is not UTF-8: name the sample otherwise") from None


def _stack(samples: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
    kinds: dict[tuple[tuple[int, ...], str], int] = {}
    for row, sample in enumerate(samples):
        kinds.setdefault((sample.shape, sample.dtype.str), row)
    if len(kinds) > 1:
        seen = " and ".join(f"{shape} {dtype} (row {row})" for (shape, dtype), row in kinds.items())
        raise UserError(
            f"samples of several shapes, {seen}: crop or resize them to one before writing"
        )
    return np.stack(samples) if kinds else np.empty((0, 0, 0, 0))
