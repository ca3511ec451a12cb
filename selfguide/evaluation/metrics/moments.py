"""Mean and covariance of features that stream past: float64 sums about a fixed shift, in blocks for a jackknife.

Features are never kept: of D dimensions and B blocks there are B (1 + D + D^2) numbers, whatever the number of images.
They add up, so that any partition over ranks, batches and resumptions gives the same statistics, up to rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from selfguide.randomness import uniform

Array = NDArray[np.float64]

# of the jackknife: its standard error is then itself known to about a quarter, 1 / sqrt(2 * 9)
BLOCKS = 10
# features that are added at once: each addition reads and writes all of a block's numbers
_TOGETHER = 4096


class Moments:
    """Number, sum (D,) and outer product (D, D) of each block of a set of features, about a shift.

    A block of images is no run of consecutive ones: of each `blocks` consecutive images every block takes one, and
    which one is random, so that no order of labels makes blocks that differ.
    """

    def __init__(self, shift: Array, blocks: int = BLOCKS) -> None:
        """No features yet. A shift (D,) near their mean, such as the reference's, keeps sums from cancelling."""
        self.shift = np.array(shift, dtype=np.float64)
        if self.shift.ndim != 1 or not np.isfinite(self.shift).all():
            raise ValueError(f"a shift must be finite and (D,), found shape {self.shift.shape}")
        width = len(self.shift)
        # all numbers lie in one array, so that ranks reduce them at once
        self._sums = np.zeros((blocks, 1 + width + width**2))
        self._waiting: list[tuple[Array, NDArray[np.int64]]] = []

    @classmethod
    def of(cls, features: NDArray | Tensor, shift: Array | None = None, blocks: int = 1) -> Moments:
        """Of (N, D) features at hand, in blocks of consecutive ones; about their mean unless a shift is given."""
        wide = as_matrix(features)
        made = cls(wide.mean(0) if shift is None else shift, blocks)
        for block, part in enumerate(np.array_split(made._about_shift(wide), blocks)):
            made._add(block, part)
        return made

    def update(self, features: NDArray | Tensor, first: int) -> None:
        """Adds (B, D) features of the images `first`, `first + 1`, ...

        Raises:
            ValueError: they are not finite, or not as wide as the shift.
        """
        wide = self._about_shift(as_matrix(features))
        self._waiting.append((wide, self._block_of(np.arange(first, first + len(wide)))))
        if sum(len(each) for each, _ in self._waiting) >= _TOGETHER:
            self._settle()

    def merge(self, other: Moments) -> None:
        """Adds what `other` has seen.

        Raises:
            ValueError: it is about another shift, or in another number of blocks.
        """
        if not np.array_equal(self.shift, other.shift) or len(self._sums) != len(other._sums):
            raise ValueError("moments about different shifts or in different blocks do not add up")
        self.sums[:] += other.sums

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Adds what all ranks have seen, on each of them, in one collective on the CPU; also where a rank saw none."""
        if dist.is_initialized():
            dist.all_reduce(torch.from_numpy(self.sums), group=group)

    def state_dict(self) -> dict[str, Array]:
        """Arrays from which `from_state` goes on, bit for bit."""
        return {"shift": self.shift.copy(), "sums": self.sums.copy()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Moments:
        """Goes on from a `state_dict`.

        Raises:
            ValueError: it is none.
        """
        sums = np.array(state["sums"], dtype=np.float64)
        made = cls(state["shift"], len(sums))
        if sums.shape != made._sums.shape or not np.isfinite(sums).all():
            raise ValueError(f"moments of shape {sums.shape} do not fit {len(made.shift)} features")
        made._sums = sums
        return made

    @property
    def sums(self) -> Array:
        """(blocks, 1 + D + D^2): of each block the number, the sum, and the outer product."""
        self._settle()
        return self._sums

    @property
    def blocks(self) -> int:
        return len(self._sums)

    @property
    def counts(self) -> NDArray[np.int64]:
        """(blocks,) features in each block."""
        return self.sums[:, 0].astype(np.int64)

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def mean(self) -> Array:
        return self.gaussian()[0]

    @property
    def covariance(self) -> Array:
        """Unbiased, (D, D)."""
        return self.gaussian()[1]

    def gaussian(self, without: int | None = None) -> tuple[Array, Array]:
        """Mean (D,) and unbiased covariance (D, D) of all blocks, or of all but `without`.

        Raises:
            ValueError: there are fewer than two features.
        """
        sums = self.sums.sum(0)
        if without is not None:
            sums -= self.sums[without]
        count, width = sums[0], len(self.shift)
        if count < 2:
            raise ValueError(f"a covariance needs at least 2 features, found {int(count)}")
        offset = sums[1 : 1 + width] / count
        outer = sums[1 + width :].reshape(width, width)
        return self.shift + offset, (outer - count * np.outer(offset, offset)) / (count - 1)

    def _about_shift(self, wide: Array) -> Array:
        if wide.shape[1] != len(self.shift):
            raise ValueError(f"features are {wide.shape[1]} wide, their shift {len(self.shift)}")
        return wide - self.shift

    def _block_of(self, images: NDArray[np.int64]) -> NDArray[np.int64]:
        """(B,) the block of each image."""
        blocks = len(self._sums)
        rows = torch.from_numpy(images // blocks)
        turns = uniform(0, "jackknife blocks", rows, 1)[:, 0].double().numpy()
        return (images + (turns * blocks).astype(np.int64)) % blocks

    def _settle(self) -> None:
        if not self._waiting:
            return
        wide = np.concatenate([each for each, _ in self._waiting])
        block_of = np.concatenate([each for _, each in self._waiting])
        self._waiting = []
        for block in np.unique(block_of):
            self._add(int(block), wide[block_of == block])

    def _add(self, block: int, part: Array) -> None:
        """Adds features (n, D) about the shift to a block."""
        width = len(self.shift)
        sums = self._sums[block]
        sums[0] += len(part)
        sums[1 : 1 + width] += part.sum(0)
        sums[1 + width :].reshape(width, width)[:] += part.T @ part


def as_matrix(features: NDArray | Tensor) -> Array:
    """(N, D) features as float64 on the CPU.

    Raises:
        ValueError: they have another shape, or numbers that are not finite.
    """
    found = features.detach().cpu().numpy() if isinstance(features, Tensor) else features
    wide = np.asarray(found, dtype=np.float64)
    if wide.ndim != 2 or not np.isfinite(wide).all():
        raise ValueError(f"features must be finite and (N, D), found shape {wide.shape}")
    return wide
