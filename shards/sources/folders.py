"""Folders of image files: one folder a class, VOC's and COCO's lists, LSUN's databases.

A key is the file's path below the folder, or the name that the data set's own list gives it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shards.errors import BadInputError, UserError
from shards.format.classes import ordered
from shards.format.members import CLASSES, printable
from shards.sources.listing import Decode, Files, Listing, file, folder
from shards.sources.source import Lazy
from shards.sources.splits import apart, is_split
from shards.sources.trees import DATASET, Tree, folder_tree, is_zip, zip_tree

_CHUNK_FILE = re.compile(r"img\d{8}\.\w+")


def image_folder(root: str, decode: Decode) -> Listing:
    """Images below the subfolders of `root`, a folder or a .zip, which are the classes, in the order of `ordered`.

    Where all of it lies in one folder that holds folders, it is that folder: so archives are made and unpacked. The
    listing's `inside` says which it is.

    Images that lie in `root` itself, without subfolders, have no labels. With a `dataset.json`, as EDM, StyleGAN and
    REPA write it (Karras et al. 2022, arXiv 2206.00364), labels are its own, and subfolders are no classes; nor are
    numbered subfolders of img00000000.png without one. Everything else that lies there is passed over and named.

    A folder that cannot be read is a bad input, and so is an image beside class folders. The listing carries a refusal
    where a class folder holds no images: it would be a class, and shift the labels of those behind it.

    Raises:
        UserError: no folder or zip, a folder of splits instead of classes, or a dataset.json that is not as written.
    """
    tree = zip_tree(root) if is_zip(root) else folder_tree(folder(root, "image folder"))
    names, labels, classes = [*tree.images], None, []
    labelled = _dataset_labels(tree, root)
    flaws = dict(tree.flaws)
    refusals = []
    if labelled is not None:
        names = sorted({*names, *labelled, *flaws})
        flaws |= {n: "dataset.json does not name it" for n in tree.images if n not in labelled}
        known = {name: label for name, label in labelled.items() if label is not None}
        if known:
            labels = [known.get(name, 0) for name in names]
    elif tree.tops and not _chunked(tree):
        _refuse_splits(tree, f"{root.rstrip('/')}/{tree.inside}".rstrip("/"), packed=is_zip(root))
        classes = ordered(tree.tops)
        stray = [name for name in names if "/" not in name]
        number = {name: label for label, name in enumerate(classes)}
        flaws |= dict.fromkeys(stray, "an image beside class folders: move it into one")
        used = {name.partition("/")[0] for name in names if "/" in name}
        empty = [name for name in classes if name not in used]
        if empty and len(empty) < len(classes):
            refusals.append(
                f"{len(empty):,} of the {len(classes):,} class folders in {root} hold no images, such as "
                f"{empty[0]!r}: move them away, or put their images in"
            )
        names = [*names, *tree.flaws]
        # in the order of classes, and of names in each
        names.sort(key=lambda name: (number.get(name.partition("/")[0], -1), name))
        labels = [number.get(name.partition("/")[0], 0) for name in names]
    else:
        names = sorted([*names, *tree.flaws])
    store = tree.store(tuple(names))
    return Listing.of(
        tree.name,
        [printable(name) for name in names],
        store,
        decode=decode,
        places=store.sizes(),
        labels=None if labels is None else np.array(labels, dtype=np.int64),
        class_names=[printable(name) for name in classes],
        flaws={row: flaws[name] for row, name in enumerate(names) if name in flaws},
        passed=tree.passed,
        refusals=refusals,
        inside=tree.inside,
    )


def _dataset_labels(tree: Tree, root: str) -> dict[str, int | None] | None:
    """The label of each name that `dataset.json` lists, None where it has none; None without such a file.

    Raises:
        UserError: it is no such list, or its labels are no whole numbers.
    """
    data = tree.read(DATASET)
    if data is None:
        return None
    try:
        listed = json.loads(data)["labels"]
        pairs = dict(listed) if listed is not None else {}
    except (ValueError, KeyError, TypeError) as error:
        # others call other files so; theirs say nothing of images
        if not any(_numbered(top) for top in tree.tops):
            return None
        raise UserError(
            f"{DATASET} in {root} is no list of [name, label] under 'labels' ({error}): mend it, or move it away"
        ) from None
    if all(label is None for label in pairs.values()):
        return dict.fromkeys(pairs or tree.images)
    for name, label in pairs.items() if isinstance(listed, dict) else listed:
        if isinstance(label, bool) or not isinstance(label, int) or abs(label) >= CLASSES:
            raise UserError(
                f"{DATASET} in {root} has the label {json.dumps(label)} for {name!r}: give whole numbers, classes "
                f"from 0 to {CLASSES - 1:,} at most, or null for all"
            )
        if label != pairs[name]:
            raise UserError(
                f"{DATASET} in {root} has the labels {label} and {pairs[name]} for {name!r}: give one"
            )
    return {name.replace("\\", "/"): label for name, label in pairs.items()}


def _chunked(tree: Tree) -> bool:
    """Whether folders are chunks of EDM's tool, 00000/img00000000.png, and no classes."""
    return all(_numbered(top) for top in tree.tops) and all(
        _CHUNK_FILE.fullmatch(name.rpartition("/")[2]) for name in tree.images
    )


def _numbered(top: str) -> bool:
    return len(top) == 5 and top.isdecimal()


def _refuse_splits(tree: Tree, root: str, *, packed: bool) -> None:
    nested = {name.split("/")[0] for name in tree.images if name.count("/") > 1}
    splits = sorted({*filter(is_split, tree.tops), *apart(tree.tops)})
    only = len(splits) == len(tree.tops) and (len(splits) > 1 or nested)
    if only or len([split for split in splits if split in nested]) > 1:
        raise UserError(
            f"{root} holds the splits {', '.join(splits)}, and folders are taken for classes: "
            + (
                "unpack it, and name one of them"
                if packed
                else f"name one of them, {root}/{splits[-1]}"
            )
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
