"""What jobs cost here so far: speed, saves, starts, gaps and faults, each with where it comes from.

The nearest attempts count: those of the run itself, then those of runs that train the same network in the same
batches, then all others on the same cluster. What nobody measured is estimated where that can be.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher import jobs
from launcher.reconcile import decide
from launcher.reconcile.hours import JobHours
from launcher.reconcile.lived import Lived, Try, speed
from selfguide.spec.config import Config
from selfguide.spec.config.laws import identity_of
from selfguide.spec.run import RunFolder

# ends of an attempt that come from the machines and not from the run's own code, its numbers or its user
FAULTS = ("node", "killed", "crash", "hang", "storage", "memory", "lost")
# where nobody measured it: imports, a rendezvous and reading a checkpoint
START_S = 60.0
# from the end of a job to the next one: Slurm holds a job that is requeued
GAPS_S = {"successor": 2.0, "requeue": 126.0, "watcher": 7.0, "none": 0.0}


@dataclass(frozen=True)
class Known:
    """A number, and where it comes from."""

    value: float
    # "measured", "estimated", "configured" or "given", and on what
    source: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One earlier attempt, and how near it is to what is planned."""

    # 0: of this run, 1: of one that trains the same, 2: of another on the same cluster
    distance: int
    of: Lived
    at: Try
    # the one before it, where it followed by itself
    before: JobHours | None


@dataclass(frozen=True, kw_only=True)
class Past:
    """What ran before, for one plan."""

    config: Config
    samples: tuple[Sample, ...]

    @classmethod
    def of(cls, run: RunFolder | None, config: Config, lived: Sequence[Lived]) -> Past:
        """Returns the attempts of `run`, which may be among those that lived, and of others on the same cluster."""
        wanted = _speed(config)
        found = []
        for each in lived:
            mine = each.folder == run
            distance = 0 if mine else 1 if each.speed == wanted else 2
            rows = {at.number: at.row for at in each.tries}
            for at in each.tries:
                if mine or at.cluster == config.cluster.kind:
                    before = None if at.by_hand else rows.get(at.number - 1)
                    found.append(Sample(distance=distance, of=each, at=at, before=before))
        return cls(config=config, samples=tuple(found))

    def known(self) -> dict[str, Known]:
        """Returns what is measured, and estimates of what costs time by itself."""
        restart = self.config.cluster.restart
        estimates = {
            "save_s": Known(
                jobs.expected_save_s(self.config, None), "estimated from the size of a checkpoint"
            ),
            "start_s": Known(START_S, "estimated"),
            "gap_s": Known(GAPS_S[restart], f"estimated for cluster.restart={restart}"),
        }
        found = {
            "images_per_s": self._median(self._images_per_s, 1),
            "save_s": self._median(self._save_s, 1),
            "start_s": self._median(_start_s, 2),
            "gap_s": self._median(_gap_s, 2),
            "queued_s": self._median(lambda each: each.at.row.queued_s, 2),
            "evaluation_s": self._evaluation_s(),
            **self._faults(),
        }
        return estimates | {name: each for name, each in found.items() if each is not None}

    def _images_per_s(self, each: Sample) -> float | None:
        """Of one attempt; with other ranks as fast as theirs."""
        images, seconds = each.at.images, each.at.row.seconds
        trained = seconds.get("train", 0.0) + seconds.get("replayed", 0.0)
        if images is None or trained <= 0 or not each.at.world:
            return None
        return (images[1] - images[0]) / trained * self.config.ranks / each.at.world

    def _save_s(self, each: Sample) -> float | None:
        """Of one checkpoint. In the run itself also its share of the snapshots, which are written beside them."""
        images = each.at.images
        if each.distance or images is None:
            return each.at.save_s
        saves = (images[1] - images[0]) / self.config.train.checkpoint_every
        spent = each.at.row.seconds.get("checkpoint")
        return spent / max(1.0, saves) if spent else None

    def _median(self, of: Callable[[Sample], float | None], furthest: int) -> Known | None:
        """Over the nearest attempts that say something, `furthest` away at most."""
        for distance in range(furthest + 1):
            near = [each for each in self.samples if each.distance == distance]
            values = [(each, value) for each in near if (value := of(each)) is not None]
            if values:
                others = {each.at.world for each, _ in values} - {self.config.ranks}
                scaled = bool(others) and of == self._images_per_s
                where = ("this run", "runs that train the same", "other runs on this cluster")
                source = f"{'estimated' if scaled else 'measured'}: {where[distance]}, "
                source += decide.counted(len(values), "attempt")
                source += f" of {', '.join(map(str, sorted(others)))} ranks" if scaled else ""
                return Known(statistics.median(value for _, value in values), source)
        return None

    def _evaluation_s(self) -> Known | None:
        if self.config.evaluation.protocol == "none":
            return None
        near = {each.of.folder.root: each.of for each in self.samples if each.distance < 2}
        took = [seconds for each in near.values() for seconds in each.scores_s]
        scores = decide.counted(len(took), "score")
        return Known(statistics.median(took), f"measured: {scores}") if took else None

    def _faults(self) -> dict[str, Known]:
        """Failures a second and node, and preemptions a second and job, on this cluster."""
        here = [each.at for each in self.samples if each.at.cluster == self.config.cluster.kind]
        here = [at for at in here if not at.row.running]
        node_s = sum(at.row.elapsed_s * at.nodes for at in here)
        job_s = sum(at.row.elapsed_s for at in here)
        kinds = [at.cause for at in here if not at.cancelled]
        failed = [kind for kind in kinds if kind in FAULTS]
        asked = [kind for kind in kinds if kind in ("preempted", "outside")]
        hours_of = f"{node_s / 3600:,.2f} node-hours on cluster={self.config.cluster.kind}"
        found = {}
        if failed:
            each = ", ".join(f"{failed.count(kind)} {kind}" for kind in FAULTS if kind in failed)
            found["failures_per_node_s"] = Known(
                len(failed) / node_s, f"measured: {each} in {hours_of}"
            )
        else:
            found["failures_per_node_s"] = Known(0.0, f"none in {hours_of}, so none is assumed")
        if asked:
            source = f"measured: {decide.counted(len(asked), 'preemption')} in {job_s / 3600:,.2f} job-hours"
            found["preemptions_per_s"] = Known(len(asked) / job_s, source)
        return found


def _start_s(each: Sample) -> float | None:
    seconds = each.at.row.seconds
    return (
        None if each.at.images is None else seconds.get("start", 0.0) + seconds.get("compile", 0.0)
    )


def _gap_s(each: Sample) -> float | None:
    """Until the next job began, which cannot be before the one before it had ended."""
    if each.before is None or each.before.job == each.at.row.job:
        return None
    return max(0.0, each.at.row.start - each.before.end)


def _speed(config: Config) -> str:
    identity = {"model": identity_of(config.model), "engine": identity_of(config.engine)}
    about = {"batch": config.train.batch}
    return speed({**identity, "train": about, "guidance": {"source": config.guidance.source}})
