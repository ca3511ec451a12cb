"""Which checkpoints of a run are kept: the newest, the first of each so many images, and those that are pinned.

Torch-free, since the process that writes checkpoints deletes them as well.
"""

from __future__ import annotations

import re
from pathlib import Path

from selfguide.spec.run import damaged
from shards import storage

_NAME = re.compile(r"img-(\d+)(\.\d+)?")


def prune(
    checkpoints: Path, keep: int, every: int | None = None, back_to: int | None = None
) -> None:
    """Deletes all complete checkpoints but those that are kept, and of damaged ones what is older than the newest kept.

    Args:
        keep: so many of the newest stay.
        every: of each so many images seen, the first checkpoint stays for good.
        back_to: the newest checkpoint of up to so many images stays, since the run may go back to it.

    What is pinned stays as well.
    """
    whole = [
        (images, name)
        for images, name in _numbered(checkpoints)
        if storage.read_complete(checkpoints / name)
    ]
    kept = {name for _, name in whole[-keep:]} | pinned(checkpoints)
    if every is not None:
        firsts = {images // every: name for images, name in reversed(whole) if images >= every}
        kept |= {*firsts.values()}
    if back_to is not None:
        kept |= {name for _, name in [each for each in whole if each[0] <= back_to][-1:]}
    for _, name in whole:
        if name not in kept:
            storage.delete(checkpoints / name)
    aside, oldest = damaged(checkpoints), min(whole[-keep:], default=(0, ""))
    for images, name in _numbered(aside):
        if images < oldest[0]:
            storage.delete(aside / name)


def pin(folder: Path) -> None:
    """Keeps a checkpoint from `prune`."""
    storage.publish(_pins(folder.parent) / folder.name, b"", replace=True)


def unpin(folder: Path) -> None:
    storage.delete(_pins(folder.parent) / folder.name)


def pinned(checkpoints: Path) -> set[str]:
    """Names of the checkpoints that are pinned: a file of that name each."""
    return {*storage.list(_pins(checkpoints))}


def _pins(checkpoints: Path) -> Path:
    return checkpoints / "pins"


def _numbered(place: Path) -> list[tuple[int, str]]:
    """The checkpoints in a folder with their images, ascending; that of an attempt ends with its number."""
    found = ((_NAME.fullmatch(name), name) for name in storage.list(place))
    return sorted((int(match[1]), name) for match, name in found if match)
