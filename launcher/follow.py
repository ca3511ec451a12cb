"""Watching a run from a terminal: progress, and a line whenever something is published, started or scored.

It reads the same files as everybody else and owns nothing, so leaving it (Ctrl-C) leaves the run alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from launcher import clusters, status
from launcher.folder import Attempt
from launcher.status import Status
from selfguide.spec.records import EvaluationRecord, read_record_file, record_files
from selfguide.spec.run import RunFolder, read_record
from shards import cli

POLL_S = {"local": 0.5, "slurm": 5.0, "devcluster": 1.0}
PLAIN_S = 5.0  # between progress lines where there is no terminal
SLOW_DATA = 0.1  # of the time, above which waiting for data is told
ENDED = ("finished", "failed", "cancelled")


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one poll saw."""

    status: Status
    published: frozenset[int]
    started: dict[str, int]  # evaluation job -> images
    records: dict[str, EvaluationRecord]  # by file name, done or failed
    watching: bool
    poll_s: float


def follow(run: RunFolder, out: TextIO) -> int:
    """Streams until the run and its watcher are done; 0 when it finished, 1 when it did not, 130 on Ctrl-C."""
    try:
        last = _with_bar(run, out) if out.isatty() else _with_lines(run, out)
    except KeyboardInterrupt:
        print(
            f"\nno longer following; the run goes on. End it: python -m launcher.cancel {run.root}",
            file=out,
        )
        return 130
    told = last.status
    if told.state == "finished":
        score = (
            f", {told.metric} {told.score:.3g}" if told.metric and told.score is not None else ""
        )
        print(f"finished: {told.images:,} images{score}", file=out)
        failed = [r for r in last.records.values() if not r.done and r.final]
        return 1 if failed and told.score is None else 0
    print(f"{told.state}: {told.message or 'stopped before its last snapshot'}", file=out)
    print(f"  python -m launcher.logs {run.root}", file=out)
    return 1


def look(run: RunFolder) -> Look:
    """One poll of the run's folder and its cluster."""
    at = Attempt.newest(run)
    watcher = read_record(at.watcher) if at else None
    job = read_record(at.job) if at else None
    # the watcher first: what it did before it ended is then in the files read below
    watching = watcher is not None and clusters.state(watcher) in ("queued", "running")
    evaluations = status.evaluation_jobs(run)
    records = {path.stem: read_record_file(path) for path in record_files(run)}
    return Look(
        status=status.read(run),
        published=frozenset(run.published()),
        started={e.folder.name: e.images for e in evaluations},
        records=records,
        watching=watching,
        poll_s=POLL_S[job["kind"] if job else "local"],
    )


def news(before: Look | None, now: Look) -> list[str]:
    """What happened between two looks, oldest first; pure."""
    lines = []
    for images in sorted(now.published - (before.published if before else frozenset())):
        waits = "; its evaluation waits for a free slot" if now.watching else ""
        lines.append(f"snapshot at {images:,} images is published{waits}")
    for name in sorted(set(now.started) - set(before.started if before else ())):
        lines.append(f"evaluation of {now.started[name]:,} images has been submitted")
    for name in sorted(set(now.records) - set(before.records if before else ())):
        lines.append(_scored(now.records[name]))
    changed = before is None or before.status.state != now.status.state
    if changed and now.status.state not in ENDED:  # the end is told by `follow`, once all is told
        why = f": {now.status.message}" if now.status.message else ""
        lines.append(f"{now.status.state}{why}")
    return lines


def progress(now: Look) -> str:
    """One line: how far, how fast, how long, and what waits."""
    told = now.status
    parts = [f"{told.images:,} / {told.of:,} images"]
    if told.section and told.section != "train":
        parts.append(told.section)
    if told.images_per_s:
        parts.append(f"{told.images_per_s:,.0f} images/s")
    if told.eta_s is not None:
        parts.append(f"{minutes(told.eta_s)} left")
    if told.loss is not None:
        parts.append(f"loss {told.loss:.4g}")
    if told.data_share is not None and told.data_share > SLOW_DATA:
        parts.append(f"{told.data_share:.0%} waiting for data")
    return "  ".join([*parts, *waits(now)])


def waits(now: Look) -> list[str]:
    """How many evaluations work and how many snapshots wait behind them."""
    ended = {record.key for record in now.records.values()}
    working = {
        images for name, images in now.started.items() if name.rpartition(".")[0] not in ended
    }
    scored = {record.images for record in now.records.values()}
    behind = len(now.published - scored - working) if now.watching else 0
    return [
        *([f"{len(working)} evaluating"] if working and now.watching else []),
        *([f"{status.counted(behind, 'snapshot')} waiting for evaluation"] if behind else []),
    ]


def minutes(seconds: float) -> str:
    """1:23:45, or 1:23."""
    whole = int(seconds)
    clock = f"{whole // 60 % 60}:{whole % 60:02d}"
    return clock if whole < 3600 else f"{whole // 3600}:{clock.zfill(5)}"


def _scored(record: EvaluationRecord) -> str:
    if not record.done:
        return f"evaluation of {record.images:,} images failed: {record.message}"
    return f"{record.images:,} images: {record.metric} {record.score:.4g} ({record.seconds:.0f} s)"


def _until_done(run: RunFolder, show: Callable[[Look, list[str]], None]) -> Look:
    before = None
    while True:
        now = look(run)
        show(now, news(before, now))
        if now.status.state in ENDED and not now.watching:
            return now
        before = now
        time.sleep(now.poll_s)


def _with_lines(run: RunFolder, out: TextIO) -> Look:
    """For logs and pipes: news at once, progress every few seconds while it moves."""
    shown, since = "", -PLAIN_S

    def show(now: Look, lines: list[str]) -> None:
        nonlocal shown, since
        for line in lines:
            print(line, file=out, flush=True)
        text = progress(now)
        if text != shown and time.monotonic() - since >= PLAIN_S and now.status.state not in ENDED:
            print(text, file=out, flush=True)
            shown, since = text, time.monotonic()

    return _until_done(run, show)


def _with_bar(run: RunFolder, out: TextIO) -> Look:
    from rich.progress import BarColumn, Progress, TextColumn

    console = cli.console(stderr=out.name == "<stderr>")
    columns = (
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None)

        def show(now: Look, lines: list[str]) -> None:
            for line in lines:
                bar.print(line, highlight=False, markup=False)
            bar.update(
                task, completed=now.status.images, total=now.status.of, description=progress(now)
            )

        return _until_done(run, show)
