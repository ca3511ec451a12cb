"""What is known of a run at one moment: its files, and what the schedulers answer. Read once; `decide` judges it.

Schedulers are asked before the files are read: what a job wrote before it ended is then in the view. A scheduler that
does not answer leaves its jobs `unknown`, which is never the same as `gone`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launcher import backends
from launcher.backends import Record, settled
from launcher.reconcile import cache
from launcher.reconcile.cache import Cache
from launcher.reconcile.model import AttemptView, EvaluationView, JobState, JobView, RunView
from launcher.reconcile.reader import RunReader, problem
from selfguide.spec.records import UNREADABLE
from selfguide.spec.run import RunFolder
from shards.errors import UserError

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

# patience of commands that only look, seconds
LOOK_S = 2.0


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
    problems = []
    found: list[RunReader | None] = []
    jobs = []
    for run in runs:
        try:
            opened = RunReader(run, kept, history, configs, evidence)
            jobs += [(opened, path, record) for path, record in opened.jobs()]
            found.append(opened)
        except OSError as error:
            # whose folder is not open to us hides no other run
            if kept is None:
                raise
            found.append(None)
            problems.append(problem(run.root, error))
    states = backends.states([record for _, _, record in jobs], patience_s)
    gone = [each for each, state in zip(jobs, states, strict=True) if state == "gone"]
    for (reader, path, record), state in zip(jobs, states, strict=True):
        reader.known[path] = JobView(record=record, state=state)
    _add_endings(gone, patience_s, deep=history)
    if patience_s is not None:
        _add_waiting(jobs, states, patience_s)
    views: list[RunView | None] = []
    for each in found:
        if each is None:
            views.append(None)
            continue
        try:
            views.append(each.view())
        except UNREADABLE as error:
            views.append(None)
            problems.append(problem(each.run.run_json, error))
    return views, problems


def _add_endings(
    gone: Sequence[tuple[RunReader, Path, Record]], patience_s: float | None, *, deep: bool
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
    jobs: Sequence[tuple[RunReader, Path, Record]], states: Sequence[JobState], patience_s: float
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
