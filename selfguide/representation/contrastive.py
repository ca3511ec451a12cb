"""Contrastive self-distillation: an image's two views, seen by the student and by its average, are told from others.

As in DDAE++ (Xiang et al. 2025, arXiv 2505.10999, section 4.2) the student's feature of the training view, in the
step's own noise, is compared by MoCo v3's loss (Chen et al. 2021, arXiv 2104.02057) with the teacher's feature of
another view at one noise-time. Negatives are the other images of a micro-batch on all ranks, so the loss and its
gradients are those of one process with all of these.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from selfguide.data.batch import Batch
from selfguide.data.crop_flip import mirrored, sample_crop_flip
from selfguide.diffusion.conditions import NULL, UNCONDITIONAL, Condition, mirrored_labels
from selfguide.diffusion.preconditioning import build_preconditioning
from selfguide.distributed import sum_over_ranks, world_size
from selfguide.guidance.component import Component, Stepped, Weights
from selfguide.networks.branch import Branch
from selfguide.networks.student import Outputs, Student
from selfguide.randomness import normal, stream_seed
from selfguide.spec.config import Config

# a view is moved by up to this part of the edge: 4 of 32 pixels, as CIFAR is cropped since He et al. 2016
PART = 8


class Contrastive(Component):
    """weight x MoCo v3's loss between a branch of the student and the same branch of the teacher."""

    name, wants_teacher = "contrastive", True

    def __init__(self, config: Config) -> None:
        self.settings, self.seed, guidance = config.contrastive, config.seed, config.guidance
        self.view_seed = stream_seed(self.seed, "view", 0)
        self.augments = config.augment.on
        self.mirrors = config.data.flip or self.augments
        self.preconditioning = build_preconditioning(config.path)
        minimal = self.settings.target == "minimal"
        self.noise_time = self.preconditioning.path.last if minimal else self.settings.noise_time
        # the state without a condition that the network is trained in from the start
        trained_null = guidance.source in ("labels", "sidecar")
        self.state = NULL if trained_null else UNCONDITIONAL
        # an online source keeps the teacher that both read, by its own settings
        self.keeps_teacher = not guidance.learns_online
        self._hits: Tensor | None = None
        self._seen = 0

    def own_loss(self, outputs: Outputs, batch: Batch, teacher: Student | None) -> Tensor:
        """Of this rank's images; its mean over ranks is that of the micro-batch on all of them."""
        assert outputs.branches is not None and teacher is not None
        loss, hits = contrast(
            outputs.branches[self.name], self.keys(batch, teacher), self.settings.temperature
        )
        self._hits = hits.sum() if self._hits is None else self._hits + hits.sum()
        self._seen += len(hits)
        return cast(float, self.settings.weight) * loss

    @torch.no_grad()
    def keys(self, batch: Batch, teacher: Student) -> Tensor:
        """(B, P) of this rank's images: what the teacher makes of another view, in noise of its own."""
        x0 = self.view(batch.original, batch.position)
        eps = normal(self.seed, "contrastive-noise", batch.position, tuple(x0.shape[1:]))
        tau = x0.new_full((len(x0),), self.noise_time, dtype=torch.float32)
        x = self.preconditioning.noised(x0, eps.to(x0.dtype), tau)
        nothing = Condition(torch.full((len(x0),), self.state, device=x0.device))
        if self.augments and self.settings.view == "moved":
            # an augmented network knows mirrored images by their label alone
            turned = mirrored(self.view_seed, batch.position).to(x0.device)
            nothing = replace(nothing, augment=mirrored_labels(turned))
        branch = cast(Branch, teacher.branches[self.name])
        found = branch.target(teacher.backbone, x.to(batch.x.dtype), tau, nothing)
        assert found is not None
        return found

    def view(self, x0: Tensor, position: Tensor) -> Tensor:
        """Another view of the images (B, C, H, W) that the student sees, as they were before they were augmented.

        Where training mirrors images it is mirrored with probability 1/2; it is moved by up to an eighth of the edge,
        with reflected borders.
        """
        if self.settings.view == "same":
            return x0
        edge = x0.shape[-1]
        border = max(edge // PART, 1)
        padded = F.pad(x0, (border,) * 4, mode="reflect")
        grid, window = (edge + 2 * border,) * 2, (edge, edge)
        moved = sample_crop_flip(self.view_seed, position, grid, flip=self.mirrors, window=window)
        return moved.images(padded)

    def after_average(self, weights: Weights, step: Stepped) -> None:
        """The teacher is the average as it is after each step, as MoCo's momentum encoder is."""
        if self.keeps_teacher:
            weights.refresh_teacher(buffers=True)

    def report(self, images: int, teacher: Student | None) -> dict[str, float]:
        """contrastive_accuracy: the share of images whose own key was the nearest of all."""
        if self._hits is None:
            return {}
        seen = self._hits.new_tensor(self._seen)
        hits, of = sum_over_ranks(torch.stack((self._hits, seen)).float()).tolist()
        self._hits, self._seen = None, 0
        return {"contrastive_accuracy": hits / of}


def contrast(queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """MoCo v3's loss: 2 T x cross-entropy of each query with its own key among those of all ranks.

    Args:
        queries: (B, P) of this rank.
        keys: (B, P), in the same order; as many on every rank. They get no gradient.

    Returns:
        The mean over this rank's queries, and (B,) bool: which of them has its own key nearest.
    """
    keys = _gathered(F.normalize(keys.detach().float(), dim=1))
    logits = F.normalize(queries.float(), dim=1) @ keys.T / temperature
    rank = dist.get_rank() if world_size() > 1 else 0
    own = rank * len(queries) + torch.arange(len(queries), device=logits.device)
    loss = 2 * temperature * F.cross_entropy(logits, own)
    return loss, logits.detach().argmax(1) == own


def _gathered(mine: Tensor) -> Tensor:
    """(B, P) of every rank, one rank after the other."""
    if world_size() == 1:
        return mine
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine)
    return torch.cat(parts)
