"""Run folders as facts: what is on disk, read once and judged by nobody.

The board is built from files alone, so it can be made on any machine that sees the folder, while
training goes on, and after the cluster is gone. A file that cannot be read becomes a problem that
the board shows; it never hides the other runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfguide.spec.records import EvaluationRecord, read_record_file, record_files
from selfguide.spec.run import RunFolder, read_record


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run folder says."""

    id: str
    experiment: str
    seed: int
    images: int  # to train on; the final snapshot carries this count
    created: float
    identity: Mapping[str, Any]
    root: Path
    records: tuple[EvaluationRecord, ...]  # by images, key and attempt
    published: tuple[int, ...]  # images of every complete snapshot
    losses: tuple[tuple[int, float], ...]  # (images, loss), as the newest attempt tells it
    attempts: int
    seen: int  # images trained on so far
    heard: float  # seconds since 1970 of the newest sign of life
    failure: str  # why the newest attempt ended badly, or empty

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.root)

    @property
    def label_free(self) -> bool:
        """Nothing this run came from saw a human label."""
        told = [r.label_free for r in self.records if r.done]
        if told:
            return all(told)
        scratch = self.identity.get("init", {}).get("source", "scratch") == "scratch"
        guidance = self.identity.get("guidance", {})
        return scratch and guidance.get("source") != "labels" and not guidance.get("saw_labels")


def read_runs(root: Path) -> tuple[tuple[Run, ...], tuple[str, ...]]:
    """Every run below `root`, and one sentence for each file that could not be read."""
    problems: list[str] = []
    runs = []
    for path in sorted(root.glob("*/*/run.json")):
        try:
            runs.append(_run(RunFolder(path.parent), problems))
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(_problem(path, error))
    return tuple(runs), tuple(problems)


def _problem(path: Path, error: Exception) -> str:
    why = f"no {error}" if isinstance(error, KeyError) else str(error)
    return f"{path} was left out: {why}"


def _run(folder: RunFolder, problems: list[str]) -> Run:
    said = folder.describe()
    identity = said["identity"]
    records = _records(folder, problems)
    progress = _progress(folder, problems)
    heard = [float(said["created"]), *(r.time for r in records)]
    if progress:
        heard.append(float(progress["time"]))
    published = tuple(folder.published())
    return Run(
        id=str(said["id"]),
        experiment=str(said["experiment"]),
        seed=int(identity["seed"]),
        images=int(said["images"]),
        created=float(said["created"]),
        identity=identity,
        root=folder.root,
        records=records,
        published=published,
        losses=_losses(folder, problems),
        attempts=len(folder.attempt_numbers()),
        seen=max([int(progress.get("images", 0)), *published]),
        heard=max(heard),
        failure=_failure(folder, problems),
    )


def _records(folder: RunFolder, problems: list[str]) -> tuple[EvaluationRecord, ...]:
    found = []
    for path in record_files(folder):
        try:
            found.append(read_record_file(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(_problem(path, error))
    return tuple(sorted(found, key=lambda r: (r.images, r.key, r.attempt)))


def _newest_attempt(folder: RunFolder) -> Path | None:
    numbers = folder.attempt_numbers()
    return folder.attempt(numbers[-1]) if numbers else None


def _progress(folder: RunFolder, problems: list[str]) -> Mapping[str, Any]:
    """The newest attempt's progress.json; empty before its first line."""
    attempt = _newest_attempt(folder)
    if attempt is None:
        return {}
    try:
        return read_record(attempt / "progress.json") or {}
    except (OSError, ValueError) as error:
        problems.append(_problem(attempt / "progress.json", error))
        return {}


def _failure(folder: RunFolder, problems: list[str]) -> str:
    """What the newest attempt's ranks say about a bad end; the first one to fail speaks."""
    attempt = _newest_attempt(folder)
    told = []
    for path in sorted(attempt.glob("exit-*.json")) if attempt else []:
        try:
            said = read_record(path) or {}
            if said.get("class", "ok") != "ok":
                told.append(
                    (float(said.get("time", 0.0)), f"{said['class']}: {said.get('message')}")
                )
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(_problem(path, error))
    return min(told)[1] if told else ""


def _losses(folder: RunFolder, problems: list[str]) -> tuple[tuple[int, float], ...]:
    """The loss over images; what a resumed attempt trained again replaces what was lost."""
    kept: list[tuple[int, float]] = []
    for path in sorted(folder.metrics.glob("train-*.jsonl"), key=lambda p: (len(p.name), p.name)):
        try:
            points = _points(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.append(_problem(path, error))
            continue
        if points:
            kept = [p for p in kept if p[0] < points[0][0]] + points
    return tuple(kept)


def _points(path: Path) -> list[tuple[int, float]]:
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]  # its writer may be in the middle of the last line
    said = [json.loads(line) for line in whole.splitlines() if line]
    points = [(int(line["images"]), float(line["loss"])) for line in said if "loss" in line]
    return [p for p in points if math.isfinite(p[1])]
