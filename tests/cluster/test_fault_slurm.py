"""Cells B and C of the fault matrix in which Slurm itself fails: its daemons, its accounting, its answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import array
from launcher.drill import faults
from launcher.reconcile import decide
from selfguide.spec.run import RunFolder
from shards.wait import wait_until
from tests.cluster.bed import BATCH, ROOT, Bed, attempts, gone, learned, same_end, trains, until

pytestmark = [pytest.mark.cluster, pytest.mark.faults]


@pytest.mark.parametrize("rank", [1, 0])
def test_b2_a_killed_slurmstepd_costs_one_interval_and_its_rank_publishes_nothing(
    rank: int, bed: Bed, unharmed: dict[str, Any]
) -> None:
    """On another node than srun's, and on srun's own, which waits for minutes for a rank that it does not hear of."""
    run = bed.submit("b2" if rank else "b2-first")
    trains(bed, run)
    # so that it does not finish before anybody notices
    faults.slow(bed, 1.0)
    faults.kill_step(bed, run, rank)
    began = time.monotonic()
    trains(bed, run, 2, BATCH)
    assert time.monotonic() - began < 90
    same_end(bed, run, unharmed)


def test_b3_a_controller_that_wakes_with_old_state_runs_nothing_twice(
    bed: Bed, unharmed: dict[str, Any], tmp_path: Path
) -> None:
    """It believes that the run still trains and that its successor waits; the run has finished meanwhile."""
    saved, state = tmp_path / "state", bed.cluster.state / "controller"
    run = bed.submit("b3")
    faults.slow(bed, 0.05)
    trains(bed, run, images=4 * BATCH)
    shutil.copytree(state, saved)
    nodes = bed.nodes(run)
    same_end(bed, run, unharmed, tries=1)
    try:
        faults.kill_daemon(bed.cluster, "slurmctld")
        shutil.rmtree(state)
        shutil.copytree(saved, state)
    finally:
        faults.restart_daemon(bed.cluster, "slurmctld")
    until(lambda: answers(bed), "it answers")
    assert bed.jobs(run), "its state is old"
    shown = bed.command("launcher.runs", str(run.root), "--json")
    assert shown.returncode == 0, shown.stderr
    again = bed.command("launcher.submit", *bed.words("b3"), "--json")
    assert json.loads(again.stdout)["state"] == "finished", again.stdout + again.stderr
    # it believes what it remembers until a node reports anew, which may take minutes, and not soon after its start
    deadline = time.monotonic() + 120
    while bed.jobs(run) and time.monotonic() < deadline:
        faults.kill_daemon(bed.cluster, nodes[0])
        faults.restart_node(bed, nodes[0])
        wait_until(lambda: not bed.jobs(run), timeout_s=15)
    view = bed.finishes(run)
    assert view.tries == 1 and learned(run) == unharmed
    gone(bed, run)
    assert decide.state(bed.view(run)).word == "finished"
    until(lambda: faults.idle(bed), "the nodes are back")


def answers(bed: Bed) -> bool:
    command = ["squeue", "--noheader"]
    return not subprocess.run(command, env=bed.environment, capture_output=True).returncode


def test_b5_without_accounting_all_commands_say_what_is(
    bed: Bed, unharmed: dict[str, Any], tmp_path: Path
) -> None:
    """Nor are `sacct` and `scontrol` there, on the machine that submits and on the nodes."""
    faults.kill_daemon(bed.cluster, "slurmdbd")
    whole, bed = bed, without(bed, tmp_path / "bin", "sacct", "scontrol")
    try:
        run = bed.submit("b5")
        told = json.loads(bed.command("launcher.submit", *bed.words("b5"), "--json").stdout)
        assert told["state"] in ("queued", "running")
        trains(bed, run)
        assert shown(bed, run)["state"] == "running"
        faults.kill_rank(bed, 1)
        view = bed.finishes(run)
        assert attempts(view)[0] == "killed" and decide.cause(view.attempts[0]).rank == "1"
        assert shown(bed, run)["state"] == "finished"
        assert bed.command("launcher.logs", str(run.root)).returncode == 0
        told = json.loads(bed.command("launcher.why", str(run.root), "--json").stdout)
        assert (told["cause"]["kind"], told["cause"]["rank"]) == ("killed", "1")
        other = bed.submit("b5-cancelled")
        assert bed.command("launcher.cancel", str(other.root)).returncode == 0
        assert shown(bed, other)["state"] == "cancelled" and not bed.jobs(other)
        gone(bed, other)
    finally:
        faults.restart_daemon(bed.cluster, "slurmdbd")
        until(lambda: accounts(whole), "accounting answers")
    # the controller has kept for it what it missed
    same_end(whole, run, unharmed)


def without(bed: Bed, folder: Path, *names: str) -> Bed:
    """A bed on which these programs are not installed."""
    folder.mkdir()
    for place in map(Path, os.environ["PATH"].split(os.pathsep)):
        for program in place.iterdir() if place.is_dir() else ():
            if program.name not in names and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)
    return replace(bed, reach={**bed.reach, "PATH": str(folder)})


def shown(bed: Bed, run: RunFolder) -> dict[str, Any]:
    done = bed.command("launcher.runs", str(run.root), "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def accounts(bed: Bed) -> bool:
    return not subprocess.run(["sacct"], env=bed.environment, capture_output=True).returncode


def test_b6_while_slurm_does_not_answer_submissions_end_as_one_job(
    bed: Bed, unharmed: dict[str, Any], tmp_path: Path
) -> None:
    """sbatch takes the job and says that it timed out, and nobody answers for 20 s more."""
    muted = faults.mute(bed, tmp_path / "bin", seconds=20)
    done = muted.command("launcher.submit", *bed.words("b6"), "--json")
    assert done.returncode == 0, done.stderr
    run = RunFolder(bed.runs / "digits_dit" / "b6")
    # a training job and its successor; what was taken before is gone
    until(lambda: len(bed.jobs(run)) == 2, "it is one job")
    assert bed.job(run) in bed.jobs(run)
    same_end(bed, run, unharmed, tries=1)


def test_c6_what_ends_one_task_of_an_array_leaves_the_others_alone(
    bed: Bed, tmp_path: Path
) -> None:
    """The last task of an array has the array's own number at Slurm, by which all of them would be requeued."""
    command = [sys.executable, "-m", "tools.shards", "encode", str(bed.digits), "--encoder", "tiny"]
    command += [
        "--shard-mb",
        "0.01",
        "--runs",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--tasks", "2", "--cluster", "devcluster"]

    def submit() -> Path:
        done = subprocess.run(
            command, cwd=ROOT, env=bed.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return max(tmp_path.glob("runs/encode/*/attempts/*"))

    blocker = faults.preempt(bed, seconds=600)
    folder = submit()
    first, last = (task.id for task in array.tasks(folder))
    bed.ask("scancel", last)
    bed.ask("scancel", blocker)
    until(lambda: "running" in {task.state for task in array.tasks(folder)}, "a task works")
    for id in (first, first.partition("_")[0]):
        requeued = ["scontrol", "requeue", id]
        assert subprocess.run(requeued, env=bed.environment, capture_output=True).returncode
    until(lambda: not {"queued", "running"} & {t.state for t in array.tasks(folder)}, "it ends")
    assert [task.state for task in array.tasks(folder)] == ["done", "lost"]
    assert array.counted(folder) == (8, 8)
    assert (folder / "job" / f"{first}_0_log.out").read_text().count("Starting with") == 1
    done = subprocess.run(command, cwd=ROOT, env=bed.environment, capture_output=True, text=True)
    assert "already there, nothing submitted" in done.stdout
