"""What was parsed of files that are written once, kept between commands in the user's own cache folder.

A list of two hundred runs reads some twenty thousand small files. Each entry is used for as long as the file is the
same one: inode, size and time of its last change. Nothing is kept in the runs folder, which may be read-only.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from selfguide.spec import checksums, run

T = TypeVar("T")

SETTLED_NS = checksums.SETTLED_NS
# new entries, and as a share of all, for which the whole is written again; below, parsing those again costs less
LEAST, SHARE = 100, 0.01

# days after which an entry that nobody used is forgotten
DAYS = 30

_Stamp = tuple[int, ...]
# the file as it was, the day since 1970 on which it was last asked for when all was written, and what it held
_Entry = tuple[_Stamp, int, Any]


class Cache:
    """Parsed files by their paths.

    Args:
        lasting: of a process that reads again and again, which keeps what is written often, too.
    """

    def __init__(self, entries: dict[str, _Entry] | None = None, *, lasting: bool = False) -> None:
        self._known = entries or {}
        self.lasting = lasting
        self._today = time.time_ns() // 86_400_000_000_000
        # of the files asked for this time
        self._used: dict[str, _Entry] = {}
        # folders of which one value is kept
        self._instead: list[str] = []
        self.added = 0

    def get(self, path: str, parse: Callable[[str], T]) -> T:
        """Returns what `parse` makes of the file. Raises what it raises, FileNotFoundError for no file."""
        # as text: a `Path` for each of tens of thousands costs more than the question
        found = os.stat(path)  # noqa: PTH116
        stamp = (found.st_ino, found.st_size, found.st_mtime_ns)
        entry = self._known.get(path)
        if entry is None or entry[0] != stamp:
            entry = (stamp, self._today, parse(path))
            if time.time_ns() - found.st_mtime_ns < SETTLED_NS:
                return entry[2]
            self.added += 1
        self._used[path] = entry
        return cast(T, entry[2])

    def known(self, key: str, stamp: _Stamp) -> Any:
        """Returns what was kept under a key while it had this stamp; None where nothing was."""
        entry = self._known.get(key)
        if entry is None or entry[0] != stamp:
            return None
        self._used[key] = entry
        return entry[2]

    def keep(self, key: str, stamp: _Stamp, value: Any) -> None:
        """Keeps a value under a folder's path, in place of all files below it."""
        self._used[key] = (stamp, self._today, value)
        self._instead.append(f"{key}/")
        self.added += 1

    def again(self) -> Cache:
        """Returns the cache for the next reading by the same process: what was asked for this time."""
        return Cache(self._used, lasting=self.lasting)

    def kept(self) -> dict[str, _Entry] | None:
        """Returns what is to be kept, None where the new entries are not worth it."""
        if self.added < max(LEAST, SHARE * len(self._used)):
            return None
        instead = tuple(self._instead)
        lately = {p: e for p, e in self._known.items() if e[1] > self._today - DAYS}
        used = {p: (stamp, self._today, value) for p, (stamp, _, value) in self._used.items()}
        return {p: e for p, e in {**lately, **used}.items() if not p.startswith(instead)}


@contextlib.contextmanager
def of_runs(root: Path, what: str) -> Iterator[Cache]:
    """The cache for a runs folder; what the block adds is kept.

    Args:
        what: names those who read the same files, so that nobody loads what he does not need.
    """
    name = f"{what}-{hashlib.sha256(str(root).encode()).hexdigest()[:16]}.pickle"
    place = checksums.cache_folder() / name
    cache = Cache(_load(place))
    yield cache
    with uncollected():
        kept = cache.kept()
        if kept is not None:
            # no room, no home, no right: the next command parses again
            with contextlib.suppress(OSError):
                _save(place, kept)


def _load(place: Path) -> dict[str, _Entry]:
    """The entries that this version of the code left."""
    try:
        with place.open("rb") as file:
            # unpickling runs code: nobody else's
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return {}
            if pickle.load(file) != _version():
                return {}
            with uncollected():
                return pickle.load(file)
    except (OSError, EOFError, ValueError, AttributeError, ImportError, pickle.UnpicklingError):
        return {}


def _save(place: Path, entries: dict[str, _Entry]) -> None:
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=place.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            pickle.dump(_version(), file)
            pickle.dump(entries, file, protocol=pickle.HIGHEST_PROTOCOL)
        Path(name).replace(place)
    except BaseException:
        Path(name).unlink()
        raise


def _version() -> str:
    """The code whose objects are kept, by the times of its files."""
    about = [str(sys.version_info)]
    # the board parses the metrics
    here = Path(__file__).parent
    folders = [here, here.parent / "board", Path(run.__file__).parent]
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        found = path.stat()
        about.append(f"{path} {found.st_mtime_ns} {found.st_size}")
    return hashlib.sha256("\n".join(about).encode()).hexdigest()


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Works without the garbage collector, which walks through all that is being made again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
