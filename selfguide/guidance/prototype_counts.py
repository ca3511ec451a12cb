"""How prototypes are used: as conditions, and by what the head learned from; in windows, since groups drift."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from selfguide.distributed import sum_over_ranks

# rows of the counts: of each, the window that is full and the one that fills
CONDITIONED, LEARNED = slice(0, 2), slice(2, 4)


class Learned(NamedTuple):
    """What the head learned from since the last report, over all ranks."""

    entropy: float  # mean of -sum_k q_k ln p_k, before any weight; NaN of nothing
    dead: float  # mean number of prototypes that Sinkhorn could not reach


class PrototypeCounts:
    """This rank's counts. They are integers, so they add up over ranks to the same at any world size.

    Windows of conditions begin at `switch` and every `window` images after it, those of the head at image 0.
    """

    def __init__(self, groups: int, window: int, switch: int) -> None:
        self.counts = torch.zeros(4, groups, dtype=torch.int64)
        self.window, self.switch = window, switch
        self._images = -1  # at the last step
        self._learned = torch.zeros(4, dtype=torch.float64)  # entropy, rows, dead, steps

    def begin_step(self, images: int) -> None:
        """To be called at every step; several micro-batches of one come with one count of images."""
        if images != self._images:
            for rows, start in ((CONDITIONED, self.switch), (LEARNED, 0)):
                if images >= start and (images - start) % self.window == 0:
                    self.counts[rows] = torch.stack(
                        (self.counts[rows][1], torch.zeros_like(self.counts[0]))
                    )
        self._images = images

    def count_conditions(self, ids: Tensor) -> None:
        """The prototypes (N,) that the step is conditioned on."""
        self._add(CONDITIONED, ids)

    def count_learned(self, ids: Tensor, entropy: Tensor, dead: Tensor) -> None:
        """The nearest prototypes (N,) of what the head learned from, its entropy (N,), and who was dead (K,)."""
        self._add(LEARNED, ids)
        ones = entropy.new_ones(())
        some = min(len(ids), 1) * ones  # of a batch without a row Sinkhorn could reach nobody
        noted = torch.stack((entropy.detach().sum(), len(ids) * ones, dead.sum() * some, some))
        self._learned = self._learned.to(noted.device) + noted

    def _add(self, rows: slice, ids: Tensor) -> None:
        # stays on the device, and scatter needs no look at the values: no step waits for a copy
        self.counts = self.counts.to(ids.device)
        self.counts[rows][1].scatter_add_(0, ids, torch.ones_like(ids))

    def totals(self) -> Tensor:
        """(4, K) over all ranks, on the CPU; all ranks call."""
        return sum_over_ranks(self.counts.to("cpu", copy=True))

    def load_totals(self, totals: Tensor, rank: int) -> None:
        """On rank 0 the sums of all ranks, elsewhere zeros."""
        self.counts = totals.clone() if rank == 0 else torch.zeros_like(totals)
        # the next step is one that was not counted, also where a run goes back to its beginning
        self._images = -1

    def report(self) -> Learned:
        """All ranks call; the next report begins here."""
        entropy, rows, dead, steps = sum_over_ranks(self._learned.cpu()).tolist()
        self._learned = torch.zeros_like(self._learned)
        return Learned(entropy / rows if rows else float("nan"), dead / max(steps, 1.0))
