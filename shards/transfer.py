"""Copies data sets between folders and S3, and repairs damaged ones from an intact copy.

Every tar is read once, and its sha256 is verified before it is written. Its record is written after it, and the pointer
after everything else. So an interrupted copy continues where it stopped, and readers never see half a data set.
"""

from __future__ import annotations

import itertools
import json
import shlex
from dataclasses import dataclass

from shards import storage
from shards.errors import DamagedError, UserError
from shards.format import manifest as manifests
from shards.format.manifest import Manifest, Shard
from shards.parallel import Watch
from shards.verify import verify_shard
from shards.write.committing import other_data_set
from shards.write.scan import SKIPPED


@dataclass(frozen=True, kw_only=True)
class CopyReport:
    """What `copy` or `repair` did."""

    manifest: str
    written: tuple[str, ...]  # tars that were written
    kept: int  # tars that were there already
    bytes: int  # written


def copy(
    source: storage.Url, target: storage.Url, *, watch: Watch[Shard] = lambda shards, total: shards
) -> CopyReport:
    """Copies a data set to a folder or s3:// prefix; tars that an earlier copy finished stay.

    Raises:
        UserError: no data set at `source`, or another one at `target`.
        DamagedError: a tar of `source` is not what was written; what was copied before it stays.
    """
    manifest = manifests.load(source)
    _refuse_index(source, manifest)
    exists = storage.exists(storage.join(target, manifests.LATEST))
    if exists and not _is_copy_of(target, manifest):
        raise other_data_set(target, manifests.load(target))
    written = []
    for shard in watch(manifest.shards, len(manifest.shards)):
        name = manifest.record_name(shard)
        record = _sound_record(source, name, shard)
        if not _finished(target, name, shard, record):
            _write(target, name, shard, _bytes(source, shard), record)
            written.append(shard)
    _copy_skipped(source, target)
    manifests.save(target, manifest, new=not exists)
    return _report(manifest, written)


def repair(
    root: storage.Url, good: storage.Url, *, watch: Watch[Shard] = lambda shards, total: shards
) -> CopyReport:
    """Writes again, out of a good copy, every tar and sidecar of `root` that is not what was written.

    A damaged manifest, index or pointer is written again too. Where the pointer names no manifest that is there,
    the records of the tars say whose data set it is.

    Raises:
        UserError: `good` holds another data set.
        DamagedError: a tar that is needed is damaged in the good copy as well.
    """
    manifest = manifests.load(good)
    _refuse_index(good, manifest)
    if not _is_copy_of(root, manifest):
        raise UserError(
            f"{good} holds manifest {manifest.hash[:12]}, {root} names {manifests.pointer(root)[:12]}: "
            "name a copy of the same data set"
        )
    written = []
    firsts = itertools.accumulate((s.blocks for s in manifest.shards), initial=0)
    for shard, first in zip(watch(manifest.shards, len(manifest.shards)), firsts, strict=False):
        if verify_shard(root, manifest, shard, first).problems:
            name = manifest.record_name(shard)
            _write(root, name, shard, _bytes(good, shard), _sound_record(good, name, shard))
            written.append(shard)
    try:
        manifests.load(root)
    except DamagedError:
        manifests.save(root, manifest)
    return _report(manifest, written)


def _refuse_index(root: storage.Url, manifest: Manifest) -> None:
    """An index may name tars by full paths; a copy of it would name the same ones."""
    elsewhere = [s.name for s in manifest.shards if storage.is_absolute(s.name)]
    if elsewhere:
        raise UserError(
            f"{root} is an index of tars that lie elsewhere, such as {elsewhere[0]}: copy the tars, and index "
            "the copy with `python -m tools.shards index`"
        )


def _copy_skipped(source: storage.Url, target: storage.Url) -> None:
    """What the data set left out belongs to it, and what lay in the target before does not."""
    url = storage.join(target, SKIPPED)
    if storage.exists(storage.join(source, SKIPPED)):
        storage.publish(url, storage.read_bytes(storage.join(source, SKIPPED)), replace=True)
    elif storage.exists(url):
        storage.publish(url, b"", replace=True)


def _is_copy_of(root: storage.Url, manifest: Manifest) -> bool:
    """Whether `root` holds this data set or damaged parts of it: by its pointer, else by its tars' records."""
    name = _pointed_to(root)
    if name == manifest.hash:
        return True
    if name is not None and storage.exists(storage.join(root, manifests.manifest_name(name))):
        return False
    return any(
        _recorded_sha256(root, manifest.record_name(shard)) == shard.sha256
        for shard in manifest.shards
    )


def _pointed_to(root: storage.Url) -> str | None:
    """The manifest that the pointer names; None of a pointer that is damaged."""
    try:
        return manifests.pointer(root)
    except DamagedError:
        return None


def _recorded_sha256(root: storage.Url, name: str) -> str | None:
    """The sha256 of a tar by its record; None where there is no record that can be read."""
    try:
        found = json.loads(storage.read_bytes(storage.join(root, name)))
    except (FileNotFoundError, ValueError):
        return None
    return found.get("sha256") if isinstance(found, dict) else None


def _report(manifest: Manifest, written: list[Shard]) -> CopyReport:
    return CopyReport(
        manifest=manifest.hash,
        written=tuple(s.name for s in written),
        kept=len(manifest.shards) - len(written),
        bytes=sum(s.bytes for s in written),
    )


def _bytes(root: storage.Url, shard: Shard) -> bytes:
    url = storage.join(root, shard.name)
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        raise DamagedError(f"{url} is missing, but the manifest names it") from None
    if manifests.sha256_of(data) != shard.sha256:
        raise DamagedError(
            f"{url} does not have its sha256: it cannot be copied; run "
            f"`python -m tools.shards verify {shlex.quote(str(root))}`"
        )
    return data


def _sound_record(root: storage.Url, name: str, shard: Shard) -> bytes:
    """The tar's record of that name, which must be of this tar."""
    url = storage.join(root, name)
    try:
        text = storage.read_bytes(url)
        found = json.loads(text)
    except (FileNotFoundError, ValueError):
        raise DamagedError(
            f"{url} is missing or no JSON: the tar beside it cannot be copied"
        ) from None
    if not isinstance(found, dict) or found.get("sha256") != shard.sha256:
        raise DamagedError(f"{url} is of another tar than the manifest's")
    return text


def _finished(root: storage.Url, name: str, shard: Shard, record: bytes) -> bool:
    """Whether tar and sidecar are there; the sidecar is written last."""
    try:
        return (
            storage.read_bytes(storage.join(root, name)) == record
            and storage.size(storage.join(root, shard.name)) == shard.bytes
        )
    except FileNotFoundError:
        return False


def _write(root: storage.Url, name: str, shard: Shard, data: bytes, record: bytes) -> None:
    storage.publish(storage.join(root, shard.name), data, replace=True)
    storage.publish(storage.join(root, name), record, replace=True)
