"""Verifies the checksums and the structure of a data set on disk or S3.

Everything is read once. A tar whose sha256 matches is intact; for any other tar, the hashes of its blocks show which
samples are damaged. The structure is walked with Python's tarfile rather than with our reader, and any difference from
the index is an error: tar readers stop silently at a damaged header.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash

from shards import storage
from shards.errors import BadInputError, DamagedError, UserError
from shards.format import manifest as manifests
from shards.format.manifest import Manifest, Shard
from shards.format.members import Decode, members_of
from shards.format.tar import SECTOR
from shards.parallel import Watch
from shards.sources.tars import walk


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `verify` read, and every problem as one line; well when there is none."""

    manifest: str
    shards: int
    samples: int
    bytes: int
    problems: tuple[str, ...]


def verify(root: storage.Url, *, watch: Watch[Shard] = lambda shards, total: shards) -> Report:
    """Reads all of a data set: sizes, sha256, blocks, tar structure, sidecars.

    Raises:
        UserError: there is no data set at `root`.
        DamagedError: its manifest or index is damaged, so that nothing else can be judged.
    """
    manifest = manifests.load(root)
    problems, total, first = [], 0, 0
    for shard in watch(manifest.shards, len(manifest.shards)):
        found = verify_shard(root, manifest, shard, first)
        total += found.bytes
        problems += found.problems
        first += shard.blocks
    return Report(
        manifest=manifest.hash,
        shards=len(manifest.shards),
        samples=manifest.count,
        bytes=total,
        problems=tuple(problems),
    )


class ShardCheck(NamedTuple):
    """Bytes that were read of a tar, and what is wrong with it or its sidecar."""

    bytes: int
    problems: list[str]


def verify_shard(root: storage.Url, manifest: Manifest, shard: Shard, first: int) -> ShardCheck:
    """Reads one tar and its record; `first` is its first row of the index."""
    try:
        data = storage.read_bytes(storage.join(root, shard.name))
        problems = [f"{shard.name}: {p}" for p in _shard(manifest, shard, first, data)]
    except FileNotFoundError:
        data, problems = b"", [f"{shard.name} is missing"]
    return ShardCheck(len(data), problems + _sidecar(root, manifest, shard, first))


def _shard(manifest: Manifest, shard: Shard, first: int, data: bytes) -> list[str]:
    samples = manifest.layout == "samples"
    rows, found = range(first, first + shard.blocks), []
    if len(data) != shard.bytes:
        found.append(f"{len(data):,} bytes, the manifest promises {shard.bytes:,}")
    if manifests.sha256_of(data) != shard.sha256:
        found.append("the sha256 is not the manifest's")
        found += (_spans if samples else _blocks)(manifest, rows, data)
    return found or (_members if samples else _structure)(manifest, rows, data)


def _blocks(manifest: Manifest, blocks: range, data: bytes) -> list[str]:
    view, found = memoryview(data), []
    for block in blocks:
        row = manifest.blocks[block]
        for column, f in enumerate(manifest.fields):
            start = int(row["offset"][column])
            payload = view[start : start + int(row["bytes"][column])]
            if xxhash.xxh3_128_digest(payload) != row["xxh3"][column].tobytes():
                at = f"ordinals {block * manifest.block:,} to {block * manifest.block + row['rows'] - 1:,}"
                found.append(f"{f.name} of block {block} is damaged ({at})")
    return found or ["all blocks hold: the damage is in headers or padding"]


def _spans(manifest: Manifest, rows: range, data: bytes) -> list[str]:
    view = memoryview(data)
    runs: list[range] = []  # of damaged samples side by side: a tar that is cut short loses many
    for ordinal in rows:
        row = manifest.blocks[ordinal]
        start = int(row["offset"][0])
        span = view[start : start + int(row["bytes"][0])]
        if xxhash.xxh3_128_digest(span) != row["xxh3"][0].tobytes():
            goes_on = runs and runs[-1].stop == ordinal
            run = range(runs.pop().start if goes_on else ordinal, ordinal + 1)
            runs.append(run)
    found = [_run(run, int(manifest.blocks["offset"][run.start, 0])) for run in runs]
    return found or ["all samples hold: the damage is beside them"]


def _run(ordinals: range, start: int) -> str:
    if len(ordinals) == 1:
        return f"sample {ordinals[0]:,}, at byte {start:,}, is damaged"
    run = f"{ordinals[0]:,} to {ordinals[-1]:,} ({len(ordinals):,})"
    return f"samples {run}, from byte {start:,} on, are damaged"


def _members(manifest: Manifest, rows: range, data: bytes) -> list[str]:
    """Each row of the index is a sample of the tar, whole and with all that its fields need."""
    try:
        walked = {sample.start: sample for sample in walk(io.BytesIO(data), "it")}
    except UserError as error:
        return [str(error)]
    decode, found = Decode.of(manifest.decode or {}), []
    if not manifest.indexed and len(walked) != len(rows):
        found.append(f"{len(walked)} samples, {len(rows)} expected")
    for ordinal in rows:
        start, size = (int(manifest.blocks[name][ordinal, 0]) for name in ("offset", "bytes"))
        sample = walked.get(start)
        if sample is None or not sample.contiguous or sample.stop != start + size:
            found.append(f"at byte {start:,} there is no sample {ordinal:,} as the index says")
            continue
        try:
            name, members = members_of(data[start : start + size])
            decode.image_of(members)
            decode.key_of(name, members, "")
            if decode.label is not None:
                decode.label_of(members)
        except BadInputError as error:
            found.append(f"sample {ordinal:,}, at byte {start:,}: {error}")
    return found


def _structure(manifest: Manifest, blocks: range, data: bytes) -> list[str]:
    """Members, their order, .npy headers and places, as the index and the fields promise them."""
    expected = [(block, column) for block in blocks for column in range(len(manifest.fields))]
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        members = tar.getmembers()
    if len(members) != len(expected):
        return [f"{len(members)} members, {len(expected)} expected"]
    found = []
    for member, (block, column) in zip(members, expected, strict=True):
        row, f = manifest.blocks[block], manifest.fields[column]
        content = io.BytesIO(data[member.offset_data : member.offset_data + member.size])
        array = np.lib.format.read_array(content, allow_pickle=False)
        start = member.offset_data + member.size - array.nbytes
        if member.name != f"{block:08d}.{f.name}.npy":
            found.append(f"member {member.name} stands where {f.name} of block {block} should")
        elif (array.dtype.str, array.shape) != (f.dtype, (row["rows"], *f.shape)):
            found.append(f"{member.name} is {array.dtype.str} {array.shape}, not as its field")
        elif (start, array.nbytes) != (row["offset"][column], row["bytes"][column]):
            found.append(f"{member.name} lies at {start:,}, not where the index says")
    if data[-2 * SECTOR :] != bytes(2 * SECTOR):
        found.append("it does not end in two zero sectors")
    return found


def _sidecar(root: storage.Url, manifest: Manifest, shard: Shard, first: int) -> list[str]:
    name = manifest.record_name(shard)
    try:
        data = storage.read_bytes(storage.join(root, name))
        found = json.loads(data)
    except FileNotFoundError:
        return [f"{name} is missing"]
    except ValueError:
        return [f"{name} is not JSON"]
    expected: dict[str, object] = {
        "name": shard.name,
        "bytes": shard.bytes,
        "sha256": shard.sha256,
        "count": shard.count,
    }
    if not manifest.indexed:  # a record of others' tars stands for itself
        expected |= {"plan": manifest.plan, "first": first * manifest.row_samples}
    record = found if isinstance(found, dict) else {}
    wrong = [n for n, value in expected.items() if record.get(n) != value]
    if wrong:
        return [f"{name} disagrees with the manifest: {', '.join(wrong)}"]
    return [] if manifests.SEAL not in record or _is_sealed(data) else [f"{name} is damaged"]


def _is_sealed(record: bytes) -> bool:
    try:
        manifests.unseal(record)
    except DamagedError:
        return False
    return True
