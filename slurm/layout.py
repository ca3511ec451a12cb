"""Where a cluster keeps what: the record of what was started, its ports and config files."""

from __future__ import annotations

import os
import pwd
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from string import Template

from shards.errors import UserError
from slurm import hosts, processes
from slurm.service import Service

MARK = "selfguide devcluster 1"
PARTITION = "main"
CORES, MEMORY_MB = 4, 8000  # what each node claims to have; the nodes share the machine
# Devices of every Linux machine that stand in for GPUs.
GPU_FILES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
LONGEST_FOLDER = 60  # + spool/devnode16/devnode16_1234567.4294967294 must fit a socket's 107 bytes
PORTS = (20000, 32000)  # below the range from which Linux draws the ports of outgoing connections


@dataclass(frozen=True, kw_only=True)
class Record:
    """What cluster.json holds. `daemons` maps a name to [pid, start time in ticks]."""

    nodes: tuple[str, ...]
    gpus: int
    boot: str = ""
    ports: tuple[int, ...] = ()
    daemons: dict[str, tuple[int, int]] = field(default_factory=dict)
    made: tuple[str, ...] = ()  # parent folders that did not exist before
    ready: bool = False


def boot_id() -> str:
    """Start times count from the boot, so a process number means something only within one."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def write_record(state: Path, record: Record) -> None:
    """Replaces the record of the cluster in this folder."""
    CLUSTER.write(state, {"format": MARK, **asdict(record)})


def read_record(state: Path) -> Record | None:
    """The record of the cluster in this folder, or None when it holds none."""
    found = CLUSTER.read(state)
    if found is None:
        return None
    if found.pop("format", None) != MARK:
        raise UserError(f"state={state}: {CLUSTER.record} is of another version; remove the folder")
    daemons = {name: tuple(at) for name, at in found["daemons"].items()}
    lists = {name: tuple(found[name]) for name in ("nodes", "ports", "made")}
    return Record(**{**found, **lists, "daemons": daemons})


def _end(state: Path) -> None:
    # Daemons go at once, or the controller would start a job anew while we end its tasks.
    processes.end(lambda: processes.members(state), asks=lambda process: not process.daemon)
    hosts.remove(state)


def _outside(state: Path) -> bool:
    return hosts.present(state) or bool(processes.members(state))


CLUSTER = Service(
    name="devcluster",
    variable="SELFGUIDE_DEVCLUSTER",
    record="cluster.json",
    end=_end,
    outside=_outside,
)


@contextmanager
def free_ports(count: int) -> Iterator[tuple[int, ...]]:
    """Ports that nobody else takes until the block ends.

    We stay bound to them without listening. Linux lets the daemons, which ask for SO_REUSEADDR,
    listen beside us, and refuses everyone who looks for a free port as we do.
    """
    with ExitStack() as stack:
        ports: list[int] = []
        for port in random.sample(range(*PORTS), 2000):
            if len(ports) == count:
                break
            taken = socket.socket()
            try:
                taken.bind(("", port))
            except OSError:  # in use: try another
                taken.close()
                continue
            stack.enter_context(taken)
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            ports.append(port)
        if len(ports) < count:
            raise OSError(f"no {count} free TCP ports between {PORTS[0]} and {PORTS[1]}")
        yield tuple(ports)


def write_config(state: Path, record: Record) -> None:
    """Fills the templates. The ports are the controller's, the accounting's, then one per node."""
    controller, accounting, *of_nodes = record.ports
    shape = f"CPUs={CORES} Boards=1 SocketsPerBoard=1 CoresPerSocket={CORES} ThreadsPerCore=1"
    gres = f" Gres=gpu:{record.gpus}" if record.gpus else ""
    files = ",".join(GPU_FILES[: record.gpus])
    host, user = socket.gethostname().split(".")[0], pwd.getpwuid(os.geteuid()).pw_name
    values = {
        "state": str(state),
        "user": user,
        "host": host,
        "controller_port": controller,
        "accounting_port": accounting,
        "partition": PARTITION,
        "node_lines": "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {shape} "
            f"RealMemory={MEMORY_MB}{gres} State=UNKNOWN"
            for name, port in zip(record.nodes, of_nodes, strict=True)
        ),
        "gres_line": f"NodeName={','.join(record.nodes)} Name=gpu File={files}" if files else "",
        # MariaDB refuses to run as root unless asked to; for anyone else the line is an error.
        "account": "user=root" if os.geteuid() == 0 else "",
    }
    templates = resources.files("slurm") / "templates"
    for name in ("slurm.conf", "slurmdbd.conf", "gres.conf", "mariadb.cnf"):
        path = state / name
        path.touch(mode=0o600)  # slurmdbd insists on it
        path.write_text(Template((templates / name).read_text()).substitute(values))
