"""`python -m launcher.board`: the leaderboard in the terminal, and as one HTML file beside the runs."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import rich.box
import rich.table
from rich.console import JustifyMethod
from rich.text import Text

from launcher.board.collect import Board, Row, Table, chips, collect
from launcher.board.columns import columns
from launcher.board.page import summary, write
from launcher.board.read import read_runs
from shards import cli, storage
from shards.errors import UserError

START = "python -m launcher.submit experiment=digits_dit"
PIPE_WIDTH = 200
WORDS, WRAP = ("experiment", "state"), 20  # columns that may wrap once they are wider
DISPENSABLE = (
    "nfe",
    "classes",
    "gpu_hours",
    "seconds",
    "ari",
    "images",
    "floor",
    "copy_rate",
    "confident",
    "nmi",
)


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser("launcher.board", __doc__, "--runs runs --json")
    parser.add_argument(
        "--runs",
        type=storage.expanded,
        default=Path("runs"),
        help="folder of the runs (default: runs)",
    )
    parser.add_argument(
        "--out",
        type=storage.expanded,
        help="the page to write (default: board.html in that folder)",
    )
    parser.add_argument("--metric", help="score to rank by (default: the one each protocol names)")
    parser.add_argument("--json", action="store_true", help="print the board as one JSON object")
    args = parser.parse_args(argv)
    if not args.runs.is_dir():
        raise UserError(
            f"--runs {str(args.runs)!r} is no folder; name the runs' folder, or start one: {START}"
        )
    out = args.out or args.runs / "board.html"
    if out.is_dir():
        raise UserError(f"--out {str(out)!r} is a folder; name the HTML file to write")
    board = collect(*read_runs(args.runs), metric=args.metric)
    write(board, out, built=time.time())
    if args.json:
        print(json.dumps({"page": str(out), **as_json(board)}, indent=1, allow_nan=False))
    else:
        show(board, args.runs)
        print(out)
    return 0


def as_json(board: Board) -> dict[str, Any]:
    """The board in plain values; what a page shows of a run, without its curves."""
    return {
        "heard": board.heard,
        "problems": list(board.problems),
        "tables": [
            {
                "protocol_key": table.key,
                "protocol": dict(table.protocol),
                "metric": table.metric,
                "higher_is_better": table.higher_is_better,
                "rows": [_row_json(row) for row in table.rows],
            }
            for table in board.tables
        ],
        "waiting": [
            {"run": run.id, "experiment": run.experiment, "seed": run.seed} for run in board.waiting
        ],
    }


def _row_json(row: Row) -> dict[str, Any]:
    plain = {
        f.name: getattr(row, f.name)
        for f in dataclasses.fields(row)
        if f.name not in ("runs", "chips")
    }
    return {
        **plain,
        "variant": list(row.variant),
        "score": row.score and dataclasses.asdict(row.score),
        "scores": {name: dataclasses.asdict(spread) for name, spread in row.scores.items()},
        "states": [chip.label for chip in row.chips],
        "runs": [
            {
                "run": s.run.id,
                "seed": s.run.seed,
                "folder": str(s.run.root),
                "images": s.headline.images if s.headline else None,
                "scores": dict(s.headline.scores) if s.headline else {},
                "snapshot_sha256": s.headline.snapshot_sha256 if s.headline else None,
            }
            for s in row.runs
        ],
    }


def show(board: Board, runs: Path) -> None:
    """The board in the terminal; a pipe gets every column, whatever its width."""
    console = cli.console()
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    for table in board.tables:
        console.print(_terminal(table, console.width))
    for run in board.waiting:
        states = ", ".join(f"{chip.label} ({chip.detail})" for chip in chips(run))
        console.print(Text(f"no score yet: {run.root}: {states}"), soft_wrap=True)
    for problem in board.problems:
        console.print(Text(f"warning: {problem}"), soft_wrap=True)
    if not board.tables and not board.waiting:
        console.print(Text(f"no runs in {runs}; start one with `{START}`"), soft_wrap=True)


def _terminal(table: Table, width: int) -> rich.table.Table:
    """The table in at most `width` characters: what matters least goes first, and a line says so."""
    heads, body = _texts(table)
    needed = {name: max(len(line[name]) for line in (heads, *body)) + 3 for name in heads}
    needed |= {name: min(needed[name], WRAP) for name in WORDS}
    missing = []
    for name in DISPENSABLE:
        if sum(needed.values()) >= width and name in needed:
            del needed[name]
            missing.append(heads[name])
    drawn = rich.table.Table(
        title=Text(f"{summary(table.protocol)} (protocol {table.key})"),
        title_justify="left",
        caption=Text(f"a wider terminal also shows: {', '.join(missing)}") if missing else None,
        caption_justify="left",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 1),
    )
    for name in needed:
        side: JustifyMethod = "left" if name in WORDS else "right"
        drawn.add_column(heads[name], justify=side, no_wrap=name not in WORDS, overflow="fold")
    for line in body:
        drawn.add_row(*(Text(line[name]) for name in needed))
    return drawn


def _texts(table: Table) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Head and rows of the table, by column id."""
    shown = columns(table)
    heads = {column.id: column.label for column in shown} | {"state": "state"}
    body = []
    for row in table.rows:
        line = {column.id: " ".join(filter(None, column.text(row))) for column in shown}
        line["experiment"] += "" if row.label_free else " (uses labels)"
        line["state"] = ", ".join(chip.label for chip in row.chips)
        body.append(line)
    return heads, body


if __name__ == "__main__":
    cli.run(main)
