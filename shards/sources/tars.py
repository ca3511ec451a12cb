"""WebDataset tars of others, such as img2dataset's: members that share a name up to its first dot are a sample.

A tar reader stops quietly at a damaged header, as at the end, and so may lose the rest of a tar. Here the
end must be an end: two sectors of zeros behind the last member, and nothing but zeros behind them.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from shards.errors import BadInputError, UserError
from shards.format.members import Decode, Members, split_name
from shards.format.pictures import SUFFIXES, Picture
from shards.format.tar import SECTOR
from shards.sources.compressed import refuse_compressed
from shards.sources.listing import Listing, expand

_REST = 1 << 20  # bytes behind the last member that are looked at together


@dataclass(kw_only=True)
class TarSample:
    """A sample of a tar: offset and bytes of each member, by what follows the key."""

    key: str
    start: int  # of its first member's header
    stop: int = 0  # where its last member's padding ends
    contiguous: bool = True  # nobody else's members lie between its own
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class TarMembers:
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
    picture: Picture,
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
    decode = Decode(picture=picture, image=image, label=label, prefix=prefix)
    keys: list[str] = []
    places: list[tuple[int, int, int]] = []
    labels: list[int] = []
    for number, path in enumerate(files):
        with Path(path).open("rb") as file:
            for sample in walk(file, path):
                if decode.label is None and not keys and "cls" in sample.members:
                    decode = Decode(picture=picture, image=image, label="cls", prefix=prefix)
                keys.append(decode.key_of(sample.key, {}, Path(path).stem))
                places.append((number, *_image(sample, image)))
                if decode.label is not None:
                    labels.append(_label(file, sample, decode, path))
    if not prefix and len(set(keys)) < len(keys):
        raise UserError(
            f"{len(keys) - len(set(keys)):,} keys of {files[0]} and the other tars occur twice: "
            "--prefix-keys puts the tar's name before them"
        )
    table = np.array(places, dtype=np.int64).reshape(-1, 3)
    return Listing.of(
        Path(files[0]).parent.resolve().name,
        keys,
        TarMembers(tars=tuple(files), places=table),
        decode=picture,
        places=table,
        labels=np.array(labels, dtype=np.int64) if decode.label is not None else None,
    )


def walk(file: BinaryIO, path: str) -> list[TarSample]:
    """The samples of a tar, in the order of their first members; `path` is what errors call it.

    Raises:
        UserError: it is no tar, is damaged or cut short, or holds a member twice.
    """
    found: dict[str, TarSample] = {}
    end, last = 0, ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // SECTOR) * SECTOR
                split = split_name(member.name)
                if not member.isfile() or split is None:
                    continue
                key, extension = split
                sample = found.setdefault(key, TarSample(key=key, start=member.offset))
                if extension in sample.members:
                    raise UserError(f"{path}: {member.name} occurs twice: write the tar again")
                sample.contiguous &= not sample.members or last == key
                sample.members[extension] = (member.offset_data, member.size)
                sample.stop, last = end, key
    except tarfile.TarError as error:
        refuse_compressed(file, path)
        raise UserError(f"{path} is no whole tar ({error}): fetch or write it again") from None
    _check_end(file, path, end, len(found))
    return [*found.values()]


def _check_end(file: BinaryIO, path: str, end: int, samples: int) -> None:
    file.seek(end)
    rest = file.read(2 * SECTOR)
    if rest != bytes(2 * SECTOR):
        raise UserError(
            f"{path} is damaged or cut short at byte {end:,}, behind {samples:,} samples: fetch or "
            "write it again"
        )
    while rest:
        rest = file.read(_REST)
        if rest.strip(b"\0"):
            raise UserError(
                f"{path} goes on behind its end at byte {end:,}, where readers stop after {samples:,} samples: "
                "it is damaged there, or several tars in one; write it again"
            )


def _image(sample: TarSample, asked: str | None) -> tuple[int, int]:
    if asked is not None:
        return sample.members.get(asked.lower().lstrip("."), (0, -1))
    images = (place for name, place in sample.members.items() if f".{name}" in SUFFIXES)
    return next(images, (0, -1))


def _label(file: BinaryIO, sample: TarSample, decode: Decode, path: str) -> int:
    extension = (decode.label or "").partition(":")[0]
    members: Members = {}
    if extension in sample.members:
        offset, size = sample.members[extension]
        file.seek(offset)
        members[extension] = file.read(size)
    try:
        return decode.label_of(members)
    except BadInputError as error:
        raise UserError(f"{path}: {sample.key}: {error}") from None
