"""Which of two models is better, from samples of the same seeds, stopped as soon as that is known.

Two models that draw image i from the same noise err alike, so that their difference is known far better than either
score. The images come in looks. After each, an asymptotic confidence sequence (Waudby-Smith, Arbour, Sinha, Kennedy and
Ramdas 2024, arXiv 2103.06476, by Robbins's normal mixture) says where the difference is: for sets that are not small it
is there at all looks together with probability 1 - alpha, so that one may stop at any of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit
from torch import Tensor

from selfguide.evaluation.metrics.frechet import FrechetScore, Reference, jackknife
from selfguide.evaluation.metrics.moments import Moments

# (N, D) features of the images `first` to `last`, without the last, of one model
Draw = Callable[[int, int], NDArray | Tensor]


@dataclass(frozen=True)
class Look:
    """What is known of FD(A) - FD(B) after so many images of each: below 0 where A is better."""

    images: int
    # bias-corrected
    difference: float
    se: float
    low: float
    high: float

    @property
    def better(self) -> Literal["A", "B"] | None:
        """The better one, once the interval excludes 0."""
        return "A" if self.high < 0 else "B" if self.low > 0 else None


@dataclass(frozen=True)
class Comparison:
    """How a comparison went; the last look decides."""

    looks: tuple[Look, ...]
    # of each model, had nothing been known before the end
    most: int
    alpha: float

    @property
    def better(self) -> Literal["A", "B"] | None:
        return self.looks[-1].better

    @property
    def saved(self) -> int:
        """Images of both models together that need not be drawn."""
        return 2 * (self.most - self.looks[-1].images)


def paired_difference(reference: Reference, a: Moments, b: Moments) -> FrechetScore:
    """FD(A) - FD(B) of two sets of the same images, with the jackknife that leaves a block out of both.

    Raises:
        ValueError: the sets have other images in their blocks.
    """
    if not np.array_equal(a.counts, b.counts):
        raise ValueError(f"{a.count} and {b.count} images in other blocks are no pairs")
    return jackknife(
        a,
        lambda block: (
            reference.distance(*a.gaussian(block)) - reference.distance(*b.gaussian(block))
        ),
    )


def compare(
    reference: Reference, a: Draw, b: Draw, *, most: int, looks: int = 10, alpha: float = 0.05
) -> Comparison:
    """Draws images of both until it is known which is better, at most `most` of each."""
    found: list[Look] = []
    for look in each_look(reference, a, b, most=most, looks=looks, alpha=alpha):
        found.append(look)
        if look.better:
            break
    return Comparison(tuple(found), most, alpha)


def each_look(
    reference: Reference, a: Draw, b: Draw, *, most: int, looks: int = 10, alpha: float = 0.05
) -> Iterator[Look]:
    """What is known after each of `looks` equal parts of `most` images; whoever asks may stop at any of them."""
    of_a, of_b = Moments(reference.mean), Moments(reference.mean)
    done = 0
    for number in range(1, looks + 1):
        until = most * number // looks
        for draw, moments in ((a, of_a), (b, of_b)):
            moments.update(draw(done, until), done)
        done = until
        found = paired_difference(reference, of_a, of_b)
        half = found.se * multiplier(done, most, alpha, of_a.blocks - 1)
        yield Look(done, found.corrected, found.se, found.corrected - half, found.corrected + half)


def multiplier(images: int, most: int, alpha: float, freedom: int) -> float:
    """Standard errors to either side of the estimate after `images` of at most `most`.

    With x = images rho^2 the normal mixture's is sqrt((1 + 1/x) (log(1 + x) - 2 log alpha)), and rho is such that it is
    narrowest at `most / 2`: x = log(1 + x) - 2 log alpha there. A jackknife's standard error has `freedom` degrees of
    freedom, so what is returned has the tail under Student's t that the former has under the normal distribution.
    """
    wide = -2 * math.log(alpha)
    narrowest = wide
    for _ in range(50):  # a contraction, by 1 / (1 + x)
        narrowest = math.log1p(narrowest) + wide
    x = narrowest * images / (most / 2)
    normal = math.sqrt((1 + 1 / x) * (math.log1p(x) + wide))
    return float(-stdtrit(freedom, ndtr(-normal)))
