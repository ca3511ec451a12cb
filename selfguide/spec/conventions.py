"""Other papers' numbers as ours, by the paper's name; torch-free, for the edges where a user types them.

Ours: noise-time tau, 0 data and 1 noise; the total guidance weight g of f_u + g (f_c - f_u), where 1 is none; a
noise-shift k, tau' = k tau / (1 + (k - 1) tau), where above 1 spends more steps at high noise. "1.5" is 1.5 in DiT
and 2.5 in Ho & Salimans, and t = 0.2 is nearly data in REPA and nearly noise in SiT: no bare number says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from selfguide.spec.suggest import nearest
from shards.errors import UserError

T = TypeVar("T")
Map = Callable[[float], float]

DDPM_STEPS = 1000  # T of Ho et al. 2020, and of every discrete table since


def _same(value: float) -> float:
    return value


def _reversed(value: float) -> float:
    return 1 - value


# name -> g less the paper's weight
_WEIGHTS: dict[str, int] = {
    "ho_salimans": 1,  # (1 + w) f_c - w f_u (Ho & Salimans 2022)
    "sgdm": 0,  # (1 - w) f_u + w f_c (Hu et al. 2023, eq. 4)
    "sgfm": 1,  # f_c + s (f_c - f_u); its 0.4 is 1.4 here
    "uvit": 1,  # as SGFM (Bao et al. 2023)
    "dit": 0,  # f_u + s (f_c - f_u), on the first 3 channels in code
    "sit": 0,
    "repa": 0,
    "lightningdit": 0,
    "ddae++": 0,  # on all channels
    "edm2": 0,  # D_ref + s (D - D_ref), autoguidance
    "cedm": 1,  # its code's cfg_weight w; the paper's samples have none (Adaloglou et al. 2025)
}

# name -> the paper's time as tau; its ends in the paper
_TIMES: dict[str, tuple[Map, float, float]] = {
    "sgfm": (_reversed, 0.0, 1.0),  # 1 at data
    "sit": (_reversed, 0.0, 1.0),
    "lightningdit": (_reversed, 0.0, 1.0),
    "repa": (_same, 0.0, 1.0),  # 0 at data
    "ddae++": (_same, 0.0, 1.0),
    "uvit": (_same, 0.0, 1.0),  # of the VP-SDE
    "ddpm": (lambda t: t / DDPM_STEPS, 0.0, DDPM_STEPS),  # t = 1 .. T
    "dit": (lambda i: (i + 1) / DDPM_STEPS, 0.0, DDPM_STEPS - 1),  # an index into the table
    "edm": (lambda sigma: sigma / (1 + sigma), 0.0, math.inf),
    "cedm": (lambda sigma: sigma / (1 + sigma), 0.0, math.inf),
    "ve": (lambda sigma: sigma / (1 + sigma), 0.0, math.inf),
}

# name -> the paper's shift as k
_SHIFTS: dict[str, Map] = {
    "lightningdit": lambda s: 1 / s,  # of data-time: its 0.3 is 3.33 here
    "ddae++": _same,
    "sd3": _same,  # Esser et al. 2024, eq. 23
}

# name -> the one end of the interval that the paper states, as the largest guided noise-time
_INTERVALS: dict[str, Map] = {
    "lightningdit": _reversed,  # unguided while data-time is below 0.11
    "repa": _same,
    "ddae++": _same,
}


def total_weight(source: str, weight: float | None) -> float:
    """g of a paper's guidance weight; `cedm` also takes None, for its paper's samples have no guidance.

    Raises:
        UserError: an unknown source, or a weight that its formula cannot take.
    """
    offset = _known("guidance weight", source, _WEIGHTS)
    if source == "cedm" and weight is None:
        return 1.0
    if weight is None or not math.isfinite(weight):
        raise UserError(f"guidance weight {weight} of {source} must be a finite number")
    return offset + weight


def noise_time(source: str, time: float) -> float:
    """tau of a paper's time (a noise level sigma for `edm` and `ve`).

    Raises:
        UserError: an unknown source, or a time that is not on its path.
    """
    convert, low, high = _known("time", source, _TIMES)
    if not low <= time <= high or math.isinf(time):
        raise UserError(f"time {time:g} is not one of {source}'s: take {low:g} to {high:g}")
    return convert(time)


def noise_shift(source: str, shift: float) -> float:
    """k of a paper's timestep shift.

    Raises:
        UserError: an unknown source, or a shift that is not positive.
    """
    convert = _known("timestep shift", source, _SHIFTS)
    if not (math.isfinite(shift) and shift > 0):
        raise UserError(f"timestep shift {shift:g} of {source} must be a positive number")
    return convert(shift)


def guidance_interval(source: str, end: float) -> tuple[float, float]:
    """Noise-times that are guided, both ends in, from the one time at which a paper starts to guide.

    Raises:
        UserError: an unknown source, or a time outside [0, 1].
    """
    convert = _known("guidance interval", source, _INTERVALS)
    if not 0 <= end <= 1:
        raise UserError(f"guidance interval's end {end:g} of {source} must lie in [0, 1]")
    return 0.0, convert(end)


def _known(what: str, source: str, table: Mapping[str, T]) -> T:
    if source not in table:
        raise UserError(
            f"no {what} of {source!r} is known{nearest(source, table)}; known: {', '.join(table)}"
        )
    return table[source]
