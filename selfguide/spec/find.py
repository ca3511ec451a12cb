"""Which run, and which of its snapshots, a user means by a folder, an id, the beginning of one, or a name."""

from __future__ import annotations

import shlex
from pathlib import Path

from selfguide.spec.averages import averages_of
from selfguide.spec.files import read_config
from selfguide.spec.run import RunFolder
from selfguide.spec.suggest import nearest
from shards import storage
from shards.errors import UserError


def runs(root: Path) -> list[RunFolder]:
    """Every run below a runs folder, by experiment and id."""
    return [RunFolder(path.parent) for path in sorted(root.glob("*/*/run.json"))]


def find(text: str, root: Path) -> RunFolder:
    """The run that `text` names: its folder, its id or name, or the beginning of an id.

    Raises:
        UserError: no run, or several.
    """
    folder = storage.expanded(text)
    if (folder / "run.json").is_file():
        return RunFolder(folder.resolve())
    known = runs(root.resolve())
    matches = [run for run in known if run.root.name == text]
    matches = matches or [run for run in known if run.root.name.startswith(text)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        several = ", ".join(f"{run.root.parent.name}/{run.root.name}" for run in matches)
        raise UserError(
            f"{text!r} means several runs: {several}; give more of the id, or the run's folder"
        )
    if not known:
        raise UserError(
            f"no run in {root}: start one with `python -m launcher.submit`, or give --runs FOLDER"
        )
    names, place = [run.root.name for run in known], shlex.quote(str(root))
    raise UserError(
        f"no run {text!r} in {root}{nearest(text, names)}; `python -m launcher.runs --runs {place}` lists them"
    )


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
        run = find(text, root)
        published = run.published()
        if not published:
            raise UserError(f"run {run.root.name} has published no snapshot yet")
        chosen = published[-1] if images is None else images
        if chosen not in published:
            known = ", ".join(f"{n}" for n in published)
            raise UserError(f"{asked}: this run has snapshots at {known}")
        folder = run.snapshot(chosen)
    averages = averages_of(read_config(folder / "config.yaml"))
    if not 0 <= average < len(averages):
        kept = ", ".join(f"{i}: {each}" for i, each in enumerate(averages))
        name = "--ema" if prefix else "average"
        raise UserError(f"{name} {average} is not one of this snapshot's averages ({kept})")
    return folder
