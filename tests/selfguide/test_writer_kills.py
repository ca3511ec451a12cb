"""A save beside training that is killed: its writer, its trainer or both, at each point of it.

A writer is replaced within the attempt; a trainer is followed by an attempt that goes on from the newest checkpoint
that is whole. Either way the run ends with the bits of one that nothing interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from selfguide.distributed import RankInfo
from selfguide.spec.run import Lease, RunFolder
from selfguide.training import checkpoint, loop, resume
from selfguide.training.saver import Saver
from shards import storage
from shards.wait import wait_until
from tests.selfguide.dying_writer import POINTS, STRUCK, Point, Who, ended, struck
from tests.selfguide.test_loop import BATCH, begun

# saved after each second step; the save in the middle is struck
END, STRUCK_AT = 6 * BATCH, 4 * BATCH
RANK = RankInfo(0, 0, 1)


class _Epochs:
    def carried(self) -> None:
        return None


def trained(folder: Path, strike: tuple[Point, Who] | None = None) -> int:
    """One attempt in a process of its own, which ends at `END`; returns its exit status, -9 where it was killed."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        logging.basicConfig(filename=folder / "log", force=True)
        with struck(folder, STRUCK_AT, *strike) if strike else contextlib.nullcontext():
            _attempt(RunFolder(folder))
        code = 0
    finally:
        os._exit(code)


def _attempt(run: RunFolder) -> None:
    """The loop's steps and saves, from the newest checkpoint that holds."""
    lease = Lease(run, run.open_attempt())
    lease.begin()
    found = resume.find(lease, RANK, "strict").folder
    job = begun(run.root, int(found.name[4:]) if found else 0)
    if found is not None:
        checkpoint.load(found, job.state, RANK)
    (run.attempt(lease.number) / "begun").write_text(str(job.state.images))
    job.lease = lease
    job.saver = Saver(job.config.train, RANK, lease, job.telemetry)
    while job.state.images < END:
        loop.advance(job)
        job.saver.poll()
        if job.state.images % (2 * BATCH) == 0:
            loop.save_checkpoint(job, _Epochs(), wait=job.state.images == END)  # type: ignore[arg-type]
    job.saver.close(wait=True)


def numbers(run: RunFolder) -> dict[str, bytes]:
    """All that the last checkpoint holds, by file."""
    folder = run.checkpoint(END)
    assert storage.read_complete(folder, verify="hashes") is not None
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def begins(run: RunFolder) -> int:
    """Images at which the newest attempt began."""
    return int((run.attempt(run.attempt_numbers()[-1]) / "begun").read_text())


def kill_writers(root: Path) -> None:
    whole = numbers(_whole(root))
    for point in POINTS:
        run = _folder(root / point)
        assert trained(run.root, (point, "writer")) == 0, point
        assert (run.attempt(1) / STRUCK).exists(), point
        assert numbers(run) == whole, point
        assert run.saved() == [STRUCK_AT, END], "whole, and the oldest of three makes room"
        assert storage.read_complete(run.checkpoint(STRUCK_AT), verify="hashes") is not None
        told = (run.root / "log").read_text()
        died = f"ended by SIGKILL (pid {(run.attempt(1) / STRUCK).read_text()})"
        assert told.count(died) == told.count("another one begins") == 1, told
        left = [*run.checkpoints.rglob(".*.safetensors.*.tmp")]
        assert not left, f"{point}: half a file keeps its room"


def kill_trainers(root: Path) -> None:
    whole = numbers(_whole(root))
    cases: list[tuple[Point, Who]] = [(point, "both") for point in POINTS]
    # a writer that outlives its trainer ends the file that it is at
    cases += [("part", "trainer"), ("manifest", "trainer")]
    for point, who in cases:
        run, case = _folder(root / f"{point}-{who}"), f"{point}, {who}"
        assert trained(run.root, (point, who)) == -signal.SIGKILL, case
        writer = int((run.attempt(1) / STRUCK).read_text())
        assert wait_until(lambda: ended(writer), timeout_s=120), case  # noqa: B023
        there = point == "published" or (point, who) == ("manifest", "trainer")
        assert run.saved()[-1] == (STRUCK_AT if there else 2 * BATCH), case
        assert trained(run.root) == 0, case
        assert begins(run) == (STRUCK_AT if there else 2 * BATCH), case
        assert numbers(run) == whole, case
        assert run.saved() == [STRUCK_AT, END], case
        assert not [*run.checkpoints.rglob("*.tmp")], case


def _whole(root: Path) -> RunFolder:
    """A run that nothing interrupts."""
    run = _folder(root / "whole")
    assert trained(run.root) == 0
    return run


def _folder(root: Path) -> RunFolder:
    root.mkdir()
    return RunFolder(root)


@pytest.mark.parametrize(
    "kills", ["kill_writers", pytest.param("kill_trainers", marks=pytest.mark.faults)]
)
def test_a_save_beside_training_killed_at_any_point_costs_no_bit(
    kills: str, tmp_path: Path
) -> None:
    """In a process of its own, since a fork has none of the other threads."""
    code = (
        "import torch; torch.set_num_threads(1); from pathlib import Path; "
        f"from {__name__} import {kills}; {kills}(Path({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
