"""Which checkpoints of a run are kept: the newest, the first of each so many images, and those that are pinned.

Torch-free, since the process that writes checkpoints deletes them as well.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from selfguide.spec.retention import pinned
from selfguide.spec.run import DAMAGED
from shards import storage
from shards.storage import Url

if TYPE_CHECKING:
    from selfguide.spec.config import TrainConfig
    from selfguide.spec.run import Lease

log = logging.getLogger(__name__)

_NAME = re.compile(r"img-(\d+)(\.\d+)?")


def clear(lease: Lease, folder: Path) -> None:
    """Deletes the parts of a checkpoint or snapshot that could not be written, since they may fill the disk."""
    try:
        lease.set_aside(folder)
    except OSError as error:
        log.warning(f"{folder} is left unfinished: {error}")


def rules(
    train: TrainConfig, back_to: int | None = None, busy: int | None = None
) -> Mapping[str, int | None]:
    """The arguments of `prune` beside the place."""
    keep, every = train.keep_checkpoints, train.keep_every
    return {"keep": keep, "every": every, "back_to": back_to, "busy": busy}


def prune(
    checkpoints: Url,
    keep: int,
    every: int | None = None,
    back_to: int | None = None,
    busy: int | None = None,
) -> None:
    """Deletes all complete checkpoints but those that are kept, and of damaged ones what is older than the newest kept.

    Args:
        keep: so many of the newest stay.
        every: of each so many images seen, the first checkpoint stays for good.
        back_to: the newest checkpoint of up to so many images stays, since the run may go back to it.
        busy: that of so many images stays, since it is being copied.

    What is pinned stays as well.
    """
    whole = [
        (images, name)
        for images, name in numbered(checkpoints)
        if storage.read_complete(storage.join(checkpoints, name))
    ]
    kept = {name for _, name in whole[-keep:]} | pinned(checkpoints)
    if every is not None:
        firsts = {images // every: name for images, name in reversed(whole) if images >= every}
        kept |= {*firsts.values()}
    if back_to is not None:
        kept |= {name for _, name in [each for each in whole if each[0] <= back_to][-1:]}
    for images, name in whole:
        if name not in kept and images != busy:
            storage.delete(storage.join(checkpoints, name))
    aside, oldest = storage.join(checkpoints, DAMAGED), min(whole[-keep:], default=(0, ""))
    for images, name in numbered(aside):
        if images < oldest[0]:
            storage.delete(storage.join(aside, name))


def numbered(place: Url) -> list[tuple[int, str]]:
    """The checkpoints in a folder with their images, ascending; that of an attempt ends with its number."""
    found = ((_NAME.fullmatch(name), name) for name in storage.list(place))
    return sorted((int(match[1]), name) for match, name in found if match)
