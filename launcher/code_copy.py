"""The source a run uses, copied at submission: editing the checkout afterwards changes no job that waits.

What is copied is what Python imports now, so it works from a checkout and from an installed wheel alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from shards import storage

PACKAGES = ("launcher", "selfguide", "shards", "slurm", "configs")
_CACHES = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")


# the first copy of a block of `one_for_all`
_first: ContextVar[list[Path] | None] = ContextVar("first", default=None)


@contextlib.contextmanager
def one_for_all() -> Iterator[None]:
    """Within the block every copy is one of the first: many attempts begin at once, on the same code."""
    token = _first.set([])
    try:
        yield
    finally:
        _first.reset(token)


def copy(target: Path) -> dict[str, Any]:
    """Writes the packages below `target` (new) and describes them in `target`.json; returns the description.

    The folder appears whole or not at all: it is made under a temporary name and renamed.

    Raises:
        NoRoomError: the disk is full, or may not be written.
    """
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}"
    first = _first.get()
    if first:
        return _again(first[0], temporary, target)
    found = [(temporary / name / path, file) for name in PACKAGES for path, file in _sources(name)]
    try:
        for to, file in found:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, to)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        storage.refuse_no_room(target, sum(file.stat().st_size for _, file in found), error)
        raise
    about = {
        "hash": content_hash(temporary),
        "packages": list(PACKAGES),
        **git(location("launcher").parent),
    }
    _appear(temporary, target)
    target.with_suffix(".json").write_text(json.dumps(about, indent=1))
    if first is not None:
        first.append(target)
    return about


def _again(whole: Path, temporary: Path, target: Path) -> dict[str, Any]:
    """Does what `copy` does with the files of an earlier copy, whose description holds for them, too."""
    try:
        shutil.copytree(whole, temporary)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        size = sum(file.stat().st_size for file in whole.rglob("*"))
        storage.refuse_no_room(target, size, error)
        raise
    _appear(temporary, target)
    text = whole.with_suffix(".json").read_text()
    target.with_suffix(".json").write_text(text)
    about: dict[str, Any] = json.loads(text)
    return about


def _appear(temporary: Path, target: Path) -> None:
    """Gives a copy its name, unless another process has made the same one meanwhile."""
    try:
        temporary.rename(target)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        if not target.is_dir():
            raise


def share(kept: Path, target: Path) -> None:
    """Makes `target` (new) the copy that `kept` is, for an attempt that goes on in the process of another."""
    whole = kept.resolve()
    target.with_suffix(".json").write_bytes(whole.with_suffix(".json").read_bytes())
    target.symlink_to(os.path.relpath(whole, target.parent))


def location(package: str) -> Path:
    """The folder that `import package` reads, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"package {package!r} is not installed beside the launcher")
    return Path(next(iter(spec.submodule_search_locations)))


def current(kept: Path, copies: Path) -> Path:
    """Returns a copy of the code that this process runs: `kept` where it is the same, else one below `copies`.

    A run that is evaluated long after it was trained needs one, since jobs of today cannot run on older code.
    """
    here = location("launcher").parent
    if here.with_suffix(".json").is_file():  # this process runs from a copy itself
        return here
    if _first.get():  # made a moment ago
        return kept
    wanted = _hash({f"{name}/{path}": file for name in PACKAGES for path, file in _sources(name)})
    about = kept.with_suffix(".json")
    if about.is_file() and json.loads(about.read_text())["hash"] == wanted:
        return kept
    target = copies / wanted
    if not target.is_dir():
        copies.mkdir(exist_ok=True)
        copy(target)
    return target


def _sources(package: str) -> Iterator[tuple[str, Path]]:
    """(relative path, file) of all that `copy` takes of a package."""
    for folder, folders, files in os.walk(location(package)):
        skipped = _CACHES(folder, [*folders, *files])
        folders[:] = [name for name in folders if name not in skipped]
        for name in set(files) - skipped:
            path = Path(folder, name)
            yield path.relative_to(location(package)).as_posix(), path


def content_hash(root: Path) -> str:
    """12 hex digits over names and bytes of every file below `root`, in a fixed order."""
    return _hash({p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()})


def _hash(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()[:12]


def git(root: Path) -> dict[str, Any]:
    """{"revision", "dirty"} of the checkout that tracks this source; nothing where there is none."""
    if shutil.which("git") is None or not _git(root, "ls-files", "launcher/__init__.py"):
        return {}  # installed; a checkout that happens to hold the environment says nothing about it
    revision = _git(root, "rev-parse", "HEAD")
    return (
        {"revision": revision, "dirty": bool(_git(root, "status", "--porcelain"))}
        if revision
        else {}
    )


def _git(root: Path, *arguments: str) -> str:
    """What git prints, or '' where it refuses."""
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""
