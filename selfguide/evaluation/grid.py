"""Pictures of sample sets, lossless."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

LINE = 70  # grey between images, which may be black or white at their edges


def write_grid(path: Path, images: Tensor, *, columns: int = 16, zoom: int = 4) -> None:
    """A PNG of uint8 images (N, 1 or 3, H, W), `columns` wide, each pixel `zoom` wide."""
    stacked = images.permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
    count, height, width, channels = stacked.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    sheet = np.full(
        (rows * (height + 1) - 1, columns * (width + 1) - 1, channels), LINE, dtype=np.uint8
    )
    for i, image in enumerate(stacked):
        y, x = (i // columns) * (height + 1), (i % columns) * (width + 1)
        sheet[y : y + height, x : x + width] = image
    grown = sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grown[..., 0] if channels == 1 else grown).save(path, format="PNG")
