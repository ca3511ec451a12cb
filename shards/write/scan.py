"""Reads and decodes every input once before the first shard is written: its hash, its shape, or why it is left out.

Leaving out an input changes the number of samples, and so the position of every sample. Therefore all inputs are
read first, in parts of 1,024; each part is recorded below <root>/source/ as soon as it is done, so that
a second run or another rank continues from there. The remaining samples are then a source like any other.
Their fingerprint covers keys, labels and content, not paths.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards import parallel, storage
from shards.errors import BadInputError, UserError
from shards.format import manifest as manifests
from shards.format.manifest import Manifest
from shards.format.members import printable
from shards.format.order import share
from shards.format.pictures import TRAITS, Picture
from shards.parallel import Watch
from shards.sources.listing import Listing, Passed
from shards.write.committing import find_existing, other_data_set
from shards.write.kept import Kept, PartFile
from shards.write.plan import check_keys, check_labels
from shards.write.scanned import Pictures, Scanned

PART = 1024
SKIPPED = "skipped.jsonl"

_BAD = -1  # the kind of an input that is none
_UNREAD = "0" * 64  # in place of a sha256

Kind = tuple[tuple[int, ...], str]  # shape and dtype of a sample


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """How many inputs may be left out because they are bad: a count, or a share of all."""

    count: int = 0
    share: float = 0.0

    @staticmethod
    def of(text: str) -> Threshold:
        """`3` is a count, `0.1%` a share.

        Raises:
            UserError: neither.
        """
        try:
            made = (
                Threshold(share=float(text[:-1]) / 100)
                if text.endswith("%")
                else Threshold(count=int(text))
            )
        except ValueError:
            made = Threshold(count=-1)
        if made.count < 0 or not 0 <= made.share <= 1:
            raise UserError(
                f"max_skipped={text!r}: give a count such as 3, or a share such as 0.1%"
            )
        return made

    def of_inputs(self, inputs: int) -> int:
        return max(self.count, int(self.share * inputs))


@dataclass(frozen=True, kw_only=True)
class ScanCounts:
    """What the first look found."""

    listed: int
    kept: int
    skipped: int  # bad inputs
    duplicates: int  # of the same bytes as an earlier input; left out where that was asked for
    passed_over: int = 0  # found among the inputs, and no inputs
    # how many samples were changed beside their size, by `shards.format.pictures.TRAITS`
    changed: Mapping[str, int] = field(default_factory=dict)

    def deciding(self) -> dict[str, int]:
        """The counts that a data set's identity has."""
        return {n: getattr(self, n) for n in ("listed", "kept", "skipped", "duplicates")}

    def beside(self) -> dict[str, Any]:
        """What else a manifest holds of its inputs: nothing where nothing else was found."""
        found = {"passed_over": self.passed_over, "changed": dict(self.changed)}
        return {name: value for name, value in found.items() if value}


def scan(
    root: storage.Url,
    listing: Listing,
    *,
    dedupe: bool = False,
    max_skipped: Threshold = Threshold(),
    kept: Kept | None = None,
    workers: int = 1,
    rank: int = 0,
    world: int = 1,
    watch: Watch[bool] = lambda parts, total: parts,
) -> tuple[Scanned, ScanCounts]:
    """The samples of `listing` that hold, and how many do; what is left out goes to <root>/skipped.jsonl.

    With `dedupe` an input of the same bytes as an earlier one is left out too. With `kept`, of as many inputs in parts
    of `PART`, pictures are kept there as they are decoded, and the samples are read from there.

    Raises:
        UserError: nothing listed, keys twice, labels out of range, more bad inputs than `max_skipped`,
            samples of several shapes, or another data set at `root`.
    """
    share([], rank, world)
    if not len(listing.keys):
        write_skipped(root, passed_entries(listing.passed), find_existing(root))
        found = f" but {len(listing.passed):,} things passed over" if listing.passed else ""
        raise UserError(
            f"source {listing.name!r} is empty{found}: name one that holds samples"
            + "".join(f"; and {refusal}" for refusal in listing.refusals)
        )
    check_keys(listing.keys)
    good = np.setdiff1d(np.arange(len(listing.keys)), [*listing.flaws])
    labels = None if listing.labels is None else listing.labels[good]
    check_labels(listing.keys[good], labels, listing.classes)
    existing = find_existing(root)  # refused before a long look, and not after
    if existing is not None and (
        (existing.source["name"], existing.source.get("rule"))
        != (listing.name, listing.decode.rule)
    ):
        raise other_data_set(root, existing)
    urls = _urls(root, listing)
    todo = [p for p, url in enumerate(urls) if not storage.exists(url)]
    if kept is not None:
        kept.begin()
    work = partial(_inspect_part, urls, listing, kept)
    for _ in watch(parallel.spread(work, share(todo, rank, world), workers), len(todo)):
        pass
    source, counts = _select(root, listing, _load(urls, listing), dedupe, max_skipped, existing)
    return replace(source, kept=kept), counts


def _urls(root: storage.Url, listing: Listing) -> list[str]:
    """Where each part is kept; another listing, or another way to decode, has other names."""
    places = [listing.keys, listing.places]
    content = hashlib.sha256(
        b"".join(a.tobytes() + a.dtype.str.encode() for a in places)
    ).hexdigest()
    decided: dict[str, Any] = {"name": listing.name, "rule": _look_rule(listing), "listed": content}
    if listing.flaws:
        decided["flaws"] = sorted(listing.flaws)
    name = manifests.digest(decided)[:12]
    parts = -(-len(listing.keys) // PART)
    return [
        storage.join(root, "source", f"{name}-{p:05d}-of-{parts:05d}.json") for p in range(parts)
    ]


def _look_rule(listing: Listing) -> str:
    """How inputs are looked at. Parts from before all `TRAITS` were recorded have other names, and are made anew."""
    decode = listing.decode
    if not isinstance(decode, Picture):
        return decode.rule
    return f"{decode.rule}; {len(TRAITS)} traits; {decode.background}"


def _inspect_part(urls: list[str], listing: Listing, kept: Kept | None, part: int) -> bool:
    if storage.exists(urls[part]):
        return False
    with kept.writing(part) if kept is not None else contextlib.nullcontext() as file:
        record = _part_record(listing, part, file)
    storage.publish(urls[part], manifests.seal(record), replace=True)
    return True


def _part_record(listing: Listing, part: int, file: PartFile | None = None) -> dict[str, Any]:
    """What is recorded of a part's inputs; samples go to `file`."""
    rows = range(part * PART, min((part + 1) * PART, len(listing.keys)))
    looks = []
    for row in rows:
        look, x, own = _inspect(listing, row)
        looks.append(look)
        if file is not None and isinstance(listing.decode, Picture) and x is not None:
            file.put(row % PART, x, own)
    kinds = sorted({look.kind for look in looks if look.kind is not None})
    return {
        "sha256": "".join(look.sha256 for look in looks),
        "kinds": kinds,
        "kind": [_BAD if look.kind is None else kinds.index(look.kind) for look in looks],
        "reasons": {
            str(row): look.reason for row, look in zip(rows, looks, strict=True) if look.reason
        },
        "traits": {
            trait: [row for row, look in zip(rows, looks, strict=True) if trait in look.traits]
            for trait in sorted({trait for look in looks for trait in look.traits})
        },
    }


class _Look(NamedTuple):
    """What was found of an input."""

    sha256: str  # hex; zeros where nothing could be read
    kind: Kind | None
    reason: str  # why it has none
    traits: tuple[str, ...] = ()


def _inspect(listing: Listing, row: int) -> tuple[_Look, NDArray[np.generic] | None, str]:
    """What was found of an input; its sample if it is one, and the extension if its own bytes are to be stored."""
    if row in listing.flaws:
        # reasons that a listing knows are not kept here: another listing of the same files may know better
        return _Look(_UNREAD, None, ""), None, ""
    sha256, own = _UNREAD, ""
    traits: tuple[str, ...] = ()
    decode = listing.decode
    try:
        data = listing.store.read(row)
        sha256 = hashlib.sha256(data).hexdigest()
        x: NDArray[np.generic]
        if isinstance(decode, Picture):
            look = decode.look(data)
            x, traits, own = look.pixels, look.traits, decode.own_extension(look)
        else:
            x = decode(data)
    except BadInputError as error:
        return _Look(sha256, None, str(error)), None, ""
    return _Look(sha256, (x.shape, x.dtype.str), "", traits), x, own


@dataclass(frozen=True, kw_only=True, eq=False)
class _Inspected:
    """What was found of all inputs; small arrays, for there may be many."""

    hashes: NDArray[np.uint8]  # (N, 32)
    kind: NDArray[np.int64]  # (N,) number in `kinds`, or _BAD
    kinds: list[Kind]
    reasons: dict[int, str]  # of the bad ones
    traits: dict[str, list[int]]  # rows that have each


def _load(urls: list[str], listing: Listing) -> _Inspected:
    hashes, kind = [], []
    reasons: dict[int, str] = {}
    kinds: dict[Kind, int] = {}
    traits: dict[str, list[int]] = {}
    for part, url in enumerate(urls):
        record = manifests.read_record(url)
        # it was damaged since
        if record is None:
            record = _part_record(listing, part)
            storage.publish(url, manifests.seal(record), replace=True)
        hashes.append(
            np.frombuffer(bytes.fromhex(record["sha256"]), dtype=np.uint8).reshape(-1, 32)
        )
        numbers = [kinds.setdefault((tuple(k[0]), k[1]), len(kinds)) for k in record["kinds"]]
        kind.append(np.array([*numbers, _BAD])[record["kind"]])  # _BAD is -1: the last
        reasons |= {int(row): reason for row, reason in record["reasons"].items()}
        for trait, rows in record.get("traits", {}).items():
            traits.setdefault(trait, []).extend(rows)
    every = np.concatenate(kind)
    every[[*listing.flaws]] = _BAD
    return _Inspected(
        hashes=np.concatenate(hashes),
        kind=every,
        kinds=[*kinds],
        reasons=reasons | dict(listing.flaws),
        traits=traits,
    )


def write_skipped(
    root: storage.Url, entries: list[dict[str, str]], existing: Manifest | None
) -> str:
    """Writes what is left out to <root>/skipped.jsonl, and says so for an error; not over a data set's own."""
    if existing is not None:
        return ""
    url = storage.join(root, SKIPPED)
    if entries or storage.exists(url):  # an earlier call may have named what is mended since
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        storage.publish(url, lines.encode(), replace=True)
    return f"; all are in {url}"


def _select(
    root: storage.Url,
    listing: Listing,
    inspected: _Inspected,
    dedupe: bool,
    max_skipped: Threshold,
    existing: Manifest | None,
) -> tuple[Scanned, ScanCounts]:
    good = np.flatnonzero(inspected.kind != _BAD)
    content = np.ascontiguousarray(inspected.hashes[good]).view("S32").ravel()
    _, first, which = np.unique(content, return_index=True, return_inverse=True)
    originals = good[first[which]] if len(good) else good  # the earliest input of the same bytes
    unique = originals == good
    rows = good[unique] if dedupe else good
    reasons = dict(inspected.reasons)
    if dedupe:
        pairs = zip(good[~unique].tolist(), originals[~unique].tolist(), strict=True)
        reasons |= {row: _duplicate(listing, row, original) for row, original in pairs}
    counts = ScanCounts(
        listed=len(inspected.kind),
        kept=len(rows),
        skipped=len(inspected.reasons),
        duplicates=int((~unique).sum()),
        passed_over=len(listing.passed),
        changed=_changed(inspected, rows),
    )
    where_listed = write_skipped(root, _entries(listing, inspected, reasons), existing)
    _check_skipped(listing, inspected, counts, max_skipped, where_listed)
    shape, dtype = _one_kind(listing, inspected, rows)
    hashes, kind = inspected.hashes[rows], np.dtype(dtype)
    fields: dict[str, Any] = {"listing": listing, "rows": rows, "hashes": hashes}
    fields |= {"shape": shape, "dtype": kind}
    if isinstance(listing.decode, Picture):
        return Pictures(**fields, picture=listing.decode), counts
    return Scanned(**fields), counts


def _changed(inspected: _Inspected, rows: NDArray[np.int64]) -> dict[str, int]:
    """How many of these rows have each trait, in the order of `TRAITS`."""
    counts = {trait: int(np.isin(inspected.traits.get(trait, []), rows).sum()) for trait in TRAITS}
    return {trait: count for trait, count in counts.items() if count}


def _duplicate(listing: Listing, row: int, original: int) -> str:
    reason = f"duplicate of {listing.keys[original].decode()}"
    if listing.labels is not None and listing.labels[original] != listing.labels[row]:
        reason += f", label {listing.labels[row]} instead of {listing.labels[original]}"
    return reason


def _entries(
    listing: Listing, inspected: _Inspected, reasons: dict[int, str]
) -> list[dict[str, str]]:
    entries = []
    for row, reason in sorted(reasons.items()):
        sha256 = inspected.hashes[row].tobytes().hex()
        entry = {"key": listing.keys[row].decode(), "reason": reason}
        entries.append(entry if sha256 == _UNREAD else {**entry, "sha256": sha256})
    return entries + passed_entries(listing.passed)


def passed_entries(passed: Iterable[Passed]) -> list[dict[str, str]]:
    """Lines of skipped.jsonl of what was found among the inputs and is none."""
    return [{"passed_over": printable(p.name), "reason": p.reason} for p in passed]


def _check_skipped(
    listing: Listing,
    inspected: _Inspected,
    counts: ScanCounts,
    max_skipped: Threshold,
    where_listed: str,
) -> None:
    allowed = max_skipped.of_inputs(counts.listed)
    wrong = [*listing.refusals]
    if counts.skipped > allowed:
        row, reason = min(inspected.reasons.items())
        wrong.append(
            f"{counts.skipped:,} of {counts.listed:,} inputs cannot be used, max_skipped allows {allowed:,}: "
            f"{listing.keys[row].decode()!r}: {reason}{where_listed}: mend them, or allow them with "
            f"--max-skipped {counts.skipped}"
        )
    if wrong:
        raise UserError("; and ".join(wrong))
    if not counts.kept:
        raise UserError(
            f"none of {counts.listed:,} inputs can be used{where_listed}: mend them first"
        )


def _one_kind(listing: Listing, inspected: _Inspected, rows: NDArray[np.int64]) -> Kind:
    numbers, first = np.unique(inspected.kind[rows], return_index=True)
    if len(numbers) > 1:
        two = " and ".join(
            f"{inspected.kinds[number][0]} {inspected.kinds[number][1]} ({listing.keys[rows[at]].decode()!r})"
            for number, at in zip(numbers[:2], first, strict=False)
        )
        raise UserError(
            f"samples of {len(numbers)} shapes, such as {two}: bring them to one with --size"
        )
    return inspected.kinds[int(numbers[0])]
