"""The files of a data set: a small immutable manifest, its index, and a pointer to the current manifest.

    <root>/LATEST                    sha256 of the current manifest, written last
    <root>/manifest-<hash12>.json    counts, typed fields, header, statistics, shards with their sha256
    <root>/index-<hash12>.npy        one row per block: shard, rows, and per field offset, bytes, xxh3
    <root>/shards/*.tar, *.json      the data, and beside each tar the record that committed it

The manifest names the index's sha256 and is itself named by the sha256 of its canonical JSON, so one
hash stands for every byte of a data set. A sample's *ordinal* is its row in the order of (shard, block,
row); annotation sidecars have one row per ordinal. All blocks hold `block` samples except the last.

There are two layouts. In `blocks` a member of a tar is one field of a whole block. In `samples` every sample has
its own members, as WebDataset is usually written; the index then has one row per sample, whose single span is all
of its members with their headers, and a block is `block` rows in a row, of one tar or of several. Tars that others
wrote are indexed in place: their names may be absolute, and the records of what was found in them are
in <root>/records.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from shards import storage
from shards.errors import DamagedError, UserError
from shards.format.header import Header, known

VERSION = 1
LATEST = "LATEST"
SEAL = "check"
_SHA256 = re.compile("[0-9a-f]{64}")

Layout = Literal["blocks", "samples"]

_json = json.JSONEncoder(allow_nan=False).encode


@dataclass(frozen=True, kw_only=True)
class Field:
    """What a reader gives of every sample. `shape` is of one, `dtype` NumPy's with its byte order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: Literal["image", "latent", "label", "key"]

    @property
    def sample_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * math.prod(self.shape))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar. `name` is relative to the root; of tars that were indexed elsewhere it may be absolute."""

    name: str
    bytes: int
    sha256: str
    count: int  # samples
    blocks: int  # rows of the index


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """A data set; made by `of`. `blocks` is the index, see `index_dtype`: a row a block, or a row a sample."""

    hash: str  # hex sha256 of the canonical JSON of `plain`
    plain: dict[str, Any] = field(repr=False)  # the manifest as its file holds it
    count: int
    block: int  # samples in a block
    fields: tuple[Field, ...]
    shards: tuple[Shard, ...] = field(repr=False)
    blocks: NDArray[np.void] = field(repr=False)
    header: dict[str, Any]  # a `Header`, plain
    channel_mean: tuple[float, ...]  # of stored channels, float64; over both mirror images
    channel_std: tuple[float, ...]
    minimum: float
    maximum: float
    label_histogram: tuple[int, ...] | None = field(
        repr=False
    )  # samples per class; None without labels
    source: dict[str, Any]  # name, fingerprint (sha256), count
    seed: int  # of the shuffle before writing
    plan: str  # hash of all that decided these bytes; the same plan is the same data set
    layout: Layout = "blocks"
    decode: dict[str, Any] | None = None  # of samples: a `samples.Decode`, plain
    indexed: bool = False  # the tars are others'; not ours to change

    @staticmethod
    def of(plain: dict[str, Any], blocks: NDArray[np.void]) -> Manifest:
        """From the manifest file's content; fields that a later writer added are kept in `plain`.

        Raises:
            DamagedError: names that lead out of the data set's folder, which no writer gives.
        """
        _check_names(plain)
        statistics, histogram = plain["statistics"], plain["label_histogram"]
        fields = [{**known(Field, f), "shape": tuple(f["shape"])} for f in plain["fields"]]
        return Manifest(
            hash=digest(plain),
            plain=plain,
            count=plain["count"],
            block=plain["block"],
            fields=tuple(Field(**f) for f in fields),
            shards=tuple(Shard(**known(Shard, s)) for s in plain["shards"]),
            blocks=blocks,
            header=plain["header"],
            channel_mean=tuple(statistics["mean"]),
            channel_std=tuple(statistics["std"]),
            minimum=statistics["minimum"],
            maximum=statistics["maximum"],
            label_histogram=None if histogram is None else tuple(histogram),
            source=plain["source"],
            seed=plain["seed"],
            plan=plain["plan"],
            layout=_layout(plain.get("layout", "blocks")),
            decode=plain.get("decode"),
            indexed=plain.get("indexed", False),
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample's x as it is stored: (C, H, W), or what the header's content and flips make of it."""
        return self.fields[self.column("x")].shape

    @property
    def model_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one sample as a model sees it."""
        return Header.of(self.header).model_shape(self.shape)

    @property
    def classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.label_histogram or ())

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels from 0; empty where they are not known."""
        return tuple(self.plain.get("class_names", ()))

    @property
    def block_count(self) -> int:
        return -(-self.count // self.block)

    @property
    def row_samples(self) -> int:
        """Samples of a row of the index, save the last."""
        return 1 if self.layout == "samples" else self.block

    @property
    def sample_bytes(self) -> int:
        """Of a sample as it is stored, on average."""
        return max(1, int(self.blocks["bytes"].sum()) // self.count)

    def shards_of(self, ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of the tar of each sample."""
        return self.blocks["shard"][ordinals // self.row_samples].astype(np.int64)

    def record_name(self, shard: Shard) -> str:
        """Name of the record that committed a tar, or that lists what was found in it."""
        if not self.indexed:
            return shard.name.removesuffix(".tar") + ".json"
        return record_name(shard.name)

    def column(self, name: str) -> int:
        """Where a field stands in `fields` and in the index."""
        return [f.name for f in self.fields].index(name)


def record_name(tar: str) -> str:
    """Where the record of an indexed tar is kept: others may have a .json of their own beside it."""
    stem = tar.rsplit("/", 1)[-1].removesuffix(".tar")
    return f"records/{stem}-{sha256_of(tar.encode())[:12]}.json"


def index_dtype(fields: int) -> np.dtype[np.void]:
    """A row of the index. `offset` is where the payload starts in the tar, after tar and npy headers.

    Of samples a row is of one, with one span for all its members, their headers included.
    """
    return np.dtype(
        [
            ("shard", "<u4"),
            ("rows", "<u4"),
            ("offset", "<u8", (fields,)),
            ("bytes", "<u8", (fields,)),
            ("xxh3", "u1", (fields, 16)),  # xxh3_128 of the payload, big-endian as xxhash prints it
        ]
    )


def hashes(hexadecimal: Iterable[str]) -> NDArray[np.uint8]:
    """(n, 16) of an index, of xxh3_128 as xxhash prints it."""
    return np.frombuffer(bytes.fromhex("".join(hexadecimal)), dtype=np.uint8).reshape(-1, 16)


def index_bytes(blocks: NDArray[np.void]) -> bytes:
    """The index as a .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, blocks, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def digest(plain: Mapping[str, Any]) -> str:
    """Hex sha256 of the one canonical JSON text of a value."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256_of(text.encode())


def seal(plain: Mapping[str, Any]) -> bytes:
    """A record as JSON that includes its own digest."""
    return f"{indented({**plain, SEAL: digest(plain)})}\n".encode()


def indented(value: Any, line: str = "\n") -> str:
    """`json.dumps(value, indent=1)`, which is Python's own and takes several times as long for long tables."""
    inner = f"{line} "
    if isinstance(value, dict) and value:
        items = (f"{_json(name)}: {indented(each, inner)}" for name, each in value.items())
        return f"{{{inner}{f',{inner}'.join(items)}{line}}}"
    if isinstance(value, list | tuple) and value:
        return f"[{inner}{f',{inner}'.join([indented(each, inner) for each in value])}{line}]"
    return _json(value)


def unseal(data: bytes) -> dict[str, Any]:
    """The record again.

    Raises:
        DamagedError: it is not what was sealed.
    """
    try:
        found = json.loads(data)
        holds = isinstance(found, dict) and found.pop(SEAL, None) == digest(found)
    except ValueError as error:  # no JSON, or a number that JSON does not have
        raise DamagedError(f"no record: {error}") from None
    if not holds:
        raise DamagedError("it is not what was written")
    return dict(found)


def read_record(url: storage.Url) -> dict[str, Any] | None:
    """The record that was sealed at `url`; None where there is none, or not as it was written."""
    try:
        return unseal(storage.read_bytes(url))
    except (FileNotFoundError, DamagedError):
        return None


def save(root: storage.Url, manifest: Manifest, *, new: bool = False) -> None:
    """Publishes index, manifest and, last, the pointer that makes them current.

    Raises:
        UserError: with `new`, another manifest is current here.
    """
    index, name = index_bytes(manifest.blocks), manifest.hash
    storage.publish(storage.join(root, _index_name(sha256_of(index))), index, replace=True)
    text = f"{indented(manifest.plain)}\n"
    storage.publish(storage.join(root, manifest_name(name)), text.encode(), replace=True)
    try:
        storage.publish(storage.join(root, LATEST), f"{name}\n".encode(), replace=not new)
    except FileExistsError:
        if pointer(root) != name:
            raise UserError(
                f"{root} holds another data set by now (manifest {pointer(root)[:12]}), published while this "
                "one was written: choose another folder"
            ) from None


def load(root: storage.Url, hash: str | None = None) -> Manifest:
    """The current manifest of a folder or s3:// prefix, or the one with `hash`; checked, index included.

    Raises:
        UserError: nothing there, nothing finished there, or another version of the format.
        DamagedError: manifest or index are not what was written.
    """
    name = hash or pointer(root)
    url = storage.join(root, manifest_name(name))
    try:
        plain = json.loads(storage.read_bytes(url))
    except FileNotFoundError:
        raise DamagedError(f"{url} is missing, but {LATEST} or a run's state names it") from None
    except ValueError as error:
        raise DamagedError(f"{url} is not JSON: {error}") from None
    version = plain.get("version") if isinstance(plain, dict) else None
    if not isinstance(version, int):
        raise DamagedError(f"{url} names no version: it was changed after it was written")
    if version != VERSION:
        raise UserError(
            f"{url} has format version {version}, this program reads {VERSION}: use the program it "
            f"was written with, or write them with `python -m tools.shards make` of this one"
        )
    if digest(plain) != name:
        raise DamagedError(
            f"{url} hashes to {digest(plain)[:12]}: it was changed after it was written"
        )
    return Manifest.of(plain, _index(root, plain["index"]))


def manifest_name(hash: str) -> str:
    """The file of the manifest with this sha256, in the folder of its data set."""
    return f"manifest-{hash[:12]}.json"


def _index_name(sha256: str) -> str:
    return f"index-{sha256[:12]}.npy"


def _cure(root: storage.Url) -> str:
    """How shards come to a place that has none; the digits only where that is its name."""
    if str(root).rstrip("/").rpartition("/")[2] == "digits":
        return (
            f"write them with `python -m tools.shards make digits --out {shlex.quote(str(root))}`"
        )
    return "write them with `python -m tools.shards make`, whose --help lists what of; or name another folder"


def pointer(root: storage.Url) -> str:
    """Hex sha256 of the current manifest of a folder or s3:// prefix; raises as `load` does."""
    try:
        name = storage.read_bytes(storage.join(root, LATEST)).decode(errors="replace").strip()
    except FileNotFoundError:
        names = storage.list(root)
        if not names:
            state = "the folder is empty" if storage.exists(root) else "no such folder"
            raise UserError(f"no shards at {root} ({state}): {_cure(root)}") from None
        raise UserError(
            f"no shards at {root}: it holds {', '.join(names[:3])} but no {LATEST}, which is written "
            f"last; name another folder, or type the command again that was to write it"
        ) from None
    except PermissionError as error:
        raise UserError(f"shards at {root} cannot be read: {error.strerror}") from None
    except NotADirectoryError:
        raise UserError(f"{root} is a file: name the folder that holds {LATEST}") from None
    if not _SHA256.fullmatch(name):
        raise DamagedError(
            f"{storage.join(root, LATEST)} holds no sha256: {name[:80]!r}; with a good copy "
            f"`python -m tools.shards repair {shlex.quote(str(root))} --from COPY` writes it again"
        )
    return name


def _index(root: storage.Url, promised: Mapping[str, Any]) -> NDArray[np.void]:
    url = storage.join(root, _index_name(promised["sha256"]))
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        raise DamagedError(f"{url} is missing, but its manifest names it") from None
    if sha256_of(data) != promised["sha256"]:
        raise DamagedError(f"{url} does not have the sha256 that its manifest promises")
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def _check_names(plain: Mapping[str, Any]) -> None:
    """Names and hashes become paths, here and in caches and copies: others' manifests must not choose where."""
    for shard in plain["shards"]:
        name, sha256 = shard["name"], shard["sha256"]
        away = storage.is_absolute(name) and not plain.get("indexed", False)
        if away or ".." in name.split("/") or not _SHA256.fullmatch(sha256):
            raise DamagedError(
                f"the manifest names the shard {name!r} of sha256 {sha256!r}: no writer does"
            )
    if not _SHA256.fullmatch(plain["index"]["sha256"]):
        raise DamagedError(f"the manifest's index has the sha256 {plain['index']['sha256']!r}")


def _layout(name: str) -> Layout:
    for layout in get_args(Layout):
        if name == layout:
            return layout
    raise UserError(
        f"the manifest's layout={name!r} is none that this program reads ({', '.join(get_args(Layout))}): "
        "use the program it was written with"
    )


def sha256_of(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()
