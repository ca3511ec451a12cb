"""Faults on a real Slurm, a cell a test, named after its letter: the run goes on by itself and ends at the same bits.

`unharmed` is what the same run learns without a fault. Ranks train for real, so a cell proves the checkpoint, the
signals, the decision and the scheduler together.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.reconcile import decide
from launcher.reconcile.view import RunView
from selfguide.spec.run import RunFolder
from slurm import layout, processes
from slurm.crew import SEARCH, program_path
from tests.cluster.bed import (
    BATCH,
    ROOT,
    Bed,
    adds_up,
    finishes,
    gone,
    learned,
    lost,
    trains,
    until,
)

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

# an import of torch and a rendezvous take the most of it; the aim is 10 s on idle cores
RECOVERED_S = 60.0
INTERVAL = 10 * BATCH


def attempts(view: RunView) -> list[str]:
    """Why each attempt ended."""
    return [decide.cause(at).kind for at in view.attempts]


def exits(run: RunFolder, attempt: int) -> dict[int, dict[str, Any]]:
    """The exit records of an attempt's ranks."""
    paths = run.attempt(attempt).glob("exit-*.json")
    return {int(path.stem.removeprefix("exit-")): json.loads(path.read_text()) for path in paths}


def slow(bed: Bed, seconds: float) -> None:
    """Makes each step of the attempt that trains now take so much longer."""
    code = (
        "import time; from selfguide.training import loop; step = loop.advance\n"
        f"loop.advance = lambda job: (time.sleep({seconds}), step(job))"
    )
    for rank in range(2):
        bed.inside(rank, code)


def same_end(bed: Bed, run: RunFolder, unharmed: dict[str, str], *, tries: int = 2) -> RunView:
    """The run finishes by itself in so many attempts, at the same bits, and leaves nothing."""
    view = finishes(bed, run)
    assert view.tries == tries, attempts(view)
    assert learned(run) == unharmed
    gone(bed, run)
    adds_up(bed, run)
    return view


def all_saved(run: RunFolder, attempt: int = 1) -> int:
    """All ranks of the attempt stopped at one step and saved it; returns its images."""
    ended = exits(run, attempt)
    assert {record["class"] for record in ended.values()} == {"preempted"}
    assert {record["code"] for record in ended.values()} == {75} and len(ended) == 2
    (images,) = {record["images"] for record in ended.values()}
    assert {record["saved"] for record in ended.values()} == {images}
    report = json.loads((run.attempt(attempt + 1) / "progress.json").read_text())
    assert report["resumed_from"] == images
    return int(images)


@pytest.mark.quick
def test_a1_a_rank_killed_in_a_step_costs_one_interval_at_most(
    bed: Bed, unharmed: dict[str, str]
) -> None:
    run = bed.submit("a1")
    trains(bed, run)
    ranks = bed.ranks(run)
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    until(lambda: not Path(f"/proc/{ranks[0]}").exists(), "the other rank has ended")
    assert time.monotonic() - began < 20
    trains(bed, run, 2, BATCH)
    assert time.monotonic() - began < RECOVERED_S
    view = same_end(bed, run, unharmed)
    assert attempts(view)[0] == "killed" and decide.cause(view.attempts[0]).rank == "1"
    assert all(each <= INTERVAL for each in lost(run))


def test_a2_a_rank_that_exits_is_the_cause_whatever_srun_returns(
    bed: Bed, unharmed: dict[str, str]
) -> None:
    run = bed.submit("a2")
    trains(bed, run)
    bed.inside(1, "import os; os._exit(7)")
    view = same_end(bed, run, unharmed)
    cause = decide.cause(view.attempts[0])
    assert (cause.rank, cause.type) == ("1", "exit code 7")


@pytest.mark.quick
def test_b1_a_lost_node_is_done_without_and_its_rank_publishes_nothing(
    bed: Bed, unharmed: dict[str, str]
) -> None:
    conf = bed.cluster.conf
    before = conf.read_text()
    conf.write_text(before.replace("SlurmdTimeout=30", "SlurmdTimeout=10"))
    bed.ask("scontrol", "reconfigure")
    run = bed.submit("b1")
    trains(bed, run)
    slow(bed, 0.5)
    nodes = bed.ask("squeue", "--noheader", f"--jobs={bed.job(run)}", "--format=%N").strip()
    _, last = bed.ask("scontrol", "show", "hostnames", nodes).split()
    record = layout.read_record(bed.cluster.state)
    assert record is not None
    try:
        os.kill(record.daemons[last][0], signal.SIGKILL)
        view = same_end(bed, run, unharmed)
        assert attempts(view)[0] == "node"
        at = view.newest
        assert at is not None and at.job is not None
        nodes = bed.ask("sacct", "-X", "-n", "-o", "NodeList%80", "-j", at.job.record["id"]).strip()
        assert last not in bed.ask("scontrol", "show", "hostnames", nodes).split()
    finally:
        conf.write_text(before)
        _restart_node(bed, last)


def _restart_node(bed: Bed, name: str) -> None:
    """As the node's administrator does."""
    state = bed.cluster.state
    argv = [program_path("slurmd"), "-D", "-N", name, "-f", str(bed.cluster.conf)]
    environment = {"PATH": SEARCH, "LANG": "C.UTF-8", "SLURM_CONF": str(bed.cluster.conf)}
    found = processes.start(argv, environment, state / "log" / f"{name}.out")
    record = layout.read_record(state)
    assert record is not None
    record.daemons[name] = (found.pid, found.started)
    layout.write_record(state, record)
    bed.ask("scontrol", "reconfigure")

    def idle() -> bool:
        states = bed.ask("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T")
        return set(states.split()) == {"idle"}

    until(idle, f"{name} is back")


@pytest.mark.quick
def test_c1_usr2_loses_no_step(bed: Bed, unharmed: dict[str, str]) -> None:
    run = bed.submit("c1")
    trains(bed, run)
    bed.ask("scancel", "--signal=USR2", bed.job(run))
    same_end(bed, run, unharmed)
    all_saved(run)
    assert lost(run) == [0]


def test_c2_a_time_limit_loses_no_step(bed: Bed, unharmed: dict[str, str]) -> None:
    run = bed.submit("c2")
    trains(bed, run)
    slow(bed, 0.7)
    # its warning is due at once, and Slurm looks every half minute
    bed.ask("scontrol", "update", f"JobId={bed.job(run)}", "TimeLimit=1")
    same_end(bed, run, unharmed)
    all_saved(run)
    assert lost(run) == [0]


@pytest.mark.quick
def test_c3_preemption_loses_no_step_and_the_run_goes_on_behind_the_preemptor(
    bed: Bed, unharmed: dict[str, str]
) -> None:
    run = bed.submit("c3")
    trains(bed, run)
    slow(bed, 0.3)
    urgent = ["--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null"]
    job = bed.ask("sbatch", "--parsable", *urgent, "--wrap=sleep 3").strip()
    same_end(bed, run, unharmed)
    all_saved(run)
    assert lost(run) == [0]
    assert bed.ask("sacct", "-X", "-n", "-o", "State", "-j", job).strip() == "COMPLETED"


def test_c4_an_end_without_warning_is_saved_before_the_successor_overtakes_it(
    bed: Bed, unharmed: dict[str, str]
) -> None:
    """What an administrator's scancel does, or a preemption without grace: SIGTERM, and SIGKILL after KillWait."""
    run = bed.submit("c4")
    trains(bed, run)
    bed.ask("scancel", bed.job(run))
    same_end(bed, run, unharmed)
    all_saved(run)


def test_c5_a_requeue_from_outside_resumes_from_the_newest_checkpoint(
    bed: Bed, unharmed: dict[str, str]
) -> None:
    run = bed.submit("c5", "cluster.restart=requeue")
    trains(bed, run)
    job = bed.job(run)
    assert list(bed.jobs(run)) == [job]
    slow(bed, 0.3)
    bed.ask("scontrol", "requeue", job)
    until(lambda: bed.jobs(run)[job] == "PENDING", "it is requeued")
    # or Slurm holds it for two minutes
    bed.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
    view = same_end(bed, run, unharmed)
    assert {at.job.record["id"] for at in view.attempts if at.job} == {job}
    all_saved(run)


def test_c5_a_job_with_a_successor_is_not_requeued(bed: Bed, unharmed: dict[str, str]) -> None:
    run = bed.submit("c5")
    trains(bed, run)
    command = ["scontrol", "requeue", bed.job(run)]
    done = subprocess.run(command, env=bed.environment, capture_output=True)
    assert done.returncode == 1
    same_end(bed, run, unharmed, tries=1)


def test_c8_a_signal_to_one_rank_stops_all_at_the_same_step(
    bed: Bed, unharmed: dict[str, str]
) -> None:
    run = bed.submit("c8")
    trains(bed, run)
    os.kill(bed.ranks(run)[1], signal.SIGUSR2)
    same_end(bed, run, unharmed)
    all_saved(run)


@pytest.mark.quick
def test_e1_three_submissions_at_once_are_one_run_and_cancel_ends_all_of_it(bed: Bed) -> None:
    command = [sys.executable, "-m", "launcher.submit", *bed.words("e1"), "--json"]
    shells = [
        subprocess.Popen(command, cwd=ROOT, env=bed.environment, stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    told = [json.loads(shell.communicate(timeout=60)[0]) for shell in shells]
    assert [each["state"] for each in told].count("submitted") == 1
    assert len({each["run"] for each in told}) == 1
    run = RunFolder(Path(told[0]["folder"]))
    again = bed.command("launcher.submit", *bed.words("e1"), "--json")
    assert json.loads(again.stdout)["job"] == next(t["job"] for t in told if t["job"])
    assert run.attempt_numbers() == [1] and len(bed.jobs(run)) == 2
    assert bed.command("launcher.cancel", str(run.root)).returncode == 0
    assert bed.jobs(run) == {}
    assert decide.state(bed.view(run)).word == "cancelled"
    gone(bed, run)


@pytest.mark.quick
def test_cancel_wins_while_the_successor_starts(bed: Bed) -> None:
    run = bed.submit("cancelled")
    trains(bed, run)
    first = bed.job(run)
    os.kill(bed.ranks(run)[1], signal.SIGKILL)
    until(lambda: bed.jobs(run) and first not in bed.jobs(run), "the successor starts")
    assert bed.command("launcher.cancel", str(run.root)).returncode == 0
    assert bed.jobs(run) == {}
    assert decide.state(bed.view(run)).word == "cancelled"
    gone(bed, run)


@pytest.mark.quick
def test_f1_an_error_of_the_user_at_the_start_is_not_retried(bed: Bed, tmp_path: Path) -> None:
    data = tmp_path / "digits"
    subprocess.run(["cp", "-r", str(bed.digits), str(data)], check=True)
    urgent = ["--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null"]
    job = bed.ask("sbatch", "--parsable", *urgent, "--wrap=sleep 600").strip()
    run = bed.submit("f1", f"data.root={data}")
    data.rename(tmp_path / "elsewhere")
    bed.ask("scancel", job)
    until(lambda: not bed.jobs(run), "nothing of it is left")
    assert run.attempt_numbers() == [1]
    assert {record["code"] for record in exits(run, 1).values()} == {2}
    assert decide.next_attempt(bed.view(run)).kind == "user"
    assert decide.state(bed.view(run)).word == "failed"
    gone(bed, run)


def test_f2_a_crash_at_the_same_step_ends_the_chain(bed: Bed) -> None:
    crash = (
        "import sys, time\n"
        "while not hasattr(sys.modules.get('selfguide.training.loop'), 'publish_what_is_due'): time.sleep(0.01)\n"
        "loop = sys.modules['selfguide.training.loop']; step = loop.advance\n"
        "def advance(job):\n"
        f"    if job.state.images == {22 * BATCH}: raise ValueError('always here')\n"
        "    step(job)\n"
        "loop.advance = advance\n"
    )
    bed.inside(1, crash, always=True)
    run = bed.submit("f2")
    until(lambda: not bed.jobs(run), "it has been given up")
    view = bed.view(run)
    assert view.tries == 2 and set(attempts(view)) == {"error"}
    assert decide.cause(view.attempts[-1]).rank == "1"
    assert "always here" in decide.state(view).reason
    gone(bed, run)
