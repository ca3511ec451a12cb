"""What the board shows of each run: its view, and the curve of its loss.

Schedulers are asked, so that the board and `launcher.runs` say the same, in the same words. A file that cannot be read
becomes a problem that the board shows; it never hides the other runs.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import operator
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from launcher import folder
from launcher.board import curves
from launcher.board.curves import Columns, Curve
from launcher.folder import Attempt
from launcher.reconcile import cache, decide, parse
from launcher.reconcile.cache import Cache
from launcher.reconcile.decide import State
from launcher.reconcile.hours import gpu_hours
from launcher.reconcile.lineage import Known, Parent, parents, weights
from launcher.reconcile.reader import problem
from launcher.reconcile.view import RunView, read_many
from selfguide.spec import recipe
from selfguide.spec.config import Config, SamplerConfig, build
from selfguide.spec.config.evaluation import Expected
from selfguide.spec.others import FOLDER, OtherRecord, other_files, read_other_file
from selfguide.spec.recipe import Front
from selfguide.spec.records import UNREADABLE, EvaluationRecord
from selfguide.spec.retention import Deleted
from selfguide.spec.run import RunFolder, names_in
from selfguide.spec.selections import selected_folder


@dataclass(frozen=True, kw_only=True)
class Code:
    """The source that an attempt ran."""

    # of all its files
    hash: str = ""
    # the checkout's commit, and whether files differed from it; "" and None where there was none
    revision: str = ""
    dirty: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run folder says; `launcher.board.detail` reads logs and pictures, when asked."""

    id: str
    experiment: str
    seed: int
    images: int  # to train on; the final snapshot carries this count
    created: float
    identity: Mapping[str, Any]
    root: Path
    records: tuple[EvaluationRecord, ...]  # by images, key and attempt
    published: tuple[int, ...]  # images of every complete snapshot
    losses: Curve  # (images, loss), as the newest attempt tells it
    attempts: int
    seen: int  # images trained on so far
    heard: float  # seconds since 1970 of the newest sign of life
    state: State
    # images of snapshots that wait for a score; with evaluation=none there are none
    unscored: tuple[int, ...]
    # of all its jobs so far, about; ranks count where it has no GPUs
    gpu_hours: float | None = None
    # of the newest attempt; None where another version wrote it
    config: Config | None = None
    # published numbers for what this run does (`evaluation.expected`)
    expected: tuple[Expected, ...] = ()
    # of a run with several protocols, those of each, by its key
    expected_by: Mapping[str, tuple[Expected, ...]] = field(default_factory=dict)
    # what it came from
    lineage: tuple[Parent, ...] = ()
    # that the newest attempt ran
    code: Code | None = None
    # cluster and id of each attempt's training job, oldest first, and of evaluations that have no record yet
    jobs: tuple[str, ...] = ()
    # all curves but the loss by name, as `launcher.board.curves` lists them
    curves: Mapping[str, Curve] = field(default_factory=dict)
    # keys of protocols that score it, as far as a sweep used them too, and images that wait for each; None: unknown
    scored_by: frozenset[str] = frozenset()
    waiting: Mapping[str, tuple[int, ...]] | None = None
    # what retention has deleted of its snapshots, ascending; their scores stay
    deleted: tuple[Deleted, ...] = ()
    # how its snapshots are best sampled, as `evals/recipe.json` says
    fronts: tuple[Front, ...] = ()
    # a sentence for each of its files that is left out because it cannot be read
    quarantined: tuple[str, ...] = ()

    @property
    def failure(self) -> str:
        """Why it failed, "" where it did not."""
        return self.state.reason if self.state.word == "failed" else ""

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.root)

    @functools.cached_property
    def own(self) -> tuple[EvaluationRecord, ...]:
        """The records of protocols that score the run, without those that only a sweep asked for."""
        by = {r.protocol_key for r in self.records if not r.sweep} | self.scored_by
        return tuple(r for r in self.records if not r.sweep or r.protocol_key in by)

    def waits(self, protocol: str | None) -> tuple[int, ...]:
        """Images of snapshots that wait for a score under the protocol of this key; None for any of the run's."""
        if protocol is None or self.waiting is None:
            return self.unscored
        return self.waiting.get(protocol, ())

    @property
    def label_free(self) -> bool:
        """Nothing this run came from saw a human label."""
        recorded = [r.label_free for r in self.records if r.done]
        if recorded:
            return all(recorded)
        scratch = self.identity.get("init", {}).get("source", "scratch") == "scratch"
        guidance = self.identity.get("guidance", {})
        return scratch and guidance.get("source") != "labels" and not guidance.get("saw_labels")

    def curve(self, name: str) -> Curve:
        """The curve of that name, empty where nobody wrote it."""
        return self.losses if name == "loss" else self.curves.get(name, ())

    def gpu_hours_at(self, images: int) -> float | None:
        """GPU-hours of training until so many images; None where its metrics do not say."""
        hours = self.curve(curves.GPU_HOURS)
        at = bisect.bisect_left(hours, images, key=operator.itemgetter(0))
        return hours[at][1] if at < len(hours) else None

    def expects(self, metric: str, protocol: str) -> Expected | None:
        """The published number for a score under the protocol of this key."""
        known = self.expected_by.get(protocol, ()) if self.expected_by else self.expected
        return next((each for each in known if each.metric == metric), None)


def read_runs(root: Path, reader: Reader | None = None) -> tuple[tuple[Run, ...], tuple[str, ...]]:
    """Every run below `root`, and one sentence for each file that could not be read.

    Args:
        reader: of a process that reads again; without it, what earlier commands have parsed is used.
    """
    if reader is not None:
        return reader.read(root)
    with cache.of_runs(root.resolve(), "board") as opened:
        return Reader(opened).read(root)


class Everything(NamedTuple):
    """What a board is made of: runs, one sentence for each file that could not be read, and others' scores."""

    runs: tuple[Run, ...]
    problems: tuple[str, ...]
    others: tuple[OtherRecord, ...]


def read_all(root: Path) -> Everything:
    """What `read_runs` returns, and the scores of others' samples beside the runs."""
    with cache.of_runs(root.resolve(), "board") as opened:
        return Reader(opened).read_all(root)


@dataclass(frozen=True)
class _Read:
    """A run as it was read, and what others need of it."""

    run: Run
    weights: tuple[str, ...]
    # what its files were; None where the run may change without them
    files: _Files | None


# path, inode, size and time of the last change of each
_Files = tuple[tuple[str, int, int, int], ...]


class Reader:
    """Reads runs again and again: opens only files that have changed, and leaves finished runs alone.

    A finished run is what it was while its run.json, its folders, its records and metrics are: whatever else is in it
    is added or replaced by renaming, which a folder's time tells.
    """

    def __init__(self, kept: Cache | None = None) -> None:
        self._lasting = kept is None
        self._cache = kept or Cache(lasting=True)
        self._before: dict[str, _Read] = {}

    def read(self, root: Path) -> tuple[tuple[Run, ...], tuple[str, ...]]:
        """Every run below `root` as it is now, and one sentence for each file that could not be read."""
        with cache.uncollected():
            return self._read(root)

    def read_all(self, root: Path) -> Everything:
        """What `read` returns, and the scores of others' samples beside the runs."""
        runs, problems = self.read(root)
        others = []
        try:
            files = other_files(root)
        except OSError as error:
            files, problems = [], (*problems, problem(root / FOLDER, error))
        for path in files:
            try:
                others.append(self._cache.get(str(path), read_other_file))
            except FileNotFoundError:
                # somebody has removed it since
                continue
            except UNREADABLE as error:
                problems = (*problems, problem(path, error))
        return Everything(runs, problems, tuple(others))

    def _read(self, root: Path) -> tuple[tuple[Run, ...], tuple[str, ...]]:
        there = folder.runs(root)
        open_to_us = os.access(root, os.R_OK | os.X_OK) and root.is_dir()
        gone = () if open_to_us else (f"{root} is gone, or no folder that may be read",)
        now = {str(each.root): self._files(each) for each in there} if self._lasting else {}
        same = {
            place: read
            for place, read in self._before.items()
            if read.files is not None and read.files == now.get(place)
        }
        asked = [each for each in there if str(each.root) not in same]
        views, problems = read_many(asked, configs=True, kept=self._cache)
        found = dict(same)
        for view in views:
            own, place = list(view.problems), str(view.folder.root)
            try:
                run = _run(view, own, self._cache)
                # of an identity that is none of ours it cannot be told, and whoever shows the run asks for it
                _ = run.label_free
                settled = run.state.word == "finished" and not run.unscored and not view.evaluations
                files = now.get(place) if settled else None
                found[place] = _Read(run, weights(view), files)
            except UNREADABLE as error:
                problems += [*own, problem(view.folder.run_json, error)]
        if self._lasting:
            self._cache, self._before = self._cache.again(), found
        ordered = [found[place] for place in map(str, (f.root for f in there)) if place in found]
        problems += [why for each in ordered for why in each.run.quarantined]
        known = Known()
        for each in ordered:
            known.add(each.run.id, each.run.root, each.weights)
        return tuple(_resolved(each.run, known) for each in ordered), (*gone, *problems)

    @staticmethod
    def _files(run: RunFolder) -> _Files | None:
        """What tells whether a finished run is as it was; None where some of it may change without a new time."""
        try:
            attempts = run.attempt_numbers()
        except OSError:
            return None
        folders = [run.attempts, run.evals, run.evals / "jobs", run.metrics, run.snapshots]
        # by whose scores it was chosen among others, which may be long after its end
        folders.append(selected_folder(run))
        newest = [run.attempt(attempts[-1])] if attempts else []
        found = [each for path in (run.run_json, *folders, *newest) if (each := _stamp(path))]
        for parent in (run.evals, run.metrics):
            with contextlib.suppress(OSError), os.scandir(parent) as entries:
                found += [_stamped(entry.path, entry.stat()) for entry in entries]
        latest = max((changed for *_, changed in found), default=0)
        return None if time.time_ns() - latest < cache.SETTLED_NS else tuple(sorted(found))


def _stamp(path: Path) -> tuple[str, int, int, int] | None:
    try:
        return _stamped(str(path), path.stat())
    except OSError:
        return None


def _stamped(path: str, found: os.stat_result) -> tuple[str, int, int, int]:
    return path, found.st_ino, found.st_size, found.st_mtime_ns


def _resolved(run: Run, known: Known) -> Run:
    if not run.lineage:
        return run
    return replace(run, lineage=tuple(map(known.resolved, run.lineage)))


def _run(view: RunView, problems: list[str], kept: Cache) -> Run:
    report = view.newest.progress if view.newest else {}
    found = _curves(view.folder, problems, kept)
    unscored = decide.unscored(view)
    config = view.config
    protocols = (config.evaluation, *config.more_evaluations) if config is not None else ()
    return Run(
        id=view.id,
        experiment=view.experiment,
        seed=int(view.identity["seed"]),
        images=view.images,
        created=view.created,
        identity=_current(view),
        root=view.folder.root,
        records=_under_headings(view),
        published=view.published,
        deleted=tuple(view.deleted.values()),
        losses=found.pop("loss", ()),
        attempts=view.tries,
        seen=decide.images_seen(view),
        heard=max([view.created, float(report.get("time", 0.0)), *(r.time for r in view.records)]),
        state=decide.state(view),
        gpu_hours=gpu_hours(view),
        unscored=unscored,
        config=view.config,
        expected=tuple(dict.fromkeys(each for by in protocols for each in by.expected)),
        expected_by=_expected_by(view),
        lineage=parents(view),
        code=_code(view, kept),
        jobs=tuple(_jobs(view, kept)),
        curves=found,
        scored_by=_scored_by(view),
        waiting=_waiting(view) if unscored else {},
        fronts=_fronts(view, problems),
        quarantined=tuple(problems),
    )


def _current(view: RunView) -> Mapping[str, Any]:
    """The identity with the images that the run was extended to: it is what a run as long from the start is."""
    train = view.identity.get("train", {})
    if train.get("images") in (None, view.images):
        return view.identity
    return {**view.identity, "train": {**train, "images": view.images}}


def _scored_by(view: RunView) -> frozenset[str]:
    """Keys of the protocols that score the run; asked only where a sweep may have used one, for a key is a hash."""
    if view.config is None or not view.snapshots or not any(r.sweep for r in view.records):
        return frozenset()
    newest, known = max(view.snapshots), _headings(view)
    keys = (decide.protocol(view, by, newest).key for by in view.config.scored_by)
    return frozenset(known.get(key, key) for key in keys)


def _expected_by(view: RunView) -> Mapping[str, tuple[Expected, ...]]:
    """What each of several protocols expects; asked only where one does, for a key is a hash."""
    several = view.config.scored_by if view.config and view.snapshots else ()
    if len(several) < 2 or not any(by.evaluation.expected for by in several):
        return {}
    newest, known = max(view.snapshots), _headings(view)
    keys = {decide.protocol(view, by, newest).key: by.evaluation.expected for by in several}
    return {known.get(key, key): expected for key, expected in keys.items()}


def _waiting(view: RunView) -> Mapping[str, tuple[int, ...]] | None:
    """Images without an outcome under each protocol that scores the run, by its key."""
    if view.config is None:
        return None
    found: dict[str, tuple[int, ...]] = {}
    known = _headings(view)
    for by in view.config.scored_by:
        for images in decide.unscored(view, by):
            key = decide.protocol(view, by, images).key
            key = known.get(key, key)
            found[key] = (*found.get(key, ()), images)
    return found


def _headings(view: RunView) -> Mapping[str, str]:
    """Key of a protocol that names a file whose content was open when it was asked for -> as its scores have it."""
    scores = (r for r in view.records if r.done and r.protocol_key != r.asked)
    return {r.asked: r.protocol_key for r in scores}


def _under_headings(view: RunView) -> tuple[EvaluationRecord, ...]:
    """The run's records, those without a score by the same protocol as the scores beside them."""
    known = _headings(view)
    return tuple(
        replace(r, protocol_key=known[r.protocol_key]) if r.protocol_key in known else r
        for r in view.records
    )


def _fronts(view: RunView, problems: list[str]) -> tuple[Front, ...]:
    try:
        found = recipe.read(view.folder)
        for front in found:
            if not {front.chosen, *front.front} <= {point.key for point in front.points}:
                raise ValueError(f"front {front.id} names points that it does not hold")
            for point in front.points:
                build(SamplerConfig, dict(point.sampler), "sampler")
        return found
    except UNREADABLE as error:
        problems.append(problem(recipe.recipe_path(view.folder), error))
        return ()


def _code(view: RunView, kept: Cache) -> Code | None:
    about = _told(view.newest.files.root / "code.json", kept) if view.newest else {}
    if not about:
        return None
    return Code(
        hash=str(about.get("hash", "")),
        revision=str(about.get("revision", "")),
        dirty=about.get("dirty"),
    )


def _told(path: Path, kept: Cache) -> Mapping[str, Any]:
    """A small file that some attempts have; empty where there is none, or none that can be read."""
    with contextlib.suppress(*UNREADABLE):
        return kept.get(str(path), parse.json_object)
    return {}


def _jobs(view: RunView, kept: Cache) -> list[str]:
    """The jobs of all attempts, then those of evaluations that are under way."""
    newest = view.newest.number if view.newest else 0
    before = [n for n in view.folder.attempt_numbers() if n < newest] if view.tries > 1 else []
    earlier = [_told(Attempt(view.folder.attempt(n)).job, kept) for n in before]
    labels = [f"{job['kind']} {job['id']}" for job in earlier if "kind" in job and "id" in job]
    works = [each.job for each in (view.newest, *view.evaluations) if each is not None]
    return list(dict.fromkeys([*labels, *(job.label for job in works if job is not None)]))


def _curves(run: RunFolder, problems: list[str], kept: Cache) -> dict[str, Curve]:
    """Every curve by name, over all attempts."""
    files: list[dict[str, Columns]] = []
    names = [name for name in names_in(run.metrics) if name.startswith("train-")]
    for name in sorted(names, key=lambda name: (len(name), name)):
        path = f"{run.metrics}/{name}"
        try:
            file = dict(kept.get(path, curves.read_lines))
        except UNREADABLE as error:
            problems.append(problem(path, error))
            continue
        number = name[len("train-") : -len(".jsonl")]
        if "time" in file and number.isdecimal():
            at = Attempt(run.attempt(int(number)))
            began = _told(at.root / "start-0.json", kept).get("time")
            asked = _told(at.submission, kept)
            if began is not None and asked.get("spent_s") is not None and asked.get("world"):
                file[curves.GPU_HOURS] = curves.gpu_hours(
                    file,
                    began=float(began),
                    world=int(asked["world"]),
                    spent_s=float(asked["spent_s"]),
                )
        files.append(file)
    wanted = (*curves.CURVES, curves.GPU_HOURS)
    return {name: curve for name in wanted if (curve := curves.joined(files, name))}
