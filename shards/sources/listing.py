"""Lists the inputs of a source before any is read, with what turns their bytes into samples.

A `Listing` is cheap: names, labels and places. Its `store` returns the bytes of one input, its `decode`
makes a sample of them. Both pickle, and open what they read when they first read it: so a listing can go to
any process, and an input gives the same bytes everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards import storage
from shards.errors import BadInputError, UserError
from shards.sources.source import encode_keys


class Store(Protocol):
    def read(self, row: int) -> bytes:
        """The bytes of one input.

        Raises:
            BadInputError: there are none.
        """


class Decode(Protocol):
    """Bytes of one input to a sample (C, H, W); raises BadInputError. `rule` says how, and changes with it."""

    @property
    def rule(self) -> str: ...
    def __call__(self, data: bytes) -> NDArray[np.generic]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Listing:
    """N inputs; made by `of`."""

    name: str
    keys: NDArray[np.bytes_]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    classes: int
    store: Store
    places: NDArray[
        np.generic
    ]  # (N,) or (N, k): what changes when an input is replaced, such as its size
    decode: Decode
    about: tuple[bytes, ...] = ()  # JSON of each, kept beside its picture; none, or one each

    @staticmethod
    def of(
        name: str,
        keys: Sequence[str],
        store: Store,
        *,
        decode: Decode,
        places: ArrayLike,
        labels: ArrayLike | None = None,
        class_names: Sequence[str] = (),
        classes: int | None = None,
        about: Sequence[bytes] = (),
    ) -> Listing:
        """`classes` defaults to the number of names, and without names to the greatest label + 1."""
        known = None if labels is None else np.asarray(labels)
        if known is not None and known.dtype.kind not in "iu":
            raise UserError(
                f"labels of {name!r} are {known.dtype}: give whole numbers, classes from 0"
            )
        if known is not None and len(known) != len(keys):
            raise UserError(
                f"{len(known)} labels for {len(keys)} samples of {name!r}: give one each"
            )
        if classes is None:
            highest = 0 if known is None or not len(known) else int(known.max()) + 1
            classes = len(class_names) or highest
        return Listing(
            name=name,
            keys=encode_keys(keys) if len(keys) else np.empty(0, dtype="S1"),
            labels=None if known is None else known.astype(np.int64),
            class_names=tuple(class_names),
            classes=classes,
            store=store,
            places=np.asarray(places),
            decode=decode,
            about=tuple(about),
        )


@dataclass(frozen=True, kw_only=True)
class Raw:
    """The bytes of an array, in C order, to a sample; `channels_last` for (H, W, C)."""

    shape: tuple[int, ...]
    dtype: str
    channels_last: bool = False

    @property
    def rule(self) -> str:
        return f"array {self.dtype} {self.shape} {'HWC' if self.channels_last else 'CHW'}"

    def __call__(self, data: bytes) -> NDArray[np.generic]:
        x = np.frombuffer(data, dtype=self.dtype).reshape(self.shape)
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            raise BadInputError("values that are not finite")
        return np.ascontiguousarray(np.moveaxis(x, -1, 0)) if self.channels_last else x


@dataclass(frozen=True, kw_only=True)
class Files:
    """Inputs that are files of their own."""

    root: str
    names: tuple[str, ...]

    def read(self, row: int) -> bytes:
        try:
            return Path(self.root, self.names[row]).read_bytes()
        except FileNotFoundError:
            raise BadInputError("no such file") from None

    def sizes(self) -> list[int]:
        """Bytes of each; -1 where a list names a file that is not there."""
        found = (Path(self.root, name) for name in self.names)
        return [path.stat().st_size if path.is_file() else -1 for path in found]


def folder(path: str, what: str) -> Path:
    """An existing folder, as a path.

    Raises:
        UserError: there is none.
    """
    if not Path(path).is_dir():
        state = "is a file" if Path(path).exists() else "does not exist"
        raise UserError(f"{what} {path} {state}: name the folder")
    return Path(path)


def file(path: str, what: str) -> Path:
    """An existing file, as a path.

    Raises:
        UserError: there is none.
    """
    if not Path(path).is_file():
        state = "is a folder" if Path(path).is_dir() else "does not exist"
        raise UserError(f"{what} {path} {state}: name the file")
    return Path(path)


def expand(paths: Sequence[str], suffix: str) -> list[str]:
    """Files, and the files with `suffix` in folders, in sorted order.

    Raises:
        UserError: there are none at one of the paths.
    """
    found = []
    for path in paths:
        if storage.is_remote(path):
            cure = ", or index it where it lies with `python -m tools.shards index`"
            raise UserError(
                f"{path} is on S3, and inputs are read from files: copy it here{cure if suffix == '.tar' else ''}"
            )
        place = Path(path)
        inside = sorted(str(p) for p in place.rglob(f"*{suffix}")) if place.is_dir() else [path]
        missing = [p for p in inside if not Path(p).is_file()]
        if missing or not inside:
            raise UserError(f"{path} holds no {suffix} files: name files, or a folder of them")
        found += inside
    return found
