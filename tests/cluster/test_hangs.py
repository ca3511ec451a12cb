"""Ranks that stop moving on a real Slurm: the right one is named, stacks are kept, and the run goes on by itself."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from launcher.reconcile import decide
from selfguide.spec.run import RunFolder, read_record
from tests.cluster.bed import BATCH, Bed, trains, until
from tests.cluster.test_faults import attempts, exits, lost, same_end

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

# as the default is a minute
LIMIT_S = 10.0
LIMITS = [f"cluster.hang_step_s={LIMIT_S}"]
# from the hang to the end of the attempt, where that is two minutes by default
ENDED_S = 2 * LIMIT_S + 15


def hangs(
    bed: Bed, run: RunFolder, unharmed: dict[str, str], rank: int, began: float
) -> dict[str, Any]:
    """The rank is blamed and the attempt ended in time, and the run finishes; returns the record of the rank."""
    until(lambda: (run.attempt(1) / f"exit-{rank}.json").exists(), "somebody is blamed")
    until(lambda: decide.attempt_state(bed.view(run).attempts[0], 0) == "gone", "the attempt ends")
    assert time.monotonic() - began < ENDED_S
    view = same_end(bed, run, unharmed)
    assert attempts(view) == ["hang", "ok"] and decide.cause(view.attempts[0]).rank == str(rank)
    assert all(each <= 20 * BATCH for each in lost(run))
    found = exits(run, 1)
    assert (found[rank]["class"], found[rank]["code"]) == ("hang", 85)
    assert {each["class"] for each in found.values()} == {"hang", "signal"}, "the others waited"
    assert read_record(run.attempt(1) / "hang.json")["rank"] == rank  # type: ignore[index]
    return found[rank]


def stack(run: RunFolder, rank: int) -> str:
    return (run.attempt(1) / "stacks" / f"rank-{rank}.txt").read_text()


@pytest.mark.quick
def test_a5_a_stopped_rank_is_named_and_the_run_goes_on(bed: Bed, unharmed: dict[str, str]) -> None:
    run = bed.submit("a5", *LIMITS)
    trains(bed, run)
    os.kill(bed.ranks(run)[1], signal.SIGSTOP)
    record = hangs(bed, run, unharmed, 1, time.monotonic())
    assert record["section"] == "train" and record["images"] >= 24 * BATCH
    assert "state T" in stack(run, 1) and "engine" in stack(run, 0)


def test_a6_a_rank_in_which_c_holds_the_lock_is_named_with_its_line(
    bed: Bed, unharmed: dict[str, str]
) -> None:
    run = bed.submit("a6", *LIMITS)
    trains(bed, run)
    bed.inside(0, "import ctypes; ctypes.PyDLL(None).sleep(3600)")
    record = hangs(bed, run, unharmed, 0, time.monotonic())
    assert record["section"] == "train"
    assert "in _listen" in stack(run, 0)


def test_a_rank_that_loops_before_a_collective_is_named_with_its_line(
    bed: Bed, unharmed: dict[str, str]
) -> None:
    code = (
        "from selfguide.training import loop; step = loop.step\n"
        "def endless(job):\n"
        "    while True: pass\n"
        "loop.step = endless"
    )
    run = bed.submit("loop", *LIMITS)
    trains(bed, run)
    bed.inside(1, code)
    record = hangs(bed, run, unharmed, 1, time.monotonic())
    assert "did not enter the collective" in record["message"] and "endless" in record["message"]
