"""One look at every input before the first shard: what it hashes to, what shape it has, or why it is left out.

What is left out changes how many samples there are, and so every sample's place. Therefore all inputs are
read and decoded first, in parts of 1,024, each kept below <root>/source/ as soon as it is done: a
second run, or another rank, goes on behind them. The samples that hold are then a source like any other.
Their fingerprint is of their keys, labels and content, not of where they lie.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from shards import parallel, storage, writer
from shards.errors import DamagedError, UserError
from shards.manifest import digest
from shards.sources.listing import BadInputError, Listing

PART = 1024
SKIPPED = "skipped.jsonl"

Watch = Callable[[Iterable[bool], int], Iterable[bool]]


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
class Seen:
    """What the first look found."""

    listed: int
    kept: int
    skipped: int  # bad inputs
    duplicates: int  # of the same bytes as an earlier input; left out where that was asked for


@dataclass(frozen=True, kw_only=True, eq=False)
class Scanned:
    """The samples of a listing that hold, as the writer takes them: a `Source`."""

    listing: Listing
    rows: NDArray[np.int64]  # of the listing
    hashes: NDArray[np.uint8]  # (N, 32) sha256 of the inputs
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def name(self) -> str:
        return self.listing.name

    @property
    def keys(self) -> NDArray[np.bytes_]:
        return self.listing.keys[self.rows]

    @property
    def labels(self) -> NDArray[np.int64] | None:
        return None if self.listing.labels is None else self.listing.labels[self.rows]

    @property
    def classes(self) -> int:
        return self.listing.classes

    @property
    def fingerprint(self) -> str:
        decided = hashlib.sha256(self.listing.decode.rule.encode())
        for key in self.keys.tolist():
            decided.update(len(key).to_bytes(4, "little") + key)
        decided.update(repr(self.classes).encode())
        if self.labels is not None:
            decided.update(self.labels.astype("<i8").tobytes())
        decided.update(self.hashes.tobytes())
        return decided.hexdigest()

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.generic]:
        """Samples (len(rows), *shape); read in the order in which they lie.

        Raises:
            DamagedError: an input is not what it was at the first look.
        """
        x = np.empty((len(rows), *self.shape), dtype=self.dtype)
        for place in np.argsort(self.rows[rows], kind="stable"):
            row = int(self.rows[rows[place]])
            try:
                data = self.listing.store.read(row)
                same = hashlib.sha256(data).digest() == self.hashes[rows[place]].tobytes()
                if same:
                    x[place] = self.listing.decode(data)
            except BadInputError:
                same = False
            if not same:
                raise DamagedError(
                    f"input {self.listing.keys[row].decode()!r} of {self.name!r} changed since it was first "
                    "read: write to a new folder"
                )
        return x


def scan(
    root: storage.Url,
    listing: Listing,
    *,
    dedupe: bool = False,
    max_skipped: Threshold = Threshold(),
    workers: int = 1,
    rank: int = 0,
    world: int = 1,
    watch: Watch = lambda parts, total: parts,
) -> tuple[Scanned, Seen]:
    """The samples of `listing` that hold, and how many do; what is left out goes to <root>/skipped.jsonl.

    With `dedupe` an input of the same bytes as an earlier one is left out too.

    Raises:
        UserError: nothing listed, keys twice, labels out of range, more bad inputs than `max_skipped`,
            samples of several shapes, or another data set at `root`.
    """
    parallel.share([], rank, world)
    if not len(listing.keys):
        raise UserError(f"source {listing.name!r} is empty: there is nothing to write")
    writer.check_keys(listing.keys)
    writer.check_labels(listing.keys, listing.labels, listing.classes)
    lies = writer.held(root)  # to be told so before a long look, and not after
    if lies is not None and (
        (lies.source["name"], lies.source.get("rule")) != (listing.name, listing.decode.rule)
    ):
        raise writer.another(root, lies)
    urls = _urls(root, listing)
    todo = [p for p, url in enumerate(urls) if not storage.exists(url)]
    work = partial(_look_at_part, urls, listing)
    for _ in watch(parallel.spread(work, parallel.share(todo, rank, world), workers), len(todo)):
        pass
    looked = [look for url in urls for look in json.loads(storage.read_bytes(url))]
    return _judge(root, listing, looked, dedupe, max_skipped)


def _urls(root: storage.Url, listing: Listing) -> list[str]:
    """Where each part is kept; another listing, or another way to decode, has other names."""
    places = [listing.keys, listing.places]
    content = hashlib.sha256(
        b"".join(a.tobytes() + a.dtype.str.encode() for a in places)
    ).hexdigest()
    name = digest({"name": listing.name, "rule": listing.decode.rule, "listed": content})[:12]
    parts = -(-len(listing.keys) // PART)
    return [
        storage.join(root, "source", f"{name}-{p:05d}-of-{parts:05d}.json") for p in range(parts)
    ]


def _look_at_part(urls: list[str], listing: Listing, part: int) -> bool:
    if storage.exists(urls[part]):
        return False
    rows = range(part * PART, min((part + 1) * PART, len(listing.keys)))
    looked = [_look(listing, row) for row in rows]
    storage.publish(urls[part], json.dumps(looked).encode(), replace=True)
    return True


def _look(listing: Listing, row: int) -> list[object]:
    """[sha256 or None, shape or None, dtype or None, reason or None] of one input."""
    sha256 = None
    try:
        data = listing.store.read(row)
        sha256 = hashlib.sha256(data).hexdigest()
        x = listing.decode(data)
    except BadInputError as error:
        return [sha256, None, None, str(error)]
    return [sha256, [*x.shape], x.dtype.str, None]


def _judge(
    root: storage.Url,
    listing: Listing,
    looked: list[list],
    dedupe: bool,
    max_skipped: Threshold,
) -> tuple[Scanned, Seen]:
    first: dict[str, int] = {}
    left_out, rows, duplicates = [], [], 0
    for row, (sha256, _, _, reason) in enumerate(looked):
        key = listing.keys[row].decode()
        if reason is not None:
            left_out.append({"key": key, "reason": reason, "sha256": sha256})
            continue
        twin = first.setdefault(sha256, row)
        duplicates += twin != row
        if twin == row or not dedupe:
            rows.append(row)
            continue
        reason = f"duplicate of {listing.keys[twin].decode()}"
        if listing.labels is not None and listing.labels[twin] != listing.labels[row]:
            reason += f", label {listing.labels[row]} instead of {listing.labels[twin]}"
        left_out.append({"key": key, "reason": reason, "sha256": sha256})
    seen = Seen(
        listed=len(looked),
        kept=len(rows),
        skipped=sum(look[3] is not None for look in looked),
        duplicates=duplicates,
    )
    if left_out:
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in left_out)
        storage.publish(storage.join(root, SKIPPED), text.encode(), replace=True)
    _check_skipped(root, seen, left_out, max_skipped)
    shape, dtype = _one_shape(listing, looked, rows)
    hashes = np.array([[*bytes.fromhex(looked[row][0])] for row in rows], dtype=np.uint8)
    found = Scanned(
        listing=listing, rows=np.array(rows), hashes=hashes, shape=shape, dtype=np.dtype(dtype)
    )
    return found, seen


def _check_skipped(
    root: storage.Url, seen: Seen, left_out: list[dict], max_skipped: Threshold
) -> None:
    allowed = max_skipped.of_inputs(seen.listed)
    if seen.skipped > allowed:
        bad = next(entry for entry in left_out if not entry["reason"].startswith("duplicate of "))
        raise UserError(
            f"{seen.skipped:,} of {seen.listed:,} inputs cannot be used, max_skipped allows {allowed:,}: "
            f"{bad['key']!r}: {bad['reason']}; all are in {storage.join(root, SKIPPED)}: mend them, or "
            f"allow them with --max-skipped {seen.skipped}"
        )
    if not seen.kept:
        raise UserError(f"none of {seen.listed:,} inputs can be used: there is nothing to write")


def _one_shape(
    listing: Listing, looked: list[list], rows: list[int]
) -> tuple[tuple[int, ...], str]:
    kinds: dict[tuple[tuple[int, ...], str], int] = {}
    for row in rows:
        kinds.setdefault((tuple(looked[row][1]), looked[row][2]), row)
    if len(kinds) > 1:
        two = list(kinds.items())[:2]
        said = " and ".join(f"{k[0]} {k[1]} ({listing.keys[row].decode()!r})" for k, row in two)
        raise UserError(
            f"samples of {len(kinds)} shapes, such as {said}: bring them to one with --size"
        )
    return next(iter(kinds))
