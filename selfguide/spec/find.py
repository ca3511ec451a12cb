"""Which run, and which of its snapshots, a user means by a folder, an id, the beginning of one, or a name."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from selfguide.spec.averages import averages_of
from selfguide.spec.files import read_config
from selfguide.spec.retention import deletion
from selfguide.spec.run import RunFolder, complete
from selfguide.spec.suggest import nearest
from shards import storage
from shards.errors import UserError


def runs(root: Path) -> list[RunFolder]:
    """Every run below a runs folder, by experiment and id."""
    return [RunFolder(path.parent) for path in sorted(root.glob("*/*/run.json"))]


def find(text: str, root: Path, *, prefix: str = "--") -> RunFolder:
    """The run that `text` names: its folder, its id or name, or the beginning of one, also with EXPERIMENT/ before it.

    `prefix` is as in `find_snapshot`.

    Raises:
        UserError: no run, or several.
    """
    folder = storage.expanded(text)
    if (folder / "run.json").is_file():
        return RunFolder(folder.resolve())
    known = runs(root.resolve())
    called = {f"{run.root.parent.name}/{run.root.name}": run for run in known}
    ends = [name if "/" in text else name.partition("/")[2] for name in called]
    matches = [run for run, end in zip(known, ends, strict=True) if end == text]
    matches = matches or [r for r, end in zip(known, ends, strict=True) if end.startswith(text)]
    # one run may have several names, by links
    if len({run.root.resolve() for run in matches}) == 1:
        return matches[0]
    if matches:
        several = ", ".join(name for name, run in called.items() if run in matches)
        raise UserError(f"{text!r} means several runs: {several}; name one of these")
    if missing := _missing(text, folder):
        raise UserError(missing)
    if not known:
        there = "" if root.is_dir() else ", which does not exist"
        given = f"{prefix}runs FOLDER" if prefix else "runs=FOLDER"
        raise UserError(
            f"no run in {root}{there}: start one with `python -m launcher.submit`, or give {given}"
        )
    place = shlex.quote(str(root))
    raise UserError(
        f"no run {text!r} in {root}{nearest(text, ends)}; `python -m launcher.runs --runs {place}` lists them"
    )


def _missing(text: str, folder: Path) -> str:
    """What is wrong with a folder, where `text` can only mean one; empty where it may be an id or a name."""
    if storage.is_remote(text):
        return f"{text} is on S3, and runs are read from folders: copy it here"
    if folder.exists():
        inside = sorted(path.parent.name for path in folder.glob("*/run.json"))
        if "/" not in text:
            return ""
        if not inside:
            return f"{text} is no run's folder, for it has no run.json"
        return f"{text} is no run's folder: it holds {', '.join(inside)}; name one, {folder / inside[0]}"
    if not folder.is_absolute() and text.count("/") < 2 and not text.startswith("."):
        return ""
    there = next(above for above in folder.absolute().parents if above.exists())
    gone = folder.absolute().relative_to(there).parts[0]
    names = (
        sorted(path.name for path in there.iterdir())
        if os.access(there, os.R_OK) and there.is_dir()
        else []
    )
    return f"{text} does not exist: {there} has no {gone!r}{nearest(gone, names)}"


def find_snapshot(
    text: str, root: Path, images: int | None = None, average: int = 0, *, prefix: str = "--"
) -> Path:
    """The folder of the snapshot that `text` names: that folder, or a run, whose newest is taken, or that at `images`.

    `prefix` stands before the names of settings in messages: those of a command line, or none.

    Raises:
        UserError: there is no such run, snapshot or average.
    """
    folder = storage.expanded(text)
    asked = f"{prefix}images {images}"
    if (folder / "MANIFEST.json").is_file():
        if images is not None:
            raise UserError(f"{asked}: {folder} is one snapshot already; drop it")
    else:
        if gone := deletion(folder):
            there = ", ".join(f"{n}" for n in complete(folder.parent))
            raise UserError(f"{text}: {gone}; this run has snapshots at {there}")
        run = find(text, root, prefix=prefix)
        published = run.published()
        if not published:
            raise UserError(f"run {run.root.name} has published no snapshot yet")
        chosen = published[-1] if images is None else images
        if chosen not in published:
            known = ", ".join(f"{n}" for n in published)
            if gone := deletion(run.snapshot(chosen)):
                raise UserError(f"{asked}: {gone}; this run has snapshots at {known}")
            raise UserError(f"{asked}: this run has snapshots at {known}")
        folder = run.snapshot(chosen)
    averages = averages_of(read_config(folder / "config.yaml"))
    if not 0 <= average < len(averages):
        kept = ", ".join(f"{i}: {each}" for i, each in enumerate(averages))
        name = "--ema" if prefix else "average"
        raise UserError(f"{name} {average} is not one of this snapshot's averages ({kept})")
    return folder
