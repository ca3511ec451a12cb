"""What lies in a folder or a .zip of images: the pictures, the folders beside them, and what is passed over."""

from __future__ import annotations

import os
import posixpath
import stat
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from shards.errors import BadInputError, UserError
from shards.format.members import printable
from shards.format.pictures import HEAD, NO_IMAGE, OTHERS, SUFFIXES, is_picture
from shards.sources.listing import Files, Passed
from shards.sources.source import Lazy

# the file that has the labels, where images lie in chunks: it is read, and no image
DATASET = "dataset.json"
# folders of thumbnails, bins and repairs, which machines make beside images; in lower case
_MADE = frozenset(
    (
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "@tmp",
        "#recycle",
        "#snapshot",
        "lost+found",
        "$recycle.bin",
        "system volume information",
        "__pycache__",
        "__macosx",
    )
)
_SUFFIXES = SUFFIXES | OTHERS


@dataclass(frozen=True, kw_only=True)
class Tree:
    """What lies in a folder or zip; names are relative to `inside` of it, with slashes, but those passed over."""

    name: str
    inside: str  # the lone folder that holds everything else, with a slash, or empty
    images: tuple[str, ...]  # sorted
    tops: tuple[str, ...]  # folders that lie in it
    passed: tuple[Passed, ...]
    flaws: dict[str, str]  # folders that cannot be read, and why
    store: Callable[[tuple[str, ...]], Files | Zipped]
    read: Callable[[str], bytes | None]  # of one name; None where it is not there


def folder_tree(base: Path) -> Tree:
    """Links to folders elsewhere are followed, each folder once; one that lies in `base` is read where it lies."""
    images: list[str] = []
    passed: list[Passed] = []
    flaws: dict[str, str] = {}
    top = base.resolve()
    known: dict[Path, str] = {}  # folders elsewhere, and the link that led there first

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == base:
            raise UserError(f"image folder {base}: {error.strerror}: name one that can be read")
        flaws[f"{Path(error.filename).relative_to(base).as_posix()}/"] = (
            f"a folder that cannot be read: {error.strerror}"
        )

    folders: list[str] = []
    for place, inner, names in os.walk(base, onerror=unreadable, followlinks=True):
        relative = Path(place).relative_to(base).as_posix()
        below = "" if relative == "." else f"{relative}/"
        kept = []
        for name in sorted(inner):
            path = f"{below}{name}"
            if reason := _no_folder(name) or _read_already(base / path, top, known):
                passed.append(Passed(f"{path}/", reason))
            else:
                kept.append(name)
        inner[:] = kept
        folders += [f"{below}{name}/" for name in kept]
        for name in sorted(names):
            path = f"{below}{name}"
            if reason := _no_image(name, partial(_head_of, base, path)):
                passed.append(Passed(path, reason))
            else:
                images.append(path)
    inside = _lone_folder(images, folders, lambda name: (base / name).is_file())
    if len(_tops(images, folders, inside)) < 2 and not (base / inside / DATASET).is_file():
        # a class that has none beside it is called by the folder at the top
        inside = ""
    root = base / inside
    return Tree(
        name=printable(base.resolve().name),
        inside=inside,
        images=tuple(sorted(name.removeprefix(inside) for name in images)),
        tops=_tops(images, folders, inside),
        passed=_without_own(passed, inside),
        flaws={name.removeprefix(inside): flaw for name, flaw in flaws.items()},
        store=lambda names: Files(root=str(root), names=names),
        read=lambda name: (root / name).read_bytes() if (root / name).is_file() else None,
    )


def _read_already(path: Path, top: Path, known: dict[Path, str]) -> str:
    """Why a folder is not followed, which is a link, or lies behind one: empty where it is.

    Else a picture would be in two classes, by chance in the one of the link, and a circle would have no end.
    """
    real = path.resolve()
    if real == path.absolute():
        return ""
    if top.is_relative_to(real):
        return "a link to a folder above"
    inside = real.relative_to(top).parts if real.is_relative_to(top) else ()
    if inside and path.is_symlink() and not any(map(_no_folder, inside)):
        return f"a link to {'/'.join(inside)}, which is read there"
    if (first := known.setdefault(real, str(path))) != str(path):
        return f"a link to {real}, which is read as {first}"
    return ""


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


def is_zip(root: str) -> bool:
    """Whether a path is a zip file, by its name or its content."""
    place = Path(root)
    return place.is_file() and (place.suffix.lower() == ".zip" or zipfile.is_zipfile(place))


def zip_tree(root: str) -> Tree:
    """Names are as zips have them: with slashes, below the top; some programs write others."""
    try:
        archive = zipfile.ZipFile(root)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{root} is no whole zip ({error}): fetch or write it again") from None
    images: list[str] = []
    passed: list[Passed] = []
    folders: list[str] = []
    own: dict[str, str] = {}  # what the zip itself calls each
    with archive:
        listed = [info.filename for info in archive.infolist()]
        for name in listed:
            if (known := own.setdefault(_plain(name), name)) != name:
                passed.append(Passed(name, f"a second {_plain(name)}, beside {known}"))
        for name, count in Counter(listed).items():
            again = [Passed(name, "a second file of this name: the last one is read")] * (count - 1)
            passed += [] if name.endswith("/") else again
        for name in sorted(own):
            *above, last = name.rstrip("/").split("/")
            hidden = next((reason for part in above if (reason := _no_folder(part))), "")
            if name.endswith("/"):
                if not hidden and not _no_folder(last):
                    folders.append(name)
                continue
            head = partial(_zip_head, archive, own[name])
            if reason := hidden or _no_image(last, head):
                passed.append(Passed(name, reason))
            else:
                images.append(name)
    base = _lone_folder(images, folders, own.__contains__)

    def read(name: str) -> bytes | None:
        with zipfile.ZipFile(root) as again:
            return again.read(own[base + name]) if base + name in own else None

    return Tree(
        name=printable(Path(root).resolve().stem),
        inside=base,
        images=tuple(name.removeprefix(base) for name in images),
        tops=_tops(images, folders, base),
        passed=_without_own(passed, base),
        flaws={},
        # a name that it does not have is a bad input, as dataset.json may list one
        store=lambda names: Zipped(
            root, tuple(own.get(base + name, base + name) for name in names)
        ),
        read=read,
    )


def _plain(name: str) -> str:
    """A zip's name for a file, or a folder with a slash at its end, from the top: .\\a\\b.png is a/b.png."""
    slashed = name.replace("\\", "/")
    plain = posixpath.normpath(f"/{slashed}").lstrip("/")
    return f"{plain}/" if plain and slashed.endswith("/") else plain


def _tops(images: list[str], folders: list[str], base: str) -> tuple[str, ...]:
    """The folders that lie in `base`, sorted; an archive may list no folders."""
    below = [name.removeprefix(base) for name in [*images, *folders] if name.startswith(base)]
    return tuple(sorted({name.partition("/")[0] for name in below if "/" in name}))


def _lone_folder(images: list[str], folders: list[str], exists: Callable[[str], bool]) -> str:
    """The folder that holds everything else, with a slash; empty where there is none.

    One that holds images itself is a class, unless a dataset.json lies beside them.
    """
    base = ""
    while not exists(base + DATASET):
        inside = [n for n in [*images, *folders] if n.startswith(base) and n != base]
        tops = {name.removeprefix(base).partition("/")[0] for name in inside}
        lone = f"{base}{min(tops, default='')}/"
        below = [name.removeprefix(lone) for name in inside if name != lone]
        direct = any("/" not in name for name in below)
        if len(tops) != 1 or not below or (direct and not exists(lone + DATASET)):
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


def _no_folder(name: str) -> str:
    """Why a folder's files are no inputs; empty where they are."""
    if name.startswith("."):
        return "a hidden folder"
    return "made by a machine, such as thumbnails" if name.lower() in _MADE else ""


def _no_image(name: str, head: Callable[[], bytes | None]) -> str:
    """Why a file is no input; empty where it is. `head` reads its first bytes, None where it cannot be read."""
    if name.startswith("."):
        return "a hidden file"
    if os.path.splitext(name)[1].lower() in _SUFFIXES:  # noqa: PTH122 - half a million names are many paths
        return ""
    found = head()
    if found is None:
        return "a file of another name than pictures have, which cannot be read"
    return "" if is_picture(found) else NO_IMAGE


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
