"""What the board shows of each run: its view, and the curve of its loss.

Schedulers are asked, so that the board and `launcher.runs` say the same, in the same words. A file that cannot be read
becomes a problem that the board shows; it never hides the other runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import folder
from launcher.reconcile import decide
from launcher.reconcile.decide import State
from launcher.reconcile.hours import gpu_hours
from launcher.reconcile.view import RunView, read_many
from selfguide.spec.records import EvaluationRecord
from selfguide.spec.run import RunFolder


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
    state: State
    # images of snapshots that wait for a score; with evaluation=none there are none
    unscored: tuple[int, ...]
    # of all its jobs so far, about; ranks count where it has no GPUs
    gpu_hours: float | None = None

    @property
    def failure(self) -> str:
        """Why it failed, "" where it did not."""
        return self.state.reason if self.state.word == "failed" else ""

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.root)

    @property
    def label_free(self) -> bool:
        """Nothing this run came from saw a human label."""
        recorded = [r.label_free for r in self.records if r.done]
        if recorded:
            return all(recorded)
        scratch = self.identity.get("init", {}).get("source", "scratch") == "scratch"
        guidance = self.identity.get("guidance", {})
        return scratch and guidance.get("source") != "labels" and not guidance.get("saw_labels")


def read_runs(root: Path) -> tuple[tuple[Run, ...], tuple[str, ...]]:
    """Every run below `root`, and one sentence for each file that could not be read."""
    views, problems = read_many(folder.runs(root), configs=True)
    runs = []
    for view in views:
        problems += view.problems
        try:
            runs.append(_run(view, problems))
        except (ValueError, KeyError, TypeError) as error:
            problems.append(_problem(view.folder.run_json, error))
    return tuple(runs), tuple(problems)


def _problem(path: Path, error: Exception) -> str:
    why = f"no {error}" if isinstance(error, KeyError) else str(error)
    return f"{path} was left out: {why}"


def _run(view: RunView, problems: list[str]) -> Run:
    report = view.newest.progress if view.newest else {}
    return Run(
        id=view.id,
        experiment=view.experiment,
        seed=int(view.identity["seed"]),
        images=view.images,
        created=view.created,
        identity=_current(view),
        root=view.folder.root,
        records=view.records,
        published=view.published,
        losses=_losses(view.folder, problems),
        attempts=view.tries,
        seen=decide.progress(view).images,
        heard=max([view.created, float(report.get("time", 0.0)), *(r.time for r in view.records)]),
        state=decide.state(view),
        gpu_hours=gpu_hours(view),
        unscored=decide.unscored(view),
    )


def _current(view: RunView) -> Mapping[str, Any]:
    """The identity with the images that the run was extended to: it is what a run as long from the start is."""
    train = view.identity.get("train", {})
    if train.get("images") in (None, view.images):
        return view.identity
    return {**view.identity, "train": {**train, "images": view.images}}


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
    lines = [json.loads(line) for line in whole.splitlines() if line]
    points = [
        (int(line["images"]), float(line["loss"])) for line in lines if line.get("loss") is not None
    ]
    return [p for p in points if math.isfinite(p[1])]
