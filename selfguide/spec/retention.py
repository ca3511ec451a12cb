"""What is pinned against retention, and which snapshots it has deleted: what trainer, launcher and tools share.

A snapshot that retention deletes leaves `snapshots/deleted/img-<n>.json`, which says when, why, and by which setting.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from selfguide.spec.run import RunFolder, image_folder, names_in, read_record, write_record
from shards import storage
from shards.lock import lock
from shards.storage import Url

# of checkpoints or snapshots: a file for each that is pinned, by its name
PINS = "pins"
# of snapshots: the records of those that were deleted, and beside them what is not quite deleted yet
DELETED = "deleted"
_NAME = re.compile(r"img-(\d+)")


def pin(place: Url, name: str) -> None:
    """Keeps a checkpoint or snapshot of the folder `place` from retention."""
    storage.publish(_pin(place, name), b"", replace=True)


def unpin(place: Url, name: str) -> None:
    """Lets retention delete a checkpoint or snapshot of the folder `place` again; nothing where it is not pinned."""
    storage.delete(_pin(place, name))


def pinned(place: Url) -> set[str]:
    """Names of the checkpoints or snapshots that are pinned: a file of that name each."""
    return {*storage.list(storage.join(place, PINS))}


def _pin(place: Url, name: str) -> str:
    return storage.join(place, PINS, name)


@dataclass(frozen=True, kw_only=True)
class Deleted:
    """A snapshot that retention has deleted."""

    images: int
    # seconds since 1970
    time: float
    bytes: int
    # the settings that let it go, as they are typed
    setting: str
    # what was looked at, and who deleted it
    why: str
    by: str

    @staticmethod
    def of(values: Mapping[str, Any]) -> Deleted:
        """Its record, as JSON holds it."""
        return Deleted(**{each.name: values[each.name] for each in fields(Deleted)})

    def write(self, run: RunFolder) -> None:
        """Writes the record; that of an earlier deletion of the same snapshot makes way."""
        write_record(deleted_record(run, self.images), asdict(self), replace=True)


def deleted_record(run: RunFolder, images: int) -> Path:
    """Where it is written why the snapshot at so many images was deleted."""
    return run.snapshots / DELETED / f"{image_folder(images)}.json"


def remains(run: RunFolder) -> list[Path]:
    """Folders of snapshots that were taken from their place and are not quite deleted yet."""
    folder = run.snapshots / DELETED
    return [folder / name for name in sorted(names_in(folder)) if _NAME.fullmatch(name)]


def deletion(folder: Path) -> str:
    """Says that retention deleted the snapshot that was in `folder`; "" where it is there, or retention did not."""
    name, run = _NAME.fullmatch(folder.name), RunFolder(folder.parent.parent)
    if name is None or folder.parent != run.snapshots or (folder / storage.MANIFEST).exists():
        return ""
    record = read_record(deleted_record(run, int(name[1])))
    if record is None:
        return ""
    return (
        f"the snapshot at {record['images']} images was deleted by retention ({record['setting']}), and its scores are "
        "kept"
    )


@contextlib.contextmanager
def holding(run: RunFolder) -> Iterator[bool]:
    """Holds the run's snapshots: nobody deletes one meanwhile, nor asks for one that is about to be deleted.

    It yields False on a file system without locks, where nothing is deleted.
    """
    with lock(run.root / "snapshots.lock", required=False) as held:
        yield held
