"""Slurm's own processes around a rank: the slurmstepd that started it, and the srun of its job on this node.

A slurmstepd ends after its ranks. Where it was killed, its ranks work on until their monitor ends them, and srun, which
hears of ranks through it, may wait for them for minutes. So whoever of the job is on srun's node ends it: a monitor
that reads the verdict, or a rank that loses its peer. A container may hide both; then srun's own patience counts.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from launcher.attempt import stacks
from launcher.attempt.exits import verdict_path
from selfguide.spec.run import read_record
from slurm import processes


def daemon_above(pid: int) -> tuple[int, int] | None:
    """Returns process and start of the slurmstepd above a rank; None where there is none, or none to be seen."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        # a job on one machine may come from a shell in somebody's allocation
        return None
    found = processes.look(pid)
    while found is not None and found.name != "slurmstepd":
        found = processes.look(found.parent)
    return None if found is None else (found.pid, found.started)


def end_srun(folder: Path) -> None:
    """Kills the srun on this node that started the ranks of this job, where a monitor says that some are cut off.

    Its batch script goes on.

    Args:
        folder: of the ranks' records.
    """
    verdict = read_record(verdict_path(folder))
    if verdict is None or verdict.get("kind") != "killed":
        return
    logs = os.fsencode(os.environ.get("SUBMITIT_FOLDER", ""))
    # several nodes may be one machine
    node = b"SLURMD_NODENAME=" + os.fsencode(os.environ.get("SLURMD_NODENAME", ""))
    for each in processes.table():
        # the last word of its command, as Submitit has it
        words = processes.read(each.pid, "cmdline").rstrip(b"\0").split(b"\0")
        if each.name != "srun" or not logs or words[-1] != logs:
            continue
        if node in processes.read(each.pid, "environ").split(b"\0"):
            stacks.send(each.pid, signal.SIGKILL)
