"""A sample as members of a tar: which they are, and how they become its x, y and id.

Pictures are decoded by `Picture`, whatever program packed them: it opens, loads and converts as webdataset's own image
handler does, to the same pixels, and is at hand without `import webdataset`, which imports torch. Arrays in tars of
others are left to webdataset: `shards.format.foreign_arrays`.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.errors import BadInputError
from shards.format import foreign_arrays as foreign
from shards.format.pictures import OTHERS, SUFFIXES, Picture
from shards.format.tar import plain_members

CLASSES = 1 << 20  # at most: every manifest counts the samples of each
KEY: Final = "id.txt"  # the member that holds a sample's own key, where its name is a number
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_WHOLE = re.compile(r"[+-]?[0-9]+")
_PASSED_OVER = re.compile(r"__[^/]*__($|/)")
_TEXT = 60  # characters of a wrong label that are shown
Members = dict[str, bytes]  # by what follows the key, in lower case


@dataclass(frozen=True, kw_only=True)
class Decode:
    """How the members of a sample become its x, y and id."""

    picture: Picture
    image: str | None = None  # extension; without one the first that is an image's
    label: str | None = None  # an extension whose member is a whole number or text, or `json:field`
    key: Literal["name", "id.txt"] = "name"  # what the members' names share, or a member of its own
    prefix: bool = False  # put the tar's name before the key
    names: tuple[
        str, ...
    ] = ()  # of classes, where labels are text: a label is its place among them

    @staticmethod
    def of(plain: Mapping[str, Any]) -> Decode:
        picture = Picture(
            size=plain["size"], channels=plain["channels"], background=plain.get("background")
        )
        names = ("image", "label", "key", "prefix")
        classes = tuple(plain.get("names", ()))
        return Decode(picture=picture, names=classes, **{name: plain[name] for name in names})

    def plain(self) -> dict[str, Any]:
        """As a manifest holds it."""
        values = asdict(self)
        picture = values.pop("picture")
        if picture["background"] is None:
            # as it was before there was one
            del picture["background"]
        # likewise
        if not values["names"]:
            del values["names"]
        return {**picture, **values}

    def key_of(self, name: str, members: Members, stem: str) -> str:
        """A sample's key; `stem` is of its tar."""
        if self.key == KEY:
            if KEY not in members:
                raise BadInputError(f"no member .{KEY}")
            return _text(members[KEY])
        return f"{stem}/{name}" if self.prefix else name

    def label_of(self, members: Members) -> int:
        """The sample's label, as webdataset reads numbers in `cls` and `json` members; of text, its place in `names`.

        Raises:
            BadInputError: no such member, no whole number in it, or text that is no class.
        """
        found = self.label_value(members)
        if isinstance(found, int):
            return found
        if found not in self.numbers:
            raise BadInputError(f"label {found!r} is none of the {len(self.names)} classes")
        return self.numbers[found]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The label of each class that has a name."""
        return {name: label for label, name in enumerate(self.names)}

    def label_value(self, members: Members) -> int | str:
        """The label as the sample holds it: a whole number from 0, or text, whether in JSON or in a member of its own.

        Raises:
            BadInputError: no such member, or neither in it.
        """
        assert self.label is not None
        extension, _, field = self.label.partition(":")
        if extension not in members:
            raise BadInputError(f"no member .{extension}, which should hold its label")
        text = members[extension]
        try:
            found = _field(json.loads(text), field) if field else _number_or_name(text)
        except (ValueError, KeyError, TypeError, RecursionError):
            found = None
        if isinstance(found, str) and found and "\0" not in found:
            return found
        if not isinstance(found, int):
            shown = text[:_TEXT].decode(errors="replace")
            raise BadInputError(
                f".{extension} holds no name and no whole number at {self.label!r}: {shown!r}"
            )
        if not 0 <= found < CLASSES:
            raise BadInputError(f"label {found}: classes go from 0 to {CLASSES - 1:,} at most")
        return int(found)

    @property
    def rule(self) -> str:
        """How x comes about; another one looks again."""
        kind = foreign.kind_of(self.image)
        return foreign.rule_of(kind) if kind else self.picture.rule

    def x_of(self, members: Members) -> NDArray[np.generic]:
        """The sample (C, H, W): a picture, or an array; raises BadInputError where it is none."""
        kind, data = foreign.kind_of(self.image), self.image_of(members)
        return foreign.array_of(kind, data) if kind else self.picture(data)

    def look(self, members: Members) -> tuple[NDArray[np.generic], tuple[str, ...]]:
        """The sample, and what `shards.format.pictures.TRAITS` it has; raises as `x_of` does."""
        if foreign.kind_of(self.image):
            return self.x_of(members), ()
        x, traits, _ = self.picture.look(self.image_of(members))
        return x, traits

    def image_of_names(self, names: Iterable[str]) -> str | None:
        """Which member is the image: the one that was asked for, or the first that is one; None where there is none."""
        if self.image is not None:
            asked = self.image.lower().lstrip(".")
            return asked if asked in names else None
        return next(iter(pictures(names)), None)

    def image_of(self, members: Members) -> bytes:
        """The encoded picture or array among the members; raises BadInputError where there is none."""
        extension = self.image_of_names(members)
        found = None if extension is None else members.get(extension)
        if found is None:
            wanted = f"no member .{self.image}" if self.image else "no image"
            raise BadInputError(f"{wanted} among its members ({', '.join(members)})")
        return found


def pictures(names: Iterable[str]) -> list[str]:
    """The extensions that are pictures', in their order; those that readers of WebDataset know go first."""
    kept = [*names]
    return [n for known in (SUFFIXES, OTHERS) for n in kept if f".{n}" in known]


def _number_or_name(data: bytes) -> int | str | None:
    """What a member of its own says: None where it is another number, which JSON would not have as text either."""
    text = data.decode("utf-8-sig").strip()
    # else Python reads 1_0, and digits of other scripts, which may be names
    if _WHOLE.fullmatch(text):
        return int(text)
    try:
        float(text)
    except ValueError:
        return text
    return None


def _field(value: Any, name: str) -> Any:
    """A field of JSON, by its name or by the names of nested ones with dots between."""
    if name in value:
        return value[name]
    first, dot, rest = name.partition(".")
    if not dot:
        raise KeyError(name)
    return _field(value[first], rest)


class Encoded(NamedTuple):
    """The bytes of a sample in its tar."""

    span: bytes
    stem: str  # of the tar's name


class Sample(NamedTuple):
    """A sample decoded; None where the field was not asked for."""

    x: NDArray[np.generic] | None
    y: int | None
    id: bytes | None


@dataclass(frozen=True, kw_only=True)
class Unpack:
    """Samples to their fields `names`; pickles, so that any process may do it."""

    decode: Decode
    names: tuple[str, ...]

    def __call__(self, sample: Encoded) -> Sample | BadInputError:
        try:
            return self.unpack(sample)
        except BadInputError as error:
            return error

    def unpack(self, sample: Encoded) -> Sample:
        """Raises BadInputError where the span is no sample."""
        name, members = members_of(sample.span)
        names, decode = self.names, self.decode
        return Sample(
            x=decode.x_of(members) if "x" in names else None,
            y=decode.label_of(members) if "y" in names else None,
            id=decode.key_of(name, members, sample.stem).encode() if "id" in names else None,
        )


def split_name(path: str) -> tuple[str, str] | None:
    """Key and extension of a member, as webdataset splits them: at the first dot of the last part.

    None of names without one, and of names in double underscores, which webdataset passes over.
    """
    found = _NAME.fullmatch(path if path.isascii() else printable(path))
    if found is None or _PASSED_OVER.match(path):
        return None
    return found[1], found[2].lower()


def _text(key: bytes) -> str:
    try:
        text = key.decode()
    except UnicodeDecodeError:
        raise BadInputError(f"its .{KEY} is not UTF-8: {key[:_TEXT]!r}") from None
    if not text or "\0" in text:
        raise BadInputError(f"its .{KEY} is empty or holds a NUL")
    return text


def members_of(span: bytes) -> tuple[str, Members]:
    """The key that a sample's members share, and their contents.

    Raises:
        BadInputError: the span holds no members, or those of several samples.
    """
    found: Members = {}
    keys = set()
    for name, start, size in plain_members(span) or _any_members(span):
        split = split_name(name)
        if split is not None:
            keys.add(split[0])
            found[split[1]] = span[start : start + size]
    if len(keys) != 1:
        raise BadInputError(f"members of {len(keys)} samples")
    return keys.pop(), found


def _any_members(span: bytes) -> list[tuple[str, int, int]]:
    """Name, first byte and size of each file in a part of a tar, of whatever format."""
    try:
        with tarfile.open(fileobj=io.BytesIO(span), mode="r:") as tar:
            return [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    except tarfile.TarError as error:
        raise BadInputError(f"no members of a tar: {error}") from None


def printable(name: str) -> str:
    """A file's or member's name as text; of bytes that are not UTF-8 as they are escaped, \\xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
