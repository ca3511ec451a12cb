"""One attempt: whether its training job works, and why it ended.

Causes are read from what the ranks left and from what the scheduler said of the job. The first failure is the cause:
ranks that were ended because of it, or that lost their connection to it, are not blamed.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from launcher.reconcile.view import AttemptView, JobState, RunView

# a submission without a job this many seconds was interrupted
STARTING_S = 120.0

# preempted, limit, outside: asked to end by the scheduler or by somebody's scancel, and no failure at all.
# stop: a rank asked that nothing follows (93). crash: killed by a signal of its own doing, such as SIGSEGV.
# lost: ended, and nothing says why
Kind = Literal[
    "ok",
    "user",
    "stop",
    "preempted",
    "limit",
    "outside",
    "node",
    "killed",
    "crash",
    "memory",
    "storage",
    "hang",
    "numeric",
    "error",
    "lost",
]

_KINDS = frozenset(get_args(Kind))

# ends of a job that no rank is to blame for
ASKED = ("preempted", "limit", "outside")

# how much earlier than asked Slurm may send the signal that warns of a time limit
EARLY_S = 60.0

# exit code of a rank after which no attempt may follow
STOP = 93

# Slurm's words for the end of a job that tell more than its ranks can
_WORDS: dict[str, Kind] = {
    "NODE_FAIL": "node",
    "BOOT_FAIL": "node",
    "TIMEOUT": "limit",
    "DEADLINE": "limit",
    "PREEMPTED": "preempted",
    "CANCELLED": "outside",
    "OUT_OF_MEMORY": "memory",
}
_SAID: dict[Kind, str] = {
    "node": "its node failed",
    "limit": "it reached its time limit",
    "preempted": "it was preempted",
    "outside": "it was cancelled at the scheduler, not by launcher.cancel",
    "memory": "it used more memory than it had asked for",
}
# classes of exit records that keep their meaning whatever the scheduler says
_OWN = ("user", "numeric", "storage", "memory", "hang", "node")
# signals by which a program ends itself
CRASHES = {
    int(each)
    for each in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
}


def training_state(view: RunView) -> JobState:
    """Returns the state of the newest attempt's training job: queued, running, gone or unknown."""
    at = view.newest
    return "gone" if at is None else attempt_state(at, view.time)


def attempt_state(at: AttemptView, now: float) -> JobState:
    """Returns the state of an attempt's training job at a time in seconds since 1970."""
    if at.job is None and not at.starts and not at.progress:
        # its submitter is at work, or died
        return "queued" if now - at.opened < STARTING_S else "gone"
    if at.job is None:
        return _state_by_files(at)
    if at.job.state == "unknown" and _all_left(at):
        return "gone"
    return at.job.state


def _state_by_files(at: AttemptView) -> JobState:
    """A rank that failed, or that was ended for another's failure, ends its job."""
    if any(record["code"] for record in at.exits.values()) or _all_left(at):
        return "gone"
    return "running" if at.starts or at.progress or at.exits else "queued"


def _all_left(at: AttemptView) -> bool:
    """Whether every rank left an exit record: then nothing of the job works, whoever answers."""
    return bool(at.world) and {str(rank) for rank in range(at.world)} <= set(at.exits)


# ---- why it ended ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why an attempt ended."""

    kind: Kind
    message: str = ""
    # that failed first; None where none did, or nobody knows
    rank: str | None = None
    # of the exception, or the signal's name
    type: str = ""
    # where it happened: the trainer's image count and section, where they are known
    images: int | None = None
    section: str | None = None


def cause(at: AttemptView) -> Cause:
    """Returns why an attempt ended whose job is gone."""
    errors = _by_time(at, lambda r: r["code"] and r["class"] not in ("signal", "preempted"))
    # others say only that a peer is gone
    failed = [each for each in errors if not each[1].get("peer_gone")]
    own = [each for each in failed if each[1]["class"] in _OWN or each[1]["code"] == STOP]
    if own:
        return _failed(*own[0])
    if kind := _WORDS.get(str(at.ending.get("state", "")).partition(" ")[0]):
        return _scheduled(at, kind)
    silent = sorted(at.starts - set(at.exits) - {"unknown"}, key=int)
    asked = _by_time(at, lambda r: r["class"] == "preempted")
    saved = any(record.get("saved") is not None for _, record in asked)
    if asked and not failed and (saved or not silent):
        return _asked(at, asked)
    # a rank that failed before others were killed for its sake
    if failed and (not silent or any(rank == at.ending.get("first") for rank, _ in failed)):
        return _failed(*failed[0])
    if silent:
        return _silent(at, silent, errors)
    if absent := sorted({str(rank) for rank in range(at.world)} - at.starts, key=int):
        message = f"rank {absent[0]} never started: see its log"
        return Cause(kind="lost", message=message, rank=absent[0])
    if errors:
        return replace(_failed(*errors[0]), kind="lost")
    if signalled := _by_time(at, lambda r: r["code"]):
        return _asked(at, signalled)
    return Cause(kind="ok" if _all_left(at) else "lost")


def failure(view: RunView) -> str:
    """Returns why the newest attempt failed, "" where nothing says so."""
    return cause(view.newest).message if view.newest else ""


def _by_time(
    at: AttemptView, wanted: Callable[[Mapping[str, Any]], Any]
) -> list[tuple[str, Mapping[str, Any]]]:
    """The ranks whose exit records are wanted, the first to end first."""
    found = [(rank, record) for rank, record in at.exits.items() if wanted(record)]
    return sorted(found, key=lambda each: (each[1].get("time", 0.0), each[0]))


def _failed(rank: str, record: Mapping[str, Any]) -> Cause:
    """A rank that said itself why it ends."""
    known = record["class"] in _KINDS
    message = str(record["message"])
    return Cause(
        kind="stop" if record["code"] == STOP else record["class"] if known else "error",
        message=f"rank {rank}: {message}",
        rank=rank,
        type=str(record.get("type") or message.partition(":")[0]),
        images=record.get("images"),
        section=record.get("section"),
    )


def _scheduled(at: AttemptView, kind: Kind) -> Cause:
    """The scheduler says why it ended the job, which its ranks cannot know."""
    silent = sorted(at.starts - set(at.exits) - {"unknown"}, key=int)
    message = _SAID[kind]
    if kind in ("node", "memory") and silent:
        message += f"; {_ranks(silent)} left no exit record"
    return Cause(kind=kind, message=message, rank=silent[0] if silent else None, **_place(at))


def _asked(at: AttemptView, records: Sequence[tuple[str, Mapping[str, Any]]]) -> Cause:
    """The ranks were asked to end, and only they say so: which signal it was, and when, has to tell by whom."""
    rank, first = records[0]
    kind: Kind = "preempted"
    ended = float(first.get("time", 0.0))
    if at.began is not None and at.limit_s is not None and "SIGUSR2" in str(first["message"]):
        # Slurm warns of a time limit by this signal, a while before; a site may send it for a preemption, too
        kind = "limit" if ended - at.began > 0.75 * at.limit_s - EARLY_S else "preempted"
    said = str(first["message"])
    message = f"rank {rank} was {said}" if said.startswith("ended") else f"rank {rank}: {said}"
    return Cause(kind=kind, message=message, rank=rank, **_place(at))


def _silent(
    at: AttemptView, silent: Sequence[str], failed: Sequence[tuple[str, Mapping[str, Any]]]
) -> Cause:
    """A rank was killed and could not say anything; what other ranks say is of its end."""
    signals: Mapping[str, int] = at.ending.get("signals", {})
    codes: Mapping[str, int] = at.ending.get("codes", {})
    rank = min(silent, key=lambda each: (each not in {**signals, **codes}, silent.index(each)))
    kind: Kind = "killed"
    message = f"rank {rank} left no exit record (killed from outside, for example out of memory)"
    name = ""
    if number := signals.get(rank):
        name = signal.Signals(number).name
        kind = "crash" if number in CRASHES else "killed"
        # before the rank could hear it
        kind = "preempted" if number in (signal.SIGTERM, signal.SIGUSR2) else kind
        message = f"rank {rank} was killed by {name}"
        if number == signal.SIGKILL:
            message += " (from outside, for example out of memory)"
    elif code := codes.get(rank):
        kind, name = "error", f"exit code {code}"
        message = f"rank {rank} exited with code {code} and left no exit record"
    if failed:
        message += f"; rank {failed[0][0]}: {failed[0][1]['message']}"
    return Cause(kind=kind, message=message, rank=rank, type=name, **_place(at))


def _place(at: AttemptView) -> dict[str, Any]:
    """Where training was when it ended, by those ranks that could say so."""
    records = [record for record in at.exits.values() if record.get("images") is not None]
    last = max(records, key=lambda record: int(record["images"]), default={})
    return {"images": last.get("images"), "section": last.get("section")}


def _ranks(ranks: Sequence[str]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks)}"
