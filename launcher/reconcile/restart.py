"""What follows an attempt by itself: the next one, at once or after a while, or nothing more, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from launcher.reconcile.attempts import ASKED, Cause, Kind, cause, training_state
from launcher.reconcile.view import AttemptView, RunView

# failures of a class after which it is tried again, less those that a newer checkpoint has made up for
BUDGETS: dict[Kind, int] = {
    "node": 8,
    "killed": 8,
    "crash": 8,
    "memory": 3,
    "storage": 5,
    "hang": 3,
    "error": 3,
    "lost": 3,
    # training is deterministic: a second time at the same image count is stopped at once, and one elsewhere tells of
    # more than a node's bad luck
    "numeric": 1,
}

# attempts in a row without a newer checkpoint, after which a run is stopped whatever its budgets
NO_PROGRESS = 3

# seconds before the next attempt after the first failure of a class; doubled by every further one
BACKOFF_S = 2.0
LONGEST_BACKOFF_S = 300.0

# of these a second one at the same image count comes from the code or its numbers, not from the cluster
_REPEATED = ("error", "crash", "memory", "numeric")


@dataclass(frozen=True)
class Next:
    """What should follow the newest attempt of a run by itself."""

    # wait: it still works, or nobody knows; start: the next attempt; stop: nothing
    action: Literal["wait", "start", "stop"]
    # seconds from the end of the newest attempt
    after_s: float = 0.0
    reason: str = ""
    # the class of how the newest attempt ended; finished and cancelled beside those of `Cause`
    kind: str = ""


def next_attempt(view: RunView) -> Next:
    """Returns what should follow the newest attempt by itself; `view` is one with its history.

    An attempt that ends because it was asked to (a preemption, a time limit, an scancel) is followed at once and uses
    no budget. Every other class has a budget of its own: a failure without a newer checkpoint uses one, and a newer
    checkpoint pays one back. What a user began by hand begins with full budgets.
    """
    at = view.newest
    if at is None:
        return Next("stop", reason="no attempt yet")
    if view.finished:
        return Next("stop", reason="the final snapshot is published", kind="finished")
    if at.cancelled:
        return Next("stop", reason="it was cancelled", kind="cancelled")
    works = training_state(view)
    if works != "gone":
        return Next("wait", reason=f"attempt {at.number} is {works}")
    history = _since_by_hand(view.attempts)
    causes = [cause(each) for each in history]
    last = causes[-1]
    kind: Kind = "lost" if last.kind == "ok" else last.kind
    if kind in ("user", "stop"):
        return Next("stop", reason=f"trying again repeats it: {last.message}", kind=kind)
    if any(_same_place(last, each) for each in causes[:-1]):
        where = f"at {last.images:,} images" if last.images is not None else f"in {last.section}"
        return Next("stop", reason=f"twice {where}: {last.message}", kind=kind)
    progressed = _progressed(view, history)
    idle = _without_progress(causes, progressed)
    if idle >= NO_PROGRESS:
        return Next(
            "stop", reason=f"{idle} attempts without a newer checkpoint: {last.message}", kind=kind
        )
    if kind in ASKED:
        return Next("start", reason=last.message, kind=kind)
    used, in_a_row = _used(kind, causes, progressed)
    if used > BUDGETS[kind]:
        return Next("stop", reason=f"{used} failures of class {kind}: {last.message}", kind=kind)
    return Next("start", after_s=backoff(in_a_row), reason=last.message, kind=kind)


def seen_by(view: RunView, job_id: str) -> RunView | None:
    """Returns the view of the job of this id: that it runs proves that the one before it is over.

    A scheduler may think otherwise for a while: a lost node completes nothing. None where another job follows the
    newest attempt.
    """
    at = view.newest
    known = [] if at is None else [job for job in (at.job, at.successor) if job is not None]
    mine = [job for job in known if job.record["id"] == job_id]
    if at is None or not (mine or at.successor is None):
        return None
    if not mine:
        return view
    over = replace(at, job=replace(at.job or mine[0], state="gone"))
    return replace(view, attempts=(*view.attempts[:-1], over))


def backoff(failures: int) -> float:
    """Returns the seconds to wait after so many earlier failures in a row."""
    return min(BACKOFF_S * 2.0 ** min(failures, 16), LONGEST_BACKOFF_S)


def ended(at: AttemptView) -> float:
    """Returns when an attempt ended, in seconds since 1970: by its ranks' records, the scheduler's, or else its own."""
    times = [float(record.get("time", 0.0)) for record in at.exits.values()]
    times.append(float(at.ending.get("time", 0.0)))
    return max([at.opened, *times])


def _since_by_hand(attempts: Sequence[AttemptView]) -> list[AttemptView]:
    """The newest attempts, from the last that a person asked for."""
    first = max((i for i, at in enumerate(attempts) if at.by_hand), default=0)
    return list(attempts[first:])


def _same_place(one: Cause, other: Cause) -> bool:
    """Whether two attempts fell in the same way at the same place of training."""
    known = one.images is not None or one.section not in (None, "loading", "joining")
    same = (one.kind, one.type, one.images) == (other.kind, other.type, other.images)
    return one.kind in _REPEATED and known and same and one.section == other.section


def _progressed(view: RunView, history: Sequence[AttemptView]) -> list[bool]:
    """Whether each attempt left a newer checkpoint than the one that it began from."""
    reached = max(view.checkpoints, default=0)
    found = []
    for at in reversed(history):
        began = at.resumed_from
        found.append(began is not None and reached > began)
        reached = reached if began is None else began
    return found[::-1]


def _without_progress(causes: Sequence[Cause], progressed: Sequence[bool]) -> int:
    """How many attempts in a row, up to the newest, left no newer checkpoint; preemptions neither count nor end it."""
    count = 0
    for why, newer in zip(reversed(causes), reversed(progressed), strict=True):
        if newer:
            break
        count += why.kind not in ("preempted", "outside")
    return count


def _used(kind: Kind, causes: Sequence[Cause], progressed: Sequence[bool]) -> tuple[int, int]:
    """How much of the budget of a class is used, and how many of its failures came in a row before the newest."""
    used = in_a_row = 0
    for why, newer in zip(causes, progressed, strict=True):
        same = ("lost" if why.kind == "ok" else why.kind) == kind
        if newer:
            used, in_a_row = max(0, used - 1), 0
        elif same:
            used, in_a_row = used + 1, in_a_row + 1
        elif why.kind not in ASKED:
            in_a_row = 0
    return used, max(0, in_a_row - 1)
