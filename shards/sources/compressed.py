"""Tars that are compressed as a whole, whose samples cannot be read from their middle."""

from __future__ import annotations

import re
import shlex
from typing import BinaryIO

from shards.errors import UserError

# by the first two bytes, the program that undoes it
_PROGRAMS = {b"\x1f\x8b": "gzip", b"\x28\xb5": "zstd", b"\xfd7": "xz", b"BZ": "bzip2"}


def refuse_compressed(file: BinaryIO, path: str) -> None:
    """Returns where the file is not compressed.

    Raises:
        UserError: it is; with the command that writes it as it was before.
    """
    file.seek(0)
    name = _PROGRAMS.get(file.read(2))
    if name is None:
        return
    plain = re.sub(r"(\.tar)?(\.[a-z0-9]+)?$", "", path)
    plain += "-plain" if path == f"{plain}.tar" else ""
    raise UserError(
        f"{path} is compressed ({name}), and samples of a tar are read from its middle: "
        f"`{name} -dc {shlex.quote(path)} > {shlex.quote(f'{plain}.tar')}` writes it without"
    )
