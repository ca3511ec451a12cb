"""`python -m tools.sample --beside`: each row of the grid begins with its query image, and the layout found there.

So SGDM's figures 6, 7 and 13 to 19 are made (Hu et al. 2023, arXiv 2210.06462), a real image, its box or mask and
samples of several noises, and SGFM's figures 5 and 6 (arXiv 2312.08825), a query image before its samples.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from selfguide.diffusion.conditions import Condition
from tools import drawing


def sheet(condition: Condition, queries: Tensor, samples: Tensor) -> tuple[Tensor, int]:
    """Tiles (N, 3, H, W) of the grid, row after row, and how many of them make a row.

    Args:
        condition: of all samples (S,), those of one query after those of the other.
        queries: uint8 (R, C, H, W), one a row.
        samples: uint8 (S, C, H, W), S a multiple of R.
    """
    rows, each = len(queries), len(samples) // len(queries)
    parts = [queries[:, None], samples.view(rows, each, *samples.shape[1:])]
    coloured = [part.expand(-1, -1, 3, -1, -1) for part in parts]
    drawn = layouts(condition.map(lambda tensor: tensor[::each]))
    if drawn is not None:
        size = queries.shape[-2:]
        larger = interpolate(drawn.float(), size=size, mode="nearest").to(torch.uint8)
        coloured.insert(1, larger[:, None])
    whole = torch.cat(coloured, 1)
    return whole.flatten(0, 1), whole.shape[1]


def layouts(condition: Condition) -> Tensor | None:
    """uint8 (B, 3, h, w): where a box is, or a colour for each group of a mask or of patches; None without a layout.

    A pixel that belongs to no group is black, and so is all of an image that is not conditioned.
    """
    if condition.spatial is not None:
        most, number = condition.spatial.max(1)
        groups = condition.spatial.shape[1]
        numbers = torch.where(most > 0, number, groups)
    elif condition.patch is not None:
        edge = math.isqrt(condition.patch.shape[1])
        unique, found = condition.patch.flatten(0, 1).unique(dim=0, return_inverse=True)
        groups, numbers = len(unique), found.view(-1, edge, edge)
    else:
        return None
    return palette(groups)[numbers].permute(0, 3, 1, 2)


def palette(groups: int) -> Tensor:
    """uint8 (groups + 1, 3): a colour a group, of a single one white; the last is black."""
    found = np.full((1, 3), 255, dtype=np.uint8) if groups == 1 else drawing.colours(groups)
    return torch.from_numpy(np.concatenate([found, np.zeros((1, 3), dtype=np.uint8)]))
