"""Prototypes written where their masters are: what no gradient does, exactly and alike in every engine.

ZeRO's masters overwrite what is written to live weights, so rows are written into each rank's slice of the flat space.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from selfguide.guidance.online import OnlineSource
from selfguide.randomness import stream_seed
from selfguide.spec.config import Config, OnlineGuidance
from selfguide.training.engine.protocol import Engine
from selfguide.training.state import State

NAME = "head.prototypes"


@torch.no_grad()
def normalise(engine: Engine, applied: Tensor) -> None:
    """Rows become unit vectors after a step that was applied, as in SGFM's published code; all ranks call."""
    groups, width = engine.layout.shapes[engine.layout.names.index(NAME)]
    # in fp64, so that a row that two ranks share has one length in every engine
    squares = torch.zeros(groups, dtype=torch.float64, device=applied.device)
    held = [
        (
            engine.masters[index][inside],
            torch.arange(at.start, at.stop, device=applied.device) // width,
        )
        for index, inside, at in engine.parts_of(NAME)
    ]
    for mine, rows in held:
        squares.index_add_(0, rows, mine.double().square())
    if not engine.replicated:
        dist.all_reduce(squares)
    length = torch.where(applied, squares.sqrt().clamp_min(1e-12), 1.0)
    for mine, rows in held:
        mine.copy_((mine.double() / length[rows]).float())
    engine.refresh()


def revive(state: State, config: Config, applied: Tensor) -> int:
    """At the end of a window, prototypes with less than `revive` of an even share become features of the last batch.

    Masters, averages and the teacher take the new row, the optimiser forgets the old one. How many; all ranks call.
    """
    guidance, source = config.guidance, state.source
    if not isinstance(guidance, OnlineGuidance) or not isinstance(source, OnlineSource):
        return 0
    if not guidance.revive or state.images % guidance.window:
        return 0
    if not applied:  # features of a skipped step may not be finite; read here only, once a window
        return 0
    learned = source.usage.totals()[-1]  # the window that ends here
    weak = (learned < guidance.revive * learned.sum() / guidance.groups).nonzero()[:, 0]
    seed = stream_seed(config.seed, "revival", state.images)
    found = _drawn(source, len(weak), seed)
    weak = weak[: len(found)]  # there may be fewer features than prototypes in need
    if len(weak):
        _write(state, weak.to(found.device), found)
    return len(weak)


def _drawn(source: OnlineSource, count: int, seed: int) -> Tensor:
    """(n <= count, P) unit features of the last micro-batch over all ranks, each once: the same at any world size."""
    assert source.recent is not None
    mine, positions = source.recent
    each = len(mine) // len(positions)  # rows of an image
    span = torch.stack((positions.min(), -positions.max())).cpu()
    if dist.is_initialized():
        dist.all_reduce(span, op=dist.ReduceOp.MIN)
    first, total = int(span[0]), (int(-span[1]) - int(span[0]) + 1) * each
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]
    own = order.to(mine.device) - (int(positions.min()) - first) * each
    here = (own >= 0) & (own < len(mine))
    drawn = torch.where(here[:, None], mine[own.clamp(0, len(mine) - 1)], 0.0)
    if dist.is_initialized():
        dist.all_reduce(drawn)
    return drawn


@torch.no_grad()
def _write(state: State, rows: Tensor, values: Tensor) -> None:
    engine = state.engine
    groups, width = engine.layout.shapes[engine.layout.names.index(NAME)]
    fresh = torch.zeros(groups, width, device=values.device)
    fresh[rows] = values
    moments = engine.moments()
    for index, inside, at in engine.parts_of(NAME):
        numbers = torch.arange(at.start, at.stop, device=values.device)
        new = torch.isin(numbers // width, rows)
        for shard in (engine.masters, *state.averages.shards):
            shard[index][inside][new] = fresh.flatten()[numbers[new]]
        for moment in (moments.first, moments.second):  # mere zeros before the first step
            moment[index][inside][new] = 0.0
    engine.refresh()
    assert state.teacher is not None and state.teacher.module.head is not None
    prototypes = state.teacher.module.head.prototypes
    prototypes[rows] = values.to(prototypes.dtype)
