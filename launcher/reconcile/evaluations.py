"""Which evaluations a run needs: published snapshots less those that have an outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.reconcile.attempts import CRASHES, training_state
from launcher.reconcile.restart import backoff
from launcher.reconcile.view import EvaluationView, RunView
from selfguide.spec.config import Config
from selfguide.spec.lacks import lacks_of
from selfguide.spec.metrics import higher_is_better
from selfguide.spec.records import EvaluationRecord, Protocol, label_policy, record_key

# ends of a snapshot's evaluation without a word, after which it counts as one that cannot be scored
KILLS = 5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which evaluations to start, which to give up, and whether nothing is left to do."""

    start: tuple[int, ...]
    give_up: tuple[int, ...]
    done: bool


def evaluations_wanted(view: RunView, config: Config) -> Plan:
    """Returns what the evaluation of the run by one protocol needs now, newest snapshot first.

    So a backlog does not delay the score that somebody waits for, the final one.

    Args:
        config: of `scored_by`.
    """
    at = view.newest
    if at is None or evaluations_stopped(view) or config.evaluation.protocol == "none":
        return Plan(start=(), give_up=(), done=True)
    scored = set(view.published) - set(unscored(view, config))
    jobs = {images: jobs_of(view, config, images) for images in view.published}
    in_flight = {i for i in view.published if i not in scored and any(map(_alive, jobs[i]))}
    waiting = [i for i in reversed(view.published) if i not in scored | in_flight]
    lost = tuple(i for i in waiting if _hopeless(view, jobs[i], config.evaluation.attempts))
    free = max(0, config.evaluation.in_flight - len(in_flight))
    due = [i for i in waiting if i not in lost and view.time >= _not_before(view, jobs[i])]
    if lacks_of(view.lacks, config.evaluation):
        # whoever sees the run once the files are there starts its watcher again
        due, waiting = [], []
    goes_on = at.successor is not None and at.successor.works
    over = view.finished or (training_state(view) == "gone" and not goes_on)
    return Plan(start=tuple(due[:free]), give_up=lost, done=over and not waiting and not in_flight)


def evaluations_stopped(view: RunView) -> bool:
    """Whether somebody cancelled the run, and nobody has asked for its scores since."""
    at = view.newest
    return at is not None and at.cancelled and view.evaluation_asked <= at.cancel_asked


def _alive(each: EvaluationView) -> bool:
    return each.job is not None and each.job.state != "gone"


def _hopeless(view: RunView, jobs: Sequence[EvaluationView], attempts: int) -> bool:
    """The tries are used up, or one ended by a user error, which trying again repeats."""
    endings = [ending_of(each) for each in jobs if _counts(view, each)]
    tries = endings.count("failed")
    return "user" in endings or tries >= attempts or endings.count("killed") >= KILLS


def ending_of(each: EvaluationView) -> Literal["failed", "user", "killed", "interrupted"]:
    """Returns how an evaluation job that is gone ended.

    failed and user: by itself. interrupted: by the scheduler, somebody who asked it to end, or a time limit that its
    next try has less to do in. killed: without a word,
    as a node's memory or a lost node may do it.
    """
    ending = each.job.ending if each.job else {}
    word = str(ending.get("state", "")).partition(" ")[0]
    if each.exit and each.exit["class"] not in ("signal", "preempted"):
        return "user" if each.exit["class"] == "user" else "failed"
    # the next one goes on at its last block
    if word == "TIMEOUT" and each.advanced:
        return "interrupted"
    # its own time limit and its own memory
    if (
        word in ("TIMEOUT", "DEADLINE", "OUT_OF_MEMORY")
        or ending.get("signals", {}).get("0") in CRASHES
    ):
        return "failed"
    if each.exit or word in ("PREEMPTED", "CANCELLED", "NODE_FAIL", "BOOT_FAIL"):
        return "interrupted"
    return "killed"


def _counts(view: RunView, each: EvaluationView) -> bool:
    """Whether an evaluation job came after somebody last asked to try again what had failed."""
    return each.submitted >= view.retry_asked


def _not_before(view: RunView, jobs: Sequence[EvaluationView]) -> float:
    """When the next job of a snapshot may start: those that the cluster ends do not follow each other at once."""
    ends = [
        each
        for each in jobs
        if _counts(view, each) and ending_of(each) in ("killed", "interrupted")
    ]
    return ends[-1].submitted + backoff(len(ends) - 1) if ends else 0.0


def evaluating(view: RunView) -> bool | None:
    """Returns whether the run's watcher or an evaluation job works; None where nobody can say."""
    states = {job.state for job in (view.watcher, *(e.job for e in view.evaluations)) if job}
    if states & {"queued", "running"}:
        return True
    return None if "unknown" in states else False


def watched(view: RunView) -> bool:
    """Whether the run's watcher waits or runs."""
    return view.watcher is not None and view.watcher.works


def watcher_missing(view: RunView) -> bool:
    """Whether the watcher is gone though snapshots wait for a score, or more are to come."""
    watcher = view.watcher
    if watcher is None or watcher.state != "gone" or evaluations_stopped(view):
        return False
    return startable(view) or training_state(view) in ("queued", "running")


def startable(view: RunView) -> bool:
    """Whether a snapshot waits for a score that lacks no file."""
    if view.config is None:
        return not view.lacks and bool(unscored(view))
    return any(
        unscored(view, each)
        for each in view.config.scored_by
        if not lacks_of(view.lacks, each.evaluation)
    )


def unscored(view: RunView, config: Config | None = None) -> tuple[int, ...]:
    """Returns the images of published snapshots that a protocol has no record of, done or failed.

    Where the config cannot be read, any record of a snapshot counts. A failure that is to be tried again does not.
    """
    config = config or view.config
    known = [each for each in view.records if each.done or each.time >= view.retry_asked]
    if config is None:
        settled = {record.images for record in known}
        return tuple(images for images in view.published if images not in settled)
    # records of before have keys of their own; of these, failures have no protocol's either
    keys = {record.key for record in known}
    scores = {(record.images, record.protocol_key) for record in known}

    # of most runs one for each protocol, and a key is a hash over all of it
    how: dict[tuple[int, str], Protocol] = {}

    def has_outcome(images: int, number: int, by: Config) -> bool:
        about = view.snapshots[images]
        policy = label_policy(about["guidance"], by.evaluation.prior)
        kind = (number, f"{about['data']['manifest']} {policy}")
        if kind not in how:
            how[kind] = protocol(view, by, images)
        return (images, how[kind].key) in scores or record_key(images, how[kind]) in keys

    wanted = tuple(enumerate(config.scored_by))
    return tuple(
        images for images in view.published if not all(has_outcome(images, *by) for by in wanted)
    )


def unscorable(view: RunView) -> tuple[int, ...]:
    """Returns the images of snapshots whose evaluation was given up, and that no other attempt scored."""
    # of a run with several protocols each is one; records of before name none where they failed
    several = view.config is not None and len(view.config.scored_by) > 1

    def which(record: EvaluationRecord) -> tuple[int, str]:
        return record.images, record.protocol_key if several else ""

    scored = {which(record) for record in view.records if record.done}
    failed = {which(record) for record in view.records if not record.done}
    return tuple(sorted({images for images, _ in failed - scored}))


def protocol(view: RunView, config: Config, images: int) -> Protocol:
    """Returns how `config` scores the published snapshot at so many images."""
    return Protocol.of(config, view.snapshots[images])


def jobs_of(view: RunView, config: Config, images: int) -> list[EvaluationView]:
    """Returns the evaluation jobs of a published snapshot under the protocol of `config`, first try first."""
    key = record_key(images, protocol(view, config, images))
    return sorted((e for e in view.evaluations if e.key == key), key=lambda e: e.attempt)


def newest_score(view: RunView) -> EvaluationRecord | None:
    """Returns the record of the latest snapshot that was scored; of several protocols by the first."""
    done = [record for record in view.records if record.done]
    if view.config is not None and len(view.config.scored_by) > 1:
        first = view.config.evaluation.protocol
        done = [record for record in done if record.metric == first] or done
    return max(done, key=lambda r: (r.images, r.time), default=None)


def best_score(view: RunView) -> EvaluationRecord | None:
    """Returns the record of the best snapshot, of those scored under the protocol of the newest score."""
    newest = newest_score(view)
    if newest is None or newest.metric is None:
        return None
    sign = 1.0 if higher_is_better(newest.metric) else -1.0
    alike = [
        record
        for record in view.records
        if record.score is not None and record.protocol_key == newest.protocol_key
    ]
    return max(alike, key=lambda r: (sign * (r.score or 0.0), r.images), default=None)
