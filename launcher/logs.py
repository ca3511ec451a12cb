"""`python -m launcher.logs RUN [-f]`: logs of the newest attempt's ranks, of its evaluations, or of its watcher."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launcher import backends
from launcher.folder import Attempt, evaluations, find, tail
from launcher.reconcile import decide
from launcher.reconcile.view import LOOK_S, read
from selfguide.spec.run import RunFolder, read_record
from shards import cli
from shards.errors import UserError

POLL_S = 0.5
_RANK = re.compile(r"_(\d+)_log\.out$")


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.json and options.follow:
        raise UserError("--json with --follow: a stream is no JSON object; drop one of them")
    run = find(options.run, Path(options.runs))
    at = Attempt.newest(run)
    if at is None:
        raise UserError(f"run {run.root.name} has no attempt yet; submit it")

    def chosen() -> list[Path]:
        if options.watcher:
            return [*([at.watch_log] if at.watch_log.exists() else []), *_logs(at.root / "watch")]
        if options.evaluation:
            return [log for folder in _evaluations(run) for log in _logs(folder)]
        return _of_ranks(at, options.rank)

    if options.json:
        texts = [{"path": str(path), "text": tail(path, options.lines)} for path in chosen()]
        print(json.dumps(texts, indent=1))
        return 0
    if options.follow:
        _stream(chosen, options.lines, lambda: _works(at))
        return 0
    found = chosen()
    for path in found:
        _heading(path, len(found))
        print(tail(path, options.lines))
    if not found:
        print(
            f"no log yet: the run is {decide.state(read(run, patience_s=LOOK_S)).word}",
            file=sys.stderr,
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launcher.logs",
        description="Shows the end of a run's logs: of rank 0 and of any rank that failed, by default.",
        epilog="example: python -m launcher.logs 3f2a -f",
    )
    parser.add_argument("run", help="id, beginning of an id, name, or folder of a run")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job has ended")
    parser.add_argument("--rank", type=int, metavar="N", help="only this rank")
    parser.add_argument(
        "--evaluation", action="store_true", help="logs of the evaluation jobs instead"
    )
    parser.add_argument("--watcher", action="store_true", help="log of the watcher instead")
    parser.add_argument("--lines", type=int, default=40, metavar="N", help="of each log (40)")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="where runs are (runs)")
    parser.add_argument("--json", action="store_true", help="a JSON list of {path, text}")
    return parser


def _of_ranks(at: Attempt, rank: int | None) -> list[Path]:
    """Rank 0 and the ranks that failed, or the one asked for."""
    found = {int(match[1]): path for path in _logs(at.logs) if (match := _RANK.search(path.name))}
    if rank is not None:
        if found and rank not in found:
            raise UserError(f"--rank {rank}: this attempt has ranks 0 to {max(found)}")
        return [found[rank]] if rank in found else []
    exits = {n: read_record(at.root / f"exit-{n}.json") for n in found}
    failed = [
        n
        for n, record in exits.items()
        if record and record["class"] not in ("ok", "preempted", "signal")
    ]
    return [found[n] for n in sorted({0, *failed}) if n in found]


def _logs(folder: Path) -> list[Path]:
    return sorted(folder.glob("*_log.out")) if folder.is_dir() else []


def _evaluations(run: RunFolder) -> list[Path]:
    root = evaluations(run)
    return sorted(root.iterdir()) if root.is_dir() else []


def _works(at: Attempt) -> bool:
    """Whether training or the watcher may still write."""
    there = [record for path in (at.job, at.watcher) if (record := read_record(path)) is not None]
    return any(state != "gone" for state in backends.states(there))


def _stream(chosen: Callable[[], list[Path]], lines: int, works: Callable[[], bool]) -> None:
    """Prints what is added to the chosen logs, also to those that appear later, until nobody writes any more."""
    positions: dict[Path, int] = {}
    last = None
    while True:
        more = works()  # before reading: what is written until then is still shown
        found = chosen()
        for path in found:
            if path not in positions:
                positions[path] = max(0, path.stat().st_size - len(tail(path, lines).encode()) - 1)
            with path.open("rb") as file:
                file.seek(positions[path])
                new = file.read()
            if new:
                if path != last:
                    _heading(path, len(found))
                sys.stdout.write(new.decode(errors="replace"))
                sys.stdout.flush()
                positions[path] += len(new)
                last = path
        if not more:
            return
        time.sleep(POLL_S)


def _heading(path: Path, of: int) -> None:
    if of > 1:
        print(f"==> {path} <==", flush=True)


if __name__ == "__main__":
    cli.run(main)
