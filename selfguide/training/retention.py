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
    """Deletes the parts of a checkpoint or snapshot that could not be written, since they may fill the disk.

    What is complete all the same stays.
    """
    try:
        if storage.read_complete(folder) is None:
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
    """Deletes all complete checkpoints but those that are kept, and what is older than the newest kept of damaged ones
    and of those that were never finished or not quite deleted.

    Args:
        keep: so many of the newest stay.
        every: of each so many images seen, the first checkpoint stays for good.
        back_to: the newest checkpoint of up to so many images stays, since the run may go back to it.
        busy: that of so many images stays, since it is being copied.

    What is pinned stays as well. What cannot be deleted now, as where another program reads it, is named in the log
    and tried again behind the next checkpoint: the newest one is saved, whatever becomes of old ones.
    """
    try:
        found = _too_many(checkpoints, keep, every, back_to, busy)
    except OSError as error:
        log.warning(f"no old checkpoint is deleted in {checkpoints}: {error}")
        return
    for folder in found:
        try:
            # it may have been pinned since, while others were deleted
            if folder.rpartition("/")[2] not in pinned(checkpoints):
                storage.delete(folder)
        except OSError as error:
            log.warning(f"{folder} cannot be deleted, which is tried again later: {error}")


def _too_many(
    checkpoints: Url, keep: int, every: int | None, back_to: int | None, busy: int | None
) -> list[str]:
    """The folders that `prune` deletes."""
    names = numbered(checkpoints)
    complete = {name for _, name in names if storage.read_complete(storage.join(checkpoints, name))}
    whole = [each for each in names if each[1] in complete]
    kept = {name for _, name in whole[-keep:]}
    if every is not None:
        firsts = {images // every: name for images, name in reversed(whole) if images >= every}
        kept |= {*firsts.values()}
    if back_to is not None:
        kept |= {name for _, name in [each for each in whole if each[0] <= back_to][-1:]}
    oldest, _ = min(whole[-keep:], default=(0, ""))
    gone = [
        name
        for images, name in names
        if images != busy and name not in kept and (name in complete or images < oldest)
    ]
    aside = storage.join(checkpoints, DAMAGED)
    damaged = [name for images, name in numbered(aside) if images < oldest]
    return [
        *(storage.join(checkpoints, name) for name in gone),
        *(storage.join(aside, name) for name in damaged),
    ]


def numbered(place: Url) -> list[tuple[int, str]]:
    """The checkpoints in a folder with their images, ascending; that of an attempt ends with its number."""
    found = ((images_of(name), name) for name in storage.list(place))
    return sorted((images, name) for images, name in found if images is not None)


def images_of(name: str) -> int | None:
    """Images of the checkpoint whose folder has that name; None where it is no checkpoint's."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None
