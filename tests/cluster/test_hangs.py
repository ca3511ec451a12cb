"""Ranks that stop moving on a real Slurm: the right one is named, stacks are kept, and the run goes on by itself."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.attempt.entry import END_S
from launcher.reconcile import decide
from launcher.reconcile.view import EvaluationView
from selfguide.spec.run import RunFolder, read_record
from tests.cluster.bed import BATCH, Bed, attempts, gone, lost, same_end, trains, until
from tests.cluster.test_faults import all_saved, exits

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

# as the default is a minute
LIMIT_S = 10.0
LIMITS = [f"cluster.hang_step_s={LIMIT_S}", f"cluster.hang_save_s={LIMIT_S}"]
# from the hang to the end of the attempt, where that is two minutes by default
ENDED_S = 2 * LIMIT_S + 60
# in which a signal is heard, and a tiny run saved; 2 s on idle cores
HEARD_S = 6.0


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
    # a signal may come at any moment, also within a save; the other rank then waits wherever both must meet
    assert record["section"] in ("train", "checkpoint") and record["images"] >= 24 * BATCH
    assert "state T" in stack(run, 1) and "training/loop.py" in stack(run, 0)


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


def test_a7_a_deadlock_on_the_way_out_is_bounded(bed: Bed, unharmed: dict[str, str]) -> None:
    code = (
        "import time; from selfguide.training import loop; from shards.read.stream import Stream\n"
        "def advance(job): raise MemoryError('no memory left')\n"
        "Stream.close = lambda self: time.sleep(3600)\n"
        "loop.advance = advance"
    )
    run = bed.submit("a7")
    trains(bed, run)
    ranks = bed.ranks(run)
    bed.inside(1, code)
    record = run.attempt(1) / "exit-1.json"
    until(record.exists, "the rank says why it ends")
    began = time.monotonic()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks.values()), "all ends", 60)
    assert time.monotonic() - began < END_S + 10
    view = same_end(bed, run, unharmed)
    cause = decide.cause(view.attempts[0])
    assert (cause.kind, cause.rank, cause.type) == ("memory", "1", "MemoryError")


def beats(run: RunFolder) -> list[dict[str, Any]]:
    return [read_record(run.attempt(1) / f"heartbeat-{rank}.json") or {} for rank in range(2)]


def stopped_in(run: RunFolder, began: float) -> float:
    """Seconds until each rank of the first attempt has said that it ends."""
    paths = [run.attempt(1) / f"exit-{rank}.json" for rank in range(2)]
    until(lambda: all(path.exists() for path in paths), "all ranks end", 30)
    return max(float(json.loads(path.read_text())["time"]) for path in paths) - began


def test_c7_a_signal_while_a_rank_compiles_ends_it_at_once(
    bed: Bed, unharmed: dict[str, str]
) -> None:
    code = (
        "import sys, time\n"
        "while not hasattr(sys.modules.get('selfguide.training.loop'), 'stop_here'): time.sleep(0.01)\n"
        "sys.modules['selfguide.training.loop'].prepare_batch = lambda *_: time.sleep(3600)"
    )
    for rank in range(2):
        bed.inside(rank, code)
    run = bed.submit("c7-compile")
    until(lambda: {each.get("section") for each in beats(run)} == {"train"}, "the first step")
    began = time.time()
    bed.ask("scancel", "--signal=USR2", bed.job(run))
    assert stopped_in(run, began) < HEARD_S
    same_end(bed, run, unharmed)
    assert {(each["class"], each["code"]) for each in exits(run, 1).values()} == {("preempted", 76)}


def test_c7_a_signal_while_ranks_wait_for_data_is_saved_at_once(
    bed: Bed, unharmed: dict[str, str]
) -> None:
    """A store that gives nothing any more is no hang within its limit, either."""
    code = (
        "import time; from shards.read.stream import Stream\n"
        "Stream.ready = lambda self, batches, timeout_s=0.0: (time.sleep(timeout_s), False)[1]"
    )
    run = bed.submit("c7-data", "cluster.hang_step_s=5")
    trains(bed, run)
    bed.inside(1, code)

    def waits() -> bool:
        return all(
            each["section"] == "data" and each["time"] - each["progressed"] > 12
            for each in beats(run)
        )

    until(waits, "the ranks have waited for longer than a step may take")
    began = time.time()
    bed.ask("scancel", "--signal=TERM", bed.job(run))
    assert stopped_in(run, began) < HEARD_S
    same_end(bed, run, unharmed)
    all_saved(run)


def test_c7_a_signal_to_an_evaluation_ends_it_at_once_and_it_is_made_again(bed: Bed) -> None:
    run = bed.submit("c7-evaluation", "evaluation=fd_digits", "evaluation.samples=4000")

    def first() -> EvaluationView | None:
        return next((each for each in bed.view(run).evaluations if each.attempt == 1), None)

    until(lambda: (at := first()) and (at.folder / "heartbeat-0.json").exists(), "it samples", 120)
    at = first()
    assert at is not None and at.job is not None
    began = time.time()
    bed.ask("scancel", "--signal=TERM", at.job.record["id"])
    record = at.folder / "exit-0.json"
    until(record.exists, "the evaluation ends", 30)
    ended = json.loads(record.read_text())
    assert (ended["class"], ended["code"]) == ("preempted", 76)
    assert float(ended["time"]) - began < HEARD_S
    view = bed.finishes(run)
    assert [(each.attempt, each.status) for each in view.records] == [(2, "done")]
    gone(bed, run)


def test_c9_a_second_signal_in_a_save_changes_nothing(bed: Bed, unharmed: dict[str, str]) -> None:
    code = (
        "import time; from selfguide.training import checkpoint; save = checkpoint.save\n"
        "def slow(*a): time.sleep(4); save(*a); print('saved once', flush=True)\n"
        "checkpoint.save = slow"
    )
    run = bed.submit("c9")
    trains(bed, run)
    for rank in range(2):
        bed.inside(rank, code)
    bed.ask("scancel", "--signal=USR2", bed.job(run))
    at = bed.view(run).attempts[0]
    until(lambda: bed.view(run).attempts[0].progress.get("section") == "checkpoint", "it saves")
    bed.ask("scancel", "--signal=TERM", bed.job(run))
    bed.ask("scancel", "--signal=USR2", bed.job(run))
    same_end(bed, run, unharmed)
    all_saved(run)
    logs = list(at.files.logs.glob("*_1_log.out"))
    assert sum(path.read_text().count("saved once") for path in logs) == 1
