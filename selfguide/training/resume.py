"""Which checkpoint an attempt goes on from: the newest whose files are, byte for byte, those that were written.

The ranks share the reading. Each file of a rank is hashed once, by a rank that loads it where shares are even, and what
all ranks load is hashed once on each node; so the cost does not grow with the number of ranks. Then they agree on one
verdict, before any of them has loaded anything. A checkpoint that does not hold is set aside, loudly, and the one
before it is tried, back to image 0.
"""

from __future__ import annotations

import logging
import shlex
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from selfguide.distributed import RankInfo, gather, on_rank_0, on_rank_0_at_length
from selfguide.spec.config import TrainConfig
from selfguide.spec.run import Lease
from selfguide.training import store
from selfguide.training.checkpoint import REPLICATED
from shards import storage
from shards.errors import DamagedError, StoreError, UserError
from shards.storage import Flaw

log = logging.getLogger(__name__)

Policy = Literal["newest", "strict"]


@dataclass(frozen=True)
class Damage:
    """A checkpoint that is not what was written."""

    images: int
    folder: Path
    flaws: Sequence[Flaw]
    # where it was set aside; None where it is still in its place
    kept: Path | None = None

    def __str__(self) -> str:
        wrong = (f"{_whose(flaw.name)}{flaw}" for flaw in self.flaws)
        return f"{self.folder.name} ({'; '.join(wrong)})"

    def plain(self) -> dict[str, Any]:
        """As a progress record has it; `rank` is that which wrote the file, None for what all ranks load."""
        flaws = [{"file": f.name, "rank": _rank_of(f.name), "reason": f.reason} for f in self.flaws]
        kept = self.kept and str(self.kept)
        return {"images": self.images, "checkpoint": self.folder.name, "kept": kept, "flaws": flaws}


@dataclass(frozen=True)
class Resume:
    """Where an attempt begins."""

    # of the checkpoint; None at image 0
    folder: Path | None
    # newest first, and all newer than `folder`
    damaged: Sequence[Damage] = ()


def find(lease: Lease, rank_info: RankInfo, policy: Policy) -> Resume:
    """Returns the newest checkpoint that holds; all ranks call, after `Lease.begin`, and get the same.

    Raises:
        UserError: a checkpoint is damaged, and `policy` is strict; nothing was moved.
        StoreError: what one rank reads is not what rank 0 reads.
        Fenced: a newer attempt exists.
    """
    damaged: list[Damage] = []
    while True:
        candidate = on_rank_0(lambda: _newest(lease, {each.images for each in damaged}))
        if candidate is None:
            break
        manifest, images, flaws = candidate
        folder = lease.run.checkpoint(images)
        if not (flaws := flaws or _read_together(folder, manifest, rank_info)):
            break
        damaged.append(Damage(images, folder, flaws))
    found = None if candidate is None else folder
    if damaged and policy == "strict":
        raise UserError(_refusal(damaged, found, lease))
    return Resume(found, on_rank_0(lambda: _set_aside(damaged, found, lease)) if damaged else ())


def find_or_fetch(lease: Lease, rank_info: RankInfo, train: TrainConfig) -> Resume:
    """The same; where the folder holds none, the newest one of the run's store is copied into it before.

    Raises:
        UserError: the newest one there is of a longer training than this one.
        StoreError: the store does not answer. Who began without it would begin at image 0.
    """
    found = find(lease, rank_info, train.resume)
    if found.folder is not None or train.checkpoint_store is None:
        return found
    place = store.place_of(train.checkpoint_store, lease.run)
    images = on_rank_0_at_length(lambda: store.fetch(lease, place, train.images))
    if images is None:
        log.info(f"{place} holds no checkpoint either")
        return found
    log.warning(
        f"{lease.run.checkpoints} holds no checkpoint: that at {images:,} images is fetched from {place}"
    )
    fetched = find(lease, rank_info, train.resume)
    return Resume(fetched.folder, (*fetched.damaged, *found.damaged))


def _newest(lease: Lease, damaged: set[int]) -> tuple[Mapping[str, Any], int, Sequence[Flaw]] | None:  # fmt: skip
    """The newest checkpoint but those: its manifest, images, and what a look at sizes finds wrong with it.

    What has no manifest was never published: it is deleted on the way.
    """
    for images in reversed(lease.run.checkpoint_folders()):
        folder = lease.run.checkpoint(images)
        if images in damaged:
            continue
        try:
            manifest = storage.read_manifest(folder)
        except DamagedError:
            return {}, images, [Flaw(storage.MANIFEST, "is torn")]
        if manifest is not None:
            return manifest, images, storage.flaws(folder, manifest, "sizes")
        lease.set_aside(folder)
    return None


def _read_together(
    folder: Path, manifest: Mapping[str, Any], rank_info: RankInfo
) -> Sequence[Flaw]:
    """All ranks call: what is wrong with the bytes of the checkpoint, on the word of two readings."""
    mine = _share([part["name"] for part in manifest["files"]], rank_info)
    host = socket.gethostname()
    try:
        seen = [(f, host) for f in storage.flaws(folder, manifest, "hashes", mine)]
    except (OSError, DamagedError) as error:  # perhaps of this node only
        seen = [(Flaw(name, f"cannot be read ({error})"), host) for name in mine]
    suspect = [(flaw, rank, host) for rank, each in enumerate(gather(seen)) for flaw, host in each]
    if not suspect:
        return ()
    names = {flaw.name for flaw, _, _ in suspect}
    confirmed = on_rank_0(lambda: storage.flaws(folder, manifest, "hashes", names))
    if not confirmed:
        flaw, rank, host = suspect[0]
        raise StoreError(
            f"{folder}: {flaw} where rank {rank} reads it on {host}, and is whole where rank 0 does: look at the disks "
            "and the memory of that node, or exclude it"
        )
    return confirmed


def _share(names: Sequence[str], rank_info: RankInfo) -> list[str]:
    """What this rank hashes: its share of the ranks' files, in the order of ranks; one rank a node what all load."""
    split = sorted(name for name in names if name != REPLICATED)
    low, high = (
        len(split) * rank // rank_info.world for rank in (rank_info.rank, rank_info.rank + 1)
    )
    whole = [name for name in names if name == REPLICATED] if rank_info.local_rank == 0 else []
    return split[low:high] + whole


def _set_aside(damaged: Sequence[Damage], found: Path | None, lease: Lease) -> Sequence[Damage]:
    moved = []
    for each in damaged:
        kept = lease.set_aside(each.folder)
        moved.append(Damage(each.images, each.folder, each.flaws, kept))
        log.warning(f"checkpoint {each} is damaged: set aside as {kept}")
    if found is None:
        log.warning(
            f"no checkpoint is left, all {len(damaged)} were damaged: training begins again at image 0"
        )
    else:
        log.warning(f"going on from {found.name}, the newest checkpoint that is whole")
    return moved


def _refusal(damaged: Sequence[Damage], found: Path | None, lease: Lease) -> str:
    names = ", ".join(map(str, damaged))
    else_from = f"{found.name}, which is whole" if found else "image 0, since none is whole"
    return (
        f"train.resume=strict: damaged in {lease.run.checkpoints}: {names}. Put a good copy in its place, or go on "
        f"from {else_from}: python -m launcher.resume {shlex.quote(str(lease.run.root))} train.resume=newest"
    )


def _whose(name: str) -> str:
    rank = _rank_of(name)
    return "" if rank is None else f"of rank {rank}: "


def _rank_of(name: str) -> int | None:
    """The rank whose part of a checkpoint is called so."""
    number = name.removeprefix("rank-").partition(".")[0]
    return int(number) if number.isdigit() else None
