"""Kernel Inception Distance: the unbiased squared maximum mean discrepancy of features under a cubic kernel.

Binkowski et al. 2018, arXiv 1801.01401, section 3: k(x, y) = (x.y / D + 1)^3, averaged over random subsets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from selfguide.evaluation.metrics.moments import Array, as_matrix
from selfguide.evaluation.progress import Progress, silent


@dataclass(frozen=True)
class KernelDistance:
    """Mean over subsets, and their standard deviation; the mean may lie below 0 where sets are alike."""

    value: float
    sd: float


def kid(
    features_real: NDArray | Tensor,
    features_made: NDArray | Tensor,
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 2020,
    progress: Progress = silent,
) -> KernelDistance:
    """The distance of two sets of features (N, D) and (M, D).

    Subsets are drawn as torch-fidelity draws them: 100 of 1,000 images.

    Raises:
        ValueError: a set has fewer features than a subset, or another width.
    """
    real, made = as_matrix(features_real), as_matrix(features_made)
    if real.shape[1] != made.shape[1]:
        raise ValueError(f"features of widths {real.shape[1]} and {made.shape[1]}")
    if not 2 <= size <= min(len(real), len(made)):
        raise ValueError(f"{len(real)} and {len(made)} features have no subsets of {size}")
    generator = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        x = made[generator.choice(len(made), size, replace=False)]
        y = real[generator.choice(len(real), size, replace=False)]
        found.append(_mmd(x, y))
        progress()
    return KernelDistance(float(np.mean(found)), float(np.std(found)))


def _mmd(x: Array, y: Array) -> float:
    """Unbiased, of two sets of as many."""
    count = len(x)
    same = sum(kernel.sum() - np.trace(kernel) for kernel in (_cubic(x, x), _cubic(y, y)))
    return float(same / (count * (count - 1)) - 2 * _cubic(x, y).mean())


def _cubic(x: Array, y: Array) -> Array:
    return (x @ y.T / x.shape[1] + 1) ** 3
