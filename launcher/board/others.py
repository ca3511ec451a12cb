"""Others' samples on the board: beside the rows that were measured alike, with a place and without a rank.

They are not ranked among the rows, because it is not known how they were drawn and which nets the model has seen.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfguide.spec.others import MEASURING, OtherRecord, measuring_key

TITLE = "Others' samples, measured alike"
NOTE = (
    "How these samples were drawn, and which nets the model that drew them has seen, is not known: they have a place "
    "beside the rows, and no rank among them."
)


@dataclass(frozen=True, kw_only=True)
class Other:
    """Somebody's samples in a table of what was measured alike."""

    record: OtherRecord
    # by which the table ranks; None where it was not measured of them
    score: float | None
    # standard error of the score, 0 where nothing is known of it
    error: float
    # 1 + the ranked rows that are better; None without a score or ranked rows
    place: int | None

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def scores(self) -> Mapping[str, float]:
        return self.record.scores


def by_measuring(records: Iterable[OtherRecord]) -> dict[str, list[OtherRecord]]:
    """Those that were measured alike together, by what stands for how (`measuring_key`)."""
    found: dict[str, list[OtherRecord]] = defaultdict(list)
    for record in records:
        found[measuring_key(record.protocol)].append(record)
    return dict(found)


def differing_fields(
    protocols: Mapping[str, Mapping[str, Any]], alone: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[str, ...]]:
    """Of each table's protocol the fields in which another has another value.

    Args:
        protocols: of tables of runs, by key.
        alone: of tables of others' samples alone, which say nothing of how they were drawn.
    """
    every = {**protocols, **alone}
    found = {}
    for key, protocol in every.items():
        found[key] = tuple(
            name
            for name, value in protocol.items()
            if any(
                each.get(name) != value
                for other, each in every.items()
                if other not in alone or name in MEASURING
            )
        )
    return found


def placed(
    records: Iterable[OtherRecord],
    ranked: Sequence[tuple[float, float]],
    metric: str,
    higher: bool,
) -> tuple[Other, ...]:
    """Others best first, those without a score last.

    A row is better where the gap is beyond the standard error of the difference, as between rows: what the errors do
    not support is a tie.

    Args:
        ranked: score and standard error of each row that has a rank.
        metric: the score that ranks.
        higher: whether more of it is better.
    """
    sign = -1 if higher else 1
    found = [_placed(record, ranked, metric, sign) for record in records]

    def order(other: Other) -> tuple[bool, float, str, str, float]:
        missing = other.score is None
        record = other.record
        return missing, sign * (other.score or 0.0), record.name, record.stamp, record.when

    return tuple(sorted(found, key=order))


def _placed(
    record: OtherRecord, ranked: Sequence[tuple[float, float]], metric: str, sign: int
) -> Other:
    score = record.scores.get(metric)
    error = record.scores.get(f"{metric}_se", 0.0)
    place = None
    if score is not None and ranked:
        place = 1 + sum(sign * (score - mean) > math.hypot(error, se) for mean, se in ranked)
    return Other(record=record, score=score, error=error, place=place)
