"""Builds WebDataset tars: deterministic USTAR members, with large arrays on page boundaries.

A .npy header may be padded with spaces as far as one likes, so its length is chosen such that the
payload behind it starts at a multiple of 4096 *in the tar*: any reader opens the member, and ours
can map it, or read it with O_DIRECT, without a copy. Payloads below a page are aligned to 64 bytes;
pages for them would cost more than they hold. No time, no user and no PAX header goes into the file.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

PAGE = 4096
SECTOR = 512  # a tar's unit: member headers and the padding of contents
_NAME = 100  # characters
_SIZE = 8**11 - 1  # that eleven octal digits can say
# where a header says them (POSIX.1-1988, ustar)
_SIZE_AT, _SUM_AT, _KIND_AT, _MAGIC_AT, _PREFIX_AT = 124, 148, 156, 257, 345
_BLANK = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)  # mtime 0, uid and gid 0, no names
# of all its bytes but the digits of the size; the sum itself counts as eight spaces
_BLANK_SUM = sum(_BLANK[:_SIZE_AT] + _BLANK[_SIZE_AT + 11 : _SUM_AT] + _BLANK[_SUM_AT + 8 :]) + 256
_SMALL = 64  # alignment below a page; what NumPy itself gives an array in a .npy
_PREFIX = len(b"\x93NUMPY\x01\x00") + 2  # magic, version 1.0, header length in two bytes


@dataclass(frozen=True, kw_only=True)
class Location:
    """The offset and length of a payload in its tar, in bytes, and its xxh3_128."""

    offset: int
    bytes: int
    xxh3: str  # hex

    def plain(self) -> dict[str, Any]:
        return {"offset": self.offset, "bytes": self.bytes, "xxh3": self.xxh3}


class TarBuilder:
    """Builds one tar in memory (a shard is about 128 MiB)."""

    def __init__(self) -> None:
        self._pieces: list[bytes | memoryview] = []
        self._offset = 0
        self._digest, self._hashed = hashlib.sha256(), 0

    def add(self, name: str, array: NDArray[np.generic]) -> Location:
        """Appends `array` as the .npy member `name`; C order, its own dtype. It must stay as it is until `finish`."""
        payload = (
            np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        )  # copied once, at the end
        alignment = PAGE if len(payload) >= PAGE else _SMALL
        header = npy_header(array.dtype, array.shape, self._offset + SECTOR, alignment)
        self._append(member_header(name, len(header) + len(payload)))
        self._append(header)
        location = Location(
            offset=self._offset, bytes=len(payload), xxh3=xxhash.xxh3_128_hexdigest(payload)
        )
        self._append(payload)
        self._append(bytes(-self._offset % SECTOR))
        return location

    def add_span(self, span: bytes) -> Location:
        """Appends what `members` made; where it lies, headers and padding included."""
        location = Location(
            offset=self._offset, bytes=len(span), xxh3=xxhash.xxh3_128_hexdigest(span)
        )
        self._append(span)
        return location

    @property
    def pieces(self) -> int:
        """How many pieces there are so far; complete members never change."""
        return len(self._pieces)

    def hash(self, pieces: int) -> None:
        """Hashes the first so many pieces, from where it was left; another thread may add more meanwhile."""
        for piece in self._pieces[self._hashed : pieces]:
            self._digest.update(piece)
        self._hashed = pieces

    @property
    def sha256(self) -> str:
        """Hex sha256 of what is there; hashes what is not yet."""
        self.hash(self.pieces)
        return self._digest.hexdigest()

    def finish(self) -> bytes:
        """The whole tar, closed by two zero sectors."""
        self._append(bytes(2 * SECTOR))
        return b"".join(self._pieces)

    def _append(self, data: bytes | memoryview) -> None:
        self._pieces.append(data)
        self._offset += len(data)


def members(contents: Mapping[str, bytes]) -> bytes:
    """Members by name, one after the other, each with its header and padded to whole sectors."""
    pieces = []
    for name, data in contents.items():
        pieces += [member_header(name, len(data)), data, bytes(-len(data) % SECTOR)]
    return b"".join(pieces)


def member_header(name: str, size: int) -> bytes:
    """What `tarfile` gives a member of this name and size, of no time and no owner, in a tenth of its time."""
    if len(name) > _NAME or not name.isascii() or size > _SIZE:
        member = tarfile.TarInfo(name)
        member.size = size
        return member.tobuf(tarfile.USTAR_FORMAT)
    stem, digits = name.encode(), b"%011o" % size
    header = bytearray(_BLANK)
    header[: len(stem)] = stem
    header[_SIZE_AT : _SIZE_AT + len(digits)] = digits
    header[_SUM_AT : _SUM_AT + 6] = b"%06o" % (_BLANK_SUM + sum(stem) + sum(digits))
    return bytes(header)


def plain_members(span: bytes) -> list[tuple[str, int, int]] | None:
    """Name, first byte and size of each member in a part of a tar whose hash holds; None leaves it to `tarfile`.

    All must be files in ustar or GNU headers that need no other, with names of ASCII.
    """
    found, at = [], 0
    while at < len(span):
        header = span[at : at + SECTOR]
        name, digits = header[:_NAME].partition(b"\0")[0], header[_SIZE_AT : _SIZE_AT + 12]
        plain = (
            header[_KIND_AT : _KIND_AT + 1] == b"0"
            and header[_MAGIC_AT : _MAGIC_AT + 5] == b"ustar"
        )
        # behind it, the first part of a long name
        whole = len(header) == SECTOR and not header[_PREFIX_AT] and name.isascii()
        digits = digits.strip(b" \0")
        if not (plain and whole and name and digits.isdigit()):
            return None
        size = int(digits, 8)
        found.append((name.decode(), at + SECTOR, size))
        at += SECTOR + size + -size % SECTOR
    return found if at == len(span) else None


def npy_header(dtype: np.dtype, shape: tuple[int, ...], start: int, alignment: int) -> bytes:
    """A .npy 1.0 header that, put at byte `start` of a file, ends at a multiple of `alignment`."""
    described = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": tuple(int(n) for n in shape),
    }
    text = repr(described).encode("latin-1")
    spaces = -(start + _PREFIX + len(text) + 1) % alignment
    length = len(text) + spaces + 1
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text + b" " * spaces + b"\n"
