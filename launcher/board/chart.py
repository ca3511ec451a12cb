"""Line charts as inline SVG: drawn here, so that the page needs no library and no network.

Colours and fonts come from the page's style sheet by class (`s0`, `s1`, ...), which lets a chart follow
dark mode; each point carries a tooltip, and the page puts a table with the same numbers beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 40
COLOURS = 6  # classes s0..s5 of the style sheet
MARKERS = 40  # points of a line that are drawn one by one; more would only hide the line
MOST = 200  # points of a line; more are averaged in runs of equal length


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: (x, y, half-width of its error bar or None), ascending in x."""

    name: str
    points: tuple[tuple[float, float, float | None], ...]
    colour: int = 0

    @property
    def css(self) -> str:
        return f"s{self.colour % COLOURS}"


def thinned(
    points: Sequence[tuple[int, float]], most: int = MOST
) -> tuple[tuple[float, float, None], ...]:
    """At most `most` points: means over equal runs of them, so that noise shrinks and nothing is skipped."""
    step = max(1, -(-len(points) // most))
    bins = [points[i : i + step] for i in range(0, len(points), step)]
    return tuple((b[-1][0], math.fsum(y for _, y in b) / len(b), None) for b in bins)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that span [low, high]."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if raw <= m * power * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """From data to pixels; y grows upwards."""

    last: float  # x runs from 0 to here
    ys: list[float]
    log: bool

    def x(self, value: float) -> float:
        return LEFT + value / self.last * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high, at = self.ys[0], self.ys[-1], value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, low))
        return HEIGHT - BOTTOM - (at - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def _axes(series: Sequence[Series], reference: float | None, until: float) -> _Axes:
    points = [p for s in series for p in s.points]
    highs = [y + (e or 0.0) for _, y, e in points] + ([] if reference is None else [reference])
    lows = [y - (e or 0.0) for _, y, e in points] + ([] if reference is None else [reference])
    values = [y for _, y, _ in points] + ([] if reference is None else [reference])
    # a distance falls by orders of magnitude while it is learned: a linear axis would show one cliff
    log = min(values) > 0 and max(values) / min(values) > 20
    if log:
        ys = _decades(min(values), max(highs))
    else:
        ys = ticks(0.0 if 0 <= min(lows) < max(highs) / 2 else min(lows), max(highs))
    last = max(until, *(x for x, _, _ in points))
    return _Axes(last=last if last > 0 else 1.0, ys=ys, log=log)


def _decades(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20, ... from at most `low` to at least `high`."""
    steps = [
        m * 10.0**p
        for p in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        for m in (1, 2, 5)
    ]
    first = max(i for i, v in enumerate(steps) if v <= low * (1 + 1e-9))
    last = min((i for i, v in enumerate(steps) if v >= high), default=len(steps) - 1)
    return steps[first : last + 1]


def short(value: float) -> str:
    """256,000 -> 256k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str,
    y_label: str,
    reference: float | None = None,
    until: float = 0.0,
) -> Markup:
    """An SVG of the series; empty where no series has a point.

    `reference` is a dashed level, such as the floor of the metric; the x axis reaches `until` at least.
    """
    drawn = [s for s in series if s.points]
    if not drawn:
        return Markup("")
    axes = _axes(drawn, reference, until)
    opened = Markup('<svg class="chart" role="img" viewBox="0 0 {} {}" aria-label="{}">')
    parts = [opened.format(WIDTH, HEIGHT, label), *_grid(axes, x_label, y_label)]
    if reference is not None:
        parts.append(_level(axes.y(reference), "floor", f"floor {reference:.4g}"))
    parts += [part for s in drawn for part in _line(axes, s)]
    return Markup("\n").join([*parts, Markup("</svg>")])


def _level(y: float, css: str, title: str) -> Markup:
    form = Markup(
        '<line class="{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"><title>{}</title></line>'
    )
    return form.format(css, LEFT, WIDTH - RIGHT, y, y, title)


def _grid(axes: _Axes, x_label: str, y_label: str) -> list[Markup]:
    bottom = HEIGHT - BOTTOM
    parts = []
    crowded = len(axes.ys) > 8
    for i, value in enumerate(axes.ys):
        y = axes.y(value)
        parts.append(_level(y, "grid", short(value)))
        if not crowded or i % 3 == 0:
            parts.append(_text(short(value), LEFT - 8, y + 4, "end"))
    shown = [value for value in ticks(0.0, axes.last) if value <= axes.last]
    parts += [_text(short(value), axes.x(value), bottom + 16, "middle") for value in shown]
    parts.append(_text(x_label, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "middle"))
    middle = (TOP + bottom) / 2
    turned = '<text class="tick" text-anchor="middle" transform="translate(12 {:.1f}) rotate(-90)">{}</text>'
    parts.append(Markup(turned).format(middle, y_label))
    return parts


def _text(what: str, x: float, y: float, anchor: str) -> Markup:
    form = Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    return form.format(x, y, anchor, what)


def _line(axes: _Axes, series: Series) -> list[Markup]:
    """The line, its error bars, its points."""
    at = [(axes.x(x), axes.y(y)) for x, y, _ in series.points]
    road = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    parts = [Markup('<polyline class="line {}" points="{}"/>').format(series.css, road)]
    for (x, y, error), (px, py) in zip(series.points, at, strict=True):
        if error:
            form = Markup('<line class="bar {}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
            parts.append(form.format(series.css, px, px, axes.y(y - error), axes.y(y + error)))
        if len(at) <= MARKERS:
            tooltip = (
                f"{series.name}: {y:.4g}{f' ± {error:.2g}' if error else ''} at {x:,.0f} images"
            )
            form = Markup(
                '<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3.5"><title>{}</title></circle>'
            )
            parts.append(form.format(series.css, px, py, tooltip))
    return parts
