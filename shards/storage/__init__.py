"""The one place that touches folders and `s3://`: read ranges, and publish things whole or not at all.

To publish is to make a name appear with its full content, or not. On a file system that is a
temporary file, fsync and a hard link (which fails where the name exists); on S3 a conditional put,
as exclusive as the store makes it: AWS lets one of two simultaneous puts win, Swift may let both.
A *folder* is published by writing its parts first and its manifest, with their sizes and hashes,
last: it is complete when that manifest holds, and readers walk back to the newest that is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from shards.errors import ChangedError, DamagedError, UserError

if TYPE_CHECKING:
    from shards.storage.s3 import S3

Url = str | os.PathLike[str]
Verify = Literal["sizes", "hashes"]

MANIFEST = "MANIFEST.json"
CHUNK = 16 << 20  # bytes a read asks for at once; S3 likes ranges of 8 to 16 MiB
_S3 = "s3://"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/+")  # a path may have merged a URL's slashes
_REREADS = 5  # of a small object that is replaced again and again
_TEMPORARY = re.compile(
    r"\..+\.[0-9a-f]{12}\.tmp"
)  # what a publisher writes before the name appears
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class Stat(NamedTuple):
    """Bytes of a file or object, and on S3 the ETag of this version of it."""

    size: int
    etag: str | None


def is_remote(url: Url) -> bool:
    """Whether `url` is on S3 rather than on a file system.

    Raises:
        UserError: it is neither: a folder called `gs:` is hardly what anybody means by gs://bucket.
    """
    text = os.fspath(url)
    if text.startswith(_S3):
        return True
    if ":/" in text and (scheme := _SCHEME.match(text)):
        raise UserError(
            f"{text} begins with {scheme[0]}: give a folder (as ./{text} if it is called so), or s3://BUCKET/FOLDER"
        )
    return False


def is_absolute(name: str) -> bool:
    """Whether a name says by itself where something is: a full path, or s3://."""
    return name.startswith((_S3, "/"))


def join(root: Url, *parts: str) -> str:
    """`root/part/part`, for folders and s3:// alike; a last part that is absolute is that itself."""
    if parts and is_absolute(parts[-1]):
        return parts[-1]
    if is_remote(root):
        return "/".join([os.fspath(root).rstrip("/"), *parts])
    return str(Path(root, *parts))


def exists(url: Url) -> bool:
    """Whether `url` is a file, an object, or a folder with something in it (on S3)."""
    return _store(url).exists(os.fspath(url))


def size(url: Url) -> int:
    """Bytes of a file or object.

    Raises:
        FileNotFoundError: there is none.
    """
    return stat(url).size


def stat(url: Url) -> Stat:
    """Size and version of a file or object; with the version, reads notice a replacement.

    Raises:
        FileNotFoundError: there is none.
    """
    return Stat(*_store(url).stat(os.fspath(url)))


def list(folder: Url) -> Sequence[str]:
    """Sorted names of files and folders directly in `folder`; empty where there is no such folder."""
    return _store(folder).list(os.fspath(folder))


def files(folder: Url) -> Sequence[str]:
    """Sorted names, relative to `folder`, of all visible files below it; empty where there is no such folder."""
    return _store(folder).files(os.fspath(folder))


def read_range(url: Url, start: int, stop: int, *, etag: str | None = None) -> bytes:
    """Bytes [start, stop) of a file or object; on S3, where `etag` is given, of that version only.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: it ends before `stop`; ChangedError: it is another version.
        StoreError: a store did not give these bytes, though asked for them within its budget.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"read_range of [{start}, {stop})")
    data = _store(url).read(os.fspath(url), start, stop, etag) if start < stop else b""
    if len(data) != stop - start:
        raise DamagedError(
            f"{os.fspath(url)}: asked for bytes [{start}, {stop}), got {len(data)} of {stop - start}"
        )
    return data


def read_chunks(url: Url, chunk: int = CHUNK) -> Iterator[bytes]:
    """The whole of one version of a file or object, in ranges whose lengths are checked.

    Raises:
        ChangedError: an object was replaced meanwhile. And what `read_range` raises.
    """
    total, etag = stat(url)
    for start in range(0, total, chunk):
        yield read_range(url, start, min(start + chunk, total), etag=etag)


def read_bytes(url: Url) -> bytes:
    """The whole of a file or object; of one that is replaced meanwhile, a later version."""
    for _ in range(_REREADS):
        try:
            return b"".join(read_chunks(url))
        except ChangedError:
            continue
    return b"".join(read_chunks(url))


def sha256(url: Url) -> str:
    """Hex sha256 of a file or object."""
    digest = hashlib.sha256()
    for chunk in read_chunks(url):
        digest.update(chunk)
    return digest.hexdigest()


def publish(url: Url, data: bytes, *, replace: bool = False) -> None:
    """Makes `url` appear with all of `data`, durable on return; nobody ever sees a part of it.

    To S3, large data goes up in parts, verified as a whole afterwards; `sweep` ends what a kill left.

    Raises:
        FileExistsError: `url` exists and `replace` is false; of many callers at once, one wins.
        UserError: the disk is full, or may not be written.
    """
    _store(url).publish(os.fspath(url), data, replace)


def sweep(folder: Url, *, older: float = 86_400.0) -> Sequence[str]:
    """Ends what killed publishers left below `folder` at least `older` seconds ago; returns their names.

    On S3 that is unfinished uploads, which nobody sees and everybody pays for; on a file system,
    temporary files. A day keeps publishers safe that are still at work.
    """
    return _store(folder).sweep(os.fspath(folder), older)


def publish_folder(folder: Url, *, extra: Mapping[str, Any], manifest: str = MANIFEST) -> None:
    """Declares a folder complete whose parts are already written: fsync them, then the manifest last.

    The manifest is `{"files": [{"name", "bytes", "sha256"}], **extra}`, names relative to `folder`.
    Hidden files (a dot in front) are left out: a publisher that was killed may leave some.

    Raises:
        FileExistsError: somebody else published this folder first.
        FileNotFoundError: the folder has no parts.
    """
    if "files" in extra:
        raise ValueError("'files' is the manifest's own field; give `extra` another name")
    store = _store(folder)
    names = [name for name in store.files(os.fspath(folder)) if name != manifest]
    if not names:
        raise FileNotFoundError(
            errno.ENOENT, "nothing to publish in this folder", os.fspath(folder)
        )
    store.sync(os.fspath(folder), names)
    files = [
        {"name": name, "bytes": size(url), "sha256": sha256(url)}
        for name, url in ((name, join(folder, name)) for name in names)
    ]
    publish(join(folder, manifest), json.dumps({"files": files, **extra}, indent=1).encode())


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


class _Store(Protocol):
    """What a kind of storage has to know; names inside are full paths or s3:// urls."""

    def exists(self, url: str) -> bool: ...
    def stat(self, url: str) -> tuple[int, str | None]: ...
    def list(self, folder: str) -> Sequence[str]: ...
    def files(self, folder: str) -> Sequence[str]:
        """Sorted relative names of all visible files below `folder`."""

    def read(self, url: str, start: int, stop: int, etag: str | None) -> bytes: ...
    def publish(self, url: str, data: bytes, replace: bool) -> None: ...
    def sync(self, folder: str, names: Sequence[str]) -> None:
        """Makes files that somebody wrote durable."""

    def sweep(self, folder: str, older: float) -> Sequence[str]: ...


class _Local:
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

    def publish(self, url: str, data: bytes, replace: bool) -> None:
        try:
            self._publish(Path(url), data, replace)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise UserError(
                f"{url}: its {len(data):,} bytes cannot be written ({error.strerror}): make room there, or "
                "choose another disk; what is finished is kept, and the same command goes on behind it"
            ) from error

    def _publish(self, path: Path, data: bytes, replace: bool) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                temporary.replace(path)
            else:
                _link_new(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _fsync(path.parent)

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
                    path.unlink()
                    ended.append(str(path))
        return ended


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
        _rename_new(temporary, path)


def _rename_new(temporary: Path, path: Path) -> None:
    """The same where the file system has no hard links: one publisher at a time holds the folder."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # the kernel lets go when the process dies
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        temporary.rename(path)
    finally:
        os.close(folder)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_LOCAL = _Local()


def _store(url: Url) -> _Store:
    return _s3(os.getpid()) if is_remote(url) else _LOCAL


@functools.lru_cache(maxsize=1)
def _s3(pid: int) -> S3:
    """One a process: connections that a fork carries over would be shared with the parent."""
    from shards.storage.s3 import S3

    return S3()
