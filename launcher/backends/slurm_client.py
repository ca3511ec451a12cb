"""How commands of a Slurm are reached: which Slurm is meant, what it needs in its environment, and its answers."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from launcher.backends.protocol import clean
from shards.errors import UserError

# a controller that needs longer is not the one to wait for
PING_S = 2.0
# patience with sbatch, squeue and scancel
ANSWER_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One Slurm that submissions can mean."""

    # how a submission reaches its controller: variables beside this shell's; UserError where there is none
    variables: Callable[[], Mapping[str, str]]
    # between two looks at a job; a site's controller serves many users
    poll_s: float
    # taken down with its configuration file and all its jobs
    temporary: bool = False


def _devcluster() -> Mapping[str, str]:
    from slurm import devcluster

    found = devcluster.find()
    if found is None:
        raise UserError(
            "cluster=devcluster: no development cluster is up; start it with `make cluster-up`"
        )
    return found.environment()


PROFILES = {
    "slurm": Profile(variables=dict, poll_s=5.0),
    "devcluster": Profile(variables=_devcluster, poll_s=1.0, temporary=True),
}


def answers() -> bool:
    """Returns whether a Slurm controller answers from here within 2 s."""
    if shutil.which("scontrol") is None:
        return False
    try:
        done = subprocess.run(
            ["scontrol", "ping"],
            env=clean(os.environ),
            capture_output=True,
            text=True,
            timeout=PING_S,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and " UP" in done.stdout


def run(
    command: list[str],
    environment: Mapping[str, str],
    stdin: str | None = None,
    patience_s: float | None = None,
) -> subprocess.CompletedProcess[str] | None:
    """Returns what a command of Slurm says; None when it does not answer in time, or there is no such command here."""
    try:
        return subprocess.run(
            command,
            env=dict(environment),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=ANSWER_S if patience_s is None else patience_s,
        )
    except (subprocess.TimeoutExpired, FileNotFoundError):
        return None


@contextlib.contextmanager
def environment_of_process(environment: Mapping[str, str]) -> Iterator[None]:
    """Submitit hands sbatch its own process's environment, so that is what changes."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
