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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from shards.errors import UserError
from slurm import hosts
from slurm.layout import Record, free_ports, write_config, write_record
from slurm.service import PATIENCE, Programs, Say

PACKAGES = "munge mariadb-server slurm-wlm slurmdbd"
PROGRAMS = (
    *("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd"),
    *("sacctmgr", "scontrol", "sinfo", "sbatch", "srun", "sacct"),
)
SEARCH = f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin"


def missing() -> list[str]:
    """The programs a cluster needs that this machine does not have."""
    return [program for program in PROGRAMS if not shutil.which(program, path=SEARCH)]


def start_all(state: Path, record: Record, say: Say) -> Record:
    """Brings the whole cluster up in an empty folder; the record says what runs.

    Raises StartError. What was started until then stays, and stands in the record on disk.
    """
    for folder in ("controller", "database", "tmp", "log", *(f"spool/{n}" for n in record.nodes)):
        (state / folder).mkdir(parents=True)
    (state / "munge.key").touch(mode=0o600)
    (state / "munge.key").write_bytes(secrets.token_bytes(128))
    with free_ports(2 + len(record.nodes)) as ports:
        controller, accounting, *_ = ports
        crew = _Crew(state, replace(record, ports=ports), say)
        write_config(state, crew.record)
        crew.start("munged", *_munged(state))
        crew.wait("munged answers", lambda: _accepts(state / "munge.socket"))
        crew.make_database()
        crew.start("mariadbd", f"--defaults-file={state}/mariadb.cnf")
        crew.wait("mariadbd answers", lambda: _accepts(state / "mariadb.socket"))
        crew.start("slurmdbd", "-D")
        crew.wait("slurmdbd answers", lambda: _accepts(accounting))
        crew.call(
            "sacctmgr", "-i", "add", "cluster", "devcluster", done="accounting knows the cluster"
        )
        crew.start("slurmctld", "-D", "-f", f"{state}/slurm.conf")
        crew.wait("slurmctld answers", lambda: _accepts(controller))
        for name in record.nodes:
            crew.start("slurmd", "-D", "-N", name, "-f", f"{state}/slurm.conf", called=name)
        crew.publish_names()
        crew.wait("every node is idle", crew.all_idle)
    return crew.record


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


class _Crew:
    """The daemons started so far; each stands in the record on disk as soon as it runs."""

    def __init__(self, state: Path, record: Record, say: Say) -> None:
        self.state, self.record, self.say = state, record, say
        self.began = time.monotonic()
        environment = {
            "PATH": SEARCH,
            "LANG": "C.UTF-8",
            "SLURM_CONF": f"{state}/slurm.conf",
            "MYSQL_UNIX_PORT": f"{state}/mariadb.socket",
        }
        if zone := os.environ.get("TZ"):  # or sacct's times would differ from the user's
            environment["TZ"] = zone
        self.programs = Programs(state=state, environment=environment, changed=self._write)

    def _write(self, daemons: dict[str, tuple[int, int]]) -> None:
        self.record = replace(self.record, daemons=dict(daemons))
        write_record(self.state, self.record)

    def start(self, program: str, *options: str, called: str = "") -> None:
        self.programs.serve(called or program, [program_path(program), *options])

    def wait(self, what: str, holds: Callable[[], bool]) -> None:
        self.programs.wait(what, holds)
        self._done(what)

    def call(self, program: str, *options: str, done: str) -> None:
        self.programs.run(program, [program_path(program), *options])
        self._done(done)

    def make_database(self) -> None:
        self.call(
            "mariadb-install-db",
            f"--defaults-file={self.state}/mariadb.cnf",
            "--skip-test-db",
            "--auth-root-authentication-method=socket",
            f"--auth-root-socket-user={pwd.getpwuid(os.geteuid()).pw_name}",
            done="the accounting database is made",
        )

    def publish_names(self) -> None:
        # Always our own block, even where the names resolve: they may be another cluster's, and
        # go away with it. Slurm's commands also look up the machine itself.
        here = socket.gethostname()
        names = [*self.record.nodes, *([] if resolves(here) else [here])]
        try:
            hosts.add(self.state, names)
        except OSError as error:
            unknown = [name for name in names if not resolves(name)]
            if unknown:
                self.say(
                    f"note: {hosts.HOSTS} cannot be written ({error.strerror}; it takes root), so "
                    f"{', '.join(unknown)} will not resolve. Slurm does not need that, a job may."
                )

    def all_idle(self) -> bool:
        states = node_states(self.state / "slurm.conf", timeout=PATIENCE)
        return states == dict.fromkeys(self.record.nodes, "idle")

    def _done(self, what: str) -> None:
        self.say(f"{time.monotonic() - self.began:6.2f} s  {what}")


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
