"""What is known of a run at one moment: its files, and what the schedulers answer. Read once; `decide` judges it.

Schedulers are asked before the files are read: what a job wrote before it ended is then in the view. A scheduler that
does not answer leaves its jobs `unknown`, which is never the same as `gone`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from launcher import backends
from launcher.backends import Record
from launcher.folder import Attempt, evaluations
from selfguide.spec.config import Config
from selfguide.spec.files import read_config
from selfguide.spec.records import EvaluationRecord, read_record_file, record_files
from selfguide.spec.run import RunFolder
from shards import storage
from shards.errors import UserError

T = TypeVar("T")

# `unasked`: no scheduler was asked, and the files decide
JobState = Literal["queued", "running", "gone", "unknown", "unasked"]

# what an unreadable file raises
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True, kw_only=True)
class JobView:
    """A job that was submitted."""

    record: Record
    state: JobState

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
    # both None where the submission has not come so far, or died
    job: JobView | None = None
    watcher: JobView | None = None
    # the job queued behind this one, which opens the next attempt
    successor: JobView | None = None
    # somebody asked to end the run
    cancelled: bool = False
    # ranks that began, and how ranks ended; "unknown" is a rank whose environment was incomplete
    starts: frozenset[str] = frozenset()
    exits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # the trainer's newest report
    progress: Mapping[str, Any] = field(default_factory=dict)

    @property
    def number(self) -> int:
        return self.files.number


@dataclass(frozen=True, kw_only=True)
class EvaluationView:
    """One evaluation job of one snapshot."""

    folder: Path
    key: str
    images: int
    attempt: int
    # None while it is being submitted, or where that died
    job: JobView | None = None
    # how its process ended
    exit: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """Returns the name that its folder and its record share."""
        return f"{self.key}.{self.attempt}"


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
    # oldest first; the newest only, unless the view was read with its history
    attempts: tuple[AttemptView, ...] = ()
    # of the newest attempt; None before it is written, where another version wrote it (as `problems` then says), and
    # in a list of runs where the run has not finished
    config: Config | None = None
    # manifest of every complete snapshot by its images, ascending
    snapshots: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    # images of every complete checkpoint, ascending; read with the history
    checkpoints: tuple[int, ...] = ()
    # by name; without the history only those that have no record
    evaluations: tuple[EvaluationView, ...] = ()
    # by images, key and attempt
    records: tuple[EvaluationRecord, ...] = ()
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


def read(run: RunFolder, *, ask: bool = True) -> RunView:
    """Returns the view of one run with its history: all attempts, checkpoints and evaluation jobs.

    Raises:
        UserError: its run.json cannot be read.
    """
    (view,), problems = _read([run], ask, history=True, configs=True)
    if view is None:
        raise UserError(f"{problems[0]}; restore it, or remove the run's folder")
    return view


def read_many(
    runs: Sequence[RunFolder],
    *,
    ask: bool = True,
    configs: bool = False,
    unknown_is_unasked: bool = False,
) -> tuple[list[RunView], list[str]]:
    """Returns a view of each run that can be read, without its history, and a sentence for each that cannot.

    However many the runs, every Slurm is asked once and the process table of this machine read once.

    Args:
        configs: reads the config of every run, not only of the finished ones.
        unknown_is_unasked: where no scheduler answers the files decide, as if none had been asked.
    """
    views, problems = _read(runs, ask, configs=configs, unknown_is_unasked=unknown_is_unasked)
    return [view for view in views if view is not None], problems


def _read(
    runs: Sequence[RunFolder],
    ask: bool,
    *,
    history: bool = False,
    configs: bool,
    unknown_is_unasked: bool = False,
) -> tuple[Sequence[RunView | None], list[str]]:
    """A view of each run, None where its run.json cannot be read, and why it cannot."""
    found = [_Reader(run, history, configs) for run in runs]
    jobs = [(reader, path, record) for reader in found for path, record in reader.jobs()]
    states: Sequence[JobState] = ["unasked"] * len(jobs)
    if ask:
        states = backends.states([record for _, _, record in jobs])
    for (reader, path, record), state in zip(jobs, states, strict=True):
        if state == "unknown" and unknown_is_unasked:
            state = "unasked"
        reader.known[path] = JobView(record=record, state=state)
    views: list[RunView | None] = []
    problems = []
    for reader in found:
        try:
            views.append(reader.view())
        except _UNREADABLE as error:
            views.append(None)
            problems.append(_problem(reader.run.run_json, error))
    return views, problems


def _problem(path: Path, error: Exception) -> str:
    reason = f"no {error}" if isinstance(error, KeyError) else str(error)
    return f"{path} was left out: {reason}"


class _Reader:
    """Reads one run in two steps: the records of its jobs, then everything else."""

    def __init__(self, run: RunFolder, history: bool, configs: bool) -> None:
        self.run, self.history, self.configs = run, history, configs
        self.problems: list[str] = []
        # jobs by the file of their record
        self.known: dict[Path, JobView] = {}
        numbers = run.attempt_numbers()
        self.tries = len(numbers)
        self.attempts = [
            Attempt(run.attempt(number)) for number in (numbers if history else numbers[-1:])
        ]
        settled = {path.stem for path in record_files(run)} if not history else set()
        root = evaluations(run)
        names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
        self.evaluations = [root / name for name in names if name not in settled]

    def jobs(self) -> Iterator[tuple[Path, Record]]:
        """Yields the record of every job, with its file."""
        paths = [path for at in self.attempts for path in (at.job, at.successor, at.watcher)]
        for path in [*paths, *(folder / "job.json" for folder in self.evaluations)]:
            record = self._mapping(path)
            if record is not None:
                yield path, record

    def view(self) -> RunView:
        """The view, once `known` holds the states of the jobs. Raises where run.json cannot be read."""
        about = self.run.describe()
        identity, images = about["identity"], int(about["images"])
        attempts = tuple(self._attempt(at) for at in self.attempts)
        snapshots = self._snapshots()
        return RunView(
            folder=self.run,
            time=time.time(),
            id=str(about["id"]),
            experiment=str(about["experiment"]),
            name=about.get("name"),
            hash=str(about.get("hash", "")),
            identity=identity,
            images=images,
            created=float(about["created"]),
            tries=self.tries,
            attempts=attempts,
            config=self._config() if self.configs or images in snapshots else None,
            snapshots=snapshots,
            checkpoints=tuple(self.run.saved()) if self.history else (),
            evaluations=tuple(self._evaluation(folder) for folder in self.evaluations),
            records=self._records(),
            problems=tuple(self.problems),
        )

    def _attempt(self, at: Attempt) -> AttemptView:
        names = {path.name for path in at.root.iterdir()} if at.root.is_dir() else set()
        submission = self._mapping(at.submission) if at.submission.name in names else None
        progress = self._mapping(at.root / "progress.json") if "progress.json" in names else None
        exits = {
            rank: self._mapping(at.root / f"exit-{rank}.json") for rank in _ranks(names, "exit")
        }
        return AttemptView(
            files=at,
            opened=float((submission or {}).get("time") or _changed(at.root)),
            world=int((submission or {}).get("world", 0)),
            job=self.known.get(at.job),
            watcher=self.known.get(at.watcher),
            successor=self.known.get(at.successor),
            cancelled=at.cancelled.name in names,
            starts=frozenset(_ranks(names, "start")),
            exits={rank: record for rank, record in exits.items() if record is not None},
            progress=progress or {},
        )

    def _evaluation(self, folder: Path) -> EvaluationView:
        key, _, attempt = folder.name.rpartition(".")
        return EvaluationView(
            folder=folder,
            key=key,
            images=int(key.split("-")[1]),
            attempt=int(attempt),
            job=self.known.get(folder / "job.json"),
            exit=self._mapping(folder / "exit-0.json"),
        )

    def _snapshots(self) -> dict[int, Mapping[str, Any]]:
        found = {
            images: storage.read_complete(self.run.snapshot(images), verify="sizes")
            for images in self.run.snapshot_folders()
        }
        return {images: manifest for images, manifest in found.items() if manifest is not None}

    def _records(self) -> tuple[EvaluationRecord, ...]:
        found = [self._try(path, read_record_file) for path in record_files(self.run)]
        known = [record for record in found if record is not None]
        return tuple(sorted(known, key=lambda r: (r.images, r.key, r.attempt)))

    def _config(self) -> Config | None:
        if not self.attempts or not self.attempts[-1].config.exists():
            return None
        return self._try(self.attempts[-1].config, read_config)

    def _mapping(self, path: Path) -> dict[str, Any] | None:
        """The JSON object that `path` holds; None where there is no such file, or none that can be read."""
        return self._try(path, _object)

    def _try(self, path: Path, parse: Callable[[Path], T]) -> T | None:
        try:
            return parse(path)
        except FileNotFoundError:
            return None
        except (*_UNREADABLE, UserError) as error:
            self.problems.append(_problem(path, error))
            return None


def _object(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} instead of an object")
    return found


def _ranks(names: set[str], kind: str) -> list[str]:
    """Ranks whose `<kind>-<rank>.json` is among the names of files."""
    return sorted(
        name[len(kind) + 1 : -5]
        for name in names
        if name.startswith(f"{kind}-") and name.endswith(".json")
    )


def _changed(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # a submission that was refused has removed it
        return 0.0
