"""Which sample stands at which position: a pure function, the same for every world size.

A position g counts the samples a run has consumed. Its epoch is g // N, and each epoch is a
permutation of the N samples computed one index at a time, so that starting at any g costs the same:

    global   sample = P_epoch[i]                                   i = g mod N
    window   the blocks are permuted, W of them in a row form a window, and the samples inside each
             window are permuted: a reader needs W blocks at hand rather than the whole data set.

P is a generalised Feistel network on Z_a x Z_b with a b >= n, walked along its cycle until it falls
inside n (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). The random functions are
splitmix64 (Steele et al. 2014). NumPy's generators may change between versions; this must not, so
a test holds golden values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.errors import UserError

Mode = Literal["window", "global"]
U64 = NDArray[np.uint64]

BLOCK = 256  # samples in a block
WINDOW = 64  # blocks in a window: 16,384 samples, 128 MiB of 4x32x32 fp16 latents
_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_GLOBAL, _BLOCKS, _INSIDE = 1, 2, 3  # purposes of a key


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of `count` samples under `seed`; every epoch has its own permutation."""

    count: int
    seed: int
    mode: Mode = "window"
    block: int = BLOCK
    window: int = WINDOW

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise UserError(f"mode={self.mode!r} is no order of samples: give 'window' or 'global'")
        for name in ("count", "block", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: give at least 1")

    def ordinals(self, positions: ArrayLike) -> NDArray[np.int64]:
        """Sample ordinals in [0, count) at non-negative `positions` (any shape, int64)."""
        asked = np.asarray(positions, dtype=np.int64)
        if asked.size and asked.min() < 0:
            raise ValueError(f"positions start at 0, got {asked.min()}")
        epochs, inside = np.divmod(asked, self.count)
        found = np.empty_like(asked)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            found[here] = self._epoch(int(epoch), inside[here].astype(np.uint64))
        return found

    def _epoch(self, epoch: int, index: U64) -> NDArray[np.int64]:
        if self.mode == "global":
            return permute(index, self.count, key(self.seed, epoch, _GLOBAL)).astype(np.int64)
        return self._windows(epoch, index.astype(np.int64))

    def _windows(self, epoch: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Blocks permuted over *slots*; the one short block, the data's last, lands in slot `short`."""
        blocks, window = -(-self.count // self.block), self.window * self.block
        lack = blocks * self.block - self.count  # how many samples the short block is short of
        order = key(self.seed, epoch, _BLOCKS)
        short = int(unpermute(blocks - 1, blocks, order).item())
        before = (
            short // self.window + 1
        ) * window - lack  # samples up to the short block's window

        w = np.where(index < before, index, index + lack) // window
        start = w * window - np.where(w > short // self.window, lack, 0)
        slots = np.minimum(blocks - w * self.window, self.window)
        held = slots * self.block - np.where(w == short // self.window, lack, 0)
        inside_key = mix(np.uint64(key(self.seed, epoch, _INSIDE)) + w.astype(np.uint64))
        k = permute((index - start).astype(np.uint64), held.astype(np.uint64), inside_key)

        # number the samples of a window as if the short block were full, to divide by its size
        k = k.astype(np.int64) + w * window
        k += np.where((w == short // self.window) & (k >= (short + 1) * self.block - lack), lack, 0)
        slot, row = np.divmod(k, self.block)
        return permute(slot.astype(np.uint64), blocks, order).astype(np.int64) * self.block + row


def permute(index: ArrayLike, count: ArrayLike, key: ArrayLike) -> U64:
    """The images of `index` under the permutation of [0, count) that `key` names; all broadcast."""
    return _walk(index, count, key, _forward)


def unpermute(index: ArrayLike, count: ArrayLike, key: ArrayLike) -> U64:
    """The inverse of `permute`."""
    return _walk(index, count, key, _backward)


def key(*parts: int) -> int:
    """One 64-bit key from whole numbers (negative ones too), each of which changes it altogether."""
    folded = 0
    for part in parts:
        word = mix(np.array([part & _MASK], dtype=np.uint64)) ^ np.uint64(folded)
        folded = int(mix(word)[0])
    return folded


def mix(z: U64) -> U64:
    """splitmix64's next word: a bijection of 64-bit words that looks random."""
    z = z + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _walk(index: ArrayLike, count: ArrayLike, key: ArrayLike, step: Callable[..., U64]) -> U64:
    """Applies `step`, a bijection of [0, a b), until each result is below its count.

    With a, b close to sqrt(count), a b exceeds count by about sqrt(count): few walk twice.
    """
    words = (np.asarray(value, dtype=np.uint64) for value in (index, count, key))
    x, n, keys = (np.atleast_1d(value) for value in np.broadcast_arrays(*words))
    a = np.sqrt(n.astype(np.float64)).astype(np.uint64) + np.uint64(1)
    b = n // a + np.uint64(1)
    found = step(x, a, b, keys)
    outside = np.flatnonzero(found >= n)
    while outside.size:
        found[outside] = step(found[outside], a[outside], b[outside], keys[outside])
        outside = outside[found[outside] >= n[outside]]
    return found.reshape(np.broadcast_shapes(*(np.shape(value) for value in (index, count, key))))


def _forward(x: U64, a: U64, b: U64, keys: U64) -> U64:
    left, right = np.divmod(x, b)
    for i in range(0, _ROUNDS, 2):
        left = (left + _draw(right, keys, i) % a) % a
        right = (right + _draw(left, keys, i + 1) % b) % b
    return left * b + right


def _backward(x: U64, a: U64, b: U64, keys: U64) -> U64:
    left, right = np.divmod(x, b)
    for i in range(_ROUNDS - 2, -1, -2):
        right = (right + b - _draw(left, keys, i + 1) % b) % b
        left = (left + a - _draw(right, keys, i) % a) % a
    return left * b + right


def _draw(half: U64, keys: U64, number: int) -> U64:
    return mix(half ^ mix(keys + np.uint64(number)))
