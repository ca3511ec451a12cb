"""A board -> one HTML file that needs nothing else: no server, no network, no other file.

Everything a user can name (runs, hosts, messages) is text that the template escapes. The policy in the
page's head allows exactly the two inline blocks written here, by their hashes, and images only as data.
Drawers are templates that a browser neither lays out nor decodes until somebody opens them.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from launcher.board import detail, figures, others
from launcher.board.chart import COLOURS, MOST
from launcher.board.collect import Board, Row, Scored, Table, flatten, spelled
from launcher.board.columns import NOTHING, Column, duration, number, page_columns
from launcher.board.figures import Figure
from launcher.board.read import Run
from launcher.board.states import chips, unscored
from launcher.board.sweeps import recipe_words
from launcher.board.words import deleted_words
from launcher.reconcile import cache, decide
from selfguide.spec.config import Config
from selfguide.spec.files import plain
from selfguide.spec.records import EvaluationRecord
from shards import storage

GRID_LIMIT = 1 << 20  # bytes of one sample grid; a larger one is named, not carried
GRIDS_LIMIT = 48 << 20  # bytes of all of a page's, best rows first
LOG_LIMIT = 4000  # characters of the end of a log
PNG = b"\x89PNG\r\n\x1a\n"
# of a config, what says where a run lies rather than what it is
PLACES = ("runs", "name", "seed", "dry_run")
# rows above which a drawer's curves get fewer points
MANY = 50


def write(board: Board, out: Path, *, built: float) -> None:
    """Replaces `out` with the page of this board, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    storage.publish(str(out), encoded(render(board, built=built)), replace=True)


def encoded(page: str) -> bytes:
    """The page as bytes. What is no text, such as some names of files in messages, has question marks there."""
    return page.encode(errors="replace")


def render(board: Board, *, built: float) -> str:
    """The page as text; `built` in seconds since 1970 is what its readers see as its age."""
    return Renderer().render(board, built=built)


class Renderer:
    """Renders boards one after the other; what opens below a row is kept while its runs, which are over, stay."""

    def __init__(self) -> None:
        self._here = files("launcher.board")
        self._environment = jinja2.Environment(
            loader=jinja2.FunctionLoader(self._text),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters |= {"number": number, "duration": duration, "when": when}
        self._environment.globals |= {
            "chips": chips,
            "unscored": unscored,
            "recipe_words": recipe_words,
            "deleted_words": deleted_words,
            "nothing": NOTHING,
            "others_title": others.TITLE,
            "others_note": others.NOTE,
        }
        self._kept: dict[tuple[str, str], _Kept] = {}
        self._settings: dict[str, tuple[Config | None, Mapping[str, Any], Mapping[str, str]]] = {}

    def _text(self, name: str) -> str:
        return (self._here / name).read_text(encoding="utf-8")

    @cache.uncollected()
    def render(self, board: Board, *, built: float) -> str:
        """The page as text, as `render`."""
        style, script = self._text("style.css"), self._text("script.js")
        grids = _Grids()
        before, self._kept = self._kept, {}
        sheets = [self._sheet(table, grids, before) for table in board.tables if table.rows]
        # without rows there is nothing that the script could sort or compare
        alone = [(summary(table.protocol), table) for table in board.tables if not table.rows]
        return self._environment.get_template("page.html").render(
            style=Markup(style),
            script=Markup(script),
            policy=policy(style, script),
            board=board,
            built=built,
            sheets=sheets,
            alone=alone,
            waiting=[_Waiting.of(run, grids) for run in board.waiting],
            data=embedded(
                {"settings": self._all_settings(board), "sheets": [s.data() for s in sheets]}
            ),
        )

    def _sheet(
        self, table: Table, grids: _Grids, before: Mapping[tuple[str, str], _Kept]
    ) -> _Sheet:
        k = asked_score(table)
        shown = page_columns(table, k)
        drawers = []
        for row in table.rows:
            below = self._below(table, row, len(shown), grids, before.get((table.key, row.group)))
            drawers.append(_drawer(row, shown, below))
        return _Sheet(
            table=table,
            summary=summary(table.protocol),
            k=k,
            columns=shown,
            drawers=tuple(drawers),
            pictured=tuple(drawer for drawer in drawers if drawer.below.grid)[:COLOURS],
            figures=figures.of_table(table),
        )

    def _below(
        self, table: Table, row: Row, columns: int, grids: _Grids, before: _Kept | None
    ) -> _Below:
        most = MOST if len(table.rows) <= MANY else MOST // 4
        about = (row.variant, table.metric, columns, most)
        if (
            before is not None
            and (before.about, before.runs) == (about, row.runs)
            and grids.takes(before.bytes)
        ):
            self._kept[table.key, row.group] = before
            return before.below
        left = grids.left
        cards = tuple(_card(scored, grids) for scored in row.runs)
        pictured = next((card for card in cards if card.grid and card.shown), None)
        html = self._environment.get_template("drawer.html").render(
            table=table,
            row=row,
            width=columns + 2,
            figures=figures.of_row(table, row, most),
            cards=cards,
        )
        below = _Below(
            html=Markup(html),
            grid=pictured.grid if pictured else "",
            grid_of=_caption(pictured, table.metric) if pictured else "",
        )
        # logs of others go on, and a grid that had no room may have some the next time
        over = all(s.run.state.word in decide.ENDED and not s.run.unscored for s in row.runs)
        if over and all(card.grid or not card.pictured for card in cards):
            self._kept[table.key, row.group] = _Kept(about, row.runs, left - grids.left, below)
        return below

    def _all_settings(self, board: Board) -> dict[str, Any]:
        """Settings by key: those that every row shares once, and of each row what it has besides."""
        before, self._settings = self._settings, {}
        for row in (row for table in board.tables for row in table.rows):
            run = row.runs[0].run
            kept = before.get(row.group)
            same = kept is not None and kept[:2] == (run.config, run.identity)
            settings = kept[2] if kept is not None and same else _settings_of(run)
            self._settings[row.group] = (run.config, run.identity, settings)
        each = {group: set(settings.items()) for group, (*_, settings) in self._settings.items()}
        common = set.intersection(*each.values()) if each else set()
        own = {group: sorted(settings - common) for group, settings in each.items()}
        return {"common": sorted(common), "own": own}


def policy(style: str, script: str) -> str:
    """Content-Security-Policy that lets nothing load and nothing run but these two blocks.

    A page that a server sent may ask that server whether there is a newer one; a file has no such `self`.
    """
    return "; ".join(
        (
            "default-src 'none'",
            "img-src data:",
            "connect-src 'self'",
            f"style-src 'sha256-{_sha256(style)}'",
            f"script-src 'sha256-{_sha256(script)}'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embedded(value: object) -> Markup:
    """JSON that no HTML parser takes for markup, whatever its strings hold."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def when(seconds: float) -> str:
    """Seconds since 1970 as a date and time in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


# ---- what the template shows -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Cell:
    text: str
    aside: str
    sort: str  # empty: nothing to sort by
    column: Column


@dataclass(frozen=True, kw_only=True)
class _Card:
    """One run of a row."""

    scored: Scored
    shown: EvaluationRecord | None  # the headline, or the newest score while there is none
    pictured: bool  # whether there is a grid
    grid: str  # its data: address; empty where there is none, or no room for it
    log: str


@dataclass(frozen=True, kw_only=True)
class _Below:
    """What opens below a row."""

    html: Markup
    grid: str  # of the first run that has one, or empty
    grid_of: str  # which run and when


@dataclass(frozen=True)
class _Kept:
    """What opens below a row, what it was made of, and the bytes of its sample grids."""

    about: tuple[object, ...]
    runs: tuple[Scored, ...]
    bytes: int
    below: _Below


@dataclass(frozen=True, kw_only=True)
class _Drawer:
    """A row, and what opens below it."""

    row: Row
    cells: tuple[_Cell, ...]
    words: str  # what the filter looks in
    below: _Below


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    """A run without a score under any protocol: its curves and the newest samples there are."""

    run: Run
    figures: tuple[Figure, ...]
    grid: str
    grid_of: str
    log: str

    @classmethod
    def of(cls, run: Run, grids: _Grids) -> _Waiting:
        newest = detail.newest_grid(run)
        return cls(
            run=run,
            figures=figures.of_runs([run]),
            grid=grids.address(newest[1] if newest else None),
            grid_of=f"{newest[0]:,} images" if newest else "",
            log=_log(run),
        )


@dataclass(frozen=True, kw_only=True)
class _Sheet:
    """One protocol's table."""

    table: Table
    summary: str
    k: float | None
    columns: tuple[Column, ...]
    drawers: tuple[_Drawer, ...]
    pictured: tuple[
        _Drawer, ...
    ]  # the best rows that have a sample grid, as many as the figure has lines
    figures: tuple[Figure, ...]

    def data(self) -> dict[str, Any]:
        """What the script computes with: the way to k, and differences of scores."""
        return {
            "key": self.table.key,
            "metric": self.table.metric,
            # whose blocks the rows keep, whatever they are ranked by
            "own": self.table.protocol.get("metric"),
            "higher": self.table.higher_is_better,
            "rows": {row.group: _numbers(row, self.table.metric) for row in self.table.rows},
        }


def asked_score(table: Table) -> float | None:
    """The k that the page begins with: what a paper reached, else the median of the rows; None without scores."""
    published = [row.expected.value for row in table.rows if row.expected]
    scores = published[:1] or [row.score.mean for row in table.rows if row.score]
    return float(f"{statistics.median(scores):.3g}") if scores else None


def _numbers(row: Row, metric: str) -> dict[str, Any]:
    """Histories as (images, score, GPU-hours until then), scores as (mean, standard error), facts to filter by."""
    histories = [
        [
            [r.images, r.scores[metric], scored.run.gpu_hours_at(r.images)]
            for r in scored.history
            if metric in r.scores
        ]
        for scored in row.runs
    ]
    scores = {
        name: [spread.mean, None if spread.sd is None else spread.sd / math.sqrt(spread.n)]
        for name, spread in row.scores.items()
        if not name.endswith("_se")
    }
    if row.score is not None:
        scores[metric][1] = row.error or None
    heads = [s.headline for s in row.runs if s.headline is not None]
    # samples of one protocol come from the same seeds, so that two rows' blocks pair up
    left_out = list(heads[0].left_out) if len(heads) == 1 else []
    facts = {
        "experiment": [row.experiment],
        "seed": [str(s.run.seed) for s in row.runs],
        "run": [s.run.id for s in row.runs],
        "labels": ["free" if row.label_free else "used"],
        "state": [text for chip in row.chips for text in (chip.label, chip.text)],
    }
    return {"histories": histories, "scores": scores, "left_out": left_out, "facts": facts}


def _settings_of(run: Run) -> dict[str, str]:
    """The identity and the rest of the newest attempt's config."""
    config: Mapping[str, Any] = plain(run.config) if run.config else {}
    found = flatten({k: v for k, v in config.items() if k not in PLACES})
    found |= flatten({k: v for k, v in run.identity.items() if k != "seed"})
    return {key: spelled(value) for key, value in found.items()}


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


def _drawer(row: Row, shown: Sequence[Column], below: _Below) -> _Drawer:
    states = [chip.label for chip in row.chips]
    free = "label-free" if row.label_free else "labels"
    ids = [scored.run.id for scored in row.runs]
    return _Drawer(
        row=row,
        cells=tuple(_cell(column, row) for column in shown),
        # as the script lowers what somebody types
        words=" ".join([row.experiment, *row.variant, free, *states, *ids]).lower(),
        below=below,
    )


def _cell(column: Column, row: Row) -> _Cell:
    (text, aside), value = column.text(row), column.value(row)
    return _Cell(text=text, aside=aside, sort="" if value is None else repr(value), column=column)


def _card(scored: Scored, grids: _Grids) -> _Card:
    shown = scored.headline or (scored.history[-1] if scored.history else None)
    grid = shown.grid(scored.run.folder) if shown else None
    return _Card(
        scored=scored,
        shown=shown,
        pictured=grid is not None,
        grid=grids.address(grid),
        log=_log(scored.run),
    )


def _log(run: Run) -> str:
    return detail.log_tail(run)[-LOG_LIMIT:]


def _caption(card: _Card, metric: str) -> str:
    assert card.shown is not None
    score = number(card.shown.scores.get(metric))
    return f"seed {card.scored.run.seed}, {card.shown.images:,} images, {metric} {score}"


class _Grids:
    """Sample grids as data: addresses, until the page would be too large."""

    def __init__(self) -> None:
        self.left = GRIDS_LIMIT

    def takes(self, size: int) -> bool:
        """Whether so many bytes have room, which they then take."""
        if size > self.left:
            return False
        self.left -= size
        return True

    def address(self, grid: Path | None) -> str:
        """Empty where there is no grid, none that can be read or belongs here, or no room left for it."""
        content = b""
        with contextlib.suppress(OSError):
            if grid is not None and grid.stat().st_size <= min(GRID_LIMIT, self.left):
                content = grid.read_bytes()
        if not content.startswith(PNG):
            return ""
        self.left -= len(content)
        return "data:image/png;base64," + base64.b64encode(content).decode()
