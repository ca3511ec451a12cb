"""The board's columns: what a cell says and what it sorts by, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launcher.board.collect import HIGHER_IS_BETTER, Row, Spread, Table

NOTHING = "\N{EN DASH}"

NOTES = {
    "fd_digits": "Frechet distance to real digits in the features of a small digit net; lower is better",
    "floor": "the same distance between the two halves of the real data: what a perfect model would reach",
    "copy_rate": "share of samples nearer to a real image than 1 % of real images are; then that of real ones",
    "nmi": "normalised mutual information of the groups found with the true labels",
    "ari": "adjusted Rand index of the groups found with the true labels",
    "confident": "share of samples with at least 0.9 on the digit net's top class",
    "classes": "how many of the classes occur among the samples",
}


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column; `value` is None where a row has nothing to show, and sorts last either way.

    `text` gives what the cell says and, quieter, what qualifies it: ("7.21", "± 0.34").
    """

    id: str
    label: str
    note: str
    text: Callable[[Row], tuple[str, str]]
    value: Callable[[Row], float | None]
    best_high: bool = False  # a first click sorts downwards
    numeric: bool = True


def _form(value: float) -> str:
    """About three significant figures, as people read scores."""
    size = abs(value)
    return (
        ",.0f"
        if size >= 1000
        else ".1f"
        if size >= 100
        else ".2f"
        if size >= 0.01 or not size
        else ".1e"
    )


def number(value: float | None) -> str:
    return NOTHING if value is None else format(value, _form(value))


def spread(value: Spread | None) -> tuple[str, str]:
    """Mean, and ± standard deviation over seeds to the same decimals; the mean alone for one seed."""
    if value is None:
        return NOTHING, ""
    form = _form(value.mean)
    return format(value.mean, form), "" if value.sd is None else f"± {format(value.sd, form)}"


def percent(value: Spread | None) -> str:
    return NOTHING if value is None else f"{100 * value.mean:.1f} %"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def rank(row: Row) -> str:
    """=2 is a shared second place."""
    return NOTHING if row.rank is None else f"={row.rank}" if row.tied else f"{row.rank}"


def columns(table: Table) -> tuple[Column, ...]:
    """The columns of a table, left to right; those no row has a value for are left out."""
    order = {row.group: i for i, row in enumerate(sorted(table.rows, key=_name))}
    found = (
        Column(
            id="rank",
            label="rank",
            note="1 + the rows in better tiers; = marks gaps within the standard error",
            text=lambda row: (rank(row), ""),
            value=lambda row: row.rank,
        ),
        Column(
            id="experiment",
            label="experiment",
            note="runs that differ in their seed only are one row",
            text=lambda row: (row.experiment, " ".join(row.variant)),
            value=lambda row: order[row.group],
            numeric=False,
        ),
        Column(
            id="seeds",
            label="seeds",
            note="training seeds behind the score, of those there are",
            text=_seeds,
            value=lambda row: row.seeds,
            best_high=True,
        ),
        _score(table.metric, table.metric, lambda row: spread(row.score)),
        *_others(table.metric),
        Column(
            id="images",
            label="images",
            note="images trained on when the score was taken",
            text=lambda row: (f"{row.images:,}", ""),
            value=lambda row: row.images,
            best_high=True,
        ),
        Column(
            id="nfe",
            label="NFE",
            note="network evaluations per sample",
            text=lambda row: (NOTHING if row.nfe is None else f"{row.nfe:.0f}", ""),
            value=lambda row: row.nfe,
        ),
        Column(
            id="seconds",
            label="eval",
            note="wall time of one evaluation",
            text=lambda row: (duration(row.seconds), ""),
            value=lambda row: row.seconds,
        ),
    )
    kept = ("rank", "experiment", "seeds", table.metric)
    return tuple(
        c for c in found if c.id in kept or any(c.value(row) is not None for row in table.rows)
    )


def _name(row: Row) -> tuple[str, ...]:
    return (row.experiment, *row.variant, row.group)


def _seeds(row: Row) -> tuple[str, str]:
    all_of = len({s.run.seed for s in row.runs})
    return f"{row.seeds}", "" if row.seeds == all_of else f"of {all_of}"


Shown = Callable[[Row], tuple[str, str]]


def _others(metric: str) -> list[Column]:
    """The scores shown beside the ranking one."""

    def mean(name: str, form: Callable[[Spread | None], str]) -> Shown:
        return lambda row: (form(row.scores.get(name)), "")

    def over_seeds(name: str) -> Shown:
        return lambda row: spread(row.scores.get(name))

    def copies(row: Row) -> tuple[str, str]:
        real = row.scores.get("copy_rate_real")
        return percent(row.scores.get("copy_rate")), f"real {percent(real)}" if real else ""

    beside = (
        _score("fd_digits", "fd_digits", over_seeds("fd_digits")),
        _score("floor", "floor", mean("floor", lambda s: number(s.mean if s else None))),
        _score("copy_rate", "copies", copies),
        _score("nmi", "NMI", over_seeds("nmi")),
        _score("ari", "ARI", over_seeds("ari")),
        _score("confident", "confident", mean("confident", percent)),
        _score("classes", "classes", mean("classes", lambda s: f"{s.mean:g}" if s else NOTHING)),
    )
    return [column for column in beside if column.id != metric]


def _score(name: str, label: str, text: Shown) -> Column:
    def value(row: Row) -> float | None:
        found = row.scores.get(name)
        return found.mean if found else None

    return Column(
        id=name,
        label=label,
        note=NOTES.get(name, f"{name}, mean ± standard deviation over seeds"),
        text=text,
        value=value,
        best_high=name in HIGHER_IS_BETTER,
    )
