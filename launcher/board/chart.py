"""Charts as inline SVG: drawn here, so that the page needs no library and no network.

Colours and fonts come from the page's style sheet by class (`s0`, `s1`, ...), which lets a chart follow
dark mode; each point carries a tooltip, and the page puts a table with the same numbers beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 40
COLOURS = 6  # classes s0..s5 of the style sheet
MARKERS = 40  # points of a line that are drawn one by one; more would only hide the line
MOST = 200  # points of a line; more are averaged in runs of equal length
LEAST = 1e-100  # of a logarithmic axis, whose decades below have no floats

Point = tuple[float, float, float | None]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, or one cloud: (x, y, half-width of its error or None), ascending in x."""

    name: str
    points: tuple[Point, ...]
    colour: int = 0
    # of each point, in its tooltip; the series' own where there are none
    names: tuple[str, ...] = ()
    line: bool = True
    # errors as a band about the line rather than as bars
    band: bool = False

    @property
    def css(self) -> str:
        return f"s{self.colour % COLOURS}"


def thinned(points: Sequence[tuple[int, float]], most: int = MOST) -> tuple[Point, ...]:
    """At most `most` points: means over equal runs of them, so that noise shrinks and nothing is skipped."""
    step = max(1, -(-len(points) // most))
    if step == 1:
        return tuple((x, y, None) for x, y in points)
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

    xs: list[float]
    ys: list[float]
    log_x: bool
    log_y: bool

    def x(self, value: float) -> float:
        return LEFT + _share(value, self.xs, self.log_x) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - _share(value, self.ys, self.log_y) * (HEIGHT - TOP - BOTTOM)


def _share(value: float, marks: Sequence[float], log: bool) -> float:
    """How far along its axis a value lies; a log axis clips what is below its first mark."""
    low, high = marks[0], marks[-1]
    if log:
        return math.log(max(value, low) / low) / math.log(high / low)
    return (value - low) / (high - low)


def _axes(
    series: Sequence[Series],
    reference: float | None,
    until: float,
    wants_log_x: bool,
    may_log_y: bool,
) -> _Axes:
    points = [p for s in series for p in s.points]
    level = [] if reference is None else [reference]
    values = [y for _, y, _ in points] + level
    highs = [y + (e or 0.0) for _, y, e in points] + level
    lows = [y - (e or 0.0) for _, y, e in points] + level
    # a distance falls by orders of magnitude while it is learned: a linear axis would show one cliff
    log = may_log_y and min(values) > LEAST and max(values) / min(values) > 20
    if log:
        ys = _decades(min(values), max(highs))
    else:
        ys = ticks(0.0 if 0 <= min(lows) < max(highs) / 2 else min(lows), max(highs))
    first, last = min(x for x, _, _ in points), max(until, *(x for x, _, _ in points))
    log_x = wants_log_x and LEAST < first < last
    if log_x:
        return _Axes(xs=_decades(first, last), ys=ys, log_x=True, log_y=log)
    # the frame ends at the last value, not at the mark behind it
    marks = [x for x in ticks(0.0, last) if x < last] + [last] if last > 0 else [0.0, 1.0]
    return _Axes(xs=marks, ys=ys, log_x=False, log_y=log)


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
    log_x: bool = False,
    may_log_y: bool = True,
    at: Callable[[float], str] = "{:,.0f} images".format,
) -> Markup:
    """An SVG of the series; empty where no series has a point.

    Args:
        reference: a dashed level, such as the floor of the metric.
        until: what the x axis reaches at least.
        log_x: a logarithmic x axis, where all x are positive.
        may_log_y: a logarithmic y axis where values differ by more than twentyfold.
        at: an x in a tooltip's words.
    """
    drawn = [s for s in series if s.points]
    if not drawn:
        return Markup("")
    axes = _axes(drawn, reference, until, log_x, may_log_y)
    parts = [
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {HEIGHT}" aria-label="{escape(label)}">',
        *_grid(axes, x_label, y_label),
    ]
    if reference is not None:
        parts.append(_level(axes.y(reference), "floor", f"floor {reference:.4g}"))
    parts += [part for s in drawn for part in _drawn(axes, s, at)]
    # every text above went through `escape`
    return Markup("\n".join([*parts, "</svg>"]))


def _level(y: float, css: str, title: str) -> str:
    ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
    return f'<line class="{css}" {ends}><title>{escape(title)}</title></line>'


def _grid(axes: _Axes, x_label: str, y_label: str) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = []
    crowded = len(axes.ys) > 8
    for i, value in enumerate(axes.ys):
        y = axes.y(value)
        parts.append(_level(y, "grid", short(value)))
        if not crowded or i % 3 == 0:
            parts.append(_text(short(value), LEFT - 8, y + 4, "end"))
    shown = axes.xs if axes.log_x else [x for x in ticks(0.0, axes.xs[-1]) if x <= axes.xs[-1]]
    every = -(-len(shown) // 10)
    parts += [_text(short(value), axes.x(value), bottom + 16, "middle") for value in shown[::every]]
    parts.append(_text(x_label, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "middle"))
    turned = f'transform="translate(12 {(TOP + bottom) / 2:.1f}) rotate(-90)"'
    parts.append(f'<text class="tick" text-anchor="middle" {turned}>{escape(y_label)}</text>')
    return parts


def _text(what: str, x: float, y: float, anchor: str) -> str:
    return (
        f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(what)}</text>'
    )


def _drawn(axes: _Axes, series: Series, at: Callable[[float], str]) -> Iterable[str]:
    """The line, its errors, its points."""
    pixels = [(axes.x(x), axes.y(y)) for x, y, _ in series.points]
    if series.band:
        yield from _band(axes, series)
    if series.line:
        road = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        yield f'<polyline class="line {series.css}" points="{road}"/>'
    if series.line and len(pixels) > MARKERS:
        return
    names = series.names or (series.name,) * len(pixels)
    for (x, y, error), (px, py), name in zip(series.points, pixels, names, strict=True):
        if error and not series.band:
            ends = f'y1="{axes.y(y - error):.1f}" y2="{axes.y(y + error):.1f}"'
            yield f'<line class="bar {series.css}" x1="{px:.1f}" x2="{px:.1f}" {ends}/>'
        title = f"{name}: {y:.4g}{f' ± {error:.2g}' if error else ''} at {at(x)}"
        spot = f'<circle class="dot {series.css}" cx="{px:.1f}" cy="{py:.1f}" r="3.5">'
        yield f"{spot}<title>{escape(title)}</title></circle>"


def _band(axes: _Axes, series: Series) -> Iterable[str]:
    known = [(x, y, e) for x, y, e in series.points if e is not None]
    if len(known) > 1:
        above = [(axes.x(x), axes.y(y + e)) for x, y, e in known]
        below = [(axes.x(x), axes.y(y - e)) for x, y, e in reversed(known)]
        road = " ".join(f"{x:.1f},{y:.1f}" for x, y in above + below)
        yield f'<polygon class="band {series.css}" points="{road}"/>'
