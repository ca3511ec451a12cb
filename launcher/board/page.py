"""A board -> one HTML file that needs nothing else: no server, no network, no other file.

Everything a user can name (runs, hosts, messages) is text that the template escapes. The policy in the
page's head allows exactly the two inline blocks written here, by their hashes, and images only as data.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from launcher.board.chart import COLOURS, Series, line_chart, thinned
from launcher.board.collect import Board, Row, Scored, Table, chips, flatten, over_seeds, unscored
from launcher.board.columns import Column, columns, duration, number
from selfguide.spec.records import EvaluationRecord
from shards import storage

GRID_LIMIT = 1 << 20  # bytes of one sample grid; a larger one is named, not carried
PNG = b"\x89PNG\r\n\x1a\n"


def write(board: Board, out: Path, *, built: float) -> None:
    """Replaces `out` with the page of this board, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    storage.publish(str(out), render(board, built=built).encode(), replace=True)


def render(board: Board, *, built: float) -> str:
    """The page as text; `built` in seconds since 1970 is what its readers see as its age."""
    here = files("launcher.board")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (here / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "duration": duration, "when": when}
    style = (here / "style.css").read_text(encoding="utf-8")
    script = (here / "script.js").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        style=Markup(style),
        script=Markup(script),
        policy=policy(style, script),
        board=board,
        built=built,
        tables=[_Sheet.of(table) for table in board.tables],
        chips=chips,
        unscored=unscored,
    )


def policy(style: str, script: str) -> str:
    """Content-Security-Policy that lets nothing load and nothing run but these two blocks."""
    return "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            f"style-src 'sha256-{_sha256(style)}'",
            f"script-src 'sha256-{_sha256(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


# ---- what the template shows -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Cell:
    text: str
    aside: str
    sort: str  # empty: nothing to sort by
    numeric: bool


@dataclass(frozen=True, kw_only=True)
class _Figure:
    """A chart, its legend as (colour class, name), and the same numbers as a table."""

    title: str
    svg: Markup
    legend: tuple[tuple[str, str], ...]
    head: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class _Card:
    """One run of a row."""

    scored: Scored
    shown: EvaluationRecord | None  # the headline, or the newest score while there is none
    grid: str  # data: address, or empty


@dataclass(frozen=True, kw_only=True)
class _Drawer:
    """A row, and what opens below it."""

    row: Row
    cells: tuple[_Cell, ...]
    words: str  # what the filter looks in
    figures: tuple[_Figure, ...]
    cards: tuple[_Card, ...]
    identity: tuple[tuple[str, str], ...]
    grid: str  # of the first run that has one, or empty
    grid_of: str  # which run and when


@dataclass(frozen=True, kw_only=True)
class _Sheet:
    """One protocol's table."""

    table: Table
    summary: str
    columns: tuple[Column, ...]
    drawers: tuple[_Drawer, ...]
    pictured: tuple[
        _Drawer, ...
    ]  # the best rows that have a sample grid, as many as the figure has lines
    figure: _Figure | None

    @classmethod
    def of(cls, table: Table) -> _Sheet:
        drawers = tuple(_drawer(table, row) for row in table.rows)
        return cls(
            table=table,
            summary=summary(table.protocol),
            columns=columns(table),
            drawers=drawers,
            pictured=tuple(drawer for drawer in drawers if drawer.grid)[:COLOURS],
            figure=_overview(table),
        )


def summary(protocol: Mapping[str, Any]) -> str:
    """The protocol in one line."""
    facts = [f"{protocol.get('metric')} v{protocol.get('version')}"]
    if protocol.get("sampler") == "none":
        # a probe draws no samples
        times = protocol.get("settings", {}).get("noise_times", ())
        return " · ".join([*facts, f"noise-times {', '.join(f'{time:g}' for time in times)}"])
    if "samples" in protocol:
        facts.append(f"{protocol['samples']:,} samples")
    if "sampler" in protocol:
        steps = protocol.get("steps")
        facts.append(protocol["sampler"] + (f", {steps} steps" if steps else ""))
    if "g" in protocol:
        facts.append(f"guidance {protocol['g']:g}")
    return " · ".join(facts)


def _drawer(table: Table, row: Row) -> _Drawer:
    cards = tuple(_card(scored) for scored in row.runs)
    pictured = next((card for card in cards if card.grid and card.shown), None)
    states = [chip.label for chip in row.chips]
    free = "label-free" if row.label_free else "labels"
    ids = [scored.run.id for scored in row.runs]
    settings = flatten({k: v for k, v in row.runs[0].run.identity.items() if k != "seed"})
    return _Drawer(
        row=row,
        cells=tuple(_cell(c, row) for c in columns(table)),
        words=" ".join([row.experiment, *row.variant, free, *states, *ids]).casefold(),
        figures=tuple(f for f in (_scores(table, row), _losses(row)) if f is not None),
        cards=cards,
        identity=tuple((k, str(v)) for k, v in sorted(settings.items())),
        grid=pictured.grid if pictured else "",
        grid_of=_caption(pictured, table.metric) if pictured else "",
    )


def _cell(column: Column, row: Row) -> _Cell:
    (text, aside), value = column.text(row), column.value(row)
    return _Cell(
        text=text, aside=aside, sort="" if value is None else repr(value), numeric=column.numeric
    )


def _card(scored: Scored) -> _Card:
    shown = scored.headline or (scored.history[-1] if scored.history else None)
    return _Card(
        scored=scored,
        shown=shown,
        grid=data_address(shown.grid(scored.run.folder) if shown else None),
    )


def _caption(card: _Card, metric: str) -> str:
    assert card.shown is not None
    score = number(card.shown.scores.get(metric))
    return f"seed {card.scored.run.seed}, {card.shown.images:,} images, {metric} {score}"


def data_address(grid: Path | None) -> str:
    """A record's sample grid as a data: address; empty where there is none, or none that belongs here."""
    if grid is None or grid.stat().st_size > GRID_LIMIT:
        return ""
    content = grid.read_bytes()
    if not content.startswith(PNG):
        return ""
    return "data:image/png;base64," + base64.b64encode(content).decode()


# ---- figures -----------------------------------------------------------------------------------------


def _figure(
    title: str,
    series: Iterable[Series],
    *,
    label: str,
    reference: float | None = None,
    until: float = 0.0,
) -> _Figure | None:
    """The series over images as chart and table; None where nothing is to be drawn."""
    drawn = [s for s in series if s.points]
    svg = line_chart(
        drawn, label=title, x_label="images seen", y_label=label, reference=reference, until=until
    )
    if not svg:
        return None
    images = sorted({x for s in drawn for x, _, _ in s.points})
    lookup = [{x: (y, e) for x, y, e in s.points} for s in drawn]
    return _Figure(
        title=title,
        svg=svg,
        legend=(
            *((s.css, s.name) for s in drawn),
            *([] if reference is None else [("floor", "floor")]),
        ),
        head=("images", *(s.name for s in drawn)),
        body=tuple((f"{x:,.0f}", *(_reading(at.get(x)) for at in lookup)) for x in images),
    )


def _reading(point: tuple[float, float | None] | None) -> str:
    if point is None:
        return ""
    value, error = point
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def _floor(rows: Iterable[Row]) -> float | None:
    found = [row.scores["floor"].mean for row in rows if "floor" in row.scores]
    return min(found, default=None)


def _overview(table: Table) -> _Figure | None:
    """The best rows over training: mean over seeds, bars of one standard deviation."""
    series = []
    for i, row in enumerate(table.rows[:COLOURS]):
        name = " ".join((row.experiment, *row.variant))
        series.append(Series(name=name, points=_means(row, table.metric), colour=i))
    more = f", best {COLOURS} rows" if len(table.rows) > COLOURS else ""
    title = f"{table.metric} over training{more} (mean and standard deviation over seeds)"
    floor = _floor(table.rows) if not table.higher_is_better else None
    return _figure(title, series, label=table.metric, reference=floor)


def _means(row: Row, metric: str) -> tuple[tuple[float, float, float | None], ...]:
    counts = sorted({r.images for s in row.runs for r in s.history})
    points = []
    for images in counts:
        at = [
            (s.run.seed, r.scores.get(metric))
            for s in row.runs
            for r in s.history
            if r.images == images
        ]
        found = over_seeds(at)
        if found is not None:
            points.append((float(images), found.mean, found.sd))
    return tuple(points)


def _scores(table: Table, row: Row) -> _Figure | None:
    metric = table.metric
    series = [
        Series(
            name=f"seed {s.run.seed}",
            points=tuple(
                (float(r.images), r.scores[metric], r.scores.get(f"{metric}_se"))
                for r in s.history
                if metric in r.scores
            ),
            colour=i,
        )
        for i, s in enumerate(row.runs)
    ]
    floor = None if table.higher_is_better else _floor([row])
    title = f"{metric} (bars: standard error)"
    return _figure(title, series, label=metric, reference=floor, until=_seen(row))


def _losses(row: Row) -> _Figure | None:
    series = [
        Series(name=f"seed {s.run.seed}", points=thinned(s.run.losses), colour=i)
        for i, s in enumerate(row.runs)
    ]
    return _figure("training loss", series, label="loss", until=_seen(row))


def _seen(row: Row) -> int:
    return max(s.run.seen for s in row.runs)
