"""Whether the loss of one noise level, or of one kind of condition, rises while the mean does not.

The mean hides it: one of sixteen noise levels that gets worse by a fifth moves it by about a hundredth. Losses may pass
0 (L/e^u + u of path.weighting=uncertainty), so a rise is no share of one loss alone; `_rise` says of what it is one.
A pure function of the lines of telemetry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, variance
from typing import Any, NamedTuple

# equal intervals of noise-time that telemetry keeps losses of
BINS = 16
# reports whose losses are compared with those of as many earlier ones, and how many are remembered
WINDOW = 10
MEMORY = 200
# a rise is worth a word from this share on, where it is so many standard errors, and the mean has risen by less than
# half of it
LEAST = 0.1
ERRORS = 6.0


class Drift(NamedTuple):
    """What rose, by which share, and by which the mean did since the same reports."""

    what: str
    rise: float
    mean: float
    reports: int


def drifts(history: Sequence[Mapping[str, Any]]) -> Drift | None:
    """The largest rise of one part of the loss from the lines of telemetry, oldest first; None where none stands out.

    The last `WINDOW` lines are compared with every window before them, so that a slow drift is found as well.
    """
    lines = [line for line in history if line.get("spectrum")][-MEMORY:]
    whole = [_part(line, "all", None) for line in lines]
    # a noise level whose loss is low beside the others' may drift by a share of its own, unless losses pass 0
    sizes = [_part(line, "all", None, abs) for line in lines] if _signed(lines) else []
    found = []
    for name, bin_ in _parts(lines):
        values = [_part(line, name, bin_) for line in lines]
        label = f"of {name} images" if bin_ is None else f"at noise-times {_span(bin_)}"
        for back in range(2 * WINDOW, len(lines) + 1, WINDOW):
            rise = _rise(values, sizes, back)
            mean = _rise(whole, sizes, back, sure=False)
            if rise is not None and mean is not None and rise >= LEAST and mean < rise / 2:
                found.append(Drift(label, rise, mean, back - WINDOW))
    return max(found, key=lambda each: each.rise, default=None)


def _span(bin_: int) -> str:
    return f"{bin_ / BINS:.2f} to {(bin_ + 1) / BINS:.2f}"


def _signed(lines: Sequence[Mapping[str, Any]]) -> bool:
    losses = (held["loss"] for line in lines if (held := line["spectrum"].get("all")) is not None)
    return any(each is not None and each < 0 for part in losses for each in part)


def _parts(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, int | None]]:
    kinds = sorted({kind for line in lines for kind in line["spectrum"]} - {"all"})
    return [("all", bin_) for bin_ in range(BINS)] + [(kind, None) for kind in kinds]


def _part(
    line: Mapping[str, Any], kind: str, bin_: int | None, of: Callable[[float], float] = float
) -> float | None:
    """Mean loss of a kind, in one bin or, `of` those of its bins, in all of them; None where there was no image."""
    held = line["spectrum"].get(kind)
    if held is None:
        return None
    if bin_ is not None:
        loss: float | None = held["loss"][bin_]
        return loss
    pairs = [(v, n) for v, n in zip(held["loss"], held["images"], strict=True) if v is not None]
    images = sum(n for _, n in pairs)
    return sum(of(v) * n for v, n in pairs) / images if images else None


def _rise(
    values: Sequence[float | None], sizes: Sequence[float | None], back: int, *, sure: bool = True
) -> float | None:
    """By which share the last window lies above the one that begins `back` lines before the end.

    It is a share of the loss before or, where that is nearer to 0, of what all bins had without their signs (`sizes`,
    empty where no loss is below 0).
    None where either has too few values, or, with `sure`, where the rise may be noise.
    """
    before, now = _window(values, back), _window(values, WINDOW)
    if min(len(before), len(now)) <= WINDOW // 2:
        return None
    rise = fmean(now) - fmean(before)
    error = math.sqrt(variance(before) / len(before) + variance(now) / len(now))
    if sure and rise <= ERRORS * error:
        return None
    scale = max(abs(fmean(before)), fmean(_window(sizes, back) or [0.0]))
    return rise / scale if scale else math.copysign(math.inf, rise) if rise else 0.0


def _window(values: Sequence[float | None], back: int) -> list[float]:
    """The finite ones of the `WINDOW` values that begin `back` before the end."""
    begin = max(0, len(values) - back)
    return [v for v in values[begin : begin + WINDOW] if v is not None and math.isfinite(v)]
