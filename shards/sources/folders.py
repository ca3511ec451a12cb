"""Folders of image files: one folder a class, VOC's and COCO's lists, LSUN's databases.

A key is the file's path below the folder, or the name that the data set's own list gives it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import BadInputError, UserError
from shards.format.members import printable
from shards.format.pictures import SUFFIXES
from shards.sources.listing import Decode, Files, Listing, file, folder
from shards.sources.source import Lazy


def image_folder(root: str, decode: Decode) -> Listing:
    """Images below the subfolders of `root`, which are the classes, numbered in sorted order.

    Images that lie in `root` itself, without subfolders, have no labels. Other files are passed over.

    Raises:
        UserError: no folder, images beside class folders, or a class folder without images: it would be a class,
            and shift the labels of those behind it.
    """
    base = folder(root, "image folder")
    classes = sorted(p.name for p in base.iterdir() if p.is_dir() and not p.name.startswith("."))
    here = sorted(p.name for p in base.iterdir() if p.is_file() and _is_image(p.name))
    if here and classes:
        raise UserError(
            f"{root} holds images ({here[0]}) beside folders ({classes[0]}): move them into the folder "
            "of their class, or the folders away"
        )
    found = {name: sorted(_images(base, base / name)) for name in classes}
    empty = [name for name in classes if not found[name]]
    if empty and len(empty) < len(classes):
        raise UserError(
            f"{len(empty):,} of the {len(classes):,} class folders in {root} hold no images, such as "
            f"{empty[0]!r}: move them away, or put their images in"
        )
    names = here + [path for paths in found.values() for path in paths]
    labels = [label for label, paths in enumerate(found.values()) for _ in paths]
    files = Files(root=str(base), names=tuple(names))
    return Listing.of(
        printable(base.resolve().name),
        [printable(name) for name in names],
        files,
        decode=decode,
        places=files.sizes(),
        labels=np.array(labels, dtype=np.int64) if classes else None,
        class_names=[printable(name) for name in classes],
    )


def voc(root: str, split: str, decode: Decode) -> Listing:
    """Images that ImageSets/Main/<split>.txt of a VOC year's folder lists; without labels.

    An image has several objects, so classes are for annotations, not for a label.
    """
    base = folder(root, "VOC folder")
    sets = base / "ImageSets" / "Main"
    if not (base / "JPEGImages").is_dir() or not sets.is_dir():
        raise UserError(
            f"VOC folder {root} lacks JPEGImages or ImageSets/Main: name a year's folder, VOCdevkit/VOC2012"
        )
    listed = sets / f"{split}.txt"
    if not listed.is_file():
        known = sorted(p.stem for p in sets.glob("*.txt") if "_" not in p.stem)
        raise UserError(f"split {split!r} is not in {sets}: choose among {', '.join(known)}")
    ids = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
    files = Files(root=str(base / "JPEGImages"), names=tuple(f"{name}.jpg" for name in ids))
    return Listing.of(
        f"{base.resolve().name}-{split}", ids, files, decode=decode, places=files.sizes()
    )


def coco(root: str, split: str, decode: Decode) -> Listing:
    """Images that annotations/instances_<split>.json of a COCO folder lists, in <root>/<split>; no labels."""
    base = folder(root, "COCO folder")
    listed = base / "annotations" / f"instances_{split}.json"
    if not listed.is_file():
        known = sorted(p.stem.removeprefix("instances_") for p in listed.parent.glob("instances_*"))
        raise UserError(
            f"split {split!r}: no {listed}; found {', '.join(known) or 'none'}: name the folder that holds "
            "`annotations`, and one of its splits"
        )
    try:
        images = json.loads(listed.read_text())["images"]
        names = sorted(image["file_name"] for image in images)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{listed} is no list of COCO images ({error}): download it again"
        ) from None
    files = Files(root=str(base / split), names=tuple(names))
    return Listing.of(f"coco-{split}", names, files, decode=decode, places=files.sizes())


@dataclass(frozen=True, eq=False)
class Lmdb(Lazy):
    """Values of an LMDB environment by key; opened read-only, once a process."""

    path: str
    keys: tuple[bytes, ...]

    @cached_property
    def environment(self) -> Any:
        return _environment(self.path)

    def read(self, row: int) -> bytes:
        with self.environment.begin() as transaction:
            found = transaction.get(self.keys[row])
        if found is None:
            raise BadInputError("no such key")
        return bytes(found)


def lsun(path: str, decode: Decode) -> Listing:
    """The images of one LSUN category, a folder that holds data.mdb; without labels.

    Raises:
        UserError: no such database, or the `lmdb` package is missing.
    """
    base = folder(path, "LSUN folder")
    file(str(base / "data.mdb"), "LSUN database")
    with _environment(path).begin() as transaction, transaction.cursor() as cursor:
        entries = [(bytes(key), len(value)) for key, value in cursor]
    keys = tuple(key for key, _ in entries)
    return Listing.of(
        base.resolve().name,
        [key.decode("utf-8", "backslashreplace") for key in keys],
        Lmdb(path, keys),
        decode=decode,
        places=[size for _, size in entries],
    )


def _environment(path: str) -> Any:
    try:
        import lmdb
    except ImportError:
        raise UserError(
            "source lsun needs the package lmdb: pip install 'selfguide[sources]'"
        ) from None
    return lmdb.open(path, readonly=True, lock=False, readahead=False, max_readers=1)


def _images(base: Path, below: Path) -> list[str]:
    """Images anywhere below a class's folder, relative to `base`; links to folders are followed, each folder once."""
    found: list[str] = []
    known: set[str] = set()  # else a link to a folder above is followed without end
    for place, inner, names in os.walk(below, followlinks=True):
        if (real := os.path.realpath(place)) in known:
            inner.clear()
            continue
        known.add(real)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        found += [(Path(place, n)).relative_to(base).as_posix() for n in names if _is_image(n)]
    return found


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
