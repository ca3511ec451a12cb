"""The one place that touches folders and `s3://`: read ranges, and publish things whole or not at all.

To publish is to make a name appear with its full content, or not. On a file system that is a
temporary file, fsync and a hard link (which fails where the name exists); on S3 a conditional put,
as exclusive as the store makes it: AWS lets one of two simultaneous puts win, Swift may let both.
A *folder* is published by writing its parts first and its manifest, with their sizes and hashes,
last: it is complete when that manifest holds, and readers walk back to the newest that is.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from shards.errors import DamagedError

Url = str | os.PathLike[str]
Verify = Literal["sizes", "hashes"]

MANIFEST = "MANIFEST.json"
CHUNK = 16 << 20  # bytes a read asks for at once; S3 likes ranges of 8 to 16 MiB
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def is_remote(url: Url) -> bool:
    """Whether `url` is on S3 rather than on a file system."""
    return os.fspath(url).startswith("s3://")


def join(root: Url, *parts: str) -> str:
    """`root/part/part`, for folders and s3:// alike."""
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
    return _store(url).size(os.fspath(url))


def list(folder: Url) -> Sequence[str]:
    """Sorted names of files and folders directly in `folder`; empty where there is no such folder."""
    return _store(folder).list(os.fspath(folder))


def read_range(url: Url, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file or object.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: it ends before `stop`, or the answer has another length.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"read_range of [{start}, {stop})")
    data = _store(url).read(os.fspath(url), start, stop) if start < stop else b""
    if len(data) != stop - start:
        raise DamagedError(
            f"{os.fspath(url)}: asked for bytes [{start}, {stop}), got {len(data)} of {stop - start}"
        )
    return data


def read_chunks(url: Url, chunk: int = CHUNK) -> Iterator[bytes]:
    """The whole of a file or object, in ranges whose lengths are checked."""
    total = size(url)
    for start in range(0, total, chunk):
        yield read_range(url, start, min(start + chunk, total))


def read_bytes(url: Url) -> bytes:
    """The whole of a file or object."""
    return b"".join(read_chunks(url))


def sha256(url: Url) -> str:
    """Hex sha256 of a file or object."""
    digest = hashlib.sha256()
    for chunk in read_chunks(url):
        digest.update(chunk)
    return digest.hexdigest()


def publish(url: Url, data: bytes, *, replace: bool = False) -> None:
    """Makes `url` appear with all of `data`, durable on return; nobody ever sees a part of it.

    Raises:
        FileExistsError: `url` exists and `replace` is false; of many callers at once, one wins.
    """
    _store(url).publish(os.fspath(url), data, replace)


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
    def size(self, url: str) -> int: ...
    def list(self, folder: str) -> Sequence[str]: ...
    def files(self, folder: str) -> Sequence[str]:
        """Sorted relative names of all visible files below `folder`."""

    def read(self, url: str, start: int, stop: int) -> bytes: ...
    def publish(self, url: str, data: bytes, replace: bool) -> None: ...
    def sync(self, folder: str, names: Sequence[str]) -> None:
        """Makes files that somebody wrote durable."""


class _Local:
    def exists(self, url: str) -> bool:
        return Path(url).exists()

    def size(self, url: str) -> int:
        status = Path(url).stat()
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a file", url)
        return status.st_size

    def list(self, folder: str) -> Sequence[str]:
        return sorted(p.name for p in Path(folder).iterdir()) if Path(folder).is_dir() else []

    def files(self, folder: str) -> Sequence[str]:
        root = Path(folder)
        names = (p.relative_to(root) for p in root.rglob("*") if p.is_file())
        return sorted(n.as_posix() for n in names if not any(s.startswith(".") for s in n.parts))

    def read(self, url: str, start: int, stop: int) -> bytes:
        with Path(url).open("rb", buffering=0) as file:
            file.seek(start)
            parts = []
            while start < stop and (part := file.read(stop - start)):  # read() may stop early
                parts.append(part)
                start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def publish(self, url: str, data: bytes, replace: bool) -> None:
        path = Path(url)
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


class _S3:
    """s3fs, kept to its sound calls: its whole-object reads fill short answers with zeros."""

    def __init__(self) -> None:
        import s3fs

        # Credentials and endpoint come from the environment (AWS_*), so that they can refresh.
        self._fs = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)

    def _ask(self, call: Callable[..., Any], url: str, **options: Any) -> Any:
        """Calls s3fs; a refusal says which object it was about and what to look at."""
        from botocore.exceptions import NoCredentialsError, PartialCredentialsError

        try:
            return call(url, **options)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "no such object", url) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            reason = f"no credentials ({error}); set AWS_ACCESS_KEY_ID and its like, or a profile"
            raise PermissionError(errno.EACCES, reason, url) from error
        except PermissionError as error:
            reason = f"the store refuses the credentials it was given ({error})"
            raise PermissionError(errno.EACCES, reason, url) from error

    def exists(self, url: str) -> bool:
        return bool(self._ask(self._fs.exists, url))

    def size(self, url: str) -> int:
        return int(self._ask(self._fs.info, url)["size"])

    def list(self, folder: str) -> Sequence[str]:
        try:
            found = self._ask(self._fs.ls, folder, detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return sorted({name.rstrip("/").rsplit("/", 1)[-1] for name in found})

    def files(self, folder: str) -> Sequence[str]:
        root = folder.removeprefix("s3://").rstrip("/") + "/"
        names = (name.removeprefix(root) for name in self._ask(self._fs.find, folder))
        return sorted(n for n in names if n and not any(s.startswith(".") for s in n.split("/")))

    def read(self, url: str, start: int, stop: int) -> bytes:
        return self._ask(self._fs.cat_file, url, start=start, end=stop)

    def publish(self, url: str, data: bytes, replace: bool) -> None:
        mode = "overwrite" if replace else "create"
        try:
            self._ask(self._fs.pipe_file, url, data=data, mode=mode)
        except OSError as error:
            # s3fs knows a failed If-None-Match only from servers that name the condition
            if not replace and "PreconditionFailed" in repr(error.__cause__ or error):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), url) from error
            raise

    def sync(self, folder: str, names: Sequence[str]) -> None:
        """Nothing to do: an object that exists is durable."""


_LOCAL = _Local()


def _store(url: Url) -> _Store:
    return _s3(os.getpid()) if is_remote(url) else _LOCAL


@functools.lru_cache(maxsize=1)
def _s3(pid: int) -> _S3:
    return _S3()  # one per process: an s3fs object carried over a fork refuses to work
