"""Decodes plain PNGs by libspng through imagecodecs: to Pillow's pixels, in little more than half of its time.

Pillow reads chunks in Python, and copies the pixels once more. A file with a chunk that could change what Pillow shows,
such as a palette, a transparent colour or an orientation, is left to it, and so is a damaged one.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

_START = b"\x89PNG\r\n\x1a\n"
# of 8 bits a channel, not interlaced: grey, RGB, RGB with alpha
_KINDS = tuple(bytes((8, colour, 0, 0, 0)) for colour in (0, 2, 6))
# beside the header and the pixels; of a colour space neither library takes notice
_PLAIN = (b"IEND", b"bKGD", b"cHRM", b"gAMA", b"pHYs", b"sBIT", b"sRGB", b"tIME")


def decode(data: bytes) -> NDArray[np.uint8] | None:
    """Grey (H, W), RGB (H, W, 3) or RGBA (H, W, 4) levels; None where Pillow must open the file, or refuse it."""
    if not _is_plain(data):
        return None
    import imagecodecs

    try:
        # not `png_decode`: each of its errors takes a reference to None too many, until Python aborts (2026.3.6)
        pixels: NDArray[np.uint8] = imagecodecs.spng_decode(data)
    except imagecodecs.SpngError:
        return None
    return pixels


def _is_plain(data: bytes) -> bool:
    """Whether it is whole, of a kind and a size that are decoded here, and holds nothing but `_PLAIN` and short texts.

    libspng checks the sums of the pixels' own chunks.
    """
    from PIL import Image

    if data[:8] != _START or data[12:16] != b"IHDR" or data[24:29] not in _KINDS:
        return False
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if height * width > (Image.MAX_IMAGE_PIXELS or height * width):
        return False
    at, kind, pixels = 8, b"", 0
    while kind != b"IEND":
        length, before, kind = (
            int.from_bytes(data[at : at + 4], "big"),
            kind,
            bytes(data[at + 4 : at + 8]),
        )
        end = at + 8 + length
        if len(data) < end + 4:
            return False
        if kind == b"IDAT":
            # Pillow ends at the first other chunk
            pixels += before != b"IDAT"
        else:
            body = data[at + 4 : end]
            if zlib.crc32(body) != int.from_bytes(data[end : end + 4], "big"):
                return False
            text = kind == b"tEXt" and length < 1024 and not _may_turn(body[4:])
            if not (kind in _PLAIN or text or (kind == b"IHDR" and at == 8)):
                return False
        at = end + 4
    return pixels == 1


def _may_turn(text: bytes) -> bool:
    """Whether Pillow may find an orientation in it: ImageMagick keeps EXIF as such a text, and XMP has one, too."""
    return bytes(text[:3]) in (b"Raw", b"XML")
