"""Data sets that need no file: the digits that scikit-learn carries, and noise in the shape of latents."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from shards.format.header import Header
from shards.format.manifest import digest
from shards.sources.source import ArraySource, Lazy, Source, encode_keys

LATENT_SCALE = 0.18215  # of the Stable Diffusion f8 autoencoder (Rombach et al. 2022)


def digits_source() -> tuple[Source, Header]:
    """The scans as uint8 grey levels 0 to 16; a model sees (x - 8) / 8, in [-1, 1]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = found.images.astype(np.uint8)[:, None]
    source = ArraySource.of("digits", x, labels=found.target, classes=10)
    return source, Header(kind="image", shift=8.0, scale=0.125)


@dataclass(frozen=True, kw_only=True)
class SyntheticSource(Lazy):
    """Latents that are Gaussian noise, each a function of (seed, row): any count, no memory."""

    count: int
    shape: tuple[int, ...]
    dtype: np.dtype
    classes: int
    seed: int

    @property
    def name(self) -> str:
        return "synthetic"

    @property
    def fingerprint(self) -> str:
        return digest({**asdict(self), "dtype": self.dtype.str, "shape": [*self.shape]})

    @cached_property
    def keys(self) -> NDArray[np.bytes_]:
        return encode_keys([f"{row:08d}" for row in range(self.count)])

    @cached_property
    def labels(self) -> NDArray[np.int64] | None:
        return np.arange(self.count) % self.classes if self.classes else None

    def images(self, rows: NDArray[np.int64]) -> NDArray[np.generic]:
        noise = [
            np.random.Generator(np.random.Philox(key=[self.seed, row])).standard_normal(self.shape)
            for row in rows.tolist()
        ]
        return (np.stack(noise) / LATENT_SCALE).astype(self.dtype)
