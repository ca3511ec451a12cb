"""Reads and publishes single files and objects: every call goes to a folder or to S3, by its url."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from shards.errors import ChangedError, DamagedError, UserError
from shards.storage.fence import Fence
from shards.storage.folder import Folder

if TYPE_CHECKING:
    from shards.storage.s3 import S3

Url = str | os.PathLike[str]

CHUNK = 16 << 20  # bytes a read asks for at once; S3 likes ranges of 8 to 16 MiB
_S3 = "s3://"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/+")  # a path may have merged a URL's slashes
_REREADS = 5  # of a small object that is replaced again and again
HASHES: Mapping[str, Callable[[], Any]] = {"sha256": hashlib.sha256, "xxh3": xxhash.xxh3_128}


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
    if text.startswith("s3:") and not text.startswith("s3:/"):
        raise UserError(
            f"{text} is no url: give s3://{text[3:]} (or {Path(text).absolute()} for a folder called so)"
        )
    if ":/" in text and (scheme := _SCHEME.match(text)):
        raise UserError(
            f"{text} begins with {scheme[0]}: give a folder (as {Path(text).absolute()} if it is called so), or s3://BUCKET/FOLDER"
        )
    return False


def expanded(path: str) -> Path:
    """A path of this machine with the home that a ~ at its beginning stands for; ~ of nobody here is a name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def place(text: str) -> str:
    """The type of an argument that is a folder, file or s3:// url, with ~ as a shell would expand it by itself.

    A shell expands it at the beginning of a word, and so not in `--out=~/x`.
    """
    import argparse

    try:
        remote = is_remote(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text if remote or not text.startswith("~") else str(expanded(text))


def is_absolute(name: str) -> bool:
    """Whether a name is a full path or an s3:// url."""
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
    return store(url).exists(os.fspath(url))


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
    return Stat(*store(url).stat(os.fspath(url)))


def list(folder: Url) -> Sequence[str]:
    """Sorted names of files and folders directly in `folder`; empty where there is no such folder."""
    return store(folder).list(os.fspath(folder))


def files(folder: Url) -> Sequence[str]:
    """Sorted names, relative to `folder`, of all visible files below it; empty where there is no such folder."""
    return store(folder).files(os.fspath(folder))


def read_range(url: Url, start: int, stop: int, *, etag: str | None = None) -> bytes:
    """Bytes [start, stop) of a file or object; on S3, where `etag` is given, of that version only.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: it ends before `stop`; ChangedError: it is another version.
        StoreError: a store did not give these bytes, though asked for them within its budget.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"read_range of [{start}, {stop})")
    data = store(url).read(os.fspath(url), start, stop, etag) if start < stop else b""
    if len(data) != stop - start:
        raise DamagedError(
            f"{os.fspath(url)}: asked for bytes [{start}, {stop}), got {len(data)} of {stop - start}"
        )
    return data


def read_chunks(url: Url, chunk: int = CHUNK) -> Iterator[bytes]:
    """All bytes of one version of a file or object, in ranges whose lengths are checked.

    Raises:
        ChangedError: an object was replaced meanwhile. And what `read_range` raises.
    """
    total, etag = stat(url)
    for start in range(0, total, chunk):
        yield read_range(url, start, min(start + chunk, total), etag=etag)


def read_bytes(url: Url) -> bytes:
    """All bytes of a file or object; if it is replaced meanwhile, of a later version."""
    for _ in range(_REREADS):
        try:
            return b"".join(read_chunks(url))
        except ChangedError:
            continue
    return b"".join(read_chunks(url))


def sha256(url: Url) -> str:
    """Hex sha256 of a file or object."""
    return hashes(url, ("sha256",))["sha256"]


def hashes(url: Url, kinds: Sequence[str] = tuple(HASHES)) -> Mapping[str, str]:
    """Hex digests of a file or object, which is read once: sha256 names content, xxh3 finds damage at once."""
    digests = {kind: HASHES[kind]() for kind in kinds}
    for chunk in read_chunks(url):
        for digest in digests.values():
            digest.update(chunk)
    return {kind: digest.hexdigest() for kind, digest in digests.items()}


def publish(url: Url, data: bytes, *, replace: bool = False, fence: Fence | None = None) -> None:
    """Makes `url` appear with all of `data`, durable on return; nobody ever sees a part of it.

    To S3, large data goes up in parts, verified as a whole afterwards; `sweep` ends what a kill left.

    Args:
        fence: the right by which this is published, where it ends with a newer attempt. Below its place
            everything has to be published by a fence: on S3 a newer attempt ends all uploads under way there.

    Raises:
        FileExistsError: `url` exists and `replace` is false; of many callers at once, one wins.
        FencedError: a newer attempt has ended the right; nothing was published.
        NoRoomError: the disk is full, or may not be written.
    """
    store(url).publish(os.fspath(url), data, replace, fence)


def publish_file(
    url: Url,
    path: str | os.PathLike[str],
    *,
    replace: bool = False,
    fence: Fence | None = None,
) -> None:
    """Makes `url` appear with the bytes of the local file `path`, as `publish` does, without reading it into memory.

    On the same file system `url` becomes a second name of the file itself: delete `path` afterwards if
    you like, but do not write into it.

    Raises:
        FileNotFoundError: there is no such file. And what `publish` raises.
    """
    store(url).publish_file(os.fspath(url), os.fspath(path), replace, fence)


def delete(url: Url) -> None:
    """Deletes a file or object, or a folder with everything below it, its manifest first. It may be absent."""
    store(url).delete(os.fspath(url))


def set_aside(folder: Path, to: Path | None, fence: Fence) -> None:
    """Moves a folder of a file system to `to`, or deletes it where that is None; it may be absent.

    It leaves its place at once and whole. Where `to` exists, that is kept and `folder` is deleted.

    Raises:
        FencedError: a newer attempt has ended the right of `fence`; nothing was moved.
    """
    _FOLDER.set_aside(folder, to, fence)


def end_attempts(place: Url, number: int) -> None:
    """Ends the right of attempts below `number` to publish below `place`; then nothing of theirs appears any more."""
    store(place).end_attempts(os.fspath(place), number)


def sweep(folder: Url, *, older: float = 86_400.0) -> Sequence[str]:
    """Ends what killed publishers left below `folder` at least `older` seconds ago; returns their names.

    On S3 that is unfinished uploads, which nobody sees and everybody pays for; on a file system,
    temporary files. A day keeps publishers safe that are still at work.
    """
    return store(folder).sweep(os.fspath(folder), older)


_FOLDER = Folder()


def store(url: Url) -> Folder | S3:
    """Which kind of storage `url` is in."""
    return _s3(os.getpid()) if is_remote(url) else _FOLDER


def reconnect() -> None:
    """Closes nothing, but forgets the S3 client: the next call makes one from the environment as it then is."""
    _s3.cache_clear()


@functools.lru_cache(maxsize=1)
def _s3(pid: int) -> S3:
    """One a process: connections that a fork carries over would be shared with the parent."""
    from shards.storage.s3 import S3

    return S3()
