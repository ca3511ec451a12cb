"""Which part of the board somebody looks at: a protocol, a filter, an order. The same in every command."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from launcher.board.collect import Board, Row, Table
from launcher.board.columns import Column, columns
from launcher.board.filter import filtered
from selfguide.spec.suggest import nearest
from shards.errors import UserError


def chosen(
    board: Board,
    *,
    protocol: str | None = None,
    text: str = "",
    sort: str | None = None,
    reverse: bool = False,
) -> Board:
    """The board of one protocol, of the rows that a filter leaves, in the order of a column.

    Args:
        protocol: the beginning of a protocol's key, or the metric that it is named after; None for all.
        text: a filter, as `launcher.board.filter` reads it.
        sort: the id of a column, whose better end comes first; None for the rank.
        reverse: the other end first. Rows without a value come last either way.

    Raises:
        UserError: no table of that protocol, no column of that id, or a filter that is none.
    """  # fmt: skip
    if protocol is not None:
        board = replace(board, tables=_of_protocol(board.tables, protocol))
    board = filtered(board, text)
    if sort is None and not reverse:
        return board
    order = "rank" if sort is None else sort
    return replace(board, tables=tuple(_sorted(board.tables, order, reverse)))


def _of_protocol(tables: tuple[Table, ...], wanted: str) -> tuple[Table, ...]:
    found = tuple(t for t in tables if wanted in (t.key, t.protocol.get("metric")))
    found = found or tuple(t for t in tables if wanted and t.key.startswith(wanted))
    if not found and tables:
        known = dict.fromkeys([str(t.protocol.get("metric")) for t in tables])
        keys = ", ".join(f"{t.key[:8]} ({t.protocol.get('metric')})" for t in tables)
        raise UserError(
            f"--protocol {wanted!r} has no score{nearest(wanted, known)}; known: {keys}"
        )
    return found


def _sorted(tables: Iterable[Table], sort: str, reverse: bool) -> Iterable[Table]:
    tables = list(tables)
    shown = {table.key: {column.id: column for column in columns(table)} for table in tables}
    known = {name for each in shown.values() for name in each}
    if tables and sort not in known:
        raise UserError(
            f"--sort {sort!r} is no column{nearest(sort, known)}; known: {', '.join(sorted(known))}"
        )
    for table in tables:
        column = shown[table.key].get(sort)
        yield replace(table, rows=_by(table.rows, column, reverse)) if column else table


def _by(rows: tuple[Row, ...], column: Column, reverse: bool) -> tuple[Row, ...]:
    valued = [(column.value(row), row) for row in rows]
    able = [(value, row) for value, row in valued if value is not None]
    able.sort(key=lambda each: each[0], reverse=column.best_high != reverse)
    return (*(row for _, row in able), *(row for value, row in valued if value is None))
