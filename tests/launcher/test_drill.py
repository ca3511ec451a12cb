"""Drills without a cluster: what a seed draws, what an event log means, and what is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.drill import __main__ as command
from launcher.drill import storm
from launcher.drill.cells import CELLS
from launcher.drill.storm import Event
from launcher.reconcile.attempts import Cause
from launcher.reconcile.forecast import Costs, given
from shards.errors import UserError


def test_draw_of_a_seed_is_the_same_each_time_and_within_its_bounds() -> None:
    cells = [*CELLS]
    plan = storm.draw(7, 500, 20.0, 2, cells)
    assert plan == storm.draw(7, 500, 20.0, 2, cells) != storm.draw(8, 500, 20.0, 2, cells)
    assert {fault.cell for fault in plan} == set(cells) and {f.rank for f in plan} == {0, 1}
    assert all(6.0 <= fault.after_s <= 60.0 for fault in plan)
    nodes = sum(fault.cell == "B1" for fault in plan)
    assert nodes < 500 / len(cells)


@pytest.mark.parametrize("step_s", [0.05, 0.2, 1.5])
def test_a_run_of_a_storm_is_long_enough_for_its_faults_and_not_twice_as_long(
    step_s: float,
) -> None:
    plan = storm.draw(7, 100, 4.0, 2, ["A1", "C1"])
    taken = max(step_s, storm.SLOWED_S)
    seconds = sum(fault.after_s for fault in plan)
    assert seconds <= storm.steps_of(plan, step_s) * taken
    assert storm.steps_of(plan, step_s) * taken <= 1.5 * seconds


def test_a_step_counts_with_the_mean_and_a_save_with_what_it_adds_to_most() -> None:
    times = [0.0, 0.1, 0.2, 0.5, 0.6, 0.9, 1.0]
    lines = [{"images": 128 * number, "time": time} for number, time in enumerate(times, 1)]
    # one step took 0.3 s for the machine, the one behind 640 images for a save
    step_s, save_s = storm._costs([lines], 5 * 128)
    assert step_s == pytest.approx((0.1 + 0.1 + 0.3 + 0.1 + 0.1) / 5)
    assert save_s == pytest.approx(0.3 - 0.1)
    assert storm._costs([lines])[0] == pytest.approx(1.0 / 6)


def test_faults_that_why_names_otherwise_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        1: Cause(kind="killed", rank="1"),
        2: Cause(kind="killed", rank="0"),
        3: Cause(kind="node", rank="1"),
        4: Cause(kind="preempted", rank="0"),
    }
    monkeypatch.setattr(storm, "verdict", lambda view, attempt: said.get(attempt))
    cells = ("A1", "A1", "A1", "C1", "A1")
    met = [
        Event(time=0.0, kind="fault", attempt=number, images=0, cell=cell, rank=1)
        for number, cell in enumerate(cells, 1)
    ]
    view: Any = None
    assert [each.split(": ")[0][-1] for each in storm.misnamed(view, met)] == ["2", "3", "5"]


@pytest.mark.parametrize(("recovery_s", "expected"), [(3.0, 0.884), (10.0, 0.801)])
def test_bound_of_a_fault_a_minute_is_that_of_young_and_daly(
    recovery_s: float, expected: float
) -> None:
    """To first order 1 - sqrt(2 C / M) - R / M: 0.868 and 0.752 with saves of 0.2 s."""
    assert storm.bound(6000.0, 0.2, 100, 100 * recovery_s) == pytest.approx(expected, abs=1e-3)
    assert storm.bound(6000.0, 0.2, 0, 0.0) == 1.0


def test_by_hand_every_fault_waits_for_the_next_look_and_starts_again() -> None:
    # dead from 65 s to 600 s, from the checkpoint at 60 s; then warned at 100 s of work, up to the look at 1200 s
    met = [(65.0, True), (100.0, False)]
    assert storm.by_hand(160.0, met, 20.0, 5.0) == pytest.approx(160.0 / (1205.0 + 60.0))
    assert storm.by_hand(160.0, [], 20.0, 5.0) == 1.0


def test_recoveries_last_from_each_fault_to_the_next_first_step() -> None:
    log = [
        Event(time=10.0, kind="trains", attempt=1, images=128),
        Event(time=20.0, kind="fault", attempt=1, images=1280, cell="A1", rank=1),
        Event(time=26.0, kind="trains", attempt=2, images=1152),
        Event(time=50.0, kind="fault", attempt=2, images=2560, cell="C1", rank=0),
        Event(time=53.5, kind="trains", attempt=3, images=2688),
        Event(time=60.0, kind="finished", attempt=3, images=3200),
    ]
    assert storm.recoveries(log) == [6.0, 3.5]


def test_an_event_log_reads_back_as_json_lines(tmp_path: Path) -> None:
    plan = storm.draw(1, 3, 10.0, 2, ["A1", "C1"])
    log = [Event(time=1.0, kind="fault", attempt=1, images=128, cell="A1", rank=1)]
    storm.write_log(tmp_path / "events.jsonl", plan, log)
    rows = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["planned"] * 3 + ["fault"]
    assert Event(**rows[3]) == log[0]


def test_cells_of_unknown_names_are_refused_and_those_that_need_root_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="A11"):
        command.main(["--cells", "A11", "cluster=slurm"])
    with pytest.raises(UserError, match="cluster=local"):
        command.main(["--cells", "A1", "cluster=local"])
    words = ["--cells", "B1,C3", "--runs", str(tmp_path), "--json", "cluster=slurm"]
    assert command.main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(each["cell"], each["outcome"]) for each in told["cells"]] == [
        ("B1", "refused"),
        ("C3", "refused"),
    ]
    assert "root" in told["cells"][0]["reasons"][0]
    assert "--urgent" in told["cells"][1]["reasons"][0]


def test_a_plan_given_faults_between_which_nothing_lies_ends() -> None:
    """The next job begins in the moment in which the one before ended, so that one end could count for ever."""
    costs = Costs(
        work_s=60.0, interval_s=10.0, save_s=0.5, start_s=5.0, gap_s=0.0, used_s=0.0, limit_s=None
    )
    # saved at 10.5 s, dead at 18 s, from 23 s on 50 s of work and 5 saves
    assert given(costs, [(18.0, "failure")]) == pytest.approx(75.5)
