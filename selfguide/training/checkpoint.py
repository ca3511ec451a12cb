"""Resume state in our own format: one file per rank with its ranges of the parameter space, the manifest last.

Because files hold ranges of one space, a checkpoint loads at any world size and into either engine. Random numbers
and data order are functions of the image count, so the count is all that has to be remembered of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from selfguide.distributed import RankInfo, on_every_rank, on_rank_0
from selfguide.spec.run import Lease
from selfguide.training.ema import Averages
from selfguide.training.engine.layout import (
    Layout,
    ParameterSpace,
    Range,
    Shard,
    length,
    overlaps,
    pieces,
)
from selfguide.training.engine.protocol import Engine, Moments
from selfguide.training.state import State
from selfguide.weights import publish_tensors
from shards import storage
from shards.errors import UserError

REPLICATED = "replicated.safetensors"  # what every rank holds alike: buffers, the teacher, what components count


def save(folder: Path, state: State, rank_info: RankInfo, lease: Lease) -> None:
    """All ranks call; on return the checkpoint is complete on every rank's word. `training.saver` does not wait for it.

    Raises:
        NoRoomError: the disk is full, or may not be written; the checkpoint before it is whole.
    """
    if on_rank_0(lambda: lease.holds(folder)):
        return  # an earlier attempt came as far, with the same numbers
    vectors, fence = kept_vectors(state), lease.fence(folder)
    # also the barrier: every part is written
    written = on_every_rank(lambda: write_vectors(folder, vectors, state.engine, rank_info, fence))
    parts, ranges = zip(*written, strict=True)
    counted = state.components.state_dict()

    def publish() -> None:
        everywhere = publish_tensors(folder / REPLICATED, replicated(state, counted), fence)
        lease.publish(folder, extra=about(state, ranges, lease), parts=[*parts, everywhere])

    on_rank_0(publish)


def about(state: State, ranges: Sequence[Sequence[Range]], lease: Lease) -> dict[str, Any]:
    """What a manifest says beside its files; `ranges` are those that each rank writes."""
    engine = state.engine
    return {
        "images": state.images,
        "steps": engine.moments().count,
        "ema_since": state.averages.since,
        "averages": [spec.key for spec in state.averages.specs],
        "total": engine.layout.total,
        "names": list(engine.layout.names),
        "shapes": list(engine.layout.shapes),
        # buffers that a state_dict holds; others are tables that the model makes by itself
        "persistent": sorted(_persistent(engine.module)),
        "engine": engine.name,
        "ranges": ranges,
        "origin": dict(state.origin),
        "accounts": state.audits,
        "stability": state.stability.plain(),
        "attempt": lease.number,
    }


def kept_vectors(state: State) -> dict[str, Shard]:
    """All that is kept of the parameter space, by its name in the files."""
    names = [f"ema-{spec.key}" for spec in state.averages.specs]
    return _vectors(state.engine, state.engine.moments(), state.averages, names)


def _vectors(
    engine: Engine, moments: Moments, averages: Averages, names: Sequence[str]
) -> dict[str, Shard]:
    """All that is kept of the parameter space, by its name in the files; averages go by `names`."""
    held = {"master": engine.masters, "first": moments.first, "second": moments.second}
    return held | dict(zip(names, averages.shards, strict=True))


def write_vectors(
    folder: Path,
    vectors: Mapping[str, Shard],
    space: ParameterSpace,
    rank_info: RankInfo,
    fence: storage.Fence,
) -> tuple[dict[str, Any], Sequence[Range]]:
    """Writes what this rank owns of `vectors`; returns what a manifest says of the file, and which ranges it holds.

    Each number is written once: where every rank owns all, each writes an even share.
    """
    tensors, ranges = share(vectors, space, rank_info)
    return publish_tensors(folder / part_name(rank_info.rank), tensors, fence), ranges


def written_ranges(space: ParameterSpace, rank_info: RankInfo) -> Sequence[Range]:
    """What a rank writes: what it owns, or an even share where every rank owns everything."""
    if not space.replicated:
        return space.ranges
    even = -(-space.layout.total // rank_info.world)
    window = (rank_info.rank * even, (rank_info.rank + 1) * even)
    return tuple(both for _, _, both in overlaps(space.ranges, (window,)))


@torch.no_grad()
def share(
    vectors: Mapping[str, Shard],
    space: ParameterSpace,
    rank_info: RankInfo,
    empty: Callable[[int], Tensor] = torch.empty,
    *,
    non_blocking: bool = False,
) -> tuple[dict[str, Tensor], Sequence[Range]]:
    """What this rank writes of `vectors`, end to end in tensors that `empty` makes, and which ranges they hold."""
    ranges, tensors = written_ranges(space, rank_info), {}
    for name, shard in vectors.items():
        tensors[name] = empty(length(ranges))
        parts = pieces(tensors[name], ranges)
        for mine, part, (low, high) in overlaps(space.ranges, ranges):
            start = space.ranges[mine][0]
            parts[part].copy_(shard[mine][low - start : high - start], non_blocking=non_blocking)
    return tensors, ranges


@torch.no_grad()
def read_vectors(
    folder: Path,
    ranges: Sequence[Sequence[Range]],
    vectors: Mapping[str, Shard],
    space: ParameterSpace,
) -> None:
    """Fills what this rank owns of `vectors` from the files of the ranks that wrote, which hold `ranges`."""
    for rank, theirs in enumerate(ranges):
        parts = list(overlaps(space.ranges, theirs))
        if not parts:
            continue
        starts = [length(theirs[:index]) - theirs[index][0] for index in range(len(theirs))]
        with safe_open(folder / part_name(rank), framework="pt") as file:
            for name, shard in vectors.items():
                written = file.get_slice(name)
                for mine, their, (low, high) in parts:
                    start = space.ranges[mine][0]
                    found = written[starts[their] + low : starts[their] + high]
                    shard[mine][low - start : high - start] = found


def part_name(rank: int) -> str:
    """The file that a rank writes of a checkpoint."""
    return f"rank-{rank:05d}.safetensors"


def replicated(state: State, counted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What all ranks hold alike, as tensors of its own that no step changes; rank 0 writes it.

    `counted` is the state of the components, which all ranks ask for together.
    """
    held = {f"buffer.{name}": buffer for name, buffer in state.engine.module.named_buffers()}
    if state.teacher is not None:
        held |= {f"teacher.{n}": t for n, t in state.teacher.module.state_dict().items()}
    return {n: t.detach().clone() for n, t in (held | {**counted}).items()}


def load(folder: Path, state: State, rank_info: RankInfo) -> None:
    """Brings `state` to where `folder` was written, whatever the world size or engine then and now.

    That its files are those that were written is for `training.resume` to say, before.

    Raises:
        UserError: the checkpoint holds other parameters or averages than this model has.
    """
    manifest = storage.read_manifest(folder)
    if manifest is None:
        raise RuntimeError(f"{folder} is not a complete checkpoint")
    engine, held = state.engine, load_file(folder / REPLICATED)
    difference = _difference(manifest, engine.layout) or _other_buffer(
        held, engine.module, manifest.get("persistent", ())
    )
    if difference is not None:
        raise UserError(
            f"{folder} was written by another model: {difference}. Resume it by its own config, or submit this one "
            "as a new run"
        )
    keys, names, ranges = averages_in(manifest)
    wanted = [spec.key for spec in state.averages.specs]
    if keys != wanted:
        raise UserError(
            f"{folder} was written with the averages {', '.join(keys)}, and this config keeps {', '.join(wanted)}: "
            "resume it by its own config, or submit this one as a new run"
        )
    moments = Moments(_like(engine.masters), _like(engine.masters), manifest["steps"])
    read_vectors(folder, ranges, _vectors(engine, moments, state.averages, names), engine)
    engine.load_moments(moments)
    engine.refresh()
    state.averages.since = manifest["ema_since"]
    state.images = manifest["images"]
    state.origin = manifest["origin"]
    kept = manifest.get("accounts")  # earlier checkpoints had none
    state.audits = None if kept is None else tuple(kept)
    state.stability.load(manifest.get("stability"), state.images)
    with torch.no_grad():
        for name, buffer in engine.module.named_buffers():
            buffer.copy_(held[f"buffer.{name}"])
    if state.teacher is not None:
        state.teacher.module.load_state_dict(_under("teacher.", held))
    state.components.load_state_dict(held, rank_info.rank)


def averages_in(
    manifest: Mapping[str, Any],
) -> tuple[Sequence[str], Sequence[str], Sequence[Sequence[Range]]]:
    """Keys of the averages that a checkpoint holds, their names in its files, and the ranges of each file."""
    keys = manifest.get("averages")
    if keys is None:  # an earlier checkpoint numbered the averages, and a rank had one range
        keys = [str(halflife) for halflife in manifest["ema_halflives"]]
        names = [f"ema-{index}" for index in range(len(keys))]
        return keys, names, [[tuple(each)] for each in manifest["ranges"]]
    ranges = [[tuple(each) for each in held] for held in manifest["ranges"]]
    return keys, [f"ema-{key}" for key in keys], ranges


def _difference(manifest: Mapping[str, Any], layout: Layout) -> str | None:
    """The first tensor of a checkpoint that is none of this model, or has another shape; None where there is none."""
    held = manifest["names"]
    for index, (theirs, mine) in enumerate(itertools.zip_longest(held, layout.names)):
        if theirs != mine:
            if theirs is not None and theirs not in layout.names:
                return f"it holds {theirs}, which this model lacks"
            if mine is not None and mine not in held:
                return f"it lacks {mine}, which this model has"
            return f"{theirs} has another place among its parameters"
        # earlier ones kept no shapes
        shape = manifest["shapes"][index] if "shapes" in manifest else None
        if shape is not None and tuple(shape) != layout.shapes[index]:
            return f"{mine} is {tuple(shape)} there and {layout.shapes[index]} here"
    if manifest["total"] != layout.total:
        return f"its parameters are {manifest['total']:,} numbers there and {layout.total:,} here"
    return None


def _other_buffer(
    held: Mapping[str, Tensor], module: nn.Module, persistent: Iterable[str] = ()
) -> str | None:
    """The first buffer of this model that a checkpoint lacks, or holds in another shape; None where there is none.

    So is one of those that it calls `persistent` and this model has not.
    """
    for name, buffer in module.named_buffers():
        theirs = held.get(f"buffer.{name}")
        if theirs is None:
            return f"it lacks the buffer {name}, which this model has"
        if theirs.shape != buffer.shape:
            return f"{name} is {tuple(theirs.shape)} there and {tuple(buffer.shape)} here"
    known = {name for name, _ in module.named_buffers()}
    more = next((name for name in persistent if name not in known), None)
    return more and f"it holds the buffer {more}, which this model lacks"


def _persistent(module: nn.Module) -> set[str]:
    return module.state_dict().keys() & {name for name, _ in module.named_buffers()}


def _under(prefix: str, held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in held.items() if n.startswith(prefix)}


def _like(shard: Shard) -> Shard:
    return tuple(torch.empty_like(part) for part in shard)
