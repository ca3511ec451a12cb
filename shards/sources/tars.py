"""WebDataset tars of others, such as img2dataset's: members that share a name up to its first dot are a sample.

A tar reader stops quietly at a damaged header, as at the end, and so may lose the rest of a tar. Here the
end must be an end: two sectors of zeros behind the last member, and nothing but zeros behind them.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from shards.errors import BadInputError, UserError
from shards.format.classes import ordered
from shards.format.members import Decode, Members, pictures, split_name
from shards.format.pictures import Picture
from shards.format.tar import SECTOR
from shards.sources.compressed import refuse_compressed
from shards.sources.listing import NO_LABEL, Listing, Passed, beside, expand

_JPEG = dict.fromkeys(("jpeg", "jpe", "jfif"), "jpg")
# fields of a .json that others keep labels in
_LABELS = ("label", "labels", "class", "class_id", "class_name", "cls", "category", "target", "y")
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

    Links to members of the same tar are read as these; other links and names without an extension are passed over.

    Args:
        image: the member's extension; without it the first that is an image's.
        label: an extension whose member is a whole number or text, such as `cls`, or `json:field`; text is numbered.
            Without it `cls` where all samples have one; `none` for no labels.
        prefix: put the tar's name before keys, for tars that each begin at 0.

    Raises:
        UserError: no such tars, a tar that ends where it should not, several pictures a sample in changing order, or
            a `cls` that only some samples have.
    """
    files = expand(paths, ".tar")
    decode = Decode(
        picture=picture, image=image, label=None if label == NO_LABEL else label, prefix=prefix
    )
    passed = beside(paths, ".tar")
    extension = (decode.label or "cls").partition(":")[0]
    keys: list[str] = []
    places: list[tuple[int, int, int]] = []
    label_places: list[tuple[int, int] | None] = []
    chosen = Chosen()
    about: tuple[str, int, int] | None = None  # the first .json: tar, offset and size
    for number, path in enumerate(files):
        with Path(path).open("rb") as file:
            looked = look(file, path)
        for sample in looked.with_links():
            chosen.see(sample, decode, path)
            keys.append(decode.key_of(sample.key, {}, Path(path).stem))
            places.append((number, *_image(sample, decode)))
            label_places.append(sample.members.get(extension))
            if about is None and (member := sample.members.get("json")):
                about = path, *member
        passed += [Passed(f"{Path(path).name}: {p.name}", p.reason) for p in looked.passed]
    chosen.check(decode)
    if label is None and chosen.labelled:
        if chosen.labelled < chosen.samples:
            raise UserError(chosen.some_labelled())
        decode = replace(decode, label="cls")
    elif label is None and about is not None:
        passed += _fields_like_labels(*about)
    if len(set(keys)) < len(keys):
        raise UserError(
            f"{len(keys) - len(set(keys)):,} keys of {files[0]} and the other tars occur twice: {own_keys(files)}"
        )
    table = np.array(places, dtype=np.int64).reshape(-1, 3)
    values, flaws = _label_values(files, table[:, 0], label_places, decode)
    labels, names = numbered(values, decode.label)
    return Listing.of(
        Path(files[0]).parent.resolve().name,
        keys,
        TarMembers(tars=tuple(files), places=table),
        decode=picture,
        places=table,
        labels=labels,
        class_names=names,
        flaws=flaws,
        passed=passed,
    )


def _fields_like_labels(path: str, offset: int, size: int) -> list[Passed]:
    """The fields of a sample's .json that are called as labels are, where no label was asked for or found."""
    with Path(path).open("rb") as file:
        file.seek(offset)
        try:
            found = json.loads(file.read(size))
        except (ValueError, RecursionError):  # nobody asked for what it says
            return []
    fields = [n for n in found if n.lower() in _LABELS] if isinstance(found, dict) else []
    return [
        Passed(f"json:{name}", f"a field that is not read: --label json:{name} takes it for labels")
        for name in fields
        if isinstance(found[name], int | str)
    ]


def own_keys(tars: Sequence[str]) -> str:
    """What gives every sample a key of its own."""
    alike = [name for name, n in Counter(map(posixpath.basename, tars)).items() if n > 1]
    rename = f"rename tars, of which several are called {alike[0]}; then " if alike else ""
    return f"{rename}--prefix-keys puts the tar's name before them"


def numbered(
    values: Sequence[int | str | None], field: str | None
) -> tuple[NDArray[np.int64] | None, list[str]]:
    """Labels, and the names of classes where they are text; None stands for a sample without one, which is bad.

    Raises:
        UserError: some are numbers and some are text.
    """
    if field is None:
        return None, []
    texts = [value for value in values if isinstance(value, str)]
    whole = next((value for value in values if isinstance(value, int)), None)
    if texts and whole is not None:
        raise UserError(
            f"labels at {field!r} are numbers, such as {whole}, and text, such as {texts[0]!r}: bring them to one"
        )
    names = ordered(texts)
    number: dict[int | str | None, int] = {name: label for label, name in enumerate(names)}
    found = [number[v] if isinstance(v, str) else v or 0 for v in values]
    return np.array(found, dtype=np.int64), names


@dataclass(kw_only=True)
class Chosen:
    """What is chosen of samples by default, judged over all of them: their picture, and whether they have a label."""

    samples: int = 0
    labelled: int = 0  # have a cls
    # an extension that was chosen, and the first sample of it
    images: dict[str, str] = field(default_factory=dict)
    several: str = ""  # the first sample that has more than one picture
    without: str = ""  # the first sample without a cls

    def see(self, sample: TarSample, decode: Decode, path: str) -> None:
        self.samples += 1
        where = f"{sample.key!r} of {path}"
        if "cls" in sample.members:
            self.labelled += 1
        else:
            self.without = self.without or where
        if (image := decode.image_of_names(sample.members)) is not None:
            self.images.setdefault(_JPEG.get(image, image), where)
            if len(pictures(sample.members)) > 1:
                self.several = self.several or where

    def merge(self, other: Chosen) -> None:
        self.samples += other.samples
        self.labelled += other.labelled
        self.images = {**other.images, **self.images}
        self.several = self.several or other.several
        self.without = self.without or other.without

    def check(self, decode: Decode) -> None:
        """
        Raises:
            UserError: samples have several pictures, and not the same comes first in all.
        """
        if decode.image is None and self.several and len(self.images) > 1:
            first = " and ".join(f".{image} ({where})" for image, where in self.images.items())
            raise UserError(
                f"samples hold several pictures, such as {self.several}, and others come first in others: {first}: say "
                f"which is the image, --image {next(iter(self.images))}"
            )

    def some_labelled(self) -> str:
        """The refusal where a label was not asked for, and some samples have one."""
        return (
            f"{self.labelled:,} of {self.samples:,} samples have a .cls, and {self.without} has none: "
            f"--label cls takes those without for bad ones, --label {NO_LABEL} reads no labels"
        )


@dataclass(kw_only=True)
class Looked:
    """What lies in a tar."""

    samples: dict[str, TarSample]  # by key, in the order of their first members
    places: dict[str, tuple[int, int]]  # of all files, by normalised name
    links: dict[str, tuple[str, str]]  # own name and target of each, by normalised name
    passed: list[Passed]

    def with_links(self) -> list[TarSample]:
        """The samples, with members that are links to files of the tar; other links are passed over."""
        samples = dict(self.samples)
        for at, (name, first) in self.links.items():
            target, left = at, len(self.links)
            # links to links; those in a circle end nowhere
            while target in self.links and left:
                target, left = self.links[target][1], left - 1
            key, extension = _split(name)
            if target not in self.places:
                self.passed.append(Passed(name, f"a link to {first}, which is not in the tar"))
                continue
            sample = samples.setdefault(key, TarSample(key=key, start=self.places[target][0]))
            sample.members.setdefault(extension, self.places[target])
        return [*samples.values()]


def look(file: BinaryIO, path: str) -> Looked:
    """The samples of a tar, and what is none; `path` is what errors call it.

    Raises:
        UserError: it is no tar, is damaged or cut short, holds a member twice, or one with holes.
    """
    found = Looked(samples={}, places={}, links={}, passed=[])
    end, last = 0, ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // SECTOR) * SECTOR
                if member.isdir():
                    continue
                own = member.name.rpartition("/")[2]
                split = None if own.startswith(".") else split_name(member.name)
                name = posixpath.normpath(member.name)
                if member.issparse():
                    raise UserError(
                        f"{path}: {member.name} has holes: pack the tar without --sparse"
                    )
                if member.isfile():
                    found.places[name] = member.offset_data, member.size
                elif split is not None and (member.islnk() or member.issym()):
                    above = "" if member.islnk() else posixpath.dirname(member.name)
                    target = posixpath.normpath(posixpath.join(above, member.linkname))
                    found.links[name] = member.name, target
                    continue
                if not member.isfile() or split is None:
                    found.passed.append(Passed(member.name, _no_member(member)))
                    continue
                key, extension = split
                sample = found.samples.setdefault(key, TarSample(key=key, start=member.offset))
                if extension in sample.members:
                    raise UserError(f"{path}: {member.name} occurs twice: write the tar again")
                sample.contiguous &= not sample.members or last == key
                sample.members[extension] = (member.offset_data, member.size)
                sample.stop, last = end, key
    except tarfile.TarError as error:
        refuse_compressed(file, path)
        raise UserError(f"{path} is no whole tar ({error}): fetch or write it again") from None
    _check_end(file, path, end, len(found.samples))
    return found


def walk(file: BinaryIO, path: str) -> list[TarSample]:
    """The samples of a tar, in the order of their first members, links left out; raises as `look` does."""
    return [*look(file, path).samples.values()]


def _split(name: str) -> tuple[str, str]:
    found = split_name(name)
    assert found is not None
    return found


def _no_member(member: tarfile.TarInfo) -> str:
    if not member.isfile():
        return "no file"
    if member.name.rpartition("/")[2].startswith("."):
        return "a hidden file"
    return "a name without an extension, or in double underscores"


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


def _image(sample: TarSample, decode: Decode) -> tuple[int, int]:
    extension = decode.image_of_names(sample.members)
    return (0, -1) if extension is None else sample.members[extension]


def _label_values(
    files: Sequence[str],
    numbers: NDArray[np.int64],
    places: Sequence[tuple[int, int] | None],
    decode: Decode,
) -> tuple[list[int | str | None], dict[int, str]]:
    """The label of each sample, and why those have none that have none; by the tar and place of the member."""
    values: list[int | str | None] = []
    flaws: dict[int, str] = {}
    if decode.label is None:
        return values, flaws
    extension = decode.label.partition(":")[0]
    for number, path in enumerate(files):
        with Path(path).open("rb") as file:
            for row in range(*np.searchsorted(numbers, (number, number + 1)).tolist()):
                members: Members = {}
                if (place := places[row]) is not None:
                    file.seek(place[0])
                    members[extension] = file.read(place[1])
                try:
                    values.append(decode.label_value(members))
                except BadInputError as error:
                    values.append(None)
                    flaws[row] = str(error)
    return values, flaws
