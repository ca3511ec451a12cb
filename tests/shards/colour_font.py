"""A font with pictures in colour, as Noto Color Emoji is built, and a list of emoji as Unicode writes it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib import newTable
from fontTools.ttLib.tables import C_B_D_T_, E_B_L_C_, BitmapGlyphMetrics
from PIL import Image

SIZE = (136, 128)
Colour = tuple[int, int, int, int]


def picture(colour: Colour) -> bytes:
    """A PNG of one colour, transparent in the outer four columns as Noto's are."""
    image = Image.new("RGBA", SIZE)
    image.paste(Image.new("RGBA", (SIZE[0] - 8, SIZE[1]), colour), (4, 0))
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def write_font(
    path: Path,
    characters: Mapping[int, bytes],
    ligatures: Mapping[Sequence[int], bytes] = {},
    *,
    colour: bool = True,
) -> Path:
    """A font with a picture for each character and for each sequence of characters, which are all in it."""
    single = {f"u{code:X}": data for code, data in characters.items()}
    joined = {"_".join(f"u{c:X}" for c in codes): data for codes, data in ligatures.items()}
    parts = sorted({code for codes in ligatures for code in codes} - characters.keys())
    plain = [f"u{code:X}" for code in parts]
    order = [".notdef", *single, *plain, *joined]
    builder = FontBuilder(1024, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap({code: f"u{code:X}" for code in [*characters, *parts]})
    builder.setupHorizontalMetrics(dict.fromkeys(order, (1024, 0)))
    builder.setupHorizontalHeader(ascent=950, descent=-250)
    if joined:
        rules = [f"sub {name.replace('_', ' ')} by {name};" for name in joined]
        features = f"feature ccmp {{ {' '.join(rules)} }} ccmp;"
        addOpenTypeFeaturesFromString(builder.font, features)
    if colour:
        _add_pictures(builder, {**single, **joined})
    builder.save(path)
    return path


def _add_pictures(builder: FontBuilder, pictures: Mapping[str, bytes]) -> None:
    order = builder.font.getGlyphOrder()
    names = [name for name in order if name in pictures]
    strike = {}
    for name in names:
        glyph = C_B_D_T_.cbdt_bitmap_format_17(b"", builder.font)
        glyph.metrics = BitmapGlyphMetrics.SmallGlyphMetrics()
        metrics = {
            "height": SIZE[1],
            "width": SIZE[0],
            "BearingX": 0,
            "BearingY": 101,
            "Advance": SIZE[0],
        }
        vars(glyph.metrics).update(metrics)
        glyph.imageData = pictures[name]
        strike[name] = glyph
    data = builder.font["CBDT"] = newTable("CBDT")
    data.version, data.strikeData = 3.0, [strike]
    places = builder.font["CBLC"] = newTable("CBLC")
    size = E_B_L_C_.Strike()
    for line in ("hori", "vert"):
        metrics = E_B_L_C_.SbitLineMetrics()
        for field in (
            "ascender",
            "descender",
            "widthMax",
            "caretSlopeNumerator",
            "caretSlopeDenominator",
            "caretOffset",
            "minOriginSB",
            "minAdvanceSB",
            "maxBeforeBL",
            "minAfterBL",
            "pad1",
            "pad2",
        ):
            setattr(metrics, field, 0)
        setattr(size.bitmapSizeTable, line, metrics)
    ids = [order.index(name) for name in names]
    table = size.bitmapSizeTable
    table.colorRef, table.startGlyphIndex, table.endGlyphIndex = 0, min(ids), max(ids)
    table.ppemX = table.ppemY = 109
    table.bitDepth, table.flags = 32, 1
    index = E_B_L_C_.eblc_index_sub_table_1(b"", builder.font)
    index.names, index.imageFormat, index.indexFormat = names, 17, 1
    index.firstGlyphIndex, index.lastGlyphIndex = min(ids), max(ids)
    size.indexSubTables = [index]
    places.version, places.strikes = 3.0, [size]


def write_list(path: Path, entries: Sequence[tuple[str, str, Sequence[int], str, str]]) -> Path:
    """Of (group, subgroup, code points, status, name), in the order given."""
    lines, heads = ["# emoji-test.txt", "# Version: 15.0", ""], ("", "")
    for group, subgroup, codes, status, name in entries:
        if group != heads[0]:
            lines += [f"# group: {group}", ""]
        if (group, subgroup) != heads:
            lines.append(f"# subgroup: {subgroup}")
        heads = (group, subgroup)
        text = "".join(map(chr, codes))
        points = " ".join(f"{code:04X}" for code in codes)
        lines.append(f"{points:<54} ; {status:<20} # {text} E1.0 {name}")
    path.write_text("\n".join([*lines, "", "# Status Counts", "#EOF", ""]), encoding="utf-8")
    return path
