"""Conditional Frechet distance: how far the samples of each cluster are from the real images of that cluster.

Miyato and Koyama 2018 (arXiv 1802.05637) take its mean over classes as intra-FID; here over the clusters that a model
found by itself. A model may match the whole set, and nobody see that its clusters mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from selfguide.evaluation.metrics.frechet import between
from selfguide.evaluation.metrics.moments import Array, Moments, as_matrix

Ids = NDArray[np.integer]


@dataclass(frozen=True)
class ClusterFrechet:
    """Mean over clusters, each by its share of real images; the distance in each; and the clusters left out."""

    value: float
    each: Mapping[int, float]
    # clusters of real images that have too few of them, or of samples
    left_out: tuple[int, ...]


def cluster_frechet(
    features_real: NDArray | Tensor,
    clusters_real: Ids,
    features_made: NDArray | Tensor,
    clusters_made: Ids,
    *,
    least: int = 2,
) -> ClusterFrechet:
    """Of real features (N, D) in clusters (N,), and made ones (M, D) in the clusters (M,) that they were made for.

    Small sets have a large bias, the more clusters the larger: compare models at equal numbers in each.

    Args:
        least: images that a cluster needs in both sets to count.

    Raises:
        ValueError: ids do not belong to the features, or no cluster counts.
    """
    real, made = as_matrix(features_real), as_matrix(features_made)
    if len(real) != len(clusters_real) or len(made) != len(clusters_made):
        raise ValueError("as many clusters as features")
    each, sizes, left_out = {}, [], []
    for cluster in np.unique(clusters_real):
        a, b = real[clusters_real == cluster], made[clusters_made == cluster]
        if min(len(a), len(b)) < max(least, 2):
            left_out.append(int(cluster))
            continue
        each[int(cluster)] = between_few(a, b)
        sizes.append(len(a))
    if not each:
        raise ValueError(f"no cluster has {least} real and {least} made images")
    mean = float(np.average(list(each.values()), weights=sizes))
    return ClusterFrechet(mean, each, tuple(left_out))


def between_few(a: Array, b: Array) -> float:
    """The Frechet distance of features (n, D) and (m, D), at a cost that does not grow as D^3 where they are few.

    With centred features A and B, tr (S_a^1/2 S_b S_a^1/2)^1/2 is the sum of the singular values of A B^T, up to
    sqrt((n - 1)(m - 1)): both have the eigenvalues of S_a S_b.
    """
    if min(len(a), len(b)) > a.shape[1]:
        return between(Moments.of(a), Moments.of(b))
    first, second = ((each - each.mean(0)) / np.sqrt(len(each) - 1) for each in (a, b))
    shift = a.mean(0) - b.mean(0)
    cross = np.linalg.svd(first @ second.T, compute_uv=False).sum()
    return float(shift @ shift + (first**2).sum() + (second**2).sum() - 2 * cross)
