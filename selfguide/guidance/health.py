"""What is measured of an online bootstrap at every report; `selfguide.spec.advice` judges it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from selfguide.data.batch import Batch
from selfguide.distributed import sum_over_ranks, world_size
from selfguide.guidance.prototype_counts import LEARNED, PrototypeCounts
from selfguide.spec.config import OnlineGuidance

PROBE = 256  # images of each rank whose prototypes are asked for again at every report


class Health:
    """Keeps the first images of the attempt: between two reports their prototypes change by learning alone."""

    def __init__(self, config: OnlineGuidance, switch: int) -> None:
        self._config, self._switch = config, switch
        self.probe: Batch | None = None
        self.together = 0  # images of this rank that share statistics
        self._ids: Tensor | None = None

    def see(self, batch: Batch) -> None:
        """To be called with every batch; the first is remembered."""
        if self.probe is None:
            kept = ("x0", "eps", "tau", "x", "position", "ordinal")
            few = {name: getattr(batch, name)[:PROBE].clone() for name in kept}
            whole = None if batch.unaugmented is None else batch.unaugmented[:PROBE].clone()
            self.probe = replace(batch, **few, unaugmented=whole, label=None, crop_flip=None)
            self.together = len(batch.x0)

    def measure(
        self, prototype_counts: PrototypeCounts, ids: Tensor, images: int
    ) -> dict[str, float]:
        """For the line of a report at so many images; `ids` (rows,) are the probe's prototypes now. All ranks call.

        used        share of prototypes that were nearest to something in the last one to two windows
        perplexity  exp of the entropy of how often each was, as a share of K: 1 is even
        largest     share of the fullest one
        dead        prototypes that Sinkhorn could not reach, a mean over steps
        code_loss   L_SK / ln K without weights: 1 is a head that sees no structure
        churn       share of the probe's rows that the teacher puts elsewhere than at the last report
        """
        groups, learned = self._config.groups, prototype_counts.report()
        counts = prototype_counts.totals()[LEARNED].sum(0).double()
        found: dict[str, float] = {"dead": learned.dead}
        if counts.sum() > 0:
            p = counts / counts.sum()
            entropy = -torch.special.xlogy(p, p).sum().item()
            found |= {
                "used": (counts > 0).double().mean().item(),
                "perplexity": math.exp(entropy) / groups,
                "largest": p.max().item(),
                "code_loss": learned.entropy / math.log(groups),
            }
        if self._ids is not None:
            found["churn"] = _share_moved(self._ids, ids)
        self._ids = ids
        facts = {
            "groups": groups,
            "counted": int(counts.sum()),
            "rows": self._rows(ids),
            "warm": min(images / max(self._switch, 1), 1.0),
        }
        return {name: v for name, v in found.items() if math.isfinite(v)} | facts

    def _rows(self, ids: Tensor) -> int:
        """What Sinkhorn shares out at once over all ranks, a queue aside."""
        assert self.probe is not None
        each = len(ids) // len(self.probe.x0)
        low, high = self._config.mask
        partial = self._config.view == "training" and self._config.codes_over == "counted"
        share = high - low if partial else 1.0
        return round(self.together * world_size() * each * share)


def _share_moved(before: Tensor, now: Tensor) -> float:
    counts = torch.stack(((before != now).sum(), before.new_tensor(len(before)))).cpu()
    moved = sum_over_ranks(counts)
    return (moved[0] / moved[1]).item()
