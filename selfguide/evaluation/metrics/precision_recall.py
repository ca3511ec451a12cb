"""Improved precision and recall: which share of samples lies among real images, and of real ones among samples.

Kynkaanniemi et al. 2019, arXiv 1904.06991, section 2: a set's manifold is the union of balls around its features,
each out to its k-th nearest neighbour of that set. Both depend on k and on the sizes, so that a number means something
under a named definition only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfguide.evaluation.metrics.neighbours import CHUNK, pair, radii, tiles
from selfguide.evaluation.progress import Progress, silent

# keywords of `precision_recall`: Dhariwal and Nichol 2021 (arXiv 2105.05233), whose reference files hold 10,000 images
ADM: Mapping[str, Any] = {"k": 3, "strict": False, "sizes": (10_000, 50_000)}
# Casanova et al. 2021 (arXiv 2109.05070), which self-guided diffusion reports (Hu et al. 2023, appendix A.2)
ICGAN: Mapping[str, Any] = {"k": 5, "strict": True, "sizes": (5_000, 5_000)}


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
    sizes: tuple[int, int] | None = None,
    seed: int = 0,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> PrecisionRecall:
    """Precision and recall of two sets of features (N, D) and (M, D); `ADM` and `ICGAN` are two sets of keywords.

    Args:
        k: 3 in the paper.
        strict: a point on a ball's surface is outside, as in prdc (Naeem et al. 2020).
        sizes: at most so many real and made features, drawn by `seed`; None takes all.

    Raises:
        ValueError: a set has no more than k features.
    """
    real, made = pair(features_real, features_made)
    if sizes is not None:
        real, made = drawn(real, sizes[0], seed), drawn(made, sizes[1], seed + 1)
    radius_real, radius_made = (
        radii(each, k, chunk=chunk, progress=progress) for each in (real, made)
    )
    precise = torch.zeros(len(made), dtype=torch.bool, device=made.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    inside = torch.lt if strict else torch.le
    for rows, columns, distances in tiles(real, made, chunk, progress):
        precise[columns] |= inside(distances, radius_real[rows, None]).any(0)
        recalled[rows] |= inside(distances, radius_made[columns]).any(1)
    share = [each.double().mean().item() for each in (precise, recalled)]
    return PrecisionRecall(share[0], share[1], len(real), len(made))


def drawn(features: Tensor, most: int, seed: int) -> Tensor:
    """At most `most` of the rows, drawn by the seed without replacement; all of them where there are no more."""
    if len(features) <= most:
        return features
    chosen = np.random.default_rng(seed).permutation(len(features))[:most]
    return features[torch.from_numpy(chosen).to(features.device)]
