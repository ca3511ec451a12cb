"""A study's runs as one sweep: followed to their end, and found again."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest

from launcher import sweep_folder
from shards import storage
from shards.errors import UserError
from tools.study.arms import KMEANS, UNCONDITIONAL
from tools.study.training import named, train
from tools.study.work import Study

# one run of each of two kinds, which no product of lists makes
LISTED = [("guidance=none", "seed=0"), ("guidance=labels", "seed=1")]


def own_of(settings: list[str]) -> tuple[str, ...]:
    """What a user adds to a study's settings, without those that the study gives itself."""
    ours = ("runs=", "experiment=", "train.snapshot_every=")
    return tuple(word for word in settings if not word.startswith(ours))


def test_runs_that_no_product_makes_are_one_sweep_and_are_not_trained_again(
    settings: list[str], runs: Path
) -> None:
    said = io.StringIO()
    found = train(LISTED, settings, said)
    assert [(each.config.guidance.source, each.config.seed) for each in found] == [
        ("none", 0),
        ("labels", 1),
    ]
    assert all(each.final.is_dir() for each in found)
    assert [len(each.run.attempt_numbers()) for each in found] == [1, 1]
    (sweep,) = sweep_folder.sweeps(runs)
    assert sorted(run.root for run in sweep.runs()) == sorted(each.run.root for each in found)
    again = train(LISTED, settings, said)
    assert [each.run for each in again] == [each.run for each in found]
    assert [len(each.run.attempt_numbers()) for each in again] == [1, 1]
    assert [each.run for each in named(LISTED, settings)] == [each.run for each in found]


def test_a_finished_run_with_other_snapshots_is_refused_before_anything_is_trained(
    settings: list[str], runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such a run would be guided by fewer weak models than the others, and searched over other candidates."""
    own = own_of(settings)
    coarse = Study(runs, tmp_path / "out", own, snapshots=1)
    fine = Study(runs, tmp_path / "out", own, snapshots=2)
    assert set(coarse.train({UNCONDITIONAL: [0]})) == {UNCONDITIONAL}
    before = [each.root for each in sweep_folder.sweeps(runs)]
    with pytest.raises(UserError, match=r"lacks those after .* give --runs DIR"):
        fine.train({UNCONDITIONAL: [0, 1]})
    assert [each.root for each in sweep_folder.sweeps(runs)] == before
    # a report is of those that have them
    assert fine.known({UNCONDITIONAL: [0]}) == {}
    assert "unconditional, seed 0, is left out: " in capsys.readouterr().err
    assert set(coarse.known({UNCONDITIONAL: [0]})) == {UNCONDITIONAL}


@pytest.mark.slow
def test_a_run_that_went_past_a_snapshot_of_the_study_is_refused_before_anything_is_trained(
    settings: list[str], runs: Path, tmp_path: Path
) -> None:
    """It goes on from its newest checkpoint, and so never publishes that snapshot; what is due there it does."""
    own = own_of(settings)
    coarse = Study(runs, tmp_path / "out", own, snapshots=1)
    fine = Study(runs, tmp_path / "out", own, snapshots=2)
    (trained,) = coarse.train({UNCONDITIONAL: [0]})[UNCONDITIONAL]
    (trained.final / storage.MANIFEST).unlink()
    shutil.rmtree(trained.run.checkpoints)

    def save(images: int) -> None:
        saved = trained.run.checkpoint(images)
        saved.mkdir(parents=True)
        (saved / "part").write_bytes(b"x")
        storage.publish_folder(saved, extra={"images": images})

    save(640)
    fine._check_snapshots(fine._named([(UNCONDITIONAL, 0)]))
    save(768)
    before = [each.root for each in sweep_folder.sweeps(runs)]
    with pytest.raises(UserError, match=r"lacks those after 640 images: give --runs DIR"):
        fine.train({UNCONDITIONAL: [0, 1]})
    assert [each.root for each in sweep_folder.sweeps(runs)] == before


@pytest.mark.slow
def test_groups_that_were_not_made_to_their_end_leave_their_arm_out(
    settings: list[str], runs: Path, tmp_path: Path
) -> None:
    own = own_of(settings)
    study = Study(runs, tmp_path / "out", own, snapshots=1)
    study.train({UNCONDITIONAL: [0]})
    (study.notes / KMEANS.name).mkdir(parents=True)
    assert set(study.known({UNCONDITIONAL: [0], KMEANS: [0]})) == {UNCONDITIONAL}


def test_snapshots_that_would_not_be_kept_are_refused_before_anything_is_trained(
    settings: list[str], runs: Path, tmp_path: Path
) -> None:
    own = own_of(settings)
    study = Study(runs, tmp_path / "out", (*own, "train.keep_snapshots=1"), snapshots=2)
    with pytest.raises(UserError, match=r"take train\.keep_snapshots=2 or more"):
        study.train({UNCONDITIONAL: [0]})
    assert not sweep_folder.sweeps(runs)
