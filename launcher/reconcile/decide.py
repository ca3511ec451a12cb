"""What a run's view means: its state, why it failed, how far it is, and what should be done next.

Pure functions: no file, no scheduler and no clock, so that every command gives the same answer about the same view.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from launcher.reconcile.view import AttemptView, EvaluationView, JobState, RunView
from selfguide.spec.config import Config
from selfguide.spec.identity import digest
from selfguide.spec.records import EvaluationRecord, Protocol, record_key

Word = Literal[
    "new", "queued", "running", "evaluating", "finished", "failed", "cancelled", "unknown"
]

# the run goes no further by itself
ENDED = ("finished", "failed", "cancelled")

# a submission without a job this many seconds was interrupted
STARTING_S = 120.0


# ---- the state of a run ------------------------------------------------------------------------------


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
        return State("running")
    if at.cancelled:
        return State("cancelled")
    if at.successor is not None and at.successor.works and next_attempt(view).action == "start":
        return State("queued", f"its next attempt waits; {failure(view) or 'the last one ended'}")
    if training == "unknown":
        return State("unknown", "the cluster does not answer, or the job runs on another machine")
    return State("failed", failure(view) or "ended before its last snapshot")


def _finished(view: RunView) -> State:
    waiting, failed = unscored(view), unscorable(view)
    if waiting and evaluating(view):
        return State("evaluating", f"{counted(len(waiting), 'snapshot')} waiting for a score")
    parts = [f"{counted(len(waiting), 'snapshot')} without a score"] if waiting else []
    parts += [f"{counted(len(failed), 'evaluation')} failed"] if failed else []
    return State("finished", ", ".join(parts))


def training_state(view: RunView) -> JobState:
    """Returns the state of the newest attempt's training job: queued, running, gone or unknown."""
    at = view.newest
    if at is None:
        return "gone"
    if at.job is None and not at.starts and not at.progress:
        # its submitter is at work, or died
        return "queued" if view.time - at.opened < STARTING_S else "gone"
    if at.job is None or at.job.state == "unasked":
        return _state_by_files(at)
    return at.job.state


def _state_by_files(at: AttemptView) -> JobState:
    """A rank that failed, or that was ended for another's failure, ends its job."""
    if any(record["code"] for record in at.exits.values()):
        return "gone"
    if not at.starts and not at.progress and not at.exits:
        return "queued"
    everyone = {str(rank) for rank in range(at.world)}
    return "gone" if at.world and everyone <= set(at.exits) else "running"


def failure(view: RunView) -> str:
    """Returns why the newest attempt failed, "" where no rank did.

    The first rank to fail is named, not those that were ended because of it.
    """
    at = view.newest
    if at is None:
        return ""
    ranks = {str(rank) for rank in range(at.world)}
    killed = sorted(at.starts - set(at.exits) - {"unknown"}, key=int)
    bad = sorted(
        (record.get("time", 0.0), rank, str(record["message"]))
        for rank, record in at.exits.items()
        if record["code"] and record["class"] != "signal"
    )
    message = f"rank {bad[0][1]}: {bad[0][2]}" if bad else ""
    if killed:
        silent = (
            f"rank {killed[0]} left no exit record (killed from outside, for example out of memory)"
        )
        return f"{silent}; {message}" if message else silent
    if message:
        return message
    if absent := sorted(ranks - at.starts, key=int):
        return f"rank {absent[0]} never started: see its log"
    signalled = sorted(
        (record.get("time", 0.0), rank, str(record["message"]))
        for rank, record in at.exits.items()
        if record["code"]
    )
    return f"rank {signalled[0][1]} was {signalled[0][2]}" if signalled else ""


@dataclass(frozen=True)
class Next:
    """What should follow the newest attempt of a run by itself."""

    action: Literal["wait", "start", "stop"]
    # seconds from the end of the newest attempt
    after_s: float = 0.0
    reason: str = ""
    kind: str = ""


def next_attempt(view: RunView) -> Next:
    """Returns what should follow the newest attempt by itself; `view` is one with its history."""
    at = view.newest
    if at is None:
        return Next("stop", reason="no attempt yet")
    if view.finished:
        return Next("stop", reason="the final snapshot is published", kind="finished")
    if at.cancelled:
        return Next("stop", reason="it was cancelled", kind="cancelled")
    if training_state(view) != "gone":
        return Next("wait")
    if any(record["class"] == "user" for record in at.exits.values()):
        return Next("stop", reason=f"trying again repeats it: {failure(view)}", kind="user")
    return Next("start", reason=failure(view))


def ended(at: AttemptView) -> float:
    """Returns when an attempt ended, in seconds since 1970."""
    return max([at.opened, *(float(record.get("time", 0.0)) for record in at.exits.values())])


def _waits_for(at: AttemptView) -> str:
    if at.job is None:
        return "being submitted"
    job = at.job.record
    return f"waits for {job['nodes']} x {job['tasks']} ranks on {job['kind']}"


def counted(number: int, noun: str) -> str:
    """Returns "1 snapshot", "2 snapshots"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# ---- progress ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far training is; rates and the time left only while it runs."""

    # of the trainer: joining, starting, train, snapshot, checkpoint, done
    section: str | None
    images: int
    of: int
    images_per_s: float | None
    eta_s: float | None
    loss: float | None
    # of the time, the part that the slowest rank waited for data
    data_share: float | None


def progress(view: RunView) -> Progress:
    """Returns how far training is, by the newest attempt's report and by what is published."""
    report = view.newest.progress if view.newest else {}
    live = state(view).word == "running"
    return Progress(
        section=report.get("section"),
        images=max([int(report.get("images") or 0), *view.published[-1:]]),
        of=view.images,
        images_per_s=report.get("images_per_s") if live else None,
        eta_s=report.get("eta_s") if live else None,
        loss=report.get("loss"),
        data_share=report.get("data_share") if live else None,
    )


# ---- evaluations -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which evaluations to start, which to give up, and whether nothing is left to do."""

    start: tuple[int, ...]
    give_up: tuple[int, ...]
    done: bool


def evaluations_wanted(view: RunView, config: Config) -> Plan:
    """Returns what the evaluation of the run needs now, newest snapshot first.

    So a backlog does not delay the score that somebody waits for, the final one.
    """
    at = view.newest
    if at is None or at.cancelled or config.evaluation.protocol == "none":
        return Plan(start=(), give_up=(), done=True)
    scored = set(view.published) - set(unscored(view, config))
    jobs = {images: jobs_of(view, config, images) for images in view.published}
    in_flight = {i for i in view.published if i not in scored and any(map(_alive, jobs[i]))}
    waiting = [i for i in reversed(view.published) if i not in scored | in_flight]
    lost = tuple(i for i in waiting if _hopeless(jobs[i], config.evaluation.attempts))
    free = max(0, config.evaluation.in_flight - len(in_flight))
    start = tuple([i for i in waiting if i not in lost][:free])
    over = view.finished or training_state(view) == "gone"
    return Plan(start=start, give_up=lost, done=over and not waiting and not in_flight)


def _alive(each: EvaluationView) -> bool:
    return each.job is not None and each.job.state != "gone"


def _hopeless(jobs: Sequence[EvaluationView], attempts: int) -> bool:
    """The tries are used up, or one ended by a user error, which trying again repeats."""
    return max((each.attempt for each in jobs), default=0) >= attempts or any(
        each.exit and each.exit["class"] == "user" for each in jobs
    )


def evaluating(view: RunView) -> bool:
    """Whether the run's watcher or an evaluation job works."""
    return watched(view) or any(each.job and each.job.works for each in view.evaluations)


def watched(view: RunView) -> bool:
    """Whether the newest attempt's watcher waits or runs."""
    at = view.newest
    return at is not None and at.watcher is not None and at.watcher.works


def unscored(view: RunView, config: Config | None = None) -> tuple[int, ...]:
    """Returns the images of published snapshots that have no record, done or failed, though one is wanted.

    Where the config cannot be read, any record of a snapshot counts.
    """
    config = config or view.config
    if config is None:
        known = {record.images for record in view.records}
        return tuple(images for images in view.published if images not in known)
    if config.evaluation.protocol == "none":
        return ()
    keys = {(record.images, record.protocol_key) for record in view.records}
    return tuple(i for i in view.published if (i, protocol(view, config, i).key) not in keys)


def unscorable(view: RunView) -> tuple[int, ...]:
    """Returns the images of snapshots whose evaluation was given up, and that no other attempt scored."""
    scored = {record.images for record in view.records if record.done}
    return tuple(sorted({r.images for r in view.records if not r.done} - scored))


def protocol(view: RunView, config: Config, images: int) -> Protocol:
    """Returns how `config` scores the published snapshot at so many images."""
    return Protocol.of(config, view.snapshots[images])


def jobs_of(view: RunView, config: Config, images: int) -> list[EvaluationView]:
    """Returns the evaluation jobs of a published snapshot under the protocol of `config`, first try first."""
    key = record_key(images, protocol(view, config, images))
    return sorted((e for e in view.evaluations if e.key == key), key=lambda e: e.attempt)


def newest_score(view: RunView) -> EvaluationRecord | None:
    """Returns the record of the latest snapshot that was scored."""
    done = [record for record in view.records if record.done]
    return max(done, key=lambda r: (r.images, r.time), default=None)


# ---- submissions -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a submission does to its run."""

    # new: the first attempt; resume: the next one; join: nothing, the run works or has finished; refuse: `reason`
    action: Literal["new", "resume", "join", "refuse"]
    reason: str = ""
    # the new target, where it extends the run
    extends_to: int | None = None
    # of a finished run: its watcher has to be started
    evaluate: bool = False


def submission(view: RunView | None, identity: Mapping[str, Any]) -> Submission:
    """Returns what submitting a run of this identity does; `view` is the run of its name, None where there is none."""
    if view is None:
        return Submission(action="new")
    if not same_but_images(view.identity, identity):
        return _refuse(
            f"run {view.folder.root.name} was begun with other settings: "
            f"{difference(view.identity, identity)}; set these back, or give name= another name"
        )
    asked = int(identity["train"]["images"])
    # the command that made the run goes on meaning it after an extension
    extends = asked not in (view.images, int(view.identity["train"]["images"]))
    current = state(view)
    if extends:
        return _extension(view, current, asked)
    if current.word == "unknown":
        return _refuse(f"run {view.id}: {_nobody_knows(view)}")
    if view.finished:
        return Submission(action="join", evaluate=bool(unscored(view)) and not watched(view))
    # an attempt without a job: its submitter still holds the run's lock, which we take next, or it died
    if current.word in ("queued", "running") and view.newest and view.newest.job:
        return Submission(action="join")
    return Submission(action="resume")


def _extension(view: RunView, current: State, images: int) -> Submission:
    """Training on to more images, where nothing that was trained depends on how many there would be."""
    run = view.folder.root.name
    if images < view.images:
        return _refuse(
            f"train.images={images} is less than the {view.images} of run {run}, and a run can only be extended; "
            "choose another name for a shorter one"
        )
    # also of a run that has finished: its job may be writing the last checkpoint
    training = training_state(view) if view.newest and view.newest.job else "gone"
    if training == "unknown" and current.word != "cancelled":
        return _refuse(f"run {view.id}: {_nobody_knows(view)}")
    if training in ("queued", "running"):
        return _refuse(
            f"run {run} is {training} on its way to {view.images} images: extend it once its job has ended, or end it "
            f"first: python -m launcher.cancel {view.folder.root}"
        )
    if share := applied_share(view):
        return _refuse(
            f"run {run} cannot be extended to train.images={images}: {share}, so the longer run would have differed "
            "before; submit it as a new run, under another name or none"
        )
    return Submission(action="resume", extends_to=images)


def applied_share(view: RunView) -> str:
    """Returns which share of training has already decided something, in words; "" where none has.

    A share means another image count in a longer run: what was trained since would be another run's.
    """
    reached = max((*view.checkpoints, *view.published), default=0)
    batch, guidance = view.identity["train"]["batch"], view.identity["guidance"]
    if guidance["source"] == "online":
        steps = max(1, round(guidance["switch"] * (view.images // batch)))
        share = f"guidance.switch={guidance['switch']:g} of {view.images} images"
        if reached >= steps * batch:
            return f"{share} was passed at {steps * batch}"
        # the weight of L_SK grows linearly from 0 at the first step to the switch
        if reached > batch and guidance["weight"]:
            return f"{share} has set the weight of L_SK since the second step"
    late = view.identity.get("path", {}).get("uniform_after")
    # the last step began one batch before
    if late is not None and (reached - batch) / view.images >= late:
        return f"path.uniform_after={late:g} of {view.images} images was passed at {late * view.images:.0f}"
    return ""


def extendable(views: Sequence[RunView], identity: Mapping[str, Any]) -> RunView | None:
    """Returns the run, of those given, that differs from this identity in being shorter only and can be extended."""
    images = identity["train"]["images"]
    able = [
        view
        for view in views
        if same_but_images(view.identity, identity)
        and view.identity["train"]["images"] != images
        and (view.images == images or submission(view, identity).action == "resume")
    ]
    return max(able, key=lambda view: view.images, default=None)


def same_but_images(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two identities differ in the length of training at most."""
    first, second = (
        digest({**each, "train": {**each["train"], "images": None}}) for each in (one, other)
    )
    return first == second


def difference(old: Any, new: Any, where: str = "") -> str:
    """Returns "key was a and is b" for every leaf that differs, as both are in JSON; "" where none does."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted(set(old) | set(new))
        parts = [difference(old.get(k), new.get(k), f"{where}.{k}" if where else k) for k in keys]
        return ", ".join(part for part in parts if part)
    before, now = (json.dumps(value, default=str) for value in (old, new))
    return "" if before == now else f"{where} was {before} and is {now}"


def _refuse(reason: str) -> Submission:
    return Submission(action="refuse", reason=reason)


def _nobody_knows(view: RunView) -> str:
    at = view.newest
    job = f" ({at.job.label})" if at and at.job else ""
    return (
        f"nobody can say whether attempt {view.tries}{job} still works; "
        "try again when its cluster or machine answers"
    )


# ---- as a row ----------------------------------------------------------------------------------------


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
    snapshots: int
    scored: int
    failed_evaluations: int
    score: float | None
    metric: str | None
    score_images: int | None
    message: str


def summary(view: RunView) -> Summary:
    """Returns the run as one row."""
    current, newest, at = state(view), newest_score(view), view.newest
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
        snapshots=len(view.snapshots),
        scored=len({record.key for record in view.records if record.done}),
        failed_evaluations=len({record.key for record in view.records if not record.done}),
        score=newest.score if newest else None,
        metric=newest.metric if newest else None,
        score_images=newest.images if newest else None,
    )
