"""Runs -> ranked tables; pure, so that the same files give the same board in any order.

Four rules. Scores under different protocols never share a table. Runs that differ in their seed only
are one row, compared at one image count. A gap that the standard errors do not support is a tie,
whatever the decimals say. Others' samples stand below the rows that were measured alike, and are not ranked among them.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.board.others import Other, by_measuring, differing_fields, placed
from launcher.board.read import Run
from launcher.board.states import Chip, badge, chips, of_row
from launcher.reconcile import cache
from launcher.reconcile.lineage import Parent
from selfguide.spec.config.evaluation import Expected
from selfguide.spec.contamination import contaminations
from selfguide.spec.identity import digest
from selfguide.spec.metrics import higher_is_better
from selfguide.spec.others import OtherRecord, measuring_key
from selfguide.spec.records import EvaluationRecord
from selfguide.spec.suggest import nearest
from shards.errors import UserError

_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A score over seeds: its mean, its sample standard deviation (None for one seed), their number."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One run under one protocol: the record of each image count, ascending, and the one that ranks it."""

    run: Run
    protocol: str  # its key
    history: tuple[EvaluationRecord, ...]
    headline: EvaluationRecord | None  # at the row's image count; None while it has no score there
    best: EvaluationRecord | None  # of all snapshots, by the table's metric; shown, never ranked

    @property
    def chips(self) -> tuple[Chip, ...]:
        return chips(self.run, self.protocol)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Runs that differ in their seed only, at one image count."""

    experiment: str
    variant: tuple[str, ...]  # the settings that tell it from other rows of its experiment
    group: str  # digest of everything but the seed
    label_free: bool
    rank: int | None  # None without a score
    tied: bool
    score: Spread | None
    error: float  # standard error of the score, 0 where nothing is known of it
    scores: Mapping[str, Spread]
    images: int
    final: bool
    nfe: float | None
    seconds: float | None  # of one evaluation, mean over seeds
    gpu_hours: float | None  # of one run so far, mean over those that say so
    runs: tuple[Scored, ...]  # by seed, also those without a score
    chips: tuple[Chip, ...]
    # what the net that the score is measured in did for the model before; such a row has no rank
    contaminations: tuple[str, ...] = ()
    # what somebody published for the score that ranks
    expected: Expected | None = None

    @property
    def seeds(self) -> int:
        """Training seeds behind the score."""
        return len({s.run.seed for s in self.runs if s.headline is not None})

    @property
    def lineage(self) -> tuple[Parent, ...]:
        """What its runs came from, each thing once."""
        return tuple(dict.fromkeys(parent for s in self.runs for parent in s.run.lineage))


@dataclass(frozen=True, kw_only=True)
class Table:
    """Every row scored under one protocol, best first.

    What others have that was measured like no row makes a table without rows, whose protocol says nothing of drawing.
    """

    key: str
    protocol: Mapping[str, Any]
    differs: tuple[str, ...]  # the fields that tell this protocol from the board's others
    metric: str
    higher_is_better: bool
    rows: tuple[Row, ...]
    others: tuple[Other, ...] = ()  # of what was measured alike, best first


@dataclass(frozen=True, kw_only=True)
class Board:
    """Every table, and what stands beside them; `collect` makes it."""

    tables: tuple[Table, ...]
    waiting: tuple[Run, ...]  # runs of rows that have no score under any protocol
    heard: float | None  # seconds since 1970 of the newest fact
    problems: tuple[str, ...]


@cache.uncollected()
def collect(
    runs: Iterable[Run],
    problems: Iterable[str] = (),
    others: Iterable[OtherRecord] = (),
    metric: str | None = None,
) -> Board:
    """The board of these runs and others' samples, ranked by `metric`, or by the metric that each protocol names.

    Raises:
        UserError: no record holds a score of that name.
    """
    ordered = sorted(runs, key=lambda r: (r.experiment, r.seed, r.id, str(r.root)))
    theirs = tuple(others)
    _check(metric, ordered, theirs)
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in ordered:
        groups[group_key(run)].append(run)
    protocols = {r.protocol_key: r.protocol for run in ordered for r in run.own if r.done}
    names = _variants(groups)
    alike = by_measuring(theirs)
    measured = {key: measuring_key(protocols[key]) for key in protocols} if alike else {}
    # of others' alone, by what stands for how they were measured
    alone = {key: found for key, found in alike.items() if key not in measured.values()}
    differs = differing_fields(protocols, {key: found[0].protocol for key, found in alone.items()})
    tables = []
    for key in sorted(protocols):
        by = metric or str(protocols[key].get("metric"))
        rows = [
            _row(group, names[group], members, key, by)
            for group, members in groups.items()
            if any(r.done and r.protocol_key == key for run in members for r in run.own)
        ]
        beside = alike.get(measured.get(key, ""), ())
        tables.append(_table(key, protocols[key], differs[key], rows, beside, by))
    for key, found in sorted(alone.items()):
        by = metric or found[0].metric
        tables.append(_table(key, found[0].protocol, differs[key], (), found, by))
    shown = {row.group for table in tables for row in table.rows}
    return Board(
        tables=tuple(sorted(tables, key=lambda t: (t.metric, -len(t.rows), t.key))),
        waiting=tuple(r for g, members in groups.items() if g not in shown for r in members),
        heard=max([*(r.heard for r in ordered), *(o.when for o in theirs)], default=None),
        problems=tuple(sorted(problems)),
    )


def _check(metric: str | None, runs: Sequence[Run], others: Sequence[OtherRecord]) -> None:
    scores = [*(r.scores for run in runs for r in run.records), *(o.scores for o in others)]
    known = {name for each in scores for name in each if not name.endswith("_se")}
    if metric is not None and known and metric not in known:
        raise UserError(
            f"--metric {metric!r} is in no record{nearest(metric, known)}; known: {', '.join(sorted(known))}"
        )


# ---- rows: what counts as the same thing -------------------------------------------------------------


def group_key(run: Run) -> str:
    """Digest of the run's experiment and identity without the seed."""
    rest = {k: v for k, v in run.identity.items() if k != "seed"}
    return digest({"experiment": run.experiment, "identity": rest})


def flatten(identity: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"batch": 128}} -> {"train.batch": 128}."""
    flat: dict[str, Any] = {}
    for key, value in identity.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def spelled(value: Any) -> str:
    """A setting's value as people type it: no value is null, on the page and in filters alike."""
    return "null" if value is None else str(value)


def _variants(groups: Mapping[str, Sequence[Run]]) -> dict[str, tuple[str, ...]]:
    """For each group, the settings in which groups of its experiment differ, as `key=value`."""
    siblings: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for group, members in groups.items():
        siblings[members[0].experiment][group] = flatten(members[0].identity)
    named = {}
    for settings in siblings.values():
        differing = _differing(list(settings.values()))
        for group, mine in settings.items():
            named[group] = tuple(f"{k}={spelled(mine[k])}" for k in differing if k in mine)
    return named


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys, but for the seed, that not all of these have with the same value."""
    first = settings[0]
    found = {
        k
        for each in settings[1:]
        for k in first.keys() | each.keys()
        if first.get(k, _ABSENT) != each.get(k, _ABSENT)
    }
    return sorted(found - {"seed"})


def history(run: Run, protocol: str) -> dict[int, EvaluationRecord]:
    """The newest record that was scored under this protocol, for each image count; none that only a sweep asked for."""
    return newest(run.own, protocol)


def newest(records: Iterable[EvaluationRecord], protocol: str) -> dict[int, EvaluationRecord]:
    """Of records, the newest that was scored under this protocol, for each image count."""
    done = [r for r in records if r.done and r.protocol_key == protocol]
    return {r.images: r for r in sorted(done, key=lambda r: (r.images, r.time, r.attempt, r.key))}


def headline_images(histories: Sequence[Mapping[int, EvaluationRecord]]) -> int:
    """The image count at which a row's seeds are compared.

    That of the final snapshot once a seed has it, else the one that most seeds have, the later of equals:
    a mean over different image counts would compare nothing.
    """
    final = [r.images for h in histories for r in h.values() if r.final]
    counts = Counter(final or [images for h in histories for images in h])
    return max(counts, key=lambda images: (counts[images], images))


def _row(
    group: str, variant: tuple[str, ...], runs: Sequence[Run], protocol: str, metric: str
) -> Row:
    histories = [history(run, protocol) for run in runs]
    images = headline_images(histories)
    scored = tuple(
        Scored(
            run=run,
            protocol=protocol,
            history=tuple(h.values()),
            headline=h.get(images),
            best=_best(h.values(), metric),
        )
        for run, h in zip(runs, histories, strict=True)
    )
    taken = [(s.run.seed, s.headline) for s in scored if s.headline is not None]
    names = sorted({name for _, r in taken for name in r.scores})
    scores = {name: over_seeds([(seed, r.scores.get(name)) for seed, r in taken]) for name in names}
    spreads = {name: spread for name, spread in scores.items() if spread is not None}
    used = {use for _, r in taken for use in contaminations(r.protocol, r.nets, metric)}
    contaminated = tuple(sorted({use.words for use in used}))
    return Row(
        experiment=runs[0].experiment,
        variant=variant,
        group=group,
        label_free=all(run.label_free for run in runs),
        rank=None,
        tied=False,
        score=spreads.get(metric),
        error=standard_error(spreads.get(metric), [r.scores.get(f"{metric}_se") for _, r in taken]),
        scores=spreads,
        images=images,
        final=any(r.final for _, r in taken),
        nfe=_mean([r.nfe for _, r in taken]),
        seconds=_mean([r.seconds for _, r in taken]),
        gpu_hours=_mean([run.gpu_hours for run in runs]),
        runs=scored,
        chips=(*of_row(runs, protocol), *map(badge, contaminated)),
        contaminations=contaminated,
        expected=next(filter(None, (run.expects(metric, protocol) for run in runs)), None),
    )


def _best(records: Iterable[EvaluationRecord], metric: str) -> EvaluationRecord | None:
    sign = -1 if higher_is_better(metric) else 1
    able = [r for r in records if metric in r.scores]
    return min(able, key=lambda r: (sign * r.scores[metric], r.images), default=None)


# ---- numbers -----------------------------------------------------------------------------------------


def _mean(values: Iterable[float | None]) -> float | None:
    there = sorted(v for v in values if v is not None and math.isfinite(v))
    return math.fsum(there) / len(there) if there else None


def over_seeds(values: Iterable[tuple[int, float | None]]) -> Spread | None:
    """Mean and standard deviation over seeds; runs that repeat a seed count once, as their mean."""
    by_seed: dict[int, list[float]] = defaultdict(list)
    for seed, value in values:
        if value is not None and math.isfinite(value):
            by_seed[seed].append(value)
    means = sorted(math.fsum(sorted(v)) / len(v) for v in by_seed.values())
    if not means:
        return None
    sd = statistics.stdev(means) if len(means) > 1 else None
    return Spread(mean=math.fsum(means) / len(means), sd=sd, n=len(means))


def standard_error(spread: Spread | None, errors: Iterable[float | None]) -> float:
    """Of a mean over seeds: the larger of what the seeds scatter and what each measurement admits.

    The scatter over seeds contains the error of measurement, so the two are not added.
    """
    if spread is None:
        return 0.0
    squares = _mean([e * e for e in errors if e is not None and math.isfinite(e)])
    sampling = math.sqrt((squares or 0.0) / spread.n)
    return max((spread.sd or 0.0) / math.sqrt(spread.n), sampling)


def ranked(rows: Iterable[Row], higher: bool) -> tuple[Row, ...]:
    """Best first, rows without a rank last; a tier shares the rank of its first row.

    A row whose score is missing, or measured in a net that had to do with the model, has none.

    A row joins the tier above while its gap to that tier's first row is within the standard error of
    the difference, sqrt(e1^2 + e2^2); ranks are 1 + the number of rows in better tiers.
    """
    sign = -1 if higher else 1
    names = sorted(rows, key=lambda r: (r.experiment, r.variant, r.group))
    able = sorted(filter(_ranks, names), key=lambda r: sign * _value(r))
    tiers: list[list[Row]] = []
    for row in able:
        if tiers and _indistinct(tiers[-1][0], row):
            tiers[-1].append(row)
        else:
            tiers.append([row])
    placed, rank = [], 1
    for tier in tiers:
        placed += [replace(row, rank=rank, tied=len(tier) > 1) for row in tier]
        rank += len(tier)
    return (*placed, *(r for r in names if not _ranks(r)))


def _ranks(row: Row) -> bool:
    return row.score is not None and not row.contaminations


def _value(row: Row) -> float:
    assert row.score is not None
    return row.score.mean


def _indistinct(first: Row, other: Row) -> bool:
    return abs(_value(first) - _value(other)) <= math.hypot(first.error, other.error)


def _table(
    key: str,
    protocol: Mapping[str, Any],
    differs: tuple[str, ...],
    rows: Iterable[Row],
    others: Iterable[OtherRecord],
    metric: str,
) -> Table:
    table = Table(
        key=key,
        protocol=protocol,
        differs=differs,
        metric=metric,
        higher_is_better=higher_is_better(metric),
        rows=(),
    )
    return ranked_anew(table, rows, others)


def ranked_anew(table: Table, rows: Iterable[Row], others: Iterable[OtherRecord]) -> Table:
    """The table of these rows and others' samples alone, which are ranked and placed among these."""
    able = ranked(rows, table.higher_is_better)
    scores = [(_value(row), row.error) for row in able if row.rank is not None]
    return replace(
        table,
        rows=able,
        others=placed(others, scores, table.metric, table.higher_is_better),
    )
