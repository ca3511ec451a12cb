"""Inception Score: how certain a classifier is of each image, and how many classes it finds over all of them.

Salimans et al. 2016, arXiv 1606.03498. Images are shuffled first: blocks of images that are sorted by label would
each hold few classes, and score a quarter of what they should.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfguide.evaluation.metrics.moments import as_matrix


@dataclass(frozen=True)
class InceptionScore:
    """Mean over splits, and their standard deviation with `ddof` degrees of freedom less."""

    value: float
    sd: float
    ddof: int


def inception_score(
    logits: NDArray | Tensor, *, splits: int = 10, seed: int | None = 2020, ddof: int = 0
) -> InceptionScore:
    """The score of (N, K) class logits, without the classifier's bias where a protocol says so.

    Args:
        splits: the set is cut into; 10 of 50,000 images in Salimans et al.
        seed: of the shuffle, as torch-fidelity draws it; None leaves the order as it is, as ADM's evaluator does.
        ddof: 0 for torch-fidelity and most papers, 1 for torchmetrics.

    Raises:
        ValueError: there are fewer images than splits, or logits that are not finite.
    """
    wide = as_matrix(logits)
    count = len(wide)
    if not 1 <= splits <= count:
        raise ValueError(f"{count} images make no {splits} splits")
    if seed is not None:
        wide = wide[np.random.RandomState(seed).permutation(count)]
    log_p = torch.from_numpy(wide).log_softmax(1)
    p = log_p.exp()
    scores = []
    for i in range(splits):
        part = slice(i * count // splits, (i + 1) * count // splits)
        # KL of each image from the mean, as cross entropy less entropy
        log_mean = p[part].mean(0).log()
        divergence = torch.xlogy(p[part], p[part]).sum(1) - _expected(p[part], log_mean)
        scores.append(divergence.mean().exp().item())
    return InceptionScore(float(np.mean(scores)), float(np.std(scores, ddof=ddof)), ddof)


def _expected(p: Tensor, log_mean: Tensor) -> Tensor:
    """(n,) sum over classes of p log mean; a class that nobody has adds nothing."""
    return p @ log_mean.masked_fill(log_mean.isinf(), 0.0)
