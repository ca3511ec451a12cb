"""How images reach the size that a feature net takes: two resizes that scores are named after, and that never mix."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Resize = Callable[[Tensor, int], Tensor]  # float levels (B, C, H, W) -> (B, C, size, size)


def tf1_bilinear(levels: Tensor, size: int) -> Tensor:
    """TensorFlow 1's bilinear resize: pixel i of the output lies at i * in / out, without half a pixel's shift.

    It is what the graph behind ADM's reference statistics does, in float32 and in this order of operations.
    """
    height, width = levels.shape[-2:]
    top, bottom, dy = _neighbours(height, size, levels)
    left, right, dx = _neighbours(width, size, levels)
    upper, lower = levels[:, :, top], levels[:, :, bottom]
    first = upper[..., left] + (upper[..., right] - upper[..., left]) * dx
    second = lower[..., left] + (lower[..., right] - lower[..., left]) * dx
    return first + (second - first) * dy[:, None]


def bicubic_antialiased(levels: Tensor, size: int) -> Tensor:
    """Bicubic with a filter as wide as the step, in float and cut to 0..255: clean-fid's, which asks Pillow for it."""
    found = F.interpolate(levels, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return found.clamp(0, 255)


def _neighbours(length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(size,) the pixel before and the one after each place, and the way from the first to the second in 0..1."""
    scale = torch.tensor(length / size, dtype=torch.float32, device=like.device)
    place = torch.arange(size, dtype=torch.float32, device=like.device) * scale
    before = place.long()
    return before, (before + 1).clamp_max(length - 1), place - before.float()


RESIZES: dict[str, Resize] = {
    "TF1 bilinear": tf1_bilinear,
    "bicubic, antialiased, float": bicubic_antialiased,
}
