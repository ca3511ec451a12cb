"""One holder of a file or folder at a time, by the kernel's flock: it ends with its process, so none is ever stale."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from shards.wait import wait_until

# what file systems without locks answer
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def locked(
    path: Path,
    *,
    folder: bool = False,
    patience_s: float = math.inf,
    required: bool = True,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[bool]:
    """Holds the exclusive lock of `path`; yields whether it is held.

    Args:
        path: a file, which is created with its folder where it does not exist.
        folder: locks an existing folder itself instead, which leaves no file.
        patience_s: seconds to wait for another holder before yielding False.
        required: False goes on without a lock, with a warning, where the file system has none.
        pause: how to sleep between two tries where the patience is limited.

    Raises:
        OSError: the path cannot be opened (FileNotFoundError where the folder to lock is gone, also when its last
            holder removed it), or its file system has no locks and one is required.
    """
    while True:
        handle = _open(path, folder)
        try:
            held = _acquire(handle, path, patience_s, required, pause)
            # the last holder may have removed or replaced what it held: then its lock protects nothing
            if not held or _names(path, handle):
                yield held
                return
        finally:
            os.close(handle)


def _open(path: Path, folder: bool) -> int:
    if folder:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def _acquire(
    handle: int, path: Path, patience_s: float, required: bool, pause: Callable[[float], None]
) -> bool:
    try:
        if math.isinf(patience_s):
            fcntl.flock(handle, fcntl.LOCK_EX)
            return True
        return wait_until(lambda: _try(handle), timeout_s=patience_s, pause=pause)
    except OSError as error:
        if required or error.errno not in _NO_LOCKS:
            raise
        logging.getLogger(__name__).warning(
            "%s is on a file system without locks; going on without one", path.parent
        )
        return True


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _names(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
