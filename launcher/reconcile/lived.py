"""What runs have taken so far, in few numbers: read again only of runs that may still change.

A run whose jobs are all over changes where somebody goes on with it, and that its folders' times tell. Of such a run
these numbers are kept in the user's cache, in place of the hundreds of small files that they come from.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.backends import settled
from launcher.folder import evaluations
from launcher.reconcile import cache
from launcher.reconcile.attempts import Kind, attempt_state, cause
from launcher.reconcile.hours import Hours, JobHours, hours, images_of
from launcher.reconcile.spans import measured
from launcher.reconcile.view import JobView, RunView, read_many
from selfguide.spec.identity import canonical
from selfguide.spec.run import RunFolder, names_in

# after so long no scheduler says any more than it has said
DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Sums:
    """GPU-seconds of a run, by class."""

    # what they count: "GPU" or "rank"
    unit: str
    # of some job only its own files say how long it had its nodes
    about: bool
    total_s: float
    effective: float | None
    queued_s: float
    # of all jobs, and of those that train; every class is there
    seconds: Mapping[str, float]
    training: Mapping[str, float]

    @classmethod
    def of(cls, found: Hours) -> Sums:
        """Returns the sums of a run's jobs."""
        queued = (job.queued_s or 0.0 for job in found.jobs if job.kind == "training")
        return cls(
            unit=found.unit,
            about=found.about,
            total_s=found.total_s,
            effective=found.effective,
            queued_s=sum(queued),
            seconds=found.seconds(),
            training=found.seconds("training"),
        )


@dataclass(frozen=True, kw_only=True)
class Try:
    """One attempt that had nodes."""

    number: int
    by_hand: bool
    # kind of the cluster that has its job, and its nodes; None and 0 where there is no job
    cluster: str | None
    nodes: int
    world: int
    cancelled: bool
    # why it ended; None while it runs
    cause: Kind | None
    # from which to which it trained
    images: tuple[int, int] | None
    # its slowest checkpoint
    save_s: float | None
    row: JobHours


@dataclass(frozen=True, kw_only=True)
class Lived:
    """What one run has taken so far."""

    folder: RunFolder
    id: str
    experiment: str
    # what the time of a step depends on, by the run's identity (`speed`)
    speed: str
    sums: Sums
    tries: tuple[Try, ...]
    # seconds that each score took
    scores_s: tuple[float, ...]

    @classmethod
    def of(cls, view: RunView) -> Lived:
        """Returns what a run has taken, by a view with its history."""
        found = hours(view)
        rows = {row.attempt: row for row in found.jobs if row.kind == "training"}
        tries = [
            Try(
                number=at.number,
                by_hand=at.by_hand,
                cluster=at.job.record["kind"] if at.job else None,
                nodes=int(at.job.record["nodes"]) if at.job else 0,
                world=at.world,
                cancelled=at.cancelled,
                cause=None if row.running else cause(at).kind,
                images=images_of(at),
                save_s=at.progress.get("save_s"),
                row=row,
            )
            for at in view.attempts
            if (row := rows.get(at.number)) is not None
        ]
        return cls(
            folder=view.folder,
            id=view.id,
            experiment=view.experiment,
            speed=speed(view.identity),
            sums=Sums.of(found),
            tries=tuple(tries),
            scores_s=tuple(record.seconds for record in view.records if record.seconds),
        )


def speed(identity: Mapping[str, Any]) -> str:
    """Returns what the time of a step depends on beside the machine."""
    about = {name: identity.get(name) for name in ("model", "engine")}
    batch = identity.get("train", {}).get("batch")
    guidance = identity.get("guidance", {}).get("source")
    return canonical({**about, "batch": batch, "guidance": guidance})


def read_lived(runs: Sequence[RunFolder], *, ask: bool = True) -> tuple[list[Lived], list[str]]:
    """Returns what each run that can be read has taken, in their order, and a sentence for each that cannot be read.

    Args:
        ask: asks accounting for the jobs of which it has not said yet when they had their nodes.
    """
    if not runs:
        return [], []
    found: dict[RunFolder, Lived] = {}
    with cache.of_runs(runs[0].root.parent.parent, "lived-asked" if ask else "lived") as kept:
        stamps = {run: _stamp(run) for run in runs}
        for run in runs:
            if (known := kept.known(str(run.root), stamps[run])) is not None:
                found[run] = known
        others = [run for run in runs if run not in found]
        views, problems = read_many(others, configs=False, history=True, kept=kept)
        for view in measured(views, ask=ask):
            run = view.folder
            found[run] = Lived.of(view)
            if _over(view, max(stamps[run][2::3]) / 1e9, asked=ask):
                kept.keep(str(run.root), stamps[run], found[run])
    return [found[run] for run in runs if run in found], problems


def _stamp(run: RunFolder) -> tuple[int, ...]:
    """Changes wherever a run does: files of its attempts and records of its scores appear by renaming."""
    paths = [str(run.run_json), str(run.attempts), str(run.evals), str(evaluations(run))]
    paths += [f"{run.attempts}/{name}" for name in sorted(names_in(run.attempts))]
    stamp: list[int] = []
    for path in paths:
        try:
            found = os.stat(path)  # noqa: PTH116 - as in `cache`
        except FileNotFoundError:
            stamp += (0, 0, 0)
        else:
            stamp += (found.st_ino, found.st_size, found.st_mtime_ns)
    return tuple(stamp)


def _over(view: RunView, changed: float, *, asked: bool) -> bool:
    """Whether these numbers stay what they are until the run's folders change, the last of them at `changed`."""
    jobs = list(_jobs(view))
    gone = all(job.state == "gone" for job in jobs)
    if not gone or any(attempt_state(at, view.time) != "gone" for at in view.attempts):
        return False
    if view.problems or time.time() - changed < cache.SETTLED_NS / 1e9:
        return False
    # one of those that are being submitted gets its job in its own folder
    begun = all(each.job for each in view.evaluations)
    said = all(settled(at.ending) for at in view.attempts if at.job)
    answered = not asked or all(job.spans for job in jobs)
    return (begun and said and answered) or time.time() - changed > DAY_S


def _jobs(view: RunView) -> list[JobView]:
    found = [job for at in view.attempts for job in (at.job, at.successor, at.watcher)]
    found += [job for at in view.attempts for job in at.former_watchers.values()]
    found += [each.job for each in view.evaluations]
    return [job for job in found if job is not None]
