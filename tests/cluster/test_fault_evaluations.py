"""Evaluations on a real Slurm whose jobs and watcher are killed: in the end every key has exactly one record.

With the cells E3 and E6 of the fault matrix.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.drill import faults
from launcher.reconcile import decide
from launcher.reconcile.view import EvaluationView
from selfguide.spec import recipe
from selfguide.spec.records import records
from selfguide.spec.run import RunFolder
from tests.cluster.bed import BATCH, STEPS, Bed, gone, same_end, until
from tests.cluster.corpus import explained

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

ROOT = Path(__file__).parents[2]


def test_watcher_and_evaluations_killed_in_between_leave_one_record_for_every_key(bed: Bed) -> None:
    """Two crontabs look at the run at once while no watcher is there; then a sweep, as an array, loses a point."""
    run = bed.submit(
        "killed",
        "evaluation=fd_digits",
        "evaluation.samples=1500",
        "evaluation.in_flight=2",
        f"train.snapshot_every={STEPS * BATCH // 2}",
    )
    _kill(bed, sampling(bed, run, lambda each: True))
    view = bed.view(run)
    assert view.watcher is not None
    bed.ask("scancel", "--signal=KILL", "--full", view.watcher.record["id"])

    def scored() -> bool:
        looks = [_look(bed, run) for _ in range(2)]
        assert [look.wait(60) for look in looks] == [0, 0]
        return bed.view(run).finished and not decide.unscored(bed.view(run))

    until(scored, "every snapshot is scored", 240)
    assert one_each(run) == 2

    words = ("sampler.g=1,1.5", "sampler.steps=10,20", "evaluation.samples=1500")
    done = bed.command("launcher.evaluate", str(run.root), *words)
    assert done.returncode == 0, done.stderr
    ids = [each.job.record["id"].partition("_")[0] for each in points(bed, run) if each.job]
    assert len(ids) == 4 and len(set(ids)) == 1
    _kill(bed, sampling(bed, run, lambda each: each.key in {p.key for p in points(bed, run)}))
    until(lambda: not decide.unscored_points(bed.view(run)), "the sweep is complete", 240)
    assert one_each(run) == 6
    (front,) = recipe.fronts(records(run))
    # the four of the sweep, and the evaluation of the same snapshot before it, which took as many samples
    until(lambda: recipe.read(run) and len(recipe.read(run)[0].points) == 5, "its recipe is kept")
    assert recipe.read(run)[0].chosen == front.chosen
    until(lambda: not bed.jobs(run), "its watcher has nothing left to do", 60)
    gone(bed, run)


def test_e3_a_snapshot_that_is_published_again_after_a_resume_is_scored_once(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    every = 30 * BATCH
    run = bed.submit(
        "e3", "evaluation=fd_digits", "evaluation.samples=64", f"train.snapshot_every={every}"
    )
    # the checkpoint before is of step 20
    until(lambda: every in bed.view(run).published, "a snapshot is published")
    faults.kill_rank(bed, 1)
    same_end(bed, run, unharmed, seconds=300)
    until(lambda: not decide.unscored(bed.view(run)), "every snapshot is scored", 240)
    assert one_each(run) == STEPS * BATCH // every
    # as many jobs as keys: none was sampled twice
    assert len(bed.view(run).evaluations) == one_each(run)
    until(lambda: not bed.jobs(run), "its watcher has nothing left to do", 60)


def test_e6_a_backlog_keeps_the_newest_and_milestones_and_records_what_is_skipped(bed: Bed) -> None:
    every, milestone = 10 * BATCH, 60 * BATCH
    run = bed.submit(
        "e6",
        "evaluation=fd_digits",
        "evaluation.samples=1500",
        "evaluation.in_flight=1",
        "evaluation.snapshots=newest",
        f"evaluation.milestone_images={milestone}",
        f"train.snapshot_every={every}",
    )
    most = 0

    def scored() -> bool:
        nonlocal most
        view = bed.view(run)
        # a job that has written its record takes a moment to go
        open_ = set(decide.unscored(view))
        working = [
            e for e in view.evaluations if e.job and e.job.state != "gone" and e.images in open_
        ]
        most = max(most, len(working))
        return view.finished and not open_

    until(scored, "every snapshot has an outcome", 300)
    found = {record.images: record for record in records(run)}
    assert set(found) == {every * n for n in range(1, STEPS * BATCH // every + 1)}
    skipped = {images for images, record in found.items() if record.status == "skipped"}
    assert skipped and not skipped & {milestone, STEPS * BATCH}
    assert all(found[images].message for images in skipped)
    assert all(record.done for images, record in found.items() if images not in skipped)
    assert most == 1
    until(lambda: not bed.jobs(run), "its watcher has nothing left to do", 60)
    gone(bed, run)
    explained(run)


def points(bed: Bed, run: RunFolder) -> list[EvaluationView]:
    """The jobs of the sweep's points."""
    view = bed.view(run)
    assert view.config is not None
    keys = {point.key for point in decide.points(view, view.config)}
    return [each for each in view.evaluations if each.key in keys and each.job is not None]


def sampling(bed: Bed, run: RunFolder, which: Callable[[EvaluationView], bool]) -> EvaluationView:
    """The first of these evaluations that samples."""
    found: list[EvaluationView] = []

    def begins() -> bool:
        for each in bed.view(run).evaluations:
            if (
                which(each)
                and each.job
                and each.job.state == "running"
                and (each.folder / "heartbeat-0.json").exists()
            ):
                found.append(each)
        return bool(found)

    until(begins, "an evaluation samples", 120)
    return found[0]


def _kill(bed: Bed, each: EvaluationView) -> None:
    assert each.job is not None
    bed.ask("scancel", "--signal=KILL", "--full", each.job.record["id"])


def _look(bed: Bed, run: RunFolder) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "launcher.evaluate", "--once", str(run.root)]
    return subprocess.Popen(command, cwd=ROOT, env=bed.environment)


def one_each(run: RunFolder) -> int:
    """How many keys have a record, each of which has exactly one, with a score."""
    found = list(records(run))
    assert set(Counter(record.key for record in found).values()) == {1}
    assert all(record.done for record in found)
    return len(found)
