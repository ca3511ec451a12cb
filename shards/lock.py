"""One holder of a file or folder at a time; the kernel lets go when the process ends, whatever ends it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_NO_LOCKS = (
    errno.ENOLCK,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EPERM,
    errno.EINVAL,
)  # what mounts without locks answer
_LOOK = 0.005  # seconds between two tries of a lock that is not waited for without end


@contextlib.contextmanager
def lock(
    path: str | os.PathLike[str],
    *,
    create: bool = True,
    seconds: float | None = None,
    required: bool = True,
    pause: Callable[[float], object] = time.sleep,
) -> Iterator[bool]:
    """Holds the kernel's exclusive lock (flock) of `path`; yields whether it does and `path` still is what it locked.

    It yields False after `seconds` of trying, on a mount without locks unless one is `required`, and where somebody
    removed or replaced `path` while this process waited.

    Args:
        create: makes the file where there is none; False for a folder, or for a file that must exist.
        seconds: None waits as long as it takes, 0 tries once.
        pause: sleeps between two tries; it may raise to give up.

    Raises:
        OSError: `path` cannot be opened, or has no locks although one is `required`.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT if create else os.O_RDONLY, 0o666)
    try:
        try:
            got = _acquire(handle, seconds, required, pause)
        except OSError as error:
            # flock knows no path
            error.filename = error.filename or os.fspath(path)
            raise
        yield got and _is(path, handle)
    finally:
        os.close(handle)


def _acquire(
    handle: int, seconds: float | None, required: bool, pause: Callable[[float], object]
) -> bool:
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if deadline is None else fcntl.LOCK_NB))
            return True
        except BlockingIOError:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            pause(_LOOK)
        except OSError as error:
            if required or error.errno not in _NO_LOCKS:
                raise
            return False


def _is(path: str | os.PathLike[str], handle: int) -> bool:
    try:
        return os.path.samestat(Path(path).stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
