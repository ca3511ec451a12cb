"""One holder of a file at a time; the kernel lets go when the process ends, whatever ends it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
from collections.abc import Iterator
from pathlib import Path

# mounts that answer so have no locks: attempt numbers and Slurm's singleton then have to do
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Waits for the lock on `path` and holds it; OSError where the file cannot be opened."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(f"{path.parent} is on a file system without locks; going on without", flush=True)
        yield
