"""Attempts that are launched on a Slurm which is not there: its programs are scripts of the test."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher import backends, jobs, submit
from launcher.compose import compose
from launcher.folder import Attempt
from launcher.reconcile import act, decide, launch
from selfguide.spec.config import Config
from selfguide.spec.files import read_config
from selfguide.spec.run import RunFolder, read_record, write_record
from shards.errors import UserError

LIMIT = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """slurm(refuses=PATTERN): an sbatch that takes all jobs but those whose script matches; returns its log."""
    bin, log = tmp_path / "bin", tmp_path / "scripts"
    bin.mkdir()

    def make(refuses: str = "nothing") -> Path:
        programs = {
            "sbatch": f"""case "$1" in --test-only) exit 0;; esac
if grep -qE '{refuses}' "$1"; then echo "sbatch: error: {LIMIT}" >&2; exit 1; fi
cat "$1" >> {log}; echo "Submitted batch job $(grep -c '^#!/bin/bash' {log})" """,
            "srun": "exit 0",
            "squeue": "exit 0",
            "scancel": "exit 0",
        }
        for name, text in programs.items():
            (bin / name).write_text(f"#!/bin/sh\n{text}\n")
            (bin / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
        return log

    return make


def sent(settings: list[str], *more: str) -> dict:
    words = [*settings, "cluster=slurm", "cluster.gpus_per_node=2", *more]
    return submit.submit(submit.resolve(words))


def test_a_second_job_of_the_same_name_waits_behind_training(
    slurm: Callable[..., Path], settings: list[str]
) -> None:
    log = slurm()
    told = sent(settings)
    at = Attempt(RunFolder(Path(told["folder"])).attempt(1))
    names = [line for line in log.read_text().splitlines() if "--job-name" in line]
    assert len(names) == 2 and len(set(names)) == 1
    assert log.read_text().count("#SBATCH --dependency=singleton") == 1
    job, successor = read_record(at.job), read_record(at.successor)
    assert job is not None and successor is not None
    assert (job["id"], successor["id"]) == ("1", "2") and told["notes"] == []
    record = read_record(at.submission)
    assert record is not None and record["by_hand"] and record["timeout_min"] == 1440


def test_a_job_that_was_taken_without_a_word_is_withdrawn_and_submitted_once_more(
    slurm: Callable[..., Path], settings: list[str], tmp_path: Path
) -> None:
    log, queue = slurm(), tmp_path / "queue"
    queue.touch()
    programs = tmp_path / "bin"
    sbatch = (programs / "sbatch").read_text()
    told = "Batch job submission failed: Socket timed out on send/recv operation"
    lost = f"""if [ ! -s {queue} ] && [ "$1" != --test-only ]; then
echo "7 $(grep -o 'output=.*' "$1" | cut -d= -f2)" > {queue}
echo "8 /elsewhere/8_0_log.out" >> {queue}
echo "sbatch: error: {told}" >&2; exit 1; fi"""
    (programs / "sbatch").write_text(sbatch.replace("#!/bin/sh", f"#!/bin/sh\n{lost}"))
    (programs / "squeue").write_text(f'#!/bin/sh\ncase "$*" in *STDOUT*) cat {queue};; esac\n')
    (programs / "scancel").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "ended"}\n')
    done = sent(settings)
    assert done["attempt"] == 1 and done["job"] == "slurm 1"
    assert (tmp_path / "ended").read_text() == "7\n"
    assert log.read_text().count("#!/bin/bash") == 2


def test_where_no_second_job_may_wait_the_job_is_requeued_and_that_is_said(
    slurm: Callable[..., Path], settings: list[str]
) -> None:
    log = slurm("dependency=singleton")
    told = sent(settings)
    at = Attempt(RunFolder(Path(told["folder"])).attempt(1))
    assert told["attempt"] == 1 and at.run.attempt_numbers() == [1]
    assert read_config(at.config).cluster.restart == "requeue"
    (note,) = told["notes"]
    assert "cluster.restart=requeue" in note and "submit limit" in note
    last = log.read_text().rpartition("#!/bin/bash")[2]
    assert "#SBATCH --requeue" in last and "scontrol requeue $SLURM_JOB_ID" in last
    assert last.rstrip().endswith("exit $code")
    assert not at.successor.exists()


def test_where_no_second_job_may_wait_the_watcher_looks_after_the_run(
    slurm: Callable[..., Path], settings: list[str]
) -> None:
    slurm("dependency=singleton$")
    told = sent(settings, "evaluation=fd_digits")
    (note,) = told["notes"]
    assert "watcher" in note and told["watcher"]
    assert not Attempt(RunFolder(Path(told["folder"])).attempt(1)).successor.exists()


def test_restart_none_queues_one_job(slurm: Callable[..., Path], settings: list[str]) -> None:
    log = slurm()
    sent(settings, "cluster.restart=none")
    assert log.read_text().count("#!/bin/bash") == 1


def test_the_watcher_starts_the_next_attempt_once(
    slurm: Callable[..., Path], settings: list[str]
) -> None:
    """Where training and its successor are gone without a word."""
    slurm()
    told = sent(settings)
    run = RunFolder(Path(told["folder"]))
    first = Attempt(run.attempt(1))
    # else its ranks would be expected for two minutes
    for rank in range(2):
        write_record(first.root / f"start-{rank}.json", {})
        write_record(
            first.root / f"exit-{rank}.json",
            {"code": 76, "class": "preempted", "message": "ended by SIGTERM"},
        )
    opened = launch.go_on(run)
    assert opened is not None and opened.number == 2
    record = read_record(opened.submission)
    assert record is not None and not record["by_hand"]
    assert opened.successor.exists()


def test_a_job_that_another_one_has_replaced_leaves(
    slurm: Callable[..., Path], settings: list[str]
) -> None:
    slurm()
    run = RunFolder(Path(sent(settings)["folder"]))
    assert launch.read_in(run, "77") is None
    view = launch.read_in(run, "2")
    assert view is not None and decide.next_attempt(view).action == "start"
    assert launch.take_over(run, "77", run.root)[0] is None
    assert run.attempt_numbers() == [1]


def test_the_job_that_waited_becomes_the_next_attempt_with_its_own_successor(
    slurm: Callable[..., Path], settings: list[str]
) -> None:
    slurm()
    run = RunFolder(Path(sent(settings)["folder"]))
    first = Attempt(run.attempt(1))
    (first.root / "successor" / "2_0_log.out").touch()
    write_record(first.root / "progress.json", {"save_s": 45.2})
    at, _ = launch.take_over(run, "2", first.root / "successor")
    assert at is not None and at.number == 2
    job, waits = read_record(at.job), read_record(at.successor)
    assert job is not None and waits is not None
    assert (job["id"], job["conf"], waits["id"]) == ("2", None, "3")
    assert at.code.resolve() == first.code and at.code.with_suffix(".json").exists()
    assert [path.name for path in at.logs.glob("*_log.out")] == ["2_0_log.out"]
    script = next((at.root / "successor").glob(".submission_file*")).read_text()
    # twice the slowest save so far, and a minute
    assert "#SBATCH --signal=USR2@151" in script
    assert f"cd {first.code}" in script


def test_ranks_that_still_save_are_waited_for_before_they_are_overtaken(
    slurm: Callable[..., Path],
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after an scancel: the job ends, its successor starts, and the ranks have until KillWait."""
    slurm()
    run = RunFolder(Path(sent(settings)["folder"]))
    first = Attempt(run.attempt(1))
    for rank in range(2):
        write_record(first.root / f"start-{rank}.json", {})
    queue = f"1|COMPLETING|x|{run.root}"
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\necho '{queue}'\n")
    ended = {"code": 75, "class": "preempted", "message": "ended by SIGTERM"}
    naps = []

    def save(seconds: float) -> None:
        naps.append(seconds)
        write_record(first.root / f"exit-{2 - len(naps)}.json", ended)

    clock = SimpleNamespace(monotonic=time.monotonic, time=time.time, sleep=save)
    monkeypatch.setattr(launch, "time", clock)
    at, _ = launch.take_over(run, "2", first.root / "successor")
    assert at is not None and len(naps) == 2


def test_a_cancelled_run_is_not_taken_over(slurm: Callable[..., Path], settings: list[str]) -> None:
    slurm()
    run = RunFolder(Path(sent(settings)["folder"]))
    write_record(Attempt(run.attempt(1)).cancelled, {"by": "me", "done": None})
    assert launch.take_over(run, "2", run.root)[0] is None
    assert act.cancel(run) == []
    assert launch.go_on(run) is None and run.attempt_numbers() == [1]


@pytest.mark.parametrize(("save_s", "least"), [(None, 2), (100.0, 7)])
def test_a_limit_without_time_to_save_is_refused_with_the_least_that_will_do(
    save_s: float | None, least: int
) -> None:
    def config(minutes: int) -> Config:
        words = ["experiment=digits_dit", "cluster=slurm", f"cluster.timeout_min={minutes}"]
        return compose(words)

    with pytest.raises(UserError, match=rf"cluster.timeout_min={least - 1}.*at least {least}"):
        jobs.check_limit(config(least - 1), save_s)
    jobs.check_limit(config(least), save_s)
    # a run that goes on by itself is not stopped by a save that took longer than before
    shown = [jobs.warning(config(minutes), save_s) for minutes in (least - 1, 2 * least + 2)]
    assert shown == [30 * (least - 1), 61 if save_s is None else 260]


def test_the_fallback_is_in_the_json_of_the_command(
    slurm: Callable[..., Path], settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    slurm("dependency=singleton")
    words = [*settings, "cluster=slurm", "cluster.gpus_per_node=2"]
    assert submit.main([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["notes"]) == 1
    assert submit.main(words) == 0


@pytest.mark.parametrize(
    ("more", "waits"),
    [
        (["nodes=3", "cluster.partition=gpu"], True),
        (["nodes=3"], True),
        (["nodes=4"], False),
        (["nodes=2", "cluster.partition=gpu"], True),
        (["nodes=1", "cluster.partition=gpu"], False),
        (["nodes=3", "cluster.gpus_per_node=8", "train.batch=96"], False),
        (["nodes=3", "cluster.mem_gb=500"], False),
        (["nodes=3", "cluster.partition=cpu"], False),
    ],
)
def test_nodes_out_of_service_are_waited_for_where_they_would_do(
    more: list[str],
    waits: bool,
    slurm: Callable[..., Path],
    settings: list[str],
    tmp_path: Path,
) -> None:
    """As Slurm 22.05 answers: of a job that no nodes fit for now it says the same as of one that none ever will."""
    slurm()
    rows = [
        "n1|idle|64|480000|gpu:a100:4(S:0-1)|gpu*",
        "n2|drain|64|480000|gpu:a100:4(S:0-1)|gpu*",
        "n3|down*|64|480000|gpu:4|gpu*",
        *(f"c{i}|idle|64|480000|(null)|cpu" for i in range(9)),
    ]
    refusal = "allocation failure: Requested node configuration is not available"
    for name, text in {
        "sbatch": f"echo '{refusal}' >&2; exit 1",
        "sinfo": f"cat {tmp_path / 'rows'}",
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "rows").write_text("\n".join(rows) + "\n")
    words = [
        "cluster=slurm",
        "cluster.gpus_per_node=4",
        "cluster.cpus_per_task=1",
        "train.batch=48",
    ]
    config = compose([*settings, *words, *more])
    job = jobs.training(config, Attempt(tmp_path / "attempts/0001"), "r")
    if waits:
        (note,) = backends.of(config.cluster).check(job)
        assert "n2 is drain" in note and "n3 is down*" in note and "1 of the 3" in note
    else:
        with pytest.raises(UserError, match="Slurm would refuse"):
            backends.of(config.cluster).check(job)
