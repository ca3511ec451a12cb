"""A real Slurm cluster on this machine: munge, MariaDB, slurmdbd, slurmctld and several slurmd.

Everything lives in one folder: keys, sockets, logs, spool, database. Nothing of the system is
touched but a marked block in /etc/hosts, so the cluster stands beside another Slurm, another MUNGE
and another cluster of ours, and `down` leaves no trace, also after a crash half-way up.

    cluster = up()                      # some seconds
    subprocess.run(["sinfo"], env={**os.environ, **cluster.environment()})
    down()
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from shards.errors import UserError
from slurm import hosts, processes
from slurm.crew import PACKAGES, missing, node_states, resolves, start_all
from slurm.layout import (
    CLUSTER,
    GPU_FILES,
    LONGEST_FOLDER,
    PARTITION,
    Record,
    boot_id,
    read_record,
    write_record,
)
from slurm.service import Say, StartError

__all__ = ["Cluster", "Say", "StartError", "Status", "down", "find", "status", "up"]

VITAL = ("munged", "slurmctld")  # without them nothing is answered; a lost node is normal life
MOST_NODES = 16


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A live cluster and what a client needs to reach it."""

    state: Path
    conf: Path
    nodes: tuple[str, ...]
    gpus: int  # per node
    partition: str = PARTITION

    def environment(self) -> dict[str, str]:
        """What Slurm's commands need in their environment, and `find` in that of a job."""
        return {"SLURM_CONF": str(self.conf), "SELFGUIDE_DEVCLUSTER": str(self.state)}


@dataclass(frozen=True, kw_only=True)
class Status:
    """How the cluster in a folder is. `nodes` maps a name to Slurm's word for its state."""

    state: Path
    word: str  # "up", "degraded" (something of it is missing) or "down"
    daemons: dict[str, bool]
    nodes: dict[str, str]
    names_resolve: bool


def find(state: Path | None = None) -> Cluster | None:
    """The live cluster in this folder, or None. Reads a few small files and starts nothing.

    A cluster that lost its accounting or some of its nodes is still found; `status` tells.
    """
    state = CLUSTER.folder(state)
    record = read_record(state)
    if record is None or not record.ready or record.boot != boot_id():
        return None
    if not all(processes.alive(*record.daemons[name]) for name in VITAL):
        return None
    return _cluster(state, record)


def up(
    state: Path | None = None, *, nodes: int = 4, gpus: int = 2, say: Say = lambda line: None
) -> Cluster:
    """Starts a cluster and returns when every node is idle; a live one is returned as it is.

    `say` hears one line per step. UserError for what a user can mend (programs that are not
    installed, a folder that holds other things, a live cluster of another shape), StartError with
    the end of the log when a daemon fails. After any error nothing is left behind.
    """
    state = CLUSTER.folder(state)
    _check(state, nodes, gpus)

    def live() -> Cluster | None:
        cluster = find(state)
        if cluster and (len(cluster.nodes), cluster.gpus) != (nodes, gpus):
            raise UserError(
                f"nodes={nodes} gpus={gpus}: a cluster of {len(cluster.nodes)} nodes with "
                f"{cluster.gpus} GPUs each is up in {state}; take it down first"
            )
        return cluster

    def start(made: list[str]) -> Cluster:
        names = tuple(f"devnode{number}" for number in range(1, nodes + 1))
        record = Record(nodes=names, gpus=gpus, boot=boot_id(), made=tuple(made))
        write_record(state, record)
        record = replace(start_all(state, record, say), ready=True)
        write_record(state, record)
        return _cluster(state, record)

    return CLUSTER.up(state, say, live, start)


def down(state: Path | None = None, *, say: Say = lambda line: None) -> None:
    """Ends the cluster in this folder, or what is left of one, and removes every trace of it.

    Jobs that run end with it. UserError when called from inside one of them, or when the folder
    holds something else.
    """
    state = CLUSTER.folder(state)
    inside = os.environ.get("SLURM_CONF") == str(state / "slurm.conf")
    if inside and "SLURMD_NODENAME" in os.environ:
        raise UserError(f"state={state}: this is a job of that cluster; run it from outside")
    CLUSTER.down(state, say)


def status(state: Path | None = None) -> Status:
    """Looks at the processes and, where the controller lives, asks Slurm itself (up to 10 s)."""
    state = CLUSTER.folder(state)
    record = read_record(state)
    if record is None:
        word = "degraded" if processes.members(state) or hosts.present(state) else "down"
        return Status(state=state, word=word, daemons={}, nodes={}, names_resolve=False)
    same_boot = record.boot == boot_id()
    daemons = {name: same_boot and processes.alive(*at) for name, at in record.daemons.items()}
    nodes = node_states(state / "slurm.conf", timeout=10) if find(state) else {}
    well = record.ready and all(daemons.values()) and set(nodes) == set(record.nodes)
    well = well and not any(re.search(r"down|drain|fail|unk|\*", word) for word in nodes.values())
    return Status(
        state=state,
        word="up" if well else "degraded",
        daemons=daemons,
        nodes=nodes,
        names_resolve=all(resolves(name) for name in record.nodes),
    )


def _cluster(state: Path, record: Record) -> Cluster:
    return Cluster(state=state, conf=state / "slurm.conf", nodes=record.nodes, gpus=record.gpus)


def _check(state: Path, nodes: int, gpus: int) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_./+-]+", str(state)):
        raise UserError(f"state={state}: Slurm's config takes letters, digits and _ . / + - only")
    if len(str(state)) > LONGEST_FOLDER:
        raise UserError(
            f"state={state}: {len(str(state))} characters, and the sockets in it allow "
            f"{LONGEST_FOLDER}; name a shorter folder with --state or $SELFGUIDE_DEVCLUSTER"
        )
    if not 1 <= nodes <= MOST_NODES:
        raise UserError(f"nodes={nodes}: one machine carries 1 to {MOST_NODES}")
    if not 0 <= gpus <= len(GPU_FILES):
        raise UserError(
            f"gpus={gpus}: there are device files to stand in for 0 to {len(GPU_FILES)}"
        )
    if absent := missing():
        who = "run" if os.geteuid() == 0 else "have root run (the cluster itself needs no root)"
        raise UserError(
            f"not installed: {', '.join(absent)}. On Debian {who}: "
            f"apt-get install -y --no-install-recommends {PACKAGES}"
        )
