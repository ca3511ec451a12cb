"""Jobs of a Slurm, as squeue tells of them, or scontrol where there is none."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.backends import history
from launcher.backends.protocol import Ending, Record, State
from launcher.backends.slurm_client import run

# reasons that are more than the state of a job which still completes
_ENDED_BY = {"NodeDown": "NODE_FAIL", "TimeLimit": "TIMEOUT"}


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A line of squeue."""

    # Slurm's own word, and a reason behind it where that was asked for
    state: str
    name: str
    comment: str


def jobs(
    client: Mapping[str, str], patience_s: float | None = None, ended: bool = False, users: str = ""
) -> dict[str, Queued] | None:
    """Returns this user's jobs by id, or those of some users; None when nobody answers.

    Args:
        ended: also those that ended lately.
    """
    # a line a task
    asked = ["squeue", f"--user={users}" if users else "--me", "--array", "--noheader"]
    asked += (
        ["--states=all", "--format=%i|%T %e %l %r|%j|%k"] if ended else ["--format=%i|%T|%j|%k"]
    )
    rows = fields(asked, client, patience_s)
    if rows is None and shutil.which("squeue", path=client.get("PATH")) is None:
        done = run(history.SHOW, client, patience_s=patience_s)
        rows = history.shown(done.stdout, ended) if done and not done.returncode else None
    if rows is None:
        return None
    return {
        id: Queued(state=state, name=name, comment=comment.strip())
        for id, state, name, comment in rows
    }


def fields(
    command: list[str], client: Mapping[str, str], patience_s: float | None
) -> list[list[str]] | None:
    """Returns the fields of each line; None when nobody answers."""
    count = command[-1].count("|")
    done = run(command, client, patience_s=patience_s)
    if done is None or done.returncode:
        return None
    lines = done.stdout.splitlines()
    return [line.split("|", count) for line in lines if line.count("|") >= count]


def said(comment: str, wanted: str) -> bool:
    """Returns whether a job's comment is the wanted one, before which `cluster.comment` may stand."""
    return comment == wanted or comment.endswith(f" {wanted}")


def users(records: Sequence[Record]) -> str:
    """Returns whose run folders these are, for squeue; "" where all are this user's."""
    found = set()
    for folder in {str(record["comment"]) for record in records}:
        # of a folder that is gone nobody knows
        with contextlib.suppress(OSError):
            found.add(Path(folder).stat().st_uid)
    others = sorted(found | {os.getuid()}) if found - {os.getuid()} else ()
    return ",".join(map(str, others))


def state(record: Record, queue: Mapping[str, Queued] | None) -> State:
    """Returns the state of a job by the queue, None where nobody answered."""
    if queue is None:
        return "unknown"
    job = queue.get(record["id"])
    # a fresh Slurm counts its jobs from 1 again
    if job is None or not said(job.comment, record["comment"]):
        return "gone"
    return "queued" if job.state in history.QUEUED else "running"


def ending(record: Record, queue: Mapping[str, Queued]) -> Ending:
    """Returns what the controller still says of how a job ended."""
    job = queue.get(record["id"])
    if job is None or not said(job.comment, record["comment"]):
        return {}
    word, end, limit, reason = [*job.state.split(" ", 3), "", "", ""][:4]
    # a job of a lost node completes when the node is back
    return history.ending(_ENDED_BY.get(reason, word), end=end, limit=limit)
