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
# cancelled: the same, by launcher.cancel. stop: a rank asked that nothing follows (93). crash: killed by a signal of
# its own doing, such as SIGSEGV. lost: ended, and nothing says why
Kind = Literal[
    "ok",
    "user",
    "stop",
    "preempted",
    "limit",
    "outside",
    "cancelled",
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
ASKED = ("preempted", "limit", "outside", "cancelled")

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
    "REQUEUED": "preempted",
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
_OWN = ("user", "numeric", "storage", "memory", "hang", "killed", "node")
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
    # its node, or the one that failed
    node: str | None = None
    # of the attempts of its run
    attempt: int = 0


def cause(at: AttemptView) -> Cause:
    """Returns why an attempt ended whose job is gone."""
    found = _cause(at)
    if at.cancelled and found.kind in ASKED:
        by = f" by {at.cancel_by}" if at.cancel_by else ""
        found = replace(found, kind="cancelled", message=f"it was cancelled{by}")
    rank, node = found.rank, found.node or (found.rank and node_of(at, found.rank))
    if rank is not None and found.node is not None and node_of(at, rank) != found.node:
        # of a node that failed a check all ranks say so
        there = (each for each in sorted(at.begins) if node_of(at, each) == found.node)
        rank = next(there, rank)
    return replace(found, rank=rank, node=node, attempt=at.number)


def node_of(at: AttemptView, rank: str) -> str | None:
    """Returns the node of a rank, by what it wrote when it began, or by srun; None where neither says so."""
    record = at.begins.get(rank, {})
    found = record.get("node") or at.ending.get("nodes", {}).get(rank) or record.get("host")
    return None if found is None else str(found)


def _cause(at: AttemptView) -> Cause:
    errors = _by_time(at, lambda r: r["code"] and r["class"] not in ("signal", "preempted"))
    # others say only that a peer is gone, or that a newer attempt has begun
    failed = [each for each in errors if not (each[1].get("peer_gone") or _fenced(each[1]))]
    own = [each for each in failed if each[1]["class"] in _OWN or each[1]["code"] == STOP]
    if own:
        return _failed(*own[0])
    if at.ending.get("lost_steps") and at.ending.get("state") != "NODE_FAIL":
        nodes = list(
            dict.fromkeys(node_of(at, r) for r in sorted(at.starts - {"unknown"}, key=int))
        )
        lost = [nodes[each] for each in at.ending["lost_steps"] if each < len(nodes)]
        ranks = [r for r in sorted(at.starts - {"unknown"}, key=int) if node_of(at, r) in lost]
        if ranks:
            message = f"{named(ranks)} on {lost[0]} lost Slurm's daemon that had started them (slurmstepd)"
            return Cause(kind="killed", message=message, rank=ranks[0], **_place(at))
    for name in ("state", "log_state"):
        if kind := _WORDS.get(str(at.ending.get(name, "")).partition(" ")[0]):
            return _scheduled(at, kind)
    silent = silent_ranks(at)
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
        if at.job is None and not at.starts:
            return Cause(kind="lost", message="its submission was interrupted before it had a job")
        said = at.ending.get("said", ["see its log"])[0]
        message = f"rank {absent[0]} never started: {said}"
        return Cause(kind="lost", message=message, rank=absent[0])
    if errors:
        return replace(_failed(*errors[0]), kind="lost")
    if signalled := _by_time(at, lambda r: r["code"]):
        return _asked(at, signalled)
    return Cause(kind="ok" if _all_left(at) else "lost")


def silent_ranks(at: AttemptView) -> list[str]:
    """Returns the ranks that began and left no exit record: those first of which the scheduler says more."""
    reported = {**at.ending.get("signals", {}), **at.ending.get("codes", {})}
    silent = at.starts - set(at.exits) - {"unknown"}
    return sorted(silent, key=lambda rank: (rank not in reported, int(rank)))


def _fenced(record: Mapping[str, Any]) -> bool:
    return bool(record["class"] == "fenced")


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
        # that failed a check, whichever rank says so
        node=record.get("node"),
    )


def _scheduled(at: AttemptView, kind: Kind) -> Cause:
    """The scheduler says why it ended the job, which its ranks cannot know."""
    message, node = _SAID[kind], None
    silent = silent_ranks(at)
    if kind == "node":
        # its ranks may live on and save, and notice only that another attempt has begun
        there = silent or sorted((r for r in at.exits if _fenced(at.exits[r])), key=int)
        lost = at.ending.get("lost_nodes") or [node_of(at, rank) for rank in there]
        nodes = sorted({each for each in lost if each})
        on_them = (rank for rank in at.starts - {"unknown"} if node_of(at, rank) in nodes)
        silent = sorted(on_them, key=int) or there
        node = ", ".join(nodes) or None
        message = f"node {node} failed" if node else message
        message += (
            f"; {named(silent)} {'was' if len(silent) == 1 else 'were'} there" if silent else ""
        )
    elif kind == "memory" and silent:
        message = f"{named(silent)} had no memory left: {message}"
    elif "REQUEUED" in (at.ending.get("state"), at.ending.get("log_state")):
        message = "its job was put back into the queue at the scheduler"
    elif kind == "outside" and "by" in at.ending:
        message = f"it was cancelled at the scheduler by {at.ending['by']}, not by launcher.cancel"
    blamed = silent[0] if silent and kind in ("node", "memory") else None
    return Cause(kind=kind, message=message, rank=blamed, node=node, **_place(at))


def _asked(at: AttemptView, records: Sequence[tuple[str, Mapping[str, Any]]]) -> Cause:
    """The ranks were asked to end, and only they say so: which signal it was, and when, has to tell by whom."""
    rank, first = records[0]
    kind: Kind = "preempted"
    ended = float(first.get("time", 0.0))
    limit_s = at.ending.get("limit_s", at.limit_s)
    if at.began is not None and limit_s is not None and "SIGUSR2" in str(first["message"]):
        # Slurm warns of a time limit by this signal, a while before; a site may send it for a preemption, too
        kind = "limit" if ended - at.began > 0.75 * limit_s - EARLY_S else "preempted"
    said = str(first["message"]).removeprefix("Preempted: ")
    message = f"rank {rank} was {said}" if said.startswith("ended") else f"rank {rank}: {said}"
    if kind == "limit":
        message += "; its time limit came near"
    return Cause(kind=kind, message=message, rank=rank, **_place(at))


def _silent(
    at: AttemptView, silent: Sequence[str], failed: Sequence[tuple[str, Mapping[str, Any]]]
) -> Cause:
    """A rank was killed and could not say anything; what other ranks say is of its end."""
    signals: Mapping[str, int] = at.ending.get("signals", {})
    codes: Mapping[str, int] = at.ending.get("codes", {})
    rank = silent[0]
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
    # that its connection broke tells nothing
    if blamed := next((each for each in failed if not each[1].get("peer_gone")), None):
        message += f"; rank {blamed[0]}: {blamed[1]['message']}"
    return Cause(kind=kind, message=message, rank=rank, type=name, **_place(at))


def _place(at: AttemptView) -> dict[str, Any]:
    """Where training was when it ended, by those ranks that could say so."""
    records = [record for record in at.exits.values() if record.get("images") is not None]
    last = max(records, key=lambda record: int(record["images"]), default={})
    return {"images": last.get("images"), "section": last.get("section")}


def named(ranks: Sequence[str]) -> str:
    """Returns "rank 1", "ranks 1, 2", or of many the first few and how many there are."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"ranks {', '.join(ranks[:8])}{more}"
