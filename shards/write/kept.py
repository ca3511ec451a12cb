"""Samples kept on a disk between the first look at the inputs and the writing, so that each picture is decoded once.

What is kept is a convenience: a sample that is not there, or not as it was kept, is decoded again from its input. So
nothing is kept where a disk is short of room, and other nodes need not see it.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards import storage
from shards.read.mapped_files import map_file
from shards.sources.source import Lazy

if TYPE_CHECKING:
    from typing_extensions import Self

_ROOM = 4  # times all samples that a disk must have free: what is written then has room beside them
# a disk that is full after all, and a folder that another process gave up for that
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENOENT)


class KeptSample(NamedTuple):
    """A picture as it was first decoded."""

    own: str  # extension of the input's own bytes where a shard keeps these, else empty
    x: NDArray[Any]  # (C, H, W)


@contextlib.contextmanager
def keeping(root: storage.Url, inputs: int, part: int) -> Iterator[Kept]:
    """What is kept of `inputs` samples that are written to `root`, in parts of so many; deleted at the end."""
    beside = tempfile.gettempdir() if storage.is_remote(root) else storage.join(root, "source")
    # the name of a temporary file, which `storage.sweep` removes if this process is killed
    folder = Path(beside, f".kept.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield Kept(folder=str(folder), inputs=inputs, part=part)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept(Lazy):
    """Samples by the rows of a listing, a file for each part; any process may write parts of its own, and read all."""

    folder: str
    inputs: int
    part: int

    def begin(self) -> None:
        """Makes the folder; without one nothing is kept."""
        # what cannot be written here, and why, is said by the first file that must be
        with contextlib.suppress(OSError):
            Path(self.folder).mkdir(parents=True)

    def writing(self, number: int) -> PartFile:
        """Part `number`, to be written within a `with`."""
        return PartFile(self._path(number), self.inputs)

    def sample(self, row: int, shape: tuple[int, ...], dtype: np.dtype) -> KeptSample | None:
        """The sample of a row, of this shape and dtype, as it was kept; or None."""
        number, at = divmod(row, self.part)
        if number not in self._open:
            self._open[number] = _records(self._path(number), shape, dtype)
        records = self._open[number]
        if records is None or at >= len(records):
            return None
        x = records["x"][at]
        if xxhash.xxh3_64_intdigest(x) != records["xxh3"][at]:
            return None
        return KeptSample(bytes(records["own"][at]).decode(), x)

    @cached_property
    def _open(self) -> dict[int, NDArray[Any] | None]:
        """Parts that were read from."""
        return {}

    def _path(self, number: int) -> Path:
        return Path(self.folder, f"{number:05d}")


class PartFile:
    """The samples of one part as they are put there; those of another shape or dtype than the first are not kept."""

    def __init__(self, path: Path, inputs: int) -> None:
        self._path, self._inputs = path, inputs
        self._file: BinaryIO | None = None
        self._kind: np.dtype[np.void] | None = None

    def put(self, at: int, x: NDArray[np.generic], own: str) -> None:
        """Keeps `x` as sample `at` of the part; `own` as of `KeptSample`."""
        kind = _record(x.shape, x.dtype)
        with self._giving_up():
            if self._kind is None:
                self._kind = kind
                free = shutil.disk_usage(self._path.parent).free
                if free >= _ROOM * self._inputs * kind.itemsize:
                    self._file = self._path.open("xb")
            if self._file is None or kind != self._kind:
                return
            record = np.zeros((), dtype=kind)
            record["own"], record["xxh3"], record["x"] = own, xxhash.xxh3_64_intdigest(x.data), x
            self._file.seek(at * kind.itemsize)
            self._file.write(record.data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            with self._giving_up():
                self._file.close()

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Where there is no room, deletes all that is kept: shards need the room more."""
        try:
            yield
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            self._file = None
            shutil.rmtree(self._path.parent, ignore_errors=True)


def _record(shape: tuple[int, ...], dtype: np.dtype) -> np.dtype[np.void]:
    return np.dtype([("own", "S8"), ("xxh3", "<u8"), ("x", dtype, shape)])


def _records(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> NDArray[Any] | None:
    """The records of a part, mapped; None where none were kept."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return None
    kind = _record(shape, dtype)
    whole = size // kind.itemsize
    if not whole:
        return None
    data = np.asarray(map_file(path, whole * kind.itemsize))
    return data.view(kind)
