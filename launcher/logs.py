"""`python -m launcher.logs RUN [-f]`: what the ranks of an attempt wrote, or its evaluations, or its watcher.

Lines of several processes are merged by their time and say whose they are. Following goes on into the next attempt.
"""

from __future__ import annotations

import argparse
import heapq
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher import backends
from launcher.folder import Attempt, evaluations, find, tail, takes_run
from launcher.reconcile import decide
from launcher.reconcile.view import LOOK_S, read
from selfguide.spec.run import RunFolder, read_record
from shards import cli
from shards.errors import UserError

# between two looks at the logs; schedulers are asked at their backend's own pace
POLL_S = 0.5
_RANK = re.compile(r"_(\d+)_log\.out$")
# what our messages begin with; other lines belong to the message before them
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")

# path of a log -> whose it is
Logs = Mapping[Path, str]


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.json and options.follow:
        raise UserError("--json with --follow: a stream is no JSON object; drop one of them")
    run = find(options.run, Path(options.runs))
    if options.follow:
        _Stream(options.lines).follow(run, options)
        return 0
    at = _attempt(run, options.attempt)
    found = _chosen(at, options)
    texts = {path: tail(path, options.lines) for path in found}
    if options.json:
        rows = [
            {"path": str(path), "attempt": at.number, "of": found[path], "text": text}
            for path, text in texts.items()
        ]
        print(json.dumps(rows, indent=1))
        return 0
    if len(found) > 1:
        for path, label in found.items():
            print(f"{label}: {path}")
    for line in merged(_by_label(found, lambda path: texts[path].splitlines())):
        print(line)
    if not found:
        state = decide.state(read(run, patience_s=LOOK_S)).word
        print(f"no log yet: the run is {state}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "launcher.logs",
        "Shows the end of a run's logs: of rank 0 and of any rank that failed, by default. Lines of several\n"
        "ranks are merged by their time. -f goes on, also into the next attempt, until the run has ended.",
        "3f2a -f --rank all",
    )
    takes_run(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the run has ended")
    parser.add_argument("--attempt", type=int, metavar="N", help="of this attempt only (newest)")
    parser.add_argument("--rank", metavar="N", help="only this rank; all for every rank")
    parser.add_argument(
        "--evaluation", action="store_true", help="logs of the evaluation jobs instead"
    )
    parser.add_argument("--watcher", action="store_true", help="log of the watcher instead")
    parser.add_argument("--lines", type=int, default=40, metavar="N", help="of each log (40)")
    return parser


def merged(texts: Mapping[str, Iterable[str]]) -> Iterator[str]:
    """Yields the lines of several logs in the order of their times, with whose they are in front where it matters.

    A line without a time stays behind the one before it; equal times keep the order of the logs.
    """
    label = "{} | " if len(texts) > 1 else ""

    def timed(number: int, of: str, lines: Iterable[str]) -> Iterator[tuple[str, int, int, str]]:
        now = ""
        for count, line in enumerate(lines):
            found = _TIME.match(line)
            now = max(now, found[0]) if found else now
            yield now, number, count, label.format(of) + line

    streams = [timed(number, of, lines) for number, (of, lines) in enumerate(texts.items())]
    return (line for *_, line in heapq.merge(*streams))


def _attempt(run: RunFolder, number: int | None) -> Attempt:
    known = run.attempt_numbers()
    if not known:
        raise UserError(f"run {run.root.name} has no attempt yet; submit it")
    if number is not None and number not in known:
        raise UserError(f"--attempt {number}: run {run.root.name} has 1 to {known[-1]}")
    return Attempt(run.attempt(known[-1] if number is None else number))


def _chosen(at: Attempt, options: argparse.Namespace) -> Logs:
    """The logs that were asked for, and whose they are."""
    if options.watcher:
        own = [at.watch_log] if at.watch_log.exists() else []
        return dict.fromkeys([*own, *_logs(at.root / "watch")], "watcher")
    if options.evaluation:
        root = evaluations(at.run)
        folders = sorted(root.iterdir()) if root.is_dir() else []
        return {log: folder.name for folder in folders for log in _of_evaluation(folder)}
    return {path: f"rank {rank}" for rank, path in _of_ranks(at, options.rank).items()}


def _of_evaluation(folder: Path) -> list[Path]:
    """The logs of an evaluation job's ranks; those of an array's jobs lie together."""
    record = read_record(folder / "job.json")
    if record is None or Path(record["folder"]) == folder:
        return _logs(folder)
    return sorted(Path(record["folder"]).glob(f"{record['id']}_*_log.out"))


def _of_ranks(at: Attempt, wanted: str | None) -> dict[int, Path]:
    """Rank 0 and the ranks that failed, or those asked for."""
    numbered = {
        int(match[1]): path for path in _logs(at.logs) if (match := _RANK.search(str(path)))
    }
    found = dict(sorted(numbered.items()))
    if wanted == "all":
        return found
    if wanted is not None:
        rank = int(wanted) if wanted.isdigit() else -1
        if rank < 0 or (found and rank not in found):
            raise UserError(f"--rank {wanted}: this attempt has ranks 0 to {max(found, default=0)}")
        return {rank: found[rank]} if rank in found else {}
    exits = {rank: read_record(at.root / f"exit-{rank}.json") for rank in found}
    failed = {
        rank
        for rank, record in exits.items()
        if record and record["class"] not in ("ok", "preempted", "signal")
    }
    return {rank: found[rank] for rank in found if rank in {0, *failed}}


def _by_label(found: Logs, lines: Callable[[Path], list[str]]) -> dict[str, list[str]]:
    """The lines of each process, one log after another where it has several."""
    texts: dict[str, list[str]] = {label: [] for label in found.values()}
    for path, label in found.items():
        texts[label] += lines(path)
    return texts


def _logs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*_log.out")) if folder.is_dir() else []


@dataclass
class _Stream:
    """Prints what is added to logs, also to those that appear later."""

    # of each log that is there at the beginning
    lines: int
    positions: dict[Path, int] = field(default_factory=dict)

    def follow(self, run: RunFolder, options: argparse.Namespace) -> None:
        """Goes on until nobody writes any more."""
        at = _attempt(run, options.attempt)
        asked = -float("inf")
        more = True
        while more:
            pace = _pace(at)
            if time.monotonic() - asked >= pace:
                # before reading: what is written until then is still shown
                more, asked = _goes_on(run, at, options), time.monotonic()
            self._show(at, lambda at: _chosen(at, options), last=not more)
            newest = _attempt(run, options.attempt)
            if newest.number != at.number:
                self._show(at, lambda at: _chosen(at, options), last=True)
                # whoever writes into the new one has not been asked about yet
                at, more, asked = newest, True, -float("inf")
                print(f"---- attempt {at.number} ----", flush=True)
            elif more:
                time.sleep(POLL_S)

    def _show(self, at: Attempt, chosen: Callable[[Attempt], Logs], *, last: bool) -> None:
        """Prints the new whole lines of an attempt's logs, and at last also one that has no end."""
        found = chosen(at)
        for line in merged(_by_label(found, lambda path: self._new(path, last))):
            print(line)
        sys.stdout.flush()

    def _new(self, path: Path, last: bool) -> list[str]:
        if path not in self.positions:
            kept = len(tail(path, self.lines).encode())
            self.positions[path] = max(0, path.stat().st_size - kept - 1)
        with path.open("rb") as file:
            file.seek(self.positions[path])
            new = file.read()
        whole = new if last else new[: new.rfind(b"\n") + 1]
        self.positions[path] += len(whole)
        return whole.decode(errors="replace").splitlines()


def _pace(at: Attempt) -> float:
    """Seconds between two questions to the scheduler of an attempt."""
    record = read_record(at.job)
    return backends.of_record(record).poll_s if record else POLL_S


def _goes_on(run: RunFolder, at: Attempt, options: argparse.Namespace) -> bool:
    """Whether somebody may still write into the logs that were asked for."""
    there = [record for path in (at.job, at.watcher) if (record := read_record(path)) is not None]
    if any(state != "gone" for state in backends.states(there)):
        return True
    if options.attempt is not None or options.watcher or options.evaluation:
        return False
    view = read(run, patience_s=LOOK_S)
    following = view.newest and view.newest.successor
    return decide.next_attempt(view).action != "stop" and bool(following and following.works)


if __name__ == "__main__":
    cli.run(main)
