"""When Slurm's jobs had their nodes: by `sacct`, and where a site keeps no accounting by what `squeue` still knows."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence

from launcher.backends.protocol import Record, Span

# both commands then say times in seconds since 1970
CLOCK = {"SLURM_TIME_FORMAT": "%s"}
# a clock of a submitting machine may be so much ahead of the controller's
_SKEW_S = 60.0

# runs a command of Slurm; None where it does not answer in time
Run = Callable[[list[str]], "subprocess.CompletedProcess[str] | None"]


def spans(records: Sequence[Record], run: Run) -> list[tuple[Span, ...]]:
    """Returns the allocations of each job, oldest first; nothing of those that nobody knows (any more)."""
    ids = sorted({record["id"] for record in records})
    found = _by_accounting(ids, run)
    if found is None:
        found = list(_by_queue(run))
    return [
        tuple(
            span
            for id, name, span in found
            # a fresh Slurm counts its jobs from 1 again
            if id == record["id"]
            and name == record["name"]
            and span.start > record["submitted"] - _SKEW_S
        )
        for record in records
    ]


def _by_accounting(ids: Sequence[str], run: Run) -> list[tuple[str, str, Span]] | None:
    """Id, name and span of every allocation; None where there is no accounting."""
    # duplicates are the earlier allocations of a job that was requeued
    command = ["sacct", "--allocations", "--duplicates", "--noheader", "--parsable2"]
    command += ["--format=JobID,Eligible,Start,End,ElapsedRaw,JobName", f"--jobs={','.join(ids)}"]
    lines = _answer(command, run)
    if lines is None:
        return None
    found = []
    for line in lines:
        id, eligible, start, end, elapsed, name = line.split("|", 5)
        if not start.isdigit():  # it waits, or never ran
            continue
        began = float(start)
        # elapsed leaves out what a job was suspended for
        ended = began + float(elapsed) if end.isdigit() else None
        waited = max(0.0, began - float(eligible)) if eligible.isdigit() else None
        found.append((id, name, Span(began, ended, waited)))
    return sorted(found, key=lambda each: each[2].start)


def _by_queue(run: Run) -> Iterator[tuple[str, str, Span]]:
    command = ["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%S|%e|%t|%j"]
    for line in _answer(command, run) or ():
        id, start, end, state, name = line.split("|", 4)
        if start.isdigit() and state not in ("PD", "CF"):
            # the end of one that runs is its time limit
            over = end.isdigit() and state not in ("R", "CG", "S")
            yield id, name, Span(float(start), float(end) if over else None)


def _answer(command: list[str], run: Run) -> list[str] | None:
    try:
        done = run(command)
    except FileNotFoundError:
        return None
    return None if done is None or done.returncode else done.stdout.splitlines()
