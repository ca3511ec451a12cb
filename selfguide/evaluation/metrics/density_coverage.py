"""Density and coverage: precision and recall that one outlier, or one sample in each ball, does not decide.

Naeem et al. 2020, arXiv 2002.09797, equations 4 and 5: balls lie around real images alone. Density counts how many
of them hold a sample, coverage how many real images have a sample in their ball.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from numpy.typing import NDArray
from torch import Tensor

from selfguide.evaluation.metrics.neighbours import CHUNK, pair, radii, tiles
from selfguide.evaluation.progress import Progress, silent


@dataclass(frozen=True)
class DensityCoverage:
    """Density may exceed 1; coverage is a share in 0..1, of equal sets about 1 - 2^-k."""

    density: float
    coverage: float
    real: int
    made: int


def density_coverage(
    features_real: NDArray | Tensor,
    features_made: NDArray | Tensor,
    *,
    k: int = 5,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> DensityCoverage:
    """Of two sets of features (N, D) and (M, D).

    Args:
        k: 5 in the paper, chosen so that equal sets have a coverage above 0.95.

    Raises:
        ValueError: there are no more than k real features.
    """
    real, made = pair(features_real, features_made)
    radius = radii(real, k, chunk=chunk, progress=progress)
    held = torch.zeros(len(real), dtype=torch.int64, device=real.device)
    for rows, _, distances in tiles(real, made, chunk, progress):
        held[rows] += (distances < radius[rows, None]).sum(1)
    density = held.sum().item() / (k * len(made))
    return DensityCoverage(density, (held > 0).double().mean().item(), len(real), len(made))
