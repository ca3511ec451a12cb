"""Reads and publishes files and objects, in folders and on S3; nothing else in the code base touches either.

To publish is to make a name appear with all of its content, or not at all. On a file system that is a
temporary file, fsync and a hard link (which fails if the name exists); on S3 a conditional put,
as exclusive as the store makes it: AWS lets one of two simultaneous puts win, Swift may let both.
A *folder* is published by writing its files first and its manifest, with their sizes and hashes,
last: it is complete when that manifest matches, and readers walk back to the newest complete one. A `Fence` keeps an
attempt from publishing once a newer one has begun.
"""

from shards.storage.complete import (
    Flaw,
    Verify,
    describe,
    flaws,
    newest_complete,
    parse_manifest,
    publish_folder,
    read_complete,
    read_manifest,
)
from shards.storage.fence import MANIFEST, Fence
from shards.storage.folder import refuse_no_room
from shards.storage.objects import (
    CHUNK,
    Stat,
    Url,
    delete,
    end_attempts,
    exists,
    expanded,
    files,
    hashes,
    is_absolute,
    is_remote,
    join,
    list,
    publish,
    publish_file,
    read_bytes,
    read_chunks,
    read_range,
    reconnect,
    set_aside,
    sha256,
    size,
    stat,
    sweep,
)

__all__ = [
    "CHUNK",
    "MANIFEST",
    "Fence",
    "Flaw",
    "Stat",
    "Url",
    "Verify",
    "delete",
    "describe",
    "end_attempts",
    "exists",
    "expanded",
    "files",
    "flaws",
    "hashes",
    "is_absolute",
    "is_remote",
    "join",
    "list",
    "newest_complete",
    "parse_manifest",
    "publish",
    "publish_file",
    "publish_folder",
    "read_bytes",
    "read_chunks",
    "read_complete",
    "read_manifest",
    "read_range",
    "reconnect",
    "refuse_no_room",
    "set_aside",
    "sha256",
    "size",
    "stat",
    "sweep",
]
