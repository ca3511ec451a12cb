"""Mean and variance per channel, merged without losing digits (Chan, Golub and LeVeque 1983).

Every block has its own, in float64; shards and data sets merge them in their order, so that the
result does not depend on who wrote which shard, or when.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

_VALUES = (
    1 << 16
)  # taken at a time: 512 kB of float64, which a core's cache holds through all passes


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Of `count` values a channel: their mean (C,), their summed squared distance from it (C,), range."""

    count: int
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]
    minimum: float
    maximum: float

    @staticmethod
    def of(x: NDArray[np.generic]) -> Moments:
        """Of samples (N, C, H, W)."""
        some = max(1, _VALUES // x[0].size)
        if len(x) > some:
            parts = (Moments.of(x[i : i + some]) for i in range(0, len(x), some))
            return reduce(Moments.merge, parts)
        wide = x.astype(np.float64).reshape(len(x), x.shape[1], -1)
        minimum, maximum = float(wide.min()), float(wide.max())
        mean = wide.mean(axis=(0, 2))
        wide -= mean[:, None]
        return Moments(
            count=wide.shape[0] * wide.shape[2],
            mean=mean,
            m2=np.einsum("ncp,ncp->c", wide, wide),
            minimum=minimum,
            maximum=maximum,
        )

    def merge(self, other: Moments) -> Moments:
        """Of both sets of values together."""
        count, apart = self.count + other.count, other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + apart * (other.count / count),
            m2=self.m2 + other.m2 + np.square(apart) * (self.count * other.count / count),
            minimum=min(self.minimum, other.minimum),
            maximum=max(self.maximum, other.maximum),
        )

    @property
    def std(self) -> NDArray[np.float64]:
        """Of the population, not of a sample."""
        return np.sqrt(self.m2 / self.count)

    def plain(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "mean": self.mean.tolist(),
            "m2": self.m2.tolist(),
            "minimum": self.minimum,
            "maximum": self.maximum,
        }

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> Moments:
        return Moments(**{**plain, "mean": np.array(plain["mean"]), "m2": np.array(plain["m2"])})
