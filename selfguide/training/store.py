"""Checkpoints in a store beside the run's folder, such as S3, for the day on which that folder is gone.

The run works in its folder, and only there. What it publishes there is copied to the store afterwards, the manifest
last, so the store holds whole checkpoints or none; retention deletes from it as well. An attempt that finds no
checkpoint in the folder fetches the newest one of the store that holds. Torch-free, since the process that copies them
is.
"""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfguide.spec.retention import pin, pinned
from selfguide.spec.run import Lease, RunFolder
from selfguide.training.retention import numbered, prune
from shards import storage
from shards.errors import DamagedError, UserError

log = logging.getLogger(__name__)

# beside the checkpoints: what the run passed over (`selfguide.training.roll_back`)
_BESIDE = "roll_backs.json"


def place_of(store: str, run: RunFolder) -> str:
    """Where a run's checkpoints lie in `store`: two that learn different things never share a place."""
    about = run.describe()
    name, key = about["id"], about["hash"]
    return storage.join(store, about["experiment"], key if name == key else f"{name}-{key}")


def put(run: str, number: int, place: str, images: int, keep: Mapping[str, int | None]) -> bool:
    """Copies the checkpoint at `images` of a run to `place`, unless it is there, and deletes what is too much there.

    What the run went back behind goes, and what is unfinished. Other newer ones stay: those in the folder may be lost.
    Returns whether it is there; not one that the folder no longer holds.

    Args:
        number: the attempt that asks.
        keep: as `retention.prune` takes it.

    Raises:
        FencedError: a newer attempt exists.
        OSError: the store does not answer, or refuses.
    """
    lease = Lease(RunFolder(Path(run)), number)
    folder = lease.run.checkpoint(images)
    manifest = storage.read_manifest(folder)
    if manifest is None:
        return False  # it was set aside since, or made room
    lease.check()
    for each, name in numbered(place):
        at = storage.join(place, name)
        if _passed_over(folder.parent, each, images) or (each != images and not _manifest(at)):
            storage.delete(at)
    # before the checkpoint, which means other positions of the data without it
    if (folder.parent / _BESIDE).exists():
        storage.publish_file(storage.join(place, _BESIDE), folder.parent / _BESIDE, replace=True)
    there = storage.join(place, folder.name)
    if _manifest(there) != manifest:
        storage.delete(there)
        for part in manifest["files"]:
            lease.check()
            path = folder / part["name"]
            storage.publish_file(storage.join(there, part["name"]), path, replace=True)
        lease.check()
        storage.publish_folder(there, extra=_extra(manifest), parts=manifest["files"])
    for name in pinned(folder.parent):
        pin(place, name)
    prune(place, **keep)  # type: ignore[arg-type]
    return True


def fetch(lease: Lease, place: str, total: int) -> int | None:
    """Copies the newest checkpoint of `place` whose bytes hold into the run's folder; returns its images.

    None where there is none. `total` is how many images the run trains on.

    Raises:
        UserError: the run was extended, trained further than that, and lost its folder with its new end.
        FencedError: a newer attempt exists.
        NoRoomError: the disk of the run has no room for it.
        OSError: the store does not answer, or refuses.
    """
    for images, name in reversed(numbered(place)):
        there = storage.join(place, name)
        try:
            if (manifest := storage.read_manifest(there)) is None:
                continue
            if images > total:
                raise UserError(_longer(lease.run, there, images, total))
            # first: an attempt that finds a checkpoint in the folder asks the store for nothing
            beside = lease.run.checkpoints / _BESIDE
            if not beside.exists() and storage.exists(storage.join(place, _BESIDE)):
                storage.publish(beside, storage.read_bytes(storage.join(place, _BESIDE)))
            _copy(there, manifest, lease.run.checkpoint(images), lease)
        except DamagedError as error:
            log.warning(f"{error}; the checkpoint before it is tried")
            continue
        return images
    return None


def _longer(run: RunFolder, there: str, images: int, total: int) -> str:
    return (
        f"{there} is of a longer training than train.images={total:_}, with which this run would end behind it: "
        f"python -m launcher.resume {shlex.quote(str(run.root))} train.images={images:_}, or more, goes on from it"
    )


def _copy(there: str, manifest: Mapping[str, Any], folder: Path, lease: Lease) -> None:
    """
    Raises:
        DamagedError: what lies in the store is not what was written; nothing of it is left in `folder`.
    """
    flaws: Sequence[object] = storage.flaws(there, manifest, "sizes")
    for part in () if flaws else manifest["files"]:
        chunks = storage.read_chunks(storage.join(there, part["name"]))
        found = storage.write_part(folder, part["name"], chunks, lease.fence(folder))
        if any(part[kind] != found[kind] for kind in found.keys() & part.keys()):
            flaws = [f"{part['name']} has other bytes than were written"]
            lease.set_aside(folder)
            break
    if flaws:
        raise DamagedError(f"{there} is damaged ({'; '.join(map(str, flaws))})")
    lease.publish(folder, extra=_extra(manifest), parts=manifest["files"])


def _extra(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value for name, value in manifest.items() if name != "files"}


def _passed_over(checkpoints: Path, images: int, now: int) -> bool:
    """Whether the run, which is at `now` images, went back from a checkpoint at `images`."""
    path = checkpoints / _BESIDE
    known = json.loads(storage.read_bytes(path)) if path.exists() else []
    return bool(known) and images > now and known[-1]["to"] < images <= known[-1]["from"]


def _manifest(there: str) -> Mapping[str, Any] | None:
    """Of a checkpoint in the store; None also where it is torn, since it is to be written anew."""
    try:
        return storage.read_manifest(there)
    except DamagedError:
        return None
