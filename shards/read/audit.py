"""Proof that an epoch was asked for whole: every sample of it counted once, none twice, none missing.

A rank adds up, of the batches it was given, how many samples they hold and the power sums of their ordinals. Over
all ranks these must be the sums of 0 .. N-1, which have closed forms (Faulhaber): one sample in another's place always
changes them, two do too, and more would have to conspire. So all ranks together prove an epoch by adding four
integers, and a run that is resumed in the middle of one proves it by carrying four.

What is proven is order, ranks and restarts: the ordinals are those of the plan, in batches that arrived. That the bytes
of an ordinal are those that were written is for the xxh3 of its block to say, and both together say that an epoch
was read; neither would see a batch whose rows were cut out of a sound block at the wrong place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from shards.errors import DamagedError

_WORD = 1 << 64


@dataclass(frozen=True, kw_only=True)
class EpochAudit:
    """Of one epoch of one data set, what one rank was given; or several ranks, added up."""

    epoch: int
    source: int = 0  # which data set of a mixture
    seen: int = 0  # samples that are the ones asked for
    substituted: int = 0  # samples that stand in for damaged ones
    first: int = 0  # sum of the ordinals asked for, modulo 2^64
    second: int = 0  # sum of their squares, modulo 2^64

    @property
    def total(self) -> int:
        return self.seen + self.substituted

    @property
    def key(self) -> tuple[int, int]:
        """What it is an account of: accounts of one key add up."""
        return self.source, self.epoch

    @property
    def sums(self) -> tuple[int, int, int, int]:
        """Four words of 64 bits, to be added up modulo 2^64."""
        return self.seen, self.substituted, self.first, self.second

    def with_sums(self, sums: Iterable[int]) -> EpochAudit:
        """An account of the same epoch whose `sums` are these."""
        seen, substituted, first, second = sums
        return replace(self, seen=seen, substituted=substituted, first=first, second=second)

    def add(self, ordinals: NDArray[np.int64], substituted: int) -> EpochAudit:
        """With one batch more; `ordinals` are those that were asked for."""
        words = ordinals.astype(np.uint64)
        first, second = words.sum(dtype=np.uint64), (words * words).sum(dtype=np.uint64)
        seen = len(ordinals) - substituted
        return self + self.with_sums((seen, substituted, int(first), int(second)))

    def __add__(self, other: EpochAudit) -> EpochAudit:
        if other.key != self.key:
            raise ValueError(f"accounts of {self.key} and {other.key} do not add up")
        return self.with_sums((a + b) % _WORD for a, b in zip(self.sums, other.sums, strict=True))


def complete_epoch(epoch: int, count: int) -> EpochAudit:
    """What all ranks together must have seen of an epoch of `count` samples."""
    return EpochAudit(
        epoch=epoch,
        seen=count,
        first=count * (count - 1) // 2 % _WORD,
        second=(count - 1) * count * (2 * count - 1) // 6 % _WORD,
    )


def check_epoch(audits: Iterable[EpochAudit], count: int) -> EpochAudit:
    """The sum of all accounts of an epoch, of every rank and of every attempt that worked on it.

    Raises:
        DamagedError: a sample is missing, or was read twice.
    """
    first, *others = audits
    total = sum(others, start=first)
    expected = complete_epoch(total.epoch, count)
    if (total.total, total.first, total.second) != (count, expected.first, expected.second):
        raise DamagedError(
            f"epoch {total.epoch}{source_suffix(total)}: {total.seen:,} samples seen and {total.substituted:,} "
            f"substituted, of {count:,}; these are not all of them once each"
        )
    return total


def source_suffix(audit: EpochAudit) -> str:
    """Words that say which data set of a mixture an account is of; none for the first, or the only one."""
    return f" of source {audit.source}" if audit.source else ""
