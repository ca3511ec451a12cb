"""Encoded images: bytes to pixels by Pillow, and the bytes that shards keep of them."""

from __future__ import annotations

import functools
import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.errors import BadInputError, UserError
from shards.format import jpeg, png

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
# further names of pictures that are read, and kept as PNG: readers of WebDataset do not know them
OTHERS = frozenset((".jfif", ".jpe", ".avif", ".jp2", ".j2k", ".jpx", ".pbm", ".pnm", ".dib"))
# read by Pillow itself; whatever an input is called, its bytes say which it is
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP", "AVIF")
# what a file is that is none of them
NO_IMAGE = f"no image: none of {', '.join(_FORMATS)}"
_CODESTREAM = b"\xff\x4f\xff\x51"  # of JPEG 2000
# what files of these formats begin with; AVIF's stands behind four bytes
_MAGIC = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF8",
    b"BM",
    b"II*\0",
    b"MM\0*",
    _CODESTREAM,
    b"\0\0\0\x0cjP",
)
HEAD = 16  # bytes that `is_picture` wants
REFUSE = "refuse"
# what `Picture` changes of an input beside its size, as summaries name it; deeper ones of formats whose levels Pillow
# does not give, as colour in JPEG 2000, are decoded to 8 bits by it: they differ from rounded ones by a level at most
TRAITS = (
    "transparent",
    "rotated",
    "enlarged",
    "of 16 bits",
    "decoded to 8 bits",
    "animated",
    "CMYK",
)
_ORIENTATION = 0x0112  # EXIF tag: 1 is upright
_PNG_LEVEL = 2  # of photographs: a quarter of the default's time, an eighth more bytes


class Stored(NamedTuple):
    """A picture as it is kept: encoded, and what it decodes to."""

    extension: str
    data: bytes
    pixels: NDArray[np.uint8]  # (C, H, W)
    about: bytes | None = None  # JSON that is kept beside it


class Look(NamedTuple):
    """A picture's pixels (C, H, W), the `TRAITS` that it has, and Pillow's name of its format."""

    pixels: NDArray[np.uint8]
    traits: tuple[str, ...]
    format: str


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An encoded image to uint8 (C, H, W), by Pillow: the first frame.

    With `size` it becomes size x size the way of Dhariwal and Nichol 2021 (arXiv 2105.05233): halved by
    a box filter while the short side is at least twice `size`, brought to `size` by a bicubic filter,
    and cropped about its centre. Without, it stays as large as it is.

    With a `background`, transparent parts show that colour, or are refused; the image is turned as its EXIF
    orientation says; and 16 bits a channel are rounded to 8. Without, alpha is dropped, the orientation is ignored and
    the lower 8 bits are cut: so are pictures read that are stored as what they became, and older data sets.
    """

    size: int | None = None
    channels: int = 3  # 3 RGB, 1 grey
    background: str | None = None  # a colour as Pillow names it, or "refuse"

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise UserError(f"size={self.size}: give at least 1 pixel")
        if self.channels not in (1, 3):
            raise UserError(f"channels={self.channels}: give 3 for RGB or 1 for grey levels")
        if self.background not in (None, REFUSE):
            _colour(str(self.background))

    @property
    def rule(self) -> str:
        from PIL import __version__

        cut = f"box-bicubic-centre-{self.size}" if self.size else "as-is"
        return f"{'rgb' if self.channels == 3 else 'grey'} {cut} pillow-{__version__}"

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        """The sample alone, perhaps a view of (H, W, C). A JPEG whose orientation does not matter needs no Pillow."""
        pixels = _decoded(data) if self.background is None else None
        if pixels is None:
            return self.look(data).pixels
        if self.size is None and pixels.ndim == (3 if self.channels == 3 else 2):
            return _channels_first(pixels[..., :3] if self.channels == 3 else pixels)
        from PIL import Image

        return self._pixels(self._opaque(Image.fromarray(pixels)))

    def look(self, data: bytes) -> Look:
        """The sample, and what was done to it; raises BadInputError where it is no image or not one that is wanted."""
        from PIL import Image, UnidentifiedImageError

        try:
            if (pixels := png.decode(data)) is not None:
                kind, (plain, traits) = "PNG", self._upright(Image.fromarray(pixels))
            else:
                kind, plain, traits = self._by_pillow(data)
        except UnidentifiedImageError:
            raise BadInputError(NO_IMAGE) from None
        except Image.DecompressionBombError as error:
            raise BadInputError(f"{error} Make it smaller") from None
        except (BadInputError, MemoryError):  # which says nothing of the image
            raise
        except Exception as error:  # noqa: BLE001 - of what an odd image makes Pillow raise there is no list
            raise BadInputError(f"damaged image: {error or type(error).__name__}") from None
        if self.size is not None and min(plain.size) < self.size:
            traits.append("enlarged")
        return Look(self._pixels(plain), tuple(traits), kind)

    def _by_pillow(self, data: bytes) -> tuple[str, Image, list[str]]:
        """Pillow's name of the format, RGB or grey, and what was done to it."""
        with _opened(data) as image:
            if image.mode.startswith(("I", "F")) and not (self.background and _deep_grey(image)):
                raise BadInputError(f"pixels of mode {image.mode} do not fit 8 bits: convert them")
            return image.format or "", *self._plain(image, data)

    def _pixels(self, image: Image) -> NDArray[np.uint8]:
        """RGB or grey to (C, H, W), of the size that is wanted."""
        pixels = np.asarray(image if self.size is None else _fit(image, self.size))
        return np.ascontiguousarray(_channels_first(pixels))

    def _plain(self, image: ImageFile, data: bytes) -> tuple[Image, list[str]]:
        """RGB or grey, and what was done to it."""
        if self.background is None:
            image.load()
            return self._opaque(image), []
        from PIL import ImageOps

        traits = []
        if getattr(image, "is_animated", False) and image.format != "MPO":
            traits.append("animated")
        if image.mode == "CMYK":
            traits.append("CMYK")
        # Pillow turns a TIFF when it is loaded, and then forgets that it did
        turned = image.format == "TIFF" and image.getexif().get(_ORIENTATION, 1) in range(2, 9)
        deeper = _decoded_to_8_bits(image, data)
        plain, deep = _rounded(image)
        if deep:
            traits.append("of 16 bits")
        elif deeper:
            traits.append("decoded to 8 bits")
        if plain.getexif().get(_ORIENTATION, 1) in range(2, 9):
            turned, plain = True, ImageOps.exif_transpose(plain)
        if turned:
            traits.append("rotated")
        opaque, transparent = self._upright(plain)
        return opaque, traits + transparent

    def _upright(self, plain: Image) -> tuple[Image, list[str]]:
        """An image of 8 bits that stands as it should, as RGB or grey, and whether anything shone through it."""
        traits = []
        if self.background is not None and plain.has_transparency_data:
            from PIL import Image as images

            layered = plain.convert("RGBA")
            if np.asarray(layered.getchannel("A")).min() < 255:
                traits.append("transparent")
                if self.background == REFUSE:
                    raise BadInputError("it has transparent parts: give --background COLOUR")
                paper = images.new("RGBA", layered.size, _colour(self.background))
                plain = images.alpha_composite(paper, layered)
        return self._opaque(plain), traits

    def _opaque(self, image: Image) -> Image:
        """RGB or grey."""
        mode = "RGB" if self.channels == 3 else "L"
        return image if image.mode == mode else image.convert(mode)

    def stored(self, data: bytes) -> Stored:
        """The picture as shards keep it: its own bytes where it stays as it is, else a PNG of what it became.

        A reader opens either with `size` and `background` None, to the same pixels.
        """
        look = self.look(data)
        own = self.own_extension(look)
        return Stored(own, data, look.pixels) if own else as_png(look.pixels)

    def own_extension(self, look: Look) -> str:
        """What readers of WebDataset know the input's own bytes by, where shards keep these; else empty."""
        changed = {"transparent", "rotated", "of 16 bits"}.intersection(look.traits)
        # MPO is JPEG to those who want its first frame
        extension = {"JPEG": "jpg", "MPO": "jpg"}.get(look.format, look.format.lower())
        kept = self.size is None and f".{extension}" in SUFFIXES and not changed
        return extension if kept else ""


def _decoded(data: bytes) -> NDArray[np.uint8] | None:
    """Without Pillow, where that gives its pixels: grey (H, W), RGB (H, W, 3) or RGBA (H, W, 4)."""
    pixels = jpeg.decode(data)
    return png.decode(data) if pixels is None else pixels


def _channels_first(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey (H, W) or RGB (H, W, 3) as (C, H, W), without a copy."""
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def as_png(pixels: NDArray[np.uint8]) -> Stored:
    """Pixels (C, H, W) as shards keep them where they are not an input's own."""
    return Stored("png", _png(pixels), pixels)


def is_picture(head: bytes) -> bool:
    """Whether a file that begins with `head`, `HEAD` bytes, is of a format that is read here."""
    boxed = head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis")
    return head.startswith(_MAGIC) or boxed or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _colour(name: str) -> tuple[int, int, int, int]:
    """Red, green, blue and 255 of a colour.

    Raises:
        UserError: no colour of Pillow's, or one that is transparent itself.
    """
    from PIL import ImageColor

    try:
        red, green, blue, alpha = ImageColor.getcolor(name, "RGBA")  # type: ignore[misc]
    except ValueError:
        alpha = -1
    if alpha != 255:
        raise UserError(
            f"background={name!r} is no opaque colour: give a name such as white, '#rrggbb', or {REFUSE}"
        )
    return red, green, blue, alpha


def _rounded(image: ImageFile) -> tuple[Image, bool]:
    """An image of 16 bits a channel in 8, rounded, and whether it is one; Pillow alone cuts the lower 8 bits.

    It has all bits of grey. Of colour its decoders unpack the upper byte of each channel or the lower one, by the byte
    order they are given; so the file is decoded with both.
    """
    if _deep_grey(image):
        return _eight_bits(image, np.asarray(image, dtype=np.uint32)), True
    swapped = [other for tile in image.tile if (other := _other_byte(tile)) is not None]
    if not swapped or len(swapped) < len(image.tile):
        image.load()
        return image, False
    source = image.fp
    assert source is not None
    source.seek(0)
    twin = _opened(source.read())
    twin.tile = swapped
    upper = np.asarray(image, dtype=np.uint32)
    try:
        lower = np.asarray(twin, dtype=np.uint32)
    except ValueError:
        # Pillow has no such decoder for grey with alpha: then the upper byte stands for both
        lower = upper
    return _eight_bits(image, upper * 256 + lower), True


def _eight_bits(image: ImageFile, levels: NDArray[np.uint32]) -> Image:
    """The image with its levels from 0 to 65535 as such from 0 to 255: x / 257, rounded."""
    from PIL import Image as images

    if "transparency" in image.info:
        raise BadInputError("16 bits a channel with a transparent colour: convert it to 8 bits")
    made = images.fromarray(((levels + 128) // 257).astype(np.uint8))
    exif = image.getexif()
    if _ORIENTATION in exif:
        made.getexif()[_ORIENTATION] = exif[_ORIENTATION]
    return made


def _deep_grey(image: ImageFile) -> bool:
    """Whether it has grey levels from 0 to 65535; Pillow stretches those of PGM and JPEG 2000 to that range."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _decoded_to_8_bits(image: ImageFile, data: bytes) -> bool:
    """Whether the file has more bits a channel than Pillow makes of colour in it.

    By the maximum of a PPM, the precision in the SIZ segment of a JPEG 2000 codestream (ISO 15444-1, A.5.1), and the
    flag `high_bitdepth` of AVIF's `av1C` box (AV1 in ISOBMFF, 2.3.3).
    """
    if image.format == "PPM":
        return any(isinstance(tile.args, tuple) and tile.args[1] > 255 for tile in image.tile)
    if image.format == "AVIF":
        _, box, configuration = data.partition(b"av1C")
        return bool(box) and bool(configuration[2] & 0x40)
    if image.format == "JPEG2000":
        segment = data[data.find(_CODESTREAM) :]
        channels = int.from_bytes(segment[40:42], "big")
        return any(byte & 0x7F > 7 for byte in segment[42 : 42 + 3 * channels : 3])
    return False


def _other_byte(tile: Any) -> Any | None:
    """A tile whose decoder takes the other byte of 16 bits; None where it takes all there is."""
    arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
    pairs = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B"}
    ends = {end: other for end, other in pairs.items() for a in arguments if str(a).endswith(end)}
    if not ends:
        return None
    end, other = next(iter(ends.items()))
    changed = tuple(a.replace(end, other) if str(a).endswith(end) else a for a in arguments)
    return tile._replace(args=changed if isinstance(tile.args, tuple) else changed[0])


def _opened(data: bytes) -> ImageFile:
    """By Pillow, if of a known format: of others some are given to programs of this machine, as EPS to Ghostscript."""
    from PIL import Image

    _be_quiet()
    return Image.open(io.BytesIO(data), formats=_FORMATS)


@functools.cache
def _be_quiet() -> None:
    """Pillow warns of large images, once a process and with a line of its own source; twice as large it refuses."""
    from PIL import Image

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    image = pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
    Image.fromarray(image).save(file, format="PNG", compress_level=_PNG_LEVEL)
    return file.getvalue()


class Window(NamedTuple):
    """Where `Picture(size=...)` cuts: the size that an image is brought to, and the window's corner in that."""

    width: int
    height: int
    left: int
    top: int


def window(width: int, height: int, size: int) -> Window:
    """Of an image of so many pixels; for what lies on its pixels, such as people's boxes."""
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
    scale = size / min(width, height)
    width, height = (max(size, round(side * scale)) for side in (width, height))
    return Window(width, height, (width - size) // 2, (height - size) // 2)


def _fit(image: Image, size: int) -> Image:
    from PIL.Image import Resampling

    width, height, left, top = window(*image.size, size)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    image = image.resize((width, height), Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))
