"""Masks of an image's groups: from codes of its patches to a group for each pixel, and to groups it shows at all.

A patch belongs to the centroid with the largest cosine. Where codes are STEGO's (`selfguide.discovery.stego`) this is
its cluster probe; where they are a frozen net's own features, and centroids come of k-means, it is a plain stand-in
that must be called by its name. SGDM (Hu et al. 2023, arXiv 2210.06462) conditions a model on the one-hot mask, and on
its maximum over all pixels as a multi-hot.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selfguide.data.crop_flip import Size


def segment(codes: Tensor, centroids: Tensor, size: Size) -> Tensor:
    """The group of each pixel, (B, H, W) int64.

    Args:
        codes: (B, C, h, w) of patches that tile the image.
        centroids: (K, C), of any length.
        size: (H, W), to which codes are brought bilinearly before they are compared (Hamilton et al. 2022).
    """
    wide = F.interpolate(codes, size=size, mode="bilinear", align_corners=False)
    # the length of a code changes no argmax, so only centroids are normalised
    cosines = torch.einsum("bchw,kc->bkhw", wide, F.normalize(centroids, dim=1))
    return cosines.argmax(1)


def multi_hot(masks: Tensor, groups: int) -> Tensor:
    """Masks (B, H, W) of groups -> (B, K) uint8, 1 where a group has a pixel."""
    found = torch.zeros(len(masks), groups, dtype=torch.uint8, device=masks.device)
    return found.scatter_(1, masks.flatten(1).long(), 1)
