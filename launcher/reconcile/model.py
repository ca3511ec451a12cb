"""What is known of a run at one moment, as `view` reads it: the run, its attempts, their jobs, its evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import backends
from launcher.backends import Record, Span
from launcher.folder import Attempt
from selfguide.spec.config import Config
from selfguide.spec.lacks import Lack
from selfguide.spec.records import EvaluationRecord
from selfguide.spec.retention import Deleted
from selfguide.spec.run import RunFolder
from selfguide.spec.score_sweep import ScoreSweep

# `unknown`: no scheduler answered for the job
JobState = backends.State


@dataclass(frozen=True, kw_only=True)
class JobView:
    """A job that was submitted."""

    record: Record
    state: JobState
    # of one that is gone, what its scheduler still says or was once heard to say (`Backend.endings`)
    ending: Mapping[str, Any] = field(default_factory=dict)
    # why one that is queued waits, where somebody only looks (`Backend.waiting`)
    waiting: Mapping[str, Any] = field(default_factory=dict)
    # when it had its nodes, oldest first; only where that was asked for (`launcher.ledger`)
    spans: tuple[Span, ...] = ()

    @property
    def label(self) -> str:
        """Returns cluster and job id, such as "slurm 4711"."""
        return f"{self.record['kind']} {self.record['id']}"

    @property
    def works(self) -> bool:
        """Whether it waits or runs, as far as is known."""
        return self.state in ("queued", "running")


@dataclass(frozen=True, kw_only=True)
class AttemptView:
    """One attempt: what was asked for, its jobs, and what its ranks left."""

    files: Attempt
    # seconds since 1970
    opened: float
    # ranks asked for; 0 before that was written
    world: int = 0
    # nodes of its job, and how many the run asks for where more are to be had; 0 before that was written
    node_count: int = 0
    full_node_count: int = 0
    # both None where the submission has not come so far, or died
    job: JobView | None = None
    watcher: JobView | None = None
    # those that it has followed, by their numbers; read with the history
    former_watchers: Mapping[str, JobView] = field(default_factory=dict)
    # the job queued behind this one, which opens the next attempt
    successor: JobView | None = None
    # somebody asked to end the run; and all of its jobs have ended
    cancelled: bool = False
    cancel_asked: float = 0.0
    cancel_done: bool = False
    cancel_by: str = ""
    # a person asked for this attempt; others follow the one before by themselves
    by_hand: bool = False
    # nodes that its job had to do without, and why
    excluded: Mapping[str, str] = field(default_factory=dict)
    # time limit of its job, and when its first rank began
    limit_s: float | None = None
    began: float | None = None
    # images of the checkpoint that it began from, 0 from scratch; None where it did not come to training
    resumed_from: int | None = None
    # ranks that began, and how ranks ended; "unknown" is a rank whose environment was incomplete
    starts: frozenset[str] = frozenset()
    # of each rank that began, its node's name; read with the history
    nodes: Mapping[str, str] = field(default_factory=dict)
    exits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # what ranks wrote when they began, and what they last said of themselves; without the history that of rank 0 alone
    begins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    heartbeats: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # the trainer's newest report
    progress: Mapping[str, Any] = field(default_factory=dict)
    # GPU-seconds of all attempts before this one, as far as files of the run tell; None where nobody wrote it down
    spent_s: float | None = None

    @property
    def number(self) -> int:
        return self.files.number

    @property
    def ending(self) -> Mapping[str, Any]:
        """How its job ended, as the scheduler says; empty where it does not."""
        return self.job.ending if self.job else {}


@dataclass(frozen=True, kw_only=True)
class EvaluationView:
    """One evaluation job of one snapshot."""

    folder: Path
    key: str
    images: int
    attempt: int
    # None while it is being submitted, or where that died
    job: JobView | None = None
    # how its process began and ended
    begin: Mapping[str, Any] | None = None
    exit: Mapping[str, Any] | None = None
    # of one that its time limit ended: whether a block of samples was finished since it began
    advanced: bool = False
    # when somebody began to submit it, in seconds since 1970; only where it has no job
    claimed: float = 0.0

    @property
    def name(self) -> str:
        """Returns the name that its folder and its record share."""
        return f"{self.key}.{self.attempt}"

    @property
    def submitted(self) -> float:
        """Returns when its job was submitted, in seconds since 1970; 0 where that never came about."""
        return float(self.job.record.get("submitted", 0.0)) if self.job else 0.0


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run at the moment `time` (seconds since 1970)."""

    folder: RunFolder
    time: float
    id: str
    experiment: str
    name: str | None
    hash: str
    identity: Mapping[str, Any]
    # to train on: the current target, extensions included
    images: int
    created: float
    # number of attempts, which may be more than `attempts` holds
    tries: int = 0
    # the newest watcher's job, whichever attempt started it
    watcher: JobView | None = None
    # oldest first; the newest only, unless the view was read with its history
    attempts: tuple[AttemptView, ...] = ()
    # of the newest attempt; None before it is written, where another version wrote it (as `problems` then says), and
    # in a list of runs where the run has not finished
    config: Config | None = None
    # manifest of every complete snapshot by its images, ascending
    snapshots: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    # what retention has deleted of them, by its images, ascending
    deleted: Mapping[int, Deleted] = field(default_factory=dict)
    # images of snapshots that are pinned against it, and of those that somebody chose among the run's
    pinned: frozenset[int] = frozenset()
    selected: frozenset[int] = frozenset()
    # images of every complete checkpoint, ascending; read with the history
    checkpoints: tuple[int, ...] = ()
    # when the checkpoints and snapshots that are there were published, in seconds since 1970; read as evidence
    saved_at: Mapping[int, float] = field(default_factory=dict)
    published_at: Mapping[int, float] = field(default_factory=dict)
    # by name; without the history only those that have no record
    evaluations: tuple[EvaluationView, ...] = ()
    # by images, key and attempt
    records: tuple[EvaluationRecord, ...] = ()
    # names of files among them that cannot be read
    damaged: tuple[str, ...] = ()
    # how its snapshots are to be scored beside the config's protocol
    sweeps: tuple[ScoreSweep, ...] = ()
    # when somebody last asked for the scores that are missing, and for those that had failed, too
    evaluation_asked: float = 0.0
    retry_asked: float = 0.0
    # files that the evaluations of its config wait for
    lacks: tuple[Lack, ...] = ()
    # and those that points of its sweeps wait for
    sweep_lacks: tuple[Lack, ...] = ()
    # a sentence for each file that could not be read
    problems: tuple[str, ...] = ()

    @property
    def newest(self) -> AttemptView | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def published(self) -> tuple[int, ...]:
        """Images of every complete snapshot, ascending."""
        return tuple(self.snapshots)

    @property
    def finished(self) -> bool:
        """Whether the final snapshot is published."""
        return self.images in self.snapshots
