"""What is known of a run at one moment: its files, and what the schedulers answer. Read once; `decide` judges it.

Schedulers are asked before the files are read: what a job wrote before it ended is then in the view. A scheduler that
does not answer leaves its jobs `unknown`, which is never the same as `gone`.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from launcher import backends
from launcher.backends import Record, Span, settled
from launcher.folder import Attempt, evaluation_asked, evaluations
from launcher.reconcile import cache
from launcher.reconcile.cache import Cache
from selfguide.spec.config import Config
from selfguide.spec.files import read_config
from selfguide.spec.lacks import Lack, lacks
from selfguide.spec.records import EvaluationRecord, read_record_file
from selfguide.spec.run import RunFolder, image_folder, names_in
from shards import storage
from shards.errors import DamagedError, UserError

T = TypeVar("T")

# `unknown`: no scheduler answered for the job
JobState = backends.State

# patience of commands that only look, seconds
LOOK_S = 2.0

# files that nobody asks for in a list of runs
_LONG = ("request.json", "code.json")

# what an unreadable file raises
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


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
    # when the checkpoints and snapshots that are there were published, in seconds since 1970; read as evidence
    saved_at: Mapping[int, float] = field(default_factory=dict)
    published_at: Mapping[int, float] = field(default_factory=dict)
    # by name; without the history only those that have no record
    evaluations: tuple[EvaluationView, ...] = ()
    # by images, key and attempt
    records: tuple[EvaluationRecord, ...] = ()
    # when somebody last asked for the scores that are missing, and for those that had failed, too
    evaluation_asked: float = 0.0
    retry_asked: float = 0.0
    # files that the evaluations of its config wait for
    lacks: tuple[Lack, ...] = ()
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


def read(run: RunFolder, *, patience_s: float | None = None, evidence: bool = False) -> RunView:
    """Returns the view of one run with its history: all attempts, checkpoints and evaluation jobs.

    Args:
        patience_s: with schedulers that do not answer; None waits as long as somebody who wants to act.
        evidence: asks how the job of every attempt ended, not only of the newest, and reads when checkpoints and
            snapshots were published: what `launcher.why` tells.

    Raises:
        UserError: its run.json cannot be read.
    """
    (view,), problems = _read(
        [run], None, history=True, configs=True, patience_s=patience_s, evidence=evidence
    )
    if view is None:
        raise UserError(f"{problems[0]}; restore it, or remove the run's folder")
    return view


def read_many(
    runs: Sequence[RunFolder],
    *,
    configs: bool | None = None,
    history: bool = False,
    patience_s: float | None = LOOK_S,
) -> tuple[list[RunView], list[str]]:
    """Returns a view of each run that can be read, and a sentence for each that cannot.

    However many the runs, every Slurm is asked once and the process table of this machine read once.
    Files that are written once are parsed once (`cache`), and p(k) is left out of the manifests of snapshots.

    Args:
        configs: reads the config of every run, or of none; None of the finished ones.
        history: reads all attempts and evaluation jobs, not only what the state of a run needs.
        patience_s: with schedulers that do not answer, as of `read`.
    """
    if not runs:
        return [], []
    what = f"{'history' if history else 'list'}{'-configs' if configs else ''}"
    with cache.of_runs(runs[0].root.parent.parent, what) as kept:
        views, problems = _read(runs, kept, history=history, configs=configs, patience_s=patience_s)
    return [view for view in views if view is not None], problems


def _read(
    runs: Sequence[RunFolder],
    kept: Cache | None,
    *,
    history: bool = False,
    configs: bool | None,
    patience_s: float | None,
    evidence: bool = False,
) -> tuple[Sequence[RunView | None], list[str]]:
    """A view of each run, None where its run.json cannot be read, and why it cannot."""
    found = [_Reader(run, kept, history, configs, evidence) for run in runs]
    jobs = [(reader, path, record) for reader in found for path, record in reader.jobs()]
    states = backends.states([record for _, _, record in jobs], patience_s)
    gone = [each for each, state in zip(jobs, states, strict=True) if state == "gone"]
    for (reader, path, record), state in zip(jobs, states, strict=True):
        reader.known[path] = JobView(record=record, state=state)
    _add_endings(gone, patience_s, deep=history)
    if patience_s is not None:
        _add_waiting(jobs, states, patience_s)
    views: list[RunView | None] = []
    problems = []
    for reader in found:
        try:
            views.append(reader.view())
        except _UNREADABLE as error:
            views.append(None)
            problems.append(_problem(reader.run.run_json, error))
    return views, problems


def _add_endings(
    gone: Sequence[tuple[_Reader, Path, Record]], patience_s: float | None, *, deep: bool
) -> None:
    """Adds what schedulers said, or still say, of how jobs ended."""
    unknown = []
    for reader, path, record in gone:
        ending = reader.once(ending_path(path))
        reader.known[path] = replace(reader.known[path], ending=ending or {})
        if not settled(ending or {}) and reader.asks_how_it_ended(path):
            unknown.append((reader, path, record))
    records = [record for _, _, record in unknown]
    endings = backends.endings(records, patience_s, deep=deep) if unknown else []
    for (reader, path, _), ending in zip(unknown, endings, strict=True):
        job = reader.known[path]
        reader.known[path] = replace(job, ending={**job.ending, **ending})


def _add_waiting(
    jobs: Sequence[tuple[_Reader, Path, Record]], states: Sequence[JobState], patience_s: float
) -> None:
    """Adds why training jobs are queued, for whoever looks: one question, and none where none is queued."""
    queued = [
        each
        for each, state in zip(jobs, states, strict=True)
        if state == "queued" and each[0].attempts and each[1] == each[0].attempts[-1].job
    ]
    reasons = backends.waiting([record for _, _, record in queued], patience_s) if queued else []
    for (reader, path, _), waiting in zip(queued, reasons, strict=True):
        reader.known[path] = replace(reader.known[path], waiting=waiting)


def ending_path(job: Path) -> Path:
    """Returns where the scheduler's word on the end of a job is kept, beside the job's record."""
    return job.with_name(f"ended-{job.name}")


def _encoder(snapshots: Mapping[int, Mapping[str, Any]]) -> str | None:
    """Whose latents the run's samples are; None where they are images."""
    header = next(iter(snapshots.values()))["data"].get("header", {})
    return header.get("encoder") if header.get("kind") == "latent" else None


def _problem(path: Path | str, error: Exception) -> str:
    reason = f"no {error}" if isinstance(error, KeyError) else str(error)
    return f"{path} was left out: {reason}"


class _Reader:
    """Reads one run in two steps: the records of its jobs, then everything else."""

    def __init__(
        self,
        run: RunFolder,
        kept: Cache | None,
        history: bool,
        configs: bool | None,
        evidence: bool,
    ) -> None:
        self.run, self.history, self.configs, self.evidence = run, history, configs, evidence
        # of one run also p(k) is wanted
        self.whole, self.kept = kept is None, kept or Cache()
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
        names = [name for name in names_in(run.evals) if name.startswith("img-")]
        self.records = sorted(name for name in names if name.endswith(".json"))
        self.settled = {name[: -len(".json")] for name in self.records}
        root = evaluations(run)
        tries = sorted(names_in(root))
        self.evaluations = [root / name for name in tries if history or name not in self.settled]
        # folders in which little happens any more, with all that their files say
        self.over: dict[str, dict[str, dict[str, Any]]] = {}
        if history and not self.whole:
            self._read_over()

    def _read_over(self) -> None:
        """Reads the folders of earlier attempts and of evaluations that have a record.

        Files there are added or replaced by renaming, which the folder's time of change tells.
        """
        over = [at.root for at in self.attempts[:-1]]
        over += [folder for folder in self.evaluations if folder.name in self.settled]
        for folder in map(str, over):
            # where one of them cannot be read, each is read by itself, and is named
            with contextlib.suppress(*_UNREADABLE):
                self.over[folder] = self.kept.get(folder, _objects)

    def jobs(self) -> Iterator[tuple[Path, Record]]:
        """Yields the record of every job, with its file."""
        paths = [path for at in self.attempts for path in (at.job, at.successor)]
        paths += [at.watcher for at in self.attempts] if self.history else []
        if self.watcher is not None and self.watcher not in paths:
            paths.append(self.watcher)
        for path in [*paths, *(folder / "job.json" for folder in self.evaluations)]:
            record = self.once(path)
            if record is not None:
                yield path, record

    def asks_how_it_ended(self, job: Path) -> bool:
        """Whether the scheduler's word on the end of a job may matter: its own files do not say it."""
        ended_well = (self.once(job.with_name("exit-0.json")) or {}).get("class") == "ok"
        if job.parent.parent == self.run.attempts:
            # of the last but one the scheduler may not have said the last word when the newest began
            asked = [at.job for at in (self.attempts if self.evidence else self.attempts[-2:])]
            return job in asked and not ended_well and not self._again(job)
        return not ended_well and job.parent.name not in self.settled

    def _again(self, job: Path) -> bool:
        """Whether the scheduler has started the same job once more, for a newer attempt."""
        newer = (
            known for at in self.attempts if at.job > job and (known := self.known.get(at.job))
        )
        return self.known[job].record["id"] in (each.record["id"] for each in newer)

    def view(self) -> RunView:
        """The view, once `known` holds the states of the jobs. Raises where run.json cannot be read."""
        about = self.run.describe()
        identity, images = about["identity"], int(about["images"])
        attempts = tuple(self._attempt(at) for at in self.attempts)
        snapshots = self._snapshots()
        asked = self.object(evaluation_asked(self.run)) or {}
        config = self._config() if self._wants_config(images in snapshots) else None
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
            config=config,
            snapshots=snapshots,
            checkpoints=tuple(self._checkpoints()) if self.history else (),
            saved_at=self._times(self.run.checkpoints),
            published_at=self._times(self.run.snapshots),
            evaluations=tuple(self._evaluation(folder) for folder in self.evaluations),
            records=self._records(),
            evaluation_asked=float(asked.get("time", 0.0)),
            retry_asked=float(asked.get("retry", 0.0)),
            lacks=lacks(config, _encoder(snapshots)) if config and snapshots else (),
            problems=tuple(dict.fromkeys(self.problems)),
        )

    def _wants_config(self, finished: bool) -> bool:
        return finished if self.configs is None else self.configs

    def _attempt(self, at: Attempt) -> AttemptView:
        names = set(names_in(at.root))

        def there(path: Path) -> dict[str, Any]:
            return (self.object(path) if path.name in names else None) or {}

        submission, cancelled = there(at.submission), there(at.cancelled)
        progress = there(at.root / "progress.json")
        starts = _ranks(names, "start")
        exits = self._by_rank(at, names, "exit")
        begins = self._by_rank(at, names, "start") if self.history else {}
        # ranks wait for one another, and a job may have a thousand
        heard = names if self.history else names & {"heartbeat-0.json"}
        limit_min = submission.get("timeout_min")
        return AttemptView(
            files=at,
            opened=float(submission.get("time") or _changed(at.root)),
            world=int(submission.get("world", 0)),
            node_count=int(submission.get("nodes", 0)),
            full_node_count=int(submission.get("full_nodes") or submission.get("nodes", 0)),
            job=self.known.get(at.job),
            watcher=self.known.get(at.watcher),
            successor=self.known.get(at.successor),
            cancelled=at.cancelled.name in names,
            # a record of before does not say; then all was asked to end and nothing is known to be left
            cancel_asked=float(cancelled.get("time", 0.0)),
            cancel_done=at.cancelled.name in names and bool(cancelled.get("done", True)),
            cancel_by=str(cancelled.get("by", "")),
            by_hand=bool(submission.get("by_hand")),
            excluded=submission.get("excluded", {}),
            limit_s=None if limit_min is None else 60.0 * limit_min,
            began=(self.once(f"{at.root}/start-{starts[0]}.json") or {}).get("time")
            if starts
            else None,
            resumed_from=_began_from(progress),
            starts=frozenset(starts),
            # start records of before do not name their node
            nodes={rank: str(each["node"]) for rank, each in begins.items() if "node" in each},
            exits=exits,
            begins=begins,
            heartbeats=self._heartbeats(at, heard, exits),
            progress=progress,
            spent_s=submission.get("spent_s"),
        )

    def _by_rank(self, at: Attempt, names: set[str], kind: str) -> dict[str, dict[str, Any]]:
        found = {rank: self.once(f"{at.root}/{kind}-{rank}.json") for rank in _ranks(names, kind)}
        return {rank: record for rank, record in found.items() if record is not None}

    def _heartbeats(
        self, at: Attempt, names: set[str], exits: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """What each rank last said; that of a rank which has ended changes no more."""
        found = {
            rank: self.once(path) if rank in exits else self.object(path)
            for rank in _ranks(names, "heartbeat")
            if (path := f"{at.root}/heartbeat-{rank}.json")
        }
        return {rank: record for rank, record in found.items() if record is not None}

    def _evaluation(self, folder: Path) -> EvaluationView:
        key, _, attempt = folder.name.rpartition(".")
        return EvaluationView(
            folder=folder,
            key=key,
            images=int(key.split("-")[1]),
            attempt=int(attempt),
            job=self.known.get(folder / "job.json"),
            begin=self.once(f"{folder}/start-0.json"),
            exit=self.once(f"{folder}/exit-0.json"),
        )

    def _times(self, parent: Path) -> dict[int, float]:
        """When each checkpoint or snapshot of a folder was published, by its images."""
        found = parent.glob(f"img-*/{storage.MANIFEST}") if self.evidence else ()
        return {int(path.parent.name[4:]): _changed(path) for path in found}

    def _snapshots(self) -> dict[int, Mapping[str, Any]]:
        found = self._complete_in(self.run.snapshots, self.run.snapshot_folders())
        return {images: manifest for images, manifest in found.items() if manifest is not None}

    def _checkpoints(self) -> list[int]:
        found = self._complete_in(self.run.checkpoints, self.run.checkpoint_folders())
        return [images for images, manifest in found.items() if manifest is not None]

    def _complete_in(
        self, parent: Path, there: Sequence[int]
    ) -> dict[int, Mapping[str, Any] | None]:
        return {images: self._complete(f"{parent}/{image_folder(images)}") for images in there}

    def _complete(self, folder: str) -> Mapping[str, Any] | None:
        """The manifest of a snapshot or checkpoint whose parts have their sizes; in a list without p(k)."""
        if self.whole:
            return storage.read_complete(folder, verify="sizes")
        try:
            manifest = self.kept.get(f"{folder}/{storage.MANIFEST}", _without_p)
            whole = all(
                os.stat(f"{folder}/{part['name']}").st_size == part["bytes"]  # noqa: PTH116
                for part in manifest["files"]
            )
        except (FileNotFoundError, NotADirectoryError, DamagedError):
            return None
        return manifest if whole else None

    def _records(self) -> tuple[EvaluationRecord, ...]:
        found = [self._try(f"{self.run.evals}/{name}", _record) for name in self.records]
        known = [record for record in found if record is not None]
        return tuple(sorted(known, key=lambda r: (r.images, r.key, r.attempt)))

    def _config(self) -> Config | None:
        if not self.attempts:
            return None
        return self._try(self.attempts[-1].config, _config)

    def object(self, path: str | Path) -> dict[str, Any] | None:
        """The JSON object that `path` holds; None where there is no such file, or none that can be read."""
        return self._of_folder(path, keep=False)

    def once(self, path: str | Path) -> dict[str, Any] | None:
        """The same of a file that is written once."""
        return self._of_folder(path, keep=True)

    def _of_folder(self, path: str | Path, *, keep: bool) -> dict[str, Any] | None:
        if self.over:
            folder, _, name = str(path).rpartition("/")
            if folder in self.over:
                return self.over[folder].get(name)
        return self._try(path, _object, keep)

    def _try(self, path: str | Path, parse: Callable[[str], T], keep: bool = True) -> T | None:
        try:
            return self.kept.get(str(path), parse) if keep else parse(str(path))
        except FileNotFoundError:
            return None
        except (*_UNREADABLE, UserError) as error:
            self.problems.append(_problem(path, error))
            return None


def _objects(folder: str) -> dict[str, dict[str, Any]]:
    """The JSON objects of a folder by the names of their files, but for those as long as a config."""
    names = [name for name in names_in(Path(folder)) if name.endswith(".json")]
    return {name: _object(f"{folder}/{name}") for name in names if name not in _LONG}


def _object(path: str) -> dict[str, Any]:
    with open(path) as file:  # noqa: PTH123 - of thousands of paths most are text
        found = json.load(file)
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} instead of an object")
    return found


def _record(path: str) -> EvaluationRecord:
    return read_record_file(Path(path))


def _config(path: str) -> Config:
    return read_config(Path(path))


def _without_p(path: str) -> dict[str, Any]:
    """The manifest of a snapshot; thousands of them with their p(k) are hundreds of megabytes."""
    manifest = storage.read_manifest(path.rpartition("/")[0])
    if manifest is None:
        raise FileNotFoundError(path)
    guidance = {key: value for key, value in manifest.get("guidance", {}).items() if key != "p"}
    return {**manifest, "guidance": guidance}


def _ranks(names: set[str], kind: str) -> list[str]:
    """Ranks whose `<kind>-<rank>.json` is among the names of files."""
    return sorted(
        name[len(kind) + 1 : -5]
        for name in names
        if name.startswith(f"{kind}-") and name.endswith(".json")
    )


def _began_from(progress: Mapping[str, Any]) -> int | None:
    """Images of the checkpoint that an attempt began from, by the trainer's report, which has None for scratch."""
    if progress.get("section") in (None, "joining"):
        return None
    return int(progress.get("resumed_from") or 0)


def _changed(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # a submission that was refused has removed it
        return 0.0
