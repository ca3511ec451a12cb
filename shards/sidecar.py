"""Annotation sidecars: what is known of each sample of a manifest, one row per ordinal, beside the shards.

    <folder>/rows.npy        (N, ...) memory-mapped; row i belongs to the sample with ordinal i
    <folder>/<more>.npy      further columns with N rows, such as confidence
    <folder>/<attached>      files that are no rows, such as the centroids of the groups
    <folder>/MANIFEST.json   files with sha256, the shards' manifest hash, kind, groups, provenance; written last

A sidecar holds one kind of annotation, with these rows:

    id         int32, a group in [0, groups)
    multi_hot  uint8 (groups,), 1 where the group is present
    box        int32 (4,): top, left, bottom, right in pixels of the stored image; bottom and right are excluded
    mask       uint8 or int32 (H, W), the group of each pixel of the stored image
    dense      float16 or float32 (P,), a feature; finite

Provenance says how it came about (feature net and sha256, layer, noise-time, seed, ...). `saw_labels` is its one
required key: whether any part of it, or of what it was made from, was trained with human labels.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from shards import storage
from shards.errors import DamagedError, UserError

Kind = Literal["id", "multi_hot", "box", "mask", "dense"]
ROWS = "rows.npy"
LOOKED_AT = 64 << 20  # bytes of rows that are checked at once


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """A published sidecar: its record, and its columns on request."""

    folder: Path
    manifest: str  # of the shards it annotates
    kind: Kind
    count: int
    shape: tuple[int, ...]  # of one row
    groups: int | None  # of id, multi_hot and mask
    provenance: Mapping[str, Any]
    sha256: str  # of rows.npy
    # what it took, as far as it was written down: seconds of all ranks together, ranks, device
    cost: Mapping[str, Any] | None = None
    more: tuple[str, ...] = field(default=())  # names of further columns
    attached: tuple[str, ...] = field(default=())  # names of files

    @property
    def saw_labels(self) -> bool:
        return bool(self.provenance["saw_labels"])

    def rows(self) -> NDArray[np.generic]:
        """(N, ...) memory-mapped, read-only."""
        return self.column("rows")

    def column(self, name: str) -> NDArray[np.generic]:
        """A column by name, memory-mapped; `rows` is the annotation itself."""
        if name != "rows" and name not in self.more:
            raise UserError(
                f"{self.folder} has no column {name!r}; it has {', '.join(('rows', *self.more))}"
            )
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def file(self, name: str) -> Path:
        """An attached file by name."""
        if name not in self.attached:
            names = ", ".join(self.attached) or "none"
            raise UserError(f"{self.folder} has no file {name!r} attached; it has {names}")
        return self.folder / name


def write(
    folder: str | os.PathLike[str],
    rows: NDArray[np.generic],
    *,
    manifest: str,
    kind: Kind,
    groups: int | None = None,
    provenance: Mapping[str, Any],
    attached: Sequence[str] = (),
    cost: Mapping[str, Any] | None = None,
    **more: NDArray[np.generic],
) -> Sidecar:
    """Publishes a sidecar: its columns, then its record.

    Columns that are mapped from their place in the folder stay there; `attached` are names of files that lie in it.
    `cost`, what it took, is written down beside the provenance and is no part of what the annotation is.

    Raises:
        UserError: the folder holds a sidecar or other files, or rows are not what `kind` says.
    """
    if "saw_labels" not in provenance:
        raise ValueError("provenance needs saw_labels")
    target = Path(folder)
    columns = {"rows": rows, **more}
    refuse_taken(target, {*attached, *(f"{name}.npy" for name in columns)})
    _check(target, rows, kind, groups)
    target.mkdir(parents=True, exist_ok=True)
    for name, column in columns.items():
        if len(column) != len(rows):
            raise ValueError(f"column {name} has {len(column)} rows of {len(rows)}")
        if not _is_mapped_from(column, target / f"{name}.npy"):
            np.save(target / f"{name}.npy", column)
    extra = {
        "annotates": manifest,
        "kind": kind,
        "count": len(rows),
        "shape": list(rows.shape[1:]),
        "groups": groups,
        "provenance": dict(provenance),
        "more": sorted(more),
        "attached": sorted(attached),
        **({} if cost is None else {"cost": dict(cost)}),
    }
    storage.publish_folder(target, extra=extra)
    return read(target)


def read(folder: str | os.PathLike[str], *, manifest: str | None = None) -> Sidecar:
    """The sidecar in `folder`; with `manifest`, only if it annotates those shards.

    Raises:
        UserError: no sidecar there, or one of other shards.
        DamagedError: its files are not those that were published.
    """
    target = Path(folder)
    if not (target / storage.MANIFEST).is_file():
        raise UserError(
            f"{target} holds no annotation; make one with `python -m tools.annotate --help`"
        )
    found = storage.read_complete(target, verify="sizes")
    if found is None:
        raise DamagedError(f"{target} was damaged since it was published; annotate again")
    if "annotates" not in found:
        raise UserError(f"{target} holds something else than an annotation; name another folder")
    if manifest is not None and found["annotates"] != manifest:
        raise UserError(
            f"{target} annotates shards {found['annotates'][:12]}, and these are {manifest[:12]}: its rows belong to "
            "other samples; annotate these shards, or match keys: `python -m tools.annotate adopt --help`"
        )
    return Sidecar(
        folder=target,
        manifest=found["annotates"],
        kind=found["kind"],
        count=found["count"],
        shape=tuple(found["shape"]),
        groups=found["groups"],
        provenance=found["provenance"],
        sha256=next(f["sha256"] for f in found["files"] if f["name"] == ROWS),
        cost=found.get("cost"),
        more=tuple(found["more"]),
        attached=tuple(found["attached"]),
    )


def refuse_taken(folder: Path, own: set[str] | frozenset[str] = frozenset()) -> None:
    """Returns where a sidecar may be written into `folder`, which holds no visible files but its `own`.

    Raises:
        UserError: an annotation is there, or something that would be published with it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder")
    if (folder / storage.MANIFEST).exists():
        raise UserError(f"{folder} is taken already; name another folder, or remove it")
    for name in storage.list(folder):
        if not name.startswith(".") and name not in own:
            raise UserError(
                f"{folder} holds {name}, which is no part of this annotation; name another folder, or remove it"
            )


def _is_mapped_from(column: NDArray[np.generic], file: Path) -> bool:
    """Whether `column` is that file mapped: saving it over itself would empty it first."""
    mapped = getattr(column, "filename", None)
    if mapped is None or Path(mapped).resolve() != file.resolve():
        return False
    stored = np.load(file, mmap_mode="r")
    if stored.shape != column.shape or stored.dtype != column.dtype:
        raise ValueError(f"a part of {file} cannot be written over it")
    return True


def _check(folder: Path, rows: NDArray[np.generic], kind: Kind, groups: int | None) -> None:
    """Types and shapes by kind; groups within range, so that no reader needs to look again."""
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r}")
    if not len(rows):
        raise UserError(f"{folder}: no rows to annotate")
    dims = {"id": 1, "multi_hot": 2, "box": 2, "mask": 3, "dense": 2}[kind]
    types = {"id": "i", "multi_hot": "u", "box": "i", "mask": "iu", "dense": "f"}[kind]
    if rows.ndim != dims or rows.dtype.kind not in types or (kind == "box" and rows.shape[1] != 4):
        raise ValueError(f"{kind} rows cannot be {rows.dtype} {rows.shape}")
    if kind == "multi_hot" and rows.shape[1] != groups:
        raise ValueError(f"multi_hot rows of {rows.shape[1]} columns for {groups} groups")
    if kind == "dense" and rows.dtype.itemsize > 4:
        raise ValueError("dense rows are float16 or float32")
    at_once = max(1, LOOKED_AT // max(1, rows[:1].nbytes))
    for start in range(0, len(rows), at_once):
        _check_values(folder, rows[start : start + at_once], start, kind, groups)


def _check_values(
    folder: Path, rows: NDArray[np.generic], start: int, kind: Kind, groups: int | None
) -> None:
    """Rows from ordinal `start` on."""
    if kind in ("id", "mask"):
        low, high = int(rows.min()), int(rows.max())
        if groups is None or low < 0 or high >= groups:
            raise UserError(
                f"{folder}: groups run from {low} to {high}, which are not 0 to {groups} - 1"
            )
        return
    if kind == "dense":
        bad = ~np.isfinite(rows).all(axis=1)
    elif kind == "box":
        corner, end = rows[:, :2], rows[:, 2:]
        bad = np.less(corner, 0).any(axis=1) | np.less_equal(end, corner).any(axis=1)
    else:
        bad = np.greater(rows, 1).any(axis=1)
    if bad.any():
        law = {
            "dense": "is NaN or infinite",
            "box": "is no box: top, left, bottom, right with 0 <= top < bottom and 0 <= left < right",
            "multi_hot": "holds more than 0 and 1",
        }[kind]
        raise UserError(f"{folder}: the row of sample {start + int(bad.argmax())} {law}")
