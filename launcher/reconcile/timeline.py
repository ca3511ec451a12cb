"""What happened to a run, in the order of time, and why it stopped: a pure function of the run's view.

Everything is read from what the ranks, the schedulers and the commands have left. What nobody says is called unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.reconcile.attempts import (
    Cause,
    attempt_state,
    cause,
    named,
    node_of,
    silent_ranks,
)
from launcher.reconcile.hours import hours
from launcher.reconcile.restart import ended
from launcher.reconcile.state import counted, state
from launcher.reconcile.view import AttemptView, JobState, RunView

# of the traceback of the rank that failed: as much as one reads at a glance
FRAMES = 3
# a file of a code copy
_CODE = re.compile(r'"[^"]*/attempts/\d+/code/')

# of which a traceback says more than the message
_RAISED = ("error", "stop", "memory", "storage", "numeric")


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened."""

    # seconds since 1970
    time: float
    attempt: int
    # submitted, began, damaged, checkpoint, snapshot, evaluation, cause, ended, slurm, log, cancelled, unknown, now
    kind: str
    text: str
    rank: str | None = None
    node: str | None = None
    # lines that belong to it: a traceback's last frames, Slurm's own words
    lines: tuple[str, ...] = ()


def events(view: RunView) -> list[Event]:
    """Returns what happened to a run, oldest first; `view` is one that was read with its evidence."""
    found: list[Event] = []
    replayed = replayed_h(view)
    for at in view.attempts:
        found += _attempt(view, at, replayed)
    found += _published(view)
    found += _evaluations(view)
    return sorted(found, key=lambda event: event.time)


def verdict(view: RunView, attempt: int | None = None) -> Cause | None:
    """Returns why the run stopped last; None where it never did.

    Args:
        attempt: why this one ended instead.
    """
    asked = (at for at in reversed(view.attempts) if attempt in (None, at.number))
    return next((found for at in asked if (found := _cause(view, at))), None)


def last_frames(traceback: str, frames: int = FRAMES) -> tuple[str, ...]:
    """Returns the last frames of a traceback and its exception; of chained ones the last."""
    lines = traceback.rstrip().splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("  File ")]
    if not heads:
        return tuple(lines[-frames:])
    return tuple(lines[heads[-frames:][0] :])


# ---- one attempt -------------------------------------------------------------------------------------


def _attempt(view: RunView, at: AttemptView, replayed: Mapping[int, float]) -> Iterator[Event]:
    now = _state(view, at)
    job = at.job.label if at.job else "no job"
    if at.by_hand or at.number == 1:
        yield _event(at, at.opened, "submitted", f"attempt {at.number} was submitted ({job})")
    before = next((each for each in view.attempts if each.number == at.number - 1), None)
    for node, why in at.excluded.items():
        if before is None or node not in before.excluded:
            yield _event(at, at.opened, "excluded", f"{node} is left out: {why}", node=node)
    if at.begins or at.starts:
        began = at.began or min((_time(each) for each in at.begins.values()), default=at.opened)
        yield _event(at, began, "began", _began(view, at, replayed))
        for each in at.progress.get("damaged", ()):
            yield _event(at, began, "damaged", _damaged(each))
    if at.cancelled:
        who = f" by {at.cancel_by}" if at.cancel_by else ""
        yield _event(
            at, at.cancel_asked or at.opened, "cancelled", f"a cancellation was asked for{who}"
        )
    if now == "gone":
        yield from _end(view, at)
    elif now == "unknown":
        yield _event(at, view.time, "unknown", f"whether {job} works is unknown: no answer")
    else:
        place = _reached(at)
        text = f"attempt {at.number} is {now}"
        text += f": {place:,} of {view.images:,} images" if place else ""
        whole = state(view)
        text += f"; {whole.reason}" if whole.reason and whole.word == now else ""
        yield _event(at, view.time, "now", text)


def _state(view: RunView, at: AttemptView) -> JobState:
    """Whether an attempt works: one that another has followed does not count any more, whoever answers for its job."""
    return attempt_state(at, view.time) if at is view.newest else "gone"


def _cause(view: RunView, at: AttemptView) -> Cause | None:
    """Why an attempt ended; None where it works, and where it ended well."""
    if _state(view, at) != "gone":
        return None
    found = cause(at)
    said = (
        record for record in at.exits.values() if record["class"] not in ("preempted", "signal")
    )
    # the end of the job that finished the run may catch a rank while it leaves
    well = view.finished and at is view.newest and not any(record["code"] for record in said)
    return None if found.kind == "ok" or well else found


def _end(view: RunView, at: AttemptView) -> Iterator[Event]:
    """How an attempt ended: the cause first, then those that ended because of it, then what the scheduler says."""
    found = _cause(view, at)
    blamed = at.exits.get(found.rank or "") if found else None
    first = min(
        (_time(record) for record in at.exits.values() if record["code"]), default=ended(at)
    )
    # a rank that lost its peer may have said so a moment earlier
    when = min(first, _time(blamed)) if blamed else first
    if found is not None:
        failed = blamed if blamed and found.kind in _RAISED else {}
        frames = () if failed.get("peer_gone") else last_frames(str(failed.get("traceback", "")))
        # where the code lies says nothing
        frames = tuple(_CODE.sub('"', line) for line in frames)
        text = f"{found.kind}: {located(found)}{_last_seen(at, found.rank)}"
        yield _event(at, when, "cause", text, rank=found.rank, node=found.node, lines=frames)
    others: dict[str, list[str]] = {}
    for rank, record in at.exits.items():
        # the cause has said it of its rank
        if not found or rank != found.rank or record["class"] == "preempted":
            others.setdefault(_how(record), []).append(rank)
    for how, ranks in others.items():
        time = max(when, *(_time(at.exits[rank]) for rank in ranks))
        yield _event(at, time, "ended", f"{named(sorted(ranks, key=_number))} {how}")
    if found is None:
        return
    over = max(ended(at), when)
    silent = [rank for rank in silent_ranks(at) if rank != found.rank]
    if silent and found.kind != "node":
        yield _event(at, over, "ended", f"{named(silent)} left no exit record")
    if said := at.ending.get("said"):
        yield _event(at, over, "log", "Slurm wrote into the log", lines=(*said,))
    if at.job is not None:
        yield _scheduler(at, over)


def _scheduler(at: AttemptView, over: float) -> Event:
    """What the scheduler says of an attempt's job."""
    assert at.job is not None
    word = at.ending.get("state") or at.ending.get("log_state")
    if word is None:
        text = f"how {at.job.label} ended is unknown to its scheduler"
        return _event(at, over, "unknown", text)
    by = f" by {at.ending['by']}" if "by" in at.ending else ""
    time = float(at.ending.get("ended", over))
    return _event(at, max(time, over), "slurm", f"{at.job.label} ended: {word}{by}")


def _began(view: RunView, at: AttemptView, replayed: Mapping[int, float]) -> str:
    nodes = list(dict.fromkeys(node_of(at, rank) for rank in sorted(at.starts, key=_number)))
    known = [node for node in nodes if node]
    few = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
    count = counted(len(at.starts), "rank")
    if at.world and len(at.starts) < at.world:
        count = f"{len(at.starts)} of {at.world} ranks"
    where = f" on {few} ({count})" if few else f" ({count})"
    return f"attempt {at.number} began{where}{resumed(view, at, replayed)}"


def resumed(view: RunView, at: AttemptView, replayed: Mapping[int, float]) -> str:
    """Where it began, how much was trained again and what that had cost."""
    if at.resumed_from is None:
        return ""
    before = [each for each in view.attempts if each.number < at.number]
    again = max((_reached(each) for each in before), default=0) - at.resumed_from
    text = f", resumed from {at.resumed_from:,}" if at.resumed_from else ", from image 0"
    if again <= 0:
        return text
    lost = f"{again:,} images"
    if view.config is not None:
        lost = counted(-(-again // view.config.train.batch), "step")
    spent_h = replayed.get(before[-1].number, 0.0)
    cost = f", {spent_h:.1f} GPU-h" if spent_h >= 0.05 else ""
    return f"{text} ({lost} trained again{cost})"


def replayed_h(view: RunView) -> dict[int, float]:
    """GPU-hours of each attempt that a later one spent again."""
    found = hours(view).jobs
    return {
        job.attempt: job.units * job.seconds.get("replayed", 0.0) / 3600
        for job in found
        if job.kind == "training"
    }


def _damaged(each: Mapping[str, Any]) -> str:
    flaws = "; ".join(
        f"{flaw.get('file')}{'' if flaw.get('rank') is None else ' of rank ' + str(flaw['rank'])} {flaw.get('reason')}"
        for flaw in each.get("flaws", ())
    )
    place = "/".join(str(each.get("kept") or "").split("/")[-3:])
    kept = f", set aside as {place}" if place else ""
    return f"the checkpoint at {int(each['images']):,} images is damaged ({flaws}){kept}"


def _how(record: Mapping[str, Any]) -> str:
    """How one rank ended, alike for all that ended alike."""
    if not record["code"]:
        return "ended well"
    if record["class"] == "preempted":
        saved = record.get("saved")
        return "stopped when asked" + (f", saved at {saved:,} images" if saved is not None else "")
    if record["class"] == "signal":
        return f"ended with it ({record['message']})"
    if record.get("peer_gone"):
        return "ended because a peer was gone"
    if record["class"] == "fenced":
        return "ended because a newer attempt had begun"
    return f"ended, too: {_line(record['message'])}"


def _last_seen(at: AttemptView, rank: str | None) -> str:
    """Where a rank was that could not say why it ended."""
    beat = at.heartbeats.get(rank or "")
    if beat is None or (rank or "") in at.exits or beat.get("section") is None:
        return ""
    images = beat.get("images")
    return f"; last seen in section {beat['section']}" + (
        f" at {images:,} images" if images else ""
    )


# ---- the run -----------------------------------------------------------------------------------------


def _published(view: RunView) -> Iterator[Event]:
    for images, time in view.saved_at.items():
        if images in view.checkpoints:
            yield _during(view, time, "checkpoint", f"checkpoint at {images:,} images")
    for images, time in view.published_at.items():
        if images in view.snapshots:
            yield _during(view, time, "snapshot", f"snapshot at {images:,} images published")
    for each in view.deleted.values():
        text = f"snapshot at {each.images:,} images deleted ({each.setting}): {each.why}"
        yield _during(view, each.time, "snapshot", text)


def _evaluations(view: RunView) -> Iterator[Event]:
    records = {(record.key, record.attempt): record for record in view.records}
    for each in view.evaluations:
        what = f"evaluation {each.attempt} of {each.images:,} images"
        record = records.get((each.key, each.attempt))
        if record is not None and record.done:
            text = (
                f"{what}: {record.metric} {record.score:.4g}" if record.score is not None else what
            )
            yield _during(view, record.time, "evaluation", text)
        elif record is not None:
            yield _during(
                view, record.time, "evaluation", f"{what} {record.status}: {_line(record.message)}"
            )
        elif each.exit is not None and each.exit["code"]:
            text = f"{what} ended: {_line(each.exit['message'])}"
            yield _during(view, _time(each.exit), "evaluation", text)


def _during(view: RunView, time: float, kind: str, text: str) -> Event:
    """An event of the attempt that was the newest at this time."""
    number = max((at.number for at in view.attempts if at.opened <= time), default=1)
    return Event(time=time, attempt=number, kind=kind, text=text)


def located(found: Cause) -> str:
    """The first line of what the cause says, with the node of its rank."""
    message = _line(found.message) or "nothing says why"
    who = f"rank {found.rank}"
    if not found.node or found.node in message or not message.startswith(who):
        return message
    return f"{who} on {found.node}{message.removeprefix(who)}"


def _reached(at: AttemptView) -> int:
    """Images that an attempt came to, by whoever says most."""
    said = [at.progress, *at.heartbeats.values(), *at.exits.values()]
    return max((int(each.get("images") or 0) for each in said), default=0)


def _line(message: object) -> str:
    """The first line of a message, which may be an exception's with much behind it."""
    return str(message).partition("\n")[0][:300]


def _event(at: AttemptView, time: float, kind: str, text: str, **more: Any) -> Event:
    return Event(time=time, attempt=at.number, kind=kind, text=text, **more)


def _time(record: Mapping[str, Any]) -> float:
    return float(record.get("time", 0.0))


def _number(rank: str) -> tuple[int, str]:
    return (int(rank), "") if rank.isdigit() else (-1, rank)
