"""Files as arrays, mapped and not held open: a process may map far more files than it may open.

Python's `mmap`, and `np.memmap` on it, keeps a descriptor for each mapping until 3.13, and 1,024 are what many
systems let a process have. The kernel needs none once the mapping stands (POSIX, mmap: it outlives close).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from functools import cache

import numpy as np
from numpy.typing import NDArray

MOST = 49_152  # mappings of ours in a process: Linux allows 65,530, and libraries need some

_FAILED = ctypes.c_void_p(-1).value


class Mapped(np.ndarray):
    """Bytes of a file; what is cut out of it keeps it mapped."""


def map_file(path: str | os.PathLike[str], size: int) -> NDArray[np.uint8]:
    """The first `size` bytes of a file, (size,) uint8, to be read only. Unmapped with the last view of it.

    Raises:
        ValueError: the file is shorter, and to read behind its end would end the process.
        OSError: it cannot be opened or mapped.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(file).st_size < size:
            raise ValueError(f"{os.fspath(path)} is shorter than {size:,} bytes")
        address = _libc().mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
    finally:
        os.close(file)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fspath(path))
    buffer = (ctypes.c_uint8 * size).from_address(address)
    # not at exit: a thread may read until the process is gone
    weakref.finalize(buffer, _libc().munmap, address, size).atexit = False
    found = np.asarray(memoryview(buffer)).view(Mapped)
    found.flags.writeable = False
    return found


def is_mapped(values: object) -> bool:
    """Whether an array's bytes are those of a file that `map_file` mapped."""
    while isinstance(values, np.ndarray) and not isinstance(values, Mapped):
        values = values.base
    return isinstance(values, Mapped)


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    integers = [ctypes.c_int] * 3
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *integers, ctypes.c_int64]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library
