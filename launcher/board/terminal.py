"""The board's tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import rich.box
import rich.table
from rich.console import JustifyMethod
from rich.text import Text

from launcher.board import others
from launcher.board.collect import Board, Table
from launcher.board.columns import NOTHING, columns, number
from launcher.board.page import summary
from launcher.board.states import chips
from shards import cli

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


def show(board: Board, runs: Path, text: str = "") -> None:
    """The board in the terminal; a pipe gets every column, whatever its width. `text` is the filter of its rows."""
    console = cli.console()
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    for table in board.tables:
        if table.rows:
            console.print(_terminal(table, console.width))
        else:
            console.print(Text(_title(table)))
        for line in _of_others(table):
            console.print(Text(line), soft_wrap=True)
    for run in board.waiting:
        states = ", ".join(f"{chip.label} ({chip.detail})" for chip in chips(run))
        console.print(Text(f"no score yet: {run.root}: {states}"), soft_wrap=True)
    for problem in board.problems:
        console.print(Text(f"warning: {problem}"), soft_wrap=True)
    if not board.tables and not board.waiting:
        none = (
            f"no row for --filter {text!r}"
            if text
            else f"no runs in {runs}; start one with `{START}`"
        )
        console.print(Text(none), soft_wrap=True)


def _title(table: Table) -> str:
    return f"{summary(table.protocol)} (protocol {table.key})"


def _of_others(table: Table) -> Iterator[str]:
    """Lines below a table for others' samples that were measured alike; none where there are none."""
    if not table.others:
        return
    yield f"{others.TITLE} (a place and no rank, for how they were drawn is not known):"
    for other in table.others:
        place = NOTHING if other.place is None else other.place
        error = f" ± {number(other.error)}" if other.error else ""
        note = f" ({other.record.note})" if other.record.note else ""
        yield f"  {other.name}: place {place}, {table.metric} {number(other.score)}{error}{note}"
    yield ""


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
        title=Text(_title(table)),
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
