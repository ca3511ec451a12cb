"""Two to eight runs side by side: the settings in which they differ, and their scores as differences from the first.

Where two records drew images from the same seeds (one protocol) and both keep the score without each block of the
jackknife, the standard error is that of the difference itself (Efron & Stein 1981, delete-one-block jackknife). It is
then far below sqrt(a^2 + b^2), which is what is left where they do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.board.collect import flatten, newest
from launcher.board.read import Run
from selfguide.spec.files import plain
from selfguide.spec.records import EvaluationRecord

MOST = 8
# of a config, what says where a run lies and works rather than what it is
_PLACES = ("runs", "name", "dry_run")
_ABSENT = "not there"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The score of one run less that of the first, under one protocol; None where one of them has no such score."""

    run: str
    protocol_key: str
    metric: str
    # of either snapshot; not the same where the two have none of the same count
    images: tuple[int, int]
    score: float
    difference: float
    # None where a record names no standard error
    se: float | None
    # from the jackknife of the difference, over the same images
    paired: bool


def settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The keys in which the runs differ, with the value of each; `"not there"` where a run has no such key.

    Keys are those of the configs, or of the identities where another version wrote one of the configs.
    """
    if all(run.config is not None for run in runs):
        found = [flatten(_of_config(run)) for run in runs]
    else:
        found = [flatten(run.identity) for run in runs]
    keys = sorted({key for each in found for key in each})
    values = {key: [each.get(key, _ABSENT) for each in found] for key in keys}
    return {key: column for key, column in values.items() if any(v != column[0] for v in column)}


def _of_config(run: Run) -> Mapping[str, Any]:
    assert run.config is not None
    return {key: value for key, value in plain(run.config).items() if key not in _PLACES}


def differences(runs: Sequence[Run], metric: str | None = None) -> list[Difference]:
    """Every run against the first, under each protocol that both have a score of.

    Args:
        metric: which score; None for the one each protocol is named after.
    """
    first, found = runs[0], []
    for key in sorted({r.protocol_key for r in first.records if r.done}):
        ours = newest(first.records, key)
        name = metric or str(next(iter(ours.values())).protocol.get("metric"))
        for run in runs[1:]:
            pair = _pair(ours, newest(run.records, key), name)
            if pair is not None:
                found.append(_difference(run, key, name, *pair))
    return found


def _pair(
    ours: Mapping[int, EvaluationRecord], theirs: Mapping[int, EvaluationRecord], metric: str
) -> tuple[EvaluationRecord, EvaluationRecord] | None:
    """The records to compare: at the most images that both have, else the newest of either."""
    able, others = (
        {images: r for images, r in each.items() if metric in r.scores} for each in (ours, theirs)
    )
    if not able or not others:
        return None
    both = able.keys() & others.keys()
    at = (max(both), max(both)) if both else (max(able), max(others))
    return able[at[0]], others[at[1]]


def _difference(
    run: Run, key: str, metric: str, first: EvaluationRecord, other: EvaluationRecord
) -> Difference:
    se, paired = standard_error(metric, first, other)
    return Difference(
        run=run.id,
        protocol_key=key,
        metric=metric,
        images=(first.images, other.images),
        score=other.scores[metric],
        difference=other.scores[metric] - first.scores[metric],
        se=se,
        paired=paired,
    )


def standard_error(
    metric: str, first: EvaluationRecord, other: EvaluationRecord
) -> tuple[float | None, bool]:
    """Of the difference of two scores under one protocol, and whether it is that of paired samples."""
    blocks = len(first.left_out)
    if metric == first.metric and blocks and blocks == len(other.left_out):
        changes = [b - a for a, b in zip(first.left_out, other.left_out, strict=True)]
        mean = math.fsum(changes) / blocks
        spread = math.fsum((change - mean) ** 2 for change in changes)
        return math.sqrt((blocks - 1) / blocks * spread), True
    errors = [record.scores.get(f"{metric}_se") for record in (first, other)]
    if errors[0] is None or errors[1] is None:
        return None, False
    return math.hypot(errors[0], errors[1]), False
