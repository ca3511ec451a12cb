"""LOST: one box an image, around the object that its own features single out (Simeoni et al. 2021, arXiv 2109.14279).

Patches of an object resemble few others, those of the background many. So the patch with the fewest positive
correlations is the seed, patches of low degree that resemble it join it, and the box is drawn around the connected
patches that resemble all of these together (section 3). SGDM (Hu et al. 2023, arXiv 2210.06462) conditions a model on
the filled box as one more input channel.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from selfguide.data.crop_flip import Size

K_PATCHES = 100  # of the lowest degree, which may join the seed (LOST, section 4.1)

Box = tuple[int, int, int, int]  # top, left, bottom, right; ends excluded


def lost_boxes(features: Tensor, grid: Size, *, k_patches: int = K_PATCHES) -> Tensor:
    """(B, 4) int64 on the CPU: the box of each image, in patches.

    Args:
        features: (B, n, d) of its patches in row order, without [CLS]: keys of the last attention, not normalised.
        grid: (h, w), where h w = n.
        k_patches: how many patches of the lowest degree may join the seed.

    Raises:
        ValueError: features of another number of patches.
    """
    height, width = grid
    if features.ndim != 3 or features.shape[1] != height * width:
        raise ValueError(f"features {tuple(features.shape)} for a grid of {height} x {width}")
    alike = features.float() @ features.float().mT  # (B, n, n), of either sign
    positive = alike > 0
    # a patch is no neighbour of itself, which only rows of zeros would show in the order
    degree = positive.sum(2) - positive.diagonal(dim1=1, dim2=2).long()  # (B, n)
    # stable: among equal degrees the first patch in row order, on every device
    potential = degree.argsort(dim=1, stable=True)[:, :k_patches]  # (B, k)
    seed = potential[:, 0]
    rows = torch.arange(len(features), device=features.device)
    joins = positive[rows[:, None], seed[:, None], potential]  # (B, k), the seed among them
    companions = alike[rows[:, None], potential]  # (B, k, n)
    together = (companions * joins[:, :, None]).sum(1)  # (B, n)
    masks = (together > 0).view(-1, height, width).cpu().numpy()
    found = [_around(mask, divmod(s, width)) for mask, s in zip(masks, seed.tolist(), strict=True)]
    return torch.tensor(found)


def _around(mask: np.ndarray, seed: tuple[int, int]) -> Box:
    """The tight box of the 4-connected piece of `mask` (h, w) that holds the seed; the seed's patch where none does."""
    row, column = seed
    if not mask[seed]:
        return row, column, row + 1, column + 1
    pieces, _ = ndimage.label(mask)  # 4-connected by default
    rows, columns = ndimage.find_objects(pieces)[pieces[seed] - 1]
    return rows.start, columns.start, rows.stop, columns.stop


def in_pixels(boxes: Tensor, patch: float, image: Size) -> Tensor:
    """Boxes (B, 4) in patches of so many pixels -> in pixels of an image of this size, to which they are clipped.

    Patches lie on the image from its top left corner, over its right and bottom edge where it does not divide. Where
    they are smaller than pixels a box still has one.
    """
    bounds = torch.tensor(image)
    start, end = (boxes * patch).round().long().split(2, dim=1)  # (B, 2) each
    start = start.minimum(bounds - 1)
    return torch.cat((start, end.minimum(bounds).maximum(start + 1)), dim=1)
