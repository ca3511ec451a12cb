"""What a study measures of a snapshot of digits, each result kept in a file named by all that decides it.

Samples are drawn once and measured in two nets, each fitted on the scans that the other never saw: what one net has
chosen the other reports, which has chosen nothing. Networks of a study are so small that a second thread is of little
use to one: `Bench.measure` gives each core a snapshot of its own.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from threadpoolctl import threadpool_limits

import shards
from launcher.compose import compose
from launcher.reconcile import decide
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
from selfguide.sampling.condition_sampler import (
    TrainingImages,
    clusters_of,
    conditions_each_patch,
    samples_training_rows,
)
from selfguide.sampling.generate import NotFiniteError
from selfguide.sampling.grid import write_grid
from selfguide.sampling.groups import queried_prototypes
from selfguide.snapshot import Snapshot, load
from selfguide.spec.config import EvaluationConfig, SamplerConfig
from selfguide.spec.config.sampler import protocol_settings
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.weak import CONDITION
from shards import cli
from shards.format import manifest as manifests
from shards.format.manifest import digest
from shards.parallel import spread
from tools.better import drawn_pixels
from tools.guide_search import EVERYWHERE

# of the scans that fitted a net
Half = Literal["even", "odd"]
CHOOSES: Half = "even"
REPORTS: Half = "odd"
_BATCH = 250
_SHOWN = 64
# between two lines that say how far measuring is, where there is no terminal for a bar
_SAY_S = 30.0
# what a probe costs, in samples that are drawn in about the same time
_PROBE_SAMPLES = 2000


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


@dataclass(frozen=True)
class Wanted:
    """A measurement of the snapshot in a folder: of `images`, drawn as `guide` says, or else by probes."""

    snapshot: Path
    guide: Guide = field(default_factory=Guide)
    images: Set | None = None

    @property
    def cost(self) -> int:
        """About what it takes, in samples."""
        return self.images.count if self.images else _PROBE_SAMPLES


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
    # processes that measure at once
    workers: int = 1
    # what each result that was asked for took, by its file
    seconds: dict[Path, float] = field(default_factory=dict, repr=False)

    def measure(self, wanted: Iterable[Wanted], doing: str) -> None:
        """Measures all of this that is not known yet, on `workers` processes of a thread each.

        Raises:
            UserError: a process died.
        """
        missing = [each for each in dict.fromkeys(wanted) if not self._file(each).exists()]
        # what takes long is not begun last, when there is nothing left for the others
        missing.sort(key=lambda each: -each.cost)
        done = spread(_Worker(self, missing), range(len(missing)), self.workers)
        for _ in cli.track(_said(done, missing, doing), len(missing), doing):
            pass

    def sampled(self, snapshot: Snapshot, guide: Guide, images: Set) -> Sampled:
        """`images` drawn by the run's sampler as `guide` changes it.

        Raises:
            NotFiniteError: some of them are not finite.
        """
        what = self._of_samples(snapshot, guide, images)
        found, file = self._record(
            snapshot, what, lambda file: self._measured(snapshot, guide, images, file)
        )
        if "not_finite" in found:
            raise NotFiniteError(found["not_finite"])
        fd = {half: _score(found["fd"][half]) for half in self.nets}
        return Sampled(fd=fd, more=found["more"], grid=_picture(file))

    def groups(self, snapshot: Snapshot) -> dict[str, float]:
        """How the groups of all scans agree with the labels, and the share of groups that any of them is in.

        Patches have no labels, so that groups of patches have that share alone. Empty where the snapshot was told what
        an image is, or knows images by no group.
        """
        if not snapshot.conditioned or snapshot.guidance["source"] == "labels":
            return {}
        if conditions_each_patch(snapshot):
            return self._record(snapshot, {"what": "groups"}, lambda _: _of_patches(snapshot))[0]
        if samples_training_rows(snapshot):
            return {}

        def measure(_: Path) -> dict[str, float]:
            labels = shards.read_all(self.root)["y"]
            ids = clusters_of(snapshot, torch.arange(len(labels))).numpy()
            used = len(set(ids.tolist())) / len(snapshot.guidance["p"])
            return {**agreement(labels, ids), "utilisation": used}

        return self._record(snapshot, {"what": "groups"}, measure)[0]

    def probed(self, snapshot: Snapshot) -> dict[str, float]:
        """Accuracy of linear and k-NN probes of the best layer, as evaluation=probe_digits takes them."""
        evaluation = self._probes

        def measure(file: Path) -> dict[str, float]:
            found = probe(snapshot, evaluation, RankStatus(), file.with_suffix(".parts"))
            # there is no other rank
            assert found is not None
            return found.scores

        return self._record(snapshot, self._of_probes(), measure)[0]

    def _file(self, wanted: Wanted) -> Path:
        snapshot = loaded(wanted.snapshot)
        if wanted.images is None:
            return self._kept(snapshot, self._of_probes())[1]
        return self._kept(snapshot, self._of_samples(snapshot, wanted.guide, wanted.images))[1]

    def _of_samples(self, snapshot: Snapshot, guide: Guide, images: Set) -> dict[str, Any]:
        sampler = guide.sampler(snapshot.config.sampler)
        return {
            "sampler": [sampler.name, sampler.steps, sampler.g, sampler.interval],
            "settings": protocol_settings(sampler),
            "images": asdict(images),
            "nets": {half: sha256 for half, (_, sha256) in self.nets.items()},
        }

    def _of_probes(self) -> dict[str, Any]:
        return {"what": "probe", **asdict(self._probes)}

    def _kept(self, snapshot: Snapshot, what: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
        """All that decides a result, and the file that it is kept in."""
        what = {"snapshot": snapshot.sha256, "shards": self._manifest, **what}
        return what, self.kept / f"{digest(what)}.json"

    def _record(
        self, snapshot: Snapshot, what: Mapping[str, Any], measure: Callable[[Path], dict[str, Any]]
    ) -> tuple[dict[str, Any], Path]:
        """What `measure` finds of a snapshot, from the file that it is kept in, and the file."""
        what, file = self._kept(snapshot, what)

        def make() -> dict[str, Any]:
            began = time.monotonic()
            found = measure(file)
            return {"what": what, "found": found, "seconds": time.monotonic() - began}

        kept = record(file, make)
        self.seconds[file] = kept["seconds"]
        return kept["found"], file

    def _measured(
        self, snapshot: Snapshot, guide: Guide, images: Set, file: Path
    ) -> dict[str, Any]:
        sampler = guide.sampler(snapshot.config.sampler)
        guided = replace(snapshot, config=replace(snapshot.config, sampler=sampler))
        try:
            pixels = drawn_pixels(guided, images.seed, _BATCH)(0, images.count)
        except NotFiniteError as error:
            # the same samples would come to the same
            return {"not_finite": str(error)}
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
    def _probes(self) -> EvaluationConfig:
        words = ("experiment=digits_uncond", "evaluation=probe_digits", f"data.root={self.root}")
        return compose(words).evaluation

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


@dataclass(frozen=True)
class _Worker:
    """One process of `Bench.measure`."""

    bench: Bench
    missing: list[Wanted]

    def __call__(self, task: int) -> int:
        wanted, threads = self.missing[task], torch.get_num_threads()
        snapshot = loaded(wanted.snapshot)
        torch.set_num_threads(1)
        try:
            # threads of a linear algebra of matrices as small as these wait for one another; what is not finite is kept
            # as such, for whoever reads it
            with threadpool_limits(1), contextlib.suppress(NotFiniteError):
                if wanted.images is None:
                    self.bench.probed(snapshot)
                else:
                    self.bench.sampled(snapshot, wanted.guide, wanted.images)
        finally:
            torch.set_num_threads(threads)
        return task


def _said(done: Iterable[int], missing: list[Wanted], doing: str) -> Iterator[int]:
    """What is done as it goes by; where there is no terminal, how far that is and how long the rest will take."""
    began = said = time.monotonic()
    whole, so_far = sum(each.cost for each in missing), 0
    for count, task in enumerate(done, 1):
        yield task
        so_far += missing[task].cost
        now = time.monotonic()
        if now - said >= _SAY_S and count < len(missing) and not sys.stderr.isatty():
            left = decide.minutes((now - began) * (whole - so_far) / so_far)
            print(f"{doing}: {count} of {len(missing)}, about {left} left", file=sys.stderr)
            said = now


@lru_cache(maxsize=16)
def loaded(folder: Path) -> Snapshot:
    """The snapshot in a folder; the last few stay in memory, since much is asked of each in turn."""
    return load(folder)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def _of_patches(snapshot: Snapshot) -> dict[str, float]:
    """The share of prototypes that any patch of a training image is nearest to."""
    images = TrainingImages(snapshot)
    used: set[int] = set()
    for ordinals in torch.arange(images.count).split(_BATCH):
        used |= set(queried_prototypes(snapshot, images.x0(ordinals), ordinals).tolist())
    return {"utilisation": len(used) / len(snapshot.guidance["p"])}


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
