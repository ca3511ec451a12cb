"""The proof that all ranks together read each epoch whole, carried over restarts by what a checkpoint holds.

Every rank's stream keeps accounts (`shards.read.audit`). The image count alone says when an epoch ends, so all ranks
come to it at once, and one all-reduce of four words adds theirs up; 64-bit integers wrap around, as these sums may.
A rank meets few of all blocks and forgets them when it ends, so how much is damaged is judged here as well: by what
stood in for it, of all ranks and attempts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist

from shards.errors import DamagedError
from shards.read.audit import EpochAudit, check_epoch, source_suffix
from shards.read.options import ReadOptions
from shards.read.stream import Stream

log = logging.getLogger(__name__)

Plain = Mapping[str, int]  # an account as a checkpoint's manifest holds it


class Epochs:
    """Of one attempt. `settle` and `carried` are for all ranks, between two global batches."""

    def __init__(
        self,
        stream: Stream,
        carried: Iterable[Plain] | None,
        damaged: float = ReadOptions.damaged,
    ) -> None:
        """`carried`: of the checkpoint that the attempt resumes; None of one that kept no accounts.
        `damaged`: share of a data set's samples that may be substituted in an epoch.
        """
        self._stream, self._bound = stream, damaged
        self._before = {a.key: a for a in (EpochAudit(**plain) for plain in carried or ())}
        # an epoch whose beginning nobody kept an account of cannot be proven; the next one can
        unknown = {a.key for a in stream.under_way()} - self._before.keys()
        self._unknown = unknown if carried is None else set()

    def settle(self) -> list[EpochAudit]:
        """Proves the epochs that ended with the last global batch, and logs them. Often there is none.

        Raises:
            DamagedError: on all ranks, where a sample was missing or read twice, or too many were substituted.
        """
        ended = [*self._stream.ended]
        self._stream.ended.clear()
        totals = [a for a in self._with_before(ended) if a.key not in self._unknown]
        for total in totals:
            check_epoch([total], self._stream.manifests[total.source].count)
            log.info(
                f"epoch {total.epoch}{source_suffix(total)}: {total.seen:,} seen + {total.substituted:,} "
                f"substituted = {total.total:,}"
            )
        return totals

    def carried(self) -> tuple[Plain, ...] | None:
        """For a checkpoint: of the epochs under way, what all attempts and ranks were given; None where unknown.

        Raises:
            DamagedError: on all ranks, where too many samples were substituted.
        """
        under_way = self._with_before(self._stream.under_way())
        if any(account.key in self._unknown for account in under_way):
            return None
        return tuple(asdict(account) for account in under_way)

    def _with_before(self, accounts: list[EpochAudit]) -> list[EpochAudit]:
        """Added up over the ranks, and over earlier attempts."""
        if not accounts:
            return []
        words = np.array([account.sums for account in accounts], dtype=np.uint64)
        if dist.is_initialized():
            together = torch.from_numpy(words.view(np.int64).copy())
            dist.all_reduce(together)
            words = together.numpy().view(np.uint64)
        totals = [a.with_sums(row) for a, row in zip(accounts, words.tolist(), strict=True)]
        totals = [a + self._before[a.key] if a.key in self._before else a for a in totals]
        self._judge(totals)
        return totals

    def _judge(self, totals: list[EpochAudit]) -> None:
        for total in (a for a in totals if a.substituted):
            count = self._stream.manifests[total.source].count
            if total.substituted > self._bound * count:
                raise DamagedError(
                    f"epoch {total.epoch}{source_suffix(total)}: {total.substituted:,} of {count:,} samples were "
                    f"substituted so far, more than the share data.damaged={self._bound:g} of them: mend the shards by "
                    "`python -m tools.shards repair`, or allow more"
                )
