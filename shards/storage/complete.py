"""Folders that are complete or do not count: their parts first, then a manifest with sizes and hashes."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from typing import Any, Literal

from shards.errors import UserError
from shards.storage.fence import MANIFEST, Fence
from shards.storage.objects import Url, files, join, list, publish, read_bytes, sha256, size, store

Verify = Literal["sizes", "hashes"]


def publish_folder(
    folder: Url, *, extra: Mapping[str, Any], manifest: str = MANIFEST, fence: Fence | None = None
) -> None:
    """Declares a folder complete whose parts are already written: fsync them, then the manifest last.

    The manifest is `{"files": [{"name", "bytes", "sha256"}], **extra}`, names relative to `folder`.
    Hidden files (a dot in front) are left out: a publisher that was killed may leave some.

    Args:
        fence: the right by which the manifest is published, if it ends with a newer attempt.

    Raises:
        FileExistsError: somebody else published this folder first.
        FencedError: a newer attempt has ended the right; the folder is not complete.
        FileNotFoundError: the folder has no parts.
    """
    if "files" in extra:
        raise ValueError("'files' is the manifest's own field; give `extra` another name")
    names = [name for name in files(folder) if name != manifest]
    if not names:
        raise FileNotFoundError(
            errno.ENOENT, "nothing to publish in this folder", os.fspath(folder)
        )
    store(folder).sync(os.fspath(folder), names)
    parts = [
        {"name": name, "bytes": size(url), "sha256": sha256(url)}
        for name, url in ((name, join(folder, name)) for name in names)
    ]
    data = json.dumps({"files": parts, **extra}, indent=1).encode()
    publish(join(folder, manifest), data, fence=fence)


def read_complete(
    folder: Url, verify: Verify = "sizes", manifest: str = MANIFEST
) -> dict[str, Any] | None:
    """The manifest of a complete folder; None where it is missing, torn, or does not hold.

    `sizes` compares every part's size (milliseconds), `hashes` also its sha256 (reads everything).
    """
    if verify not in ("sizes", "hashes"):
        raise ValueError(f"verify={verify!r}: give 'sizes' or 'hashes'")
    try:
        found = json.loads(read_bytes(join(folder, manifest)))
        parts = [(join(folder, f["name"]), f["bytes"], f["sha256"]) for f in found["files"]]
        if any(size(url) != expected for url, expected, _ in parts):
            return None
    except UserError:  # no such bucket, say: that is not for the reader of a manifest to pass over
        raise
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    if verify == "hashes" and any(sha256(url) != expected for url, _, expected in parts):
        return None
    return found


def newest_complete(parent: Url, prefix: str = "img-", verify: Verify = "sizes") -> str | None:
    """The complete folder `parent/<prefix><n>` with the greatest n, walking back over torn ones."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)")
    numbered = ((pattern.fullmatch(name), name) for name in list(parent))
    for _, name in sorted(((int(m[1]), name) for m, name in numbered if m), reverse=True):
        if read_complete(join(parent, name), verify) is not None:
            return join(parent, name)
    return None
