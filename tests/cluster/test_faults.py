"""Faults on a real Slurm, a cell a test, named after its letter: the run goes on by itself and ends at the same bits.

`unharmed` is what the same run learns without a fault. Ranks train for real, so a cell proves the checkpoint, the
signals, the decision and the scheduler together.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.drill import faults
from launcher.reconcile import decide
from selfguide.spec.records import records
from selfguide.spec.run import RunFolder
from tests.cluster.bed import BATCH, ROOT, STEPS, Bed, attempts, gone, lost, same_end, trains, until
from tests.cluster.corpus import explained

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

# an import of torch and a rendezvous take the most of it; the aim is 10 s on idle cores
RECOVERED_S = 240.0
INTERVAL = 10 * BATCH


def exits(run: RunFolder, attempt: int) -> dict[int, dict[str, Any]]:
    """The exit records of an attempt's ranks."""
    paths = run.attempt(attempt).glob("exit-*.json")
    return {int(path.stem.removeprefix("exit-")): json.loads(path.read_text()) for path in paths}


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
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    run = bed.submit("a1")
    trains(bed, run)
    ranks = bed.ranks(run)
    faults.kill_rank(bed, 1)
    began = time.monotonic()
    until(lambda: not Path(f"/proc/{ranks[0]}").exists(), "the other rank has ended")
    assert time.monotonic() - began < 60
    trains(bed, run, 2, BATCH)
    assert time.monotonic() - began < RECOVERED_S
    view = same_end(bed, run, unharmed)
    assert attempts(view)[0] == "killed" and decide.cause(view.attempts[0]).rank == "1"
    assert all(each <= INTERVAL for each in lost(run))


def test_a2_a_rank_that_exits_is_the_cause_whatever_srun_returns(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    run = bed.submit("a2")
    trains(bed, run)
    faults.exit_rank(bed, 1, 7)
    view = same_end(bed, run, unharmed)
    cause = decide.cause(view.attempts[0])
    assert (cause.rank, cause.type) == ("1", "exit code 7")


def test_a3_an_exception_of_one_rank_is_the_cause_with_its_traceback(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    run = bed.submit("a3")
    trains(bed, run)
    faults.raise_in_rank(bed, 1, "ValueError('here alone')")
    view = same_end(bed, run, unharmed)
    cause = decide.cause(view.attempts[0])
    assert (cause.kind, cause.rank, cause.type) == ("error", "1", "ValueError")
    assert "here alone" in cause.message and "rank 0" not in cause.message
    ended = exits(run, 1)
    assert ended[1]["traceback"].rstrip().endswith("ValueError: here alone")
    assert 0 not in ended or ended[0]["class"] == "signal" or ended[0]["peer_gone"]
    assert all(each <= INTERVAL for each in lost(run))


def test_a4_ranks_that_crash_are_the_causes_by_their_signals(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    run = bed.submit("a4")
    faults.slow(bed, 0.05, always=True)
    for attempt, number in ((1, signal.SIGSEGV), (2, signal.SIGABRT)):
        trains(bed, run, attempt, (4 + 20 * attempt) * BATCH)
        faults.kill_rank(bed, 1, number)
    view = same_end(bed, run, unharmed, tries=3)
    causes = [decide.cause(at) for at in view.attempts[:2]]
    assert [(c.kind, c.rank, c.type) for c in causes] == [
        ("crash", "1", "SIGSEGV"),
        ("crash", "1", "SIGABRT"),
    ]
    assert all(each <= INTERVAL for each in lost(run))


@pytest.mark.quick
def test_b1_a_lost_node_is_done_without_and_its_rank_publishes_nothing(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    with faults.impatient(bed):
        run = bed.submit("b1")
        trains(bed, run)
        faults.slow(bed, 0.5)
        _, last = bed.nodes(run)
        try:
            faults.kill_daemon(bed.cluster, last)
            view = same_end(bed, run, unharmed)
            assert attempts(view)[0] == "node"
            at = view.newest
            assert at is not None and at.job is not None
            job = at.job.record["id"]
            nodes = bed.ask("sacct", "-X", "-n", "-o", "NodeList%80", "-j", job).strip()
            assert last not in bed.ask("scontrol", "show", "hostnames", nodes).split()
        finally:
            faults.restart_node(bed, last)


@pytest.mark.quick
def test_c1_usr2_loses_no_step(bed: Bed, unharmed: dict[str, Any]) -> None:
    run = bed.submit("c1")
    trains(bed, run)
    faults.signal_job(bed, run)
    same_end(bed, run, unharmed)
    all_saved(run)
    assert lost(run) == [0]


def test_c2_a_time_limit_loses_no_step(bed: Bed, unharmed: dict[str, Any]) -> None:
    run = bed.submit("c2")
    trains(bed, run)
    faults.slow(bed, 0.7)
    faults.shorten(bed, run)
    same_end(bed, run, unharmed)
    all_saved(run)
    assert lost(run) == [0]


@pytest.mark.quick
def test_c3_preemption_loses_no_step_and_the_run_goes_on_behind_the_preemptor(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    run = bed.submit("c3")
    trains(bed, run)
    faults.slow(bed, 0.3)
    job = faults.preempt(bed)
    same_end(bed, run, unharmed)
    all_saved(run)
    assert lost(run) == [0]
    assert bed.ask("sacct", "-X", "-n", "-o", "State", "-j", job).strip() == "COMPLETED"


def test_c4_an_end_without_warning_is_saved_before_the_successor_overtakes_it(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    """What an administrator's scancel does, or a preemption without grace: SIGTERM, and SIGKILL after KillWait."""
    run = bed.submit("c4")
    trains(bed, run)
    faults.scancel(bed, run)
    same_end(bed, run, unharmed)
    all_saved(run)


def test_c5_a_requeue_from_outside_resumes_from_the_newest_checkpoint(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    run = bed.submit("c5", "cluster.restart=requeue")
    trains(bed, run)
    job = bed.job(run)
    assert list(bed.jobs(run)) == [job]
    faults.slow(bed, 0.3)
    bed.ask("scontrol", "requeue", job)
    until(lambda: bed.jobs(run)[job] == "PENDING", "it is requeued")
    # or Slurm holds it for two minutes
    bed.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
    view = same_end(bed, run, unharmed)
    assert {at.job.record["id"] for at in view.attempts if at.job} == {job}
    all_saved(run)


def test_c5_a_job_with_a_successor_is_not_requeued(bed: Bed, unharmed: dict[str, Any]) -> None:
    run = bed.submit("c5-kept")
    trains(bed, run)
    command = ["scontrol", "requeue", bed.job(run)]
    done = subprocess.run(command, env=bed.environment, capture_output=True)
    assert done.returncode == 1
    same_end(bed, run, unharmed, tries=1)


def test_c8_a_signal_to_one_rank_stops_all_at_the_same_step(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    run = bed.submit("c8")
    trains(bed, run)
    faults.kill_rank(bed, 1, signal.SIGUSR2)
    same_end(bed, run, unharmed)
    all_saved(run)


def test_d8_a_loss_that_is_no_number_ends_the_attempt_with_its_evidence_and_is_not_saved(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    run = bed.submit("d8", "train.skips=3")
    trains(bed, run)
    faults.spoil(bed, 1, 30 * BATCH)
    # one more attempt, for it may have been the machine; the same at the same images would end the run
    view = same_end(bed, run, unharmed)
    assert attempts(view)[0] == "numeric"
    broken = exits(run, 1)
    assert {record["class"] for record in broken.values()} == {"numeric"} and len(broken) == 2
    said = json.loads((run.attempt(1) / "numeric-1.json").read_text())
    assert "skipped" in said["reason"] and said["micro_batches"][0]["finding"]
    resumed = json.loads((run.attempt(2) / "progress.json").read_text())["resumed_from"]
    assert 0 < resumed < broken[1]["images"] - 3 * BATCH + 1


@pytest.mark.quick
def test_e1_three_submissions_at_once_are_one_run_and_cancel_ends_all_of_it(bed: Bed) -> None:
    # so that it does not finish before anybody looks
    faults.slow(bed, 0.5)
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
    explained(run)


def test_e2_another_config_under_the_same_name_is_refused_with_the_difference(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    run = bed.submit("e2")
    before = bed.jobs(run)
    done = bed.command("launcher.submit", *bed.words("e2", "train.learning_rate=1e-3"))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "train.learning_rate" in done.stderr and "0.002" in done.stderr
    assert run.attempt_numbers() == [1] and set(bed.jobs(run)) <= set(before)
    same_end(bed, run, unharmed, tries=1)


def test_e4_a_pinned_checkpoint_outlives_retention_and_a_kill(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    faults.slow(bed, 0.1)
    run = bed.submit("e4")
    trains(bed, run)
    kept = run.saved()[-1]
    assert kept < 80 * BATCH, "else it is one of the newest to the end"
    done = bed.command("tools.checkpoint", "pin", str(run.root), "--images", str(kept))
    assert done.returncode == 0, done.stderr
    faults.kill_rank(bed, 1)
    same_end(bed, run, unharmed)
    assert run.saved() == [kept, (STEPS - 20) * BATCH, STEPS * BATCH]


def test_e5_what_is_submitted_from_inside_a_job_step_has_an_environment_of_its_own(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    """A run, its watcher's evaluation and another attempt, all submitted by jobs; each snapshot is scored once."""
    dump = (
        "import json, os, pathlib\n"
        f"path = pathlib.Path({str(bed.faults)!r}, 'env-' + os.environ['SLURM_JOB_ID'] + '.json')\n"
        "path.write_text(json.dumps(dict(os.environ)))"
    )
    bed.inside(0, dump, always=True)
    foreign = {"SLURM_DISTRIBUTION": "arbitrary", "SLURM_CPU_BIND_MARK": "1", "SLURM_NPROCS": "7"}
    foreign |= {"SBATCH_TIMELIMIT": "0:30", "PMI_RANK": "3", "SLURM_OUTER_MARK": "1", "RANK": "7"}
    words = bed.words("e5", "evaluation=fd_digits", "evaluation.samples=200")
    command = [
        "srun",
        "--ntasks=1",
        "--cpu-bind=none",
        "env",
        *(f"{k}={v}" for k, v in foreign.items()),
    ]
    command += [sys.executable, "-m", "launcher.submit", *words]
    done = subprocess.run(command, cwd=ROOT, env=bed.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunFolder(bed.runs / "digits_dit" / "e5")
    same_end(bed, run, unharmed, tries=1, seconds=240)
    assert [(record.images, record.done) for record in records(run)] == [(STEPS * BATCH, True)]
    (scorer,) = (json.loads(p.read_text())["id"] for p in run.evals.glob("jobs/*/job.json"))
    for job in (json.loads((run.attempt(1) / "job.json").read_text())["id"], scorer):
        found = json.loads((bed.faults / f"env-{job}.json").read_text())
        assert found["SLURM_CONF"] == str(bed.cluster.conf)
        assert not {name for name, value in foreign.items() if found.get(name) == value}


@pytest.mark.quick
def test_cancel_wins_while_the_successor_starts(bed: Bed) -> None:
    run = bed.submit("cancelled")
    trains(bed, run)
    first = bed.job(run)
    faults.kill_rank(bed, 1)
    until(lambda: bed.jobs(run) and first not in bed.jobs(run), "the successor starts")
    assert bed.command("launcher.cancel", str(run.root)).returncode == 0
    assert bed.jobs(run) == {}
    assert decide.state(bed.view(run)).word == "cancelled"
    gone(bed, run)


@pytest.mark.quick
def test_f1_an_error_of_the_user_at_the_start_is_not_retried(bed: Bed, tmp_path: Path) -> None:
    data = tmp_path / "digits"
    subprocess.run(["cp", "-r", str(bed.digits), str(data)], check=True)
    job = faults.preempt(bed, seconds=600)
    run = bed.submit("f1", f"data.root={data}")
    data.rename(tmp_path / "elsewhere")
    bed.ask("scancel", job)
    until(lambda: not bed.jobs(run), "nothing of it is left")
    assert run.attempt_numbers() == [1]
    said = [each for each in exits(run, 1).values() if not each["peer_gone"]]
    assert {record["code"] for record in said} == {2}
    assert decide.next_attempt(bed.view(run)).kind == "user"
    assert decide.state(bed.view(run)).word == "failed"
    gone(bed, run)
    explained(run)


def test_f2_a_crash_at_the_same_step_ends_the_chain(bed: Bed) -> None:
    faults.raise_in_rank(bed, 1, "ValueError('always here')", at=22 * BATCH, always=True)
    run = bed.submit("f2")
    until(lambda: not bed.jobs(run), "it has been given up")
    view = bed.view(run)
    assert view.tries == 2 and set(attempts(view)) == {"error"}
    assert decide.cause(view.attempts[-1]).rank == "1"
    assert "always here" in decide.state(view).reason
    gone(bed, run)
    explained(run)
