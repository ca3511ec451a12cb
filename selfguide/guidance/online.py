"""Online Sinkhorn self-guidance (Hu et al. 2023, arXiv 2312.08825, section 3): the model finds its own groups.

Stage 1 trains the denoiser unconditionally while the head learns prototypes; from the switch on, the teacher names
each image's prototype and the denoiser is told that row. The head learns from detached features, so L_SK moves the
head and prototypes only, and the denoising loss moves no prototype.

Corrections to the paper's code, each the default here: the head reads the very view that ids are extracted from
(own noise, one noise-time, told nothing), so every image counts and training and extraction agree
(`view: training` is the paper's masked form); the teacher's BatchNorm buffers follow the student's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from selfguide.conditions import Condition
from selfguide.distributed import world_size
from selfguide.guidance.source import dropped, frequencies, sum_counts
from selfguide.preconditioning import Preconditioning, build_preconditioning
from selfguide.randomness import normal
from selfguide.sinkhorn import sinkhorn
from selfguide.spec.config import OnlineGuidance, PathConfig
from selfguide.student import Batch, Outputs, Student


@torch.no_grad()
def extract(
    student: Student,
    preconditioning: Preconditioning,
    config: OnlineGuidance,
    x0: Tensor,
    eps: Tensor,
) -> Tensor:
    """(B, F) features of images noised to `noise_time`, told nothing."""
    tau = x0.new_full((len(x0),), config.noise_time, dtype=torch.float32)
    x = preconditioning.noised(x0, eps, tau).to(next(student.parameters()).dtype)
    return student.features(x, tau, Condition.unconditional(len(x0), x0.device))


@torch.no_grad()
def assign(student: Student, features: Tensor) -> Tensor:
    """(B,) nearest prototypes under a student in eval mode."""
    assert student.head is not None
    return student.head(features).argmax(1)


class OnlineSource:
    """Two-stage bootstrap; `switch` in images seen."""

    def __init__(self, config: OnlineGuidance, path: PathConfig, seed: int, switch: int) -> None:
        self.config, self.seed, self.switch = config, seed, switch
        self.preconditioning = build_preconditioning(path)
        # of told ids on this rank: in the window that is full, and in the one that fills
        self.counts = torch.zeros(2, config.groups, dtype=torch.int64)
        self._images = -1  # at the last step that told

    def condition(self, batch: Batch, teacher: Student | None) -> Condition:
        assert teacher is not None
        telling = batch.images >= self.switch
        if telling or self.config.view == "extraction":
            eps = normal(self.seed, "extraction-noise", batch.position, tuple(batch.x0.shape[1:]))
            features = extract(
                teacher, self.preconditioning, self.config, batch.x0, eps.to(batch.x0.dtype)
            )
            if self.config.view == "extraction":
                batch.features = features
        if not telling:
            return Condition.unconditional(len(batch.x0), batch.x0.device)
        ids = assign(teacher, features)
        # stays on the device, and scatter needs no look at the values: no step waits for a copy
        self.counts = self.counts.to(ids.device)
        self._turn_window(batch.images)
        self.counts[1].scatter_add_(0, ids, torch.ones_like(ids))
        assert teacher.head is not None
        told = Condition.told(dense=teacher.head.rows()[ids].detach())
        return told.drop(dropped(self.seed, batch.position, self.config.drop))

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor | None:
        """lambda L_SK: cross-entropy of the softmax against the Sinkhorn code of the same view."""
        assert outputs.scores is not None
        if self.config.view == "extraction":
            chosen = outputs.scores
            count: Tensor | float = len(chosen)
        else:
            low, high = self.config.mask
            inside = (batch.tau >= low) & (batch.tau <= high)
            chosen = outputs.scores[inside]
            count = _mean_over_ranks(inside.sum())
        codes = sinkhorn(
            chosen.detach(), epsilon=self.config.epsilon, iterations=self.config.iterations
        )
        entropy = -(codes * F.log_softmax(chosen.float() / self.config.temperature, dim=1)).sum(1)
        # an empty choice still hangs in the graph: every rank reduces the same gradients
        loss = entropy.sum() / max(float(count), 1.0 / world_size())
        return self.config.weight * min(batch.images / max(self.switch, 1), 1.0) * loss

    def state(self) -> dict[str, Any]:
        """p(k) over the last one to two windows of told images, whatever the cadence of snapshots."""
        counts = self.counters().sum(0).tolist()
        told = sum(counts) > 0
        return {
            "source": "online",
            "told": told,
            "p": frequencies(counts) if told else None,
            "label_free": True,
        }

    def _turn_window(self, images: int) -> None:
        """Windows begin at the switch and every `window` images after it; groups drift, so old counts go."""
        if images != self._images and (images - self.switch) % self.config.window == 0:
            self.counts = torch.stack((self.counts[1], torch.zeros_like(self.counts[1])))
        self._images = images  # several micro-batches of a step come with one count

    def counters(self) -> Tensor:
        return sum_counts(self.counts.cpu())

    def restore(self, counters: Tensor) -> None:
        """On rank 0 the sums of all ranks, elsewhere zeros: integers add up at any world size."""
        self.counts.copy_(counters)

    def health(self) -> dict[str, float]:
        """Share of prototypes in use, and the perplexity of p(k) as a share of K."""
        counts = self.counters().sum(0).double()
        if counts.sum() == 0:
            return {}
        p = counts / counts.sum()
        perplexity = math.exp(-torch.special.xlogy(p, p).sum().item())
        return {"used": (counts > 0).double().mean().item(), "perplexity": perplexity / len(p)}


def _mean_over_ranks(count: Tensor) -> float:
    """Mean number of counted images per rank: gradients are averaged over ranks, so this makes a global mean."""
    total = count.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()
    return float(total.item())
