"""Indexes existing tars of others in place: writes an index and a manifest, and changes no byte of the tars.

What was found in each tar is recorded as soon as it is done, so that an interrupted run continues with the next
tar; a tar that was replaced since is read again. Bad samples are not indexed, and so never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import mmap
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from shards import parallel, storage
from shards.errors import BadInputError, UserError
from shards.format import foreign_arrays as foreign
from shards.format import manifest as manifests
from shards.format.header import PIXELS, Header
from shards.format.manifest import Field, Manifest
from shards.format.members import Decode, members_of, split_name
from shards.format.moments import Moments
from shards.format.order import BLOCK
from shards.format.pictures import TRAITS
from shards.parallel import Watch
from shards.sources.listing import Passed, expand, of_split
from shards.sources.source import encode_keys
from shards.sources.tars import Chosen, look, numbered, own_keys
from shards.write.building import manifest_fields
from shards.write.committing import find_existing, other_data_set
from shards.write.plan import check_keys, sample_fields
from shards.write.scan import Kind, ScanCounts, Threshold, passed_entries, write_skipped

_FIRST = 16 << 20  # bytes of a tar in which its first sample is looked for
_LOOKS = 2  # raised where samples that were bad may hold from then on


@dataclass(frozen=True, kw_only=True)
class Tar:
    """A tar to index."""

    url: str
    name: str  # in the manifest: relative to its root, or absolute
    bytes: int
    stamp: str  # changes when the tar is replaced


def find(paths: Sequence[str], out: str | None = None) -> tuple[str, list[Tar]]:
    """Where the index goes, and the tars at `paths`: files, objects, and all below folders or s3:// prefixes.

    Without `out` that is the folder that holds all of them.

    Raises:
        UserError: there are none at one of the paths, or the tars lie in several folders and `out` is None.
    """
    urls = [url for path in paths for url in _urls(path)]
    if len({storage.is_remote(url) for url in urls}) > 1:
        raise UserError("some tars are on S3 and some are files: index them apart, or copy some")
    if len(set(urls)) < len(urls):
        twice = next(url for i, url in enumerate(urls) if url in urls[:i])
        raise UserError(f"{twice} is named twice: name each tar once")
    root = out or _common(paths, urls)
    base = root if storage.is_remote(root) else str(Path(root).resolve())
    tars = []
    for url in urls:
        size, etag = storage.stat(url)
        stamp = etag or str(Path(url).stat().st_mtime_ns)
        inside = url.startswith(f"{base.rstrip('/')}/")
        name = url.removeprefix(f"{base.rstrip('/')}/") if inside else url
        tars.append(Tar(url=url, name=name, bytes=size, stamp=stamp))
    return root, tars


def with_label(decode: Decode, tars: Sequence[Tar]) -> Decode:
    """The same with the label `cls`, where none was asked for and the first sample has such a member.

    It is a guess: `index` refuses where other samples have what the first has not.
    """
    if decode.label is not None or not tars:
        return decode
    head = io.BytesIO(storage.read_range(tars[0].url, 0, min(tars[0].bytes, _FIRST)))
    first = None
    with contextlib.suppress(tarfile.TarError), tarfile.open(fileobj=head, mode="r:") as tar:
        for member in tar:
            split = split_name(member.name)
            if not member.isfile() or split is None:
                continue
            first = first or split[0]
            if split[0] != first:
                break
            if split[1] == "cls":
                return replace(decode, label="cls")
    return decode


def index(
    root: storage.Url,
    tars: Sequence[Tar],
    decode: Decode,
    *,
    header: Header = PIXELS,
    max_skipped: Threshold = Threshold(),  # noqa: B008 - it is frozen
    unlabelled: bool = False,
    passed: Sequence[Passed] = (),
    workers: int = 1,
    watch: Watch[bool] = lambda tars, total: tars,
) -> tuple[Manifest, ScanCounts, bool]:
    """The manifest of the samples in `tars`, what was found, and whether the manifest is new; published at `root`.

    Args:
        header: what the numbers are where they are not pixels.
        unlabelled: labels are not wanted, whether or not samples have any.
        passed: what lies beside the tars and is none.

    Raises:
        UserError: labels of some samples only, several pictures a sample in changing order, a tar that is damaged or
            has samples in pieces, keys twice, several shapes, arrays that are not uint8 without a header, more bad
            samples than `max_skipped`, or another data set at `root`.
    """
    urls = [storage.join(root, manifests.record_name(tar.name)) for tar in tars]
    existing = find_existing(root)
    if existing is not None and not existing.indexed:
        raise other_data_set(root, existing)
    todo = [k for k, tar in enumerate(tars) if _record(urls[k], tar, decode) is None]
    work = partial(_index_tar, urls, tars, decode)
    for _ in watch(parallel.spread(work, todo, workers), len(todo)):
        pass
    records = [_record(url, tar, decode) for url, tar in zip(urls, tars, strict=True)]
    lost = [tar.url for tar, record in zip(tars, records, strict=True) if record is None]
    if lost:
        raise UserError(f"{lost[0]} changed while it was read: index it when it is whole")
    complete = [record for record in records if record is not None]
    chosen = Chosen()
    for record in complete:
        chosen.merge(Chosen(**record.get("chosen", {})))
    chosen.check(decode)
    if decode.label is None and chosen.labelled and not unlabelled:
        raise UserError(chosen.some_labelled())
    counts = _count_skipped(root, tars, complete, passed, max_skipped, existing)
    manifest = _merge(tars, complete, decode, counts, header)
    if existing is not None and existing.plan == manifest.plan:
        return existing, counts, False
    if existing is not None:
        raise UserError(
            f"{root} holds another index ({existing.count:,} samples, manifest {existing.hash[:12]}): give another "
            f"--out, or delete {storage.join(root, manifests.LATEST)} first"
        )
    manifests.save(root, manifest, new=True)
    return manifest, counts, True


def _urls(path: str) -> list[str]:
    if not storage.is_remote(path):
        return [str(Path(found).resolve()) for found in expand([path], ".tar")]
    if path.endswith(".tar"):
        if not storage.exists(path):
            raise UserError(f"{path} does not exist: name tars, or a prefix of them")
        return [path]
    found = [storage.join(path, n) for n in storage.files(path) if n.endswith(".tar")]
    found = of_split(found, path)
    if not found:
        raise UserError(f"{path} holds no .tar objects: name tars, or a prefix of them")
    return found


def _common(paths: Sequence[str], urls: Sequence[str]) -> str:
    """The folder that was named, or the one that holds all tars."""
    if len(paths) == 1 and not paths[0].endswith(".tar"):
        return paths[0]
    folders = {url.rpartition("/")[0] for url in urls}
    if len(folders) > 1:
        raise UserError(
            f"the tars lie in {len(folders)} folders, such as {min(folders)} and {max(folders)}: say where the "
            "index goes with --out, and they stay where they are"
        )
    return folders.pop()


def _record(url: str, tar: Tar, decode: Decode) -> dict[str, Any] | None:
    """What was found in a tar before; None where it is not known of this tar and this way to decode."""
    found = manifests.read_record(url)
    if found is None:
        return None
    same = (found["plan"], found["bytes"], found["stamp"]) == (_plan(decode), tar.bytes, tar.stamp)
    # what an earlier version could not read may be read by now
    return found if same and (not found["skipped"] or found.get("looks") == _LOOKS) else None


def _plan(decode: Decode) -> str:
    return manifests.digest({"decode": decode.plain(), "rule": decode.rule})


def _index_tar(urls: Sequence[str], tars: Sequence[Tar], decode: Decode, number: int) -> bool:
    tar = tars[number]
    with _bytes_of(tar) as (file, data):
        sha256 = hashlib.sha256(data).hexdigest()
        found = _read_samples(file, data, tar, decode)
    record = {
        "version": manifests.VERSION,
        "plan": _plan(decode),
        "looks": _LOOKS,
        "name": tar.name,
        "bytes": tar.bytes,
        "stamp": tar.stamp,
        "sha256": sha256,
        **found,
    }
    storage.publish(urls[number], manifests.seal(record), replace=True)
    return True


@contextlib.contextmanager
def _bytes_of(tar: Tar) -> Iterator[tuple[BinaryIO, memoryview]]:
    """A tar as a file and as memory: mapped where it is a file, fetched once where it is an object."""
    if storage.is_remote(tar.url) or not tar.bytes:
        fetched = storage.read_bytes(tar.url)
        yield io.BytesIO(fetched), memoryview(fetched)
        return
    with Path(tar.url).open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        view = memoryview(mapped)
        try:
            yield file, view  # a map would refuse to seek behind a cut, which is to be named
        finally:
            with contextlib.suppress(
                BufferError
            ):  # an error on its way may still hold a part of it
                view.release()
                mapped.close()


def _read_samples(file: BinaryIO, data: memoryview, tar: Tar, decode: Decode) -> dict[str, Any]:
    """Every sample of a tar: its place, its hash, what it decodes to, or why it does not."""
    stem = PurePosixPath(tar.name).stem
    rows, keys, labels, skipped, moments = [], [], [], [], []
    kinds: dict[Kind, int] = {}
    traits: dict[str, int] = {}
    chosen = Chosen()
    looked = look(file, tar.url)
    for sample in looked.samples.values():
        if not sample.contiguous:
            raise UserError(
                f"{tar.url}: other samples lie between the members of {sample.key!r}, so that it is no range of the "
                "tar: pack it again, each sample's members together, or write shards of it with `make tars`"
            )
        span = data[sample.start : sample.stop]
        chosen.see(sample, decode, tar.name)
        try:
            name, members = members_of(bytes(span))
            x, its_traits = decode.look(members)
            y = decode.label_value(members) if decode.label is not None else None
            key = decode.key_of(name, members, stem)
        except BadInputError as error:
            skipped.append({"key": sample.key, "tar": tar.name, "reason": str(error)})
            continue
        kind = kinds.setdefault((x.shape, x.dtype.str), len(kinds))
        rows.append(
            [sample.start, sample.stop - sample.start, xxhash.xxh3_128_hexdigest(span), kind]
        )
        keys.append(key)
        labels.append(y)
        moments.append(Moments.of(x[None]))
        for trait in its_traits:
            traits[trait] = traits.get(trait, 0) + 1
    # read in place, a sample is one range, and a link's bytes lie elsewhere
    links = [
        Passed(name, "a link, which cannot be read in place: write shards with `make tars`")
        for name, _ in looked.links.values()
    ]
    return {
        "count": len(rows),
        "rows": rows,
        "keys": keys,
        "labels": labels if decode.label is not None else None,
        "kinds": [*kinds],
        "skipped": skipped,
        "moments": reduce(Moments.merge, moments).plain() if moments else None,
        "traits": traits,
        "chosen": asdict(chosen),
        "passed": [[f"{tar.name}: {p.name}", p.reason] for p in [*looked.passed, *links]],
    }


def _count_skipped(
    root: storage.Url,
    tars: Sequence[Tar],
    records: Sequence[dict[str, Any]],
    beside: Sequence[Passed],
    max_skipped: Threshold,
    existing: Manifest | None,
) -> ScanCounts:
    skipped = [entry for record in records for entry in record["skipped"]]
    kept = sum(record["count"] for record in records)
    allowed = max_skipped.of_inputs(kept + len(skipped))
    passed = [*beside, *(Passed(*p) for record in records for p in record.get("passed", ()))]
    where_listed = write_skipped(root, skipped + passed_entries(passed), existing)
    if len(skipped) > allowed:
        first = skipped[0]
        raise UserError(
            f"{len(skipped):,} of {kept + len(skipped):,} samples cannot be used, max_skipped allows "
            f"{allowed:,}: {first['key']!r} of {first['tar']}: {first['reason']}{where_listed}: leave them out with "
            f"--max-skipped {len(skipped)}"
        )
    if skipped and not kept:
        first = skipped[0]
        raise UserError(
            f"none of {len(skipped):,} samples can be used, such as {first['key']!r} of {first['tar']}: "
            f"{first['reason']}{where_listed}: mend them first"
        )
    if not kept:
        raise UserError(f"{tars[0].url} and the other tars hold no sample: name WebDataset tars")
    found = [record.get("traits", {}) for record in records]
    totals = {trait: sum(each.get(trait, 0) for each in found) for trait in TRAITS}
    return ScanCounts(
        listed=kept + len(skipped),
        kept=kept,
        skipped=len(skipped),
        duplicates=0,
        passed_over=len(passed),
        changed={trait: count for trait, count in totals.items() if count},
    )


def _merge(
    tars: Sequence[Tar],
    records: Sequence[dict[str, Any]],
    decode: Decode,
    counts: ScanCounts,
    header: Header,
) -> Manifest:
    keys = encode_keys([key for record in records for key in record["keys"]])
    _check_keys(keys, [tar.url for tar in tars])
    shape, dtype = _one_kind(tars, records, decode)
    if header == PIXELS and dtype != "|u1":
        raise UserError(f"samples are {dtype}, and pixels are uint8: of latents say --encoder NAME")
    header.model_shape(shape)
    hashes = [[tar.name, record["sha256"]] for tar, record in zip(tars, records, strict=True)]
    values = [y for r in records for y in r["labels"]] if decode.label is not None else []
    labels, names = numbered(values, decode.label)
    decode = replace(decode, names=tuple(names))
    if not {"transparent", "rotated", "of 16 bits"}.intersection(counts.changed):
        # then any rule gives the same, and readers need not look for what is not there
        decode = replace(decode, picture=replace(decode.picture, background=None))
    x = Field(name="x", dtype=dtype, shape=shape, kind=header.kind)
    fields = sample_fields(x, keys.dtype, labelled=labels is not None)
    blocks = _table(records)
    foreign_header = {} if header == PIXELS else {"header": header.plain()}
    plain = {
        **manifest_fields(records, fields, blocks),
        "layout": "samples",
        "indexed": True,
        **({"class_names": names} if names else {}),
        "decode": decode.plain(),
        "plan": manifests.digest({"plan": _plan(decode), "tars": hashes} | foreign_header),
        "count": counts.kept,
        "block": BLOCK,
        "header": header.plain(),
        "label_histogram": None if labels is None else np.bincount(labels).tolist(),
        "source": {
            "name": PurePosixPath(tars[0].url).parent.name,
            "fingerprint": manifests.digest({"sha256": [sha for _, sha in hashes]}),
            "count": counts.kept,
            **counts.deciding(),
            "rule": decode.rule,
            **counts.beside(),
        },
        "seed": 0,  # nothing was shuffled
        "order": "source",
    }
    return Manifest.of(plain, blocks)


def _check_keys(keys: NDArray[np.bytes_], tars: Sequence[str]) -> None:
    try:
        check_keys(keys)
    except UserError as error:
        raise UserError(f"{error}; {own_keys(tars)}") from None


def _one_kind(tars: Sequence[Tar], records: Sequence[dict[str, Any]], decode: Decode) -> Kind:
    """Shape and dtype that all samples have; else an error that names two of them."""
    first: dict[Kind, str] = {}
    for tar, record in zip(tars, records, strict=True):
        for (_, _, _, number), key in zip(record["rows"], record["keys"], strict=True):
            shape, dtype = record["kinds"][number]
            first.setdefault((tuple(shape), dtype), f"{key!r} of {tar.name}")
    if len(first) > 1:
        two = " and ".join(f"{shape} ({where})" for (shape, _), where in [*first.items()][:2])
        cure = "" if foreign.kind_of(decode.image) else " with --size"
        raise UserError(f"samples of {len(first)} shapes, such as {two}: bring them to one{cure}")
    return next(iter(first))


def _table(records: Sequence[dict[str, Any]]) -> NDArray[np.void]:
    counts = [len(record["rows"]) for record in records]
    table = np.empty(sum(counts), dtype=manifests.index_dtype(1))
    table["shard"], table["rows"] = np.repeat(np.arange(len(records)), counts), 1
    for part, record in zip(np.split(table, np.cumsum(counts)[:-1]), records, strict=True):
        part["offset"][:, 0] = [start for start, _, _, _ in record["rows"]]
        part["bytes"][:, 0] = [size for _, size, _, _ in record["rows"]]
        part["xxh3"][:, 0] = manifests.hashes(xxh3 for _, _, xxh3, _ in record["rows"])
    return table
