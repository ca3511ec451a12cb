"""The file-system half of storage: a name appears as a hard link to a finished temporary file.

A fenced publisher writes that temporary file into its *outbox*, the folder `<place>/.leases/<attempt>`. A newer attempt
ends its right by removing the outbox and putting a file in its place: from then on the older attempt can write no
temporary file, and none that it had written is left to be linked. Whether the link or the removal comes first is
decided by the file system (on NFS by its server). What is set aside goes through the outbox, for the same reason.
Nobody holds a lock, so no process that died or hangs is waited for.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from shards.errors import FencedError, NoRoomError
from shards.lock import lock
from shards.storage.fence import LEASES, MANIFEST, Fence

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")  # what a publisher writes first
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
_AT_WORK = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR)  # others change the folder
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Folder:
    """Files on a file system, by their paths."""

    def exists(self, url: str) -> bool:
        return Path(url).exists()

    def stat(self, url: str) -> tuple[int, None]:
        path = Path(url)
        found = path.stat()
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "not a file", url)
        return found.st_size, None

    def list(self, folder: str) -> Sequence[str]:
        return sorted(p.name for p in Path(folder).iterdir()) if Path(folder).is_dir() else []

    def files(self, folder: str) -> Sequence[str]:
        root = Path(folder)
        names = (p.relative_to(root) for p in root.rglob("*") if p.is_file())
        return sorted(n.as_posix() for n in names if not any(s.startswith(".") for s in n.parts))

    def read(self, url: str, start: int, stop: int, etag: str | None) -> bytes:
        with Path(url).open("rb", buffering=0) as file:
            file.seek(start)
            parts = []
            while start < stop and (part := file.read(stop - start)):  # read() may stop early
                parts.append(part)
                start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def publish(self, url: str, data: bytes, replace: bool, fence: Fence | None) -> None:
        self._publish(url, len(data), lambda temporary: _write(temporary, data), replace, fence)

    def publish_file(self, url: str, path: str, replace: bool, fence: Fence | None) -> None:
        size = Path(path).stat().st_size
        if (
            not replace and Path(url).exists()
        ):  # perhaps as a name of this same file, which a link does not tell
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), url)
        self._publish(url, size, lambda temporary: _copy(Path(path), temporary), replace, fence)

    def delete(self, url: str) -> None:
        path = Path(url)
        if path.is_dir() and not path.is_symlink():
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def set_aside(self, folder: Path, to: Path | None, fence: Fence) -> None:
        outbox = _outbox(fence)
        taken = outbox / _temporary(folder.name)
        try:
            outbox.mkdir(parents=True, exist_ok=True)
            folder.rename(taken)
        except OSError as error:
            refuse_no_room(folder, 0, error)
            _refuse_overtaken(folder, fence, error)
            if isinstance(error, FileNotFoundError):
                return
            raise
        if to is None or to.exists():
            shutil.rmtree(taken)
        else:
            to.parent.mkdir(exist_ok=True)
            taken.rename(to)

    def end_attempts(self, place: str, number: int) -> None:
        leases = Path(place, LEASES)
        leases.mkdir(parents=True, exist_ok=True)
        for older in range(1, number):
            _end_outbox(leases / f"{older:04d}")
        _fsync(leases)

    def sync(self, folder: str, names: Sequence[str]) -> None:
        paths = [Path(folder, name) for name in names]
        for path in [*paths, *sorted({p.parent for p in paths} | {Path(folder)})]:
            _fsync(path)

    def sweep(self, folder: str, older: float) -> Sequence[str]:
        before = time.time() - older
        ended = []
        for path in sorted(Path(folder).rglob(".*.tmp")):
            with contextlib.suppress(FileNotFoundError):  # its publisher lives, and is done with it
                if _TEMPORARY.fullmatch(path.name) and path.stat().st_mtime <= before:
                    _remove(path)
                    ended.append(str(path))
        return ended

    def _publish(
        self,
        url: str,
        size: int,
        fill: Callable[[Path], None],
        replace: bool,
        fence: Fence | None,
    ) -> None:
        path = Path(url)
        outbox = _outbox(fence) if fence else path.parent
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            outbox.mkdir(parents=True, exist_ok=True)
            _appear(path, outbox / _temporary(path.name), fill, replace)
        except OSError as error:
            refuse_no_room(path, size, error)
            if fence is not None:
                _refuse_overtaken(path, fence, error)
            raise


def refuse_no_room(path: Path, size: int, error: OSError) -> None:
    """Raises NoRoomError where `error` says that a disk is full or may not be written."""
    if error.errno in _NO_ROOM:
        raise NoRoomError(
            f"{path}: its {size:,} bytes cannot be written ({os.strerror(error.errno)}): make room there, or "
            "choose another disk; what is finished is kept, and the same command goes on behind it"
        ) from error


def sweep_drafts(path: Path, fence: Fence) -> None:
    """Deletes what killed publishers of `path` left beside it, and in the outbox of `fence`."""
    for place in (path.parent, _outbox(fence)):
        for left in place.glob(f".{glob.escape(path.name)}.*.tmp"):
            left.unlink(missing_ok=True)


def _outbox(fence: Fence) -> Path:
    return Path(fence.place, LEASES, f"{fence.number:04d}")


def _temporary(name: str) -> str:
    return f".{name}.{uuid.uuid4().hex[:12]}.tmp"


def _refuse_overtaken(path: Path, fence: Fence, error: OSError) -> None:
    # only a newer attempt removes an outbox, and it does so before it begins its own work; who may not write has none
    if not _outbox(fence).is_dir() and not isinstance(error, PermissionError):
        raise FencedError(
            f"{path}: attempt {fence.number} was overtaken and may not publish"
        ) from error


def _appear(path: Path, temporary: Path, fill: Callable[[Path], None], replace: bool) -> None:
    try:
        fill(temporary)
        _fsync(temporary)
        if replace:
            temporary.replace(path)
        else:
            _link_new(temporary, path)
    finally:
        # its folder may have become a file: an outbox that a newer attempt has ended
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            temporary.unlink()
    _fsync(path.parent)


def _write(temporary: Path, data: bytes) -> None:
    with temporary.open("xb") as file:
        file.write(data)


def _copy(source: Path, temporary: Path) -> None:
    """A second name for the same bytes, or a copy where the file system has none for them."""
    try:
        os.link(source, temporary)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, temporary)


def _link_new(temporary: Path, path: Path) -> None:
    """Gives a finished file its name, which must be new."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        if not path.samefile(temporary):  # NFS may repeat a link whose first answer was lost
            raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # without hard links, one publisher at a time holds the folder and may rename into it
        with lock(path.parent, create=False):
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            temporary.rename(path)


def _end_outbox(outbox: Path) -> None:
    """Puts a file where an attempt has, or would make, its outbox."""
    while not outbox.is_file():
        try:
            outbox.open("x").close()
        except FileExistsError:  # a folder, in which the attempt may be writing just now
            try:
                for temporary in outbox.iterdir():
                    _remove(temporary)
                outbox.rmdir()
            except OSError as error:
                if error.errno not in _AT_WORK:
                    raise


def _remove(path: Path) -> None:
    """Deletes a file, or a folder that was being set aside."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
