"""The former names of `launcher.backends`, until submit, status, watch, follow, cancel and logs use it."""

from __future__ import annotations

from launcher import backends
from launcher.backends import Job, Record, State, cancel, cancel_all, state, states, strays
from launcher.backends.slurm import answers
from selfguide.spec.config import ClusterConfig

__all__ = [
    "Job",
    "Record",
    "State",
    "answers",
    "cancel",
    "cancel_all",
    "check",
    "state",
    "states",
    "strays",
    "submit",
]

stray = strays


def check(job: Job, cluster: ClusterConfig) -> None:
    backends.of(cluster).check(job)


def submit(job: Job, cluster: ClusterConfig) -> Record:
    return backends.of(cluster).submit(job)
