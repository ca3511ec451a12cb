"""What every place that runs jobs can do, and the job that it is given."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

State = Literal["queued", "running", "gone", "unknown"]

# A submitted job as JSON in the run folder: all that later commands need, from any process. Every backend writes `id`,
# `kind` (its name), `name`, `folder` (of the logs), `comment`, `nodes`, `tasks`, `gpus` (of all nodes; records of
# before have none) and `submitted`.
Record = dict[str, Any]

# What a scheduler says of a job that is gone, as JSON; empty where it says nothing. `state` is Slurm's word (NODE_FAIL,
# TIMEOUT, PREEMPTED, CANCELLED, OUT_OF_MEMORY, FAILED, COMPLETED), `by` who cancelled it, `ended` when in seconds since
# 1970, `limit_s` its time limit. Of the job's log, `signals` that killed ranks, `codes` that others exited with and
# their `nodes`, by rank; `first` is the rank that failed first, `lost_nodes` are those that srun lost, `log_state` is
# as `state`, and `said` are Slurm's own lines.
Ending = dict[str, Any]

# What a scheduler says of a job that waits, as JSON; empty where it says nothing. `reason` is Slurm's word (Priority,
# Resources, QOSMaxJobsPerUserLimit, ...), `start` when it expects to start it, in seconds since 1970.
Waiting = dict[str, Any]


@dataclass(frozen=True)
class Span:
    """One allocation of a job, in seconds since 1970; a job that was requeued has had several."""

    start: float
    # None while it lasts, or where nobody knows
    end: float | None
    # that it could have run and waited for its turn
    queued_s: float | None = None


# an outer job's variables, wrong for an inner one, and defaults of Slurm's commands that change what they answer:
# SQUEUE_STATES hides jobs, and SCANCEL_INTERACTIVE waits for a yes
_LEAKS = re.compile(r"SLURM|S(ALLOC|BATCH|RUN|QUEUE|CANCEL|ACCT|INFO|CONTROL)_|PMI|SUBMITIT_")
_STEERING = re.compile(r"S(LURM|ALLOC|BATCH|RUN|QUEUE|CANCEL|ACCT|INFO|CONTROL)_")
_RANKS = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "GROUP_RANK",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One function of `launcher.attempt` with one string as its argument, and the resources it needs."""

    function: Callable[[str], None]
    argument: str
    # of Submitit's files and the ranks' logs
    folder: Path
    # the code copy it runs from
    code: Path
    name: str
    # the run folder: finds a run's jobs without any record
    comment: str
    nodes: int = 1
    # ranks per node
    tasks: int = 1
    # per node, requested from Slurm
    gpus: int = 0
    # GPUs of this machine, local only
    devices: tuple[str, ...] = ()
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    # Slurm: of a CPU or two, so on the site's partition for evaluations where it has one
    small: bool = False
    # Slurm: no other job on its nodes
    exclusive: bool = False
    timeout_min: int
    # seconds before its time limit at which Slurm warns its ranks by SIGUSR2
    warn_s: int = 90
    # Slurm only: may start the same job once more, by itself after a preemption or a lost node, and where Python with
    # these words, which follows the ranks, asks for it
    requeue: tuple[str, ...] = ()
    # CPU threads of each local task
    threads: int = 1
    # scheduling priority, local only
    nice: int = 0
    # Slurm starts it when no earlier job of its name is left
    singleton: bool = False
    # Slurm job that must have begun before this one
    after: str | None = None
    # Slurm only: nodes that it must not run on, beside those of its site
    exclude: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    # local only: one detached process that runs this command and writes to `folder`.log, in place of Submitit's ranks
    command: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of a cluster, as its scheduler sees it."""

    name: str
    # the scheduler's own word: idle, mix, alloc, drain, down*
    state: str
    # why it is out of service, where somebody said so
    reason: str = ""
    # gives jobs nodes now or when others have ended
    in_service: bool = True
    # answers its scheduler
    reachable: bool = True


class Backend(Protocol):
    """A place that runs jobs. No answer means `unknown`, never `gone`: a job thought dead gets a successor."""

    @property
    def poll_s(self) -> float:
        """Seconds between two looks at a job, short where a look costs nothing."""

    @property
    def queues(self) -> bool:
        """Whether a job may wait here for the end of another, and go on with its run."""

    def script(self, job: Job) -> str | None:
        """Returns the batch script of `job`, without asking any scheduler; None where there is no scheduler."""

    def check(self, job: Job) -> list[str]:
        """Asks whether this job would be accepted; queues nothing.

        Returns:
            Why it would wait longer than for its turn, as sentences: nodes that are drained, say.

        Raises:
            UserError: it would not, or nobody answers.
        """

    def free_nodes(self, job: Job) -> int:
        """Returns on how many nodes there is room for such a job now, of those that it does not exclude.

        None of them where nobody answers. Who else waits for them is not looked at.
        """

    def submit(self, job: Job) -> Record:
        """Starts or queues `job`.

        Raises:
            UserError: it was refused.
        """

    def submit_array(self, jobs: Sequence[Job]) -> list[Record]:
        """Starts or queues jobs that differ only in argument and devices, and that need not run at the same time.

        A job that fails leaves the others alone. Where the submission breaks off, the jobs that exist already are
        ended; a Slurm that does not answer may still have some.

        Raises:
            UserError: they were refused; no job exists.
        """

    def states(self, records: Sequence[Record], patience_s: float | None = None) -> list[State]:
        """Returns the state of each job, with one question however many they are, answered within `patience_s`."""

    def endings(
        self, records: Sequence[Record], patience_s: float | None = None, *, deep: bool = False
    ) -> list[Ending]:
        """Returns how each of these jobs, which are gone, ended; an empty one where nobody knows any more.

        Args:
            deep: asks the accounting, too, about what the scheduler has forgotten.
        """

    def waiting(self, records: Sequence[Record], patience_s: float | None = None) -> list[Waiting]:
        """Returns why each of these jobs, which are queued, waits; an empty answer where nobody says so."""

    def spans(
        self, records: Sequence[Record], patience_s: float | None = None
    ) -> list[tuple[Span, ...]]:
        """Returns when each of these jobs had its nodes, oldest first; an empty one where nobody knows."""

    def cancel(self, records: Sequence[Record]) -> int:
        """Ends jobs and returns once they are gone; returns how many existed. Safe to call again.

        Raises:
            UserError: a job cannot be reached from here.
        """

    def warn(self, record: Record) -> None:
        """Asks the ranks of a job to save and end, by SIGUSR2, as its time limit would.

        Raises:
            UserError: it cannot be reached from here.
        """

    def strays(self, comment: str) -> list[Record]:
        """Returns the scheduler's jobs with this comment; a submitter may have died before it kept their records."""

    def nodes(self, patience_s: float | None = None) -> list[Node]:
        """Returns the nodes that jobs may run on, of all partitions without a config; none where nobody answers."""

    def notes(self, ranks: int) -> list[str]:
        """Returns what a user should know of how so many ranks on a node will run, as sentences."""

    def cancel_command(self, records: Sequence[Record]) -> str | None:
        """Returns the scheduler's own command that ends these jobs; None where there is no scheduler."""


def settled(ending: Mapping[str, Any]) -> bool:
    """Returns whether a scheduler has said the last word on a job; while it completes, it has not."""
    return ending.get("state") not in (None, "COMPLETING")


def new_record(kind: str, job: Job) -> Record:
    """Returns the part of a job's record that is the same for every backend."""
    record: Record = {"name": job.name, "kind": kind, "folder": str(job.folder)}
    record |= {"comment": job.comment, "nodes": job.nodes, "tasks": job.tasks}
    record["gpus"] = len(job.devices) if kind == "local" else job.nodes * job.gpus
    return record | {"submitted": time.time()}


def ignored(environment: Mapping[str, str]) -> list[str]:
    """Returns the variables by which a user meant to steer Slurm's commands, and which ours do without.

    Inside a job Slurm itself sets those that begin with SLURM_, and they say nothing about what the user wants.
    """
    inside = "SLURM_JOB_ID" in environment
    return sorted(
        name
        for name in environment
        if _STEERING.match(name)
        and name != "SLURM_CONF"
        and not (inside and name.startswith(("SLURM_", "SRUN_")))
    )


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables without those of an outer Slurm or Submitit job; SLURM_CONF, which names a Slurm, stays."""
    kept = {k: v for k, v in environment.items() if not _LEAKS.match(k) and k not in _RANKS}
    if "SLURM_CONF" in environment:
        kept["SLURM_CONF"] = environment["SLURM_CONF"]
    return kept
