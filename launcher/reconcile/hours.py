"""Where the time of a run's jobs went: every second of an allocation belongs to one class, for each rank by itself.

    start       from the allocation to the first step: the job's script, imports, rendezvous, reading the checkpoint
    compile     the first step of an attempt that compiles
    train       steps, the waits for data included; `waited_s` says how much of it those were
    checkpoint  writing checkpoints and snapshots
    evaluate    an evaluation that came to a score, from the start of its process to its end
    replayed    the part of an attempt's training by which it went further than a later attempt began
    hung        from the last progress to the end of an attempt that ended as a hang
    failed      from a rank's last heartbeat, or its last progress, to the end of a job that failed; an evaluation
                without a score
    idle        from a rank's end to that of its job, and all of a job that did nothing: a successor that found nothing
                to do, a watcher

An allocation lasts as long as Slurm says it did. What a rank accounts for is laid into it from its beginning, is cut
off where the allocation ends, and the rest has a class of its own: so the classes of a job always add up to its
elapsed time. Seconds of a job are means over its ranks. Multiplied by its GPUs, or by its ranks in a run that has no
GPUs, they are GPU-seconds. Time in the queue stands beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from launcher.backends import Span
from launcher.reconcile.attempts import ASKED, attempt_state, cause
from launcher.reconcile.view import AttemptView, EvaluationView, JobView, RunView
from selfguide.spec.rank_status import class_of

Class = Literal[
    "train",
    "evaluate",
    "start",
    "compile",
    "checkpoint",
    "replayed",
    "hung",
    "idle",
    "failed",
]
CLASSES: tuple[Class, ...] = get_args(Class)
# of these something is left when the run has finished
EFFECTIVE: tuple[Class, ...] = ("train", "evaluate")

# how far the clocks of a node and of Slurm's controller, which counts whole seconds, may be apart
_SKEW_S = 2.0

Kind = Literal["training", "successor", "evaluation", "watcher"]


@dataclass(frozen=True, kw_only=True)
class JobHours:
    """One allocation and where its time went."""

    kind: Kind
    # of the run; of an evaluation, of its snapshot
    attempt: int
    # images of an evaluation's snapshot
    images: int | None = None
    # cluster and id
    job: str
    # seconds since 1970; the end is now where it still runs
    start: float
    end: float
    running: bool = False
    # GPUs, or ranks in a run that has none; 0 of a job that takes neither
    units: int
    # the scheduler does not say when it began and ended: these are times of the job's own files
    about: bool = False
    # by class, which add up to `elapsed_s`; classes without time are left out
    seconds: Mapping[str, float]
    # of class train, by waiting for data
    waited_s: float = 0.0
    # it waited for its turn; None where nobody knows
    queued_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class Hours:
    """All allocations of a run, oldest first."""

    # what `units` count: "GPU" or "rank"
    unit: str
    jobs: tuple[JobHours, ...]

    def seconds(self, *kinds: Kind) -> dict[str, float]:
        """Returns GPU-seconds by class, of jobs of these kinds or of all; every class is there."""
        chosen = [job for job in self.jobs if not kinds or job.kind in kinds]
        return {
            name: sum(job.units * job.seconds.get(name, 0.0) for job in chosen) for name in CLASSES
        }

    @property
    def total_s(self) -> float:
        """GPU-seconds of all jobs."""
        return sum(job.units * job.elapsed_s for job in self.jobs)

    @property
    def effective(self) -> float | None:
        """The share that went into training and scores that are kept; None where nothing ran."""
        seconds = self.seconds()
        return sum(seconds[name] for name in EFFECTIVE) / self.total_s if self.total_s > 0 else None

    @property
    def about(self) -> bool:
        """Whether of some job only its own files say how long it had its nodes."""
        return any(job.about for job in self.jobs if job.units)


def hours(view: RunView) -> Hours:
    """Returns where the time of all jobs of the run went.

    Args:
        view: one with its history, and with the spans of its jobs where the scheduler is to be believed.
    """
    gpus = _has_gpus(view)
    rows = [*_trainings(view, gpus), *_evaluations(view, gpus), *_watchers(view)]
    ordered = tuple(sorted(rows, key=lambda row: row.start))
    return Hours(unit="GPU" if gpus else "rank", jobs=ordered)


def spent_s(view: RunView) -> float | None:
    """Returns the GPU-seconds of a run by its own files: what its attempts wrote down, and the times of its scores.

    It needs neither a history nor a scheduler, and leaves out what no rank saw: some seconds a job. None where nothing
    is known of the attempts before the newest.
    """
    trained = trained_s(view)
    if trained is None or _has_gpus(view):  # evaluations take none
        return trained
    return trained + sum(record.seconds or 0.0 for record in view.records)


def gpu_hours(view: RunView) -> float | None:
    """Returns `spent_s` in hours."""
    spent = spent_s(view)
    return None if spent is None else spent / 3600


def trained_s(view: RunView) -> float | None:
    """Returns the same of its training jobs alone."""
    known = [at for at in view.attempts if at.spent_s is not None]
    if len(view.attempts) < view.tries and not known:
        return None
    first = known[-1] if known else None
    counted = [at for at in view.attempts if first is None or at.number >= first.number]
    found = [(_world(at), _by_files(at, view.time)) for at in counted]
    spans = ((world, span) for world, span in found if span is not None)
    spent = sum(world * ((span.end or view.time) - span.start) for world, span in spans)
    return spent + ((first.spent_s or 0.0) if first else 0.0)


def _has_gpus(view: RunView) -> bool:
    return any(at.job.record.get("gpus") for at in view.attempts if at.job)


# ---- training ----------------------------------------------------------------------------------------


def _trainings(view: RunView, gpus: bool) -> Iterator[JobHours]:
    """A row an attempt, and one for each allocation of its jobs in which none was opened."""
    rows = [row for at in view.attempts if (row := _training(view, at, gpus)) is not None]
    yield from rows
    taken = {(row.job, row.start) for row in rows}
    for at in view.attempts:
        for job in (at.job, at.successor):
            for span in job.spans if job else ():
                if job is None or (job.label, span.start) in taken:
                    continue
                if span.end is None and not job.works:
                    continue
                taken.add((job.label, span.start))
                yield _job_of_nothing(view, "successor", at.number, job, span, gpus)


def _training(view: RunView, at: AttemptView, gpus: bool) -> JobHours | None:
    """The allocation in which an attempt ran; None where it has none so far."""
    gone = attempt_state(at, view.time) == "gone"
    span, about = _span_of(at, view.time)
    if span is None:
        return None
    end = max(span.start, view.time if span.end is None else span.end)
    ended = cause(at).kind if gone else None
    ranks = range(_world(at) or 1)
    found = [_rank(view, at, str(rank), span.start, end, ended) for rank in ranks]
    return JobHours(
        kind="training",
        attempt=at.number,
        job=at.job.label if at.job else "",
        start=span.start,
        end=end,
        running=not gone,
        units=_units(at.job, gpus) if at.job else len(ranks),
        about=about,
        seconds=_mean([seconds for seconds, _ in found]),
        waited_s=sum(waited for _, waited in found) / len(ranks),
        queued_s=span.queued_s,
    )


def _rank(
    view: RunView, at: AttemptView, rank: str, start: float, end: float, ended: str | None
) -> tuple[dict[str, float], float]:
    """Where the time of one rank went, and of its training how much it waited for data.

    Args:
        ended: why its attempt ended (`Cause.kind`); None while it runs.
    """
    begin, said, beat = at.begins.get(rank), at.exits.get(rank), at.heartbeats.get(rank)
    began = begin["time"] if begin else at.began if rank in at.starts else None
    failed = ended is not None and ended not in ("ok", *ASKED)
    lost: Class = "hung" if ended == "hang" else "failed"
    if began is None:
        rest: Class = "start" if ended is None else "failed" if at.starts else "idle"
        return _laid(end - start, [], rest), 0.0
    pieces: list[tuple[str, float]] = [("start", began - start)]
    latest = said or beat
    if latest is None:
        return _laid(end - start, pieces, "start" if ended is None else lost), 0.0
    known = {**(beat or {}), **{name: value for name, value in latest.items() if value is not None}}
    seconds: Mapping[str, float] | None = known.get("seconds")
    section = class_of(known.get("section"))
    again = _replayed(view, at, known.get("images"))
    if seconds is None:  # of a version that kept none
        seconds = {"train" if known.get("images") else "start": latest["time"] - began}
    for name, spent in seconds.items():
        part = again * spent if name == "train" else 0.0
        pieces += [(name, spent - part), ("replayed", part)]
    # since its last progress
    left = latest["time"] - began - sum(seconds.values())
    pieces.append((lost if failed else section, left))
    if said is not None:
        rest = "failed" if failed else "idle"
    else:
        rest = lost if ended is not None else section  # type: ignore[assignment]
    laid = _laid(end - start, pieces, rest)
    waited = (1 - again) * float(known.get("waited_s") or 0.0)
    return laid, min(waited, laid.get("train", 0.0))


def _replayed(view: RunView, at: AttemptView, images: int | None) -> float:
    """The share of an attempt's images, which came to `images`, that a later attempt trained again."""
    first = _resumed(at)
    later = [_resumed(each) for each in view.attempts if each.number > at.number]
    known = [each for each in later if each is not None]
    if first is None or images is None or images <= first or not known:
        return 0.0
    return max(0, images - max(first, min(known))) / (images - first)


def _resumed(at: AttemptView) -> int | None:
    """Images from which an attempt trained; None where it did not come so far."""
    if at.resumed_from is not None:
        return at.resumed_from
    return None if at.progress.get("section") in (None, "joining") else 0


def images_of(at: AttemptView) -> tuple[int, int] | None:
    """Returns the images from which an attempt trained and to which it came; None where it did not train."""
    first = _resumed(at)
    records = [*at.exits.values(), *at.heartbeats.values(), at.progress]
    last = max((int(record.get("images") or 0) for record in records), default=0)
    return None if first is None or last <= first else (first, last)


def _span_of(at: AttemptView, now: float) -> tuple[Span | None, bool]:
    """The allocation of an attempt, and whether only its own files tell of it."""
    by_files = _by_files(at, now)
    spans = at.job.spans if at.job else ()
    # Slurm's clock has whole seconds, and each node its own
    seen = (at.began or at.opened) + _SKEW_S
    before = [span for span in spans if span.start <= seen]
    # one that was submitted, not opened in its job
    span = before[-1] if before else spans[0] if spans else None
    if span is None:
        return by_files, True
    if span.end is None and attempt_state(at, now) == "gone":
        last = by_files.end if by_files and by_files.end else span.start
        return Span(span.start, max(span.start, last), span.queued_s), True
    return span, False


def _by_files(at: AttemptView, now: float) -> Span | None:
    """From the first rank's beginning to the last sign of any."""
    if at.began is None:
        return None
    if attempt_state(at, now) in ("queued", "running"):
        return Span(at.began, None)
    records = [*at.exits.values()]
    records += [record for rank, record in at.heartbeats.items() if rank not in at.exits]
    records += [] if "0" in at.exits else [at.progress]
    return Span(at.began, max([at.began, *(float(each.get("time", 0.0)) for each in records)]))


def _world(at: AttemptView) -> int:
    if at.world or at.job is None:
        return at.world or len(at.starts)
    return int(at.job.record["nodes"] * at.job.record["tasks"])


# ---- other jobs --------------------------------------------------------------------------------------


def _evaluations(view: RunView, gpus: bool) -> Iterator[JobHours]:
    for each in view.evaluations:
        span, about = _span_of_evaluation(each, view.time)
        if span is None or each.job is None:
            continue
        running = each.job.state == "running"
        end = _end(span, view.time)
        began = float(each.begin["time"]) if each.begin else None
        pieces: list[tuple[str, float]] = []
        rest: Class = "start" if running else "idle"
        if began is not None:
            well = running or (each.exit is not None and each.exit["class"] == "ok")
            last = float(each.exit["time"]) if each.exit else end
            pieces = [
                ("start", began - span.start),
                ("evaluate" if well else "failed", last - began),
            ]
            rest = "idle" if well else "failed"
        yield JobHours(
            kind="evaluation",
            attempt=each.attempt,
            images=each.images,
            job=each.job.label,
            start=span.start,
            end=end,
            running=running,
            units=_units(each.job, gpus),
            about=about,
            seconds=_laid(end - span.start, pieces, rest),
            queued_s=span.queued_s,
        )


def _span_of_evaluation(each: EvaluationView, now: float) -> tuple[Span | None, bool]:
    job = each.job
    span = job.spans[-1] if job and job.spans else None
    works = job is not None and job.state in ("running", "queued")
    if span is not None and (works or span.end is not None):
        return span, False
    if each.begin is None:
        return None, True
    start = span.start if span else float(each.begin["time"])
    # a process that was killed said nothing
    last = float((each.exit or each.begin)["time"])
    return Span(start, None if works else last), True


def _watchers(view: RunView) -> Iterator[JobHours]:
    found = [
        (at.number, job)
        for at in view.attempts
        for job in (*at.former_watchers.values(), at.watcher)
        if job is not None
    ]
    # one may watch over several attempts
    for number, job in {job.label: (number, job) for number, job in found}.values():
        for span in job.spans:
            # on one machine nobody writes down when it ended
            if span.end is not None or job.works:
                yield _job_of_nothing(view, "watcher", number, job, span, gpus=False, units=0)


def _job_of_nothing(
    view: RunView,
    kind: Kind,
    attempt: int,
    job: JobView,
    span: Span,
    gpus: bool,
    units: int | None = None,
) -> JobHours:
    end = _end(span, view.time)
    return JobHours(
        kind=kind,
        attempt=attempt,
        job=job.label,
        start=span.start,
        end=end,
        running=span.end is None,
        units=_units(job, gpus) if units is None else units,
        seconds=_laid(end - span.start, [], "idle"),
        queued_s=span.queued_s,
    )


# ---- arithmetic --------------------------------------------------------------------------------------


def _units(job: JobView, gpus: bool) -> int:
    """GPUs of a job, or its ranks in a run that has none; earlier records do not name GPUs."""
    ranks = int(job.record["nodes"] * job.record["tasks"])
    return int(job.record.get("gpus", ranks)) if gpus else ranks


def _end(span: Span, now: float) -> float:
    return max(span.start, now if span.end is None else span.end)


def _laid(total: float, pieces: Sequence[tuple[str, float]], rest: Class) -> dict[str, float]:
    """Lays pieces end to end into `total` seconds, cut off at its end; what they leave is of class `rest`."""
    found: dict[str, float] = {}
    left = total
    for name, seconds in [*pieces, (rest, total)]:
        part = min(max(seconds, 0.0), left)
        left -= part
        if part > 0:
            found[name] = found.get(name, 0.0) + part
    return found


def _mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    sums = {name: sum(each.get(name, 0.0) for each in found) for name in CLASSES}
    return {name: value / len(found) for name, value in sums.items() if value > 0}
