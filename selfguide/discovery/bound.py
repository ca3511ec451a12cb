"""The most groups worth separating, the largest K of which TEMI still uses nearly all; and the fewest.

Adaloglou et al. 2024 (C-EDM, arXiv 2403.00570, section 3.3): the utilisation ratio r_K = used groups / K falls once K
exceeds what the features separate. K is doubled until r_K < alpha, then a finer grid lies between the last two; the
bound is max {K : r_K >= alpha}, and experiments with the generative model need look no higher. The lower bound is the
number of groups that TEMI uses without its exponent, beta = 1, which hardly depends on K (appendix C.2).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shards.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Point:
    """One fit of the search."""

    groups: int  # K
    used: int  # groups with at least one image

    @property
    def ratio(self) -> float:
        return self.used / self.groups


@dataclass(frozen=True, kw_only=True)
class Search:
    """All fits, by rising K, and what follows from them."""

    points: tuple[Point, ...]
    alpha: float
    start: int

    @property
    def bound(self) -> int | None:
        """The largest K tried with a ratio of at least alpha; None where there is none."""
        return max((p.groups for p in self.points if p.ratio >= self.alpha), default=None)

    @property
    def open(self) -> bool:
        """Whether no K was too large: the bound is where the search ended, and may lie higher."""
        return all(p.ratio >= self.alpha for p in self.points)


def search(
    used: Callable[[int], int],
    *,
    limit: int,
    alpha: float = 0.96,
    start: int = 16,
    finer: int = 3,
) -> Search:
    """Asks `used(K)`, the groups that a fit with K of them uses, for as few K as the bound takes.

    Args:
        used: called once for each K, in the order of the search.
        limit: the largest K there can be, the number of images.
        alpha: the ratio that counts as nearly all; with 0.96 C-EDM's published assignments give 500 for CIFAR-10.
        start: the first K.
        finer: values of K between the last two of the doubling.

    Raises:
        UserError: alpha outside (0, 1], or a start outside [2, limit].
    """
    check(limit=limit, alpha=alpha, start=start, finer=finer)
    points: dict[int, Point] = {}

    def ratio(groups: int) -> float:
        points[groups] = Point(groups=groups, used=used(groups))
        return points[groups].ratio

    low, high = None, start
    while ratio(high) >= alpha and 2 * high <= limit:
        low, high = high, 2 * high
    if low is not None and points[high].ratio < alpha:
        between = {low + (high - low) * i // (finer + 1) for i in range(1, finer + 1)}
        for groups in sorted(between - points.keys()):
            ratio(groups)
    ordered = tuple(points[groups] for groups in sorted(points))
    return Search(points=ordered, alpha=alpha, start=start)


@dataclass(frozen=True, kw_only=True)
class Lower:
    """Fits with beta = 1 at several K, and how many groups they use whatever K is."""

    points: tuple[Point, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(p.used for p in self.points)

    @property
    def deviation(self) -> float:
        """The standard deviation over K, of a sample."""
        return statistics.stdev(p.used for p in self.points)


def lower(used: Callable[[int], int], over: Sequence[int], *, limit: int) -> Lower:
    """Asks `used(K)` of fits with beta = 1 for each K of `over`, the smallest first.

    Raises:
        UserError: fewer than two K, one twice, or one that no fit of `limit` images can have.
    """
    check_over(over, limit=limit)
    return Lower(points=tuple(Point(groups=each, used=used(each)) for each in sorted(over)))


def check_over(over: Sequence[int], *, limit: int) -> None:
    """Returns when `lower` can be called with these.

    Raises:
        UserError: what `lower` refuses.
    """
    if len(set(over)) < max(2, len(over)):
        raise UserError(
            f"over={' '.join(map(str, over))}: the lower bound is a mean over several K, each once; give two or more"
        )
    for each in over:
        if not 2 <= each <= limit:
            raise UserError(f"over={each} of {limit} images: give K from 2 to {limit}")


def check(*, limit: int, alpha: float, start: int, finer: int) -> None:
    """Returns when `search` can be called with these.

    Raises:
        UserError: what `search` refuses.
    """
    if not 0 < alpha <= 1:
        raise UserError(
            f"alpha={alpha}: a share of groups is above 0 and at most 1; 0.96 gives C-EDM's bounds"
        )
    if not 2 <= start <= limit:
        raise UserError(f"start={start} of {limit} images: give a K from 2 to {limit}")
    if finer < 0:
        raise UserError(f"finer={finer}: give 0 or more")
