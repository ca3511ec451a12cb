"""Arrays on this machine: tasks alone with their requests, joined, ended, and submitted again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import payloads
import pytest
from waiting import until

from launcher import array, backends
from launcher.backends import local
from launcher.folder import Attempt
from selfguide.spec.config import ClusterConfig
from shards.errors import UserError

LOCAL = ClusterConfig(kind="local", gpus_per_node=2)


@pytest.fixture(autouse=True)
def _payload(payload: Callable[..., None]) -> None:
    payload()  # tasks find `payloads`


def work(out: Path, *how: str) -> array.Work:
    """A task each that does so."""
    out.mkdir(exist_ok=True)
    requests = [{"rank": rank, "how": each, "out": str(out)} for rank, each in enumerate(how)]
    return array.Work(
        kind="share",
        id="abc",
        function=payloads.share,
        requests=requests,
        counted=str(out),
        of=len(how),
    )


def ended(folder: Path) -> bool:
    return all(task.state in array.ENDED for task in array.tasks(folder))


def test_a_task_that_fails_leaves_the_others_alone(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = work(tmp_path / "out", "do", "fall", "die")
    folder, new = array.submit(wanted, LOCAL, runs)
    assert new and folder == runs / "share" / "abc" / "attempts" / "0001"
    assert array.follow(folder) == 1
    found = array.tasks(folder)
    assert [task.state for task in found] == ["done", "failed", "lost"]
    assert found[1].message == "RuntimeError: task 1 fell"
    assert array.counted(folder) == (1, 3)
    spent = array.cost(folder)
    ran = [array._ran(folder / f"tasks/0000{number}", None) for number in range(3)]
    assert spent == {"seconds": round(sum(ran), 3), "unit": "rank"} and ran[0] > 0
    found_there = json.loads((tmp_path / "out" / "0.json").read_text())
    assert found_there["cwd"] == str(folder / "code")
    assert "Loading pickle" in Path(found[0].log).read_text()
    printed = capsys.readouterr().out
    assert "2 of 3 are missing: give the command that submitted the array again" in printed
    assert "task 1 failed: RuntimeError: task 1 fell" in printed and "task 2 lost: " in printed

    again, new = array.submit(wanted, LOCAL, runs)  # what has ended is not joined
    assert new and again.name == "0002"
    array.cancel(again)
    assert ended(again)


def test_an_array_at_work_is_joined_and_ends_when_cancelled(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = work(tmp_path / "out", "nap", "nap")
    folder, _ = array.submit(wanted, LOCAL, runs)
    assert array.submit(wanted, LOCAL, runs) == (folder, False)
    assert f"python -m launcher.array {folder} --cancel" in array.sentences(folder, True)
    until(lambda: len(list(folder.glob("tasks/*/start-0.json"))) == 2)
    assert array.main([str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["done"], shown["of"]) == (0, 2)
    assert [task["state"] for task in shown["tasks"]] == ["running", "running"]
    assert array.main([str(folder), "--cancel"]) == 0
    assert "ended 2 of 2 tasks" in capsys.readouterr().out
    assert ended(folder) and array.cancel(folder) == 0


def test_gpus_are_shared_out_among_local_tasks(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gpus, expected in {
        "": [(), (), ()],
        "4": [("4",)] * 3,
        "4,5,6,7": [("4", "7"), ("5",), ("6",)],
    }.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
        made = array._jobs(work(tmp_path, "do", "do", "do"), LOCAL, Attempt(runs / "1"))
        assert [job.devices for job in made] == expected
    assert len({job.argument for job in made}) == 3 and {job.tasks for job in made} == {1}
    slurm = ClusterConfig(kind="slurm", gpus_per_node=4, cpus_per_task=8, partition="gpu")
    script = backends.of(slurm).script(
        array._jobs(work(tmp_path, "do"), slurm, Attempt(runs / "1"))[0]
    )
    for flag in ("--gpus-per-node=4", "--cpus-per-task=8", "--nodes=1", "--ntasks-per-node=1"):
        assert flag in script


def test_a_refused_submission_leaves_nothing(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, jobs: object) -> None:
        raise UserError("sbatch refused")

    monkeypatch.setattr(local.Local, "submit_array", refuse)
    with pytest.raises(UserError, match="sbatch refused"):
        array.submit(work(tmp_path / "out", "do"), LOCAL, runs)
    assert [path.name for path in runs.glob("share/abc/*") if path.is_file()] == ["submit.lock"]
    assert not list(runs.glob("share/abc/attempts/*"))


def test_a_submission_that_breaks_off_ends_what_it_started(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = local._start, []

    def third_fails(job: backends.Job) -> backends.Record:
        if len(started) == 2:
            raise KeyboardInterrupt
        started.append({"kind": "local", **start(job)})
        return started[-1]

    monkeypatch.setattr(local, "_start", third_fails)
    wanted = work(tmp_path / "out", "nap", "nap", "nap")
    with pytest.raises(KeyboardInterrupt):
        array.submit(wanted, LOCAL, runs)
    assert backends.states(started) == ["gone", "gone"]
    monkeypatch.undo()
    again, new = array.submit(work(tmp_path / "out", "do"), LOCAL, runs)
    assert new and again.name == "0002"
    array.cancel(again)


def test_ctrl_c_while_slurm_answers_ends_its_jobs_and_keeps_their_code(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a queue that is a file and a Slurm of four scripts, of which sbatch is interrupted."""
    bin, queue, calls = (tmp_path / name for name in ("bin", "queue", "calls"))
    bin.mkdir()
    scripts = {
        "sbatch": f"""case "$*" in *test-only*) exit 0;; esac
            comment=$(sed -n 's/^#SBATCH --comment=//p' "$1" | tr -d "'\\"")
            for i in 0 1; do echo "7_$i|RUNNING|sg-share-abc|$comment"; done > {queue}
            echo "8|RUNNING|sg-share-abc|another" >> {queue}
            echo "9|RUNNING|another|$comment" >> {queue}; kill -INT $PPID; sleep 5""",
        "squeue": f"echo squeue >> {calls}; cat {queue}",
        "scancel": f'echo scancel "$@" >> {calls}; grep -v ^7_ {queue} > {queue}.new; mv {queue}.new {queue}',
        "srun": "exit 1",
    }
    for name, text in scripts.items():
        (bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    slurm = ClusterConfig(kind="slurm")
    with pytest.raises(KeyboardInterrupt):
        array.submit(work(tmp_path / "out", "nap", "nap"), slurm, runs)
    assert [line.partition("|")[0] for line in queue.read_text().splitlines()] == ["8", "9"]
    asked = calls.read_text().splitlines()
    assert [line for line in asked if "scancel" in line] == ["scancel 7_0 7_1"] and len(asked) <= 4
    folder = runs / "share" / "abc" / "attempts" / "0001"
    assert (folder / "code").is_dir() and len([*folder.glob("tasks/*/request.json")]) == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster=slrum"], "cluster=slrum does not exist; did you mean 'slurm'"),
        (["cluster=slurm", "cluster.partitoin=x"], "unknown key 'cluster.partitoin'"),
        (["cluster=slurm", "cluster.gpus_per_node=none"], "cluster.gpus_per_node"),
        (["cluster=slurm", "cluster.gpus_per_node=0"], "cluster.gpus_per_node=0"),
        (["cluster=slurm", "cluster.timeout_min=0"], "cluster.timeout_min=0"),
        (["cluster=slurm", "cluster.environment.AWS_SECRET_ACCESS_KEY=x"], "AWS_SECRET_ACCESS_KEY"),
        (["cluster=local", "nodes=2"], "'nodes=2' says nothing of a cluster"),
        (["cluster=local", "cluster.x y"], "says nothing of a cluster"),
    ],
)
def test_a_cluster_that_is_none_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        array.cluster_of(overrides)
    assert message in str(raised.value)


def test_settings_of_a_cluster_are_those_of_a_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    made = array.cluster_of(["cluster=slurm", "cluster.partition=gpu", "cluster.environment.A=b"])
    assert (made.kind, made.partition, made.environment) == ("slurm", "gpu", {"A": "b"})
    assert made.gpus_per_node == 8 and made.cpus_per_task == 8  # the profile's
    monkeypatch.setattr(os, "environ", {**os.environ, "PATH": "/nowhere"})
    assert array.cluster_of(["cluster=auto"]).kind == "local"


def test_an_array_of_the_former_layout_is_joined(runs: Path, tmp_path: Path) -> None:
    wanted = work(tmp_path / "out", "nap")
    folder, _ = array.submit(wanted, LOCAL, runs)
    early = folder.parents[1] / "3"
    folder.rename(early)
    assert array.submit(wanted, LOCAL, runs) == (early, False)
    array.cancel(early)
    assert array.submit(wanted, LOCAL, runs)[0].parent.name == "attempts"


def test_a_folder_that_is_no_array_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder of an array"):
        array.main([str(tmp_path)])
