"""The run folder: what a run is, its attempts, and who may still publish into it.

A run is what is learned; an attempt is one job that works on it. State is in these files only, so every command
can be asked from any machine that sees the folder. An older attempt that still lives may burn CPU but publishes
nothing: a newer attempt ends its right when it begins, and `Lease.publish` asks for that right in the operation
that publishes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards import storage
from shards.errors import FencedError as Fenced

CANCELLED = "cancelled.json"
# of checkpoints or snapshots: what an attempt set aside
DAMAGED = "damaged"


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; every reader and writer takes them from here."""

    root: Path

    @property
    def run_json(self) -> Path:
        return self.root / "run.json"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def snapshots(self) -> Path:
        return self.root / "snapshots"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics"

    @property
    def evals(self) -> Path:
        return self.root / "evals"

    def describe(self) -> dict[str, Any]:
        """run.json: id, name, experiment, hash, identity, images (the current target), created, extensions."""
        return json.loads(self.run_json.read_text())

    def attempt(self, number: int) -> Path:
        return self.attempts / f"{number:04d}"

    def cancelled(self, number: int) -> Path:
        """The record that somebody wants no attempt to follow that one."""
        return self.attempt(number) / CANCELLED

    def attempt_numbers(self) -> list[int]:
        return sorted(int(name) for name in names_in(self.attempts) if name.isdigit())

    def open_attempt(self) -> int:
        """Takes the next attempt number by making its folder; two callers never get the same."""
        self.attempts.mkdir(parents=True, exist_ok=True)
        while True:
            number = (self.attempt_numbers() or [0])[-1] + 1
            try:
                self.attempt(number).mkdir()
                return number
            except FileExistsError:
                continue

    def snapshot(self, images: int) -> Path:
        return self.snapshots / image_folder(images)

    def checkpoint(self, images: int) -> Path:
        return self.checkpoints / image_folder(images)

    def preview(self, images: int) -> Path:
        """The picture of samples that training drew at so many images."""
        return self._previews / f"{image_folder(images)}.png"

    def previewed(self) -> list[int]:
        """Images of every such picture, ascending."""
        return numbered(names_in(self._previews), ".png")

    def newest_preview(self) -> int | None:
        """Images of the newest of those pictures; None where there is none."""
        return max(self.previewed(), default=None)

    @property
    def _previews(self) -> Path:
        return self.root / "previews"

    def slowest_save_s(self) -> float | None:
        """Seconds that the slowest checkpoint of all attempts took; None before the first."""
        found = (read_record(self.attempt(n) / "progress.json") for n in self.attempt_numbers())
        taken = [record["save_s"] for record in found if record and record.get("save_s")]
        return max(taken, default=None)

    def published(self) -> list[int]:
        """Images of every complete snapshot, ascending."""
        return complete(self.snapshots)

    def saved(self) -> list[int]:
        """Images of every complete checkpoint, ascending."""
        return complete(self.checkpoints)

    def checkpoint_folders(self) -> list[int]:
        """Images of every checkpoint's folder, complete or not, ascending."""
        return numbered(names_in(self.checkpoints))

    def snapshot_folders(self) -> list[int]:
        """Images of every snapshot's folder, complete or not, ascending."""
        return numbered(names_in(self.snapshots))

    def snapshot_manifest(self, images: int) -> dict[str, Any]:
        """What the complete snapshot at so many images says of itself: guidance, data, origin."""
        manifest = storage.read_complete(self.snapshot(images), verify="sizes")
        assert manifest is not None
        return manifest

    def finished(self) -> bool:
        """The final snapshot is published."""
        return storage.read_complete(self._final_snapshot()) is not None

    def final_snapshot_holds(self) -> bool:
        """The same, byte for byte: reads all of it."""
        return storage.read_complete(self._final_snapshot(), verify="hashes") is not None

    def _final_snapshot(self) -> Path:
        return self.snapshot(self.describe()["images"])


def names_in(folder: Path) -> list[str]:
    """Names of all that is in a folder; none where there is no such folder."""
    try:
        # a path for each of tens of thousands of names would cost a list of runs a second
        return os.listdir(folder)  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []


def numbered(names: Iterable[str], suffix: str = "") -> list[int]:
    """Images of all names img-<images><suffix>, ascending."""
    stems = (n.removesuffix(suffix) for n in names if n.endswith(suffix))
    return sorted(int(stem[4:]) for stem in stems if stem.startswith("img-") and stem[4:].isdigit())


def complete(parent: Path) -> list[int]:
    """Images of every complete checkpoint or snapshot in a folder of them, ascending."""
    folders = [(images, parent / image_folder(images)) for images in numbered(names_in(parent))]
    return [i for i, folder in folders if storage.read_complete(folder, verify="sizes") is not None]


def damaged(place: Path) -> Path:
    """Where an attempt keeps what it found damaged of checkpoints or snapshots: img-<images>.<attempt>."""
    return place / DAMAGED


def image_folder(images: int) -> str:
    """img-000256000; names sort as they count up to a billion images, so sort by number."""
    return f"img-{images:09d}"


@dataclass(frozen=True)
class Lease:
    """The right of one attempt to publish into its run."""

    run: RunFolder
    number: int

    def begin(self) -> None:
        """Ends the right of all older attempts: what is complete when this returns is all they ever publish.

        One rank calls it, before the attempt looks for a checkpoint. An attempt that was only submitted ends nobody's
        right for good: its folder goes if no job could be queued.
        """
        for place in (self.run.checkpoints, self.run.snapshots) if self.number > 1 else ():
            storage.end_attempts(place, self.number)
            # nothing that an older attempt began to write appears any more
            storage.sweep(place, older=0.0)
        for number in [each for each in self.run.attempt_numbers() if each < self.number][-1:]:
            # a record that a rank was writing when it was killed
            storage.sweep(self.run.attempt(number), older=0.0)

    def holds(self, folder: Path) -> bool:
        """Whether a checkpoint or snapshot is complete, byte for byte. What is there and is not makes way.

        Raises:
            Fenced: a newer attempt exists; nothing was moved.
        """
        self.check()
        if storage.read_complete(folder, verify="hashes") is not None:
            return True
        if folder.is_dir():
            self.set_aside(folder)
        return False

    def set_aside(self, folder: Path) -> Path | None:
        """Takes a checkpoint or snapshot that does not hold from its place; returns where it is kept.

        One that was published is kept in `damaged/` for a person to look at, one without a manifest is deleted.

        Raises:
            Fenced: a newer attempt exists; nothing was moved.
        """
        published = (folder / storage.MANIFEST).exists()
        to = damaged(folder.parent) / f"{folder.name}.{self.number:04d}" if published else None
        storage.set_aside(folder, to, self.fence(folder))
        return to

    def publish(
        self,
        folder: Path,
        *,
        extra: Mapping[str, Any],
        parts: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Declares a checkpoint or snapshot complete (`storage.publish_folder`), while this attempt is the newest.

        Raises:
            Fenced: a newer attempt exists; the folder is not complete.
            FileExistsError: it was published before.
        """
        self.check()
        storage.publish_folder(folder, extra=extra, parts=parts, fence=self.fence(folder))

    def fence(self, folder: Path) -> storage.Fence:
        """The right to publish into this checkpoint or snapshot, for `storage.publish_file` of its files."""
        return storage.Fence(str(folder.parent), self.number)

    def check(self) -> None:
        """Raises Fenced when a newer attempt exists: asked before the work of publishing, to spare it."""
        newest = self.run.attempt_numbers()[-1]
        if newest > self.number:
            raise Fenced(
                f"attempt {self.number} of {self.run.root} was overtaken by attempt {newest}"
            )


def strict_json(value: Any, indent: int | None = None) -> str:
    """Returns `value` as JSON that every reader takes: numbers that are not finite become null, other objects text."""
    return json.dumps(_finite(value), indent=indent, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def write_record(path: Path, record: dict[str, Any], *, replace: bool = False) -> None:
    """One small JSON file, whole or not at all; immutable unless `replace`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = strict_json({"time": time.time(), **record}, indent=1).encode()
    storage.publish(str(path), data, replace=replace)


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Adds one line of JSON to a file that nobody else writes; where it finds no room, nothing of it stays.

    Raises:
        NoRoomError: the disk is full, or may not be written.
    """
    line = (strict_json({"time": time.time(), **record}) + "\n").encode()
    try:
        with path.open("ab", buffering=0) as file:
            before = file.tell()
            if file.write(line) < len(line):
                # the next line would be read as the rest of this one
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        storage.refuse_no_room(path, len(line), error)
        raise


def read_record(path: Path) -> dict[str, Any] | None:
    """The record, or None where none is yet."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
