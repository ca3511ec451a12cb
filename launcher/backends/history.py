"""How a job ended by others than squeue: the controller's own tool where there is no squeue, and the accounting.

A site may have neither. Then nothing is known, which is no error: what ended a job is also in the files of its ranks.
"""

from __future__ import annotations

import datetime
import pwd
import re
import subprocess
from collections.abc import Mapping, Sequence

from launcher.backends.protocol import Ending, Record

QUEUED = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
# a job that was started once more says no longer how it ended before
_AGAIN = QUEUED | {"RUNNING", "SUSPENDED"}
# all jobs, a line each
SHOW = ["scontrol", "--oneliner", "show", "job"]
_FIELD = re.compile(r"(\w+)=(.*?)(?= \w+=|$)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_LIMIT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


def shown(text: str, ended: bool) -> list[list[str]]:
    """Returns what `scontrol show job` says of all jobs, in the fields of squeue: id, state, name and comment.

    Args:
        ended: of jobs that have ended, too; the state is followed by end, time limit and reason.
    """
    jobs = [dict(_FIELD.findall(line)) for line in text.splitlines() if "JobState=" in line]
    return [
        [
            id,
            f"{job['JobState']} {job['EndTime']} {job['TimeLimit']} {job['Reason']}"
            if ended
            else job["JobState"],
            job["JobName"],
            job.get("Comment", ""),
        ]
        for job in jobs
        for id in _ids(job)
        if ended or job["JobState"] in _AGAIN | {"COMPLETING"}
    ]


def _ids(job: Mapping[str, str]) -> list[str]:
    """Its number; of tasks of an array that wait together, such as 1-3,7%2, one each."""
    if "ArrayTaskId" not in job:
        return [job["JobId"]]
    ranges = _RANGE.findall(job["ArrayTaskId"].partition("%")[0])
    tasks = (task for low, high in ranges for task in range(int(low), int(high or low) + 1))
    return [f"{job['ArrayJobId']}_{task}" for task in tasks]


def ending(word: str, *, end: str, limit: str) -> Ending:
    """Returns the ending that Slurm tells in its words: of the state, and of two times; empty of a job that works."""
    state, _, by = word.partition(" by ")
    if state in _AGAIN:
        return {}
    found: Ending = {"state": state, "ended": moment(end), "limit_s": _seconds(limit)}
    if by.isdigit():
        try:
            found["by"] = pwd.getpwuid(int(by)).pw_name
        except KeyError:  # of another machine
            found["by"] = f"user {by}"
    return {name: value for name, value in found.items() if value is not None}


def by_accounting(
    records: Sequence[Record], environment: Mapping[str, str], patience_s: float
) -> dict[str, Ending]:
    """Returns what `sacct` knows of the ends of jobs, by their ids; nothing where a site has none."""
    names = {record["id"]: record["name"] for record in records}
    command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(names)}"]
    command.append("--format=JobID,JobName%200,State,End,Timelimit")
    rows = [line.split("|") for line in _run(command, environment, patience_s).splitlines()]
    return {
        id: ending(word, end=end, limit=limit)
        for id, name, word, end, limit in (row for row in rows if len(row) == 5)
        # a fresh Slurm counts its jobs from 1 again
        if names.get(id) == name
    }


def _run(command: Sequence[str], environment: Mapping[str, str], patience_s: float) -> str:
    """What a command says; "" where it is not there, fails or does not answer."""
    try:
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, timeout=patience_s
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def moment(text: str) -> float | None:
    """Returns Slurm's local time in seconds since 1970; None where it says Unknown or N/A."""
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _seconds(text: str) -> float | None:
    """Slurm's length of time, such as 1-02:00:00; squeue leaves out hours that are 0."""
    found = _LIMIT.fullmatch(text)
    if found is None:  # UNLIMITED, Partition_Limit
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((24 * days + hours) * 60 + minutes) * 60 + seconds)
