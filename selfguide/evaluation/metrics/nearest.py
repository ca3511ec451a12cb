"""Which training image each sample is nearest to, and how many samples are nearer than images are to each other.

A sample that is nearer to a training image than all but 1 % of these are to their own nearest is taken for a copy, as
`copy_rate` has it for pixels; here in features, in chunks, and with the index that a panel of neighbours shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from numpy.typing import NDArray
from torch import Tensor

from selfguide.evaluation.metrics.neighbours import CHUNK, pair, radii, tiles
from selfguide.evaluation.progress import Progress, silent


@dataclass(frozen=True, eq=False)
class NearestReference:
    """Of M samples, the nearest real image (M,) and how far it is (M,); and of both sets the share of copies."""

    index: Tensor
    distance: Tensor
    # below which a sample counts as a copy
    threshold: float
    rate: float
    # of real images among each other, about the quantile
    rate_real: float


def nearest_reference(
    features_real: NDArray | Tensor,
    features_made: NDArray | Tensor,
    *,
    quantile: float = 0.01,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> NearestReference:
    """The nearest of real features (N, D) to each made one (M, D); of equally near ones the first."""
    real, made = pair(features_real, features_made)
    distance = torch.full((len(made),), torch.inf, dtype=made.dtype, device=made.device)
    index = torch.zeros(len(made), dtype=torch.int64, device=made.device)
    for rows, columns, distances in tiles(made, real, chunk, progress):
        found = distances.min(1)
        nearer = found.values < distance[rows]
        index[rows] = torch.where(nearer, found.indices + columns.start, index[rows])
        distance[rows] = torch.where(nearer, found.values, distance[rows])
    own = radii(real, 1, chunk=chunk, progress=progress)
    threshold = own.double().quantile(quantile)
    rates = [(each.double() < threshold).double().mean().item() for each in (distance, own)]
    return NearestReference(index, distance, threshold.item(), rates[0], rates[1])
