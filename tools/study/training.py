"""Runs of a study: one sweep through the launcher, followed to its end.

A run that is finished is not trained again, one that was ended goes on where it was, and leaving (Ctrl-C) ends none.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from launcher import sweep
from launcher.reconcile import decide
from launcher.reconcile.view import RunView, read_many
from launcher.sweep_folder import SweepFolder
from selfguide.spec.config import Config
from selfguide.spec.run import RunFolder
from shards.errors import UserError

_LOOK_S, _SAY_S = 3.0, 30.0


@dataclass(frozen=True)
class Trained:
    """A run with what was asked for."""

    run: RunFolder
    config: Config

    @property
    def final(self) -> Path:
        """The folder of its last snapshot."""
        return self.run.snapshot(self.config.train.images)

    @property
    def finished(self) -> bool:
        """Whether that is there; a run that nobody has submitted yet has no folder."""
        return self.run.run_json.exists() and self.run.finished()


def named(listed: Sequence[tuple[str, ...]], common: Sequence[str]) -> list[Trained]:
    """The runs that are meant by settings, each with those that all have in common, trained or not.

    Raises:
        UserError: one of them cannot be trained.
    """
    return [_trained(point) for point in _plan(listed, common)]


def train(
    listed: Sequence[tuple[str, ...]], common: Sequence[str], out: TextIO = sys.stderr
) -> list[Trained]:
    """Submits the runs as one sweep and waits for all of them, and for their scores.

    Raises:
        UserError: one of them cannot be trained, or failed.
    """
    points = _plan(listed, common)
    done = sweep.submit(points, ["tools.study", *common])
    print(f"sweep {done['sweep']}: {len(points)} runs", file=out, flush=True)
    try:
        _follow(SweepFolder(Path(done["folder"])), [each.prepared.run for each in points], out)
    except KeyboardInterrupt:
        end = f"python -m launcher.cancel {done['sweep']}"
        print(f"\nthe sweep goes on; the same command follows it again, {end} ends it", file=out)
        raise
    return [_trained(point) for point in points]


def _plan(listed: Sequence[tuple[str, ...]], common: Sequence[str]) -> list[sweep.Point]:
    return sweep.planned([((*words, *common), words) for words in listed])


def _trained(point: sweep.Point) -> Trained:
    return Trained(point.prepared.run, point.prepared.config)


@dataclass(frozen=True)
class Look:
    """What is known of the runs of a sweep at one moment."""

    runs: int
    # of those that have begun
    views: tuple[RunView, ...]

    @staticmethod
    def at(runs: Sequence[RunFolder]) -> Look:
        views, _ = read_many([run for run in runs if run.run_json.exists()])
        return Look(len(runs), tuple(views))

    @property
    def over(self) -> list[RunView]:
        """Those that go no further by themselves, nor get a score."""
        return [
            view
            for view in self.views
            if decide.state(view).word in decide.ENDED
            and not decide.watched(view)
            and decide.training_state(view) not in ("queued", "running")
        ]

    @property
    def images(self) -> int:
        """Seen by all runs."""
        return sum(decide.progress(view).images for view in self.views)

    @property
    def of(self) -> int:
        """The images that all runs are to see, where those that have not begun are as long as the others."""
        targets = [decide.progress(view).of for view in self.views]
        return sum(targets) + max(targets, default=0) * (self.runs - len(targets))

    def sentence(self, first: Look, seconds: float) -> str:
        """How far the runs are, and how long training will take at the rate since `first`, so many seconds ago."""
        share = self.images / self.of if self.of else 0.0
        parts = [f"{len(self.over)} of {self.runs} runs", f"{share:.0%} of the images"]
        gained, missing = self.images - first.images, self.of - self.images
        if gained > 0 and missing > 0:
            parts.append(f"about {decide.minutes(seconds * missing / gained)} of training left")
        scoring = sum(decide.state(view).word == "evaluating" for view in self.views)
        return ", ".join([*parts, *([f"{scoring} waiting for scores"] if scoring else [])])


def _follow(folder: SweepFolder, runs: Sequence[RunFolder], out: TextIO) -> None:
    begun, said, first = time.monotonic(), 0.0, Look.at(runs)
    while True:
        # in this order: what a process that has ended by now has started is seen, and what failed before, and waits for
        # that process, has not ended
        starts = folder.runs_on()
        now, seconds = Look.at(runs), time.monotonic() - begun
        if not starts and len(now.over) == len(now.views):
            break
        if seconds - said >= _SAY_S:
            said = seconds
            print(now.sentence(first, seconds), file=out, flush=True)
        time.sleep(_LOOK_S)
    failed = [view for view in now.views if decide.state(view).word != "finished"]
    wrong = [f"{view.folder.root}: {decide.state(view)}" for view in failed]
    if len(now.views) < len(runs):
        wrong.append(f"{len(runs) - len(now.views)} runs were not started")
    if wrong:
        raise UserError(f"{'; '.join(wrong)}; the same command goes on from there")
