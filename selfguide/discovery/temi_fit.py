"""Fits TEMI's heads: on any number of ranks, to be killed and continued, and ends with the best head's groups.

Every rank maps all features and takes its part of each batch. Batches and drawn neighbours are functions of (seed,
epoch, position), marginals and gradients are sums over ranks: so the number of ranks changes nothing but rounding.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from selfguide.discovery import resumable
from selfguide.discovery.corrected import plain
from selfguide.discovery.extraction import checked
from selfguide.discovery.temi import Heads, TemiConfig, pair_losses, update_marginal
from selfguide.distributed import RankInfo, world_size
from selfguide.randomness import stream_seed, uniform
from shards.cli import track
from shards.errors import UserError

ALONE = RankInfo(0, 0, 1)
ROWS = 8192  # features read at once
SAVE_EVERY = 5  # epochs between savings
MODULES = ("student", "teacher", "optimiser")  # of a state, which have states of their own
VALUES = ("marginal", "losses", "epoch")


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What the best head of the teacher says."""

    ids: NDArray[np.int32]  # (N,) in [0, K)
    confidence: NDArray[np.float32]  # (N,) the probability of that group
    groups: int
    losses: tuple[float, ...]  # (H,) mean training loss of the last epoch
    heads: Heads  # the teacher

    @property
    def head(self) -> int:
        """Whose loss is lowest."""
        return int(np.argmin(self.losses))

    @property
    def counts(self) -> NDArray[np.int64]:
        """(K,) images of each group; over N, the p(k) that sampling draws from."""
        return np.bincount(self.ids, minlength=self.groups)

    @property
    def used(self) -> int:
        """Groups with at least one image."""
        return int((self.counts > 0).sum())


@dataclass(kw_only=True)
class _State:
    """Everything an epoch changes; the same on every rank."""

    student: Heads
    teacher: Heads
    optimiser: torch.optim.Optimizer
    marginal: Tensor  # (H, K)
    epoch: int = 0  # finished
    losses: Tensor  # (H,) of the last finished epoch

    def state_dict(self) -> dict[str, Any]:
        modules = {name: getattr(self, name).state_dict() for name in MODULES}
        return modules | {name: getattr(self, name) for name in VALUES}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        for name in MODULES:
            getattr(self, name).load_state_dict(saved[name])
        for name in VALUES:
            setattr(self, name, saved[name])


def fit(
    features: NDArray[np.generic],
    near: NDArray[np.integer],
    config: TemiConfig,
    *,
    rank_info: RankInfo = ALONE,
    device: torch.device | str | None = None,
    partial: Path | None = None,
    doing: str = "TEMI",
) -> Fitted:
    """Fits `config.heads` heads to features (N, F), which may be memory-mapped, and their neighbours (N, n).

    All ranks call and get the same; `device` is the rank's own unless given. With `partial`, a folder, rank 0 leaves
    its state there every few epochs, and a fit that finds the state of the same fit there goes on from it.

    Raises:
        UserError: settings that do not fit the features, features that are constant or not finite, or a loss that
            became so.
    """
    config.check(len(features))
    checked(features)
    state = _begin(features.shape[1], config, torch.device(device or rank_info.device))
    if config.standardise:
        mean, spread = _moments(features)
        for heads in (state.student, state.teacher):
            heads.standardise(mean, spread)
    file = None
    if partial is not None:
        file = state_file(partial, features, near, config)
        # every rank reads before rank 0 saves again, which takes an epoch of all
        saved = resumable.load(file, state.marginal.device)
        if saved is not None:
            state.load_state_dict(saved)
    remaining = range(state.epoch, config.epochs)
    shown = track(remaining, len(remaining), doing) if rank_info.rank == 0 else remaining
    for epoch in shown:
        _epoch(state, features, near, config, rank_info, epoch)
        last = epoch + 1 == config.epochs
        if file is not None and rank_info.rank == 0 and (last or (epoch + 1) % SAVE_EVERY == 0):
            resumable.save(file, state.state_dict())
    losses = tuple(state.losses.tolist())
    ids, confidence = assign(state.teacher, int(np.argmin(losses)), features)
    return Fitted(
        ids=ids,
        confidence=confidence,
        groups=config.groups,
        losses=losses,
        heads=state.teacher,
    )


def _moments(features: NDArray[np.generic]) -> tuple[NDArray, NDArray]:
    """Mean and standard deviation of each feature, (F,) fp64, read piece by piece."""
    total, squares = np.zeros(features.shape[1]), np.zeros(features.shape[1])
    # a shift by the first row keeps the one-pass variance from cancelling
    first = np.asarray(features[0], dtype=np.float64)
    for start in range(0, len(features), ROWS):
        shifted = np.asarray(features[start : start + ROWS], dtype=np.float64) - first
        total += shifted.sum(0)
        squares += np.square(shifted).sum(0)
    offset = total / len(features)
    variance = squares / len(features) - offset**2
    return first + offset, np.sqrt(np.maximum(variance, 0))


def _begin(width: int, config: TemiConfig, device: torch.device) -> _State:
    student = Heads(width, config).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimiser = torch.optim.AdamW(
        _parameters(student, config), lr=0.0, weight_decay=config.weight_decay, fused=True
    )
    marginal = torch.full((config.heads, config.groups), 1 / config.groups, device=device)
    losses = torch.full((config.heads,), torch.inf, device=device)
    return _State(
        student=student, teacher=teacher, optimiser=optimiser, marginal=marginal, losses=losses
    )


def _parameters(heads: Heads, config: TemiConfig) -> list[dict[str, Any]]:
    """AdamW's groups."""
    everything = list(heads.parameters())
    if config.decay_biases:
        return [{"params": everything}]
    rest = [p for p in everything if all(p is not bias for bias in heads.biases)]
    return [{"params": rest}, {"params": heads.biases, "weight_decay": 0.0}]


def _epoch(
    state: _State,
    features: NDArray[np.generic],
    near: NDArray[np.integer],
    config: TemiConfig,
    rank_info: RankInfo,
    epoch: int,
) -> None:
    """One pass over all images, in batches as equal as can be."""
    count = len(features)
    pairs = _pairs(near, config, epoch)  # (N, 2)
    steps = config.steps(count)
    keep = config.teacher_momentum(count)
    warm = max(1, round(config.warmup * config.epochs) * steps)
    total = torch.zeros_like(state.losses)
    for step, batch in enumerate(np.array_split(pairs, steps), start=epoch * steps):
        for group in state.optimiser.param_groups:
            group["lr"] = config.rate(step, warm, count)
        mine = np.array_split(batch, rank_info.world)[rank_info.rank]  # (b, 2); b may be 0
        both = np.asarray(features[mine.T.reshape(-1)], dtype=np.float32)  # (2b, F)
        x = torch.from_numpy(both).to(state.marginal.device)
        total += _step(state, x, len(batch), config, frozen=epoch < config.frozen)
        with (
            torch.no_grad()
        ):  # the teacher keeps so much of itself and takes the rest from the student
            averages: list[Tensor] = list(state.teacher.parameters())
            torch._foreach_lerp_(averages, list(state.student.parameters()), 1 - keep)
    state.losses = total / count
    state.epoch = epoch + 1
    if not torch.isfinite(state.losses).all():
        raise UserError(
            f"TEMI's loss is not finite in epoch {epoch + 1} with learning_rate={config.learning_rate}: "
            "give a lower one, or standardise the features"
        )


def _pairs(near: NDArray[np.integer], config: TemiConfig, epoch: int) -> NDArray[np.int64]:
    """(N, 2) ordinals in this epoch's order: every image once, beside a neighbour drawn evenly."""
    count = len(near)
    shuffle = torch.Generator().manual_seed(stream_seed(config.seed, "temi-order", epoch))
    order = torch.randperm(count, generator=shuffle)
    positions = epoch * count + torch.arange(count)
    u = uniform(config.seed, "temi-neighbour", positions, 1)[:, 0] * config.neighbours
    chosen = np.asarray(near)[order.numpy(), u.long().numpy()]
    return np.stack((order.numpy(), chosen.astype(np.int64)), axis=1)


def _step(state: _State, x: Tensor, count: int, config: TemiConfig, *, frozen: bool) -> Tensor:
    """One update by a batch of `count` pairs, of which this rank holds x (2b, F); the batch's summed losses (H,)."""
    with torch.no_grad():
        first, second = state.teacher(x).chunk(2, dim=1)
    teacher = (first, second)
    state.marginal = update_marginal(state.marginal, teacher, config.marginal_momentum)
    own, other = state.student(x).chunk(2, dim=1)
    losses = pair_losses((own, other), teacher, state.marginal, beta=config.beta).sum(1)  # (H,)
    state.optimiser.zero_grad()
    (losses.sum() / (count * config.heads)).backward()
    losses = losses.detach()
    if world_size() > 1:
        _sum_over_ranks([p.grad for p in state.student.parameters() if p.grad is not None], losses)
    if frozen:
        for parameter in (state.student.directions, state.student.gain):  # the last layer
            parameter.grad = None  # AdamW then leaves it alone, decay included
    state.optimiser.step()
    return losses


def _sum_over_ranks(gradients: list[Tensor], losses: Tensor) -> None:
    """In place, by one collective."""
    tensors = [*gradients, losses]
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def assign(
    heads: Heads, head: int, features: NDArray[np.generic]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The likeliest group of each of `features` (N, F) by the head of that number, and its probability, both (N,)."""
    ids = np.empty(len(features), dtype=np.int32)
    confidence = np.empty(len(features), dtype=np.float32)
    for start in range(0, len(features), ROWS):
        rows = np.array(features[start : start + ROWS], dtype=np.float32)  # torch wants its own
        logits = heads(torch.from_numpy(rows).to(heads.mean.device), head)  # (B, K)
        best, group = logits.softmax(1).max(1)
        ids[start : start + len(rows)] = group.cpu().numpy()
        confidence[start : start + len(rows)] = best.cpu().numpy()
    return ids, confidence


def state_file(
    partial: Path,
    features: NDArray[np.generic],
    near: NDArray[np.integer],
    config: TemiConfig,
) -> Path:
    """Where a fit of these settings to these features keeps its state."""
    return partial / f"temi-{_fingerprint(features, near, config)}.pt"


def _fingerprint(
    features: NDArray[np.generic], near: NDArray[np.integer], config: TemiConfig
) -> str:
    """Identifies a fit by its settings and a sample of what it read."""
    digest = hashlib.sha256(json.dumps(plain(config), sort_keys=True).encode())
    digest.update(repr((features.shape, near.shape)).encode())
    for row in np.linspace(0, len(features) - 1, 64, dtype=np.int64):
        digest.update(np.ascontiguousarray(features[row]).tobytes())
        digest.update(np.ascontiguousarray(near[row]).tobytes())
    return digest.hexdigest()[:16]
