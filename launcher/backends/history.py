"""How a job ended that squeue does not know any more: asked of the controller by its number, and of the accounting.

A site may have neither `scontrol` here nor an accounting at all. Then nothing is known, which is no error: what ended
a job is also in the files of its ranks.
"""

from __future__ import annotations

import datetime
import pwd
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from launcher.backends.protocol import Ending, Record

# of one answer of `scontrol show job`, at so many jobs at most: it takes one a call
_MOST = 4
_FIELD = re.compile(r"(\w+)=(.*?)(?= \w+=|$)")
_LIMIT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


def ask(
    records: Sequence[Record], environment: Mapping[str, str], patience_s: float
) -> dict[str, Ending]:
    """Returns the endings that are known, by the ids of jobs."""
    found: dict[str, Ending] = {}
    if shutil.which("squeue", path=environment.get("PATH")) is None:
        # else it has asked the controller already
        for record in records[-_MOST:]:
            found |= _of_controller(record, environment, patience_s)
    return found | _of_accounting(
        [each for each in records if each["id"] not in found], environment, patience_s
    )


def ending(word: str, *, end: str, limit: str) -> Ending:
    """Returns the ending that Slurm tells in its words: of the state, and of two times."""
    state, _, by = word.partition(" by ")
    found: Ending = {"state": state, "ended": moment(end), "limit_s": _seconds(limit)}
    if by.isdigit():
        try:
            found["by"] = pwd.getpwuid(int(by)).pw_name
        except KeyError:  # of another machine
            found["by"] = f"user {by}"
    return {name: value for name, value in found.items() if value is not None}


def _of_controller(
    record: Record, environment: Mapping[str, str], patience_s: float
) -> dict[str, Ending]:
    text = _run(["scontrol", "--oneliner", "show", "job", record["id"]], environment, patience_s)
    told = dict(_FIELD.findall(text))
    if told.get("Comment") != record["comment"]:
        return {}
    return {record["id"]: ending(told["JobState"], end=told["EndTime"], limit=told["TimeLimit"])}


def _of_accounting(
    records: Sequence[Record], environment: Mapping[str, str], patience_s: float
) -> dict[str, Ending]:
    if not records:
        return {}
    names = {record["id"]: record["name"] for record in records}
    command = ["sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(names)}"]
    command.append("--format=JobID,JobName%200,State,End,Timelimit")
    rows = [line.split("|") for line in _run(command, environment, patience_s).splitlines()]
    return {
        id: ending(word, end=end, limit=limit)
        for id, name, word, end, limit in (row for row in rows if len(row) == 5)
        # a fresh Slurm counts its jobs from 1 again, and one that works has not ended
        if names.get(id) == name and word not in ("PENDING", "RUNNING", "REQUEUED")
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
