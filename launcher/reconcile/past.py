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
from launcher.reconcile.hours import JobHours, hours, images_of
from launcher.reconcile.view import AttemptView, RunView
from selfguide.spec.config import Config
from selfguide.spec.config.laws import identity_of
from selfguide.spec.identity import canonical
from selfguide.spec.run import RunFolder

# ends of an attempt that come from the machines and not from the run's own code, its numbers or its user
FAULTS = ("node", "killed", "crash", "hang", "storage", "memory", "lost")
# where nobody measured it: imports, a rendezvous and reading a checkpoint
START_S = 60.0
# from the end of a job to the next one: Slurm holds a job that is requeued
GAPS_S = {"successor": 2.0, "requeue": 126.0, "none": 0.0}


@dataclass(frozen=True)
class Known:
    """A number, and where it comes from."""

    value: float
    # "measured", "estimated", "configured" or "given", and on what
    source: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One attempt of before, and how near it is to what is planned."""

    # 0: of this run, 1: of one that trains the same, 2: of another on the same cluster
    distance: int
    view: RunView
    at: AttemptView
    row: JobHours
    # the one before it, where it followed by itself
    before: JobHours | None


@dataclass(frozen=True, kw_only=True)
class Past:
    """What ran before, for one plan."""

    config: Config
    samples: tuple[Sample, ...]

    @classmethod
    def of(cls, run: RunFolder | None, config: Config, views: Sequence[RunView]) -> Past:
        """Returns the attempts of `run`, which may be among the views, and of others on the same cluster."""
        found = []
        for each in views:
            mine = each.folder == run
            alike = _speed_of_run(each) == _speed(config)
            rows = {row.attempt: row for row in hours(each).jobs if row.kind == "training"}
            for at in each.attempts:
                here = at.job is not None and at.job.record["kind"] == config.cluster.kind
                if at.number in rows and (mine or here):
                    before = None if at.by_hand else rows.get(at.number - 1)
                    distance = 0 if mine else 1 if alike else 2
                    found.append(
                        Sample(
                            distance=distance, view=each, at=at, row=rows[at.number], before=before
                        )
                    )
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
            "queued_s": self._median(lambda each: each.row.queued_s, 2),
            "evaluation_s": self._evaluation_s(),
            **self._faults(),
        }
        return estimates | {name: each for name, each in found.items() if each is not None}

    def _images_per_s(self, each: Sample) -> float | None:
        """Of one attempt; with other ranks as fast as theirs."""
        images = images_of(each.at)
        seconds = each.row.seconds.get("train", 0.0) + each.row.seconds.get("replayed", 0.0)
        if images is None or seconds <= 0 or not each.at.world:
            return None
        return (images[1] - images[0]) / seconds * self.config.ranks / each.at.world

    def _save_s(self, each: Sample) -> float | None:
        """Of one checkpoint. In the run itself also its share of the snapshots, which are written beside them."""
        images = images_of(each.at)
        if each.distance or images is None:
            return each.at.progress.get("save_s")
        saves = (images[1] - images[0]) / self.config.train.checkpoint_every
        spent = each.row.seconds.get("checkpoint")
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
        near = {each.view.folder.root: each.view for each in self.samples if each.distance < 2}
        took = [r.seconds for view in near.values() for r in view.records if r.seconds]
        scores = decide.counted(len(took), "score")
        return Known(statistics.median(took), f"measured: {scores}") if took else None

    def _faults(self) -> dict[str, Known]:
        """Failures a second and node, and preemptions a second and job, on this cluster."""
        here = [each for each in self.samples if each.at.job and not each.row.running]
        here = [e for e in here if e.at.job and e.at.job.record["kind"] == self.config.cluster.kind]
        node_s = sum(e.row.elapsed_s * e.at.job.record["nodes"] for e in here if e.at.job)
        job_s = sum(each.row.elapsed_s for each in here)
        kinds = [decide.cause(each.at).kind for each in here if not each.at.cancelled]
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
    trained = images_of(each.at) is not None
    seconds = each.row.seconds
    return seconds.get("start", 0.0) + seconds.get("compile", 0.0) if trained else None


def _gap_s(each: Sample) -> float | None:
    """Until the next job began, which cannot be before the one before it had ended."""
    if each.before is None or each.before.job == each.row.job:
        return None
    return max(0.0, each.row.start - each.before.end)


def _speed(config: Config) -> str:
    """What the time of a step depends on beside the machine."""
    about = {"model": identity_of(config.model), "engine": identity_of(config.engine)}
    return canonical({**about, "batch": config.train.batch, "guidance": config.guidance.source})


def _speed_of_run(view: RunView) -> str:
    of = view.identity
    about = {"model": of.get("model"), "engine": of.get("engine")}
    batch, guidance = of.get("train", {}).get("batch"), of.get("guidance", {}).get("source")
    return canonical({**about, "batch": batch, "guidance": guidance})
