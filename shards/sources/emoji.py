"""Emoji: the pictures of a colour font, in the groups of Unicode's list of emoji.

A font such as Debian's Noto Color Emoji (SIL Open Font Licence) holds a PNG of 136 x 128 pixels for each emoji. That
PNG is the input, so its bytes are those of the font on every machine; only what becomes of it depends on Pillow. What
lies in the outer four columns of a Noto picture is transparent: the square about its centre is cut out first.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from shards import storage
from shards.errors import BadInputError, UserError
from shards.format.pictures import Picture
from shards.sources.listing import Listing, file

if TYPE_CHECKING:
    from PIL.Image import Image

Label = Literal["group", "subgroup"]
SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
_AS_PICTURE = (
    0xFE0F  # asks for the coloured form of a character that has a plain one; fonts may leave it out
)


@dataclass(frozen=True, kw_only=True)
class OnWhite(Picture):
    """The square about a picture's centre, transparent parts white; it has a size, for what it became is stored."""

    size: int | None = 32

    @property
    def rule(self) -> str:
        return f"square on-white {super().rule}"

    def _opaque(self, image: Image) -> Image:
        from PIL import Image as images

        side = min(image.size)
        left, top = ((edge - side) // 2 for edge in image.size)
        square = image.convert("RGBA").crop((left, top, left + side, top + side))
        white = images.new("RGBA", square.size, "white")
        return super()._opaque(images.alpha_composite(white, square))


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """A line of Unicode's list."""

    codes: tuple[int, ...]
    name: str
    group: str
    subgroup: str

    @property
    def codepoints(self) -> str:
        return " ".join(f"{code:04X}" for code in self.codes)

    @property
    def key(self) -> str:
        """Subgroup and code points, such as `food-fruit/1f347`."""
        return f"{self.subgroup}/{self.codepoints.replace(' ', '-').lower()}"


@dataclass(frozen=True)
class Bitmaps:
    """The PNG of each input; None where the font has no picture of it."""

    data: tuple[bytes | None, ...]

    def read(self, row: int) -> bytes:
        found = self.data[row]
        if found is None:
            raise BadInputError("the font has no picture of it")
        return found


def emoji(font: str, emoji_test: str, picture: OnWhite, *, label: Label = "group") -> Listing:
    """The emoji without skin tones that `emoji_test` lists as fully qualified, drawn by `font`.

    A sample's label is its group or its subgroup, numbered in the list's order, and its JSON has both, the name and the
    code points.

    Raises:
        UserError: no such files, a list without emoji, or a font without bitmaps in colour.
    """
    listed = [e for e in read_list(emoji_test) if not SKIN_TONES.intersection(e.codes)]
    if not listed:
        raise UserError(f"{emoji_test} lists no emoji: give Unicode's emoji-test.txt")
    groups, subgroups = _numbered(e.group for e in listed), _numbered(e.subgroup for e in listed)
    about: list[dict[str, Any]] = [
        {
            "name": e.name,
            "codepoints": e.codepoints,
            "group": e.group,
            "group_label": groups[e.group],
            "subgroup": e.subgroup,
            "subgroup_label": subgroups[e.subgroup],
        }
        for e in listed
    ]
    data = bitmaps(font, [e.codes for e in listed])
    return Listing.of(
        "emoji",
        [e.key for e in listed],
        Bitmaps(tuple(data)),
        decode=picture,
        places=[zlib.crc32(d or b"") for d in data],
        labels=[a[f"{label}_label"] for a in about],
        class_names=list(groups if label == "group" else subgroups),
        about=[json.dumps(a, ensure_ascii=False, sort_keys=True).encode() for a in about],
    )


def read_list(path: str) -> list[Emoji]:
    """What Unicode's emoji-test.txt lists as fully qualified, in its order.

    Raises:
        UserError: no such file, or a line that is no part of such a list.
    """
    found, group, subgroup = [], "", ""
    lines = file(path, "list of emoji").read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip()
        elif line.strip() and not line.startswith("#"):
            try:
                codes, rest = line.split(";", 1)
                status, comment = rest.split("#", 1)
                # the emoji, the version that brought it, its name
                _, _, name = comment.split(maxsplit=2)
                numbers = tuple(int(code, 16) for code in codes.split())
            except ValueError:
                raise UserError(
                    f"{path}, line {number} is no line of a list of emoji: {line[:60]!r}; give Unicode's emoji-test.txt"
                ) from None
            if status.strip() == "fully-qualified":
                found.append(Emoji(codes=numbers, name=name, group=group, subgroup=subgroup))
    return found


def bitmaps(path: str, sequences: Sequence[tuple[int, ...]]) -> list[bytes | None]:
    """The PNG that a font holds for each sequence of code points, None where it has no glyph for all of it.

    Raises:
        UserError: no such file, no font, or one without bitmaps in colour (table CBDT).
    """
    from fontTools.ttLib import TTFont, TTLibError

    try:
        font = TTFont(file(path, "font"), lazy=True)
    except TTLibError as error:
        raise UserError(f"{path} is no font ({error}): give NotoColorEmoji.ttf") from None
    with font:
        if "CBDT" not in font:
            raise UserError(
                f"{path} holds no bitmaps in colour (table CBDT): give Debian's NotoColorEmoji.ttf"
            )
        glyphs, ligatures = font.getBestCmap(), dict(_ligatures(font))
        pictures = font["CBDT"].strikeData[0]
        found = []
        for codes in sequences:
            names = _spelled(codes, glyphs, ligatures)
            made = (pictures[name].imageData for name in names if name in pictures)
            found.append(next(made, None))
    return found


def provenance(font: str, emoji_test: str) -> dict[str, str]:
    """What was drawn by what, for the manifest."""
    return {"font_sha256": storage.sha256(font), "emoji_test_sha256": storage.sha256(emoji_test)}


def _spelled(
    codes: tuple[int, ...], glyphs: dict[int, str], ligatures: dict[tuple[str, ...], str]
) -> Iterator[str]:
    """Glyphs that stand for all of the code points, as written and without the wish for a picture."""
    for form in (codes, tuple(code for code in codes if code != _AS_PICTURE)):
        names = tuple(glyphs[code] for code in form if code in glyphs)
        if len(names) == len(form):
            yield from names if len(names) == 1 else filter(None, [ligatures.get(names)])


def _ligatures(font: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Glyphs that become one, and that one; fonts of emoji need no context for it."""
    if "GSUB" not in font:
        return
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            # where offsets need 32 bits, tables are wrapped
            inner = getattr(table, "ExtSubTable", table)
            for first, of_first in getattr(inner, "ligatures", {}).items():
                yield from (((first, *one.Component), one.LigGlyph) for one in of_first)


def _numbered(names: Iterator[str]) -> dict[str, int]:
    """Each name once, numbered as they come."""
    return {name: number for number, name in enumerate(dict.fromkeys(names))}
