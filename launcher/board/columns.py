"""The board's columns: what a cell says and what it sorts by, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from launcher.board.collect import Row, Spread, Table
from launcher.board.reach import reach
from selfguide.spec.metrics import METRICS, Metric, higher_is_better

NOTHING = "\N{EN DASH}"


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
    """A score to the digits that its size deserves; a dash for None."""
    return NOTHING if value is None else format(value, _form(value))


def spread(value: Spread | None) -> tuple[str, str]:
    """Mean, and ± standard deviation over seeds to the same decimals; the mean alone for one seed."""
    if value is None:
        return NOTHING, ""
    form = _form(value.mean)
    return format(value.mean, form), "" if value.sd is None else f"± {format(value.sd, form)}"


def percent(value: Spread | None) -> str:
    """The mean of a share in percent, 0.5 as 50.0 %."""
    return NOTHING if value is None else f"{100 * value.mean:.1f} %"


def duration(seconds: float | None) -> str:
    """Seconds below ten minutes, minutes from there on."""
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
        Column(
            id="expected",
            label="paper",
            note="what somebody published for the same; beside it, ours less theirs",
            text=_expected,
            value=lambda row: row.expected.value if row.expected else None,
            best_high=table.higher_is_better,
        ),
        Column(
            id="gpu_hours",
            label="GPU-hours",
            note="what one run took, all attempts and evaluations, about; mean over seeds; ranks where no GPUs",
            text=lambda row: (number(row.gpu_hours), ""),
            value=lambda row: row.gpu_hours,
        ),
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


def page_columns(table: Table, k: float | None) -> tuple[Column, ...]:
    """The columns of the page: those of `columns`, and beside the score its error and the way to k.

    Args:
        k: a score whose cost is asked for; None where the table has none.
    """
    error = Column(
        id="se",
        label="SE",
        note="standard error of the score: what decides which rows are tied",
        text=lambda row: (_error(row), ""),
        value=lambda row: row.error or None,
    )
    # k changes on the page, so that its columns are there whatever it is now
    way = (
        Column(
            id="reach_images",
            label="images to k",
            note="of the first snapshot whose score is at least as good as k, mean over the seeds that got there",
            text=lambda row: _reached(row, table.metric, k),
            value=lambda row: None if k is None else reach(row, table.metric, k).images,
        ),
        Column(
            id="reach_hours",
            label="GPU-h to k",
            note="GPU-hours of training until that snapshot",
            text=lambda row: (number(_hours(row, table.metric, k)), ""),
            value=lambda row: _hours(row, table.metric, k),
        ),
    )
    shown = columns(table)
    at = [column.id for column in shown].index(table.metric) + 1
    # of those behind the score, a published one
    behind = at + (shown[at].id == "expected")
    return (*shown[:at], error, *shown[at:behind], *way, *shown[behind:])


def _error(row: Row) -> str:
    return f"± {number(row.error)}" if row.error else NOTHING


def _expected(row: Row) -> tuple[str, str]:
    if row.expected is None:
        return NOTHING, ""
    gap = "" if row.score is None else f"{row.score.mean - row.expected.value:+.3g}"
    return number(row.expected.value), gap


def _reached(row: Row, metric: str, k: float | None) -> tuple[str, str]:
    found = None if k is None else reach(row, metric, k)
    if found is None or found.images is None:
        return NOTHING, ""
    some = f"{found.runs} of {found.of}" if found.runs < found.of else ""
    return f"{found.images:,.0f}", some


def _hours(row: Row, metric: str, k: float | None) -> float | None:
    return None if k is None else reach(row, metric, k).gpu_hours


def _name(row: Row) -> tuple[str, ...]:
    return (row.experiment, *row.variant, row.group)


def _seeds(row: Row) -> tuple[str, str]:
    all_of = len({s.run.seed for s in row.runs})
    return f"{row.seeds}", "" if row.seeds == all_of else f"of {all_of}"


def _others(ranking: str) -> list[Column]:
    """The scores of the metric table, beside the one that ranks."""
    return [_metric(name, metric) for name, metric in METRICS.items() if name != ranking]


def _metric(name: str, metric: Metric) -> Column:
    form = _FORMS[metric.form]

    def text(row: Row) -> tuple[str, str]:
        found = row.scores.get(name)
        if metric.with_spread:
            return spread(found)
        real = row.scores.get(metric.beside) if metric.beside else None
        return form(found), f"real {form(real)}" if real else ""

    return _score(name, metric.heading, text)


def _score(name: str, label: str, text: Callable[[Row], tuple[str, str]]) -> Column:
    def value(row: Row) -> float | None:
        found = row.scores.get(name)
        return found.mean if found else None

    known = METRICS.get(name)
    return Column(
        id=name,
        label=label,
        note=known.note if known else f"{name}, mean ± standard deviation over seeds",
        text=text,
        value=value,
        best_high=higher_is_better(name),
    )


_FORMS: dict[str, Callable[[Spread | None], str]] = {
    "number": lambda found: number(found.mean if found else None),
    "percent": percent,
    "count": lambda found: f"{found.mean:g}" if found else NOTHING,
}
