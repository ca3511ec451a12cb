"""What is known of a run at one moment: its files, and what the schedulers answer. Read once; `decide` judges it.

Schedulers are asked before the files are read: what a job wrote before it ended is then in the view. A scheduler that
does not answer leaves its jobs `unknown`, which is never the same as `gone`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from launcher import backends
from launcher.backends import Record
from launcher.folder import Attempt, evaluation_asked, evaluations
from selfguide.spec.config import Config
from selfguide.spec.files import read_config
from selfguide.spec.records import EvaluationRecord, read_record_file, record_files
from selfguide.spec.run import RunFolder
from shards import storage
from shards.errors import UserError

T = TypeVar("T")

# `unknown`: no scheduler answered for the job
JobState = backends.State

# patience of commands that only look, seconds
LOOK_S = 2.0

# what an unreadable file raises
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True, kw_only=True)
class JobView:
    """A job that was submitted."""

    record: Record
    state: JobState
    # of one that is gone, what its scheduler still says or was once heard to say (`Backend.endings`)
    ending: Mapping[str, Any] = field(default_factory=dict)

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
    nodes: int = 0
    full_nodes: int = 0
    # both None where the submission has not come so far, or died
    job: JobView | None = None
    watcher: JobView | None = None
    # the job queued behind this one, which opens the next attempt
    successor: JobView | None = None
    # somebody asked to end the run; and all of its jobs have ended
    cancelled: bool = False
    cancel_asked: float = 0.0
    cancel_done: bool = False
    # a person asked for this attempt; others follow the one before by themselves
    by_hand: bool = False
    # time limit of its job, and when its first rank began
    limit_s: float | None = None
    began: float | None = None
    # images of the checkpoint that it began from, 0 from scratch; None where it did not come to training
    resumed_from: int | None = None
    # ranks that began, and how ranks ended; "unknown" is a rank whose environment was incomplete
    starts: frozenset[str] = frozenset()
    exits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    # the trainer's newest report
    progress: Mapping[str, Any] = field(default_factory=dict)

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
    # how its process ended
    exit: Mapping[str, Any] | None = None

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
    # images of every complete checkpoint, ascending; read with the history
    checkpoints: tuple[int, ...] = ()
    # by name; without the history only those that have no record
    evaluations: tuple[EvaluationView, ...] = ()
    # by images, key and attempt
    records: tuple[EvaluationRecord, ...] = ()
    # when somebody last asked for the scores that are missing, and for those that had failed, too
    evaluation_asked: float = 0.0
    retry_asked: float = 0.0
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


def read(run: RunFolder, *, patience_s: float | None = None) -> RunView:
    """Returns the view of one run with its history: all attempts, checkpoints and evaluation jobs.

    Args:
        patience_s: with schedulers that do not answer; None waits as long as somebody who wants to act.

    Raises:
        UserError: its run.json cannot be read.
    """
    (view,), problems = _read([run], history=True, configs=True, patience_s=patience_s)
    if view is None:
        raise UserError(f"{problems[0]}; restore it, or remove the run's folder")
    return view


def read_many(
    runs: Sequence[RunFolder], *, configs: bool = False
) -> tuple[list[RunView], list[str]]:
    """Returns a view of each run that can be read, without its history, and a sentence for each that cannot.

    However many the runs, every Slurm is asked once and the process table of this machine read once, within `LOOK_S`.

    Args:
        configs: reads the config of every run, not only of the finished ones.
    """
    views, problems = _read(runs, configs=configs, patience_s=LOOK_S)
    return [view for view in views if view is not None], problems


def _read(
    runs: Sequence[RunFolder],
    *,
    history: bool = False,
    configs: bool,
    patience_s: float | None,
) -> tuple[Sequence[RunView | None], list[str]]:
    """A view of each run, None where its run.json cannot be read, and why it cannot."""
    found = [_Reader(run, history, configs) for run in runs]
    jobs = [(reader, path, record) for reader in found for path, record in reader.jobs()]
    states = backends.states([record for _, _, record in jobs], patience_s)
    gone = [each for each, state in zip(jobs, states, strict=True) if state == "gone"]
    for (reader, path, record), state in zip(jobs, states, strict=True):
        reader.known[path] = JobView(record=record, state=state)
    _add_endings(gone, patience_s)
    views: list[RunView | None] = []
    problems = []
    for reader in found:
        try:
            views.append(reader.view())
        except _UNREADABLE as error:
            views.append(None)
            problems.append(_problem(reader.run.run_json, error))
    return views, problems


def _add_endings(gone: Sequence[tuple[_Reader, Path, Record]], patience_s: float | None) -> None:
    """Adds what schedulers said, or still say, of how jobs ended."""
    unknown = []
    for reader, path, record in gone:
        ending = reader.object(ending_path(path))
        if ending is None and reader.asks_how_it_ended(path):
            unknown.append((reader, path, record))
        reader.known[path] = replace(reader.known[path], ending=ending or {})
    endings = backends.endings([record for _, _, record in unknown], patience_s) if unknown else []
    for (reader, path, _), ending in zip(unknown, endings, strict=True):
        reader.known[path] = replace(reader.known[path], ending=ending)


def ending_path(job: Path) -> Path:
    """Returns where the scheduler's word on the end of a job is kept, beside the job's record."""
    return job.with_name(f"ended-{job.name}")


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
        self.watcher = next(
            filter(Path.exists, (Attempt(run.attempt(n)).watcher for n in reversed(numbers))), None
        )
        self.settled = {path.stem for path in record_files(run)}
        root = evaluations(run)
        names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
        self.evaluations = [root / name for name in names if history or name not in self.settled]

    def jobs(self) -> Iterator[tuple[Path, Record]]:
        """Yields the record of every job, with its file."""
        paths = [path for at in self.attempts for path in (at.job, at.successor)]
        paths += [at.watcher for at in self.attempts] if self.history else []
        if self.watcher is not None and self.watcher not in paths:
            paths.append(self.watcher)
        for path in [*paths, *(folder / "job.json" for folder in self.evaluations)]:
            record = self.object(path)
            if record is not None:
                yield path, record

    def asks_how_it_ended(self, job: Path) -> bool:
        """Whether the scheduler's word on the end of a job may matter: its own files do not say it."""
        ended_well = (self.object(job.with_name("exit-0.json")) or {}).get("class") == "ok"
        if job.parent.parent == self.run.attempts:
            newest = job == self.attempts[-1].job
            return newest and not ended_well
        return not ended_well and job.parent.name not in self.settled

    def view(self) -> RunView:
        """The view, once `known` holds the states of the jobs. Raises where run.json cannot be read."""
        about = self.run.describe()
        identity, images = about["identity"], int(about["images"])
        attempts = tuple(self._attempt(at) for at in self.attempts)
        snapshots = self._snapshots()
        asked = self.object(evaluation_asked(self.run)) or {}
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
            watcher=self.known.get(self.watcher) if self.watcher else None,
            attempts=attempts,
            config=self._config() if self.configs or images in snapshots else None,
            snapshots=snapshots,
            checkpoints=tuple(self.run.saved()) if self.history else (),
            evaluations=tuple(self._evaluation(folder) for folder in self.evaluations),
            records=self._records(),
            evaluation_asked=float(asked.get("time", 0.0)),
            retry_asked=float(asked.get("retry", 0.0)),
            problems=tuple(dict.fromkeys(self.problems)),
        )

    def _attempt(self, at: Attempt) -> AttemptView:
        names = {path.name for path in at.root.iterdir()} if at.root.is_dir() else set()

        def there(path: Path) -> dict[str, Any]:
            return (self.object(path) if path.name in names else None) or {}

        submission, cancelled = there(at.submission), there(at.cancelled)
        progress = there(at.root / "progress.json")
        starts = _ranks(names, "start")
        exits = {rank: self.object(at.root / f"exit-{rank}.json") for rank in _ranks(names, "exit")}
        limit_min = submission.get("timeout_min")
        return AttemptView(
            files=at,
            opened=float(submission.get("time") or _changed(at.root)),
            world=int(submission.get("world", 0)),
            nodes=int(submission.get("nodes", 0)),
            full_nodes=int(submission.get("full_nodes") or submission.get("nodes", 0)),
            job=self.known.get(at.job),
            watcher=self.known.get(at.watcher),
            successor=self.known.get(at.successor),
            cancelled=at.cancelled.name in names,
            # a record of before does not say; then all was asked to end and nothing is known to be left
            cancel_asked=float(cancelled.get("time", 0.0)),
            cancel_done=at.cancelled.name in names and bool(cancelled.get("done", True)),
            by_hand=bool(submission.get("by_hand")),
            limit_s=None if limit_min is None else 60.0 * limit_min,
            began=there(at.root / f"start-{starts[0]}.json").get("time") if starts else None,
            resumed_from=progress.get("resumed_from"),
            starts=frozenset(starts),
            exits={rank: record for rank, record in exits.items() if record is not None},
            progress=progress,
        )

    def _evaluation(self, folder: Path) -> EvaluationView:
        key, _, attempt = folder.name.rpartition(".")
        return EvaluationView(
            folder=folder,
            key=key,
            images=int(key.split("-")[1]),
            attempt=int(attempt),
            job=self.known.get(folder / "job.json"),
            exit=self.object(folder / "exit-0.json"),
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

    def object(self, path: Path) -> dict[str, Any] | None:
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
