"""A checkpoint that is interrupted, by a kill or a full disk, is none, and harms none that is there."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from selfguide.distributed import RankInfo, on_every_rank, on_rank_0
from selfguide.spec.run import Lease, RunFolder
from selfguide.training import checkpoint, resume
from selfguide.training.loop import advance
from selfguide.training.work import Training
from shards import storage
from shards.errors import NoRoomError, StoreError
from tests.selfguide.test_loop import BATCH, begun
from tests.shards.disks import disk

KILLS = 10


def _in_a_fork(work: Callable[[], Any]) -> int:
    """Exit status of a child that calls `work` as the only rank of a group; -9 of one that was killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _killed_at_line(number: int, work: Callable[[], Any]) -> int:
    """Calls `work` and kills this process before the line of that number runs; returns how many lines ran."""
    ran = 0

    def trace(*_: Any) -> Any:
        nonlocal ran
        if ran == number:
            os.kill(os.getpid(), signal.SIGKILL)
        ran += 1
        return trace

    sys.settrace(trace)
    work()
    sys.settrace(None)
    return ran


def _save(job: Training, lease: Lease, images: int) -> None:
    job.state.images = images
    checkpoint.save(lease.run.checkpoint(images), job.state, RankInfo(0, 0, 1), lease)


def kill_saves(root: Path) -> None:
    """Kills an attempt in the midst of its second save, again and again, and resumes after each kill."""
    torch.set_num_threads(1)  # a fork has none of the other threads
    job, run = begun(root / "job", 0), RunFolder(root / "run")
    advance(job)
    first = Lease(run, run.open_attempt())
    assert _in_a_fork(lambda: _save(job, first, BATCH)) == 0
    lines = root / "lines"

    def dry() -> None:
        lines.write_text(str(_killed_at_line(-1, lambda: _save(job, first, 2 * BATCH))))

    assert _in_a_fork(dry) == 0
    # a later attempt runs no fewer: it has more attempts to look at
    offsets = random.Random(0).sample(range(int(lines.read_text())), KILLS)
    whole = []
    for offset in offsets:
        storage.delete(run.checkpoint(2 * BATCH))
        lease = Lease(run, run.open_attempt())
        lease.begin()
        killed = _in_a_fork(lambda: _killed_at_line(offset, lambda: _save(job, lease, 2 * BATCH)))  # noqa: B023
        assert killed == -signal.SIGKILL
        lease = Lease(run, run.open_attempt())
        lease.begin()
        found = resume.find(lease, RankInfo(0, 0, 1), "strict").folder
        assert found in (run.checkpoint(BATCH), run.checkpoint(2 * BATCH))
        assert storage.read_complete(found, verify="hashes") is not None
        whole.append(found == run.checkpoint(2 * BATCH))
        assert _in_a_fork(lambda: checkpoint.load(found, job.state, RankInfo(0, 0, 1))) == 0  # noqa: B023
        assert _in_a_fork(lambda: _save(job, lease, 2 * BATCH)) == 0  # noqa: B023
        assert run.saved() == [BATCH, 2 * BATCH]
        assert not [*run.checkpoints.rglob("*.tmp")]
    assert not all(whole)


def test_a_save_killed_at_any_line_never_loads_in_part(tmp_path: Path) -> None:
    code = f"from pathlib import Path; from {__name__} import kill_saves; kill_saves(Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_full_disk_at_a_checkpoint_is_one_line_and_the_old_one_stays(
    single: RankInfo, tmp_path: Path
) -> None:
    job = begun(tmp_path / "job", 0)
    advance(job)
    with disk(tmp_path / "disk", 1 << 20) as small:
        run = RunFolder(small.path / "run")
        lease = Lease(run, run.open_attempt())
        small.resize(64 << 20)
        _save(job, lease, BATCH)
        used = sum(p.stat().st_size for p in run.checkpoint(BATCH).iterdir())
        # for half of another one
        small.resize(used + used // 2)
        with pytest.raises(NoRoomError) as raised:
            _save(job, lease, 2 * BATCH)
        told = str(raised.value)
        assert isinstance(raised.value, StoreError) and len(told.splitlines()) == 1
        assert "No space left on device" in told and "make room there" in told
        assert run.saved() == [BATCH] and not [*run.checkpoints.rglob("*.tmp")]
        assert storage.read_complete(run.checkpoint(BATCH), verify="hashes") is not None
        small.resize(64 << 20)
        _save(job, lease, 2 * BATCH)
        assert run.saved() == [BATCH, 2 * BATCH]


def test_a_full_disk_of_one_rank_ends_the_save_on_all(ranks: Any) -> None:
    ends = ranks(2, _full)
    assert ends[0] == ends[1] == ["parts, 1", "manifest, 0"]


def _full(rank_info: RankInfo) -> list[str]:
    """What a rank is told in the steps of a save, where one rank's disk is full."""
    ends = []
    for step, rank in ((on_every_rank, 1), (on_rank_0, 0)):

        def write(full: int = rank) -> None:
            if rank_info.rank == full:
                raise NoRoomError(f"{'manifest' if full == 0 else 'parts'}, {full}")

        try:
            step(write)
        except NoRoomError as error:
            ends.append(str(error))
    return ends


def test_a_run_folder_that_may_not_be_written_is_one_line(single: RankInfo, tmp_path: Path) -> None:
    job = begun(tmp_path / "job", 0)
    advance(job)
    with disk(tmp_path / "disk", 64 << 20) as small:
        run = RunFolder(small.path / "run")
        lease = Lease(run, run.open_attempt())
        _save(job, lease, BATCH)
        small.read_only()
        with pytest.raises(NoRoomError, match=r"Read-only file system\): make room there, or"):
            _save(job, lease, 2 * BATCH)
        assert resume.find(lease, single, "strict").folder == run.checkpoint(BATCH)
