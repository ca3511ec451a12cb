"""What becomes of pictures that are not plain RGB: each is counted, and none changes in silence."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import shards
from shards.errors import BadInputError, UserError
from shards.format import manifest as manifests
from shards.format.pictures import Picture, _decoded_to_8_bits
from tests.shards import inputs
from tools.shards.__main__ import main

WHITE = Picture(background="white")
RGBA = np.random.default_rng(0).integers(0, 255, (6, 4, 4), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **more: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def deep_png(levels: np.ndarray) -> bytes:
    """(H, W, 2 to 4) uint16 as a PNG of 16 bits a channel, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width, channels = levels.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in levels.astype(">u2"))
    packed = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + packed


def on(colour: tuple[int, int, int], image: Image.Image) -> np.ndarray:
    """The straight formula, in floating point; within one level of any rounding of it."""
    layered = np.asarray(image.convert("RGBA"), dtype=np.float64)
    alpha = layered[..., 3:] / 255
    return layered[..., :3] * alpha + np.array(colour) * (1 - alpha)


def palette(transparency: int | bytes) -> bytes:
    image = Image.fromarray(RGBA[..., :3]).quantize(8)
    return encoded(image, transparency=transparency)


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(RGBA)),
        encoded(Image.fromarray(RGBA[..., :2], mode="LA")),
        encoded(Image.fromarray(RGBA), "WEBP", lossless=True),
        encoded(Image.fromarray(RGBA), "TIFF"),
        palette(0),
        palette(bytes([0, 90, 255])),
        encoded(Image.fromarray(RGBA[..., :3]), transparency=tuple(map(int, RGBA[0, 0, :3]))),
        encoded(Image.fromarray(RGBA[..., 0]), transparency=int(RGBA[0, 0, 0])),
    ],
    ids=["rgba", "la", "webp", "tiff", "palette", "alpha-palette", "rgb-key", "grey-key"],
)
@pytest.mark.parametrize("colour", ["white", "#102030"])
def test_a_transparent_picture_shows_the_background(data: bytes, colour: str) -> None:
    found = Picture(background=colour).look(data)
    assert "transparent" in found.traits
    want = on({"white": (255, 255, 255)}.get(colour, (16, 32, 48)), Image.open(io.BytesIO(data)))
    assert np.abs(found.pixels.transpose(1, 2, 0) - want).max() <= 1
    grey = Picture(background=colour, channels=1).look(data)
    assert grey.pixels.shape == (1, 6, 4) and "transparent" in grey.traits
    with pytest.raises(BadInputError, match="--background COLOUR"):
        Picture(background="refuse").look(data)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1"])
def test_an_opaque_picture_is_what_it_was(mode: str) -> None:
    data = encoded(Image.fromarray(RGBA[..., :3]).convert(mode))
    assert np.array_equal(WHITE(data), Picture()(data)) and WHITE.look(data).traits == ()
    assert WHITE.stored(data).data == data
    assert np.array_equal(Picture(background="refuse")(data), Picture()(data))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF"]))
def test_the_orientation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RGBA[..., :3]), kind, exif=exif)
    want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    found = WHITE.look(data)
    assert np.array_equal(found.pixels.transpose(1, 2, 0), want)
    assert found.traits == (() if orientation == 1 else ("rotated",))
    assert want.shape[:2] == ((6, 4) if orientation < 5 else (4, 6))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_sixteen_bits_are_rounded_and_counted(channels: int, seed: int) -> None:
    levels = np.random.default_rng(seed).integers(0, 1 << 16, (3, 5, channels)).astype(np.uint16)
    found = WHITE.look(deep_png(levels))
    assert "of 16 bits" in found.traits
    if channels == 3:
        assert np.array_equal(found.pixels.transpose(1, 2, 0), np.round(levels / 257))
    else:
        assert "transparent" in found.traits


GREY = np.arange(20, dtype=np.uint16).reshape(4, 5) * 3449 + np.array(
    [0, 127, 128, 129, 4], np.uint16
)


def pgm(levels: np.ndarray, most: int = 65535) -> bytes:
    kind = b"P5" if levels.ndim == 2 else b"P6"
    head = b"%s\n%d %d\n%d\n" % (kind, levels.shape[1], levels.shape[0], most)
    return head + levels.astype(">u2").tobytes()


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(GREY)),
        encoded(Image.fromarray(GREY), "TIFF"),
        encoded(Image.fromarray(GREY), "TIFF", compression="tiff_lzw"),
        encoded(Image.fromarray(GREY.astype(">u2")), "TIFF"),
        encoded(Image.fromarray(GREY), "JPEG2000"),
        pgm(GREY),
    ],
    ids=["png", "tiff", "lzw", "big-endian", "jpeg2000", "pgm"],
)
def test_sixteen_bits_of_grey_are_rounded_as_those_of_colour(data: bytes) -> None:
    found = WHITE.look(data)
    assert found.traits == ("of 16 bits",)
    assert np.array_equal(found.pixels, np.broadcast_to(np.round(GREY / 257), (3, 4, 5)))
    stored = Picture(background="white", channels=1).stored(data)
    assert stored.extension == "png"
    assert np.array_equal(Picture(channels=1)(stored.data), np.round(GREY / 257)[None])


def deeper_jp2(levels: np.ndarray) -> bytes:
    """Colour of 8 bits as JPEG 2000 whose header says 16: levels v become v - 128 + 32768."""
    data = bytearray(encoded(Image.fromarray(levels), "JPEG2000", irreversible=False, mct=0))
    start = data.find(b"\xff\x4f\xff\x51")
    for channel in range(3):
        assert data[start + 42 + 3 * channel] == 7
        data[start + 42 + 3 * channel] = 15
    return bytes(data)


def test_deeper_colour_that_pillow_decodes_to_eight_bits_is_counted() -> None:
    levels = RGBA[..., :3]
    found = WHITE.look(deeper_jp2(levels))
    assert found.traits == ("decoded to 8 bits",)
    deep = levels.astype(int) - 128 + 32768
    assert np.abs(found.pixels.transpose(1, 2, 0) - deep / 257).max() <= 1
    wide = RGBA[..., :3].astype(np.uint16) * 200
    ppm = WHITE.look(pgm(wide))
    assert ppm.traits == ("decoded to 8 bits",)
    assert np.array_equal(ppm.pixels.transpose(1, 2, 0), np.round(wide / 257))
    for data in (
        encoded(Image.fromarray(levels), "JPEG2000"),
        encoded(Image.fromarray(levels), "AVIF"),
        encoded(Image.fromarray(levels), "PPM"),
        b"P3 2 1 255\n1 2 3 4 5 6\n",
        b"P1 2 1\n1 0\n",
    ):
        assert WHITE.look(data).traits == ()


def test_a_high_bit_depth_of_avif_is_seen() -> None:
    data = bytearray(encoded(Image.fromarray(RGBA[..., :3]), "AVIF"))
    with Image.open(io.BytesIO(data)) as image:
        assert not _decoded_to_8_bits(image, bytes(data))
        data[data.find(b"av1C") + 6] |= 0x40
        assert _decoded_to_8_bits(image, bytes(data))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_levels_without_a_range_of_their_own_are_refused(mode: str) -> None:
    data = encoded(Image.fromarray(GREY.astype({"I": np.int32, "F": np.float32}[mode])), "TIFF")
    with pytest.raises(BadInputError, match="do not fit 8 bits"):
        WHITE.look(data)


def test_eight_bits_written_as_sixteen_come_back() -> None:
    levels = RGBA[..., :3]
    found = WHITE(deep_png(levels.astype(np.uint16) * 257))
    assert np.array_equal(found.transpose(1, 2, 0), levels)


def test_the_first_frame_of_several_and_cmyk_are_counted() -> None:
    frames = [Image.fromarray(RGBA[..., i]) for i in range(3)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert "animated" in WHITE.look(data).traits, kind
    assert WHITE.look(encoded(Image.fromarray(RGBA, mode="CMYK"), "JPEG")).traits == ("CMYK",)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_enlarged_is_where_the_short_side_is_less_than_the_size(w: int, h: int, size: int) -> None:
    data = inputs.png(np.zeros((h, w, 3), dtype=np.uint8))
    found = Picture(size=size, background="white").look(data)
    assert found.traits == (("enlarged",) if min(w, h) < size else ())


@pytest.mark.parametrize("colour", ["whte", "", "#12", "transparent", "#ffffff00"])
def test_a_background_that_is_no_opaque_colour_is_refused(colour: str) -> None:
    with pytest.raises(UserError, match="no opaque colour"):
        Picture(background=colour)


def folder(root: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = Image.fromarray(RGBA[..., :3])
    files = {
        "a/0.png": encoded(plain),
        "a/1.png": encoded(Image.fromarray(RGBA)),
        "b/2.jpg": encoded(plain.resize((6, 4)), "JPEG", exif=exif),
        "b/3.png": deep_png(RGBA[..., :3].astype(np.uint16) * 257),
    }
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("layout", ["samples", "blocks"])
def test_make_counts_what_it_changed_and_stores_what_it_became(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int | None, layout: str
) -> None:
    root, out = folder(tmp_path / "in"), tmp_path / "out"
    more = ["--size", str(size)] if size else []
    make = ["make", "folder", str(root), "--out", str(out), "--layout", layout, *more]
    assert main([*make, "--json"]) == 0
    want = {"transparent": 1, "rotated": 1, "of 16 bits": 1} | ({"enlarged": 4} if size else {})
    assert json.loads(capsys.readouterr().out)["inputs"]["changed"] == want
    manifest = manifests.load(out)
    assert manifest.source["changed"] == want and manifest.source["background"] == "white"
    found = shards.read_all(out)
    picture = Picture(size=size, background="white")
    for key, x in zip(found["key"].tolist(), found["x"], strict=True):
        assert np.array_equal(x, picture((root / key).read_bytes())), key
    assert main(make) == 0
    said = capsys.readouterr().out
    assert "already there" in said and "1 transparent, 1 rotated" in said


def test_an_index_of_transparent_pictures_reads_them_on_the_background(tmp_path: Path) -> None:
    members = {f"{i}.png": encoded(Image.fromarray(RGBA[::-1] if i else RGBA)) for i in range(2)}
    inputs.archive(tmp_path / "0.tar", members)
    assert main(["index", str(tmp_path), "--background", "#102030"]) == 0
    manifest = manifests.load(tmp_path)
    assert manifest.source["changed"] == {"transparent": 2}
    assert manifest.decode is not None and manifest.decode["background"] == "#102030"
    found = shards.read_all(tmp_path)["x"]
    want = [Picture(background="#102030")(data) for data in members.values()]
    assert np.array_equal(found, np.stack(want))


def test_an_index_of_plain_pictures_is_what_it_was(tmp_path: Path) -> None:
    inputs.archive(
        tmp_path / "0.tar", {f"{i}.png": inputs.png(RGBA[..., i : i + 3]) for i in (0, 1)}
    )
    assert main(["index", str(tmp_path)]) == 0
    manifest = manifests.load(tmp_path)
    assert manifest.decode == {
        "size": None, "channels": 3, "image": None, "label": None, "key": "name", "prefix": False
    }  # fmt: skip
    assert not {"changed", "passed_over"} & manifest.source.keys()
