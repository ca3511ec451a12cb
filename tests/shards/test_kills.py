"""Ranks that are killed and gone on with by another number of ranks read what one that nobody disturbed would have."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import shards
from shards.format.order import Order
from shards.read import stream as stream_module
from shards.read.reader import Reader
from tests.shards.data import write

COUNT, BATCH = 700, 120
WORLDS = (1, 2, 3, 4, 6, 8, 12)

RANK = """
import json, os, sys, time
from functools import partial
import shards
from shards.read import stream as stream_module
from shards.read.reader import Reader

root, into, rank, world, position, threads, mapped = sys.argv[1:8]
stream_module.Reader = partial(Reader, mapped=mapped == "True")
out = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
with shards.open(root, global_batch=120, micro_batch=120 // int(world) // 2, rank=int(rank), world=int(world),
                 seed=11, position=int(position), threads=int(threads)) as stream:
    for batch in stream:
        read = [batch[name].tolist() for name in ("position", "ordinal")]
        os.write(out, (json.dumps([stream.state()["position"], *read]) + chr(10)).encode())
        time.sleep(0.003)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kills")
    write(path, COUNT)
    return path


def killed(
    root: Path, folder: Path, *, world: int, position: int, threads: int, mapped: bool
) -> tuple[int, dict[int, int]]:
    """Ranks in processes of their own, ended by SIGKILL in the middle of an epoch: the position at which all had
    taken a step last, and what stood before it."""
    folder.mkdir()
    logs = [folder / str(rank) for rank in range(world)]
    with ExitStack() as ends:
        processes = []
        for rank, log in enumerate(logs):
            words = map(str, (root, log, rank, world, position, threads, mapped))
            process = ends.enter_context(subprocess.Popen([sys.executable, "-c", RANK, *words]))
            ends.callback(process.kill)
            processes.append(process)
        deadline = time.monotonic() + 100
        while (
            min(len(_whole_lines(log)) for log in logs) < 17
        ):  # 8 steps and a half: 1,020 positions
            assert all(p.poll() is None for p in processes) and time.monotonic() < deadline
            time.sleep(0.01)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        assert [p.wait() for p in processes] == [-signal.SIGKILL] * world
    lines = [_whole_lines(log) for log in logs]
    common = min(each[-1][0] for each in lines)
    assert common > position
    read: dict[int, int] = {}
    for _, positions, ordinals in (line for each in lines for line in each):
        pairs = dict(zip(positions, ordinals, strict=True))
        assert not pairs.keys() & read.keys()
        read |= pairs
    return common, {p: o for p, o in read.items() if p < common}


def _whole_lines(log: Path) -> list[tuple[int, list[int], list[int]]]:
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.mark.parametrize("threads", [1, 4])
def test_kills_and_other_world_sizes_leave_every_sample_once_in_one_order(
    root: Path, tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every world size in turn, each ended in the middle of an epoch, the first ones by SIGKILL."""
    seen: dict[int, int] = {}
    position = 0
    for world, mapped in ((3, True), (2, False)):  # ranges are what comes from S3
        before = position
        position, read = killed(
            root,
            tmp_path / str(world),
            world=world,
            position=before,
            threads=threads,
            mapped=mapped,
        )
        assert read.keys() == set(range(before, position))
        seen |= read
    for i, world in enumerate((*WORLDS, 1)):
        monkeypatch.setattr(stream_module, "Reader", partial(Reader, mapped=i % 2 == 0))
        stop, states = position + BATCH * (i % 3 + 1), []
        for rank in range(world):
            with shards.open(
                root, global_batch=BATCH, micro_batch=BATCH // world // (1 + world % 2), rank=rank, world=world,
                seed=11, position=position, threads=threads,
            ) as stream:  # fmt: skip
                while stream.position < stop:
                    batch = next(stream)
                    pairs = dict(
                        zip(batch["position"].tolist(), batch["ordinal"].tolist(), strict=True)
                    )
                    assert not pairs.keys() & seen.keys()
                    seen |= pairs
                states.append(stream.state())
        assert all(state == states[0] for state in states)
        position = states[0]["position"]
    expected = Order(count=COUNT, seed=11).ordinals(np.arange(position))
    assert position > 4 * COUNT and [seen[p] for p in range(position)] == expected.tolist()
    for epoch in range(position // COUNT):
        given = [seen[p] for p in range(epoch * COUNT, (epoch + 1) * COUNT)]
        assert sorted(given) == [*range(COUNT)]
