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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from shards.errors import UserError

Mode = Literal["window", "global"]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

BLOCK = 256  # samples in a block
WINDOW = 64  # blocks in a window: 16,384 samples, 128 MiB of 4x32x32 fp16 latents
_ROUNDS = 8
_LEAST = np.uint64(8)  # values in a half
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_GLOBAL, _BLOCKS, _INSIDE = 1, 2, 3  # purposes of a key; writers use 4
_MIXED = 5
_TAKE = 6  # purpose of the key of the order in which others' tasks are taken


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

    def ordinals(self, positions: ArrayLike) -> I64:
        """Sample ordinals in [0, count) at non-negative `positions` (any shape, int64)."""
        asked = np.asarray(positions, dtype=np.int64)
        if asked.size and asked.min() < 0:
            raise ValueError(f"positions start at 0, got {asked.min()}")
        epochs, index = np.divmod(asked.ravel(), self.count)
        found = (
            self._global(epochs, index) if self.mode == "global" else self._windows(epochs, index)
        )
        return found.reshape(asked.shape)

    def next_need(self, blocks: ArrayLike, position: int) -> NDArray[np.float64]:
        """The first position, from `position` on, whose window holds each of `blocks` (n,).

        -inf where that is the window of `position` itself, and of every block in `global` mode, where
        each is needed all the time. A cache gives up the greatest.
        """
        asked = np.asarray(blocks, dtype=np.int64)
        if self.mode == "global":
            return np.full(asked.shape, -np.inf)
        epoch = position // self.count
        start, stop = self.span(asked, epoch)
        later, _ = self.span(asked, epoch + 1)
        needed = np.where(stop > position, start, later).astype(np.float64)
        return np.where((start <= position) & (stop > position), -np.inf, needed)

    def span(self, blocks: I64, epoch: int) -> tuple[I64, I64]:
        """First and last-plus-one position of the window of an epoch that holds each block."""
        total, window = -(-self.count // self.block), self.window * self.block
        lack = total * self.block - self.count
        order = key(self.seed, epoch, _BLOCKS)
        w = unpermute(blocks, total, order).astype(np.int64) // self.window
        short = int(unpermute(total - 1, total, order)[0]) // self.window
        start = w * window - np.where(w > short, lack, 0)
        stop = np.minimum((w + 1) * window - np.where(w >= short, lack, 0), self.count)
        return epoch * self.count + start, epoch * self.count + stop

    def _global(self, epochs: I64, index: I64) -> I64:
        known, which = np.unique(epochs, return_inverse=True)
        return permute(index, self.count, key(self.seed, known, _GLOBAL)[which]).astype(np.int64)

    def _windows(self, epochs: I64, index: I64) -> I64:
        """Blocks permuted over *slots*; the one short block, the data's last, lands in slot `short`."""
        known, which = np.unique(epochs, return_inverse=True)
        blocks, window = -(-self.count // self.block), self.window * self.block
        lack = blocks * self.block - self.count  # how many samples the short block is short of
        order = key(self.seed, known, _BLOCKS)
        short = unpermute(blocks - 1, blocks, order).astype(np.int64)[which]
        w_short = short // self.window
        before = (w_short + 1) * window - lack  # samples up to the end of the short block's window

        w = np.where(index < before, index, index + lack) // window
        start = w * window - np.where(w > w_short, lack, 0)
        slots = np.minimum(blocks - w * self.window, self.window)
        counts = slots * self.block - np.where(w == w_short, lack, 0)
        inside = mix(key(self.seed, known, _INSIDE)[which] + w.astype(np.uint64))
        k = permute(index - start, counts, inside).astype(np.int64) + w * window

        # number the samples of a window as if the short block were full, to divide by its size
        k += np.where((w == w_short) & (k >= (short + 1) * self.block - lack), lack, 0)
        slot, row = np.divmod(k, self.block)
        asked, back = np.unique(
            which * blocks + slot, return_inverse=True
        )  # few slots, many samples
        epoch, slot = np.divmod(asked, blocks)
        return permute(slot, blocks, order[epoch]).astype(np.int64)[back] * self.block + row


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several data sets in one run: which of them a position takes from, and which of its own positions.

    Of every `block` positions in a row each source has an exact quota, its weight's share, in an order of
    that block's own. Any position costs the same, and each source's positions are used once and in turn, block
    by block, so `Order` says which of its samples they are.
    """

    weights: tuple[float, ...]
    seed: int
    block: int = 1000

    def __post_init__(self) -> None:
        if not self.weights or not all(0 < w < np.inf for w in self.weights):
            raise UserError(f"weights={self.weights}: give each source a positive weight")
        if min(self.quotas) < 1:
            raise UserError(
                f"weights={self.weights}: in a block of {self.block} the least gets nothing; give a larger "
                "block, or leave it out"
            )

    @property
    def quotas(self) -> tuple[int, ...]:
        """Positions of each source in a block; the largest remainders make them sum to it."""
        exact = np.array(self.weights) / sum(self.weights) * self.block
        quotas = np.floor(exact).astype(np.int64)
        most = np.argsort(quotas - exact, kind="stable")[: self.block - quotas.sum()]
        quotas[most] += 1
        return tuple(quotas.tolist())

    def at(self, positions: ArrayLike) -> tuple[I64, I64]:
        """Source of each of `positions` (any shape, not negative), and the position within that source."""
        blocks, within = np.divmod(np.asarray(positions, dtype=np.int64), self.block)
        known, which = np.unique(blocks.ravel(), return_inverse=True)
        keys = key(self.seed, known, _MIXED)[which.reshape(blocks.shape)]
        drawn = permute(within, self.block, keys).astype(np.int64)
        ends = np.cumsum(self.quotas)
        source = np.searchsorted(ends, drawn, side="right")
        quota = np.array(self.quotas)[source]
        return source, blocks * quota + drawn - (ends[source] - quota)

    def used(self, position: int) -> list[tuple[int, int]]:
        """Of each source, before `position`: how many first positions are all used, and from where on none is."""
        full, begun = position // self.block, -(-position // self.block)
        return [(full * quota, begun * quota) for quota in self.quotas]


def permute(index: ArrayLike, count: ArrayLike, key: ArrayLike) -> U64:
    """The images of `index` under the permutation of [0, count) that `key` names; all broadcast."""
    return _walk(index, count, key, _forward)


def unpermute(index: ArrayLike, count: ArrayLike, key: ArrayLike) -> U64:
    """The inverse of `permute`."""
    return _walk(index, count, key, _backward)


def key(*parts: int | I64) -> U64:
    """64-bit keys from whole numbers or arrays of them, each of which changes them altogether.

    The parts broadcast; the result has at least one axis.
    """
    folded = np.zeros(1, dtype=np.uint64)
    for part in parts:
        words = np.array(part & _MASK if isinstance(part, int) else part, dtype=np.uint64)
        folded = mix(mix(np.atleast_1d(words)) ^ folded)
    return folded


def mix(z: U64) -> U64:
    """splitmix64's next word: a bijection of 64-bit words that looks random."""
    z = z + np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _walk(index: ArrayLike, count: ArrayLike, key: ArrayLike, step: Callable[..., U64]) -> U64:
    """Applies `step`, a bijection of [0, a b), until each result is below its count.

    With a, b close to sqrt(count), a b exceeds count by about sqrt(count): few walk twice. Halves
    of a few values mix badly (a count of 4 was 3 % uneven), so tiny counts walk in a larger square.
    """
    words = np.broadcast_arrays(
        *(np.asarray(value, dtype=np.uint64) for value in (index, count, key))
    )
    x, n, keys = (value.ravel() for value in words)
    a = np.maximum(np.sqrt(n.astype(np.float64)).astype(np.uint64) + np.uint64(1), _LEAST)
    b = np.maximum(n // a + np.uint64(1), _LEAST)
    found = step(x, a, b, keys)
    outside = np.flatnonzero(found >= n)
    while outside.size:
        found[outside] = step(found[outside], a[outside], b[outside], keys[outside])
        outside = outside[found[outside] >= n[outside]]
    return found.reshape(words[0].shape)


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


def share(tasks: Sequence[int], rank: int, world: int) -> list[int]:
    """`tasks` as `rank` takes them: its own in order, then those of others in an order that no other rank has.

    Ranks that are done early would else meet at the same task, again and again, and all do it.

    Raises:
        UserError: no such rank.
    """
    if world < 1 or not 0 <= rank < world:
        raise UserError(f"rank={rank} of world={world}: ranks go from 0 to world - 1")
    others = [task for task in tasks if task % world != rank]
    drawn = permute(np.arange(len(others)), len(others), key(rank, _TAKE))
    return [task for task in tasks if task % world == rank] + [others[i] for i in drawn.tolist()]
