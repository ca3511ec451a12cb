"""A part of a listing: the keys or classes that a file names, and so many inputs of each class."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.sources.listing import Listing, Store, file
from shards.sources.published_lists import LISTS

# as many as are named in a message
_SHOWN = 3
_RULE = re.compile(r"(class//)?(\d+)")


@dataclass(frozen=True, eq=False)
class Rows:
    """Some inputs of a store."""

    store: Store
    rows: NDArray[np.int64]

    def read(self, row: int) -> bytes:
        return self.store.read(int(self.rows[row]))


def choose(listing: Listing, only: str | None, per_class: str | None) -> Listing:
    """Returns the inputs that the file `only` names, and of these as many of each class as `per_class` says.

    Args:
        only: a text file of classes or of keys, one a line. Classes get the numbers of their lines. A key may be
            without its suffix, and without its folders where that names one input.
        per_class: `N` keeps the first N inputs of each class, `class//N` the first floor(c / N) of class c.

    Raises:
        UserError: a line that names nothing, or twice; a rule that is none, or no labels for it.
    """
    if only is not None:
        listing = _only(listing, only)
    return listing if per_class is None else _per_class(listing, per_class)


def notes(only: str | None, per_class: str | None) -> dict[str, Any]:
    """What a data set's manifest says of the choice; empty where nothing was chosen."""
    found: dict[str, Any] = {}
    if only is not None:
        text = Path(only).read_bytes()
        found["only"] = {"file": Path(only).name, "sha256": hashlib.sha256(text).hexdigest()}
    return found if per_class is None else {**found, "per_class": per_class}


def _only(listing: Listing, path: str) -> Listing:
    wanted = _lines(path)
    twice = [line for line, count in _counted(wanted).items() if count > 1]
    if twice:
        raise UserError(f"{path} names {_some(twice)} more than once: name each once")
    named = {name: number for number, name in enumerate(listing.class_names)}
    if wanted[0] in named and listing.labels is not None:
        absent = [line for line in wanted if line not in named]
        _refuse(absent, path, "class", listing)
        return _of_classes(listing, [named[line] for line in wanted])
    known = _by_key(listing)
    # of inputs in one folder, such as train2014/, that folder's name in a published list says nothing
    flat = not any(b"/" in key for key in listing.keys.tolist())
    found = [
        known.get(line, known.get(PurePosixPath(line).name) if flat else None) for line in wanted
    ]
    absent = [line for line, row in zip(wanted, found, strict=True) if row is None]
    _refuse(absent, path, "input", listing)
    rows = np.asarray(found, dtype=np.int64)
    if len(np.unique(rows)) < len(rows):
        same = [wanted[i] for i in range(len(rows)) if found.index(found[i]) < i]
        raise UserError(f"{path} names the input of {_some(same)} more than once: name each once")
    return _kept(listing, rows)


def _lines(path: str) -> list[str]:
    """The lines of a list that are not empty; one of a published list's name must be that."""
    place = file(path, "list")
    text = place.read_bytes()
    try:
        lines = [line.strip() for line in text.decode().splitlines()]
    except UnicodeDecodeError:
        raise UserError(
            f"{path} is no text in UTF-8: give a list, one key or class a line"
        ) from None
    wanted = [line for line in lines if line]
    if not wanted:
        raise UserError(f"{path} is empty: give a list, one key or class a line")
    published = LISTS.get(place.name)
    if published is not None:
        published.check(path, wanted, text)
    return wanted


def _counted(words: list[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for word in words:
        found[word] = found.get(word, 0) + 1
    return found


def _some(words: list[str]) -> str:
    more = f" and {len(words) - _SHOWN:,} more" if len(words) > _SHOWN else ""
    return ", ".join(map(repr, words[:_SHOWN])) + more


def _refuse(absent: list[str], path: str, what: str, listing: Listing) -> None:
    if not absent:
        return
    known = list(listing.class_names) if what == "class" else [*map(bytes.decode, listing.keys[:1])]
    such = f", such as {known[0]!r}" if known else ""
    raise UserError(
        f"{path} names {_some(absent)}, which is no {what} of {listing.name}: give what it has{such}"
    )


def _by_key(listing: Listing) -> dict[str, int | None]:
    """Key -> row; also keys without suffix, and names without folders, None where these are of several rows."""
    whole = {key.decode(): row for row, key in enumerate(listing.keys.tolist())}
    found: dict[str, int | None] = {}
    for key, row in whole.items():
        parts = PurePosixPath(key)
        for name in {str(parts.with_suffix("")) if parts.name else key, parts.name, parts.stem}:
            found[name] = None if name in found else row
    return {**found, **whole}


def _of_classes(listing: Listing, numbers: list[int]) -> Listing:
    assert listing.labels is not None
    renumbered = np.full(listing.classes, -1, dtype=np.int64)
    renumbered[numbers] = np.arange(len(numbers))
    labels = renumbered[listing.labels]
    kept = _kept(listing, np.flatnonzero(labels >= 0))
    return replace(
        kept,
        labels=labels[labels >= 0],
        class_names=tuple(listing.class_names[number] for number in numbers),
        classes=len(numbers),
    )


def _per_class(listing: Listing, rule: str) -> Listing:
    found = _RULE.fullmatch(rule)
    if found is None or int(found[2]) == 0:
        raise UserError(
            f"--per-class {rule}: give a number of inputs, such as 50, or class//20, which keeps floor(c / 20) of "
            "class c"
        )
    if listing.labels is None:
        raise UserError(f"--per-class {rule}: {listing.name} has no labels; leave it out")
    number, counts = int(found[2]), [0] * listing.classes
    rows = []
    for row, label in enumerate(listing.labels.tolist()):
        if label < 0 or counts[label] >= (label // number if found[1] else number):
            continue
        counts[label] += 1
        rows.append(row)
    if not rows:
        raise UserError(
            f"--per-class {rule} keeps nothing of {listing.name}'s {listing.classes} classes"
        )
    return _kept(listing, np.asarray(rows, dtype=np.int64))


def _kept(listing: Listing, rows: NDArray[np.int64]) -> Listing:
    """The listing of these rows, in this order."""
    at: Mapping[int, int] = {int(row): number for number, row in enumerate(rows.tolist())}
    return replace(
        listing,
        keys=listing.keys[rows],
        labels=None if listing.labels is None else listing.labels[rows],
        store=Rows(listing.store, rows),
        places=listing.places[rows],
        about=tuple(listing.about[row] for row in rows.tolist()) if listing.about else (),
        flaws={at[row]: why for row, why in listing.flaws.items() if row in at},
    )
