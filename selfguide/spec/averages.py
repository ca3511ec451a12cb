"""Which averages of the weights a run keeps, by one key in file names, configs, checkpoints and records."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from shards.errors import UserError

if TYPE_CHECKING:
    from selfguide.spec.config import Config

Rise = Literal["share", "steps"]
Count = Literal["after", "before"]
_POWER, _RATE = "power-", "rate-"
WIDEST = 12**-0.5  # relative width of a power function with exponent 0, the plain mean


@dataclass(frozen=True, kw_only=True)
class AverageSpec:
    """One average: exponential by a half-life in images or a share a step, or EDM2's power function of a width.

    The power function (Karras et al. 2024, arXiv 2312.02696, section 3.1) weighs the weights of time t by t^gamma, so
    that its profile keeps its shape, relative to the length of the run, however long that is.
    """

    halflife: int | None = None
    width: float | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if [self.halflife, self.width, self.rate].count(None) != 2:
            raise ValueError("an average has either a half-life, a relative width or a share")

    @property
    def key(self) -> str:
        """Its name in files: the half-life, `power-<relative width>` or `rate-<share>`."""
        return str(self.plain)

    @property
    def plain(self) -> int | str:
        """The key as JSON and YAML hold it: a half-life is a whole number there."""
        if self.halflife is not None:
            return self.halflife
        return f"{_RATE}{self.rate!r}" if self.width is None else f"{_POWER}{self.width!r}"

    @staticmethod
    def of(key: int | str) -> AverageSpec:
        """The average of that key, in either form.

        Raises:
            UserError: it is no key of an average.
        """
        text = str(key)
        try:
            if text.startswith(_POWER):
                return AverageSpec(width=float(text.removeprefix(_POWER)))
            if text.startswith(_RATE):
                return AverageSpec(rate=float(text.removeprefix(_RATE)))
            return AverageSpec(halflife=int(text))
        except ValueError:
            raise UserError(
                f"{text!r} names no average; give a half-life in images, {_POWER}0.1 or {_RATE}0.0001"
            ) from None

    def __str__(self) -> str:
        if self.halflife is not None:
            return f"half-life of {self.halflife:,} images"
        if self.rate is not None:
            return f"share of {self.rate:g} a step"
        return f"power function of relative width {self.width}"

    @property
    def file(self) -> str:
        """Its file in a snapshot."""
        return f"ema-{self.key}.safetensors"

    def decay(
        self, batch: int, seen: int, ramp: float, rise: Rise = "share", count: Count = "after"
    ) -> float:
        """What the average keeps of itself at a step of `batch` images that brought its history to `seen`.

        With a half-life, 0.5 ** (batch / halflife), the half-life never above `ramp` of what was seen (EDM, Karras et
        al. 2022, whose code counts what was seen before the step); with `ramp` 0 it is constant from the start. Where
        averages rise by steps it is (1 + n) / (10 + n) after n steps at most (Rombach et al. 2022), without a ramp.
        With a share it is constant for any batch: of B images the half-life is B ln 2 / -ln(1 - rate). Of the power
        function, (1 - 1 / t) ** (gamma + 1) after t steps (EDM2, equation 1): the first step takes the weights as they
        are.
        """
        if self.rate is not None:
            return 1 - self.rate
        if self.width is not None:
            return (1 - min(batch / seen, 1.0)) ** (gamma(self.width) + 1)
        assert self.halflife is not None
        if rise == "steps":
            steps = seen / batch
            return min(0.5 ** (batch / self.halflife), (1 + steps) / (10 + steps))
        counted = seen - batch if count == "before" else seen
        horizon = min(self.halflife, ramp * counted) if ramp else self.halflife
        return 0.5 ** (batch / max(horizon, 1e-8))


@functools.cache
def gamma(width: float) -> float:
    """The exponent whose power function has the relative width (standard deviation) `width`.

    EDM2 (equation 3): width = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)), which falls with gamma.

    Raises:
        ValueError: no exponent from 0 on has it.
    """
    if not 0 < width <= WIDEST:
        raise ValueError(f"relative width {width}: take more than 0, at most {WIDEST:.4f}")
    low, high = 0.0, 1 / width**2  # width < 1 / sqrt(gamma + 3)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if relative_width(middle) > width else (low, middle)
    return high


def relative_width(exponent: float) -> float:
    """Standard deviation of the power function's profile over [0, 1]."""
    return math.sqrt(exponent + 1) / ((exponent + 2) * math.sqrt(exponent + 3))


def averages_of(config: Config) -> tuple[AverageSpec, ...]:
    """Those that a run keeps, the main one first: its guidance's own where it has one, then those of `train`."""
    train, own = config.train, config.guidance.average
    return (
        *(() if own is None else (own,)),
        *(AverageSpec(halflife=images) for images in train.ema_halflife),
        *(AverageSpec(width=width) for width in train.ema_width),
    )
