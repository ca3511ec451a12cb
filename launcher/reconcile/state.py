"""The state of a run in words, and how far it is: the same for every command and the board."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from launcher.reconcile.attempts import failure, training_state
from launcher.reconcile.evaluations import (
    best_score,
    evaluating,
    evaluations_stopped,
    newest_score,
    skipped,
    unscorable,
    unscored,
    unscored_points,
)
from launcher.reconcile.hours import gpu_hours
from launcher.reconcile.restart import next_attempt
from launcher.reconcile.view import AttemptView, RunView

Word = Literal[
    "new", "queued", "running", "evaluating", "finished", "failed", "cancelled", "unknown"
]

NO_ANSWER = "the cluster does not answer, or the job runs on another machine"

# what takes longer is shown; ranks say each ten seconds how far they are. A step may be long by itself
STALL_S = 60.0
SLOW_STEPS = 10

# the run goes no further by itself
ENDED = ("finished", "failed", "cancelled")


@dataclass(frozen=True)
class State:
    """The state of a run in one word, and what there is to add."""

    word: Word
    reason: str = ""

    def __str__(self) -> str:
        if not self.reason:
            return self.word
        return f"{self.word}{', ' if self.word == 'finished' else ': '}{self.reason}"


def state(view: RunView) -> State:
    """Returns the state of the run; "finished" only where the final snapshot is published."""
    at = view.newest
    if at is None:
        return State("new", "no attempt yet")
    if view.finished:
        return _finished(view)
    training = training_state(view)
    if training in ("queued", "running") and at.cancelled:
        return State("queued" if training == "queued" else "running", "being cancelled")
    if training == "queued":
        return State("queued", _waits_for(at))
    if training == "running":
        return State("running", _stall(view))
    if at.cancelled and (training == "gone" or at.cancel_done):
        return State("cancelled")
    if training == "unknown":
        asked = "somebody asked to cancel it; " if at.cancelled else ""
        fell = any(record["code"] for record in at.exits.values())
        return State("unknown", f"{asked}{NO_ANSWER}{f'; {failure(view)}' if fell else ''}")
    waits = at.successor is not None and at.successor.works
    if waits and next_attempt(view).action == "start":
        return State("queued", f"its next attempt waits; {failure(view) or 'the last one ended'}")
    return State("failed", failure(view) or "ended before its last snapshot")


def _stall(view: RunView) -> str:
    """What is said of a run in which nothing has moved for long; "" where it moves, or says nothing of it."""
    beat = view.newest.heartbeats.get("0", {}) if view.newest else {}
    if "progressed" not in beat:
        return ""
    quiet = view.time - float(beat["progressed"])
    if quiet < max(STALL_S, SLOW_STEPS * float(beat.get("step_s") or 0.0)):
        return ""
    section = beat.get("section")
    where = "" if section in (None, "train") else f" in section {section}"
    return f"no progress for {minutes(quiet)}{where}"


def _finished(view: RunView) -> State:
    waiting, failed = unscored(view), unscorable(view)
    points = [] if evaluations_stopped(view) else unscored_points(view)
    works = evaluating(view) if waiting or points else False
    if works and not waiting:
        return State(
            "evaluating", f"{counted(len(points), 'point')} of a sweep waiting for a score"
        )
    if works:
        return State("evaluating", f"{counted(len(waiting), 'snapshot')} waiting for a score")
    if works is None and waiting:
        about = (
            f"training has finished; whether {counted(len(waiting), 'snapshot')} without a score"
        )
        return State("unknown", f"{about} will get one is not known: {NO_ANSWER}")
    parts = [f"{counted(len(waiting), 'snapshot')} {_why_unscored(view)}"] if waiting else []
    parts += [f"{counted(len(points), 'point')} of a sweep without a score"] if points else []
    parts += [f"{counted(len(failed), 'evaluation')} failed"] if failed else []
    left_out = skipped(view)
    parts += [f"{counted(len(left_out), 'snapshot')} skipped"] if left_out else []
    return State("finished", ", ".join(parts))


def _why_unscored(view: RunView) -> str:
    what = ", ".join(lack.what for lack in view.lacks)
    return f"waiting: {what}" if what else "without a score"


def _waits_for(at: AttemptView) -> str:
    if at.job is None:
        return "being submitted"
    job = at.job.record
    return f"waits for {job['nodes']} x {job['tasks']} ranks on {job['kind']}"


def minutes(seconds: float) -> str:
    """Returns a time such as 1:23:45, or 1:23."""
    whole = int(seconds)
    clock = f"{whole // 60 % 60}:{whole % 60:02d}"
    return clock if whole < 3600 else f"{whole // 3600}:{clock.zfill(5)}"


def counted(number: int, noun: str) -> str:
    """Returns "1 snapshot", "2 snapshots"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far training is; rates and the time left only while it runs and moves."""

    # of the trainer: joining, starting, train, data, snapshot, checkpoint, done
    section: str | None
    images: int
    of: int
    images_per_s: float | None
    eta_s: float | None
    loss: float | None
    # of the time, the part that the slowest rank waited for data
    data_share: float | None


def images_seen(view: RunView) -> int:
    """Returns how many images training has seen, by the newest attempt's report and by what is published."""
    report = view.newest.progress if view.newest else {}
    return max([int(report.get("images") or 0), *view.published[-1:]])


def progress(view: RunView) -> Progress:
    """Returns how far training is, by the newest attempt's report and by what is published."""
    report = view.newest.progress if view.newest else {}
    live = state(view).word == "running" and not _stall(view)
    return Progress(
        section=report.get("section"),
        images=images_seen(view),
        of=view.images,
        images_per_s=report.get("images_per_s") if live else None,
        eta_s=report.get("eta_s") if live else None,
        loss=report.get("loss"),
        data_share=report.get("data_share") if live else None,
    )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One row of `launcher.runs`."""

    id: str
    experiment: str
    name: str | None
    folder: str
    state: Word
    section: str | None
    images: int
    of: int
    images_per_s: float | None
    eta_s: float | None
    loss: float | None
    data_share: float | None
    attempts: int
    # cluster and job id
    job: str | None
    # such as "2 of 4", of an attempt that has fewer than the run asks for
    nodes: str | None
    snapshots: int
    scored: int
    failed_evaluations: int
    score: float | None
    metric: str | None
    score_images: int | None
    # of all snapshots under the protocol of the newest score
    best_score: float | None
    best_images: int | None
    # why its queued job waits, in Slurm's word, and when Slurm expects to start it, in seconds since 1970
    waits_for: str | None
    starts: float | None
    # checkpoints that its newest attempt found damaged and went past
    damaged_checkpoints: int
    # of all its jobs so far, as their own files tell (`hours.spent_s`); ranks count where it has no GPUs
    gpu_hours: float | None
    message: str


def summary(view: RunView) -> Summary:
    """Returns the run as one row."""
    current, newest, at = state(view), newest_score(view), view.newest
    own = [record for record in view.records if not record.sweep]
    scored = {record.key for record in own if record.done}
    failed = {record.key for record in own if record.status == "failed"}
    best = best_score(view)
    waiting = at.job.waiting if at and at.job and current.word == "queued" else {}
    return Summary(
        id=view.id,
        experiment=view.experiment,
        name=view.name,
        folder=str(view.folder.root),
        state=current.word,
        message=current.reason,
        **asdict(progress(view)),
        attempts=view.tries,
        job=at.job.label if at and at.job else None,
        nodes=_fewer(at),
        snapshots=len(view.snapshots),
        scored=len(scored),
        failed_evaluations=len(failed - scored),
        score=newest.score if newest else None,
        metric=newest.metric if newest else None,
        score_images=newest.images if newest else None,
        best_score=best.score if best else None,
        best_images=best.images if best else None,
        waits_for=waiting.get("reason"),
        starts=waiting.get("start"),
        damaged_checkpoints=len(at.progress.get("damaged", ())) if at else 0,
        gpu_hours=gpu_hours(view),
    )


def _fewer(at: AttemptView | None) -> str | None:
    if at is None or at.node_count >= at.full_node_count:
        return None
    return f"{at.node_count} of {at.full_node_count}"
