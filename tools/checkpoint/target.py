"""Which checkpoints a command is about: those of a run, or the one in a folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from selfguide.spec.find import find
from selfguide.spec.run import RunFolder
from shards import storage
from shards.errors import UserError
from tools import flags

RUN = "id, name or folder of a run, or a checkpoint's folder"


def add(parser: argparse.ArgumentParser, images: str) -> None:
    """The arguments that name checkpoints; `images` says what --images N picks."""
    flags.add(
        parser,
        ("of RUN", str, None, RUN),
        ("--images N", int, None, images),
        flags.RUNS,
        flags.JSON,
    )


def checkpoints(options: argparse.Namespace) -> Sequence[Path]:
    """The folders of all checkpoints that are meant, complete or not, oldest first; of --images the one.

    Raises:
        UserError: there is none.
    """
    folder = storage.expanded(options.of)
    if (folder / storage.MANIFEST).is_file():
        if options.images is not None:
            raise UserError(
                f"--images {options.images}: {folder} is one checkpoint already; drop it"
            )
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


def chosen(images: int, known: Sequence[int]) -> int:
    """
    Raises:
        UserError: `images` is none of `known`.
    """
    if images not in known:
        raise UserError(
            f"--images {images}: this run has checkpoints at {', '.join(map(str, known))}"
        )
    return images
