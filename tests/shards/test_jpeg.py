"""JPEGs decoded past Pillow's reading of their segments are Pillow's pixels, and what Pillow refuses is refused."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from shards.errors import BadInputError
from shards.format import jpeg
from shards.format.pictures import Picture

EXIF = Image.Exif()
EXIF[0x0112] = 6


def _encoded(mode: str, side: int, **options: Any) -> bytes:
    levels = np.random.default_rng(side).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(levels).resize((side, side + 3)).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG", exif=EXIF, **options)
    return file.getvalue()


def _by_pillow(data: bytes) -> NDArray[np.uint8] | None:
    try:
        return np.asarray(Image.open(io.BytesIO(data)))
    except (OSError, SyntaxError):
        return None


@pytest.mark.parametrize("mode", ["RGB", "L", "YCbCr"])
@pytest.mark.parametrize("side", [1, 8, 33, 128])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpeg_of_any_kind_and_length_decodes_as_pillow_does(
    mode: str, side: int, progressive: bool, subsampling: int
) -> None:
    whole = _encoded(mode, side, progressive=progressive, subsampling=subsampling, quality=80)
    assert jpeg.decode(whole) is not None
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 2, len(whole) - 1, len(whole)):
        found, wanted = jpeg.decode(whole[:length]), _by_pillow(whole[:length])
        if wanted is None:
            assert found is None, length
        elif found is not None:
            assert np.array_equal(np.asarray(found), wanted), length


def test_jpeg_that_is_not_plain_is_left_to_pillow() -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    for data in (b"", b"\xff\xd8\xff", _encoded("CMYK", 16), file.getvalue()):
        assert jpeg.decode(data) is None


def test_jpeg_with_changed_bytes_is_what_pillow_makes_of_it_or_left_to_pillow() -> None:
    draw = np.random.default_rng(0)
    whole = [_encoded(mode, 40, progressive=p) for mode in ("RGB", "L") for p in (False, True)]
    decoded = 0
    for _ in range(400):
        data = bytearray(whole[draw.integers(len(whole))])
        data[draw.integers(len(data))] = draw.integers(256)
        found, wanted = jpeg.decode(bytes(data)), _by_pillow(bytes(data))
        if found is not None:
            decoded += 1
            assert wanted is not None and np.array_equal(found, wanted)
    assert decoded > 40


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [None, 16])
def test_picture_without_background_gives_the_pixels_of_a_look(
    channels: int, size: int | None
) -> None:
    picture = Picture(channels=channels, size=size)
    for mode in ("RGB", "L", "CMYK"):
        data = _encoded(mode, 40)
        assert np.array_equal(picture(data), picture.look(data).pixels)
    with pytest.raises(BadInputError):
        picture(_encoded("RGB", 40)[:200])


def test_picture_with_background_is_turned_by_its_exif() -> None:
    data = _encoded("RGB", 40)
    assert Picture(background="white")(data).shape == (3, 40, 43)
    assert Picture()(data).shape == (3, 43, 40)
