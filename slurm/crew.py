"""Starting the daemons one after the other, each when the one it needs answers.

munged -> database -> mariadbd -> slurmdbd -> account -> slurmctld -> slurmd -> names
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from shards.errors import UserError
from slurm import hosts
from slurm.layout import write_config
from slurm.service import PATIENCE, Record, Say, Service, free_ports

PACKAGES = "munge mariadb-server slurm-wlm slurmdbd"
PROGRAMS = (
    *("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd"),
    *("sacctmgr", "scontrol", "sinfo", "sbatch", "srun", "sacct"),
)
SEARCH = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"


def missing() -> list[str]:
    """The programs a cluster needs that this machine does not have."""
    return [program for program in PROGRAMS if not shutil.which(program, path=SEARCH)]


def start_all(folder: Service, record: Record, say: Say) -> None:
    """Brings the whole cluster up in an empty folder; the record says what runs.

    Raises StartError. What was started until then stays, and stands in the record on disk.
    """
    state, nodes, began = folder.state, record.facts["nodes"], time.monotonic()

    def done(what: str) -> None:
        say(f"{time.monotonic() - began:6.2f} s  {what}")

    def serve(program: str, *options: str, name: str = "") -> None:
        folder.serve(record, name or program, [program_path(program), *options])

    def run(program: str, *options: str, so_that: str) -> None:
        folder.run(program, [program_path(program), *options])
        done(so_that)

    def wait(what: str, holds: Callable[[], bool]) -> None:
        folder.wait(record, what, holds)
        done(what)

    for name in ("controller", "database", "tmp", "log", *(f"spool/{node}" for node in nodes)):
        (state / name).mkdir(parents=True)
    (state / "munge.key").touch(mode=0o600)
    (state / "munge.key").write_bytes(secrets.token_bytes(128))
    with free_ports(2 + len(nodes)) as ports:
        controller, accounting, *_ = ports
        write_config(folder, nodes, record.facts["gpus"], ports)
        serve("munged", *_munged(state))
        wait("munged answers", lambda: _accepts(state / "munge.socket"))
        run(
            "mariadb-install-db",
            f"--defaults-file={state}/mariadb.cnf",
            "--skip-test-db",
            "--auth-root-authentication-method=socket",
            f"--auth-root-socket-user={pwd.getpwuid(os.geteuid()).pw_name}",
            so_that="the accounting database is made",
        )
        serve("mariadbd", f"--defaults-file={state}/mariadb.cnf")
        wait("mariadbd answers", lambda: _accepts(state / "mariadb.socket"))
        serve("slurmdbd", "-D")
        wait("slurmdbd answers", lambda: _accepts(accounting))
        cluster = ("-i", "add", "cluster", "devcluster")
        run("sacctmgr", *cluster, so_that="accounting knows the cluster")
        serve("slurmctld", "-D", "-f", f"{state}/slurm.conf")
        wait("slurmctld answers", lambda: _accepts(controller))
        for name in nodes:
            serve("slurmd", "-D", "-N", name, "-f", f"{state}/slurm.conf", name=name)
        _names(folder, nodes, say)
        idle = dict.fromkeys(nodes, "idle")
        wait(
            "every node is idle",
            lambda: node_states(state / "slurm.conf", timeout=PATIENCE) == idle,
        )


def environment(state: Path) -> dict[str, str]:
    """Returns the variables of every daemon of the cluster."""
    variables = {
        "PATH": SEARCH,
        "LANG": "C.UTF-8",
        "SLURM_CONF": f"{state}/slurm.conf",
        "MYSQL_UNIX_PORT": f"{state}/mariadb.socket",
    }
    if zone := os.environ.get("TZ"):  # or sacct's times would differ from the user's
        variables["TZ"] = zone
    return variables


def node_states(conf: Path, *, timeout: float) -> dict[str, str]:
    """Slurm's word for the state of every node; empty when the controller does not answer."""
    command = [program_path("sinfo"), "--noheader", "--Node", "--format=%N %T"]
    try:
        answer = subprocess.run(
            command,
            env={"PATH": SEARCH, "SLURM_CONF": str(conf)},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return {}
    if answer.returncode:
        return {}
    return dict(line.split() for line in answer.stdout.splitlines())


def resolves(name: str) -> bool:
    """Whether this machine's resolver knows the name."""
    try:
        socket.getaddrinfo(name, None)
    except socket.gaierror:
        return False
    return True


def program_path(name: str) -> str:
    """The full path of a program; daemons lie in folders that a user's PATH may leave out."""
    path = shutil.which(name, path=SEARCH)
    if path is None:
        raise UserError(f"{name} is not installed: as root, apt-get install {PACKAGES}")
    return path


def _names(folder: Service, nodes: Sequence[str], say: Say) -> None:
    # Always our own block, even where the names resolve: they may be another cluster's, and
    # go away with it. Slurm's commands also look up the machine itself.
    here = socket.gethostname()
    names = [*nodes, *([] if resolves(here) else [here])]
    try:
        hosts.add(folder.state, names)
    except OSError as error:
        unknown = [name for name in names if not resolves(name)]
        if unknown:
            say(
                f"note: {hosts.HOSTS} cannot be written ({error.strerror}; it takes root), so "
                f"{', '.join(unknown)} will not resolve. Slurm does not need that, a job may."
            )


def _munged(state: Path) -> list[str]:
    # --force: munge wants the folder of its socket open to all users, ours is the owner's alone.
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
    options = [f"--{option}={state}/munge.{ending}" for option, ending in files.items()]
    return ["--foreground", "--force", "--num-threads=10", *options]


def _accepts(where: int | Path) -> bool:
    """Whether somebody accepts connections at this loopback port or socket file."""
    family = socket.AF_INET if isinstance(where, int) else socket.AF_UNIX
    with socket.socket(family) as probe:
        address = ("127.0.0.1", where) if isinstance(where, int) else str(where)
        return probe.connect_ex(address) == 0
