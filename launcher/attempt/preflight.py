"""What a node is asked before torch is imported: ranks of older attempts that still run here, memory, and disks.

One rank of each node asks, and nodes are asked in parallel. What ranks find out together is `training/probes.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import signal
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from selfguide.spec.config import Config
from selfguide.spec.files import read_config
from selfguide.spec.nodes import NodeRefused, node_name
from selfguide.spec.run import Lease, RunFolder, read_record
from selfguide.spec.sizes import footprint
from shards.errors import NoRoomError

# a killed process that needs longer is stuck in the kernel
KILLED_S = 5.0
# what the processes of a rank take at least, and what they write beside the run: bytes
MEMORY_A_RANK = 500 << 20
TEMPORARY = 100 << 20
SHARED_A_RANK = 16 << 20

log = logging.getLogger(__name__)


def look(attempt: Path) -> None:
    """Checks the node that this rank is the first of, for the attempt in this folder.

    Raises:
        NodeRefused: the node is not fit for training.
        Fenced: a newer attempt exists.
        NoRoomError: the disk of the run has no room for a checkpoint, which is no node's fault.
    """
    config = read_config(attempt / "config.yaml")
    if not config.cluster.checks_nodes:
        return
    lease = Lease(RunFolder(attempt.parent.parent), int(attempt.name))
    # before anything is ended: this may be what a newer attempt should end
    lease.check()
    end_strays(lease)
    _check_memory(config.cluster.gpus_per_node)
    _check_room(config, attempt)


# ---- ranks of older attempts -------------------------------------------------------------------------


@dataclass(frozen=True)
class Stray:
    """A process of an older attempt of this run, on this node."""

    pid: int
    job: str


def end_strays(lease: Lease, proc: Path = Path("/proc")) -> None:
    """Kills what older attempts of the run have left on this node: nothing that they do is of use to anybody.

    Raises:
        NodeRefused: a process cannot be killed.
    """
    older = _older_jobs(lease)
    for stray in strays(lease.run.root, older, os.environ, proc) if older else ():
        log.warning(f"process {stray.pid} of job {stray.job}, an older attempt, is ended")
        if not _kill(stray, proc):
            what = f"process {stray.pid} of job {stray.job}, an older attempt, cannot be ended"
            raise NodeRefused(node_name(), "strays", what)


def strays(
    run: Path, older: set[str], environment: Mapping[str, str], proc: Path = Path("/proc")
) -> Iterator[Stray]:
    """Yields the processes on this node that are ranks of `older` jobs of the run, or were started by ranks.

    Args:
        environment: of this rank. A job that Slurm has started once more left what it left in its former life.
    """
    mine = _job(environment)
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes()
            environ = _variables((folder / "environ").read_bytes())
        except OSError:  # ended meanwhile, or somebody else's
            continue
        id, restart = _job(environ)
        ours = _of_run(run, command, environ.get("SUBMITIT_FOLDER", ""))
        # nodes of a development cluster share a process table
        here = environ.get("SLURMD_NODENAME") == environment.get("SLURMD_NODENAME")
        before = id in older if id != mine[0] else restart < mine[1]
        if ours and here and before:
            yield Stray(int(folder.name), id)


def _of_run(run: Path, command: bytes, submitit: str) -> bool:
    """Whether a process is a rank of training of the run, or a child of one, by its command or its variables."""
    pattern = re.escape(f"{run}/attempts/") + r"\d+/(job|successor)$"
    words = [word.decode(errors="replace") for word in command.split(b"\0")]
    return any(re.match(pattern, word) for word in (*words, submitit))


def _older_jobs(lease: Lease) -> set[str]:
    """Ids of the Slurm jobs of this attempt and of those before it."""
    numbers = [n for n in lease.run.attempt_numbers() if n <= lease.number]
    records = (read_record(lease.run.attempt(n) / "job.json") for n in numbers)
    return {str(record["id"]) for record in records if record}


def _job(environment: Mapping[str, str]) -> tuple[str, int]:
    """A job's id, "" outside of Slurm, and how often it was started before."""
    restarts = environment.get("SLURM_RESTART_COUNT") or "0"
    return environment.get("SLURM_JOB_ID", ""), int(restarts) if restarts.isdigit() else 0


def _variables(environ: bytes) -> dict[str, str]:
    pairs = (part.partition(b"=") for part in environ.split(b"\0"))
    return {
        name.decode(errors="replace"): value.decode(errors="replace") for name, _, value in pairs
    }


def _kill(stray: Stray, proc: Path) -> bool:
    """Kills the process that has this id and this job; returns whether it is gone."""
    try:
        handle = os.pidfd_open(stray.pid)
    except ProcessLookupError:
        return True
    try:
        # the number may have become another process's before it was held
        with contextlib.suppress(OSError):
            environ = _variables((proc / str(stray.pid) / "environ").read_bytes())
            if environ and _job(environ)[0] != stray.job:
                return True
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        # readable when it has ended
        return bool(select.select([handle], [], [], KILLED_S)[0])
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    finally:
        os.close(handle)


# ---- memory and disks --------------------------------------------------------------------------------


def available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Returns the bytes of memory that new processes may have on this node."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise OSError(f"{meminfo} does not say how much memory is available")


def free_bytes(folder: Path) -> int:
    """Returns the bytes that may be written below a folder."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def _check_memory(ranks: int) -> None:
    there, needed = available_memory(), MEMORY_A_RANK * ranks
    if there < needed:
        what = f"{there / 1e9:.2f} GB of memory are available, and {ranks} ranks take {needed / 1e9:.2f} at least"
        raise NodeRefused(node_name(), "memory", what)


def _check_room(config: Config, attempt: Path) -> None:
    places = {Path(tempfile.gettempdir()): TEMPORARY}
    places[Path("/dev/shm")] = SHARED_A_RANK * config.cluster.gpus_per_node
    for place, needed in places.items():
        if place.is_dir() and free_bytes(place) < needed:
            there = free_bytes(place)
            what = f"{place} has {there / 1e6:.0f} MB free, and {needed / 1e6:.0f} are needed"
            raise NodeRefused(node_name(), "disk", what)
    cache = config.data.cache
    if cache and Path(cache).is_dir() and free_bytes(Path(cache)) < TEMPORARY:
        log.warning(
            f"preflight: {node_name()} noted, disk: data.cache={cache} is full; shards are read from afar"
        )
    there, needed = free_bytes(attempt), footprint(config).checkpoint
    if there < needed:
        raise NoRoomError(
            f"runs={attempt.parents[3]} has {there / 1e9:.2f} GB free, and a checkpoint of this run takes "
            f"{needed / 1e9:.2f}; make room there and submit the run again"
        )
