"""Resume state in our own format: one file per rank with its slice of the flat space, the manifest last.

Because slices are ranges of one space, a checkpoint loads at any world size and into either engine. Random numbers
and data order are functions of the image count, so the count is all that has to be remembered of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfguide.distributed import Place, decided_by_rank_0
from selfguide.guidance.source import Resumable
from selfguide.spec.run import Lease
from selfguide.training.engine.protocol import Engine
from selfguide.training.state import State
from shards import storage

REPLICATED = "replicated.safetensors"  # what every rank holds alike: buffers, the teacher, the source's counters


def save(folder: Path, state: State, place: Place, lease: Lease) -> None:
    """All ranks call; on return the checkpoint is complete on every rank's word."""
    lease.check()
    if decided_by_rank_0(storage.read_complete(folder, verify="sizes") is not None):
        return  # an earlier attempt came as far, with the same numbers
    folder.mkdir(parents=True, exist_ok=True)
    engine = state.engine
    start, stop = _owned(engine, place)
    inside = slice(start - engine.start, stop - engine.start)
    first, second, count = engine.moments()
    parts = {"master": engine.master, "first": first, "second": second}
    parts |= {f"ema-{i}": shard for i, shard in enumerate(state.averages.shards)}
    mine = {name: tensor.detach()[inside].cpu().clone() for name, tensor in parts.items()}
    save_file(mine, folder / f"rank-{place.rank:05d}.safetensors")
    held = state.source.held() if isinstance(state.source, Resumable) else {}
    ranges: list[Any] = [None] * place.world
    dist.all_gather_object(ranges, (start, stop))  # also the barrier: every part is written
    if place.rank == 0:
        save_file(_replicated(state, held), folder / REPLICATED)
        extra = {
            "images": state.images,
            "steps": count,
            "ema_since": state.averages.since,
            "ema_halflives": list(state.averages.halflives),
            "total": engine.layout.total,
            "names": list(engine.layout.names),
            "ranges": ranges,
            "origin": dict(state.origin),
            "accounts": state.accounts,
            "attempt": lease.number,
        }
        lease.publish(folder, extra=extra)
    dist.barrier()


def _owned(engine: Engine, place: Place) -> tuple[int, int]:
    """The slice this rank writes: its own under ZeRO, an even share where every rank holds all."""
    if (engine.start, engine.stop) != (0, engine.layout.total) or place.world == 1:
        return engine.start, engine.stop
    share = -(-engine.layout.total // place.world)
    return min(place.rank * share, engine.stop), min((place.rank + 1) * share, engine.stop)


def _replicated(state: State, source: dict[str, Tensor]) -> dict[str, Tensor]:
    held = {f"buffer.{n}": b.detach().cpu().clone() for n, b in state.engine.module.named_buffers()}
    if state.teacher is not None:
        held |= {
            f"teacher.{n}": t.detach().cpu().clone()
            for n, t in state.teacher.module.state_dict().items()
        }
    return held | {f"source.{n}": t.cpu() for n, t in source.items()}


def newest(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose manifest holds; all ranks call and get rank 0's."""
    found = decided_by_rank_0(storage.newest_complete(checkpoints))
    return None if found is None else Path(found)


def load(folder: Path, state: State, place: Place) -> None:
    """Brings `state` to where `folder` was written, whatever the world size or engine then and now.

    Raises:
        RuntimeError: the checkpoint holds other parameters than this model has.
    """
    manifest = storage.read_complete(folder, verify="sizes")
    if manifest is None:
        raise RuntimeError(f"{folder} is not a complete checkpoint")
    engine = state.engine
    if tuple(manifest["names"]) != engine.layout.names or manifest["total"] != engine.layout.total:
        raise RuntimeError(
            f"{folder} was written by another model: its parameters have other names or sizes"
        )
    read = {name: _read(folder, manifest, name, engine) for name in _names(state)}
    engine.master.data.copy_(read["master"])
    engine.load_moments(read["first"], read["second"], manifest["steps"])
    engine.refresh()
    for i, shard in enumerate(state.averages.shards):
        shard.copy_(read[f"ema-{i}"])
    state.averages.since = manifest["ema_since"]
    state.images = manifest["images"]
    state.origin = manifest["origin"]
    kept = manifest.get("accounts")  # checkpoints of before had none
    state.accounts = None if kept is None else tuple(kept)
    held = load_file(folder / REPLICATED)
    with torch.no_grad():
        for name, buffer in engine.module.named_buffers():
            buffer.copy_(held[f"buffer.{name}"])
    if state.teacher is not None:
        state.teacher.module.load_state_dict(_under("teacher.", held))
    if isinstance(state.source, Resumable):
        state.source.restore(_under("source.", held), place.rank)


def _under(prefix: str, held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in held.items() if n.startswith(prefix)}


def _names(state: State) -> list[str]:
    return ["master", "first", "second", *(f"ema-{i}" for i in range(len(state.averages.shards)))]


def _read(folder: Path, manifest: dict[str, Any], name: str, engine: Engine) -> Tensor:
    """This rank's slice of one flat vector, pieced together from the files that overlap it."""
    out = torch.empty(engine.stop - engine.start, dtype=torch.float32)
    for rank, (start, stop) in enumerate(manifest["ranges"]):
        low, high = max(start, engine.start), min(stop, engine.stop)
        if low < high:
            with safe_open(folder / f"rank-{rank:05d}.safetensors", framework="pt") as file:
                out[low - engine.start : high - engine.start] = file.get_slice(name)[
                    low - start : high - start
                ]
    return out.to(engine.master.device)


def prune(checkpoints: Path, keep: int) -> None:
    """Removes all but the newest `keep` complete checkpoints; the manifest goes first."""
    complete = (p for p in checkpoints.iterdir() if storage.read_complete(p) is not None)
    folders = sorted(complete, key=lambda p: int(p.name.removeprefix("img-")))
    for folder in folders[: max(0, len(folders) - keep)]:
        (folder / "MANIFEST.json").unlink()
        for part in folder.iterdir():
            part.unlink()
        folder.rmdir()
