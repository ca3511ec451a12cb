"""Images and GPU-hours to reach a score: read off the snapshots that were scored, interpolated nowhere.

The first snapshot at or under k (over it, where higher is better) counts as it is: between two nobody measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from launcher.board.collect import Row, Scored
from selfguide.spec.metrics import higher_is_better


@dataclass(frozen=True, kw_only=True)
class Reach:
    """When runs got there, each a mean over those that did."""

    # None where none did
    images: float | None
    # of training until that snapshot was published; None where a run does not say
    gpu_hours: float | None
    # runs that got there, and runs that were scored
    runs: int
    of: int


def first_at(scored: Scored, metric: str, k: float) -> int | None:
    """Images of a run's first snapshot whose score is at least as good as k; None where there is none."""
    higher = higher_is_better(metric)
    there = (
        r.images
        for r in scored.history
        if metric in r.scores and (r.scores[metric] >= k if higher else r.scores[metric] <= k)
    )
    return next(there, None)


def reach(row: Row, metric: str, k: float) -> Reach:
    """When the runs of a row reached the score k."""
    measured = [s for s in row.runs if any(metric in r.scores for r in s.history)]
    found = [(s, images) for s in measured if (images := first_at(s, metric, k)) is not None]
    hours = [s.run.gpu_hours_at(images) for s, images in found]
    known = [each for each in hours if each is not None]
    return Reach(
        images=_mean([float(images) for _, images in found]),
        gpu_hours=_mean(known) if len(known) == len(found) else None,
        runs=len(found),
        of=len(measured),
    )


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
