"""The search behind `tools.guide`: weight and interval of each weak model, by records of one snapshot from one seed.

A point is scored by an evaluation record as a sweep's is, so that a point is never drawn twice, the search goes on
where it was ended, and what it chose is a recipe of the run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from selfguide.evaluation.job import evaluate
from selfguide.sampling.generate import NotFiniteError
from selfguide.sampling.weak import check
from selfguide.snapshot import Snapshot
from selfguide.spec.averages import averages_of
from selfguide.spec.config import Config, EvaluationConfig, SamplerConfig
from selfguide.spec.files import plain
from selfguide.spec.metrics import higher_is_better
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.recipe import selector
from selfguide.spec.records import (
    EvaluationRecord,
    Protocol,
    record_key,
    records_of,
)
from selfguide.spec.run import RunFolder
from selfguide.spec.weak import CONDITION, weak_models
from shards.errors import UserError

# of records that only a search asked for, as a sweep's are named by its id
SWEEP = "guide"
EVERYWHERE = (0.0, 1.0)
# shares of a snapshot's images at which an earlier one may be a weak model, by default
EARLIER = (1 / 2, 1 / 4, 1 / 8)
# a weak model's points beside those of its weights and intervals: weights beside the best, in the best interval
_BESIDE = 2


@dataclass(frozen=True)
class Grid:
    """Weights g and intervals of noise-times that are tried for each weak model."""

    weights: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]

    def points(self, methods: int) -> int:
        """How many points a search has at most, with that of no guidance."""
        return 1 + methods * (len(self.weights) + len(self.intervals) - 1 + _BESIDE)


@dataclass(frozen=True)
class Scored:
    """One way of sampling, and its record."""

    sampler: SamplerConfig
    record: EvaluationRecord

    @property
    def worth(self) -> float:
        """Lower is better, whatever the metric; a missing score is the worst."""
        score, metric = self.record.score, self.record.metric
        if score is None or metric is None:
            return math.inf
        return -score if higher_is_better(metric) else score


class OutOfTimeError(Exception):
    """The budget is spent."""


@dataclass
class Scorer:
    """Scores ways of sampling one snapshot under one protocol; each once, whoever asks how often.

    Args:
        evaluation: the protocol, with its samples and seed.
        selected: nets by whose scores what is scored was chosen.
        deadline: seconds by the monotonic clock after which nothing new is drawn.
    """

    run: RunFolder
    config: Config
    images: int
    evaluation: EvaluationConfig
    selected: tuple[Mapping[str, str], ...] = ()
    deadline: float = math.inf
    drawn: int = field(default=0, init=False)

    def score(self, sampler: SamplerConfig) -> Scored:
        """A point whose samples are not finite has a record without a score; its first bad block says so, each time.

        Raises:
            OutOfTimeError: it is not known, and the budget is spent.
            UserError: it cannot be scored.
        """
        config = replace(
            self.config, sampler=sampler, evaluation=self.evaluation, more_evaluations=()
        )
        key = record_key(self.images, self._protocol(config))
        found = self._known(key)
        if found is None:
            if time.monotonic() > self.deadline:
                raise OutOfTimeError
            self.drawn += 1
            try:
                self._evaluate(config, key)
            except NotFiniteError as error:
                return Scored(sampler, self._without_score(key, str(error)))
            found = self._known(key)
            assert found is not None
        return Scored(sampler, found)

    def _protocol(self, config: Config) -> Protocol:
        return Protocol.of(config, self.run.snapshot_manifest(self.images))

    def _known(self, key: str) -> EvaluationRecord | None:
        return next((each for each in records_of(self.run, key) if each.done), None)

    def _without_score(self, key: str, why: str) -> EvaluationRecord:
        return EvaluationRecord(
            status="failed", key=key, attempt=0, images=self.images, message=why
        )

    def _evaluate(self, config: Config, key: str) -> None:
        tries = [path.name.split(".")[-2] for path in self.run.evals.glob(f"{key}.*.json")]
        own = {record_key(self.images, self._protocol(each)) for each in self.config.scored_by}
        wanted: dict[str, Any] = {
            "run": str(self.run.root),
            "images": self.images,
            "config": plain(config),
            "key": key,
            "attempt": 1 + max((int(each) for each in tries if each.isdigit()), default=0),
            "selected": [dict(net) for net in self.selected],
        }
        evaluate(wanted if key in own else {**wanted, "sweep": SWEEP}, RankStatus())


def methods(snapshot: Snapshot, published: Sequence[int]) -> tuple[list[str], dict[str, str]]:
    """Weak models that a snapshot has, as `sampler.weak` names them, and why it has not the others.

    Of earlier snapshots those nearest to a half, a quarter and an eighth of its images.
    """
    earlier = [images for images in published if images < snapshot.images]
    nearest = {_nearest(earlier, share * snapshot.images) for share in EARLIER if earlier}
    others = [each for each in averages_of(snapshot.config) if each != snapshot.average]
    wanted = [
        CONDITION,
        *(f"average-{each.key}" for each in others),
        *(f"snapshot-{images}" for images in sorted(nearest, reverse=True)),
        "head",
        "routed",
    ]
    found, missing = [], {}
    for word in wanted:
        why = lacking(snapshot, word)
        if why is None:
            found.append(word)
        else:
            missing[word] = why
    if not others:
        missing["average"] = "the run keeps one average; train with train.ema_halflife of several"
    if not earlier:
        missing["snapshot"] = (
            "the run has no earlier snapshot; train with a lower train.snapshot_every"
        )
    return found, missing


def _nearest(known: Sequence[int], wanted: float) -> int:
    return min(known, key=lambda images: abs(images - wanted))


def lacking(snapshot: Snapshot, word: str) -> str | None:
    """Why a snapshot has no such weak model; None where it has."""
    dropped = any(each.kind == CONDITION for each in weak_models(word))
    if dropped and not snapshot.conditioned:
        return "this snapshot is unconditional: no condition can be dropped"
    try:
        check(snapshot, replace(snapshot.config.sampler, weak=word))
    except UserError as error:
        return str(error)
    return None


class Search:
    """The best weight and interval of each weak model: coordinate by coordinate, all models in turn.

    First all weights everywhere, then the intervals at the best weight, then the weights beside it in the best
    interval. `found` holds what is known of each, also where the budget ended it; `plain` is without guidance.
    """

    def __init__(
        self, scorer: Scorer, sampler: SamplerConfig, words: Sequence[str], grid: Grid
    ) -> None:
        self.scorer, self.grid = scorer, grid
        self.sampler = replace(sampler, g=1.0, interval=EVERYWHERE, weak=CONDITION)
        self.found: dict[str, list[Scored]] = {word: [] for word in words}
        self.plain: Scored | None = None
        self.complete = False

    def points(self) -> Iterator[Scored]:
        """Scores one point after the other; ends early where the budget is spent.

        Raises:
            UserError: without guidance there is no score, or a point cannot be scored.
        """
        try:
            self.plain = _with_score(self.scorer.score(self.sampler))
            yield self.plain
            for stage in (self._weights, self._intervals, self._beside):
                for word, known in self.found.items():
                    for g, interval in stage(word):
                        sampler = replace(self.sampler, g=g, interval=interval, weak=word)
                        if all(each.sampler != sampler for each in known):
                            known.append(self.scorer.score(sampler))
                            yield known[-1]
            self.complete = True
        except OutOfTimeError:
            return

    def best(self, word: str) -> Scored | None:
        """Of a weak model's points; None before there are any."""
        return min(self.found[word], key=lambda each: each.worth, default=None)

    def _weights(self, word: str) -> list[tuple[float, tuple[float, float]]]:
        return [(g, EVERYWHERE) for g in self.grid.weights]

    def _intervals(self, word: str) -> list[tuple[float, tuple[float, float]]]:
        best = self.best(word)
        assert best is not None
        return [(best.sampler.g, each) for each in self.grid.intervals]

    def _beside(self, word: str) -> list[tuple[float, tuple[float, float]]]:
        best = self.best(word)
        assert best is not None
        at = self.grid.weights.index(best.sampler.g)
        beside = self.grid.weights[max(0, at - 1) : at + 2]
        return [(g, best.sampler.interval) for g in beside]


def confirm(search: Search, scorer: Scorer) -> tuple[Scored, dict[str, Scored]]:
    """Sampling without guidance, and as the search chose for each weak model, once more from fresh seeds.

    Weak models of which no point has a score are left out.

    Raises:
        UserError: without guidance there is no score.
    """
    chosen = {word: search.best(word) for word in search.found}
    unguided = _with_score(scorer.score(search.sampler))
    return unguided, {
        word: scorer.score(each.sampler)
        for word, each in chosen.items()
        if each is not None and each.worth < math.inf
    }


def _with_score(found: Scored) -> Scored:
    if found.record.score is None:
        raise UserError(found.record.message)
    return found


def chosen_by(scored: Scored) -> tuple[Mapping[str, str], ...]:
    """The net by whose scores a search chose."""
    return (selector(scored.record.protocol),)
