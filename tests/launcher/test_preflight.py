"""What a node is asked before an attempt trains: strays of older attempts, memory, disks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.attempt import preflight
from launcher.attempt.exits import Exit
from selfguide.spec.nodes import NodeRefused
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.run import Lease, RunFolder, write_record
from shards.errors import FencedError, NoRoomError
from tests.launcher.waiting import until

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with three attempts, of jobs 11, 12 and 13."""
    found = RunFolder(tmp_path / "runs" / "digits" / "a1")
    for number in (1, 2, 3):
        write_record(found.attempt(number) / "job.json", {"id": str(10 + number)})
    return found


@pytest.fixture
def start(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts something that looks like a rank of a job; this process is one of job 12, the second attempt's."""
    started: list[subprocess.Popen[bytes]] = []
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)

    def begin(job: str, folder: str = "attempts/0001/job", **more: str) -> subprocess.Popen[bytes]:
        environment = {"SLURM_JOB_ID": job, "SLURMD_NODENAME": "n1", **more}
        command = [sys.executable, "-c", "input()", str(run.root / folder)]
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
        started.append(process)
        # Popen returns when exec has closed its pipe, a moment before the kernel shows the new environment
        until(Path(f"/proc/{process.pid}/environ").read_bytes)
        return process

    yield begin
    for each in started:
        each.kill()
        each.wait()


def strays(run: RunFolder) -> set[int]:
    lease = Lease(run, 2)
    older = preflight._older_jobs(lease)
    return {each.pid for each in preflight.strays(run.root, older, os.environ)}


def test_strays_are_ranks_of_older_attempts_on_this_node(run: RunFolder, start: Start) -> None:
    rank = start("11")
    child = start("11", "elsewhere", SUBMITIT_FOLDER=str(run.root / "attempts/0001/job"))
    former_life = start("12", "attempts/0001/successor")
    environment = {**os.environ, "SLURM_RESTART_COUNT": "1"}
    others = [
        start("12"),  # ours
        start("13"),  # of a newer attempt
        start("77"),  # of a job that is no attempt's
        start("11", "attempts/0001/watch"),
        start("11", "evals/jobs/img-1.1"),
        start("11", "../b2/attempts/0001/job"),  # of another run
        start("11", SLURMD_NODENAME="n2"),
    ]
    assert strays(run) == {rank.pid, child.pid}
    older = preflight._older_jobs(Lease(run, 2))
    again = {each.pid for each in preflight.strays(run.root, older, environment)}
    assert again == {rank.pid, child.pid, former_life.pid, others[0].pid}


def test_a_stray_is_ended_and_nothing_else(run: RunFolder, start: Start) -> None:
    stray, ours = start("11"), start("12")
    # one that hangs hears no other signal
    os.kill(stray.pid, signal.SIGSTOP)
    preflight.end_strays(Lease(run, 2))
    assert stray.wait(5) == -signal.SIGKILL
    assert ours.poll() is None


def test_a_stray_that_cannot_be_ended_refuses_the_node(
    run: RunFolder, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    start("11")
    monkeypatch.setattr(preflight, "_kill", lambda stray, proc: False)
    with pytest.raises(NodeRefused) as caught:
        preflight.end_strays(Lease(run, 2))
    assert (caught.value.node, caught.value.check) == ("n1", "strays")
    ended = Exit.of(caught.value, RankStatus())
    assert (ended.kind, ended.code, ended.node, ended.check) == ("node", 88, "n1", "strays")


@pytest.fixture
def attempt(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The newest attempt of the run, with a config for a cluster."""
    from launcher.compose import compose
    from selfguide.spec.files import to_yaml

    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    words = ["experiment=digits_dit", "cluster=slurm", "cluster.gpus_per_node=1", "nodes=1"]
    folder = run.attempt(3)
    (folder / "config.yaml").write_text(to_yaml(compose(words)))
    return folder


def test_look_at_a_node_that_is_well_passes(attempt: Path) -> None:
    preflight.look(attempt)


@pytest.mark.parametrize(
    ("name", "value", "check"),
    [("available_memory", 1 << 20, "memory"), ("free_bytes", 1 << 10, "disk")],
)
def test_look_at_a_node_without_room_refuses_it(
    attempt: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: int, check: str
) -> None:
    monkeypatch.setattr(preflight, name, lambda *_: value)
    with pytest.raises(NodeRefused) as caught:
        preflight.look(attempt)
    assert caught.value.check == check


def test_look_where_the_disk_of_runs_is_full_blames_no_node(
    attempt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "free_bytes", lambda folder: 0 if folder == attempt else 1 << 40)
    with pytest.raises(NoRoomError, match="make room"):
        preflight.look(attempt)


def test_look_of_an_attempt_that_was_overtaken_ends_nothing(
    run: RunFolder, attempt: Path, start: Start
) -> None:
    newer = start("13", "attempts/0003/job")
    (run.attempt(2) / "config.yaml").write_bytes((attempt / "config.yaml").read_bytes())
    with pytest.raises(FencedError):
        preflight.look(run.attempt(2))
    assert newer.poll() is None


def test_available_memory_is_what_linux_says(tmp_path: Path) -> None:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:  16 kB\nMemAvailable:    8 kB\n")
    assert preflight.available_memory(path) == 8 << 10
