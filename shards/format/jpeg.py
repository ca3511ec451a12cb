"""Decodes JPEGs by libjpeg-turbo through simplejpeg: to Pillow's pixels, in less than half of its time.

Pillow uses libjpeg-turbo as well, but reads all segments in Python, and copies the pixels into planes of its own and
out of them again. What this library so much as warns of is left to Pillow, which shows or refuses it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_START = b"\xff\xd8"
_WANTED = {"Gray": "GRAY", "YCbCr": "RGB", "RGB": "RGB"}  # by the colours that a file holds


def decode(data: bytes) -> NDArray[np.uint8] | None:
    """Grey (H, W) or RGB (H, W, 3) levels as Pillow gives them; None where Pillow must open the file, or refuse it."""
    import simplejpeg
    from PIL import Image

    if data[:2] != _START:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in _WANTED or height * width > (Image.MAX_IMAGE_PIXELS or height * width):
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace=_WANTED[colours])
    except ValueError:
        return None
    return pixels[..., 0] if colours == "Gray" else pixels
