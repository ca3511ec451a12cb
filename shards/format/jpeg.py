"""Decodes plain JPEGs by Pillow's decoder without its own reading of all segments: a fifth of a small picture's time.

The decoder, libjpeg, reads the file itself; all that it must be given is the size and the kind of pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

_START, _MARKER = b"\xff\xd8", 0xFF
_FRAMES = (
    0xC0,
    0xC1,
    0xC2,
)  # baseline, extended and progressive, in Huffman's code (ITU-T T.81, table B.1)
# markers without a segment, the scan, behind which there are no more headers, and fill bytes
_NO_SEGMENT = (0x01, *range(0xD0, 0xDB), _MARKER)
_MODES = {1: "L", 3: "RGB"}  # by the number of components


def decode(data: bytes) -> Image | None:
    """A grey or RGB image with the pixels that Pillow gives it; None where Pillow must open the file, or refuse it."""
    from PIL import Image

    found = _frame(data)
    if found is None:
        return None
    mode, width, height = found
    if not 0 < width * height <= (Image.MAX_IMAGE_PIXELS or width * height):
        return None
    try:
        return Image.frombytes(mode, (width, height), data, "jpeg", mode, "")
    except (ValueError, OSError):
        return None


def _frame(data: bytes) -> tuple[str, int, int] | None:
    """Mode, width and height of 8 bits a component; None of anything else."""
    if data[:2] != _START:
        return None
    at = 2
    # a marker, and the two bytes of its segment's length
    while at + 4 <= len(data) and data[at] == _MARKER:
        marker = data[at + 1]
        if marker in _FRAMES:
            head = data[at + 4 : at + 10]
            if len(head) < 6 or head[0] != 8 or head[5] not in _MODES:
                return None
            height, width = int.from_bytes(head[1:3], "big"), int.from_bytes(head[3:5], "big")
            return _MODES[head[5]], width, height
        if marker in _NO_SEGMENT:
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
