"""What a source holds before anybody has looked at it, and how bytes of it become samples.

A `Listing` is cheap: names, labels and places. Its `store` gives the bytes of one input, its `decode`
makes them a sample. Both pickle, and open what they read when they first read it: so a listing goes to
any process, and an input is the same bytes wherever it is read.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards import storage
from shards.errors import UserError
from shards.format.header import Header
from shards.sources.source import Stored, encode_keys

if TYPE_CHECKING:
    from PIL.Image import Image

PIXELS = Header(kind="image", shift=127.5, scale=1 / 127.5)  # of uint8, to [-1, 1]
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
# read by Pillow itself; whatever an input is called, its bytes say which it is
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_PNG_LEVEL = 2  # of photographs: a quarter of the default's time, an eighth more bytes


class BadInputError(ValueError):
    """One input that cannot become a sample; the message says why."""


class Store(Protocol):
    def read(self, row: int) -> bytes:
        """The bytes of one input.

        Raises:
            BadInputError: there are none.
        """


class Decode(Protocol):
    """Bytes of one input to a sample (C, H, W); raises BadInputError. `rule` says how, and changes with it."""

    @property
    def rule(self) -> str: ...
    def __call__(self, data: bytes) -> NDArray[np.generic]: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Listing:
    """N inputs; made by `of`."""

    name: str
    keys: NDArray[np.bytes_]
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    classes: int
    store: Store
    places: NDArray[
        np.generic
    ]  # (N,) or (N, k): what changes when an input is replaced, such as its size
    decode: Decode

    @staticmethod
    def of(
        name: str,
        keys: Sequence[str],
        store: Store,
        *,
        decode: Decode,
        places: ArrayLike,
        labels: ArrayLike | None = None,
        class_names: Sequence[str] = (),
        classes: int | None = None,
    ) -> Listing:
        """`classes` defaults to the number of names, and without names to the greatest label + 1."""
        known = None if labels is None else np.asarray(labels)
        if known is not None and known.dtype.kind not in "iu":
            raise UserError(
                f"labels of {name!r} are {known.dtype}: give whole numbers, classes from 0"
            )
        if known is not None and len(known) != len(keys):
            raise UserError(
                f"{len(known)} labels for {len(keys)} samples of {name!r}: give one each"
            )
        if classes is None:
            highest = 0 if known is None or not len(known) else int(known.max()) + 1
            classes = len(class_names) or highest
        return Listing(
            name=name,
            keys=encode_keys(keys) if len(keys) else np.empty(0, dtype="S1"),
            labels=None if known is None else known.astype(np.int64),
            class_names=tuple(class_names),
            classes=classes,
            store=store,
            places=np.asarray(places),
            decode=decode,
        )


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
                plain = image.convert("RGB" if self.channels == 3 else "L")
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


@dataclass(frozen=True, kw_only=True)
class Raw:
    """The bytes of an array, in C order, to a sample; `channels_last` for (H, W, C)."""

    shape: tuple[int, ...]
    dtype: str
    channels_last: bool = False

    @property
    def rule(self) -> str:
        return f"array {self.dtype} {self.shape} {'HWC' if self.channels_last else 'CHW'}"

    def __call__(self, data: bytes) -> NDArray[np.generic]:
        x = np.frombuffer(data, dtype=self.dtype).reshape(self.shape)
        if x.dtype.kind == "f" and not np.isfinite(x).all():
            raise BadInputError("values that are not finite")
        return np.ascontiguousarray(np.moveaxis(x, -1, 0)) if self.channels_last else x


@dataclass(frozen=True, kw_only=True)
class Files:
    """Inputs that are files of their own."""

    root: str
    names: tuple[str, ...]

    def read(self, row: int) -> bytes:
        try:
            return Path(self.root, self.names[row]).read_bytes()
        except FileNotFoundError:
            raise BadInputError("no such file") from None

    def sizes(self) -> list[int]:
        """Bytes of each; -1 where a list names a file that is not there."""
        found = (Path(self.root, name) for name in self.names)
        return [path.stat().st_size if path.is_file() else -1 for path in found]


def spelled(name: str) -> str:
    """A file's or member's name as text; of bytes that are not UTF-8 as they are escaped, \\xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def folder(path: str, what: str) -> Path:
    """An existing folder, as a path.

    Raises:
        UserError: there is none.
    """
    if not Path(path).is_dir():
        state = "is a file" if Path(path).exists() else "does not exist"
        raise UserError(f"{what} {path} {state}: name the folder")
    return Path(path)


def file(path: str, what: str) -> Path:
    """An existing file, as a path.

    Raises:
        UserError: there is none.
    """
    if not Path(path).is_file():
        state = "is a folder" if Path(path).is_dir() else "does not exist"
        raise UserError(f"{what} {path} {state}: name the file")
    return Path(path)


def expand(paths: Sequence[str], suffix: str) -> list[str]:
    """Files, and the files with `suffix` in folders, in sorted order.

    Raises:
        UserError: there are none at one of the paths.
    """
    found = []
    for path in paths:
        if storage.is_remote(path):
            cure = ", or index it where it lies with `python -m tools.shards index`"
            raise UserError(
                f"{path} is on S3, and inputs are read from files: copy it here{cure if suffix == '.tar' else ''}"
            )
        place = Path(path)
        inside = sorted(str(p) for p in place.rglob(f"*{suffix}")) if place.is_dir() else [path]
        missing = [p for p in inside if not Path(p).is_file()]
        if missing or not inside:
            raise UserError(f"{path} holds no {suffix} files: name files, or a folder of them")
        found += inside
    return found
