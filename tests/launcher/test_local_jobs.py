"""Jobs on this machine: they outlive who submitted them, fail together, and end together."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import payloads
import pytest
from waiting import REPOSITORY, until

from launcher import backends, jobs
from launcher.attempt.entry import rank_info
from launcher.attempt.exits import Exit
from launcher.backends import local
from launcher.backends.protocol import clean
from launcher.folder import Attempt
from launcher.reconcile import decide
from launcher.reconcile.view import read
from selfguide.spec.config import ClusterConfig
from selfguide.spec.run import read_record, write_record
from shards.errors import UserError

LOCAL = ClusterConfig(kind="local", gpus_per_node=2)


@pytest.fixture
def at(runs: Path, payload: Callable[..., None]) -> Attempt:
    """An attempt folder that expects two ranks."""
    made = Attempt(runs / "digits_dit" / "abc" / "attempts" / "0001")
    about = {"id": "abc", "experiment": "digits_dit", "identity": {}, "images": 1280}
    write_record(made.run.run_json, {**about, "created": 0.0})
    write_record(made.submission, {"world": 2})
    return made


def failure(at: Attempt) -> str:
    return decide.failure(read(at.run))


def job(at: Attempt, function: Callable[[str], None], **more: object) -> backends.Job:
    wanted: dict = {"tasks": 2, "timeout_min": 5, "code": REPOSITORY} | more
    return backends.Job(
        function=function,
        argument=str(at.root),
        folder=at.logs,
        name="test",
        comment=str(at.run.root),
        **wanted,
    )


def started(at: Attempt, function: Callable[[str], None], **more: object) -> backends.Record:
    record = backends.of(LOCAL).submit(job(at, function, **more))
    write_record(at.job, record)
    return record


@pytest.mark.parametrize(
    ("nice", "typed", "policy"), [(7, None, "passive"), (7, "active", "active"), (0, None, None)]
)
def test_ranks_know_their_place_and_their_surroundings(
    nice: int,
    typed: str | None,
    policy: str | None,
    at: Attempt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if typed is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", typed)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("WORLD_SIZE", "64")
    record = started(at, payloads.look_around, threads=3, nice=nice, environment={"COLOUR": "blue"})
    until(lambda: backends.state(record) == "gone")
    told = [json.loads((at.root / f"place-{rank}.json").read_text()) for rank in range(2)]
    assert [(t["rank"], t["local_rank"], t["world"]) for t in told] == [(0, 0, 2), (1, 1, 2)]
    for each in told:
        environment = each["environment"]
        assert environment["OMP_NUM_THREADS"] == "3" and environment["COLOUR"] == "blue"
        assert environment.get("OMP_WAIT_POLICY") == policy
        assert not {"SLURM_JOB_ID", "WORLD_SIZE"} & set(environment)
        assert each["nice"] == min(19, os.nice(0) + nice) and each["python"] == sys.executable
        assert each["session"] not in (os.getsid(0), 0)
    assert {read_record(at.root / f"exit-{rank}.json")["class"] for rank in range(2)} == {"ok"}
    assert failure(at) == ""


def test_the_first_failure_ends_all_and_is_the_one_reported(at: Attempt) -> None:
    record = started(at, payloads.fall)
    until(lambda: backends.state(record) == "gone")
    assert failure(at) == "rank 1: RuntimeError: rank one fell"
    assert read_record(at.root / "exit-0.json")["class"] == "signal"
    assert "rank one fell" in read_record(at.root / "exit-1.json")["traceback"]


def test_a_failure_in_training_ends_the_ranks_that_wait_for_it(at: Attempt) -> None:
    record = started(at, payloads.fall_in_training)
    until(lambda: backends.state(record) == "gone")
    ends = [Exit.read(at.root, rank) for rank in range(2)]
    assert [(end.kind, end.code) for end in ends if end] == [("signal", 143), ("memory", 84)]
    assert failure(at).startswith("rank 1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_the_controller_reaches_the_ranks_which_save_and_end(
    at: Attempt, number: signal.Signals
) -> None:
    record = started(at, payloads.train_until_asked)
    until(lambda: all((at.root / f"ready-{rank}").exists() for rank in range(2)))
    os.kill(record["pid"], number)
    until(lambda: all((at.root / f"asked-{rank}").exists() for rank in range(2)))
    os.kill(record["pid"], number)
    (at.root / "save-1").touch()
    until(lambda: Exit.read(at.root, 1))
    assert backends.state(record) == "running", "rank 0 still saves"
    (at.root / "save-0").touch()
    until(lambda: backends.state(record) == "gone")
    ends = [Exit.read(at.root, rank) for rank in range(2)]
    assert [(end.kind, end.code, end.saved) for end in ends if end] == [("preempted", 75, 640)] * 2


def test_ranks_that_have_not_begun_to_train_are_preempted_at_once(at: Attempt) -> None:
    """So is an evaluation, which has nothing to lose."""
    record = started(at, payloads.nap)
    until(lambda: all((at.root / f"start-{rank}.json").exists() for rank in range(2)))
    assert backends.cancel(record)
    ends = [Exit.read(at.root, rank) for rank in range(2)]
    assert [(end.kind, end.code) for end in ends if end] == [("preempted", 76)] * 2


def test_a_rank_that_hangs_while_it_leaves_is_ended_and_its_record_stays(at: Attempt) -> None:
    record = started(at, payloads.hang_at_the_end)
    until(lambda: backends.state(record) == "gone")
    assert {Exit.read(at.root, rank).kind for rank in range(2)} == {"ok"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("payload_name", "kind", "name"),
    [("vanish", "killed", "SIGKILL"), ("crash", "crash", "SIGSEGV")],
)
def test_rank_ended_by_a_signal_leaves_no_record_and_is_named_with_the_signal(
    at: Attempt, payload_name: str, kind: str, name: str
) -> None:
    record = started(at, getattr(payloads, payload_name))
    until(lambda: backends.state(record) == "gone")
    found = decide.cause(read(at.run).newest)
    assert (found.kind, found.rank, found.type) == (kind, "1", name)
    # what is known without the controller's word, as of attempts of earlier versions
    local.ending_path(at.logs, record["id"]).unlink()
    assert failure(at).startswith("rank 1 left no exit record")


def test_job_past_its_time_limit_is_not_its_ranks_failure(at: Attempt) -> None:
    record = started(at, payloads.nap, timeout_min=0)
    until(lambda: backends.state(record) == "gone")
    assert decide.cause(read(at.run).newest).kind == "limit"


def test_a_rank_that_was_ended_before_it_began_is_not_the_culprit(at: Attempt) -> None:
    """Rank 1 may fall while rank 0 is still importing; and a node may kill a rank whose peers then complain."""
    write_record(at.root / "start-1.json", {})
    assert (
        failure(at) == "rank 1 left no exit record (killed from outside, for example out of memory)"
    )
    write_record(at.root / "exit-1.json", {"code": 1, "class": "error", "message": "it fell"})
    assert failure(at) == "rank 1: it fell"
    write_record(at.root / "start-0.json", {})
    assert failure(at).startswith("rank 0 left no exit record") and "rank 1: it fell" in failure(at)


def test_a_rank_that_never_started_is_named(at: Attempt) -> None:
    write_record(at.root / "start-0.json", {})
    write_record(
        at.root / "exit-0.json", {"code": 143, "class": "signal", "message": "ended by SIGTERM"}
    )
    assert failure(at) == "rank 1 never started: see its log"


def test_a_wrong_world_is_refused_by_every_rank(at: Attempt) -> None:
    record = started(at, payloads.look_around, tasks=1)
    until(lambda: backends.state(record) == "gone")
    ended = read_record(at.root / "exit-0.json")
    assert (ended["class"], ended["code"]) == ("user", 2) and "1 ranks were started and 2" in ended[
        "message"
    ]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SUBMITIT_EXECUTOR": "slurm"},
        {"SUBMITIT_EXECUTOR": "slurm", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {
            "SUBMITIT_EXECUTOR": "local",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
        },
        {
            "SUBMITIT_EXECUTOR": "slurm",
            "SLURM_PROCID": "x",
            "SLURM_LOCALID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
        },
    ],
)
def test_a_partial_environment_is_never_filled_by_a_guess(environment: dict[str, str]) -> None:
    with pytest.raises(UserError):
        rank_info(environment)


def test_cancel_ends_every_process_and_may_be_called_again(at: Attempt) -> None:
    record = started(at, payloads.nap)
    until(lambda: len(local._members([record])) >= 3)  # controller and two ranks
    assert backends.state(record) == "running"
    assert backends.cancel(record)
    assert local._members([record]) == [] and backends.state(record) == "gone"
    assert not backends.cancel(record)


def test_what_ignores_sigterm_is_killed_after_the_grace(at: Attempt) -> None:
    record = started(at, payloads.stubborn)
    until(lambda: all((at.root / f"ready-{rank}").exists() for rank in range(2)))
    assert local.Local().cancel([record], grace_s=0.2) == 1
    assert local._members([record]) == []


def test_ranks_without_a_controller_still_count_as_running(at: Attempt) -> None:
    record = started(at, payloads.nap)
    until(lambda: len(local._members([record])) >= 3)
    os.kill(record["pid"], signal.SIGKILL)
    until(lambda: local._started(record["pid"]) is None)
    assert backends.state(record) == "running"
    assert backends.cancel(record) and backends.state(record) == "gone"


def test_a_reused_process_id_is_not_the_job(at: Attempt) -> None:
    record = started(at, payloads.look_around)
    until(lambda: backends.state(record) == "gone")
    mine = {**record, "pid": os.getpid(), "id": str(os.getpid())}
    assert backends.state(mine) == "gone" and not backends.cancel(mine)


def test_another_machines_job_is_unknown_and_another_boots_is_gone(at: Attempt) -> None:
    record = started(at, payloads.nap)
    elsewhere, before = {**record, "host": "elsewhere"}, {**record, "boot": "earlier"}
    assert backends.states([elsewhere, before, record]) == ["unknown", "gone", "running"]
    with pytest.raises(UserError, match="elsewhere"):
        backends.cancel(elsewhere)


def test_a_job_outlives_its_submitter_and_the_submitters_terminal(at: Attempt) -> None:
    program = (
        "import sys, payloads\n"
        "from pathlib import Path\n"
        "from launcher import backends\n"
        "from launcher.folder import Attempt\n"
        "from selfguide.spec.config import ClusterConfig\n"
        "from selfguide.spec.run import write_record\n"
        "at = Attempt(Path(sys.argv[1]))\n"
        f"job = backends.Job(function=payloads.nap, argument=sys.argv[1], folder=at.logs, name='t',\n"
        f"    comment='c', tasks=2, timeout_min=5, code=Path({str(REPOSITORY)!r}))\n"
        "write_record(at.job, backends.of(ClusterConfig(kind='local')).submit(job))\n"
    )
    shell = subprocess.Popen([sys.executable, "-c", program, str(at.root)], start_new_session=True)
    assert shell.wait(timeout=180) == 0
    record = read_record(at.job)
    until(lambda: len(local._members([record])) >= 3)
    with contextlib.suppress(ProcessLookupError):  # nobody is left in it, which is the point
        os.killpg(shell.pid, signal.SIGINT)  # what Ctrl-C in that terminal would reach
    assert backends.state(record) == "running"
    assert os.getsid(record["pid"]) == record["pid"]


def test_gpus_are_the_device_files_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert local.gpus() == ["3", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local.gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert len(local.gpus()) == len(list(Path("/dev").glob("nvidia[0-9]*")))


def test_training_takes_a_gpu_for_each_rank_or_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, mine in {"": (), "0": (), "0,1": ("0", "1"), "4,5,6": ("4", "5")}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert jobs.training_devices(LOCAL) == mine


def test_clean_drops_an_outer_jobs_variables_and_keeps_which_slurm() -> None:
    outer = {
        "SLURM_CONF": "/c",
        "SLURM_CPU_BIND": "x",
        "SBATCH_EXPORT": "NONE",
        "SQUEUE_STATES": "COMPLETED",
        "SCANCEL_INTERACTIVE": "true",
        "PMIX_RANK": "1",
        "RANK": "3",
    }
    assert clean(outer | {"HOME": "/h", "SUBMITIT_EXECUTOR": "slurm"}) == {
        "SLURM_CONF": "/c",
        "HOME": "/h",
    }
