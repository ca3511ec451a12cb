"""The cluster's config files: what each node claims to have, and which port is whose."""

from __future__ import annotations

import os
import pwd
import socket
from collections.abc import Sequence

from slurm.service import Service

PARTITION = "main"
CORES, MEMORY_MB = 4, 8000  # what each node claims to have; the nodes share the machine
# Devices of every Linux machine that stand in for GPUs.
GPU_FILES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
LONGEST_FOLDER = 60  # + spool/devnode16/devnode16_1234567.4294967294 must fit a socket's 107 bytes


def write_config(folder: Service, names: Sequence[str], gpus: int, ports: Sequence[int]) -> None:
    """Fills the templates. The ports are the controller's, the accounting's, then one per node."""
    controller, accounting, *of_nodes = ports
    shape = f"CPUs={CORES} Boards=1 SocketsPerBoard=1 CoresPerSocket={CORES} ThreadsPerCore=1"
    gres = f" Gres=gpu:{gpus}" if gpus else ""
    files = ",".join(GPU_FILES[:gpus])
    host, user = socket.gethostname().split(".")[0], pwd.getpwuid(os.geteuid()).pw_name
    values = {
        "state": folder.state,
        "user": user,
        "host": host,
        "controller_port": controller,
        "accounting_port": accounting,
        "partition": PARTITION,
        "node_lines": "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {shape} "
            f"RealMemory={MEMORY_MB}{gres} State=UNKNOWN"
            for name, port in zip(names, of_nodes, strict=True)
        ),
        "gres_line": f"NodeName={','.join(names)} Name=gpu File={files}" if files else "",
        # MariaDB refuses to run as root unless told to; for anyone else the line is an error.
        "account": "user=root" if os.geteuid() == 0 else "",
    }
    for name in ("slurm.conf", "slurmdbd.conf", "gres.conf", "mariadb.cnf"):
        folder.fill(name, **values)
