"""Training on a real Slurm that is asked to stop: by one rank's signal, by the scheduler's, by a cancel."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import cancel, submit
from launcher.folder import Attempt
from launcher.reconcile import decide
from launcher.reconcile.view import read
from selfguide.spec.run import RunFolder, read_record
from shards.wait import wait_until
from slurm.devcluster import Cluster

pytestmark = pytest.mark.cluster

RANKS = range(4)


@pytest.fixture
def settings(
    devcluster: Cluster, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """A run of two nodes with two ranks each that would take an hour, and goes on by hand only."""
    for name, value in devcluster.environment().items():
        monkeypatch.setenv(name, value)
    yield [
        "experiment=digits_dit", "cluster=devcluster", "nodes=2", f"data.root={digits}", f"runs={tmp_path}",
        "evaluation=none", "cluster.restart=none", "train.images=12_800_000", "train.batch=128", "train.log_every=128",
        "train.snapshot_every=12_800_000", "train.checkpoint_every=12_800_000",
    ]  # fmt: skip
    subprocess.run(["scancel", "--me"], check=True)


def training(settings: list[str], images: int) -> Attempt:
    """Submits the run, and gives its attempt once it came past so many images."""
    folder = submit.submit(submit.resolve(settings))["folder"]
    at = Attempt.newest(RunFolder(Path(folder)))
    assert at is not None
    assert wait_until(lambda: progress(at).get("images", 0) > images, timeout_s=300)
    return at


def progress(at: Attempt) -> dict[str, Any]:
    return read_record(at.root / "progress.json") or {}


def ends(at: Attempt) -> list[tuple[str, int, int, int]]:
    """Class, code, images and saved images of each rank, once the job is gone."""
    assert wait_until(lambda: decide.training_state(read(at.run)) == "gone", timeout_s=300)
    records = [read_record(at.root / f"exit-{rank}.json") for rank in RANKS]
    return [(r["class"], r["code"], r["images"], r["saved"]) for r in records if r]


def test_whoever_is_asked_to_stop_all_ranks_save_one_step_and_the_next_attempt_goes_on_from_it(
    settings: list[str],
) -> None:
    at, saved = training(settings, 128), 0
    for ask in (of_rank_2, of_the_job, cancel_run):
        assert (progress(at)["resumed_from"] or 0) == saved
        ask(at)
        found = ends(at)
        assert len(found) == len(RANKS) and len({*found}) == 1, "all ranks at one step"
        kind, code, images, kept = found[0]
        assert (kind, code) == ("preempted", 75) and images == kept > saved, "no step is lost"
        assert at.run.saved()[-1] == kept
        saved = kept
        if ask is not cancel_run:
            at = training(settings, saved)


def of_rank_2(at: Attempt) -> None:
    os.kill((read_record(at.root / "start-2.json") or {})["pid"], signal.SIGTERM)


def of_the_job(at: Attempt) -> None:
    job = read_record(at.job)
    assert job is not None
    subprocess.run(["scancel", "--signal=USR2", job["id"]], check=True)


def cancel_run(at: Attempt) -> None:
    assert [each["what"] for each in cancel.cancel(at.run)] == ["training"]
