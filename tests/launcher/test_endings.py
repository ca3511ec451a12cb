"""How a job ended: what Slurm's lines in a log say, and whom is asked when the controller has forgotten it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher import backends
from launcher.backends.endings import said_in

STEP = "slurmstepd: error: *** STEP 12.0 ON n1 CANCELLED AT 2026-11-28T15:04:40"
JOB = "slurmstepd: error: *** JOB 12 ON n1 CANCELLED AT 2026-11-28T15:04:40"

# of the end of a log, what is known from it; lines as Slurm 20.11 to 23.11 write them
LINES = {
    "srun: error: n1: task 1: Killed": {"signals": {"1": 9}, "nodes": {"1": "n1"}, "first": "1"},
    "srun: error: n1: tasks 2-3: Killed": {"signals": {"2": 9, "3": 9}},
    "srun: error: n1: tasks 0,2-3: Terminated": {"signals": {"0": 15, "2": 15, "3": 15}},
    "srun: error: n1: task 1: Segmentation fault (core dumped)": {"signals": {"1": 11}},
    "srun: error: n1: task 1: Aborted": {"signals": {"1": 6}},
    "srun: error: n1: task 1: Bus error (core dumped)": {"signals": {"1": 7}},
    "srun: error: n1: task 1: Exited with exit code 7": {"codes": {"1": 7}, "first": "1"},
    # by a container between
    "srun: error: n1: task 1: Exited with exit code 137": {"signals": {"1": 9}, "codes": {}},
    "srun: error: n1: task 1: Exited with exit code 139": {"signals": {"1": 11}, "codes": {}},
    "srun: error: n1: task 1: Exited with exit code 255": {"signals": {}, "codes": {"1": 255}},
    "srun: error: n1: task 1: Out Of Memory": {"signals": {"1": 9}, "log_state": "OUT_OF_MEMORY"},
    "srun: error: Aborting, io error and missing step on node 1": {"lost_steps": [1]},
    "srun: error: Cannot communicate with node 1.  Aborting job.": {"lost_steps": [1]},
    "srun: error: Node failure on n3": {"lost_nodes": ["n3"], "log_state": "NODE_FAIL"},
    f"{STEP} DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***": {"log_state": "NODE_FAIL"},
    f"{STEP} DUE TO TIME LIMIT ***": {"log_state": "TIMEOUT"},
    f"{JOB} DUE TO TIME LIMIT ***": {"log_state": "TIMEOUT"},
    f"{JOB} DUE TO PREEMPTION ***": {"log_state": "PREEMPTED"},
    f"{JOB} DUE TO JOB REQUEUE ***": {"log_state": "REQUEUED"},
    f"{JOB} ***": {"log_state": "CANCELLED"},
    f"{JOB} DUE to SIGNAL Terminated ***": {"log_state": "CANCELLED"},
    "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=12.0. Some of your processes may have been killed by "
    "the cgroup out-of-memory handler.": {"log_state": "OUT_OF_MEMORY"},
    "slurmstepd: error: Detected 2 oom_kill events in StepId=12.0. Some of the step tasks have been OOM Killed.": {
        "log_state": "OUT_OF_MEMORY"
    },
    "slurmstepd: error: Step 12.0 exceeded memory limit (1100 > 1000), being killed": {
        "log_state": "OUT_OF_MEMORY"
    },
    "slurmstepd: error: Exceeded job memory limit": {"log_state": "OUT_OF_MEMORY"},
    "[1234.5] Out of memory: Killed process 4711 (python) total-vm:1kB": {
        "log_state": "OUT_OF_MEMORY"
    },
    "Memory cgroup out of memory: Killed process 4711 (python)": {"log_state": "OUT_OF_MEMORY"},
}


@pytest.mark.parametrize("line", LINES)
def test_line_of_slurm_in_a_log_tells_how_the_job_ended(line: str) -> None:
    found = said_in(f"epoch 3\n{line}\n")
    assert {name: found.get(name) for name in LINES[line]} == LINES[line]
    assert not line.startswith("s") or found["said"] == [line]


@pytest.mark.parametrize(
    "line",
    [
        # what srun does to the others when a rank failed
        f"{STEP} ***",
        f"{STEP} DUE to SIGNAL Killed ***",
        "srun: Job step aborted: Waiting up to 32 seconds for job step to finish.",
        "ValueError: srun: error: n1: task 1: Killed",
        "srun: error: n1: task ,: Killed",
        "ValueError: the step was ended DUE TO TIME LIMIT",
        "",
    ],
)
def test_line_that_tells_no_cause_is_not_taken_for_one(line: str) -> None:
    assert {*said_in(line)} <= {"said"}


def test_first_rank_of_the_log_is_the_one_that_failed_first() -> None:
    log = (
        "srun: error: n2: task 3: Exited with exit code 7\n"
        "srun: error: n1: tasks 0-1: Killed\n"
        "srun: error: n2: task 2: Segmentation fault (core dumped)\n"
    )
    found = said_in(log)
    assert found["first"] == "3"
    assert found["signals"] == {"0": 9, "1": 9, "2": 11} and found["codes"] == {"3": 7}
    assert found["nodes"] == {"0": "n1", "1": "n1", "2": "n2", "3": "n2"}


# ---- whom is asked -----------------------------------------------------------------------------------

TIMES = {"ended": 1795878280.0, "limit_s": 300.0}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PATH for commands that stand in for Slurm's, and the time zone of their times."""
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(bin))
    monkeypatch.setenv("TZ", "UTC")
    return bin


def says(bin: Path, name: str, line: str, code: int = 0) -> None:
    (bin / name).write_text(f"#!{bin}/sh\necho '{line}'\nexit {code}\n")
    (bin / name).chmod(0o755)


def ending(tmp_path: Path, *, deep: bool = True) -> dict:
    record = {"kind": "slurm", "id": "12", "comment": "/a run", "name": "sg-a-train", "conf": None}
    (found,) = backends.endings([{**record, "folder": str(tmp_path / "job")}], 2.0, deep=deep)
    return found


def test_without_any_of_slurms_commands_the_log_is_all_there_is(
    tmp_path: Path, asked: Path
) -> None:
    assert ending(tmp_path) == {}
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "12_0_log.out").write_text("srun: error: n2: task 1: Killed\n")
    assert ending(tmp_path)["signals"] == {"1": 9}


def test_squeue_that_knows_the_job_is_asked_alone(tmp_path: Path, asked: Path) -> None:
    says(asked, "squeue", "12|TIMEOUT 2026-11-28T15:04:40 5:00 TimeLimit|sg-a-train|/a run")
    says(asked, "sacct", "12|sg-a-train|FAILED|2026-11-28T15:04:40|00:05:00")
    assert ending(tmp_path) == {"state": "TIMEOUT", **TIMES}


@pytest.mark.parametrize("word", ["RUNNING", "PENDING", "REQUEUED"])
def test_job_that_was_started_once_more_says_nothing_of_its_end_before(
    tmp_path: Path, asked: Path, word: str
) -> None:
    says(asked, "squeue", f"12|{word} 2026-11-28T15:04:40 5:00 None|sg-a-train|/a run")
    says(asked, "sacct", f"12|sg-a-train|{word}|Unknown|00:05:00")
    assert ending(tmp_path) == {}


def test_scontrol_stands_in_for_a_missing_squeue(tmp_path: Path, asked: Path) -> None:
    line = "JobId=12 JobName=sg-a-train JobState=NODE_FAIL Reason=NodeDown TimeLimit=00:05:00 "
    line += "EndTime=2026-11-28T15:04:40 Comment=/a run StdErr=/x"
    says(asked, "scontrol", line)
    assert ending(tmp_path) == {"state": "NODE_FAIL", **TIMES}
    says(asked, "scontrol", line.replace("/a run", "/another"))
    assert ending(tmp_path) == {}


@pytest.mark.parametrize(
    ("word", "state"),
    [("PENDING", "queued"), ("RUNNING", "running"), ("COMPLETING", "running"), ("FAILED", "gone")],
)
def test_state_of_a_job_is_known_without_squeue(asked: Path, word: str, state: str) -> None:
    line = f"JobId=14 ArrayJobId=12 ArrayTaskId=3 JobName=x JobState={word} Reason=None "
    says(asked, "scontrol", f"{line}TimeLimit=00:05:00 EndTime=Unknown Comment=/a")
    record = {"kind": "slurm", "id": "12_3", "comment": "/a", "conf": None}
    assert backends.states([record]) == [state]
    says(asked, "scontrol", f"{line}TimeLimit=1 EndTime=Unknown Comment=/a".replace("=3", "=1-4%2"))
    assert backends.states([record]) == [state]


def test_jobs_of_another_users_run_are_asked_for_by_his_number(
    tmp_path: Path, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(asked, "squeue", "")
    (asked / "squeue").write_text(
        f'#!{asked}/sh\necho "$@" >> {tmp_path}/said\necho "14|RUNNING|x|{tmp_path}"\n'
    )
    mine = {"kind": "slurm", "id": "14", "comment": str(tmp_path), "conf": None}
    assert backends.states([mine]) == ["running"]
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert backends.states([mine]) == ["running"]
    said = (tmp_path / "said").read_text().splitlines()
    assert [line.split()[0] for line in said] == ["--me", f"--user={owner},{owner + 1}"]


def test_sacct_is_asked_about_a_job_that_the_controller_has_forgotten(
    tmp_path: Path, asked: Path
) -> None:
    says(asked, "squeue", "13|RUNNING Unknown 5:00 None|other|/b")
    says(asked, "sacct", "12|sg-a-train|CANCELLED by 0|2026-11-28T15:04:40|00:05:00")
    assert ending(tmp_path) == {"state": "CANCELLED", "by": "root", **TIMES}
    assert ending(tmp_path, deep=False) == {}


def test_job_of_another_name_in_the_accounting_is_of_a_slurm_that_counts_anew(
    tmp_path: Path, asked: Path
) -> None:
    says(asked, "squeue", "")
    says(asked, "sacct", "12|sg-b-train|FAILED|2026-11-28T15:04:40|00:05:00")
    assert ending(tmp_path) == {}


def test_accounting_that_is_off_leaves_the_reason_unknown(tmp_path: Path, asked: Path) -> None:
    says(asked, "squeue", "")
    says(asked, "sacct", "Slurm accounting storage is disabled", code=1)
    assert ending(tmp_path) == {}
