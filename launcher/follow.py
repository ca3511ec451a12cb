"""Watching a run from a terminal: progress, and a line whenever something is published, started or scored.

It reads the same files as everybody else and owns nothing, so leaving it (Ctrl-C) leaves the run alone.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from typing import TextIO

from launcher import backends
from launcher.reconcile import decide
from launcher.reconcile.decide import counted, minutes
from launcher.reconcile.view import RunView, read
from selfguide.spec.advice import Advice, recorded
from selfguide.spec.records import EvaluationRecord
from selfguide.spec.run import RunFolder
from shards import cli

# between progress lines where there is no terminal, and where there is no progress
PLAIN_S, STILL_S = 5.0, 60.0
# of older advice, when somebody begins to look
LAST_ADVICE = 3
SLOW_DATA = 0.1  # of the time, above which waiting for data is shown


def follow(run: RunFolder, out: TextIO) -> int:
    """Streams until the run and its watcher are done; 0 when it finished, 1 when it did not, 130 on Ctrl-C."""
    try:
        last = _with_bar(run, out) if out.isatty() else _with_lines(run, out)
    except KeyboardInterrupt:
        print(
            f"\nno longer following; the run goes on. End it: python -m launcher.cancel {shlex.quote(str(run.root))}",
            file=out,
        )
        return 130
    state, newest = decide.state(last), decide.newest_score(last)
    if state.word == "finished":
        score = f", {newest.metric} {newest.score:.3g}" if newest and newest.score else ""
        lacks = f"; {state.reason}" if state.reason else ""
        print(f"finished: {last.images:,} images{score}{lacks}", file=out)
        failed = [record for record in last.records if not record.done and record.final]
        return 1 if failed and not newest else 0
    print(f"{state.word}: {state.reason or 'stopped before its last snapshot'}", file=out)
    print(f"  python -m launcher.logs {shlex.quote(str(run.root))}", file=out)
    return 1


def news(before: RunView | None, now: RunView) -> list[str]:
    """Returns what happened between two views, oldest first."""
    lines = []
    for images in sorted(set(now.published) - set(before.published if before else ())):
        waits = "; its evaluation waits for a free slot" if decide.watched(now) else ""
        lines.append(f"snapshot at {images:,} images is published{waits}")
    known = {each.name for each in before.evaluations} if before else set()
    for each in now.evaluations:
        if each.name not in known:
            lines.append(f"evaluation of {each.images:,} images has been submitted")
    seen = {(record.key, record.attempt) for record in before.records} if before else set()
    lines += [_outcome(each) for each in now.records if (each.key, each.attempt) not in seen]
    state = decide.state(now)
    # how it ended is said by `follow`, once all else is said
    if state.word not in decide.ENDED and (
        before is None or decide.state(before).word != state.word
    ):
        lines.append(f"{state.word}: {state.reason}" if state.reason else state.word)
    return lines


def progress(now: RunView) -> str:
    """Returns one line: how far, how fast, how long, and what waits."""
    at = decide.progress(now)
    parts = [f"{at.images:,} / {at.of:,} images"]
    if at.section and at.section != "train":
        parts.append(at.section)
    if (state := decide.state(now)).word == "running" and state.reason:
        parts.append(state.reason)
    if at.images_per_s:
        parts.append(f"{at.images_per_s:,.0f} images/s")
    if at.eta_s is not None:
        parts.append(f"{minutes(at.eta_s)} left")
    if at.loss is not None:
        parts.append(f"loss {at.loss:.4g}")
    if at.data_share is not None and at.data_share > SLOW_DATA:
        parts.append(f"{at.data_share:.0%} waiting for data")
    return "  ".join([*parts, *waiting(now)])


def waiting(now: RunView) -> list[str]:
    """Returns how many evaluations work and how many snapshots wait behind them."""
    if not decide.watched(now):
        return []
    ended = {record.key for record in now.records}
    working = {each.images for each in now.evaluations if each.key not in ended}
    behind = len(set(now.published) - {record.images for record in now.records} - working)
    return [
        *([f"{len(working)} evaluating"] if working else []),
        *([f"{counted(behind, 'snapshot')} waiting for evaluation"] if behind else []),
    ]


def advice(run: RunFolder) -> list[Advice]:
    """Returns what training said goes wrong, oldest first; without a line that is being written."""
    try:
        return recorded(run.metrics)
    except (OSError, ValueError, KeyError):
        return []


def _outcome(record: EvaluationRecord) -> str:
    if record.status == "skipped":
        return f"{record.images:,} images are not scored: {record.message}"
    if not record.done:
        return f"evaluation of {record.images:,} images failed: {record.message}"
    return f"{record.images:,} images: {record.metric} {record.score:.4g} ({record.seconds:.0f} s)"


def _until_done(run: RunFolder, show: Callable[[RunView, list[str]], None]) -> RunView:
    before, said = None, 0
    while True:
        now = read(run)
        given = advice(run)
        lines = [f"advice at {each.images:,} images: {each.text}" for each in given[said:]]
        show(now, [*lines[-LAST_ADVICE:], *news(before, now)])
        said = max(said, len(given))
        # a run has finished with its last snapshot, and its job a moment later with its last checkpoint
        works = decide.watched(now) or decide.training_state(now) in ("queued", "running")
        if decide.state(now).word in decide.ENDED and not works:
            return now
        before = now
        job = now.newest.job if now.newest else None
        time.sleep(backends.of_record(job.record).poll_s if job else PLAIN_S)


def _with_lines(run: RunFolder, out: TextIO) -> RunView:
    """For logs and pipes: news at once, progress every few seconds while it moves."""
    shown, since = "", -PLAIN_S

    def show(now: RunView, lines: list[str]) -> None:
        nonlocal shown, since
        for line in lines:
            print(line, file=out, flush=True)
        text = progress(now)
        # for how long nothing has moved changes all the time
        pause = STILL_S if decide.state(now).reason else PLAIN_S
        due = time.monotonic() - since >= pause
        if text != shown and due and decide.state(now).word not in decide.ENDED:
            print(text, file=out, flush=True)
            shown, since = text, time.monotonic()

    return _until_done(run, show)


def _with_bar(run: RunFolder, out: TextIO) -> RunView:
    from rich.progress import BarColumn, Progress, TextColumn

    console = cli.console(stderr=out.name == "<stderr>")
    columns = (
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=None)

        def show(now: RunView, lines: list[str]) -> None:
            for line in lines:
                bar.print(line, highlight=False, markup=False)
            images = decide.progress(now).images
            bar.update(task, completed=images, total=now.images, description=progress(now))

        return _until_done(run, show)
