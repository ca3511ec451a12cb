"""Pictures of sample sets, lossless. No torch: pictures of shards are made without it."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

LINE = 70  # grey between images, which may be black or white at their edges


def sheet(images: NDArray, *, columns: int | None = None, zoom: int) -> NDArray:
    """One picture (H', W', C) of uint8 (N, H, W, C), each pixel `zoom` wide; by default about as wide as high."""
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    found = np.full(
        (rows * (height + 1) - 1, columns * (width + 1) - 1, channels), LINE, dtype=np.uint8
    )
    for i, image in enumerate(images):
        y, x = i // columns * (height + 1), i % columns * (width + 1)
        found[y : y + height, x : x + width] = image
    return found.repeat(zoom, axis=0).repeat(zoom, axis=1)


def png(picture: NDArray) -> bytes:
    """A PNG of uint8 (H, W, 1 or 3)."""
    grey, file = picture.shape[-1] == 1, io.BytesIO()
    Image.fromarray(picture[..., 0] if grey else picture).save(file, format="PNG")
    return file.getvalue()


def write_png(path: Path, picture: NDArray) -> None:
    """`png` as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(picture))


def write_grid(path: Path, images: Tensor, *, columns: int = 16, zoom: int = 4) -> None:
    """A PNG of uint8 images (N, 1 or 3, H, W), `columns` wide, each pixel `zoom` wide."""
    stacked = images.permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
    write_png(path, sheet(stacked, columns=min(columns, len(stacked)), zoom=zoom))
