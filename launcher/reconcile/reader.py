"""Reads the files of one run: the records of its jobs first, and once schedulers have answered, everything else."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from launcher import backends
from launcher.backends import Record
from launcher.folder import Attempt, evaluation_asked, evaluations
from launcher.reconcile import parse
from launcher.reconcile.cache import Cache
from launcher.reconcile.model import AttemptView, EvaluationView, JobView, RunView
from selfguide.spec import timm_nets
from selfguide.spec.config import Config
from selfguide.spec.lacks import Lack, encoder_of, lacks
from selfguide.spec.records import (
    PART,
    PARTS,
    PASS,
    REFERENCE,
    REFERENCES,
    UNREADABLE,
    EvaluationRecord,
)
from selfguide.spec.retention import DELETED, PINS, Deleted, deleted_record
from selfguide.spec.run import RunFolder, image_folder, names_in, numbered
from selfguide.spec.score_sweep import SWEEPS, ScoreSweep, sweeps_folder
from selfguide.spec.selections import Selection, selection_files, with_selections
from shards import storage
from shards.errors import DamagedError, UserError

T = TypeVar("T")

# the folder of an evaluation job: images and protocol of its key, and its attempt
_EVALUATION = re.compile(r"img-\d+(-.+)?\.\d+")


def problem(path: Path | str, error: Exception) -> str:
    """Why something of a run is missing from its view."""
    reason = f"no {error}" if isinstance(error, KeyError) else str(error)
    return f"{path} was left out: {reason}"


class RunReader:
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
        there = names_in(run.evals)
        names = [name for name in there if name.startswith("img-")]
        self.sweeps = sorted(names_in(sweeps_folder(run))) if SWEEPS in there else []
        self.records = sorted(name for name in names if name.endswith(".json"))
        # of these, once they were read
        self.damaged: tuple[str, ...] = ()
        self.settled = {name[: -len(".json")] for name in self.records}
        root = evaluations(run)
        tries = sorted(names_in(root))
        # file systems and file managers leave names of their own in folders
        self.evaluations = [
            root / name
            for name in tries
            if _EVALUATION.fullmatch(name) and (history or name not in self.settled)
        ]
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
            with contextlib.suppress(*UNREADABLE):
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
                self.problems.append(problem(path, error))
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
        published = names_in(self.run.snapshots)
        snapshots, selections = self._snapshots(published), self._selections()
        asked = self.object(evaluation_asked(self.run)) or {}
        config = self._config() if self._wants_config(images in snapshots) else None
        sweeps = self._sweeps()
        encoder = _encoder(snapshots) if config and snapshots else None
        return RunView(
            folder=self.run,
            time=time.time(),
            id=str(about["id"]),
            experiment=str(about["experiment"]),
            name=about.get("name"),
            hash=str(about.get("hash", "")),
            identity=identity,
            images=images,
            created=parse.moment(about["created"]),
            tries=self.tries,
            watcher=self.known.get(self.watcher) if self.watcher else None,
            attempts=attempts,
            config=config,
            snapshots=snapshots,
            deleted=self._deleted(snapshots) if DELETED in published else {},
            pinned=self._pinned() if PINS in published else frozenset(),
            selected=frozenset(each.images for each in selections if each.images is not None),
            checkpoints=tuple(self._checkpoints()) if self.history else (),
            saved_at=self._times(self.run.checkpoints),
            published_at=self._times(self.run.snapshots),
            evaluations=self._evaluations(),
            records=self._records(selections),
            damaged=self.damaged,
            sweeps=sweeps,
            evaluation_asked=float(asked.get("time", 0.0)),
            retry_asked=float(asked.get("retry", 0.0)),
            lacks=lacks(config, encoder) if config and snapshots else (),
            sweep_lacks=_sweep_lacks(config, sweeps, encoder) if config and snapshots else (),
            problems=tuple(dict.fromkeys(self.problems)),
        )

    def _wants_config(self, finished: bool) -> bool:
        return finished if self.configs is None else self.configs

    def _attempt(self, at: Attempt) -> AttemptView:
        names = set(names_in(at.root))

        def there(path: Path) -> dict[str, Any]:
            return (self.object(path) if path.name in names else None) or {}

        submission, cancelled = there(at.submission), there(at.cancelled)
        report = at.root / "progress.json"
        progress = (self._report(report) if report.name in names else None) or {}
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
            # an earlier record does not say; then all was asked to end and nothing is known to be left
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
            # earlier start records do not name their node
            nodes={rank: str(each["node"]) for rank, each in begins.items() if "node" in each},
            exits=exits,
            begins=begins,
            heartbeats=self._heartbeats(at, heard, exits),
            progress=progress,
            spent_s=submission.get("spent_s"),
        )

    def _by_rank(self, at: Attempt, names: set[str], kind: str) -> dict[str, dict[str, Any]]:
        folder = str(at.root)
        found = {
            rank: self.once(f"{folder}/{kind}-{rank}.json") for rank in parse.ranks(names, kind)
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

    def _evaluations(self) -> tuple[EvaluationView, ...]:
        found = map(self._evaluation, self.evaluations)
        # a folder is made before the request in it, by which a try is claimed: without one it is nobody's
        return tuple(each for each in found if each.job is not None or each.claimed)

    def _evaluation(self, folder: Path) -> EvaluationView:
        key, _, attempt = folder.name.rpartition(".")
        job = self.known.get(folder / "job.json")
        return EvaluationView(
            folder=folder,
            key=key,
            images=int(key.split("-")[1]),
            attempt=int(attempt),
            job=job,
            begin=self.once(f"{folder}/start-0.json"),
            exit=self._exit(folder),
            advanced=self._advanced(folder, key),
            claimed=0.0 if job else parse.changed(folder / "request.json"),
        )

    def _exit(self, folder: Path) -> dict[str, Any] | None:
        """How an evaluation ended: of several ranks by the one that failed, for which the others were ended."""
        own = self.once(f"{folder}/exit-0.json")
        if own is not None and own.get("class") != "signal":
            return own
        ranks = parse.ranks(set(names_in(folder)), "exit")
        ends = (self.once(f"{folder}/exit-{rank}.json") for rank in ranks)
        outside = ("ok", "signal", "preempted")
        return next((end for end in ends if end and end.get("class") not in outside), own)

    def _advanced(self, folder: Path, key: str) -> bool:
        """Whether a part was finished since this job began: of samples, of their reference, or a pass of a probe.

        Asked where its time limit ended it.
        """
        job = self.known.get(folder / "job.json")
        if job is None or not str(job.ending.get("state", "")).startswith("TIMEOUT"):
            return False
        began = parse.changed(folder / "start-0.json")
        # references are shared: what another evaluation has made of one, this one need not make either
        references = self.run.root.parent.parent / REFERENCES
        made = itertools.chain(
            self.run.evals.glob(f"{PARTS}/{key}-*/**/{PART}*"),
            self.run.evals.glob(f"{PARTS}/{key}-*/*{PASS}"),
            references.glob(f"*/parts/{PART}*"),
            references.glob(f"*/{REFERENCE}"),
        )
        return began > 0 and any(parse.changed(part) >= began for part in made)

    def _times(self, parent: Path) -> dict[int, float]:
        """When each checkpoint or snapshot of a folder was published, by its images."""
        found = parent.glob(f"img-*/{storage.MANIFEST}") if self.evidence else ()
        return {int(path.parent.name[4:]): parse.changed(path) for path in found}

    def _snapshots(self, published: Sequence[str]) -> dict[int, Mapping[str, Any]]:
        found = self._complete_in(self.run.snapshots, numbered(published))
        return {images: manifest for images, manifest in found.items() if manifest is not None}

    def _deleted(self, there: Mapping[int, Any]) -> dict[int, Deleted]:
        """What retention has deleted, but for what an attempt that went back has published again."""
        known = numbered(names_in(self.run.snapshots / DELETED), ".json")
        found = {i: self._try(deleted_record(self.run, i), parse.deleted) for i in known}
        return {i: each for i, each in found.items() if each is not None and i not in there}

    def _pinned(self) -> frozenset[int]:
        return frozenset(numbered(names_in(self.run.snapshots / PINS)))

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

    def _selections(self) -> list[Selection]:
        found = [self._try(path, parse.selection) for path in selection_files(self.run)]
        return [selection for selection in found if selection is not None]

    def _records(self, selections: Sequence[Selection]) -> tuple[EvaluationRecord, ...]:
        folder = str(self.run.evals)
        found = {name: self._try(f"{folder}/{name}", parse.record) for name in self.records}
        self.damaged = tuple(name for name, record in found.items() if record is None)
        known = [record for record in found.values() if record is not None]
        if selections:
            known = [with_selections(record, selections) for record in known]
        return tuple(sorted(known, key=lambda r: (r.images, r.key, r.attempt)))

    def _sweeps(self) -> tuple[ScoreSweep, ...]:
        names = [name for name in self.sweeps if name.endswith(".json")]
        found = [self._try(f"{sweeps_folder(self.run)}/{name}", parse.sweep) for name in names]
        return tuple(sweep for sweep in found if sweep is not None)

    def _config(self) -> Config | None:
        if not self.attempts:
            return None
        config = self._try(self.attempts[-1].config, parse.config)
        return config and _pinned(config)

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

    def _report(self, path: Path) -> dict[str, Any] | None:
        folder = self.over.get(str(path.parent))
        return (
            self._try(path, parse.progress, keep=False) if folder is None else folder.get(path.name)
        )

    def _try(self, path: str | Path, made: Callable[[str], T], keep: bool = True) -> T | None:
        try:
            kept = keep or self.kept.lasting
            return self.kept.get(str(path), made) if kept else made(str(path))
        except FileNotFoundError:
            return None
        except (*UNREADABLE, UserError) as error:
            self.problems.append(problem(path, error))
            return None


def _former_watchers(at: Attempt) -> dict[str, Path]:
    """The records of watchers that another one has followed, by their numbers."""
    numbers = parse.ranks(set(names_in(at.root)), "watcher")
    return {number: at.former_watcher(number) for number in numbers}


def _pinned(config: Config) -> Config:
    """With the sha256 of weights that have come since it was submitted; what hinders that, `lacks` says."""
    with contextlib.suppress(UserError):
        first, *more = map(timm_nets.pinned, (config.evaluation, *config.more_evaluations))
        return dataclasses.replace(config, evaluation=first, more_evaluations=tuple(more))
    return config


def _sweep_lacks(
    config: Config, sweeps: Sequence[ScoreSweep], encoder: str | None
) -> tuple[Lack, ...]:
    """The files that the protocols of sweeps wait for."""
    asked: list[Config] = []
    for sweep in sweeps:
        # one of another version has no points here
        with contextlib.suppress(UserError):
            for each in sweep.configs(config):
                if all(each.evaluation != other.evaluation for other in asked):
                    asked.append(each)
    return tuple(lack for each in asked for lack in lacks(each, encoder))


def _encoder(snapshots: Mapping[int, Mapping[str, Any]]) -> str | None:
    """Whose latents the run's samples are; None where they are images."""
    return encoder_of(next(iter(snapshots.values()))["data"].get("header", {}))
