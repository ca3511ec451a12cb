"""How many samples are copies: nearer to a training image than real images are to each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

ROWS = 1024  # of distances at once


def copy_rate(real: NDArray, generated: NDArray, quantile: float = 0.01) -> tuple[float, float]:
    """Share of generated images nearer to their nearest real one than the `quantile` of real leave-one-out
    distances, and the same share of real images (about `quantile`, what a set without copies shows).

    Both (N, ...) pixels; Euclidean distance.
    """
    flat, made = (np.asarray(x, dtype=np.float64).reshape(len(x), -1) for x in (real, generated))
    own = _nearest(flat, flat, but_itself=True)
    threshold = np.quantile(own, quantile)
    near = _nearest(made, flat)
    return float((near < threshold).mean()), float((own < threshold).mean())


def _nearest(images: NDArray, others: NDArray, *, but_itself: bool = False) -> NDArray:
    """(N,) distances of images (N, P) to the nearest of others (M, P), of which image i may be the i-th itself."""
    found = []
    for first in range(0, len(images), ROWS):
        distances = cdist(images[first : first + ROWS], others)
        if but_itself:
            rows = np.arange(len(distances))
            distances[rows, first + rows] = np.inf
        found.append(distances.min(1))
    return np.concatenate(found)
