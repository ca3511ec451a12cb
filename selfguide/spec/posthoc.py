"""Averages that no run kept, as weighted sums of power-function averages that it did (EDM2, arXiv 2312.02696, 3.2).

The power function of exponent g at time T weighs the weights of time t by (g + 1) t^g / T^(g + 1). Stored averages are
such profiles, and any other profile is approached by the weighted sum of theirs that is nearest to it in L2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selfguide.spec.averages import gamma


@dataclass(frozen=True, order=True)
class Profile:
    """The power function that an average follows: its time, in images since averages began, and relative width."""

    images: int
    width: float


@dataclass(frozen=True)
class Reconstruction:
    """Weights of the stored averages, which add up to 1, and how far the sum's profile is from the one wanted."""

    weights: tuple[float, ...]
    # L2 distance of the two profiles, of the norm of the one wanted
    error: float


def reconstruct(stored: Sequence[Profile], wanted: Profile) -> Reconstruction:
    """Returns the weights of `stored` that are nearest to `wanted` (EDM2, algorithm 3) among those of sum 1.

    Profiles end at their own time, so one of a later time than `wanted` helps nobody and gets weight 0.

    Raises:
        ValueError: none is stored of a time up to that of `wanted`; or a width has no exponent.
    """
    used = [index for index, each in enumerate(stored) if 0 < each.images <= wanted.images]
    if not used:
        raise ValueError(f"no average is stored of up to {wanted.images:,} images")
    basis = [stored[index] for index in used]
    lengths = np.array([math.sqrt(product(each, each)) for each in basis])
    whole = math.sqrt(product(wanted, wanted))
    gram = np.array([[product(one, other) for other in basis] for one in basis])
    gram /= np.outer(lengths, lengths)
    towards = np.array([product(each, wanted) for each in basis]) / (lengths * whole)
    # the nearest sum under the condition that its integral is 1, by a Lagrange multiplier; integrals of unit profiles:
    integrals = whole / lengths
    count = len(basis)
    system = np.zeros((count + 1, count + 1))
    system[:count, :count], system[count, :count], system[:count, count] = (
        gram,
        integrals,
        integrals,
    )
    # many profiles are nearly alike, so of all solutions the smallest
    found = np.linalg.lstsq(system, np.append(towards, 1.0), rcond=None)[0][:count]
    weights = np.zeros(len(stored))
    weights[used] = found * integrals
    weights /= weights.sum()
    squared = 1.0 - 2.0 * found @ towards + found @ gram @ found
    return Reconstruction(tuple(weights.tolist()), math.sqrt(max(squared, 0.0)))


def product(one: Profile, other: Profile) -> float:
    """Returns the inner product of two profiles over time in images: the earlier one is 0 behind its end."""
    early, late = sorted((one, other))
    a, b = gamma(early.width), gamma(late.width)
    return (a + 1) * (b + 1) / (a + b + 1) * (early.images / late.images) ** b / late.images
