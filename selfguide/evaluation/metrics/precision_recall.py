"""Improved precision and recall: which share of samples lies among real images, and of real ones among samples.

Kynkaanniemi et al. 2019, arXiv 1904.06991, section 2: a set's manifold is the union of balls around its features,
each out to its k-th nearest neighbour of that set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from numpy.typing import NDArray
from torch import Tensor

from selfguide.evaluation.metrics.neighbours import CHUNK, pair, radii, tiles


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in 0..1, and the sizes of the sets that they depend on."""

    precision: float
    recall: float
    real: int
    made: int


def precision_recall(
    features_real: NDArray | Tensor,
    features_made: NDArray | Tensor,
    *,
    k: int = 3,
    strict: bool = False,
    chunk: int = CHUNK,
) -> PrecisionRecall:
    """Precision and recall of two sets of features (N, D) and (M, D).

    Args:
        k: 3 in the paper and in ADM's evaluator (arXiv 2105.05233), which has 10,000 real and 50,000 made images;
            5 in prdc (Naeem et al. 2020).
        strict: a point on a ball's surface is outside, as in prdc.

    Raises:
        ValueError: a set has no more than k features.
    """
    real, made = pair(features_real, features_made)
    radius_real, radius_made = radii(real, k, chunk=chunk), radii(made, k, chunk=chunk)
    precise = torch.zeros(len(made), dtype=torch.bool, device=made.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    inside = torch.lt if strict else torch.le
    for rows, columns, distances in tiles(real, made, chunk):
        precise[columns] |= inside(distances, radius_real[rows, None]).any(0)
        recalled[rows] |= inside(distances, radius_made[columns]).any(1)
    share = [each.double().mean().item() for each in (precise, recalled)]
    return PrecisionRecall(share[0], share[1], len(real), len(made))
