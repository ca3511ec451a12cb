"""Frechet distance between Gaussians fitted to features, in float64, with its sampling error.

Heusel et al. 2017, equation 6. The square root's trace comes from eigenvalues of a symmetric product, never from
`scipy.linalg.sqrtm`: that one is slow, was wrong near singular matrices, and changed its signature.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Sufficient statistics of a set of features about a fixed shift: n, sum (D,), outer product (D, D)."""

    count: int
    total: Array
    outer: Array
    shift: Array

    @staticmethod
    def of(features: NDArray, shift: Array | None = None) -> Moments:
        """Of (N, D) features. A shift near the mean keeps the covariance from cancelling."""
        wide = np.asarray(features, dtype=np.float64)
        if wide.ndim != 2 or not np.isfinite(wide).all():
            raise ValueError(f"features must be finite and (N, D), found shape {wide.shape}")
        base = wide.mean(0) if shift is None else shift
        centred = wide - base
        return Moments(len(wide), centred.sum(0), centred.T @ centred, base)

    def __add__(self, other: Moments) -> Moments:
        return self._combine(other, 1)

    def __sub__(self, other: Moments) -> Moments:
        return self._combine(other, -1)

    def _combine(self, other: Moments, sign: int) -> Moments:
        if not np.array_equal(self.shift, other.shift):
            raise ValueError("moments about different shifts do not add up")
        return Moments(
            self.count + sign * other.count,
            self.total + sign * other.total,
            self.outer + sign * other.outer,
            self.shift,
        )

    @property
    def mean(self) -> Array:
        return self.shift + self.total / self.count

    @property
    def covariance(self) -> Array:
        """Unbiased, (D, D)."""
        offset = self.total / self.count
        return (self.outer - self.count * np.outer(offset, offset)) / (self.count - 1)


def distance(mean1: Array, covariance1: Array, mean2: Array, covariance2: Array) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2); may dip below 0 by rounding only."""
    values, vectors = np.linalg.eigh(covariance1)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariance2 @ root).clip(min=0)).sum()
    shift = mean1 - mean2
    return float(shift @ shift + np.trace(covariance1) + np.trace(covariance2) - 2 * cross)


def between(a: Moments, b: Moments) -> float:
    return distance(a.mean, a.covariance, b.mean, b.covariance)


def with_error(reference: NDArray, generated: NDArray, blocks: int = 10) -> tuple[float, float]:
    """Distance and its standard error from a delete-one-block jackknife over the generated set."""
    real = Moments.of(reference)
    parts = [Moments.of(part, real.mean) for part in np.array_split(np.asarray(generated), blocks)]
    whole = sum(parts[1:], parts[0])
    full = between(real, whole)
    left_out = np.array([between(real, whole - part) for part in parts])
    variance = (blocks - 1) / blocks * ((left_out - left_out.mean()) ** 2).sum()
    return full, float(np.sqrt(variance))
