"""Folders that are complete or do not count: their parts first, then a manifest with sizes and hashes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from shards.errors import DamagedError
from shards.storage.fence import MANIFEST, Fence
from shards.storage.folder import refuse_no_room, sweep_drafts
from shards.storage.objects import (
    HASHES,
    Url,
    files,
    hashes,
    join,
    list,
    publish,
    publish_file,
    read_bytes,
    size,
    store,
)

Verify = Literal["sizes", "hashes"]


class Flaw(NamedTuple):
    """A part of a folder that is not what its manifest says, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


def publish_folder(
    folder: Url,
    *,
    extra: Mapping[str, Any],
    parts: Sequence[Mapping[str, Any]] | None = None,
    manifest: str = MANIFEST,
    fence: Fence | None = None,
) -> None:
    """Declares a folder complete whose parts are already written: fsync them, then the manifest last.

    The manifest is `{"files": [{"name", "bytes", "sha256", "xxh3"}], **extra}`, names relative to `folder`.
    Hidden files (a dot in front) are left out: a publisher that was killed may leave some. A manifest that is there
    and does not hold is superseded.

    Args:
        parts: what the manifest says of the files, by whoever wrote them; None hashes all that are in the folder.
        fence: the right by which the manifest is published, if it ends with a newer attempt.

    Raises:
        FileExistsError: somebody else published this folder first, and it holds.
        FencedError: a newer attempt has ended the right; the folder is not complete.
        FileNotFoundError: the folder has no parts.
    """
    if "files" in extra:
        raise ValueError("'files' is the manifest's own field; give `extra` another name")
    if parts is None:
        parts = [describe(folder, name) for name in files(folder) if name != manifest]
    if not parts:
        raise FileNotFoundError(
            errno.ENOENT, "nothing to publish in this folder", os.fspath(folder)
        )
    store(folder).sync(os.fspath(folder), [part["name"] for part in parts])
    data = json.dumps({"files": [*parts], **extra}, indent=1).encode()
    url = join(folder, manifest)
    try:
        publish(url, data, fence=fence)
    except FileExistsError:
        if read_complete(folder, "hashes", manifest) is not None:
            raise
        publish(url, data, replace=True, fence=fence)


def write_part(
    folder: Path, name: str, pieces: Iterable[bytes | memoryview], fence: Fence
) -> dict[str, Any]:
    """Publishes a file of a folder of a file system, end to end of `pieces`; returns what a manifest says of it.

    Only one process at a time writes a file of that name by that right: what one left that was killed is deleted.

    Raises:
        FencedError: a newer attempt has ended the right of `fence`.
        NoRoomError: the disk is full, or may not be written.
    """
    path = folder / name
    # hidden and named as storage's own, so that `sweep` deletes what a kill leaves
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    digests, size = {kind: make() for kind, make in HASHES.items()}, 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep_drafts(path, fence)
        with draft.open("xb") as out:
            for piece in pieces:
                out.write(piece)
                size += len(piece)
                for digest in digests.values():
                    digest.update(piece)
        publish_file(path, draft, replace=True, fence=fence)
    except OSError as error:
        refuse_no_room(path, size, error)
        raise
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return {"name": name, "bytes": size} | {kind: d.hexdigest() for kind, d in digests.items()}


def describe(folder: Url, name: str) -> dict[str, Any]:
    """What a manifest says of a file: its name, bytes and hashes."""
    url = join(folder, name)
    return {"name": name, "bytes": size(url), **hashes(url)}


def read_manifest(folder: Url, manifest: str = MANIFEST) -> dict[str, Any] | None:
    """The manifest of a folder, whose parts are not looked at; None where there is none.

    Raises:
        DamagedError: it is torn.
    """
    url = join(folder, manifest)
    try:
        return parse_manifest(read_bytes(url), url)
    except (FileNotFoundError, NotADirectoryError):
        return None


def parse_manifest(data: bytes, url: str) -> dict[str, Any]:
    """What a manifest says of the parts of its folder; `url` is where it was read.

    Raises:
        DamagedError: it is torn.
    """
    try:
        found: dict[str, Any] = json.loads(data)
        if all({"name", "bytes", "sha256"} <= part.keys() for part in found["files"]):
            return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{url} is torn: {error}") from error
    raise DamagedError(f"{url} is torn: a part has no name, size or sha256")


def flaws(
    folder: Url,
    found: Mapping[str, Any],
    verify: Verify = "sizes",
    names: Collection[str] | None = None,
) -> Sequence[Flaw]:
    """The parts, of those called `names`, that are not what the manifest `found` says.

    `sizes` compares their sizes (milliseconds), `hashes` also their bytes (reads everything): by xxh3 where the
    manifest has it, else by sha256.
    """
    if verify not in ("sizes", "hashes"):
        raise ValueError(f"verify={verify!r}: give 'sizes' or 'hashes'")
    parts = [part for part in found["files"] if names is None or part["name"] in names]
    wrong = [Flaw(p["name"], why) for p in parts if (why := _wrong(folder, p, "sizes"))]
    if wrong or verify == "sizes":
        return wrong
    return [Flaw(p["name"], why) for p in parts if (why := _wrong(folder, p, "hashes"))]


def _wrong(folder: Url, part: Mapping[str, Any], verify: Verify) -> str | None:
    url, kind = join(folder, part["name"]), "xxh3" if "xxh3" in part else "sha256"
    try:
        if verify == "sizes":
            now, then = size(url), part["bytes"]
            return None if now == then else f"has {now:,} bytes and not {then:,}"
        same = hashes(url, (kind,))[kind] == part[kind]
        return None if same else f"has other bytes than were written, by {kind}"
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"cannot be read ({error.strerror})"


def read_complete(
    folder: Url, verify: Verify = "sizes", manifest: str = MANIFEST
) -> dict[str, Any] | None:
    """The manifest of a complete folder; None where it is missing, torn, or `flaws` finds any."""
    try:
        found = read_manifest(folder, manifest)
    except DamagedError:
        return None
    return None if found is None or flaws(folder, found, verify) else found


def newest_complete(parent: Url, prefix: str = "img-", verify: Verify = "sizes") -> str | None:
    """The complete folder `parent/<prefix><n>` with the greatest n, walking back over torn ones."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)")
    numbered = ((pattern.fullmatch(name), name) for name in list(parent))
    for _, name in sorted(((int(m[1]), name) for m, name in numbered if m), reverse=True):
        if read_complete(join(parent, name), verify) is not None:
            return join(parent, name)
    return None
