"""What is found out about an arm: through training, at its end, and over guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from selfguide.data.normaliser import Normaliser
from selfguide.evaluation.features.digitnet import TOP
from selfguide.evaluation.metrics.frechet import FrechetScore
from selfguide.sampling.condition_sampler import samples_training_rows
from selfguide.sampling.generate import NotFiniteError, generate
from selfguide.sampling.grid import write_grid
from selfguide.snapshot import Snapshot
from tools.study.arms import Arm
from tools.study.guided import Candidates, Guided, Search, guided, scores
from tools.study.measure import CHOOSES, Bench, Guide, Wanted, loaded
from tools.study.training import Trained

# rows and samples of a picture of clusters
_ROWS, _EACH = 10, 10


@dataclass(frozen=True, kw_only=True)
class Point:
    """One seed's snapshot after so many images."""

    images: int
    fd: FrechetScore
    # NMI and ARI of its groups with the labels, and how many of them are in use; empty where it has none
    groups: Mapping[str, float]
    # accuracies of probes; empty where none was taken
    probe: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Found:
    """One arm."""

    arm: Arm
    runs: Sequence[Trained]
    # of each seed through training
    curves: Sequence[Sequence[Point]]
    guided: Guided
    # the share of unguided samples that are all but copies of a training image, of each seed
    copies: Sequence[float] = ()

    @property
    def seeds(self) -> list[int]:
        return [run.config.seed for run in self.runs]

    @cached_property
    def images(self) -> list[int]:
        """After which every seed has a snapshot."""
        shared = set.intersection(*({point.images for point in curve} for curve in self.curves))
        return sorted(shared)

    def at(self, images: int) -> list[Point]:
        """Every seed's snapshot after so many images."""
        return [point for curve in self.curves for point in curve if point.images == images]

    @property
    def last(self) -> list[Point]:
        return [curve[-1] for curve in self.curves]


@dataclass(frozen=True, kw_only=True)
class _Snapshots:
    """An arm's runs, whose snapshots are measured after the images that each was to see."""

    arm: Arm
    runs: Sequence[Trained]
    search: Search

    @property
    def listed(self) -> list[tuple[int, int, Path]]:
        """Which run, after how many images, and the snapshot's folder."""
        # a run may have been made longer since, and arms are compared at equal images
        return [
            (n, images, run.run.snapshot(images))
            for n, run in enumerate(self.runs)
            for images in run.run.published()
            if images <= run.config.train.images
        ]

    def probes(self, n: int, images: int) -> bool:
        """Probes take a minute each: through training those of the first seed, at the end those of all."""
        last = images == self.runs[n].config.train.images
        return last or (n == 0 and self.search.probes_through)

    def wanted(self) -> list[Wanted]:
        first = self.search.first
        drawn = [Wanted(folder, images=first) for _, _, folder in self.listed]
        probed = [Wanted(folder) for n, images, folder in self.listed if self.probes(n, images)]
        return drawn + probed

    def curves(self, bench: Bench) -> list[list[Point]]:
        """Of each run, by what has been measured."""
        curves: list[list[Point]] = [[] for _ in self.runs]
        for n, images, folder in self.listed:
            snapshot = loaded(folder)
            point = Point(
                images=images,
                fd=bench.sampled(snapshot, Guide(), self.search.first).fd[CHOOSES],
                groups=bench.groups(snapshot),
                probe=bench.probed(snapshot) if self.probes(n, images) else {},
            )
            curves[n].append(point)
        return curves


def find_out(
    bench: Bench, runs: Mapping[Arm, Sequence[Trained]], search: Search
) -> tuple[dict[str, Found], dict[str, str]]:
    """Measures what is not known yet of each arm's runs, one a seed.

    Returns:
        what is found out about each arm by its name, and why others could not be measured.
    """
    candidates = {arm: Candidates.of(arm.name, own, search) for arm, own in runs.items()}
    snapshots = {arm: _Snapshots(arm=arm, runs=own, search=search) for arm, own in runs.items()}
    bench.measure(
        [
            each
            for arm in runs
            for each in (*snapshots[arm].wanted(), *candidates[arm].wanted(search))
        ],
        "measuring",
    )
    curves: dict[Arm, list[list[Point]]] = {}
    left_out = {}
    for arm in runs:
        try:
            curves[arm] = snapshots[arm].curves(bench)
            scores(bench, candidates[arm], Guide(), search.fresh)
        except NotFiniteError as error:
            left_out[arm.name] = str(error)
    best = guided(bench, [candidates[arm] for arm in curves], search)
    found = {
        arm.name: Found(
            arm=arm,
            runs=runs[arm],
            curves=of,
            guided=best[arm.name],
            copies=[
                bench.sampled(loaded(run.final), Guide(), search.fresh).more["copy_rate"]
                for run in runs[arm]
            ],
        )
        for arm, of in curves.items()
    }
    return found, left_out


def draw_clusters(snapshot: Snapshot, guide: Guide, file: Path) -> bool:
    """Draws samples of some groups, a group a row, the largest first; returns whether there are groups of images."""
    if not snapshot.conditioned or samples_training_rows(snapshot):
        return False
    p = torch.tensor(snapshot.guidance["p"])
    largest = p.argsort(descending=True)[:_ROWS]
    ids = largest[p[largest] > 0].repeat_interleave(_EACH)
    sampler = guide.sampler(snapshot.config.sampler)
    drawn = generate(snapshot, sampler, seed=0, count=len(ids), batch=len(ids), groups=ids)
    pixels = Normaliser.of(snapshot.data["header"]).pixels(torch.cat([x for x, _ in drawn]))
    shown = (pixels.float() * (255 / TOP)).round().to(torch.uint8)
    write_grid(file, shown, columns=_EACH, zoom=3)
    return True
