"""Samples on disk, whoever made them: a folder of lossless images, or a .npz of uint8 (N, H, W, C).

What a file is its bytes say, and not its name. What would not be read as it was drawn is refused: a lossy format moves
a Frechet distance by units, and so do transparent parts, more than 8 bits, or frames behind the first.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from selfguide.spec.metrics import LEAST_SAMPLES
from shards.errors import BadInputError, UserError
from shards.format.pictures import Picture
from shards.sources.arrays import members, read_array
from shards.sources.trees import folder_tree

LOSSLESS = (".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
LOSSY = (".jpg", ".jpeg", ".jfif", ".jpe")
# as Pillow names them
_FORMATS = ("PNG", "BMP", "WEBP", "TIFF", "PPM")
# of a TIFF, tag 259: JPEG of two kinds, JPEG 2000, WebP
_LOSSY_TIFF = (6, 7, 34712, 50001)


class Images:
    """Images of one size, (C, H, W), by their number."""

    def __init__(self, files: Sequence[Path], levels: NDArray[np.generic] | None = None) -> None:
        """One in each file, or `levels`, uint8 (N, H, W, C), from a single file."""
        self._files, self._levels = files, levels
        self._shape = _picture(files[0]).shape if levels is None else ()

    def __len__(self) -> int:
        return len(self._files) if self._levels is None else len(self._levels)

    @property
    def stamp(self) -> list[tuple[str, int, int]]:
        """Path, size and time of each file: other samples have another."""
        found = ((file, file.stat()) for file in self._files)
        return [(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in found]

    def at(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """uint8 (B, C, H, W).

        Raises:
            UserError: an image that cannot be read, or is of another size than the first.
        """
        if self._levels is not None:
            return torch.from_numpy(np.ascontiguousarray(np.moveaxis(self._levels[rows], -1, 1)))
        found = []
        for row in rows:
            picture = _picture(self._files[row])
            if picture.shape != self._shape:
                raise UserError(
                    f"{self._files[row]} is {picture.shape}, and the first image {self._shape}: samples have one size"
                )
            found.append(picture)
        # a decoder may give views, whose order in memory `stack` keeps, and on which a network's rounding depends
        return torch.from_numpy(np.ascontiguousarray(np.stack(found)))


def open_images(path: Path, least: int = LEAST_SAMPLES) -> Images:
    """The samples at a path; at least so many.

    Raises:
        UserError: nothing is there, or what is there are no images of levels 0..255, or too few.
    """
    images = _in_folder(path) if path.is_dir() else _in_file(path)
    if len(images) < least:
        raise UserError(
            f"{path} holds {len(images)} images, too few for a score with its error: give {least} or more"
        )
    return images


def _in_folder(path: Path) -> Images:
    tree = folder_tree(path)
    if tree.flaws:
        folder, flaw = next(iter(tree.flaws.items()))
        raise UserError(f"{path / tree.inside / folder}: {flaw}")
    files = sorted(path / tree.inside / name for name in tree.images)
    if not files:
        raise UserError(f"{path} holds no images: give a folder of {', '.join(LOSSLESS)}")
    if lossy := next((p for p in files if p.suffix.lower() in LOSSY), None):
        raise _lossy(lossy, "JPEG")
    return Images(files)


def _in_file(path: Path) -> Images:
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder")
    names = members(str(path))
    name = "arr_0" if "arr_0" in names else names[0]
    levels = read_array(str(path), name)
    fits = levels.ndim == 4 and levels.shape[-1] in (1, 3) and 0 not in levels.shape[1:]
    if levels.dtype != np.uint8 or not fits:
        finite = levels.dtype.kind != "f" or bool(np.isfinite(levels).all())
        nan = "" if finite else ", some of it NaN or infinite"
        raise UserError(
            f"{path}: {name} is {levels.shape} {levels.dtype}{nan}; give uint8 (N, H, W, 1 or 3) of levels 0..255"
        )
    return Images([path], levels)


def _picture(file: Path) -> NDArray[np.uint8]:
    """(3, H, W)."""
    data = file.read_bytes()
    try:
        found = Picture(background="white").look(data)
    except BadInputError as error:
        raise UserError(f"{file}: {error}") from error
    if found.format not in _FORMATS or _is_lossy(found.format, data):
        raise _lossy(file, found.format)
    if found.traits:
        traits = ", ".join(found.traits)
        raise UserError(
            f"{file} is {traits}: save samples as images of one frame, 8 bits and no transparent parts"
        )
    return found.pixels


def _lossy(file: Path, format: str) -> UserError:
    return UserError(
        f"{file} is a {format}, which moves a Frechet distance by units: save samples lossless, as PNG"
    )


def _is_lossy(format: str, data: bytes) -> bool:
    """Whether an image of a format that has both was compressed with a loss."""
    if format == "WEBP":
        return not _is_lossless_webp(data)
    if format != "TIFF":
        return False
    with Image.open(io.BytesIO(data), formats=["TIFF"]) as image:
        return getattr(image, "tag_v2", {}).get(259) in _LOSSY_TIFF


def _is_lossless_webp(data: bytes) -> bool:
    """Whether the first bitstream of its RIFF chunks is one of VP8L (RFC 9649, section 2)."""
    place = 12
    while place + 8 <= len(data):
        kind, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if kind in (b"VP8 ", b"VP8L"):
            return kind == b"VP8L"
        place += 8 + size + size % 2
    return False
