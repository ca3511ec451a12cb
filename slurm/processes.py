"""Whose process is this? Starting daemons and finding, years or seconds later, all that they left.

A process number alone proves nothing: numbers are handed out again. Here a process is its number
*and* its start time, and it belongs to a cluster only if it shows the cluster's state folder, in its
command line, its environment or its open files. slurmstepd writes over its own command line and
environment, and the tasks of a job may clear theirs, hence the three ways and the family tree.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shards.wait import wait_until

DAEMONS = ("munged", "mariadb", "slurm")  # how the names of the cluster's own programs begin
BATCH_SCRIPT = "slurm_script"  # the user's, although its name begins like ours


@dataclass(frozen=True, kw_only=True)
class Process:
    """One line of the process table; `started` is in clock ticks since the machine booted."""

    pid: int
    started: int
    name: str
    parent: int
    session: int

    @property
    def daemon(self) -> bool:
        return self.name.startswith(DAEMONS) and self.name != BATCH_SCRIPT


def look(pid: int) -> Process | None:
    """The process with this number, or None when there is none or only its unburied rest."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name stands in brackets and may hold blanks and brackets itself: split at the last one.
    name = text[text.index("(") + 1 : text.rindex(")")]
    fields = text[text.rindex(")") + 2 :].split()
    if fields[0] in "ZX":
        return None
    return Process(
        pid=pid, started=int(fields[19]), name=name, parent=int(fields[1]), session=int(fields[3])
    )


def alive(pid: int, started: int) -> bool:
    """Whether this very process still runs, and not a later one with the same number."""
    found = look(pid)
    return found is not None and found.started == started


def start(argv: list[str], env: dict[str, str], output: Path) -> Process:
    """Starts a daemon in a session of its own with default signals; its output goes to a file.

    `posix_spawn` and not `Popen`: the daemon outlives us, so no object should wait for its end.
    ChildProcessError when it ended at once; the file then holds the reason.
    """
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        pid = os.posix_spawn(
            argv[0],
            argv,
            env,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
            setsid=True,
            setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP],
        )
    finally:
        os.close(log)
    found = look(pid)
    if found is None:
        bury(pid)
        raise ChildProcessError(f"{argv[0]} ended as soon as it was started")
    return found


def members(state: Path) -> list[Process]:
    """Every live process of the cluster in this folder: its daemons, job steps and their tasks."""
    known = {process.pid: process for process in table()}
    family = {pid for pid, process in known.items() if _belongs(process, state)}
    while True:
        # A step leads a session that no shell of a user shares; a task may have lost its parent.
        sessions = {known[pid].session for pid in family if known[pid].name == "slurmstepd"}
        grown = family | {
            process.pid
            for process in known.values()
            if process.parent in family or process.session in sessions
        }
        if grown == family:
            break
        family = grown
    return [known[pid] for pid in sorted(family - {os.getpid()})]


def end(
    members: Callable[[], list[Process]],
    *,
    asks: Callable[[Process], bool] = lambda process: False,
    grace: float = 2.0,
    patience: float = 60.0,
) -> None:
    """Ends every member. Those of which `asks` says so get SIGTERM and `grace` seconds first, all others are killed.

    TimeoutError when some are left after `patience` seconds.
    """
    first: dict[tuple[int, int], float] = {}  # when each was first seen
    family: list[Process] = []

    def gone() -> bool:
        family[:] = members()
        for process in family:
            now, key = time.monotonic(), (process.pid, process.started)
            seen = first.setdefault(key, now)
            if not asks(process) or now - seen > grace:
                _signal(process, signal.SIGKILL)
            elif seen == now:
                _signal(process, signal.SIGTERM)
                _signal(process, signal.SIGCONT)
        for pid, _ in first:
            bury(pid)
        return not family

    if not wait_until(gone, timeout_s=patience, poll_s=0.02):
        names = ", ".join(f"{process.name} ({process.pid})" for process in family)
        raise TimeoutError(f"these processes do not end, even when killed: {names}")


def bury(pid: int) -> None:
    """Takes the exit status of an ended child, so that it does not stay in the process table."""
    with contextlib.suppress(ChildProcessError):  # not our child: its parent or init does it
        os.waitpid(pid, os.WNOHANG)


def _signal(process: Process, number: signal.Signals) -> None:
    if alive(process.pid, process.started):
        with contextlib.suppress(ProcessLookupError):  # it ended between the look and the signal
            os.kill(process.pid, number)


def table() -> list[Process]:
    """Every live process of this machine."""
    found = (look(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [process for process in found if process is not None]


def _belongs(process: Process, state: Path) -> bool:
    folder = f"{state}/".encode()
    if process.daemon and folder in read(process.pid, "cmdline"):
        return True
    if process.daemon and any(file.startswith(folder) for file in _open_files(process.pid)):
        return True
    # A user's shell may well export SLURM_CONF; only what a node started also has a node's name.
    environment = read(process.pid, "environ").split(b"\0")
    return b"SLURM_CONF=" + folder + b"slurm.conf" in environment and any(
        item.startswith(b"SLURMD_NODENAME=") for item in environment
    )


def read(pid: int, file: str) -> bytes:
    """A file of /proc on that process; empty where it may not be read."""
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:  # ended meanwhile, or another user's: either way not ours to end
        return b""


def _open_files(pid: int) -> list[bytes]:
    files = []
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                files.append(os.fsencode(os.readlink(entry.path)))  # noqa: PTH115 (bytes, quick)
    except OSError:  # as in `read`
        return []
    return files
