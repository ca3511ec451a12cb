"""The launcher on a real Slurm: ranks in place, failing and ending together, silence kept apart from absence."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from launcher import attempt, backends, cancel, jobs, submit, watch
from launcher.backends import slurm
from launcher.folder import Attempt
from launcher.reconcile import act, decide
from launcher.reconcile.view import LOOK_S, read
from selfguide.spec.files import read_config
from selfguide.spec.run import RunFolder, read_record
from shards.errors import UserError
from slurm import processes
from slurm.devcluster import Cluster

pytestmark = pytest.mark.cluster

PAYLOADS = Path(__file__).parents[1] / "launcher"


def until(condition: Callable[[], object], timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come about"
        time.sleep(0.1)


@pytest.fixture
def payloads(devcluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """What jobs do in place of the trainer; every job that is still there afterwards is cancelled."""
    monkeypatch.syspath_prepend(str(PAYLOADS))
    monkeypatch.setenv("PYTHONPATH", str(PAYLOADS))
    for name, value in devcluster.environment().items():
        monkeypatch.setenv(name, value)
    yield importlib.import_module("payloads")
    subprocess.run(["scancel", "--me"], check=True)


@pytest.fixture
def settings(digits: Path, tmp_path: Path) -> list[str]:
    return [
        "experiment=digits_dit",
        "cluster=devcluster",
        "nodes=2",
        f"data.root={digits}",
        f"runs={tmp_path / 'runs'}",
        "train.images=1280",
        "train.snapshot_every=640",
        "train.checkpoint_every=640",
        "train.log_every=640",
        "train.warmup_images=0",
        "evaluation=none",
        # a successor would train where a payload has ended
        "cluster.restart=none",
    ]


def send(settings: list[str], *more: str) -> Attempt:
    """Submits, and gives the newest attempt."""
    run = RunFolder(Path(submit.submit(submit.resolve([*settings, *more]))["folder"]))
    found = Attempt.newest(run)
    assert found is not None
    return found


def ended(at: Attempt) -> bool:
    return decide.training_state(read(at.run)) == "gone"


def test_ranks_stand_on_their_nodes_and_run_the_code_copy(
    payloads: ModuleType, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "train", payloads.look_around)
    monkeypatch.setenv("SLURM_CPU_BIND", "leaked")
    at = send(settings)
    until(lambda: ended(at))
    told = [json.loads((at.root / f"place-{rank}.json").read_text()) for rank in range(4)]
    assert [each["local_rank"] for each in told] == [0, 1, 0, 1]
    assert {each["world"] for each in told} == {4}
    assert len({each["environment"]["SLURMD_NODENAME"] for each in told}) == 2
    for each in told:
        assert each["cwd"] == str(at.code) and each["launcher"].startswith(str(at.code))
        assert each["environment"]["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert each["environment"].get("SLURM_CPU_BIND") != "leaked"
    assert len(list(at.logs.glob("*_log.out"))) == 4


def test_one_failed_rank_ends_the_others(
    payloads: ModuleType, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "train", payloads.fall)
    at = send(settings)
    until(lambda: ended(at))
    assert decide.failure(read(at.run)) == "rank 1: RuntimeError: rank one fell"
    assert decide.state(read(at.run)).word == "failed"
    assert read_record(at.root / "exit-0.json")["class"] == "signal"


def test_joined_while_it_runs_cancelled_and_resumed(
    payloads: ModuleType, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "train", payloads.nap)
    at = send(settings)
    until(lambda: decide.state(read(at.run)).word == "running")
    assert send(settings) == at
    assert [each["what"] for each in cancel.cancel(at.run)] == ["training"]
    assert decide.state(read(at.run)).word == "cancelled" and cancel.cancel(at.run) == []
    assert send(settings).number == 2


def test_a_job_that_no_record_names_is_found_by_its_comment(
    payloads: ModuleType, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "train", payloads.nap)
    at = send(settings)
    config = read_config(at.config)
    backends.of(config.cluster).submit(jobs.watcher(config, at, "lost", watch.entry, None))
    assert [each["what"] for each in cancel.cancel(at.run)] == ["training", "unrecorded job"]


def test_snapshots_are_scored_by_slurm_jobs_of_a_watcher_job(
    payloads: ModuleType, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watcher here is this process; the real one, a job of its own, is in the test of the main job."""
    monkeypatch.setattr(attempt, "train", payloads.publish_all)
    monkeypatch.setattr(attempt, "evaluate", payloads.score)
    monkeypatch.setattr(act, "launch_watcher", lambda *_, **__: {"kind": "local", "id": "none"})
    monkeypatch.setattr(slurm.Slurm, "poll_s", 0.2)
    at = send(settings, "evaluation=fd_digits", "evaluation.in_flight=2")
    watch.watch(at.run.root)
    row = decide.summary(read(at.run))
    assert (row.state, row.scored, row.score) == ("finished", 2, 7.0)
    assert {e.job.record["kind"] for e in read(at.run).evaluations} == {"devcluster"}


def test_two_watcher_jobs_of_a_run_never_run_together(
    payloads: ModuleType, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "train", payloads.nap)
    at = send(settings)
    config = read_config(at.config)
    pair = [
        backends.of(config.cluster).submit(jobs.watcher(config, at, "one", payloads.nap, None))
        for _ in range(2)
    ]
    until(lambda: backends.states(pair) == ["running", "queued"])
    backends.cancel(pair[0])
    until(lambda: backends.states(pair)[0] == "gone")


def test_silence_is_unknown_and_another_clusters_number_is_not_our_job(
    payloads: ModuleType, settings: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(attempt, "train", payloads.nap)
    at = send(settings)
    record = read_record(at.job)
    assert backends.state({**record, "comment": "/another/run"}) == "gone"
    monkeypatch.setattr(slurm, "ANSWER_S", 2.0)
    silent = tmp_path / "slurm.conf"
    silent.write_text(
        "ClusterName=none\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\nMessageTimeout=1\n"
    )
    assert backends.state({**record, "conf": str(silent)}) == "unknown"
    assert backends.state({**record, "conf": str(tmp_path / "removed")}) == "gone"  # taken down
    assert (
        backends.state({**record, "kind": "slurm", "conf": str(tmp_path / "removed")}) == "unknown"
    )


def test_what_slurm_would_refuse_is_refused_before_anything_is_written(
    payloads: ModuleType, settings: list[str], tmp_path: Path
) -> None:
    for wrong, part in {
        "cluster.partition=nowhere": "partitions here: debug, main",
        "nodes=32": "nodes=32",
    }.items():
        with pytest.raises(UserError) as raised:
            send(settings, wrong)
        assert part in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "runs").exists()


def test_without_a_cluster_the_cure_is_named(
    payloads: ModuleType, settings: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SELFGUIDE_DEVCLUSTER", str(tmp_path / "none"))
    with pytest.raises(UserError, match="make cluster-up"):
        send(settings)
    assert "SLURM_CONF" in os.environ


@pytest.mark.parametrize(
    ("payload", "kind", "name"),
    [("crash", "crash", "SIGSEGV"), ("vanish", "killed", "SIGKILL")],
)
def test_rank_ended_by_a_signal_is_named_with_it_though_slurm_accounts_for_nothing(
    payloads: ModuleType,
    settings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    payload: str,
    kind: str,
    name: str,
) -> None:
    monkeypatch.setattr(attempt, "train", getattr(payloads, payload))
    at = send(settings, "cluster.restart=none")
    until(lambda: ended(at))
    found = decide.cause(read(at.run).newest)
    assert (found.kind, found.rank, found.type) == (kind, "1", name)


def test_job_cancelled_at_slurm_is_told_from_one_that_the_launcher_cancelled(
    payloads: ModuleType, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "train", payloads.nap)
    at = send(settings, "cluster.restart=none")
    until(lambda: len(read(at.run).newest.starts) == 4)
    subprocess.run(["scancel", read_record(at.job)["id"]], check=True)
    until(lambda: ended(at))
    assert decide.cause(read(at.run).newest).kind == "outside"
    # as it is when the controller has forgotten the job
    act.keep_endings(read(at.run))
    monkeypatch.setattr(slurm.Slurm, "endings", lambda self, records, *_, **__: [{}] * len(records))
    assert decide.cause(read(at.run).newest).kind == "outside"
    assert decide.next_attempt(read(at.run)).action == "start"


def test_controller_that_hangs_leaves_states_unknown_at_once_and_a_cancel_for_later(
    payloads: ModuleType,
    devcluster: Cluster,
    settings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(attempt, "train", payloads.nap)
    at = send(settings)
    until(lambda: decide.state(read(at.run)).word == "running")
    (controller,) = [
        each for each in processes.members(devcluster.state) if each.name == "slurmctld"
    ]
    os.kill(controller.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "launcher.runs", "--runs", str(tmp_path / "runs"), "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        # the interpreter's start and a neighbour's load are no part of the patience
        assert time.monotonic() - began < LOOK_S + 20.0
        assert json.loads(done.stdout)[0]["state"] == "unknown"
        monkeypatch.setattr(slurm, "ANSWER_S", 1.0)
        with pytest.raises(UserError, match="recorded"):
            cancel.cancel(at.run)
        assert decide.state(read(at.run, patience_s=1.0)).word == "unknown"
        assert decide.next_attempt(read(at.run, patience_s=1.0)).kind == "cancelled"
    finally:
        os.kill(controller.pid, signal.SIGCONT)
        monkeypatch.setattr(slurm, "ANSWER_S", 20.0)
    assert watch.tend(read(at.run)) and decide.state(read(at.run)).word == "cancelled"
    assert subprocess.check_output(["squeue", "--me", "--noheader"], text=True) == ""
