"""What is known of a run at one moment: its files, and what the schedulers answer. Read once; `decide` judges it.

Schedulers are asked before the files are read: what a job wrote before it ended is then in the view. A scheduler that
does not answer leaves its jobs `unknown`, which is never the same as `gone`.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from launcher import backends
from launcher.backends import Record, settled
from launcher.folder import Attempt, evaluation_asked, evaluations
from launcher.reconcile import cache, parse
from launcher.reconcile.cache import Cache
from launcher.reconcile.model import AttemptView, EvaluationView, JobState, JobView, RunView
from selfguide.spec.config import Config
from selfguide.spec.lacks import lacks
from selfguide.spec.records import PART, PARTS, EvaluationRecord
from selfguide.spec.run import RunFolder, image_folder, names_in
from shards import storage
from shards.errors import DamagedError, UserError

__all__ = [
    "AttemptView",
    "EvaluationView",
    "JobState",
    "JobView",
    "RunView",
    "ending_path",
    "read",
    "read_many",
]

T = TypeVar("T")

# patience of commands that only look, seconds
LOOK_S = 2.0

# what an unreadable file raises
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)


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
    kept: Cache | None = None,
) -> tuple[list[RunView], list[str]]:
    """Returns a view of each run that can be read, and a sentence for each that cannot.

    However many the runs, every Slurm is asked once and the process table of this machine read once.
    Files that are written once are parsed once (`cache`), and p(k) is left out of the manifests of snapshots.

    Args:
        configs: reads the config of every run, or of none; None of the finished ones.
        history: reads all attempts and evaluation jobs, not only what the state of a run needs.
        patience_s: with schedulers that do not answer, as of `read`.
        kept: the cache of who has opened one.
    """
    if not runs:
        return [], []
    what = f"{'history' if history else 'list'}{'-configs' if configs else ''}"
    opened = cache.of_runs(runs[0].root.parent.parent, what)
    with contextlib.nullcontext(kept) if kept is not None else opened as kept:
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
                self.over[folder] = self.kept.get(folder, parse.objects)

    def jobs(self) -> Iterator[tuple[Path, Record]]:
        """Yields the record of every job, with its file."""
        paths = [path for at in self.attempts for path in (at.job, at.successor)]
        if self.history:
            paths += [at.watcher for at in self.attempts]
            paths += [path for at in self.attempts for path in _former_watchers(at).values()]
        if self.watcher is not None and self.watcher not in paths:
            paths.append(self.watcher)
        for path in [*paths, *(folder / "job.json" for folder in self.evaluations)]:
            record = self.once(path)
            if record is None:
                continue
            try:
                backends.check_record(record)
            except (KeyError, TypeError, ValueError) as error:
                self.problems.append(_problem(path, error))
            else:
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
        about = self.kept.get(str(self.run.run_json), parse.json_object)
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
        starts = parse.ranks(names, "start")
        exits = self._by_rank(at, names, "exit")
        begins = self._by_rank(at, names, "start") if self.history else {}
        # ranks wait for one another, and a job may have a thousand
        heard = names if self.history else names & {"heartbeat-0.json"}
        limit_min = submission.get("timeout_min")
        return AttemptView(
            files=at,
            opened=float(submission.get("time") or parse.changed(at.root)),
            world=int(submission.get("world", 0)),
            node_count=int(submission.get("nodes", 0)),
            full_node_count=int(submission.get("full_nodes") or submission.get("nodes", 0)),
            job=self.known.get(at.job),
            watcher=self.known.get(at.watcher),
            former_watchers={
                number: self.known[at.former_watcher(number)]
                for number in parse.ranks(names, "watcher")
                if at.former_watcher(number) in self.known
            },
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
            resumed_from=parse.began_from(progress),
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
        found = {
            rank: self.once(f"{at.root}/{kind}-{rank}.json") for rank in parse.ranks(names, kind)
        }
        return {rank: record for rank, record in found.items() if record is not None}

    def _heartbeats(
        self, at: Attempt, names: set[str], exits: Mapping[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """What each rank last said; that of a rank which has ended changes no more."""
        found = {
            rank: self.once(path) if rank in exits else self.object(path)
            for rank in parse.ranks(names, "heartbeat")
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
            advanced=self._advanced(folder, key),
        )

    def _advanced(self, folder: Path, key: str) -> bool:
        """Whether a block of samples was finished since this job began; asked where its time limit ended it."""
        job = self.known.get(folder / "job.json")
        if job is None or not str(job.ending.get("state", "")).startswith("TIMEOUT"):
            return False
        began = parse.changed(folder / "start-0.json")
        blocks = self.run.evals.glob(f"{PARTS}/{key}-*/{PART}*")
        return began > 0 and any(parse.changed(block) >= began for block in blocks)

    def _times(self, parent: Path) -> dict[int, float]:
        """When each checkpoint or snapshot of a folder was published, by its images."""
        found = parent.glob(f"img-*/{storage.MANIFEST}") if self.evidence else ()
        return {int(path.parent.name[4:]): parse.changed(path) for path in found}

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
            manifest = self.kept.get(f"{folder}/{storage.MANIFEST}", parse.without_p)
            whole = all(
                os.stat(f"{folder}/{part['name']}").st_size == part["bytes"]  # noqa: PTH116
                for part in manifest["files"]
            )
        except (FileNotFoundError, NotADirectoryError, DamagedError):
            return None
        return manifest if whole else None

    def _records(self) -> tuple[EvaluationRecord, ...]:
        found = [self._try(f"{self.run.evals}/{name}", parse.record) for name in self.records]
        known = [record for record in found if record is not None]
        return tuple(sorted(known, key=lambda r: (r.images, r.key, r.attempt)))

    def _config(self) -> Config | None:
        if not self.attempts:
            return None
        return self._try(self.attempts[-1].config, parse.config)

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
        return self._try(path, parse.json_object, keep)

    def _try(self, path: str | Path, made: Callable[[str], T], keep: bool = True) -> T | None:
        try:
            kept = keep or self.kept.lasting
            return self.kept.get(str(path), made) if kept else made(str(path))
        except FileNotFoundError:
            return None
        except (*_UNREADABLE, UserError) as error:
            self.problems.append(_problem(path, error))
            return None


def _former_watchers(at: Attempt) -> dict[str, Path]:
    """The records of watchers that another one has followed, by their numbers."""
    numbers = parse.ranks(set(names_in(at.root)), "watcher")
    return {number: at.former_watcher(number) for number in numbers}
