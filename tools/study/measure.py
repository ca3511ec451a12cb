"""What a study measures of a snapshot of digits, each result kept in a file named by all that decides it.

Samples are drawn once and measured in two nets, each fitted on the scans that the other never saw: what one net has
chosen the other reports, which has chosen nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

import shards
from launcher.compose import compose
from selfguide.discovery.agreement import agreement
from selfguide.discovery.resumable import record
from selfguide.evaluation.features.digitnet import TOP, DigitNet, embed, load_digitnet
from selfguide.evaluation.job import score
from selfguide.evaluation.metrics.frechet import (
    FrechetScore,
    Reference,
    frechet,
    jackknifed,
    parted,
)
from selfguide.evaluation.metrics.moments import Moments
from selfguide.evaluation.probe import probe
from selfguide.sampling.condition_sampler import clusters_of, samples_training_rows
from selfguide.sampling.grid import write_grid
from selfguide.snapshot import Snapshot
from selfguide.spec.config import SamplerConfig
from selfguide.spec.config.sampler import protocol_settings
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.weak import CONDITION
from shards.format import manifest as manifests
from shards.format.manifest import digest
from tools.better import drawn_pixels
from tools.guide_search import EVERYWHERE

# of the scans that fitted a net
Half = Literal["even", "odd"]
CHOOSES: Half = "even"
REPORTS: Half = "odd"
_BATCH = 500
_SHOWN = 64


@dataclass(frozen=True, kw_only=True)
class Guide:
    """What is changed of a run's sampler: how it is guided."""

    g: float = 1.0
    interval: tuple[float, float] = EVERYWHERE
    # what it leads away from, as `sampler.weak` words it
    weak: str = CONDITION

    @staticmethod
    def of(sampler: SamplerConfig) -> Guide:
        """How a run's own sampler guides."""
        return Guide(**{each.name: getattr(sampler, each.name) for each in fields(Guide)})

    def sampler(self, of: SamplerConfig) -> SamplerConfig:
        return replace(of, **asdict(self))

    def __str__(self) -> str:
        if self.g == 1:
            return "unguided"
        where = "" if self.interval == EVERYWHERE else " in [{:g}, {:g}]".format(*self.interval)
        away = "" if self.weak == CONDITION else f" from {self.weak}"
        return f"g={self.g:g}{where}{away}"


@dataclass(frozen=True)
class Set:
    """Which samples are drawn: image i is a function of the snapshot and `seed + i`."""

    seed: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What samples of a snapshot come to."""

    # the distance to all scans, by net
    fd: Mapping[Half, FrechetScore]
    # as `fd_digits` scores them: floor, copy_rate, confident, classes
    more: Mapping[str, float]
    # a picture of some of them
    grid: Path


@dataclass(frozen=True)
class Bench:
    """The scans, the two nets, and the folder where results are kept."""

    root: str
    kept: Path
    nets: Mapping[Half, tuple[DigitNet, str]] = field(repr=False)

    def sampled(self, snapshot: Snapshot, guide: Guide, images: Set) -> Sampled:
        """`images` drawn by the run's sampler as `guide` changes it."""
        sampler = guide.sampler(snapshot.config.sampler)
        what = {
            "sampler": [sampler.name, sampler.steps, sampler.g, sampler.interval],
            "settings": protocol_settings(sampler),
            "images": asdict(images),
            "nets": {half: sha256 for half, (_, sha256) in self.nets.items()},
        }
        found, file = self._record(
            snapshot, what, lambda file: self._measured(snapshot, sampler, images, file)
        )
        fd = {half: _score(found["fd"][half]) for half in self.nets}
        return Sampled(fd=fd, more=found["more"], grid=_picture(file))

    def groups(self, snapshot: Snapshot) -> dict[str, float]:
        """How the groups of all scans agree with the labels, and the share of groups that any of them is in.

        Empty where the snapshot knows images by no group of their own.
        """
        if not snapshot.conditioned or samples_training_rows(snapshot):
            return {}

        def measure(_: Path) -> dict[str, float]:
            labels = shards.read_all(self.root)["y"]
            ids = clusters_of(snapshot, torch.arange(len(labels))).numpy()
            used = len(set(ids.tolist())) / len(snapshot.guidance["p"])
            return {**agreement(labels, ids), "utilisation": used}

        return self._record(snapshot, {"what": "groups"}, measure)[0]

    def probed(self, snapshot: Snapshot) -> dict[str, float]:
        """Accuracy of linear and k-NN probes of the best layer, as evaluation=probe_digits takes them."""
        words = ("experiment=digits_uncond", "evaluation=probe_digits", f"data.root={self.root}")
        evaluation = compose(words).evaluation

        def measure(file: Path) -> dict[str, float]:
            found = probe(snapshot, evaluation, RankStatus(), file.with_suffix(".parts"))
            # there is no other rank
            assert found is not None
            return found.scores

        return self._record(snapshot, {"what": "probe", **asdict(evaluation)}, measure)[0]

    def _record(
        self, snapshot: Snapshot, what: Mapping[str, Any], measure: Callable[[Path], dict[str, Any]]
    ) -> tuple[dict[str, Any], Path]:
        """What `measure` finds of a snapshot, from the file that it is kept in, and the file."""
        what = {"snapshot": snapshot.sha256, "shards": self._manifest, **what}
        file = self.kept / f"{digest(what)}.json"

        def make() -> dict[str, Any]:
            began = time.monotonic()
            found = measure(file)
            return {"what": what, "found": found, "seconds": time.monotonic() - began}

        return record(file, make)["found"], file

    def _measured(
        self, snapshot: Snapshot, sampler: SamplerConfig, images: Set, file: Path
    ) -> dict[str, Any]:
        guided = replace(snapshot, config=replace(snapshot.config, sampler=sampler))
        pixels = drawn_pixels(guided, images.seed, _BATCH)(0, images.count)
        shown = (pixels[:_SHOWN].float() * (255 / TOP)).round().to(torch.uint8)
        write_grid(_picture(file), shown)
        fd = {}
        for of, (net, _) in self.nets.items():
            moments = Moments(self._references[of].mean)
            moments.update(embed(net, pixels)[0], 0)
            fd[of] = asdict(frechet(self._references[of], moments))
        more, _ = parted(score(self.nets["even"][0], self._scans, pixels))
        return {"fd": fd, "more": more}

    @cached_property
    def _manifest(self) -> str:
        return manifests.load(self.root).hash

    @cached_property
    def _scans(self) -> torch.Tensor:
        return torch.as_tensor(shards.read_all(self.root)["x"])

    @cached_property
    def _references(self) -> dict[Half, Reference]:
        return {
            of: Reference.of(Moments.of(embed(net, self._scans)[0]))
            for of, (net, _) in self.nets.items()
        }


def both_nets() -> dict[Half, tuple[DigitNet, str]]:
    """The two nets with the sha256 of their weights."""
    return {"even": load_digitnet("fd_digits"), "odd": load_digitnet("fd_digits_odd")}


def difference(a: FrechetScore, b: FrechetScore) -> FrechetScore:
    """FD(a) - FD(b) of two sets of the same images, by the jackknife that leaves a block out of both."""
    left_out = [x - y for x, y in zip(a.left_out, b.left_out, strict=True)]
    return jackknifed(a.value - b.value, left_out)


def _picture(file: Path) -> Path:
    return file.with_suffix(".png")


def _score(values: Mapping[str, Any]) -> FrechetScore:
    return FrechetScore(**{**values, "left_out": tuple(values["left_out"])})
