"""A sweep's folder: which runs it is, and on one machine the queue of those that wait for the machine.

    <runs>/.sweeps/<id>/sweep.json  configs/<experiment>/<run>.yaml  queue.json  runner.json  runner.log  code/

A sweep holds no state of its runs: each is an ordinary run in its own folder.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import backends
from launcher.backends import Record
from selfguide.spec.run import RunFolder, read_record, write_record
from shards.lock import lock

# beginning of a sweep's id; no run's, which is a hash or a name that somebody gave
PREFIX = "sweep-"


@dataclass(frozen=True)
class SweepFolder:
    """Paths and records of one sweep."""

    root: Path

    @property
    def id(self) -> str:
        return self.root.name

    @property
    def record(self) -> Path:
        """What was typed, and the runs that it means."""
        return self.root / "sweep.json"

    @property
    def runner(self) -> Path:
        """The record of the process of this machine that starts one run after another."""
        return self.root / "runner.json"

    @property
    def code(self) -> Path:
        """A copy of the code for that process."""
        return self.root / "code"

    def config(self, key: str) -> Path:
        """The config of the run that the queue calls `key`, "<experiment>/<run>"."""
        return self.root / "configs" / f"{key}.yaml"

    def describe(self) -> dict[str, Any]:
        """sweep.json: id, command, runs (each with run, experiment and overrides)."""
        return read_record(self.record) or {}

    def runs(self) -> list[RunFolder]:
        """The folder of each run; one that still waits for this machine has none on disk."""
        parent = self.root.parent.parent
        return [RunFolder(parent / r["experiment"] / r["run"]) for r in self.describe()["runs"]]

    def begun(self) -> list[RunFolder]:
        """The runs that have been submitted."""
        return [run for run in self.runs() if run.run_json.exists()]

    @contextlib.contextmanager
    def queue(self) -> Iterator[list[str]]:
        """The runs that wait for this machine, next first, held against others; what the block leaves is kept."""
        self.root.mkdir(parents=True, exist_ok=True)
        with lock(self.root / "queue.lock", required=False):
            path = self.root / "queue.json"
            waiting: list[str] = (read_record(path) or {}).get("waiting", [])
            before = list(waiting)
            yield waiting
            if waiting != before:
                write_record(path, {"waiting": waiting}, replace=True)

    def runs_on(self) -> bool:
        """Whether the process that starts the waiting runs works, as far as is known."""
        record = read_record(self.runner)
        return record is not None and backends.state(record) != "gone"

    def stop(self) -> Record | None:
        """Empties the queue and ends the process that starts runs; returns its record where there was one.

        Raises:
            UserError: it cannot be reached from here.
        """
        with self.queue() as waiting:
            waiting.clear()
            record = read_record(self.runner)
            return record if record is not None and backends.cancel(record) else None


def of_id(root: Path, id: str) -> SweepFolder:
    """The folder of a sweep below a runs folder."""
    return SweepFolder(root / ".sweeps" / id)


def sweeps(root: Path) -> list[SweepFolder]:
    """Every sweep below a runs folder, by id."""
    return [SweepFolder(path.parent) for path in sorted(root.glob(".sweeps/*/sweep.json"))]


def named(text: str, root: Path) -> SweepFolder | None:
    """The sweep that `text` is the id of, or the beginning of it; None where it means a run."""
    found = [each for each in sweeps(root) if text.startswith(PREFIX) and each.id.startswith(text)]
    return found[0] if len(found) == 1 else None
