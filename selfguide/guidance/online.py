"""Online Sinkhorn self-guidance (Hu et al. 2023, arXiv 2312.08825, section 3): the model finds its own groups.

Stage 1 trains the denoiser unconditionally while the head learns prototypes; from the switch on, the teacher names
each image's prototype, or each patch's, and the denoiser is told that row. The head learns from detached features, so
L_SK moves the head and prototypes only, and the denoising loss moves no prototype.

Rows are what has a prototype: images, or (level "patch") the L patches of one image after the other. Where the
published method can be read otherwise, `OnlineGuidance` has a switch, and its default is the corrected form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from selfguide.diffusion.conditions import Condition
from selfguide.diffusion.preconditioning import Preconditioning, build_preconditioning
from selfguide.distributed import world_size
from selfguide.guidance.prototype_counts import TOLD, Usage
from selfguide.guidance.source import dropped, dropped_patches, frequencies
from selfguide.networks.student import Batch, Outputs, Student
from selfguide.randomness import normal
from selfguide.sinkhorn import Queue, solve
from selfguide.spec.config import OnlineGuidance, PathConfig

if TYPE_CHECKING:
    from selfguide.snapshot import Snapshot


@torch.no_grad()
def extract(
    student: Student,
    preconditioning: Preconditioning,
    config: OnlineGuidance,
    x0: Tensor,
    eps: Tensor,
) -> Tensor:
    """(rows, F) features of images noised to `noise_time`, told nothing."""
    tau = x0.new_full((len(x0),), config.noise_time, dtype=torch.float32)
    x = preconditioning.noised(x0, eps, tau).to(next(student.parameters()).dtype)
    return _untold(student, x, tau)


@torch.no_grad()
def _untold(student: Student, x: Tensor, tau: Tensor) -> Tensor:
    return student.features(x, tau, Condition.unconditional(len(x), x.device))


@torch.no_grad()
def assign(student: Student, features: Tensor) -> Tensor:
    """(rows,) nearest prototypes under a student in eval mode."""
    assert student.head is not None
    return student.head(features).argmax(1)


@torch.no_grad()
def tell(student: Student, ids: Tensor, images: int) -> Condition:
    """The prototypes `ids` (rows,) of so many images: one each, or one for each of their patches."""
    assert student.head is not None
    rows = student.head.told_rows()[ids]  # (rows, P)
    if student.pooling == "patch":
        return Condition.told(patch=rows.view(images, len(ids) // images, -1))
    return Condition.told(dense=rows)


def patch_layout(snapshot: Snapshot, x0: Tensor) -> Condition:
    """The prototype of each patch of images in model space (B, C, H, W): SGFM's patch-layout query.

    Every image meets the same noise, so that a layout does not depend on what else is asked.
    """
    guidance = snapshot.config.guidance
    assert isinstance(guidance, OnlineGuidance) and guidance.level == "patch"
    eps = normal(0, "extraction-noise", torch.zeros(1), tuple(x0.shape[1:])).expand_as(x0)
    x0, eps = x0.to(snapshot.device), eps.to(snapshot.device)
    preconditioning = build_preconditioning(snapshot.config.path)
    features = extract(snapshot.student, preconditioning, guidance, x0, eps)
    return tell(snapshot.student, assign(snapshot.student, features), len(x0))


class OnlineSource:
    """Two-stage bootstrap; `switch` in images seen."""

    def __init__(self, config: OnlineGuidance, path: PathConfig, seed: int, switch: int) -> None:
        self.config, self.seed, self.switch = config, seed, switch
        self.preconditioning = build_preconditioning(path)
        self.usage = Usage(config.groups, config.window, switch)
        self._queue: Queue | None = None  # from the first loss on, which knows its width and device
        self._queued: Tensor | None = None  # of a checkpoint, until then
        self.recent: tuple[Tensor, Tensor] | None = None  # embedding and positions, for revival

    def condition(self, batch: Batch, teacher: Student | None) -> Condition:
        assert teacher is not None
        telling, extraction = batch.images >= self.switch, self.config.view == "extraction"
        self.usage.turn(batch.images)
        extracted = self.extract(batch, teacher) if telling or extraction else None
        if extraction:
            batch.features = extracted
        elif self.config.view_condition == "unconditional":
            batch.features = _untold(teacher, batch.x, batch.tau)
        if not telling:
            return Condition.unconditional(len(batch.x0), batch.x0.device)
        assert extracted is not None
        ids = assign(teacher, extracted)
        self.usage.told(ids)
        told = tell(teacher, ids, len(batch.x0))
        return told.drop(self._dropped(batch, len(ids) // len(batch.x0)))

    def extract(self, batch: Batch, teacher: Student) -> Tensor:
        """(rows, F) of a batch, in noise of its own or in the step's."""
        if self.config.extraction_noise == "training":
            eps = batch.eps
        else:
            eps = normal(self.seed, "extraction-noise", batch.position, tuple(batch.x0.shape[1:]))
        return extract(teacher, self.preconditioning, self.config, batch.x0, eps.to(batch.x0.dtype))

    def _dropped(self, batch: Batch, patches: int) -> Tensor:
        if self.config.level == "patch":
            return dropped_patches(self.seed, batch.position, self.config.drop, patches)
        return dropped(self.seed, batch.position, self.config.drop)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor | None:
        """lambda L_SK: cross-entropy of the softmax against the Sinkhorn code of the same view."""
        assert outputs.scores is not None and outputs.embedding is not None
        counted = self._counted(batch, len(outputs.scores))
        codes, dead = self._codes(outputs, counted)
        chosen = outputs.scores if counted is None else outputs.scores[counted]
        entropy = -(codes * F.log_softmax(chosen.float() / self.config.temperature, dim=1)).sum(1)
        self.usage.learned(chosen.detach().argmax(1), entropy, dead)
        if self.config.revive:
            self.recent = outputs.embedding, batch.position
        # an empty choice still hangs in the graph: every rank reduces the same gradients
        loss = entropy.sum() / self._divisor(counted, len(outputs.scores))
        return self.config.weight * min(batch.images / max(self.switch, 1), 1.0) * loss

    def _counted(self, batch: Batch, rows: int) -> Tensor | None:
        """(n,) which of so many rows have an L_SK that counts, by the noise-time of their image; None for all."""
        if self.config.view == "extraction":
            return None
        low, high = self.config.mask
        inside = (batch.tau >= low) & (batch.tau <= high)
        # rows are the patches of one image, then those of the next; the host waits here for their number, once, where
        # every pick by a mask would
        return inside.repeat_interleave(rows // len(inside)).nonzero()[:, 0]

    @torch.no_grad()
    def _codes(self, outputs: Outputs, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sinkhorn codes of the counted rows, and dead prototypes (K,)."""
        assert outputs.scores is not None and outputs.embedding is not None
        everything = counted is None or self.config.codes_over == "all"
        shared = slice(None) if everything else counted
        scores = outputs.scores.detach()[shared]
        count = len(scores)
        if self.config.queue:
            assert outputs.prototypes is not None
            queue = self._opened(outputs.embedding)
            scores = torch.cat((scores, queue.rows() @ outputs.prototypes.T))
            queue.push(outputs.embedding[shared])
        codes, dead = solve(scores, epsilon=self.config.epsilon, iterations=self.config.iterations)
        codes = codes[:count]
        return (codes[counted] if everything and counted is not None else codes), dead

    def _opened(self, like: Tensor) -> Queue:
        if self._queue is None:
            self._queue = Queue(self.config.queue, like.shape[1], like.device)
            if self._queued is not None:
                self._queue.restore(self._queued)
        return self._queue

    def _divisor(self, counted: Tensor | None, rows: int) -> Tensor | float:
        if counted is None or self.config.mean_over == "all":
            return float(rows)
        count = torch.full((), float(len(counted)), device=counted.device)
        return _mean_over_ranks(count).clamp_min(1.0 / world_size())

    def state(self) -> dict[str, Any]:
        """p(k) over the last one to two windows of told rows, whatever the cadence of snapshots."""
        counts = self.usage.totals()[TOLD].sum(0).tolist()
        told = sum(counts) > 0
        return {
            "source": "online",
            "level": self.config.level,
            "told": told,
            "p": frequencies(counts) if told else None,
            "label_free": True,
        }

    def held(self) -> dict[str, Tensor]:
        held = {"counters": self.usage.totals()}
        if self.config.queue:
            mine = self._queued if self._queue is None else self._queue.state()
            for rank, queued in enumerate(_gathered(mine)):
                if queued is not None:
                    held[f"queue-{rank}"] = queued
        return held

    def restore(self, held: Mapping[str, Tensor], rank: int) -> None:
        """Counts go on exactly at any world size. Queues are each rank's own: a new rank begins with an empty one."""
        self.usage.restore(held["counters"], rank)
        self._queued = held.get(f"queue-{rank}")


def _gathered(mine: Tensor | None) -> list[Tensor | None]:
    """What every rank gave, on rank 0; elsewhere nothing."""
    if world_size() == 1:
        return [mine]
    parts: list[Any] | None = [None] * world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, parts)
    return parts or []


def _mean_over_ranks(count: Tensor) -> Tensor:
    """Mean number of counted rows per rank: gradients are averaged over ranks, so this makes a global mean."""
    total = count.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total / world_size()
