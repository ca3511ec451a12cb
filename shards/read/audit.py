"""Audits an epoch: every sample must have been requested exactly once over all ranks and attempts.

For its batches, a rank counts samples and adds up the ordinals and their squares. Over all
ranks these must equal the sums over 0 .. N-1, which have closed forms (Faulhaber): one wrong ordinal always
changes them, two do as well, and more would have to conspire. So all ranks check an epoch together by adding four
integers, and a run that resumes within an epoch carries four integers.

This checks order, ranks and restarts: the ordinals are those of the plan, in batches that arrived. That the bytes
of an ordinal are those that were written is checked by the xxh3 of its block. Neither check would notice a batch whose
rows were cut out of an intact block at the wrong place.
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
    """What one rank, or several ranks added up, read of one epoch of one data set."""

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
        """Source and epoch: audits with the same key add up."""
        return self.source, self.epoch

    @property
    def sums(self) -> tuple[int, int, int, int]:
        """Four words of 64 bits, to be added up modulo 2^64."""
        return self.seen, self.substituted, self.first, self.second

    def with_sums(self, sums: Iterable[int]) -> EpochAudit:
        """An audit of the same epoch with these `sums`."""
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
            raise ValueError(f"audits of {self.key} and {other.key} do not add up")
        return self.with_sums((a + b) % _WORD for a, b in zip(self.sums, other.sums, strict=True))


def complete_epoch(epoch: int, count: int) -> EpochAudit:
    """The audit of a complete epoch of `count` samples, over all ranks."""
    return EpochAudit(
        epoch=epoch,
        seen=count,
        first=count * (count - 1) // 2 % _WORD,
        second=(count - 1) * count * (2 * count - 1) // 6 % _WORD,
    )


def check_epoch(audits: Iterable[EpochAudit], count: int) -> EpochAudit:
    """The sum of all audits of an epoch, over every rank and attempt that worked on it.

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
    """Text that names the source of an audit in a mixture; empty for the first, or only, source."""
    return f" of source {audit.source}" if audit.source else ""
