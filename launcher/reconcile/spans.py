"""When the jobs of runs had their nodes, as schedulers say; kept in the runs' folders, for accounting forgets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from launcher import backends
from launcher.backends import Span
from launcher.reconcile.view import LOOK_S, JobView, RunView
from selfguide.spec.run import read_record, write_record


def measured(views: Sequence[RunView], *, ask: bool = True) -> list[RunView]:
    """Returns views with the spans of their jobs, for which every scheduler is asked once.

    What it said of a job that is gone is kept beside the job's record: accounting forgets.

    Args:
        ask: also where it is not kept; a scheduler takes its time.
    """
    jobs = {path: job for view in views for path, job in _records(view)}
    known = {path: spans for path in jobs if (spans := _kept(path)) is not None}
    silent = [path for path in jobs if path not in known and (not ask or _silent(jobs[path]))]
    known |= dict.fromkeys(silent, ())
    asked = [path for path in jobs if path not in known]
    answers = backends.spans([jobs[path].record for path in asked], LOOK_S) if asked else []
    for path, spans in zip(asked, answers, strict=True):
        known[path] = spans
        over = spans and all(span.end is not None for span in spans)
        if over and jobs[path].state == "gone" and jobs[path].record["kind"] != "local":
            # another's run, or another command at this moment
            with contextlib.suppress(OSError):
                write_record(spans_path(path), {"spans": [asdict(span) for span in spans]})
    return [_with(view, known) for view in views]


def _records(view: RunView) -> Iterator[tuple[Path, JobView]]:
    """The jobs of a run, each with the file of its record."""
    found = [(each.folder / "job.json", each.job) for each in view.evaluations]
    for at in view.attempts:
        found.append((at.files.job, at.job))
        found.append((at.files.successor, at.successor))
        found.append((at.files.watcher, at.watcher))
        former = at.former_watchers.items()
        found += [(at.files.former_watcher(number), job) for number, job in former]
    yield from ((path, job) for path, job in found if job is not None)


def _silent(job: JobView) -> bool:
    """Whether its scheduler has just not answered for it."""
    return job.state == "unknown" and job.record["kind"] != "local"


def spans_path(job: Path) -> Path:
    """Returns where it is kept when a job had its nodes, beside the job's record."""
    return job.with_name(f"spans-{job.name}")


def _kept(job: Path) -> tuple[Span, ...] | None:
    try:
        found = read_record(spans_path(job))
        return None if found is None else tuple(Span(**each) for each in found["spans"])
    except (OSError, ValueError, KeyError, TypeError):  # asked again
        return None


def _with(view: RunView, spans: Mapping[Path, tuple[Span, ...]]) -> RunView:
    def of(job: JobView | None, path: Path) -> JobView | None:
        return replace(job, spans=spans[path]) if job is not None else None

    attempts = tuple(
        replace(
            at,
            job=of(at.job, at.files.job),
            successor=of(at.successor, at.files.successor),
            watcher=of(at.watcher, at.files.watcher),
            former_watchers={
                number: replace(job, spans=spans[at.files.former_watcher(number)])
                for number, job in at.former_watchers.items()
            },
        )
        for at in view.attempts
    )
    evaluations = tuple(
        replace(each, job=of(each.job, each.folder / "job.json")) for each in view.evaluations
    )
    return replace(view, attempts=attempts, evaluations=evaluations)
