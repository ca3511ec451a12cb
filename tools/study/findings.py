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
from selfguide.sampling.generate import generate
from selfguide.sampling.grid import write_grid
from selfguide.snapshot import Snapshot, load
from shards import cli
from tools.study.arms import Arm
from tools.study.guided import Guided, Search, guided
from tools.study.measure import CHOOSES, Bench, Guide, Set
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


def find_out(bench: Bench, arm: Arm, runs: Sequence[Trained], search: Search) -> Found:
    """Measures what is not known yet of an arm's runs, one a seed.

    Probes take a minute each: through training those of the first seed, at the end those of all.
    """
    # a run may have been made longer since, and arms are compared at equal images
    listed = [
        (seed, run, images)
        for seed, run in enumerate(runs)
        for images in run.run.published()
        if images <= run.config.train.images
    ]
    curves: list[list[Point]] = [[] for _ in runs]
    for seed, run, images in cli.track(listed, len(listed), f"{arm.name}: snapshots"):
        snapshot = load(run.run.snapshot(images))
        last = images == run.config.train.images
        point = Point(
            images=images,
            fd=bench.sampled(snapshot, Guide(), Set(0, search.chooses)).fd[CHOOSES],
            groups=bench.groups(snapshot),
            probe=bench.probed(snapshot) if last or seed == 0 else {},
        )
        curves[seed].append(point)
    found = guided(bench, runs, search, arm.name)
    return Found(arm=arm, runs=runs, curves=curves, guided=found)


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
