"""How an arm is guided best: searched with few samples in one net, reported with others in a net that chose nothing."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from scipy import stats

from selfguide.evaluation.metrics.frechet import FrechetScore
from selfguide.sampling.generate import NotFiniteError
from selfguide.snapshot import Snapshot
from selfguide.spec.weak import CONDITION
from tools.guide_search import EVERYWHERE
from tools.study.measure import CHOOSES, Bench, Guide, Half, Set, Wanted, difference, loaded
from tools.study.training import Trained

WEIGHTS = (1.15, 1.3, 1.5, 2.0)
# everywhere, and without the noisiest and the cleanest times (Kynkaanniemi et al. 2024, arXiv 2404.07724)
INTERVALS = (EVERYWHERE, (0.2, 0.8))
# images that are reported are none of those that chose
FRESH = 1_000_000
LEVEL = 0.95
Scores = Mapping[Half, FrechetScore]


@dataclass(frozen=True, kw_only=True)
class Search:
    """Which guidance is tried, and with how many samples it is chosen and reported."""

    weights: Sequence[float] = WEIGHTS
    chooses: int = 1000
    reports: int = 5000
    # whether snapshots of the first seed are probed through training, and not at its end alone
    probes_through: bool = True

    @property
    def first(self) -> Set:
        """The samples that choose."""
        return Set(0, self.chooses)

    @property
    def fresh(self) -> Set:
        """The samples that are reported."""
        return Set(FRESH, self.reports)

    def guides(self, snapshot: Snapshot, published: Collection[int]) -> list[Guide]:
        """None first, then each weight in each interval away from each weak model that a run has anyway.

        That is the model without its condition, where it has one, and its snapshot after about a quarter of its images.

        Args:
            published: images seen of the snapshots that all runs have.
        """
        earlier = [images for images in published if images < snapshot.images]
        quarter = sorted(earlier, key=lambda images: abs(images - snapshot.images / 4))[:1]
        dropped = [CONDITION] if snapshot.conditioned and not snapshot.never_null else []
        weak = [*dropped, *(f"snapshot-{images}" for images in quarter)]
        return [
            Guide(),
            *(
                Guide(g=g, interval=where, weak=away)
                for away in weak
                for where in INTERVALS
                for g in self.weights
                if g != 1
            ),
        ]


@dataclass(frozen=True, kw_only=True)
class Guided:
    """An arm's runs, one a seed: what was searched, and what is reported of it."""

    # a distance a seed of the net that chooses
    searched: Mapping[Guide, Sequence[FrechetScore]]
    # in both nets, of images that chose nothing
    unguided: Sequence[Scores]
    best: Sequence[Scores]

    @cached_property
    def chosen(self) -> Guide:
        return chosen(self.searched)

    @property
    def choice(self) -> float:
        """What the chosen guidance scored in the net that chose it: by this arms are chosen as well."""
        return mean(self.searched[self.chosen])


def chosen(searched: Mapping[Guide, Sequence[FrechetScore]]) -> Guide:
    """One guidance for all seeds: that with the least mean distance; the first of equal ones."""
    return min(searched, key=lambda guide: mean(searched[guide]))


def mean(scores: Sequence[FrechetScore]) -> float:
    """Of distances without the bias of their finite number of samples."""
    return statistics.fmean(score.corrected for score in scores)


@dataclass(frozen=True)
class Candidates:
    """The last snapshots of an arm's runs, one a seed, and how they may be guided."""

    name: str
    snapshots: Sequence[Path]
    guides: Sequence[Guide]

    @staticmethod
    def of(name: str, runs: Sequence[Trained], search: Search) -> Candidates:
        """Of runs of one arm, which has weak models that all of them have."""
        published = set.intersection(*(set(each.run.published()) for each in runs))
        folders = [each.final for each in runs]
        return Candidates(name, folders, search.guides(loaded(folders[0]), published))

    def wanted(self, search: Search) -> list[Wanted]:
        """What is measured before any is chosen."""
        first = [each for guide in self.guides for each in self.drawn(guide, search.first)]
        return [*first, *self.drawn(Guide(), search.fresh)]

    def drawn(self, guide: Guide, images: Set) -> list[Wanted]:
        """Of each seed."""
        return [Wanted(snapshot, guide, images) for snapshot in self.snapshots]


def guided(bench: Bench, arms: Sequence[Candidates], search: Search) -> dict[str, Guided]:
    """Searches the best guidance of each arm, and measures it with samples that chose nothing.

    Raises:
        NotFiniteError: samples without guidance are not finite.
    """
    bench.measure([each for arm in arms for each in arm.wanted(search)], "searching guidance")
    searched = {arm.name: _searched(bench, arm, search) for arm in arms}
    best = [arm.drawn(chosen(searched[arm.name]), search.fresh) for arm in arms]
    bench.measure([each for several in best for each in several], "best guidance")
    return {arm.name: _reported(bench, arm, searched[arm.name], search) for arm in arms}


def _searched(bench: Bench, arm: Candidates, search: Search) -> dict[Guide, list[FrechetScore]]:
    """Each guidance's distances, a seed each; without those whose samples are not finite."""
    found = {guide: _finite(bench, arm, guide, search.first) for guide in arm.guides}
    return {guide: [each[CHOOSES] for each in s] for guide, s in found.items() if s is not None}


def _reported(
    bench: Bench, arm: Candidates, searched: dict[Guide, list[FrechetScore]], search: Search
) -> Guided:
    unguided = scores(bench, arm, Guide(), search.fresh)
    while (best := _finite(bench, arm, chosen(searched), search.fresh)) is None:
        # those that chose it were finite
        del searched[chosen(searched)]
    return Guided(searched=searched, unguided=unguided, best=best)


def _finite(bench: Bench, arm: Candidates, guide: Guide, images: Set) -> list[Scores] | None:
    """Scores of each seed, or None where a guidance makes samples that are not finite, which is said."""
    try:
        return scores(bench, arm, guide, images)
    except NotFiniteError as error:
        if guide == Guide():
            raise
        print(f"{arm.name}: {guide} is left out of the search, since {error}", file=sys.stderr)
        return None


def scores(bench: Bench, arm: Candidates, guide: Guide, images: Set) -> list[Scores]:
    """Of each seed.

    Raises:
        NotFiniteError: samples are not finite.
    """
    return [bench.sampled(loaded(folder), guide, images).fd for folder in arm.snapshots]


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A score of a less that of b over pairs of runs of one seed, and the interval that holds its mean with 95 %."""

    each: tuple[float, ...]
    mean: float
    low: float
    high: float
    # of what the interval speaks: runs of other seeds, or, of one pair, other samples of the same two
    over: str

    @property
    def verdict(self) -> str:
        """Whether a's score is the lower one."""
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "not distinguishable"

    @staticmethod
    def of(each: Sequence[float], se: float, freedom: int) -> Paired:
        """Of the differences of pairs: by Student's t of these, or of one by its standard error.

        Args:
            se: of a single difference, with `freedom` degrees of freedom.
        """
        over = "samples"
        if len(each) > 1:
            se, freedom, over = statistics.stdev(each) / len(each) ** 0.5, len(each) - 1, "runs"
        middle = statistics.fmean(each)
        wide = se * float(stats.t.ppf((1 + LEVEL) / 2, freedom))
        return Paired(
            each=tuple(each), mean=middle, low=middle - wide, high=middle + wide, over=over
        )


def paired(a: Sequence[FrechetScore], b: Sequence[FrechetScore]) -> Paired:
    """Of distances of runs in the same order of seeds, of one pair by its jackknife."""
    found = [difference(x, y) for x, y in zip(a, b, strict=True)]
    freedom = len(found[0].left_out) - 1
    return Paired.of([score.corrected for score in found], found[0].se, freedom)
