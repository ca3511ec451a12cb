"""How a snapshot is best sampled, as far as its records tell: the front of score against network evaluations.

Records of one snapshot that differ only in how it was sampled are points of one front: sampler, steps, guidance weight,
its interval and the average may differ, and seeds, samples, reference and feature net are the same. Of the points on
the front the recipe is the cheapest that is not known to be worse than the best. `evals/recipe.json` follows from the
records alone, so that whoever writes it writes the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from selfguide.spec.config import SamplerConfig, build
from selfguide.spec.config.sampler import plain_sampler
from selfguide.spec.identity import digest
from selfguide.spec.metrics import higher_is_better
from selfguide.spec.records import EvaluationRecord, check_kind
from selfguide.spec.run import RunFolder
from shards import storage

SCHEMA = 1
# what the points of a front may differ in, of a protocol; the batch is part of an adaptive sampler's
SWEPT = ("sampler", "steps", "tolerance", "g", "interval", "ema", "settings", "batch")
# of a record's jackknife, and the two-sided 95 % point of Student's t with one degree of freedom less
_BLOCKS, _T = 10, 2.262


@dataclass(frozen=True, kw_only=True)
class Point:
    """One record on or behind a front."""

    # of the record
    key: str
    attempt: int
    # network evaluations a sample
    nfe: float
    # of the protocol's metric, with its standard error, and without the bias of a finite N where that is known
    score: float
    se: float | None
    corrected: float | None
    # all settings of the sampler, as JSON, and the average by its key
    sampler: Mapping[str, Any]
    average: int | str
    # the score less that of the best point, from the same seeds, and its standard error; None where none is known
    worse: float | None = None
    worse_se: float | None = None

    @property
    def ranked_by(self) -> float:
        return self.score if self.corrected is None else self.corrected


@dataclass(frozen=True, kw_only=True)
class Front:
    """The points of one snapshot in one metric, by network evaluations and score."""

    # hash of all that they have in common
    id: str
    # of the snapshot
    images: int
    metric: str
    samples: int
    seed: int
    points: tuple[Point, ...]
    # keys of the points that none beats in both score and evaluations, cheapest first
    front: tuple[str, ...]
    # keys of the best and of the chosen point
    best: str
    chosen: str
    # name and sha256 of the feature net by whose scores it was chosen
    selected_by: Mapping[str, str]

    @property
    def recipe(self) -> Point:
        """The chosen point."""
        return next(point for point in self.points if point.key == self.chosen)


def fronts(records: Iterable[EvaluationRecord]) -> tuple[Front, ...]:
    """Those of a run's records that two or more points make, the newest snapshot first, then the most samples."""
    groups: dict[str, dict[str, EvaluationRecord]] = {}
    for record in sorted(records, key=lambda r: (r.key, -r.attempt)):
        if record.done and record.score is not None and record.nfe and "steps" in record.protocol:
            groups.setdefault(_common(record), {})[record.key] = record
    found = [_front(id, list(each.values())) for id, each in groups.items() if len(each) > 1]
    return tuple(sorted(found, key=lambda f: (-f.images, f.metric, -f.samples, f.seed, f.id)))


def _common(record: EvaluationRecord) -> str:
    same = {name: value for name, value in record.protocol.items() if name not in SWEPT}
    return digest({"images": record.images, **same}, 12)


def _front(id: str, records: Sequence[EvaluationRecord]) -> Front:
    first = records[0]
    metric, protocol = str(first.metric), first.protocol
    sign = -1.0 if higher_is_better(metric) else 1.0
    by_key = {record.key: record for record in records}
    points = sorted(
        (_point(record) for record in records), key=lambda p: (p.nfe, sign * p.ranked_by, p.key)
    )
    front: list[Point] = []
    for point in points:
        if not front or sign * point.ranked_by < sign * front[-1].ranked_by:
            front.append(point)
    best = front[-1]
    compared = [_compared(point, by_key[point.key], by_key[best.key]) for point in points]
    known = {point.key: point for point in compared}
    chosen = next(p.key for p in front if p.key == best.key or not _worse(known[p.key], sign))
    return Front(
        id=id,
        images=first.images,
        metric=metric,
        samples=int(protocol["samples"]),
        seed=int(protocol["seed"]),
        points=tuple(compared),
        front=tuple(point.key for point in front),
        best=best.key,
        chosen=chosen,
        selected_by=selector(protocol),
    )


def selector(protocol: Mapping[str, Any]) -> dict[str, str]:
    """Name and sha256 of the feature net that a protocol measures in, as records name nets."""
    return {
        "net": str(protocol.get("net") or protocol["metric"]),
        "sha256": str(protocol["feature_sha256"]),
    }


def _point(record: EvaluationRecord) -> Point:
    assert record.score is not None and record.nfe is not None
    return Point(
        key=record.key,
        attempt=record.attempt,
        nfe=record.nfe,
        score=record.score,
        se=record.scores.get(f"{record.metric}_se"),
        corrected=record.scores.get(f"{record.metric}_corrected"),
        sampler=plain_sampler(sampler_of(record.protocol)),
        average=record.protocol["ema"],
    )


def sampler_of(protocol: Mapping[str, Any]) -> SamplerConfig:
    """The sampler that a protocol names, with all its settings; a protocol has others beside, of the path."""
    known = {each.name for each in fields(SamplerConfig)}
    values = {k: v for k, v in protocol.get("settings", {}).items() if k in known}
    values |= {"name": protocol["sampler"], "g": protocol["g"], "interval": protocol["interval"]}
    if protocol["steps"] is not None:
        values["steps"] = protocol["steps"]
    if protocol.get("tolerance"):
        values["rtol"], values["atol"] = protocol["tolerance"]
    return build(SamplerConfig, values, "sampler")


def difference(a: EvaluationRecord, b: EvaluationRecord) -> tuple[float, float] | None:
    """The score of `a` less that of `b`, from the same seeds, less its bias, and its standard error.

    By the jackknife that leaves a block out of both (`selfguide.evaluation.paired`), of which records hold the scores.
    None where one of them holds none.
    """
    blocks = len(a.left_out)
    if {blocks, len(b.left_out)} != {_BLOCKS} or a.score is None or b.score is None:
        return None
    left_out = [x - y for x, y in zip(a.left_out, b.left_out, strict=True)]
    mean = math.fsum(left_out) / blocks
    variance = (blocks - 1) / blocks * math.fsum((each - mean) ** 2 for each in left_out)
    return blocks * (a.score - b.score) - (blocks - 1) * mean, math.sqrt(variance)


def _compared(point: Point, record: EvaluationRecord, best: EvaluationRecord) -> Point:
    found = None if record is best else difference(record, best)
    if found is None:
        return point
    return replace(point, worse=found[0], worse_se=found[1])


def _worse(point: Point, sign: float) -> bool:
    """Whether a point is known to be worse than the best: where nothing says otherwise it is."""
    if point.worse is None or point.worse_se is None:
        return True
    return sign * point.worse > _T * point.worse_se


def recipe_path(run: RunFolder) -> Path:
    """The fronts of a run's records."""
    return run.evals / "recipe.json"


def keep(run: RunFolder, records: Iterable[EvaluationRecord]) -> tuple[Front, ...]:
    """Writes the fronts of a run's records, where they are others than those that are written; returns them."""
    found = fronts(records)
    path = recipe_path(run)
    if found or path.exists():
        values = {"schema": SCHEMA, "fronts": [asdict(front) for front in found]}
        data = json.dumps(values, indent=1).encode()
        if not path.exists() or path.read_bytes() != data:
            storage.publish(str(path), data, replace=True)
    return found


def read(run: RunFolder) -> tuple[Front, ...]:
    """The fronts that were written for a run; none before there are any.

    Raises:
        ValueError, KeyError, TypeError: they are of another version, or have values that nobody can reckon with.
    """
    try:
        values = json.loads(recipe_path(run).read_text())
    except FileNotFoundError:
        return ()
    if values["schema"] != SCHEMA:
        raise ValueError(
            f"{recipe_path(run)} has schema {values['schema']}, this version reads {SCHEMA}"
        )
    return tuple(_read_front(each) for each in values["fronts"])


def _read_front(values: Mapping[str, Any]) -> Front:
    points = tuple(Point(**point) for point in values["points"])
    listed = {"points": points, "front": tuple(values["front"])}
    found = Front(**{**values, **listed})
    for name in ("images", "samples"):
        check_kind(getattr(found, name), f"{name} of a front", int)
    for point in points:
        for name in ("nfe", "score"):
            check_kind(getattr(point, name), f"{name} of a point", int, float)
        for name in ("se", "corrected"):
            check_kind(getattr(point, name), f"{name} of a point", int, float, type(None))
        _ = point.sampler["name"], point.sampler["steps"], point.sampler["g"]
    if not isinstance(found.selected_by, Mapping):
        raise TypeError(f"selected_by of a front is {found.selected_by!r}")
    return found
