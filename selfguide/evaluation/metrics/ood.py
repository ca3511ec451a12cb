"""How far samples lie outside of the training distribution: the AUROC of their nearest cosine against the test split's.

Adaloglou et al. 2024 (arXiv 2403.00570, section 5): each image is scored by its largest cosine to a feature of the
training set, and a detector that calls low ones out of distribution is asked to tell samples from test images.
"""

from __future__ import annotations

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from selfguide.evaluation.metrics.neighbours import CHUNK, pair
from selfguide.evaluation.progress import Progress, silent


def ood_auroc(
    features_train: NDArray | Tensor,
    features_made: NDArray | Tensor,
    features_test: NDArray | Tensor,
    *,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> float:
    """Probability that a test image is nearer to the training set than a sample is; ties count half.

    0.5 where samples are as near as unseen images, 1 where all are farther, and below 0.5 where they are nearer than
    any unseen image should be.
    """
    train, made = pair(features_train, features_made)
    _, test = pair(train, features_test)
    of_made, of_test = (
        top_cosine(train, each, chunk=chunk, progress=progress) for each in (made, test)
    )
    ordered = of_made.sort().values
    below = torch.searchsorted(ordered, of_test, side="left")
    up_to = torch.searchsorted(ordered, of_test, side="right")
    return ((below + up_to).double().mean() / (2 * len(made))).item()


def top_cosine(
    train: Tensor, queries: Tensor, *, chunk: int = CHUNK, progress: Progress = silent
) -> Tensor:
    """(M,) the largest cosine of each query (M, D) to the rows of `train` (N, D)."""
    train = normalize(train)
    parts = []
    for some in normalize(queries).split(chunk):
        best = torch.stack([(some @ part.T).amax(1) for part in train.split(chunk)])
        parts.append(best.amax(0))
        progress()
    return torch.cat(parts)
