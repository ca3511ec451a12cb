"""Folders of image files: one folder a class, VOC's and COCO's lists, LSUN's databases.

A key is the file's path below the folder, or the name that the data set's own list gives it.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import BadInputError, UserError
from shards.format.classes import ordered
from shards.format.members import CLASSES, printable
from shards.format.pictures import HEAD, OTHERS, SUFFIXES, is_picture
from shards.sources.listing import Decode, Files, Listing, Passed, file, folder
from shards.sources.source import Lazy

DATASET = "dataset.json"
# folders that hold splits of a data set, and are seldom classes
SPLITS = frozenset(
    (
        "train",
        "training",
        "val",
        "valid",
        "validation",
        "test",
        "testing",
        "dev",
        "eval",
        "unlabeled",
    )
)
# folders of thumbnails, bins and repairs, which machines make beside images
_MADE = frozenset(
    (
        "@eaDir",
        "#recycle",
        "#snapshot",
        "lost+found",
        "$RECYCLE.BIN",
        "__pycache__",
        "__MACOSX",
    )
)
_SUFFIXES = SUFFIXES | OTHERS
_CHUNK_FILE = re.compile(r"img\d{8}\.\w+")


def image_folder(root: str, decode: Decode) -> Listing:
    """Images below the subfolders of `root`, a folder or a .zip, which are the classes, in the order of `ordered`.

    A .zip of one folder that holds folders is that folder: so archives are made.

    Images that lie in `root` itself, without subfolders, have no labels. With a `dataset.json`, as EDM, StyleGAN and
    REPA write it (Karras et al. 2022, arXiv 2206.00364), labels are its own, and subfolders are no classes; nor are
    numbered subfolders of img00000000.png without one. Everything else that lies there is passed over and named.

    A folder that cannot be read is a bad input, and so is an image beside class folders. The listing carries a refusal
    where a class folder holds no images: it would be a class, and shift the labels of those behind it.

    Raises:
        UserError: no folder or zip, a folder of splits instead of classes, or a dataset.json that is not as written.
    """
    tree = _zip_tree(root) if _is_zip(root) else _folder_tree(folder(root, "image folder"))
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
        _refuse_splits(tree, root)
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
    )


@dataclass(frozen=True, kw_only=True)
class _Tree:
    """What lies in a folder or zip; names are relative to it, with slashes."""

    name: str
    images: tuple[str, ...]  # sorted
    tops: tuple[str, ...]  # folders that lie in it
    passed: tuple[Passed, ...]
    flaws: dict[str, str]  # folders that cannot be read, and why
    store: Callable[[tuple[str, ...]], Files | Zipped]
    read: Callable[[str], bytes | None]  # of one name; None where it is not there


def _folder_tree(base: Path) -> _Tree:
    """Links to folders are followed, each folder once."""
    images: list[str] = []
    passed: list[Passed] = []
    flaws: dict[str, str] = {}
    # else a link to a folder above is followed without end
    known: set[str] = set()

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == base:
            raise UserError(f"image folder {base}: {error.strerror}: name one that can be read")
        flaws[f"{Path(error.filename).relative_to(base).as_posix()}/"] = (
            f"a folder that cannot be read: {error.strerror}"
        )

    tops: list[str] = []
    for place, inner, names in os.walk(base, onerror=unreadable, followlinks=True):
        if place != str(base):
            if (real := os.path.realpath(place)) in known:
                inner.clear()
                continue
            known.add(real)
        relative = Path(place).relative_to(base).as_posix()
        below = "" if relative == "." else f"{relative}/"
        kept = []
        for name in sorted(inner):
            if reason := _no_folder(name):
                passed.append(Passed(f"{below}{name}/", reason))
            else:
                kept.append(name)
        inner[:] = kept
        if place == str(base):
            tops = kept
        for name in sorted(names):
            path = f"{below}{name}"
            if reason := _no_image(name, partial(_head_of, base, path)):
                passed.append(Passed(path, reason))
            else:
                images.append(path)
    return _Tree(
        name=printable(base.resolve().name),
        images=tuple(sorted(images)),
        tops=tuple(tops),
        passed=_without_own(passed),
        flaws=flaws,
        store=lambda names: Files(root=str(base), names=names),
        read=lambda name: (base / name).read_bytes() if (base / name).is_file() else None,
    )


@dataclass(frozen=True, eq=False)
class Zipped(Lazy):
    """Inputs that are members of a zip; opened once a process."""

    path: str
    names: tuple[str, ...]

    @cached_property
    def archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    def read(self, row: int) -> bytes:
        try:
            return self.archive.read(self.names[row])
        except KeyError:
            raise BadInputError("no such file") from None
        except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
            raise BadInputError(f"cannot be read: {error}") from None

    def sizes(self) -> list[int]:
        """CRC of each, which changes with its bytes; -1 where there is none."""
        found = {info.filename: info.CRC for info in self.archive.infolist()}
        return [found.get(name, -1) for name in self.names]


def _is_zip(root: str) -> bool:
    return Path(root).is_file() and Path(root).suffix.lower() == ".zip"


def _zip_tree(root: str) -> _Tree:
    try:
        archive = zipfile.ZipFile(root)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{root} is no whole zip ({error}): fetch or write it again") from None
    images: list[str] = []
    passed: list[Passed] = []
    folders: list[str] = []
    with archive:
        found = {info.filename for info in archive.infolist()}
        for name in sorted(found):
            *above, own = name.rstrip("/").split("/")
            hidden = next((reason for part in above if (reason := _no_folder(part))), "")
            if name.endswith("/"):
                if not hidden and not _no_folder(own):
                    folders.append(name)
                continue
            head = partial(_zip_head, archive, name)
            if reason := hidden or _no_image(own, head):
                passed.append(Passed(name, reason))
            else:
                images.append(name)
    base = _lone_folder(images, folders, found)
    images = [name.removeprefix(base) for name in images]
    below = [name.removeprefix(base) for name in folders if name.startswith(base)]

    def read(name: str) -> bytes | None:
        with zipfile.ZipFile(root) as again:
            return again.read(base + name) if base + name in found else None

    return _Tree(
        name=printable(Path(root).resolve().stem),
        images=tuple(images),
        tops=tuple(sorted({name.partition("/")[0] for name in [*images, *below] if "/" in name})),
        passed=_without_own(passed, base),
        flaws={},
        store=lambda names: Zipped(root, tuple(base + name for name in names)),
        read=read,
    )


def _lone_folder(images: list[str], folders: list[str], found: set[str]) -> str:
    """The folder of an archive that holds everything else, with a slash; empty where there is none.

    One that holds images itself is a class, unless a dataset.json lies beside them.
    """
    base = ""
    while base + DATASET not in found:
        inside = [name.removeprefix(base) for name in [*images, *folders] if name != base]
        tops = {name.partition("/")[0] for name in inside}
        lone = f"{base}{min(tops, default='')}/"
        direct = any("/" not in name.removeprefix(lone) for name in images)
        if len(tops) != 1 or (direct and lone + DATASET not in found):
            break
        base = lone
    return base


def _zip_head(archive: zipfile.ZipFile, name: str) -> bytes | None:
    try:
        with archive.open(name) as file:
            return file.read(HEAD)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError):
        return None


def _without_own(passed: list[Passed], base: str = "") -> tuple[Passed, ...]:
    """A dataset.json at the top is read, and not passed over."""
    return tuple(p for p in passed if p.name != base + DATASET)


def _dataset_labels(tree: _Tree, root: str) -> dict[str, int | None] | None:
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


def _chunked(tree: _Tree) -> bool:
    """Whether folders are chunks of EDM's tool, 00000/img00000000.png, and no classes."""
    return all(_numbered(top) for top in tree.tops) and all(
        _CHUNK_FILE.fullmatch(name.rpartition("/")[2]) for name in tree.images
    )


def _numbered(top: str) -> bool:
    return len(top) == 5 and top.isdecimal()


def _refuse_splits(tree: _Tree, root: str) -> None:
    splits = [top for top in tree.tops if top.lower() in SPLITS]
    nested = {name.split("/")[0] for name in tree.images if name.count("/") > 1}
    only = len(splits) == len(tree.tops) and (len(splits) > 1 or nested)
    if only or len([split for split in splits if split in nested]) > 1:
        own = f"{root.rstrip('/')}/{sorted(splits)[-1]}"
        raise UserError(
            f"{root} holds the splits {', '.join(sorted(splits))}, and folders are taken for classes: "
            + ("unpack it, and name one of them" if _is_zip(root) else f"name one of them, {own}")
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


def _no_folder(name: str) -> str:
    """Why a folder's files are no inputs; empty where they are."""
    if name.startswith("."):
        return "a hidden folder"
    return "made by a machine, such as thumbnails" if name in _MADE else ""


def _no_image(name: str, head: Callable[[], bytes | None]) -> str:
    """Why a file is no input; empty where it is. `head` reads its first bytes, None where it cannot be read."""
    if name.startswith("."):
        return "a hidden file"
    if os.path.splitext(name)[1].lower() in _SUFFIXES:  # noqa: PTH122 - half a million names are many paths
        return ""
    found = head()
    if found is None:
        return "a file of another name than pictures have, which cannot be read"
    return "" if is_picture(found) else "no picture"


def _head_of(base: Path, name: str) -> bytes | None:
    path = base / name
    try:
        # a pipe would be waited for
        if not stat.S_ISREG(path.stat().st_mode):
            return None
        with path.open("rb") as file:
            return file.read(HEAD)
    except OSError:
        return None
