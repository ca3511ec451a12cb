"""The most groups worth separating: the largest K of which TEMI still uses nearly all.

Adaloglou et al. 2024 (C-EDM, arXiv 2403.00570, section 3.3): the utilisation ratio r_K = used groups / K falls once K
exceeds what the features separate. K is doubled until r_K < alpha, then a finer grid lies between the last two; the
bound is max {K : r_K >= alpha}, and experiments with the generative model need look no higher.
"""

from __future__ import annotations

from collections.abc import Callable
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


def check(*, limit: int, alpha: float, start: int, finer: int) -> None:
    """
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
