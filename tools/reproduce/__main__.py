"""Every table and figure of four papers: what trains its rows, what is published of them, and what they take.

    python -m tools.reproduce ls                             papers and their tables
    python -m tools.reproduce ls sgdm table2                 the rows of one
    python -m tools.reproduce show sgdm table2 in32-self     every command of one row, from raw data
    python -m tools.reproduce sgdm table2 --shrink digits    the whole table at toy size, from data to the board

docs/reproduce.md has all of it. A table that was ended goes on where it was: its runs are the launcher's, which joins
one that works, resumes one that stopped and leaves alone one that has finished. With --figure the same command draws
what is finished.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.compose import compose
from launcher.reconcile.decide import counted, minutes
from selfguide.spec.published import PAPERS, ROWS, Row, table, tables
from selfguide.spec.suggest import check_known
from shards import cli, storage
from shards.errors import UserError
from tools import flags
from tools.reproduce import page, steps
from tools.reproduce.cost import gpu_hours

VERBS = ("ls", "show", "run", "page")


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-") and words[0] not in VERBS:
        check_known("paper or verb", words[0], (*PAPERS, *VERBS))
        words = ["run", *words]
    options = _parser().parse_args(words)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = flags.command("tools.reproduce", __doc__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    paper: flags.Flag = ("paper", str, flags.REQUIRED, f"one of {', '.join(PAPERS)}")
    name: flags.Flag = ("table", str, flags.REQUIRED, "such as table2, figure3; ls names them")
    every: dict[str, tuple[str, Any, tuple[flags.Flag, ...]]] = {
        "ls": ("papers, the tables of one, or the rows of a table", _list, ()),
        "show": ("every command of a table or row, from raw data", _show, ()),
        "run": (
            "submit the rows of a table, and at toy size train them one after the other",
            _run,
            _RUN,
        ),
        "page": ("docs/reproduce.md", _page, (("--out FILE", str, None, "the page (stdout)"),)),
    }
    for verb, (text, run, own) in every.items():
        one = verbs.add_parser(verb, help=text, description=text)
        if verb != "page":
            for flag in (paper, name, ("row", str, None, "name of one row")):
                optional = verb == "ls" or flag[0] == "row"
                one.add_argument(flag[0], nargs="?" if optional else None, help=flag[3])
            flags.add(one, flags.JSON)
        flags.add(one, *own)
        one.set_defaults(run=run)
    return parser


_RUN: tuple[flags.Flag, ...] = (
    ("--shrink", ("digits",), None, "at toy size, on handwritten digits, on this machine"),
    ("--images N", int, 12_800, "images that a row at toy size sees (12,800)"),
    ("--runs DIR", str, None, "where its runs are (runs/reproduce/PAPER-TABLE)"),
    ("--toy DIR", str, "data/reproduce", "data and annotations of the toy (data/reproduce)"),
    ("--set KEY=VALUE*", str, (), "more settings of every row, such as cluster=lab nodes=4"),
    ("--figure FILE", str, None, "draw the rows that have a score, published numbers beside ours"),
)


def chosen(options: argparse.Namespace) -> tuple[Row, ...]:
    """The rows that were asked for.

    Raises:
        UserError: no such paper, table or row.
    """
    rows = table(options.paper, options.table)
    if options.row is None:
        return rows
    check_known("row", options.row, [row.name for row in rows])
    return tuple(row for row in rows if row.name == options.row)


def _list(options: argparse.Namespace) -> int:
    if options.paper is None:
        found: Any = {
            paper: {"title": title, "tables": tables(paper)} for paper, title in PAPERS.items()
        }
        lines = [
            f"{paper:<8} {each['title']}\n         {', '.join(each['tables'])}"
            for paper, each in found.items()
        ]
        lines.append(_counted(ROWS))
    elif options.table is None:
        found = {name: len(table(options.paper, name)) for name in tables(options.paper)}
        lines = [f"{name:<12} {_counted(table(options.paper, name))}" for name in found]
    else:
        found = [_plain(row) for row in chosen(options)]
        lines = [
            f"{each['row']:<28} {each['published']:<44} {each['experiment'] or each['command'] or ''}"
            + (f"  not yet: {each['lacks']}" if each["lacks"] else "")
            for each in found
        ]
    print(json.dumps(found) if options.json else "\n".join(lines))
    return 0


def _counted(rows: Sequence[Row]) -> str:
    runs = sum(bool(row.settings) and not row.lacks for row in rows)
    lacking = sum(bool(row.lacks) for row in rows)
    of_runs = len(rows) - runs - lacking
    return f"{counted(len(rows), 'row')}: {counted(runs, 'run')}, {of_runs} of finished runs, {lacking} not yet"


def _plain(row: Row) -> dict[str, Any]:
    return {
        "row": row.name,
        "experiment": row.experiment,
        "overrides": list(row.overrides),
        "protocol": list(row.protocols) if row.settings else [],
        "expected": dict(row.numbers),
        "published": page.published(row),
        "source": row.source,
        "command": row.command,
        "lacks": row.lacks,
        "differs": row.differs,
    }


def _show(options: argparse.Namespace) -> int:
    found = []
    for row in chosen(options):
        each = _plain(row)
        if row.settings:
            config = compose([*row.settings, "cluster=slurm"])
            each["steps"] = [one.text for one in steps.before(config)]
            each["command"] = steps.training(row)
            each["gpu_hours"] = round(gpu_hours(config), 1)
        found.append(each)
    print(json.dumps(found) if options.json else "\n\n".join(map(_shown, found)))
    return 0


def _shown(each: dict[str, Any]) -> str:
    lines = [f"# {each['row']}: {each['published'] or 'no number is printed'}"]
    if each["lacks"]:
        lines.append(f"# not yet: {each['lacks']}")
    if each["differs"]:
        lines.append(f"# {each['differs']}")
    lines += [*each.get("steps", ()), each["command"] or "# nothing here makes it"]
    if "gpu_hours" in each:
        lines.append(f"# {each['gpu_hours']:,} GPU-hours of an H100 at 40 % of its peak")
    return "\n".join(lines)


def _page(options: argparse.Namespace) -> int:
    if options.out is None:
        print(page.text(), end="")
    else:
        storage.publish(options.out, page.text().encode(), replace=True)
    return 0


def _run(options: argparse.Namespace) -> int:
    """Submits each row, follows it at toy size; then the board. A row that lacks something is named and left out."""
    rows = [row for row in chosen(options) if row.settings and not row.lacks]
    for row in chosen(options):
        if row.lacks or row.command:
            print(f"{row.key} is left out: {row.lacks or row.command}", file=sys.stderr)
    if not rows:
        raise UserError(
            f"{options.paper} {options.table} has no row that is a run here; what its rows are made of is said by "
            f"`python -m tools.reproduce show {options.paper} {options.table}`"
        )
    runs = options.runs or f"runs/reproduce/{options.paper}-{options.table}"
    runs_of: dict[tuple[str, ...], Row] = {}
    for row, words in zip(rows, _settings(rows, options), strict=True):
        first = runs_of.setdefault((*words, *options.set, f"runs={runs}"), row)
        if first is not row:
            print(f"{row.key} is the same run as {first.key}", file=sys.stderr)
    failed = _trained(runs_of, options)
    # a dry run makes none
    board = 0
    if Path(runs).is_dir():
        board = _called(
            ["launcher.board", "--runs", runs, *(["--json"] if options.json else [])], False
        )
    if options.figure:
        _drawn(runs_of, options)
    if failed:
        print(f"{len(failed)} of {len(runs_of)} rows failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed or board else 0


def _trained(runs_of: Mapping[tuple[str, ...], Row], options: argparse.Namespace) -> list[str]:
    """Submits the run of each row, at toy size to its last score; returns the rows that failed."""
    # a run at full size takes days, and its cluster trains several
    follow = ["follow=true"] if options.shrink else []
    failed: list[str] = []
    taken: list[float] = []
    waiting = {each: row for each, row in runs_of.items() if not (follow and _scored(row, each))}
    if ready := len(runs_of) - len(waiting):
        print(f"{ready} of {len(runs_of)} rows have their score already", file=sys.stderr)
    for number, (words, row) in enumerate(waiting.items()):
        left = (len(waiting) - number) * sum(taken) / max(len(taken), 1)
        about = f", about {minutes(left)} left" if follow and taken else ""
        name = f"row {ready + number + 1} of {len(runs_of)}: {row.key}"
        print(f"{name}{about}", file=sys.stderr, flush=True)
        started = time.monotonic()
        if _called(["launcher.submit", *words, *follow], options.json):
            failed.append(row.key)
        taken.append(time.monotonic() - started)
    return failed


def _scored(row: Row, words: Sequence[str]) -> bool:
    """Whether the run of these words has a score of its last snapshot."""
    from tools.reproduce import picture

    try:
        picture.finished(row, words)
    except UserError:
        return False
    return True


def _drawn(runs_of: Mapping[tuple[str, ...], Row], options: argparse.Namespace) -> None:
    """The picture of the rows that have a score."""
    from tools.reproduce import picture

    rows = []
    for words, row in runs_of.items():
        try:
            rows.append(picture.finished(row, words))
        except UserError as error:
            print(f"{row.key} is not drawn: {error}", file=sys.stderr)
    name = f"{PAPERS[options.paper].partition(':')[0]}, {options.table}"
    toy = f"{options.images:,} images of 8 x 8 digits, a small network"
    here = f"here: {toy}" if options.shrink else "here: as the paper trains it"
    picture.draw(rows, f"{name}: published at full size; {here}", Path(options.figure))
    print(f"wrote {options.figure}", file=sys.stderr)


def _settings(rows: Sequence[Row], options: argparse.Namespace) -> list[list[str]]:
    """What is typed for each row; of toys, once their data and annotations are there."""
    if options.shrink is None:
        return [list(row.settings) for row in rows]
    # needs torch, and to list or show does not
    from tools.reproduce.shrink import Toy

    flags.check_least(options, 256, "images")
    toy = Toy(Path(options.toy), options.images)
    toy.prepare()
    return [toy.settings(row) for row in rows]


def _called(words: Sequence[str], quiet: bool) -> int:
    """The exit code of one of our commands, whose output is shown; on stderr with `quiet`, for what reads stdout."""
    return subprocess.run(
        [sys.executable, "-m", *words], stdout=sys.stderr if quiet else None
    ).returncode


if __name__ == "__main__":
    cli.run(main)
