"""Resume state in our own format: one file per rank with its ranges of the parameter space, the manifest last.

Because files hold ranges of one space, a checkpoint loads at any world size and into either engine. Random numbers
and data order are functions of the image count, so the count is all that has to be remembered of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from selfguide.distributed import RankInfo, on_every_rank, on_rank_0
from selfguide.spec.run import Lease, damaged
from selfguide.training.ema import Averages
from selfguide.training.engine.layout import ParameterSpace, Range, Shard, length, overlaps, pieces
from selfguide.training.engine.protocol import Engine, Moments
from selfguide.training.state import State
from selfguide.weights import publish_tensors
from shards import storage

_NAME = re.compile(r"img-(\d+)(\.\d+)?")
REPLICATED = "replicated.safetensors"  # what every rank holds alike: buffers, the teacher, what components count


def save(folder: Path, state: State, rank_info: RankInfo, lease: Lease) -> None:
    """All ranks call; on return the checkpoint is complete on every rank's word.

    Raises:
        NoRoomError: the disk is full, or may not be written; the checkpoint before it is whole.
    """
    if on_rank_0(lambda: lease.holds(folder)):
        return  # an earlier attempt came as far, with the same numbers
    engine, moments = state.engine, state.engine.moments()
    names = [f"ema-{spec.key}" for spec in state.averages.specs]
    vectors = _vectors(engine, moments, state.averages, names)
    # also the barrier: every part is written
    written = on_every_rank(
        lambda: write_vectors(folder, vectors, engine, rank_info, lease.fence(folder))
    )
    parts, ranges = zip(*written, strict=True)
    held = state.components.state_dict()

    def publish() -> None:
        replicated = publish_tensors(
            folder / REPLICATED, _replicated(state, held), lease.fence(folder)
        )
        extra = {
            "images": state.images,
            "steps": moments.count,
            "ema_since": state.averages.since,
            "averages": [spec.key for spec in state.averages.specs],
            "total": engine.layout.total,
            "names": list(engine.layout.names),
            "ranges": ranges,
            "origin": dict(state.origin),
            "accounts": state.audits,
            "stability": state.stability.plain(),
            "attempt": lease.number,
        }
        lease.publish(folder, extra=extra, parts=[*parts, replicated])

    on_rank_0(publish)


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
    ranges = space.ranges
    if space.replicated:
        share = -(-space.layout.total // rank_info.world)
        window = (rank_info.rank * share, (rank_info.rank + 1) * share)
        ranges = tuple(both for _, _, both in overlaps(space.ranges, (window,)))
    tensors = {}
    for name, shard in vectors.items():
        tensors[name] = torch.empty(length(ranges), dtype=torch.float32)
        parts = pieces(tensors[name], ranges)
        for mine, part, (low, high) in overlaps(space.ranges, ranges):
            start = space.ranges[mine][0]
            parts[part].copy_(shard[mine][low - start : high - start])
    return publish_tensors(folder / part_name(rank_info.rank), tensors, fence), ranges


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
    return f"rank-{rank:05d}.safetensors"


def _replicated(state: State, components: dict[str, Tensor]) -> dict[str, Tensor]:
    held = {f"buffer.{n}": b.detach().cpu().clone() for n, b in state.engine.module.named_buffers()}
    if state.teacher is not None:
        held |= {
            f"teacher.{n}": t.detach().cpu().clone()
            for n, t in state.teacher.module.state_dict().items()
        }
    return held | {n: t.cpu() for n, t in components.items()}


def load(folder: Path, state: State, rank_info: RankInfo) -> None:
    """Brings `state` to where `folder` was written, whatever the world size or engine then and now.

    That its files are those that were written is for `training.resume` to say, before.

    Raises:
        RuntimeError: the checkpoint holds other parameters than this model has.
    """
    manifest = storage.read_manifest(folder)
    if manifest is None:
        raise RuntimeError(f"{folder} is not a complete checkpoint")
    engine = state.engine
    if tuple(manifest["names"]) != engine.layout.names or manifest["total"] != engine.layout.total:
        raise RuntimeError(
            f"{folder} was written by another model: its parameters have other names or sizes"
        )
    keys = manifest.get("averages")
    if keys is None:  # a checkpoint of before numbered the averages, and a rank had one range
        keys = [str(halflife) for halflife in manifest["ema_halflives"]]
        names = [f"ema-{index}" for index in range(len(keys))]
        ranges = [[tuple(each)] for each in manifest["ranges"]]
    else:
        names = [f"ema-{key}" for key in keys]
        ranges = [[tuple(each) for each in held] for held in manifest["ranges"]]
    if keys != [spec.key for spec in state.averages.specs]:
        raise RuntimeError(f"{folder} was written with other averages: {', '.join(keys)}")
    moments = Moments(_like(engine.masters), _like(engine.masters), manifest["steps"])
    read_vectors(folder, ranges, _vectors(engine, moments, state.averages, names), engine)
    engine.load_moments(moments)
    engine.refresh()
    state.averages.since = manifest["ema_since"]
    state.images = manifest["images"]
    state.origin = manifest["origin"]
    kept = manifest.get("accounts")  # checkpoints of before had none
    state.audits = None if kept is None else tuple(kept)
    state.stability.load(manifest.get("stability"))
    held = load_file(folder / REPLICATED)
    with torch.no_grad():
        for name, buffer in engine.module.named_buffers():
            buffer.copy_(held[f"buffer.{name}"])
    if state.teacher is not None:
        state.teacher.module.load_state_dict(_under("teacher.", held))
    state.components.load_state_dict(held, rank_info.rank)


def _under(prefix: str, held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in held.items() if n.startswith(prefix)}


def _like(shard: Shard) -> Shard:
    return tuple(torch.empty_like(part) for part in shard)


def prune(checkpoints: Path, keep: int) -> None:
    """Deletes all but the newest `keep` complete checkpoints, and of damaged ones what is older than those."""
    whole = [
        (images, name)
        for images, name in _numbered(checkpoints)
        if storage.read_complete(checkpoints / name)
    ]
    for _, name in whole[:-keep]:
        storage.delete(checkpoints / name)
    aside, kept = damaged(checkpoints), min(whole[-keep:], default=(0, ""))
    for images, name in _numbered(aside):
        if images < kept[0]:
            storage.delete(aside / name)


def _numbered(place: Path) -> list[tuple[int, str]]:
    """The checkpoints in a folder with their images, ascending; that of an attempt ends with its number."""
    found = ((_NAME.fullmatch(name), name) for name in storage.list(place))
    return sorted((int(match[1]), name) for match, name in found if match)
