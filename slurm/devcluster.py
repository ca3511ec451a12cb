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
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from shards.errors import UserError
from slurm import hosts, processes
from slurm.crew import PACKAGES, environment, missing, node_states, resolves, start_all
from slurm.layout import GPU_FILES, LONGEST_FOLDER, PARTITION
from slurm.service import Record, Say, Service, StartError, boot_id

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
    folder = service(state)
    record = folder.read()
    return _cluster(folder, record) if record is not None and record.alive(*VITAL) else None


def up(
    state: Path | None = None, *, nodes: int = 4, gpus: int = 2, say: Say = lambda line: None
) -> Cluster:
    """Starts a cluster and returns when every node is idle; a live one is returned as it is.

    `say` hears one line per step. UserError for what a user can mend (programs that are not
    installed, a folder that holds other things, a live cluster of another shape), StartError with
    the end of the log when a daemon fails. After any error nothing is left behind.
    """
    folder = service(state)
    state = folder.state
    _check(state, nodes, gpus)
    with folder.claim(say) as made:
        if cluster := find(state):
            if (len(cluster.nodes), cluster.gpus) != (nodes, gpus):
                raise UserError(
                    f"nodes={nodes} gpus={gpus}: a cluster of {len(cluster.nodes)} nodes with "
                    f"{cluster.gpus} GPUs each is up in {state}; take it down first"
                )
            say(f"already up in {state}")
            return cluster
        if _left(state):
            say("clearing what is left of a cluster that ended badly")
            made += _clear(folder)
        names = [f"devnode{number}" for number in range(1, nodes + 1)]
        record = Record(format=folder.format, facts={"nodes": names, "gpus": gpus}, made=made)
        folder.write(record)
        try:
            start_all(folder, record, say)
            record.ready = True
            folder.write(record)
        except BaseException:  # also Ctrl-C: half a cluster is of use to nobody
            folder.remove(_clear(folder))
            raise
        return _cluster(folder, record)


def down(state: Path | None = None, *, say: Say = lambda line: None) -> None:
    """Ends the cluster in this folder, or what is left of one, and removes every trace of it.

    Jobs that run end with it. UserError when called from inside one of them, or when the folder
    holds something else.
    """
    folder = service(state)
    state = folder.state
    inside = os.environ.get("SLURM_CONF") == str(state / "slurm.conf")
    if inside and "SLURMD_NODENAME" in os.environ:
        raise UserError(f"state={state}: this is a job of that cluster; run it from outside")
    with folder.claim(say) as made:
        there = _left(state)
        folder.remove(made + _clear(folder))
    say(f"down: nothing is left of {state}" if there else f"nothing to take down in {state}")


def status(state: Path | None = None) -> Status:
    """Looks at the processes and, where the controller lives, asks Slurm itself (up to 10 s)."""
    folder = service(state)
    state, record = folder.state, folder.read()
    if record is None:
        word = "degraded" if processes.members(state) or hosts.present(state) else "down"
        return Status(state=state, word=word, daemons={}, nodes={}, names_resolve=False)
    same_boot = record.boot == boot_id()
    daemons = {name: same_boot and processes.alive(*at) for name, at in record.servers.items()}
    nodes = node_states(state / "slurm.conf", timeout=10) if find(state) else {}
    well = record.ready and all(daemons.values()) and set(nodes) == set(record.facts["nodes"])
    well = well and not any(re.search(r"down|drain|fail|unk|\*", word) for word in nodes.values())
    return Status(
        state=state,
        word="up" if well else "degraded",
        daemons=daemons,
        nodes=nodes,
        names_resolve=all(resolves(name) for name in record.facts["nodes"]),
    )


def service(state: Path | None) -> Service:
    """Returns the folder of a cluster: $SELFGUIDE_DEVCLUSTER, else one of the user's own, where `state` is None."""
    state = Service.folder(state, "SELFGUIDE_DEVCLUSTER", "devcluster")
    return Service(
        state=state,
        file="cluster.json",
        format="selfguide devcluster 2",
        templates=resources.files("slurm") / "templates",
        environment=environment(state),
    )


def _cluster(folder: Service, record: Record) -> Cluster:
    state, facts = folder.state, record.facts
    conf = state / "slurm.conf"
    return Cluster(state=state, conf=conf, nodes=tuple(facts["nodes"]), gpus=facts["gpus"])


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


def _left(state: Path) -> bool:
    """Whether anything of a cluster is here: files, processes or names."""
    return (
        (state.exists() and any(state.iterdir()))
        or hosts.present(state)
        or bool(processes.members(state))
    )


def _clear(folder: Service) -> list[str]:
    """Empties the folder, which stays because the lock is on it; returns the parents it once made.

    Processes go first, as they would write into the folder.
    """
    record = folder.read()
    processes.end(lambda: processes.members(folder.state))
    hosts.remove(folder.state)
    folder.empty()
    return record.made if record else []
