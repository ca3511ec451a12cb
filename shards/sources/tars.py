"""WebDataset tars of others, such as img2dataset's: members that share a name up to its first dot are a sample.

A tar reader stops quietly at a damaged header, as at the end, and so may lose the rest of a tar. Here the
end must be an end: two sectors of zeros behind the last member.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.layout import SECTOR
from shards.sources.listing import SUFFIXES, BadInputError, Decode, Listing, expand

Sample = dict[str, tuple[int, int]]  # offset and bytes of each member, by what follows the key


@dataclass(frozen=True, kw_only=True, eq=False)
class Members:
    """Inputs that are members of tars."""

    tars: tuple[str, ...]
    places: NDArray[np.int64]  # (N, 3): tar, offset, bytes; no bytes where the sample has no image

    def read(self, row: int) -> bytes:
        tar, offset, size = self.places[row].tolist()
        if size < 0:
            raise BadInputError("no image among its members")
        with Path(self.tars[tar]).open("rb") as file:
            file.seek(offset)
            return file.read(size)


def tars(
    paths: Sequence[str],
    decode: Decode,
    *,
    image: str | None = None,
    label: str | None = None,
    prefix: bool = False,
) -> Listing:
    """Samples of WebDataset tars, or of all in a folder, in the order of names and members.

    Args:
        image: the member's extension; without it the first that is an image's.
        label: an extension whose member is a whole number, such as `cls`, or `json:field`. Without it
            `cls` where the first sample has one.
        prefix: put the tar's name before keys, for tars that each begin at 0.

    Raises:
        UserError: no such tars, a tar that ends where it should not, or samples without the label.
    """
    files = expand(paths, ".tar")
    keys: list[str] = []
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    for number, path in enumerate(files):
        with Path(path).open("rb") as file:
            for key, sample in _samples(file, path):
                if label is None and not keys and "cls" in sample:
                    label = "cls"
                keys.append(f"{Path(path).stem}/{key}" if prefix else key)
                places.append((number, *_image(sample, image)))
                if label is not None:
                    labels.append(_label(file, sample, label, f"{path}: {key}"))
    if not prefix and len(set(keys)) < len(keys):
        raise UserError(
            f"{len(keys) - len(set(keys)):,} keys of {files[0]} and the other tars occur twice: "
            "--prefix-keys puts the tar's name before them"
        )
    table = np.array(places, dtype=np.int64).reshape(-1, 3)
    return Listing.of(
        Path(files[0]).parent.resolve().name,
        keys,
        Members(tars=tuple(files), places=table),
        decode=decode,
        places=table,
        labels=np.array(labels, dtype=np.int64) if label is not None else None,
    )


def _samples(file: BinaryIO, path: str) -> list[tuple[str, Sample]]:
    """(key, members) in their order. A key is the member's path up to the first dot of its last part."""
    found: dict[str, Sample] = {}
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // SECTOR) * SECTOR
                path_of = PurePosixPath(member.name)
                stem, _, extension = path_of.name.partition(".")
                if not member.isfile() or not stem or not extension:
                    continue
                sample = found.setdefault(str(path_of.parent / stem), {})
                if extension.lower() in sample:
                    raise UserError(f"{path}: {member.name} occurs twice: write the tar again")
                sample[extension.lower()] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise UserError(f"{path} is no whole tar ({error}): fetch or write it again") from None
    file.seek(end)
    if file.read(2 * SECTOR) != bytes(2 * SECTOR):
        raise UserError(
            f"{path} is damaged or cut short at byte {end:,}, behind {len(found):,} samples: fetch or "
            "write it again"
        )
    return list(found.items())


def _image(sample: Sample, asked: str | None) -> tuple[int, int]:
    if asked is not None:
        return sample.get(asked.lower().lstrip("."), (0, -1))
    return next((place for name, place in sample.items() if f".{name}" in SUFFIXES), (0, -1))


def _label(file: BinaryIO, sample: Sample, label: str, where: str) -> int:
    extension, _, field = label.partition(":")
    if extension not in sample:
        raise UserError(f"{where} has no member .{extension}, which should hold its label")
    offset, size = sample[extension]
    file.seek(offset)
    text = file.read(size)
    try:
        return int(json.loads(text)[field] if field else text)
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{where}.{extension} holds no whole number at {label!r}: {text[:60]!r}"
        ) from None
