"""Encoded images: bytes to pixels by Pillow, and the bytes that shards keep of them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.errors import BadInputError, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
# read by Pillow itself; whatever an input is called, its bytes say which it is
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_PNG_LEVEL = 2  # of photographs: a quarter of the default's time, an eighth more bytes


class Stored(NamedTuple):
    """A picture as it is kept: encoded, and what it decodes to."""

    extension: str
    data: bytes
    pixels: NDArray[np.uint8]  # (C, H, W)
    about: bytes | None = None  # JSON that is kept beside it


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An encoded image to uint8 (C, H, W), by Pillow: the first frame, alpha dropped, EXIF not applied.

    With `size` it becomes size x size the way of Dhariwal and Nichol 2021 (arXiv 2105.05233): halved by
    a box filter while the short side is at least twice `size`, brought to `size` by a bicubic filter,
    and cropped about its centre. Without, it stays as large as it is.
    """

    size: int | None = None
    channels: int = 3  # 3 RGB, 1 grey

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise UserError(f"size={self.size}: give at least 1 pixel")
        if self.channels not in (1, 3):
            raise UserError(f"channels={self.channels}: give 3 for RGB or 1 for grey levels")

    @property
    def rule(self) -> str:
        from PIL import __version__

        cut = f"box-bicubic-centre-{self.size}" if self.size else "as-is"
        return f"{'rgb' if self.channels == 3 else 'grey'} {cut} pillow-{__version__}"

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        from PIL import Image, UnidentifiedImageError

        try:
            with _opened(data) as image:
                if image.mode.startswith(("I", "F")):
                    raise BadInputError(
                        f"pixels of mode {image.mode} do not fit 8 bits: convert them"
                    )
                image.load()
                plain = self._opaque(image)
        except UnidentifiedImageError:
            raise BadInputError(f"no image: none of {', '.join(_FORMATS)}") from None
        except Image.DecompressionBombError as error:
            raise BadInputError(str(error)) from None
        except (BadInputError, MemoryError):  # which says nothing of the image
            raise
        except Exception as error:  # noqa: BLE001 - of what an odd image makes Pillow raise there is no list
            raise BadInputError(f"damaged image: {error or type(error).__name__}") from None
        pixels = np.asarray(plain if self.size is None else _fit(plain, self.size))
        return np.ascontiguousarray(
            pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)
        )

    def _opaque(self, image: Image) -> Image:
        """RGB or grey."""
        return image.convert("RGB" if self.channels == 3 else "L")

    def stored(self, data: bytes) -> Stored:
        """The picture as shards keep it: its own bytes where it stays as it is, else a PNG of what it became.

        A reader opens either with `size` None, to the same pixels.
        """
        pixels = self(data)
        extension = _extension(data)
        if self.size is None and f".{extension}" in SUFFIXES:
            return Stored(extension, data, pixels)
        return Stored("png", _png(pixels), pixels)


def _opened(data: bytes) -> Image:
    """By Pillow, if of a known format: of others some are given to programs of this machine, as EPS to Ghostscript."""
    from PIL import Image

    return Image.open(io.BytesIO(data), formats=_FORMATS)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    image = pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
    Image.fromarray(image).save(file, format="PNG", compress_level=_PNG_LEVEL)
    return file.getvalue()


def _extension(data: bytes) -> str:
    """What readers of WebDataset know the encoding by; MPO is JPEG to those who want its first frame."""
    with _opened(data) as image:
        name = (image.format or "").lower()
    return {"jpeg": "jpg", "mpo": "jpg"}.get(name, name)


def _fit(image: Image, size: int) -> Image:
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))
