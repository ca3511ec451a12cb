"""The sha256 of large files that are read again and again, remembered while the file is the same one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

from shards import storage

# a file that changed so lately may change again within the resolution of its times
SETTLED_NS = 2_000_000_000


def cache_folder() -> Path:
    """The user's own folder of what can be found out again."""
    named = os.environ.get("SELFGUIDE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selfguide"


def remembered_sha256(path: Path) -> str:
    """Hex sha256 of a local file, read again only where inode, size or time of the last change are others.

    It says what a file is to be; who loads the file compares its bytes.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    whole = path.resolve()
    place = cache_folder() / f"sha256-{hashlib.sha256(str(whole).encode()).hexdigest()[:16]}.json"
    found = whole.stat()
    stamp = [str(whole), found.st_ino, found.st_size, found.st_mtime_ns]
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(place.read_text())
        if known["file"] == stamp:
            return str(known["sha256"])
    sha256 = storage.sha256(str(whole))
    if time.time_ns() - found.st_mtime_ns >= SETTLED_NS:
        # no room, no home, no right: the next command reads the file again
        with contextlib.suppress(OSError):
            _keep(place, json.dumps({"file": stamp, "sha256": sha256}))
    return sha256


def _keep(place: Path, text: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=place.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).replace(place)
    except BaseException:
        Path(name).unlink()
        raise
