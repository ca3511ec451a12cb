"""Deletes the snapshots that a run's retention lets go (`retention`), once no other run reads them either.

The watcher does it, or who looks in its place: they know which evaluations are to come, and the training job does not.
A record of why comes first; then the folder leaves its place in one step, so that readers see all of it or nothing,
and is deleted beside the record. What a kill leaves there the next look deletes. It is no attempt's business, which
may publish the same snapshot again at any moment: nothing without a manifest is touched in its place.
"""

from __future__ import annotations

import getpass
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher.folder import runs
from launcher.reconcile.lineage import Parent, parents
from launcher.reconcile.retention import expendable, setting
from launcher.reconcile.view import LOOK_S, RunView, read, read_many
from selfguide.spec.contamination import nets_behind
from selfguide.spec.retention import Deleted, deleted_record, holding, remains
from selfguide.spec.run import RunFolder
from shards import storage
from shards.errors import DamagedError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What a look at a run's snapshots came to."""

    deleted: tuple[int, ...] = ()
    # why others stay that the run itself lets go, by their images
    stay: Mapping[int, str] = field(default_factory=dict)
    # what keeps us from deleting, as sentences
    problems: tuple[str, ...] = ()


def prune(view: RunView) -> Pruned:
    """Deletes the snapshots of a run that nothing keeps, and what an earlier look did not come to; says both.

    However many do this at once, and whatever others ask for meanwhile, a snapshot goes once and with nobody behind it:
    what is decided here is decided again while the snapshots are held (`holding`).
    """
    run, problems = view.folder, [*_clear(view)]
    free = expendable(view)
    stay = _read_by_others(view, free) if free else {}
    wanted = [images for images in free if images not in stay]
    done: list[int] = []
    if wanted:
        try:
            with holding(run) as held:
                now = read(run, patience_s=LOOK_S) if held else view
                still = expendable(now) if held else ()
                for images in wanted:
                    if images in still and _take(now, images):
                        done.append(images)
            if not held:
                problems.append(f"{run.root} has no locks, so no snapshot is deleted there")
        except OSError as error:
            problems.append(f"snapshots of {run.root} cannot be deleted: {error}")
        problems += _clear(view) if done else ()
    for images in done:
        log.info(f"{images:,} images: snapshot deleted")
    for problem in problems:
        log.warning(problem)
    return Pruned(deleted=tuple(done), stay=stay, problems=tuple(problems))


def _take(view: RunView, images: int) -> bool:
    """Takes a snapshot from its place, behind a record of why; returns whether it was there."""
    assert view.config is not None
    run, train, parts = view.folder, view.config.train, view.snapshots[images]["files"]
    Deleted(
        images=images,
        time=time.time(),
        bytes=sum(int(part["bytes"]) for part in parts),
        setting=setting(train),
        why=f"not of the newest {train.keep_snapshots}, and no score, pin, choice or other run needs it",
        by=f"{getpass.getuser()}@{socket.gethostname()}",
    ).write(run)
    try:
        run.snapshot(images).rename(deleted_record(run, images).with_suffix(""))
    except FileNotFoundError:
        # an attempt that goes back has set it aside
        deleted_record(run, images).unlink(missing_ok=True)
        return False
    return True


def _clear(view: RunView) -> Iterator[str]:
    """Deletes what was taken from its place; yields why something stays."""
    for folder in remains(view.folder):
        try:
            storage.delete(str(folder))
        except FileNotFoundError:
            continue
        except OSError as error:
            yield f"{folder} cannot be deleted: {error}"


# ---- other runs --------------------------------------------------------------------------------------


def _read_by_others(view: RunView, free: tuple[int, ...]) -> dict[int, str]:
    """Which of these snapshots a run of the same folder began with, or has a sidecar from; and why they stay."""
    parts = ((i, part) for i in free for part in view.snapshots[i]["files"])
    weights = {part["sha256"]: images for images, part in parts}
    places = {os.path.realpath(view.folder.snapshot(images)): images for images in free}
    others = [each for each in runs(view.folder.root.parent.parent) if not _same(each, view.folder)]
    views, _ = read_many(others, configs=True)
    found: dict[int, str] = {}
    for other in views:
        for parent in parents(other):
            read_by = [weights.get(sha256) for sha256 in (parent.sha256, *_nets(parent))]
            if parent.kind == "snapshot" and parent.name:
                read_by.append(places.get(os.path.realpath(parent.name)))
            for images in read_by:
                if images is not None:
                    found.setdefault(images, f"run {other.id} was made from it ({parent.kind})")
    return found


def _same(one: RunFolder, other: RunFolder) -> bool:
    return one.root.resolve() == other.root.resolve()


def _nets(parent: Parent) -> tuple[str, ...]:
    """The sha256 of the nets that a sidecar was made with; before the run's first snapshot its own manifest tells."""
    if parent.kind != "sidecar" or parent.nets or not parent.name:
        return parent.nets
    try:
        about = storage.read_manifest(Path(parent.name)) or {}
    except (DamagedError, OSError):
        return ()
    behind = nets_behind(about.get("provenance", {}))
    return tuple(net["sha256"] for net in behind if net.get("sha256"))
