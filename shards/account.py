"""Proof that an epoch was read whole: every position counted once, and every sample of it, none twice, none missing.

A rank counts what it was given; that must be what the arithmetic of its share says, for each epoch it ends.
Which samples these were is summed up by the power sums of their ordinals, and over all ranks these must be
those of 0 .. N-1, which have closed forms (Faulhaber): one sample in another's place always changes the sums,
two do too, and more would have to conspire. All ranks together prove an epoch by adding four integers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.errors import DamagedError

_WORD = 1 << 64


@dataclass(frozen=True, kw_only=True)
class Account:
    """Of one epoch, what one rank was given; or several, added up."""

    epoch: int
    seen: int = 0  # samples that are the ones asked for
    substituted: int = 0  # samples that stand in for damaged ones
    first: int = 0  # sum of the ordinals asked for, modulo 2^64
    second: int = 0  # sum of their squares, modulo 2^64

    @property
    def given(self) -> int:
        return self.seen + self.substituted

    def add(self, ordinals: NDArray[np.int64], substituted: int) -> Account:
        """With one batch more; `ordinals` are those that were asked for."""
        words = ordinals.astype(np.uint64)
        return self + Account(
            epoch=self.epoch,
            seen=len(ordinals) - substituted,
            substituted=substituted,
            first=int(words.sum(dtype=np.uint64)),
            second=int((words * words).sum(dtype=np.uint64)),
        )

    def __add__(self, other: Account) -> Account:
        if other.epoch != self.epoch:
            raise ValueError(f"accounts of epochs {self.epoch} and {other.epoch} do not add up")
        return Account(
            epoch=self.epoch,
            seen=self.seen + other.seen,
            substituted=self.substituted + other.substituted,
            first=(self.first + other.first) % _WORD,
            second=(self.second + other.second) % _WORD,
        )


def whole(epoch: int, count: int) -> Account:
    """What all ranks together must have seen of an epoch of `count` samples."""
    return Account(
        epoch=epoch,
        seen=count,
        first=count * (count - 1) // 2 % _WORD,
        second=(count - 1) * count * (2 * count - 1) // 6 % _WORD,
    )


def prove(accounts: Iterable[Account], count: int) -> Account:
    """The sum of all ranks' accounts of an epoch that none of them began in the middle of.

    Raises:
        DamagedError: a sample is missing, or was read twice.
    """
    first, *others = accounts
    total = sum(others, start=first)
    expected = whole(total.epoch, count)
    if (total.given, total.first, total.second) != (count, expected.first, expected.second):
        raise DamagedError(
            f"epoch {total.epoch}: {total.seen:,} samples seen and {total.substituted:,} substituted, of "
            f"{count:,}; these are not all of them once each"
        )
    return total
