"""Pictures of sample sets, lossless."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def write_grid(path: Path, pixels: Tensor, top: int, *, columns: int = 16, zoom: int = 4) -> None:
    """A PNG of grey images (N, 1, H, W) with levels 0..top, `columns` wide, each pixel `zoom` wide."""
    images = pixels[:, 0].numpy().astype(np.float64) * (255 / top)
    count, height, width = images.shape
    rows = -(-count // columns)
    # grey lines between images that are black at their edges
    sheet = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1), 70.0)
    for i, image in enumerate(images):
        y, x = (i // columns) * (height + 1), (i % columns) * (width + 1)
        sheet[y : y + height, x : x + width] = image
    grown = np.kron(sheet.round().astype(np.uint8), np.ones((zoom, zoom), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grown).save(path, format="PNG")
