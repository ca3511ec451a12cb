"""PNGs decoded past Pillow are Pillow's pixels, and what Pillow refuses or turns is left to it."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shards.errors import BadInputError
from shards.format import png
from shards.format.pictures import Picture

MODES = ("L", "RGB", "RGBA")


def _levels(side: int, mode: str = "RGB") -> Image.Image:
    levels = np.random.default_rng(side).integers(0, 256, (6, 6, 4), dtype=np.uint8)
    return Image.fromarray(levels).resize((side, side + 3)).convert(mode)


def _encoded(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def _by_pillow(data: bytes) -> NDArray[np.uint8] | None:
    try:
        return np.asarray(Image.open(io.BytesIO(data)))
    except (OSError, SyntaxError, ValueError):
        return None


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _with(data: bytes, *chunks: bytes, at: int = 33) -> bytes:
    """With chunks behind the header, or elsewhere."""
    return data[:at] + b"".join(chunks) + data[at:]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", [1, 8, 33, 200])
@pytest.mark.parametrize("level", [0, 2, 9])
def test_png_of_any_kind_and_length_decodes_as_pillow_does(
    mode: str, side: int, level: int
) -> None:
    whole = _encoded(_levels(side, mode), compress_level=level)
    found = png.decode(whole)
    assert found is not None and np.array_equal(found, np.asarray(_levels(side, mode)))
    assert png.decode(memoryview(whole)) is not None
    for length in (0, 7, 8, 20, 33, 40, len(whole) // 2, len(whole) - 12, len(whole) - 1):
        assert png.decode(whole[:length]) is None, length


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _raw_profile() -> PngInfo:
    """As ImageMagick keeps EXIF."""
    info, body = PngInfo(), _exif().tobytes()
    info.add_text("Raw profile type exif", f"\nexif\n{len(body):8}\n{body.hex()}")
    return info


LEFT: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "a JPEG": lambda: b"\xff\xd8\xff" + bytes(100),
    "a palette": lambda: _encoded(_levels(16).convert("P")),
    "a bit a pixel": lambda: _encoded(_levels(16).convert("1")),
    "grey with alpha": lambda: _encoded(_levels(16).convert("LA")),
    "16 bits of grey": lambda: _encoded(_levels(16).convert("I;16")),
    "a transparent colour": lambda: _encoded(_levels(16), transparency=(1, 2, 3)),
    "a transparent grey": lambda: _encoded(_levels(16, "L"), transparency=1),
    "an orientation": lambda: _encoded(_levels(16), exif=_exif()),
    "an orientation as text": lambda: _encoded(_levels(16), pnginfo=_raw_profile()),
    "several frames": lambda: _encoded(
        _levels(16), save_all=True, append_images=[_levels(19).resize((16, 19))]
    ),
    "pixels in two places": lambda: _two_places(),
    "a wrong sum": lambda: _encoded(_levels(16))[:29] + bytes(4) + _encoded(_levels(16))[33:],
    "two headers": lambda: _with(_encoded(_levels(16)), _encoded(_levels(16))[8:33]),
    "no pixels": lambda: _encoded(_levels(16))[:33] + _chunk(b"IEND", b""),
}


def _two_places() -> bytes:
    whole = _encoded(_levels(16))
    body = whole[41:-16]
    parts = [
        _chunk(b"IDAT", body[:50]),
        _chunk(b"tIME", HARMLESS[b"tIME"]),
        _chunk(b"IDAT", body[50:]),
    ]
    return whole[:33] + b"".join(parts) + _chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", LEFT)
def test_png_that_is_not_plain_is_left_to_pillow(kind: str) -> None:
    assert png.decode(LEFT[kind]()) is None


HARMLESS = {
    b"gAMA": bytes((0, 0, 177, 143)),
    b"cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
    b"sRGB": bytes(1),
    b"pHYs": bytes((0, 0, 11, 19, 0, 0, 11, 19, 1)),
    b"bKGD": bytes((0, 255) * 3),
    b"sBIT": bytes((8, 8, 8)),
    b"tIME": bytes((7, 233, 11, 30, 1, 2, 3)),
    b"tEXt": b"Software\0of somebody",
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_png_with_a_chunk_that_changes_no_pixel_is_decoded(kind: bytes) -> None:
    data = _with(_encoded(_levels(16)), _chunk(kind, HARMLESS[kind]))
    found = png.decode(data)
    assert found is not None and np.array_equal(found, np.asarray(_levels(16)))


def test_png_with_bytes_behind_its_end_or_pixels_in_many_chunks_is_decoded() -> None:
    whole = _encoded(_levels(200), compress_level=0)
    body = b"".join(
        whole[at + 8 : at + 8 + size] for at, kind, size in _chunks(whole) if kind == b"IDAT"
    )
    many = [_chunk(b"IDAT", body[at : at + 1000]) for at in range(0, len(body), 1000)]
    for data in (whole + b"more", whole[:33] + b"".join(many) + _chunk(b"IEND", b"")):
        found = png.decode(data)
        assert found is not None and np.array_equal(found, np.asarray(_levels(200)))


def _chunks(data: bytes) -> list[tuple[int, bytes, int]]:
    found, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        found.append((at, data[at + 4 : at + 8], size))
        at += size + 12
    return found


def damaged(count: int, seed: int, *, mended: bool) -> Iterator[bytes]:
    """PNGs with a changed byte; with `mended`, the sum of the pixels' chunk is that of the changed bytes."""
    draw = np.random.default_rng(seed)
    time = _chunk(b"tIME", HARMLESS[b"tIME"])
    whole = [
        _with(_encoded(_levels(40, mode), compress_level=level), time)
        for mode in MODES
        for level in (0, 6)
    ]
    for _ in range(count):
        data = bytearray(whole[draw.integers(len(whole))])
        data[draw.integers(len(data))] = draw.integers(256)
        pixels = [(at, size) for at, kind, size in _chunks(bytes(data)) if kind == b"IDAT"]
        if mended and pixels:
            at, size = pixels[0]
            data[at : at + size + 12] = _chunk(b"IDAT", bytes(data[at + 8 : at + 8 + size]))
        yield bytes(data)


@pytest.mark.parametrize("mended", [False, True])
def test_png_with_changed_bytes_is_what_pillow_makes_of_it_or_left_to_pillow(mended: bool) -> None:
    decoded = 0
    for data in damaged(2000, int(mended), mended=mended):
        found, wanted = png.decode(data), _by_pillow(data)
        if found is not None:
            decoded += 1
            assert wanted is not None and np.array_equal(found, wanted)
    assert decoded > 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [None, 16])
@pytest.mark.parametrize("background", [None, "white", "#102030"])
def test_picture_is_what_it_was_by_pillow(
    mode: str,
    channels: int,
    size: int | None,
    background: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture = Picture(channels=channels, size=size, background=background)
    data = _encoded(_levels(40, mode))
    pixels, look, stored = picture(data), picture.look(data), picture.stored(data)
    monkeypatch.setattr(png, "decode", lambda _: None)
    wanted = picture.look(data)
    assert np.array_equal(pixels, wanted.pixels) and np.array_equal(look.pixels, wanted.pixels)
    assert (look.traits, look.format) == (wanted.traits, "PNG")
    assert ("transparent" in look.traits) == (mode == "RGBA" and background is not None)
    assert stored.data == picture.stored(data).data


def test_many_damaged_pngs_leave_the_process_well() -> None:
    """A library that loses references to None with each error makes Python abort, at the latest where it ends."""
    script = """
import sys
from tests.shards.test_png import damaged
from shards.format import png
for data in damaged(3000, 2, mended=True):
    png.decode(data)
before = sys.getrefcount(None)
for data in damaged(3000, 2, mended=True):
    png.decode(data)
print(abs(sys.getrefcount(None) - before) < 1000)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_opaque_alpha_is_dropped_and_other_is_refused_where_that_is_asked() -> None:
    opaque = _levels(40, "RGBA")
    opaque.putalpha(255)
    look = Picture(background="refuse").look(_encoded(opaque))
    assert look.traits == () and np.array_equal(
        look.pixels, np.asarray(opaque.convert("RGB")).transpose(2, 0, 1)
    )
    with pytest.raises(BadInputError, match="transparent parts"):
        Picture(background="refuse").look(_encoded(_levels(40, "RGBA")))


def test_png_of_more_pixels_than_pillow_opens_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert png.decode(_encoded(_levels(40))) is None
    with pytest.raises(BadInputError, match="Make it smaller"):
        Picture().look(_encoded(_levels(40)))
