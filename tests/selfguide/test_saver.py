"""Checkpoints that a process of its own writes: what they hold, and that neither its death nor a full disk harms."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from selfguide.distributed import RankInfo
from selfguide.spec.run import Lease, RunFolder
from selfguide.training import checkpoint
from selfguide.training.loop import advance
from selfguide.training.saver import Saver
from selfguide.training.work import Training
from selfguide.training.writer_process import WriterDiedError
from shards import storage
from shards.errors import FencedError, NoRoomError, StoreError
from tests.selfguide.test_loop import BATCH, begun
from tests.shards.disks import disk


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def saving(
    root: Path, closing: ExitStack, policy: Literal["stop", "go_on"] = "stop"
) -> tuple[Training, Saver]:
    """A run behind its first step, and what saves it."""
    job = begun(root / "run", 0)
    job.lease.run.attempt(1).mkdir(parents=True, exist_ok=True)
    train = replace(job.config.train, save_failed=policy)
    saver = Saver(train, job.rank_info, job.lease, job.telemetry)
    closing.callback(saver.close, wait=True)
    advance(job)
    return job, saver


def writer_pid(saver: Saver) -> int:
    process = saver.writer._process
    assert process is not None
    return process.pid


def save(job: Training, saver: Saver) -> None:
    saver.save(job.lease.run.checkpoint(job.state.images), job.state)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written_here(job: Training, root: Path) -> dict[str, bytes]:
    """The files of a checkpoint of now that is waited for."""
    run = RunFolder(root / "here")
    run.attempt(1).mkdir(parents=True)
    folder = run.checkpoint(job.state.images)
    checkpoint.save(folder, job.state, job.rank_info, Lease(run, 1))
    return bytes_of(folder)


def test_a_snapshot_is_written_as_it_was_while_training_goes_on(
    single: RankInfo, tmp_path: Path, closing: ExitStack
) -> None:
    """The writer is stopped: no step waits for it, and what it writes is of the step at which it was asked."""
    job, saver = saving(tmp_path, closing)
    wanted = written_here(job, tmp_path)
    os.kill(writer_pid(saver), signal.SIGSTOP)
    save(job, saver)
    for _ in range(3):
        advance(job)
        saver.poll()
    run = job.lease.run
    assert run.saved() == [] and job.telemetry.status.saved == 0
    os.kill(writer_pid(saver), signal.SIGCONT)
    saver.wait()
    assert run.saved() == [BATCH] and job.telemetry.status.saved == BATCH
    assert bytes_of(run.checkpoint(BATCH)) == wanted, "to the byte, manifest included"
    assert storage.read_complete(run.checkpoint(BATCH), verify="hashes") is not None
    save(job, saver)
    saver.wait()
    assert run.saved() == [BATCH, 4 * BATCH]
    assert saver.writer.cpu_s > 0


def test_what_is_copied_to_a_store_by_the_time_a_save_is_published_stays(
    single: RankInfo, tmp_path: Path, closing: ExitStack
) -> None:
    """The one before it was published, and its copy begun, after the save had its snapshot."""
    job, saver = saving(tmp_path, closing)
    save(job, saver)
    saver.wait()
    first = job.state.images
    advance(job)
    busy: list[int] = []
    folder = job.lease.run.checkpoint(job.state.images)
    saver.save(folder, job.state, lambda: {"keep": 1, "busy": busy[-1]})
    busy.append(first)
    saver.wait()
    assert job.lease.run.saved() == [first, job.state.images]


def test_a_save_takes_as_long_as_its_copy_and_its_writer_whatever_is_trained_meanwhile(
    single: RankInfo, tmp_path: Path, closing: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warnings before a time limit go by it; the ranks hear of the end some steps later, however long those are."""
    job, saver = saving(tmp_path, closing)
    answers, took = saver.writer.answers, []

    def heard(*, wait: bool = False) -> Any:
        found = answers(wait=wait)
        if found is not None:
            took.append(saver.writer.took_s)
        return found

    monkeypatch.setattr(saver.writer, "answers", heard)
    began = time.monotonic()
    save(job, saver)
    copy = time.monotonic() - began
    for _ in range(5):
        advance(job)
        saver.poll()
    # the stream has sixteen steps, and a writer that gives way to training may take longer than those
    while job.telemetry.status.saved != BATCH:
        time.sleep(0.01)
        saver.poll()
    assert len(took) == 2, "parts, then the manifest"
    assert job.telemetry._save_s is not None
    assert 0 < job.telemetry._save_s - sum(took) <= copy


def test_a_rank_that_waits_for_its_writer_says_that_it_saves(
    single: RankInfo, tmp_path: Path, closing: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What moves in no step's time is no hang then."""
    job, saver = saving(tmp_path, closing)
    status, sections = job.telemetry.status, []
    look = saver._look
    monkeypatch.setattr(
        saver, "_look", lambda **how: (sections.append(status.section), look(**how))
    )
    status.enter("train")
    save(job, saver)
    saver.wait()
    assert {*sections} == {"checkpoint"} and status.section == "train"


def test_a_writer_that_is_killed_is_replaced_and_the_snapshot_written(
    single: RankInfo, tmp_path: Path, closing: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    job, saver = saving(tmp_path, closing)
    wanted, first = written_here(job, tmp_path), writer_pid(saver)
    os.kill(first, signal.SIGSTOP)
    save(job, saver)
    os.kill(first, signal.SIGKILL)
    advance(job)
    saver.wait()
    assert writer_pid(saver) != first
    assert bytes_of(job.lease.run.checkpoint(BATCH)) == wanted
    assert "SIGKILL" in caplog.text and str(first) in caplog.text


@pytest.mark.parametrize("policy", ["stop", "go_on"])
def test_a_writer_that_dies_twice_ends_the_save_by_policy(
    single: RankInfo,
    tmp_path: Path,
    closing: ExitStack,
    policy: Literal["stop", "go_on"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, saver = saving(tmp_path, closing, policy)
    start = saver.writer._start

    def doomed() -> Any:
        process = start()
        process.kill()
        return process

    with monkeypatch.context() as patch:
        patch.setattr(saver.writer, "_start", doomed)
        os.kill(writer_pid(saver), signal.SIGKILL)
        if policy == "stop":
            with pytest.raises(WriterDiedError):
                save(job, saver)
                saver.wait()
            return
        save(job, saver)
        saver.wait()
    assert job.lease.run.saved() == [] and job.telemetry.status.saved == 0
    advance(job)
    save(job, saver)
    saver.wait()
    assert job.lease.run.saved() == [2 * BATCH], "the next one is written by a new process"


def test_a_full_disk_under_go_on_keeps_the_old_checkpoint_and_the_next_one_is_written(
    single: RankInfo, tmp_path: Path, closing: ExitStack
) -> None:
    with disk(tmp_path / "disk", 64 << 20) as small, ExitStack() as inner:
        job, saver = saving(small.path, inner, "go_on")
        save(job, saver)
        saver.wait()
        run = job.lease.run
        used = sum(p.stat().st_size for p in small.path.rglob("*") if p.is_file())
        small.resize(used + used // 2)
        advance(job)
        save(job, saver)
        saver.wait()
        assert run.saved() == [BATCH] and job.telemetry.status.saved == BATCH
        assert storage.read_complete(run.checkpoint(BATCH), verify="hashes") is not None
        assert not run.checkpoint(2 * BATCH).exists(), "what was written of it makes room"
        small.resize(64 << 20)
        advance(job)
        save(job, saver)
        saver.wait()
        assert run.saved() == [BATCH, 3 * BATCH]


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_takes_no_checkpoint_stops_the_run_and_is_named(
    single: RankInfo, tmp_path: Path, fault: str
) -> None:
    with disk(tmp_path / "disk", 64 << 20) as small, ExitStack() as inner:
        job, saver = saving(small.path, inner)
        save(job, saver)
        saver.wait()
        if fault == "full":
            small.resize(
                10_000 + sum(p.stat().st_size for p in small.path.rglob("*") if p.is_file())
            )
        else:
            small.read_only()
        advance(job)
        with pytest.raises(NoRoomError) as raised:
            save(job, saver)
            saver.wait()
        assert isinstance(raised.value, StoreError) and str(small.path) in str(raised.value)
        assert job.lease.run.saved() == [BATCH]


def test_an_attempt_that_was_overtaken_publishes_nothing_whatever_the_policy(
    single: RankInfo, tmp_path: Path, closing: ExitStack
) -> None:
    job, saver = saving(tmp_path, closing, "go_on")
    os.kill(writer_pid(saver), signal.SIGSTOP)
    save(job, saver)
    run = job.lease.run
    Lease(run, run.open_attempt()).begin()
    os.kill(writer_pid(saver), signal.SIGCONT)
    with pytest.raises(FencedError):
        saver.wait()
    assert run.saved() == []


def test_signals_that_stop_a_job_leave_its_writer(
    single: RankInfo, tmp_path: Path, closing: ExitStack
) -> None:
    job, saver = saving(tmp_path, closing)
    save(job, saver)
    saver.wait()
    pid = writer_pid(saver)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        os.kill(pid, number)
    advance(job)
    save(job, saver)
    saver.wait()
    assert writer_pid(saver) == pid and job.lease.run.saved() == [BATCH, 2 * BATCH]
    assert os.getpriority(os.PRIO_PROCESS, pid) > os.getpriority(os.PRIO_PROCESS, 0) or (
        os.getpriority(os.PRIO_PROCESS, pid) == 19
    )


def failing(rank_info: RankInfo, root: str, how: str) -> tuple[list[int], int, list[int]]:
    """Two ranks save; the writer of rank 1 dies for good before the second save, and training goes on.

    Another one dies as it begins, or no process can begin.
    """
    import torch.distributed as dist

    with ExitStack() as closing:
        job = begun(Path(root), 0)
        job.rank_info = rank_info
        job.lease.run.attempt(1).mkdir(parents=True, exist_ok=True)
        train = replace(job.config.train, save_failed="go_on")
        saver = Saver(train, rank_info, job.lease, job.telemetry)
        closing.callback(saver.close, wait=True)
        start, popen, found = saver.writer._start, subprocess.Popen, []

        def none(*_: Any, **__: Any) -> Any:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

        for round_ in range(3):
            advance(job)
            if round_ == 1 and rank_info.rank == 1:
                if how == "dies":
                    saver.writer._start = lambda: (p := start(), p.kill())[0]  # type: ignore[method-assign]
                else:
                    subprocess.Popen = none  # type: ignore[misc, assignment]
                os.kill(writer_pid(saver), signal.SIGKILL)
            save(job, saver)
            saver.poll()
            saver.wait()
            found.append(job.telemetry.status.saved)
            saver.writer._start = start  # type: ignore[method-assign]
            subprocess.Popen = popen  # type: ignore[misc]
        dist.barrier()
        manifest = json.loads((job.lease.run.checkpoint(3 * BATCH) / "MANIFEST.json").read_text())
        return found, len(manifest["ranges"]), job.lease.run.saved()


@pytest.mark.parametrize("how", ["dies", "cannot begin"])
def test_a_save_that_fails_on_one_rank_is_none_on_all(ranks: Any, tmp_path: Path, how: str) -> None:
    found = ranks(2, failing, str(tmp_path / "run"), how)
    assert found[0] == found[1]
    assert found[0] == ([BATCH, BATCH, 3 * BATCH], 2, [BATCH, 3 * BATCH])
