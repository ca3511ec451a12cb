"""One model at several guidances, samplers and numbers of network evaluations: the points of its charts, and the front.

Every such point is an evaluation record like any other, under a protocol that differs from the table's in how samples
are drawn and in nothing else: reference, count, seed and net are the same, so that the scores compare.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from launcher.board.collect import Row, Scored, Table
from launcher.board.columns import number
from selfguide.spec.config import SamplerConfig
from selfguide.spec.recipe import Front
from selfguide.spec.recipe import Point as RecipePoint
from selfguide.spec.records import EvaluationRecord
from selfguide.spec.weak import CONDITION

# fields of a protocol that say how samples are drawn
DRAWING = ("sampler", "steps", "tolerance", "g", "interval", "ema", "settings", "batch")


@dataclass(frozen=True, kw_only=True)
class Point:
    """The score of one snapshot under one way of drawing samples."""

    run: str
    seed: int
    images: int
    protocol_key: str
    # whether that is the table's own protocol
    own: bool
    # network evaluations a sample
    nfe: float | None
    # guidance strength, 1 for none, and the noise-times in which it acts
    g: float
    interval: tuple[float, float]
    # what guidance leads away from, as `selfguide.spec.weak` words it
    weak: str
    sampler: str
    steps: int | None
    # the average of the weights, by its key
    ema: str
    score: float
    # standard error
    se: float | None


def points(table: Table, row: Row) -> tuple[Point, ...]:
    """The points of a row's runs at the images that rank it: by NFE, then by guidance; one where nobody swept."""
    found = [
        _point(scored, record, table)
        for scored in row.runs
        for record in _comparable(scored, table.protocol, row.images)
        if table.metric in record.scores
    ]
    return tuple(
        sorted(found, key=lambda p: (p.nfe or 0.0, p.g, p.sampler, p.protocol_key, p.seed))
    )


def front(
    points: Iterable[tuple[float, float]], *, higher_is_better: bool = False
) -> tuple[tuple[float, float], ...]:
    """The Pareto front of (cost, score): those to which no other is at most as dear and better; ascending in cost."""
    sign = -1 if higher_is_better else 1
    kept: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda p: (p[0], sign * p[1])):
        if not kept or sign * score < sign * kept[-1][1]:
            kept.append((cost, score))
    return tuple(kept)


def drawing(point: RecipePoint) -> str:
    """How a point of a recipe's front draws samples, in one line: what is at its default but for steps is left out."""
    # as JSON holds them, tuples are lists
    sampler, default = point.sampler, json.loads(json.dumps(asdict(SamplerConfig())))
    facts = [str(sampler["name"])]
    if sampler["name"] != "dopri5":
        facts.append(f"{sampler['steps']} steps")
    facts.append(f"g {sampler['g']:g}")
    others = (name for name in sampler if name not in ("name", "steps", "g", "interval"))
    if sampler["g"] != 1 and list(sampler["interval"]) != default["interval"]:
        low, high = sampler["interval"]
        facts[-1] += f" within {low:g} to {high:g}"
    facts += [f"{name} {sampler[name]}" for name in others if sampler[name] != default.get(name)]
    return ", ".join([*facts, f"average {point.average}"])


def recipe_words(front: Front) -> str:
    """The chosen recipe of a front in one sentence."""
    point = front.recipe
    error = "" if point.se is None else f" ± {number(point.se)}"
    return (
        f"{drawing(point)}: {front.metric} {number(point.score)}{error} at {point.nfe:g} NFE, "
        f"of {len(front.points)} points at {front.images:,} images, {front.samples:,} samples, "
        f"chosen by {front.selected_by.get('net', front.metric)}"
    )


def _comparable(
    scored: Scored, protocol: Mapping[str, Any], images: int
) -> Iterable[EvaluationRecord]:
    """The newest record of each protocol that measures as this one does."""
    measured = _measuring(protocol)
    done = [r for r in scored.run.records if r.done and r.images == images]
    newest = {r.protocol_key: r for r in sorted(done, key=lambda r: (r.time, r.attempt))}
    return [r for r in newest.values() if _measuring(r.protocol) == measured]


def _measuring(protocol: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in protocol.items() if name not in DRAWING}


def _point(scored: Scored, record: EvaluationRecord, table: Table) -> Point:
    protocol = record.protocol
    low, high = protocol.get("interval") or (0.0, 1.0)
    return Point(
        run=scored.run.id,
        seed=scored.run.seed,
        images=record.images,
        protocol_key=record.protocol_key,
        own=record.protocol_key == table.key,
        nfe=record.nfe,
        g=float(protocol.get("g", 1.0)),
        interval=(float(low), float(high)),
        weak=str(protocol.get("settings", {}).get("weak", CONDITION)),
        sampler=str(protocol.get("sampler", "")),
        steps=protocol.get("steps"),
        ema=str(protocol.get("ema", "")),
        score=record.scores[table.metric],
        se=record.scores.get(f"{table.metric}_se"),
    )
