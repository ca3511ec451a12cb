"""Online Sinkhorn self-guidance (Hu et al. 2023, arXiv 2312.08825, section 3): the model finds its own groups.

Stage 1 trains the denoiser unconditionally while the head learns prototypes; from the switch on, the teacher names
each image's prototype, or each patch's, and the denoiser is conditioned on that row. The head learns from detached
features, so L_SK moves the head and prototypes only, and the denoising loss moves no prototype.

Rows are what has a prototype: images, or (level "patch") the L patches of one image after the other. Where the
published method can be read otherwise, `OnlineGuidance` has a switch, and its default is the corrected form.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from selfguide.data.batch import Batch
from selfguide.diffusion.preconditioning import build_preconditioning
from selfguide.distributed import sum_over_ranks, world_size
from selfguide.guidance.component import Component, Inputs, Stepped, Weights
from selfguide.guidance.health import Health
from selfguide.guidance.labels import drop_images, drop_patches, frequencies
from selfguide.guidance.prototype_counts import CONDITIONED, PrototypeCounts
from selfguide.guidance.prototypes import assign, condition_on, extract, unconditional_features
from selfguide.networks.student import Outputs, Student
from selfguide.randomness import normal, stream_seed
from selfguide.sinkhorn import Queue, solve
from selfguide.spec.config import OnlineGuidance, PathConfig
from selfguide.spec.schedules import due

log = logging.getLogger(__name__)

PROTOTYPES = "head.prototypes"  # the parameter (K, P) of the student


class OnlineSource(Component):
    """Two-stage bootstrap; `switch` in images seen."""

    name, wants_teacher = "guidance", True

    def __init__(self, config: OnlineGuidance, path: PathConfig, seed: int, switch: int) -> None:
        self.config, self.seed, self.switch = config, seed, switch
        self.preconditioning = build_preconditioning(path)
        self.prototype_counts = PrototypeCounts(config.groups, config.window, switch)
        self.health = Health(config, switch)
        self._queue: Queue | None = None  # from the first loss on, which knows its width and device
        self._queued: Tensor | None = None  # of a checkpoint, until then
        self.recent: tuple[Tensor, Tensor] | None = None  # embedding and positions, for revival

    def condition(self, batch: Batch, teacher: Student | None, inputs: Inputs) -> Inputs:
        """Unconditional before the switch; with the features that the head reads, unless it reads the step's own."""
        assert teacher is not None
        self.health.see(batch)
        self.prototype_counts.begin_step(batch.images)
        second_stage, extraction = batch.images >= self.switch, self.config.view == "extraction"
        extracted = self.extract(batch, teacher) if second_stage or extraction else None
        if extraction:
            inputs = replace(inputs, features=extracted)
        elif self.config.view_condition == "unconditional":
            inputs = replace(inputs, features=unconditional_features(teacher, batch.x, batch.tau))
        if not second_stage:
            return inputs
        assert extracted is not None
        ids = assign(teacher, extracted)
        self.prototype_counts.count_conditions(ids)
        prototypes = condition_on(teacher, ids, len(batch.x0))
        rate, patches = self.config.drop, len(ids) // len(batch.x0)
        if self.config.level == "patch":
            dropped = drop_patches(self.seed, batch.position, rate, patches)
        else:
            dropped = drop_images(self.seed, batch.position, rate)
        return replace(inputs, condition=prototypes.drop(dropped))

    def extract(self, batch: Batch, teacher: Student) -> Tensor:
        """(rows, F) of a batch, in noise of its own or in the step's.

        Of images as they are: a group of augmented ones would be drawn when sampling, where nothing is augmented.
        """
        if self.config.extraction_noise == "training":
            eps = batch.eps
        else:
            eps = normal(self.seed, "extraction-noise", batch.position, tuple(batch.x0.shape[1:]))
        noise_time, eps = self.config.noise_time, eps.to(batch.x0.dtype)
        return extract(teacher, self.preconditioning, noise_time, batch.original, eps)

    def loss(self, outputs: Outputs, batch: Batch, teacher: Student | None) -> Tensor:
        """lambda L_SK: cross-entropy of the softmax against the Sinkhorn code of the same view."""
        assert outputs.scores is not None and outputs.embedding is not None
        self.health.together = len(batch.tau)
        counted = self._counted(batch, len(outputs.scores))
        codes, dead = self._codes(outputs, counted)
        chosen = outputs.scores if counted is None else outputs.scores[counted]
        entropy = -(codes * F.log_softmax(chosen.float() / self.config.temperature, dim=1)).sum(1)
        self.prototype_counts.count_learned(chosen.detach().argmax(1), entropy, dead)
        if self.config.revive:
            self.recent = outputs.embedding, batch.position
        # an empty choice still hangs in the graph: every rank reduces the same gradients
        loss = entropy.sum() / self._divisor(counted, len(outputs.scores))
        reached = batch.images / max(self.switch, 1) if self.config.warmup == "linear" else 1.0
        return self.config.weight * min(reached, 1.0) * loss

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
                self._queue.load_rows(self._queued)
        return self._queue

    def _divisor(self, counted: Tensor | None, rows: int) -> Tensor | float:
        if counted is None or self.config.mean_over == "all":
            return float(rows)
        count = torch.full((), float(len(counted)), device=counted.device)
        # a mean over ranks: gradients are averaged over them, so this makes a global mean
        return (sum_over_ranks(count) / world_size()).clamp_min(1.0 / world_size())

    def after_step(self, weights: Weights, step: Stepped) -> None:
        """Prototypes stay unit vectors where their average is read as it is: else they are normalised when read."""
        if self.config.condition_rows == "averaged" and self.config.prototype_gradient == "tangent":
            weights.normalise_rows(PROTOTYPES, step.applied)

    def after_average(self, weights: Weights, step: Stepped) -> None:
        """Revives prototypes at the end of a window; keeps the teacher; begins the second stage at the switch.

        There the averages and the teacher become the live student, buffers included (SGFM). A step along the plain
        gradient leaves the sphere, and averages take it so before its rows become unit again (the code).
        """
        self.revive(weights, step)
        if step.images == self.switch:
            weights.restart_averages(step.images)
            weights.refresh_teacher(buffers=True)
        if due(self.config.teacher_refresh, step.images, step.batch):
            follows = self.config.teacher_buffers == "student"
            weights.refresh_teacher(buffers=follows or step.images <= self.switch)
        if self.config.prototype_gradient == "plain":
            weights.normalise_rows(PROTOTYPES, step.applied)

    def revive(self, weights: Weights, step: Stepped) -> int:
        """At the end of a window, prototypes with less than `revive` of an even share become features of a batch.

        That of the last step. How many did; all ranks call.
        """
        # features of a skipped step may not be finite; that is read last, once a window, since it waits for the device
        if not self.config.revive or step.images % self.config.window or not step.applied:
            return 0
        learned = self.prototype_counts.totals()[-1]  # the window that ends here
        share = self.config.revive * learned.sum() / self.config.groups
        weak = (learned < share).nonzero()[:, 0]
        found = self._draw_recent(len(weak), stream_seed(self.seed, "revival", step.images))
        weak = weak[: len(found)]  # there may be fewer features than prototypes in need
        if len(weak):
            weights.replace_rows(PROTOTYPES, weak.to(found.device), found)
        return len(weak)

    def _draw_recent(self, count: int, seed: int) -> Tensor:
        """(n <= count, P) unit features of the last loss over all ranks, each once: alike at any world size."""
        assert self.recent is not None
        # positions ascend, with gaps where the other ranks' micro-batches lie
        mine, positions = self.recent
        each = len(mine) // len(positions)  # rows of an image
        span = torch.stack((positions.min(), -positions.max())).cpu()
        if dist.is_initialized():
            dist.all_reduce(span, op=dist.ReduceOp.MIN)
        first, total = int(span[0]), (int(-span[1]) - int(span[0]) + 1) * each
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
        order = order.to(mine.device)
        wanted = first + order // each
        image = torch.searchsorted(positions, wanted).clamp(max=len(positions) - 1)
        own = image * each + order % each
        return sum_over_ranks(torch.where((positions[image] == wanted)[:, None], mine[own], 0.0))

    def report(self, images: int, teacher: Student | None) -> dict[str, float]:
        assert teacher is not None and self.health.probe is not None
        ids = assign(teacher, self.extract(self.health.probe, teacher))
        return self.health.measure(self.prototype_counts, ids, images)

    def metadata(self) -> dict[str, Any]:
        """p(k) over the last one to two windows of rows conditioned on, whatever the cadence of snapshots."""
        counts = self.prototype_counts.totals()[CONDITIONED].sum(0).tolist()
        conditioned = sum(counts) > 0
        return {
            "source": "online",
            "level": self.config.level,
            "told": conditioned,
            "p": frequencies(counts) if conditioned else None,
            "label_free": True,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Counters and each rank's queue, on rank 0; all ranks call."""
        state = {"counters": self.prototype_counts.totals()}
        if self.config.queue:
            mine = self._queued if self._queue is None else self._queue.saved_rows()
            for rank, queued in enumerate(_gathered(mine)):
                if queued is not None:
                    state[f"queue-{rank}"] = queued
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], rank: int) -> None:
        """Counts go on exactly at any world size. Queues are each rank's own: a new rank begins with an empty one."""
        self.prototype_counts.load_totals(state["counters"], rank)
        queues = sum(name.startswith("queue-") for name in state)
        if queues and queues != world_size() and rank == 0:
            log.warning(
                f"this run goes on with {world_size()} ranks, and {queues} had a queue of their own (guidance.queue): "
                "those of ranks that are gone are lost, and new ranks begin with empty ones"
            )
        # also of a run that goes back, whose queue holds what came later
        self._queue, self._queued = None, state.get(f"queue-{rank}")


def _gathered(mine: Tensor | None) -> list[Tensor | None]:
    """What every rank gave, on rank 0; elsewhere nothing."""
    if world_size() == 1:
        return [mine]
    parts: list[Any] | None = [None] * world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, parts)
    return parts or []
