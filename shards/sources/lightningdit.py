"""Latents as LightningDiT's extraction leaves them (Yao et al. 2025): a folder of .safetensors files.

Each holds `latents` (n, C, H, W), `latents_flip` of the mirror images, and `labels` (n,). Files are mapped, so that
the rows that a block takes from anywhere cost what they hold. A row becomes both forms, (2, C, H, W), as our header's
flips have them. An extraction by several ranks repeats some images, so that each rank has as many; where latents were
sampled, such copies are not the same bytes, and stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.sources.listing import Listing, Raw, folder
from shards.sources.source import Lazy

FORMS = ("latents", "latents_flip")
_FLOATS = {
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
}  # of safetensors; NumPy has no BF16


@dataclass(frozen=True, kw_only=True, eq=False)
class Latents(Lazy):
    """Rows of several files one after the other; opened once a process."""

    files: tuple[str, ...]
    ends: NDArray[np.int64]  # of each file's rows among all
    dtype: str  # that they are brought to

    def read(self, row: int) -> bytes:
        file = int(np.searchsorted(self.ends, row, side="right"))
        at = row - (int(self.ends[file - 1]) if file else 0)
        if file not in self._opened:
            self._opened[file] = _open(Path(self.files[file]))
        forms = [self._opened[file].get_slice(name)[at : at + 1] for name in FORMS]
        with np.errstate(over="ignore"):  # what does not fit is infinite, and so found
            return np.concatenate(forms).astype(self.dtype).tobytes()

    @cached_property
    def _opened(self) -> dict[int, Any]:
        return {}


def lightningdit(path: str, *, classes: int | None = None, dtype: str | None = None) -> Listing:
    """The latents of all .safetensors files of a folder, by name; keys are `<file>:<row>`.

    Args:
        classes: number of classes; without it the greatest label + 1.
        dtype: float16 or float32 to store; without it the files' own.

    Raises:
        UserError: no such files, arrays that are missing or do not fit each other, or another type of numbers.
    """
    place = folder(path, "folder of latents")
    files = sorted(place.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{path} holds no .safetensors files: name the folder that was extracted to"
        )
    first, labels, ends = None, [], []
    for file in files:
        opened = _open(file)
        found, own = _rows(file, opened)
        if first is None:
            first = found
        elif found != first:
            raise UserError(
                f"{files[0].name} holds latents {_said(first)} and {file.name} {_said(found)}: they are not of one "
                "extraction"
            )
        labels.append(own)
        ends.append(len(own))
    assert first is not None
    shape, stored = first
    width = len(str(max(ends)))
    return Listing.of(
        place.resolve().name,
        [f"{f.stem}:{row:0{width}d}" for f, n in zip(files, ends, strict=True) for row in range(n)],
        Latents(
            files=tuple(map(str, files)), ends=np.cumsum(ends), dtype=np.dtype(dtype or stored).name
        ),
        decode=Raw(shape=(2, *shape), dtype=np.dtype(dtype or stored).str),
        places=np.repeat([file.stat().st_size for file in files], ends),
        labels=np.concatenate(labels),
        classes=classes,
    )


def _rows(file: Path, opened: Any) -> tuple[tuple[tuple[int, ...], str], NDArray[np.int64]]:
    """(shape and dtype of a row, labels) of one file, whose arrays fit each other."""
    names = set(opened.keys())
    missing = [name for name in (*FORMS, "labels") if name not in names]
    if missing:
        raise UserError(
            f"{file} lacks {', '.join(missing)}: it holds {', '.join(sorted(names))}, which is no extraction of "
            "LightningDiT's"
        )
    one, other = (opened.get_slice(name) for name in FORMS)
    labels = opened.get_tensor("labels")
    shapes: Mapping[str, list[int]] = {n: opened.get_slice(n).get_shape() for n in FORMS}
    if one.get_dtype() not in _FLOATS or other.get_dtype() != one.get_dtype():
        raise UserError(
            f"{file} holds latents {one.get_dtype()} and {other.get_dtype()}: extract them as one of "
            f"{', '.join(_FLOATS)}"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(
            f"{file} holds labels {labels.shape} {labels.dtype}: a whole number a sample is needed"
        )
    count, *shape = shapes["latents"]
    if len(shape) != 3 or not math.prod(shape) or shapes["latents_flip"] != shapes["latents"]:
        raise UserError(
            f"{file} holds latents {tuple(shapes['latents'])} and latents_flip {tuple(shapes['latents_flip'])}: "
            "both must be (n, C, H, W)"
        )
    if count != len(labels):
        raise UserError(
            f"{file} holds {count} latents and {len(labels)} labels: one each is needed"
        )
    return (tuple(shape), _FLOATS[one.get_dtype()]), labels.astype(np.int64)


def _open(file: Path) -> Any:
    """A mapped file.

    Raises:
        UserError: it is cut, or none of safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}): extract or copy it again") from None


def _said(rows: tuple[tuple[int, ...], str]) -> str:
    return f"{rows[0]} {rows[1]}"
