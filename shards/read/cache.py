"""What a node keeps of remote shards: each block fetched once for all its processes, the block needed last gone first.

    <folder>/selfguide-cache             says whose folder this is; one that holds other things is refused
    <folder>/room                        bytes held, and the lock under which room is made
    <folder>/<sha256 of a tar>/lock      whoever fetches from this tar holds it
    <folder>/<sha256 of a tar>/<start>-<stop>    these bytes of it

Names are contents: a block is found whatever bucket or folder its tar came from, and never confused with
another. Locks are the kernel's (flock), which lets go when a process dies: none can be stale, after kill -9 neither.
What makes room deletes only files that are named as above, and those last which the order needs soonest, Belady's
rule (1966, "A study of replacement algorithms for a virtual-storage computer"). A file that another
process has mapped lives on until it lets go, so deleting one harms nobody.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards import storage
from shards.errors import UserError
from shards.lock import lock
from shards.read.mapped_files import map_file
from shards.storage.retry import pause

MARKER = "selfguide-cache"
BUDGET = 64 << 30  # bytes; six times ImageNet's latents at 256 pixels
FOREIGN = np.inf  # need of what our order does not know: it goes first
_ROOM = "room"
_LOCK = "lock"
_NAME = re.compile(r"\d+-\d+(\.[0-9a-f]{12}\.tmp)?")
_TAR = re.compile(r"[0-9a-f]{64}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FREED_AT_ONCE = (
    32  # of the budget, this part is freed at a time: a walk over the folder is not free
)
_MOST_SKIPPED = 1023  # pieces that are refused at most between two walks in vain
_LOCK_SECONDS = 60.0  # seconds to wait for a lock; a fetch within its own budget may take as long

_log = logging.getLogger("shards")


class Piece(NamedTuple):
    """Bytes [start, stop) of the tar with this sha256."""

    tar: str
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return self.stop - self.start


Need = Callable[[Sequence[Piece]], NDArray[np.float64]]
"""Of each piece, the position that needs it next; FOREIGN where unknown, -inf of what must stay."""


class CacheFile(NamedTuple):
    """A file of the cache."""

    path: Path
    piece: Piece
    bytes: int
    changed: float


class Cache:
    """One node's folder; every process of the node opens it for itself."""

    def __init__(self, folder: str | os.PathLike[str], budget: int = BUDGET) -> None:
        """`budget`: bytes that all processes together may keep here.

        Raises:
            UserError: the folder cannot be used, or holds what is not a cache.
        """
        self._folder, self.budget = Path(folder), budget
        self._refusing = threading.Lock()
        self.refused = 0  # pieces that did not fit onto the disk
        self._walks_failed = 0  # walks in a row that found nothing to give up
        self._walks_skipped = 0  # pieces to refuse before the next walk
        if budget < 1:
            raise UserError(f"cache budget={budget}: give a number of bytes")
        if storage.is_remote(folder):
            raise UserError(f"cache={folder} is on S3: name a folder on a disk of this node")
        try:
            self._claim()
            with self._lock(self._folder / _ROOM) as locked:
                if locked:
                    self._count(self._clean())
        except OSError as error:
            raise UserError(
                f"cache={folder}: {error.strerror or error}; name a folder on a disk of this node"
            ) from error

    def open(self, piece: Piece) -> NDArray[np.uint8] | None:
        """The piece's bytes, mapped; None where the cache does not hold it whole."""
        try:
            return map_file(self._path(piece), piece.bytes)
        except (FileNotFoundError, ValueError):  # deleted to make room, perhaps just now; cut short
            return None

    @contextlib.contextmanager
    def fetching(self, tar: str) -> Iterator[bool]:
        """Alone on this node in fetching from `tar`; False after a minute's wait, and then not alone."""
        folder = self._folder / tar
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir(exist_ok=True)
                locked = stack.enter_context(self._lock(folder / _LOCK))
            except OSError as error:  # a disk may be out of files before it is out of bytes
                self._on_full_disk(error)
                locked = False
            yield locked

    def put(self, piece: Piece, data: memoryview, need: Need) -> bool:
        """Keeps the piece for all; False where there is no room that `need` would give up, or no disk."""
        try:
            with self._lock(self._folder / _ROOM) as locked:
                if not (locked and self._reserve(piece.bytes, need)):
                    return False
                self._write(self._path(piece), data)
        except OSError as error:
            self._on_full_disk(error)
            return False
        return True

    def drop(self, piece: Piece) -> None:
        """Forgets a piece that turned out not to be what was put."""
        self._path(piece).unlink(missing_ok=True)

    def used_bytes(self) -> int:
        """Bytes of the pieces in the folder, counted anew."""
        return sum(file.bytes for file in self._walk())

    def _lock(self, path: Path) -> AbstractContextManager[bool]:
        return lock(path, seconds=_LOCK_SECONDS, pause=pause)

    def _claim(self) -> None:
        marker = self._folder / MARKER
        self._folder.mkdir(parents=True, exist_ok=True)
        if not marker.exists():
            _refuse_others(self._folder)
            marker.touch()

    def _reserve(self, size: int, need: Need) -> bool:
        """Counts `size` bytes in, of what is deleted if it must be; the caller holds the lock.

        They are counted before they are written: a kill in between leaves the count too high, never too
        low, and the next walk puts it right. The longer all that is held must stay, the more rarely it
        is asked whether it still must: each time costs a walk, for which all processes of the node wait.
        """
        used = self._used()
        if used + size > self.budget:
            if self._walks_skipped:
                self._walks_skipped -= 1
                return False
            used = self._evict(size, need)
        if used + size > self.budget:
            self._walks_skipped = min(2**self._walks_failed - 1, _MOST_SKIPPED)
            self._walks_failed += 1
            return False
        self._walks_failed = self._walks_skipped = 0
        self._count(used + size)
        return True

    def _evict(self, size: int, need: Need) -> int:
        """Deletes what is needed last until `size` bytes fit; the bytes that stay."""
        files = list(self._walk())
        used = sum(file.bytes for file in files)
        target = self.budget - max(size, min(self.budget // _FREED_AT_ONCE, self.budget - size))
        needs = need([file.piece for file in files])
        age = np.array([file.changed for file in files])
        for i in np.lexsort((age, -needs)):  # needed last first; of unknown ones the oldest
            if used <= target or needs[i] == -np.inf:
                break
            files[i].path.unlink(missing_ok=True)
            used -= files[i].bytes
        return used

    def _walk(self) -> Iterator[CacheFile]:
        """All pieces that are whole."""
        for folder, entry in self._entries():
            if entry.name.endswith(".tmp"):
                continue
            with contextlib.suppress(FileNotFoundError):  # deleted just now
                found = entry.stat()
                start, stop = map(int, entry.name.split("-"))
                piece = Piece(folder, start, stop)
                yield CacheFile(Path(entry.path), piece, found.st_size, found.st_mtime)

    def _clean(self) -> int:
        """Deletes what killed writers left, and counts the rest; the caller holds the lock, so no writer lives."""
        for _, entry in self._entries():
            if entry.name.endswith(".tmp"):
                Path(entry.path).unlink(missing_ok=True)
        return self.used_bytes()

    def _entries(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        for folder in self._folder.iterdir():
            if _TAR.fullmatch(folder.name):
                with os.scandir(folder) as entries:
                    yield from ((folder.name, e) for e in entries if _NAME.fullmatch(e.name))

    def _write(self, path: Path, data: memoryview) -> None:
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        path.parent.mkdir(exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _used(self) -> int:
        text = (self._folder / _ROOM).read_text()
        return int(text) if text.isdigit() else self.used_bytes()

    def _count(self, used: int) -> None:
        (self._folder / _ROOM).write_text(str(used))

    def _path(self, piece: Piece) -> Path:
        return self._folder / piece.tar / f"{piece.start}-{piece.stop}"

    def _on_full_disk(self, error: OSError) -> None:
        """Says once that the disk is full; another error is raised."""
        if error.errno not in _FULL:
            raise error
        with self._refusing:  # several threads may meet it at once
            self.refused += 1
            first = self.refused == 1
        if first:
            _log.warning("cache %s: %s; reading goes on without it", self._folder, error.strerror)


def check(folder: str | os.PathLike[str]) -> None:
    """Returns when this machine could have a cache in `folder`, as far as that shows without a change to it.

    Raises:
        UserError: it holds other things, or cannot be made or written.
    """
    path = Path(folder)
    try:
        if path.is_dir():
            _refuse_others(path)
        there = next(p for p in (path, *path.parents) if p.exists())
    except OSError as error:
        raise UserError(
            f"cache={folder}: {error.strerror}; name a folder on a disk of this node"
        ) from error
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "cannot be written" if there.is_dir() else "is a file"
        raise UserError(f"cache={folder}: {there} {reason}; name a folder on a disk of this node")


def _refuse_others(folder: Path) -> None:
    others = sorted(p.name for p in folder.iterdir() if p.name != MARKER)
    # looked for last: another process may have claimed the folder in between
    if others and not (folder / MARKER).exists():
        raise UserError(
            f"cache={folder} holds other things ({', '.join(others[:3])}): name an empty or new folder, of which "
            "blocks are deleted to make room"
        )
