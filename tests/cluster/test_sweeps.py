"""A sweep on a real Slurm: every run has a successor of its own, and the same command starts only what is missing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from selfguide.spec.run import RunFolder
from tests.cluster.bed import Bed, trains, until

pytestmark = [pytest.mark.cluster, pytest.mark.faults]


def send(bed: Bed) -> dict[str, Any]:
    words = [*bed.settings, f"runs={bed.runs}", "seed=0,1", "--json"]
    done = bed.command("launcher.submit", "-m", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_sweep_has_two_jobs_a_run_and_starts_again_only_what_was_ended(bed: Bed) -> None:
    done = send(bed)
    first, second = (RunFolder(bed.runs / "digits_dit" / row["run"]) for row in done["runs"])
    # training and its successor
    assert len(bed.jobs(first)) == len(bed.jobs(second)) == 2
    # what ends one leaves the other alone: its own successor takes over
    trains(bed, first)
    bed.ask("scancel", bed.job(first))
    until(lambda: len(first.attempt_numbers()) == 2, "the successor of the first run takes over")
    assert len(second.attempt_numbers()) == 1
    assert bed.command("launcher.cancel", str(first.root)).returncode == 0
    states = [row["state"] for row in send(bed)["runs"]]
    assert states[0] == "submitted" and states[1] in ("queued", "running", "finished")
    ended = bed.command("launcher.cancel", done["sweep"], "--runs", str(bed.runs))
    assert ended.returncode == 0, ended.stderr
    until(lambda: not bed.jobs(first) and not bed.jobs(second), "no job is left")
