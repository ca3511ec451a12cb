"""Which checkpoints a command is about: those of a run, or the one in a folder."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from selfguide.spec.find import find
from selfguide.spec.run import RunFolder
from selfguide.training.retention import images_of, numbered
from shards import storage
from shards.errors import UserError
from shards.storage import Url
from tools import flags

RUN = "id, name or folder of a run, or a checkpoint's folder"
# what `verify` and `show` take besides
STORED = f"{RUN}; or the s3:// address of either in a store"


def add(parser: argparse.ArgumentParser, images: str, of: str = RUN) -> None:
    """The arguments that name checkpoints; `images` says what --images N picks, `of` what RUN may be."""
    flags.add(
        parser,
        ("of RUN", str, None, of),
        ("--images N", int, None, images),
        flags.RUNS,
        flags.JSON,
    )


def anywhere(options: argparse.Namespace) -> Sequence[Url]:
    """As `checkpoints`, also of a store.

    Raises:
        UserError: there is none.
    """
    if not storage.is_remote(options.of):
        return checkpoints(options)
    place = options.of.rstrip("/")
    if _is_one(place):
        _refuse_images(options, place)
        return [place]
    known = dict(numbered(place))
    if not known:
        below = ", ".join(storage.list(place)[:5])
        raise UserError(
            f"{place} holds no checkpoint, but {below or 'nothing'}: a run's are in STORE/EXPERIMENT/RUN, where "
            "STORE is its train.checkpoint_store"
        )
    wanted = known if options.images is None else [chosen(options.images, [*known])]
    return [storage.join(place, known[images]) for images in wanted]


def checkpoints(options: argparse.Namespace) -> Sequence[Path]:
    """The folders of all checkpoints that are meant, complete or not, oldest first; of --images the one.

    Raises:
        UserError: there is none.
    """
    folder = storage.expanded(options.of)
    if _is_one(folder):
        _refuse_images(options, folder)
        return [folder]
    run = find(options.of, Path(options.runs))
    known = run.checkpoint_folders()
    if not known:
        raise UserError(f"run {run.root.name} has no checkpoint yet")
    if options.images is None:
        return [run.checkpoint(images) for images in known]
    return [run.checkpoint(chosen(options.images, known))]


def one(options: argparse.Namespace) -> Path:
    """The folder of one checkpoint: the one in a folder, the one of --images, or the newest that is complete.

    Raises:
        UserError: there is none.
    """
    found = checkpoints(options)
    if len(found) == 1:
        return found[0]
    run = RunFolder(found[0].parent.parent)
    saved = run.saved()
    if not saved:
        raise UserError(f"{run.checkpoints} holds no complete checkpoint; `verify` says why")
    return run.checkpoint(saved[-1])


def state_without_manifest(folder: Url) -> str:
    """What a checkpoint is that has no manifest: one that is gone was deleted by a run that goes on."""
    there = storage.list(folder) if storage.is_remote(folder) else Path(folder).is_dir()
    return "unfinished" if there else "deleted"


def _is_one(place: Url) -> bool:
    """Whether this is the folder of one checkpoint, also of one that is unfinished."""
    if storage.exists(storage.join(place, storage.MANIFEST)):
        return True
    named = images_of(os.fspath(place).rpartition("/")[2]) is not None
    return named and state_without_manifest(place) == "unfinished"


def _refuse_images(options: argparse.Namespace, one: Url) -> None:
    if options.images is not None:
        raise UserError(f"--images {options.images}: {one} is one checkpoint already; drop it")


def chosen(images: int, known: Sequence[int], what: str = "checkpoints") -> int:
    """
    Raises:
        UserError: `images` is none of `known`.
    """
    if images not in known:
        raise UserError(f"--images {images}: this run has {what} at {', '.join(map(str, known))}")
    return images
