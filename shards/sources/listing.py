"""Lists the inputs of a source before any is read, with what turns their bytes into samples.

A `Listing` is cheap: names, labels and places. Its `store` returns the bytes of one input, its `decode`
makes a sample of them. Both pickle, and open what they read when they first read it: so a listing can go to
any process, and an input gives the same bytes everywhere.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards import storage
from shards.errors import BadInputError, UserError
from shards.sources.source import Source, encode_keys
from shards.sources.splits import meant, split_of

# errors that say nothing of the input
_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR)
# in place of a label's name: read none
NO_LABEL = "none"


class Store(Protocol):
    """Where the bytes of inputs are; pickles, and opens what it reads when it first reads it."""

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


class Passed(NamedTuple):
    """Something that was found among the inputs and is none."""

    name: str
    reason: str


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
    # rows that are known to be bad before they are read, with the reason
    flaws: Mapping[int, str] = field(default_factory=dict)
    # what was listed and is no input, with the reason
    passed: tuple[Passed, ...] = ()
    # why the whole listing is refused; reported together with bad inputs
    refusals: tuple[str, ...] = ()
    # the folder below the one that was named in which all of it lies, where it is another
    inside: str = ""

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
        flaws: Mapping[int, str] | None = None,
        passed: Sequence[Passed] = (),
        refusals: Sequence[str] = (),
        inside: str = "",
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
            flaws=flaws or {},
            passed=tuple(passed),
            refusals=tuple(refusals),
            inside=inside,
        )

    @staticmethod
    def of_source(source: Source) -> Listing:
        """What a source holds, as inputs; each class is called by its number."""
        return Listing(
            name=source.name,
            keys=np.asarray(source.keys[:]),
            labels=None if source.labels is None else np.asarray(source.labels[:]),
            class_names=tuple(map(str, range(source.classes))),
            classes=source.classes,
            store=Samples(source),
            places=np.arange(len(source.keys)),
            decode=Raw(shape=source.shape, dtype=source.dtype.str),
        )


@dataclass(frozen=True)
class Samples:
    """The samples of a source as bytes, which `Raw` reads."""

    source: Source

    def read(self, row: int) -> bytes:
        return self.source.images(np.array([row]))[0].tobytes()


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
        place = os.path.join(self.root, self.names[row])  # noqa: PTH118 - a Path takes as long as the reading
        try:
            # a pipe would be waited for
            if not stat.S_ISREG(os.stat(place).st_mode):  # noqa: PTH116
                raise BadInputError("no regular file")
            with open(place, "rb", buffering=0) as file:  # noqa: PTH123
                return file.readall()
        except FileNotFoundError:
            raise BadInputError("no such file") from None
        except OSError as error:
            if error.errno in _MACHINE:
                raise
            raise BadInputError(f"cannot be read: {error.strerror}") from None

    def sizes(self) -> list[int]:
        """Bytes of each; -1 where there is no file, or none that can be looked at."""
        return [_size(os.path.join(self.root, name)) for name in self.names]  # noqa: PTH118


def _size(path: str) -> int:
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


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


def expand(paths: Sequence[str], suffix: str, split: str | None = None) -> list[str]:
    """Files, and the files with `suffix` in folders, in sorted order; of one `split` where that is given.

    Raises:
        UserError: there are none at one of the paths, or a folder holds files of several splits.
    """
    found = []
    for path in paths:
        if storage.is_remote(path):
            cure = ", or index it where it lies with `python -m tools.shards index`"
            raise UserError(
                f"{path} is on S3, and inputs are read from files: copy it here{cure if suffix == '.tar' else ''}"
            )
        place = Path(path)
        inside = [path]
        if place.is_dir():
            inside = sorted(str(p) for p in place.rglob("*") if p.suffix.lower() == suffix)
            inside = of_split(inside, path, split)
        missing = [p for p in inside if not Path(p).is_file()]
        if missing or not inside:
            packed = beside([path], suffix)
            cure = f"; it holds {packed[0].name}: unpack it first" if packed else ""
            raise UserError(
                f"{path} holds no {suffix} files: name files, or a folder of them{cure}"
            )
        found += inside
    return found


def of_split(names: Sequence[str], place: str, split: str | None = None) -> list[str]:
    """The files of one split, where names below `place` say so, as `train-00000-of-00002.parquet` does.

    Raises:
        UserError: they are of several splits and none is asked for, or none is of that one.
    """
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(_split_of(name, place), []).append(name)
    known = sorted(name for name in splits if name)
    if split is not None:
        wanted = meant(split)
        if wanted not in splits:
            raise UserError(
                f"split {split!r} is not in {place}: choose among {', '.join(known) or 'none'}"
            )
        return splits[wanted]
    if len(known) > 1:
        first = splits[known[-1]][0]
        raise UserError(
            f"{place} holds files of {len(known)} splits, {', '.join(known)}: name the files of one, such as {first}"
        )
    return [*names]


def _split_of(name: str, place: str) -> str:
    """Of the file's own name, else of a folder that it lies in below `place`; empty where none says."""
    parts = name.removeprefix(place).strip("/").split("/")
    return next(filter(None, map(split_of, reversed(parts))), "")


def beside(paths: Sequence[str], suffix: str) -> list[Passed]:
    """Compressed files of `suffix`, such as .tar.gz, and files of other names that hold it, in these folders."""
    found = []
    for path in paths:
        if storage.is_remote(path):
            names = [] if path.endswith(suffix) else sorted(storage.files(path))
        else:
            inside = sorted(p for p in Path(path).rglob("*") if p.is_file())
            names = [p.relative_to(path).as_posix() for p in inside]
        for name in names:
            own = name.rpartition("/")[2].lower()
            packed = f"{suffix}." in own or (suffix == ".tar" and own.endswith(_PACKED))
            if packed and not own.endswith((".json", ".npy", ".idx", ".tmp")):
                reason = f"compressed or another kind of file, not {suffix}: unpack it"
                found.append(Passed(name, reason))
    return found


# compressed tars under short names
_PACKED = (".tgz", ".tbz", ".tbz2", ".txz", ".tzst")
