"""How many samples are copies: nearer to a training image than real images are to each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def copy_rate(real: NDArray, generated: NDArray, quantile: float = 0.01) -> tuple[float, float]:
    """Share of generated images nearer to their nearest real one than the `quantile` of real leave-one-out
    distances, and the same share of real images (about `quantile`, what a set without copies shows).

    Both (N, ...) pixels; Euclidean distance.
    """
    # which takes seconds to import, and images beyond digits are not compared by their pixels
    from sklearn.neighbors import NearestNeighbors

    flat, made = (np.asarray(x, dtype=np.float64).reshape(len(x), -1) for x in (real, generated))
    index = NearestNeighbors(n_neighbors=2).fit(flat)
    own = index.kneighbors(flat)[0][:, 1]  # column 0 is the image itself
    threshold = np.quantile(own, quantile)
    near = index.kneighbors(made, n_neighbors=1)[0][:, 0]
    return float((near < threshold).mean()), float((own < threshold).mean())
