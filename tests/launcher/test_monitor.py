"""A monitor over processes that stand for ranks: whom it blames, what it collects, and that nothing is left."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from launcher.attempt import stacks, steps
from launcher.attempt.hang import Limits, Verdict
from launcher.attempt.monitor import Monitor
from launcher.backends.local import process
from selfguide.spec.run import read_record, write_record
from shards.wait import wait_until

LIMITS = Limits(step=6, start=60, data=60, save=60, evaluation=60)

# ranks 0 and 1 wait in the fifth collective, and rank 2 does not come
RANK = """
import ctypes, os, signal, sys, time
from pathlib import Path
from launcher.attempt import heartbeat, signals, stacks
from launcher.attempt.exits import write_start
from selfguide.spec.rank_status import RankStatus

folder, rank, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
status = RankStatus(section="train", images=640, step_s=0.1, begun=True, beat_s=float(sys.argv[4]))
status.collectives = lambda: 5 if how == "waits" else 4
stacks.offer()
signals.stop_on_signals(folder, rank, status)
write_start(folder, rank)
heartbeat.begin(folder, rank, status)

def waits():
    time.sleep(600)

def loops():
    time.sleep(600)

def holds():
    while True:
        ctypes.PyDLL(None).sleep(600)

def stops():
    os.kill(os.getpid(), signal.SIGSTOP)

# it has spoken
while not (folder / f"heartbeat-{rank}.json").exists():
    time.sleep(0.05)
globals()[how]()
"""


def attempt(folder: Path, how: str) -> list[subprocess.Popen[bytes]]:
    write_record(folder / "submission.json", {"world": 3})
    return [
        subprocess.Popen([sys.executable, "-c", RANK, folder, str(rank), word, str(LIMITS.beat_s)])
        for rank, word in enumerate(("waits", "waits", how))
    ]


def test_the_rank_that_does_not_come_is_blamed_and_all_stacks_are_kept(tmp_path: Path) -> None:
    words = ("loops", "holds", "stops")
    ranks = {how: attempt(tmp_path / how, how) for how in words}
    for how in words:
        starts = [tmp_path / how / f"start-{rank}.json" for rank in range(3)]
        assert wait_until(lambda starts=starts: all(p.exists() for p in starts), timeout_s=60)
    # of two nodes, but where only its own node sees that a process is stopped
    nodes = {"loops": [(0, 1), (2,)], "holds": [(0, 1), (2,)], "stops": [(0, 1, 2)]}
    monitors = [
        threading.Thread(target=Monitor(tmp_path / how, mine, ranks[how][mine[0]].pid, LIMITS).run)
        for how in words
        for mine in nodes[how]
    ]
    for each in monitors:
        each.start()
    for each in monitors:
        each.join(timeout=90)
    codes = {how: [each.wait(timeout=10) for each in ranks[how]] for how in words}
    assert set(map(tuple, codes.values())) == {(143, 143, -9)}, codes
    found = {how: records(tmp_path / how) for how in words}
    for how in words:
        assert [each["class"] for each in found[how]] == ["signal", "signal", "hang"]
        blamed = found[how][2]
        assert (blamed["code"], blamed["section"], blamed["images"]) == (85, "train", 640)
        assert (read_record(tmp_path / how / "hang.json") or {})["rank"] == 2
    assert "did not enter the collective in which 2 ranks wait" in found["loops"][2]["message"]
    assert "lock" in found["holds"][2]["message"] and "SIGSTOP" in found["stops"][2]["message"]
    texts = {how: [stack(tmp_path / how, rank) for rank in range(3)] for how in words}
    for how in words:
        for text, name in zip(texts[how], ("waits", "waits", how), strict=True):
            # a stopped one is seen by py-spy alone
            assert str(stacks.innermost(text)).startswith(f"{name} (") or how == name == "stops"
    assert "state T" in texts["stops"][2]


def records(folder: Path) -> list[dict[str, Any]]:
    found = [read_record(path) for path in exits(folder)]
    assert None not in found
    return found  # type: ignore[return-value]


def stack(folder: Path, rank: int) -> str:
    return (folder / "stacks" / f"rank-{rank}.txt").read_text()


def test_a_monitor_ends_with_its_ranks(tmp_path: Path) -> None:
    ranks = attempt(tmp_path, "waits")
    monitor = threading.Thread(target=Monitor(tmp_path, range(3), ranks[0].pid, LIMITS).run)
    monitor.start()
    for each in ranks:
        each.kill()
        each.wait()
    monitor.join(timeout=180)
    assert not monitor.is_alive() and not (tmp_path / "hang.json").exists()


def test_ranks_whose_slurmstepd_was_killed_are_ended_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 2 is alone on its node; nobody hangs."""
    ranks = attempt(tmp_path, "waits")
    daemon = subprocess.Popen(["sleep", "600"])
    began = process(daemon.pid)[1]  # type: ignore[index]
    above = {ranks[2].pid: (daemon.pid, began)}
    monkeypatch.setattr(steps, "daemon_above", above.get)
    monitors = [Monitor(tmp_path, mine, ranks[mine[0]].pid, LIMITS) for mine in ((0, 1), (2,))]
    threads = [threading.Thread(target=each.run) for each in monitors]
    for each in threads:
        each.start()
    assert wait_until(
        lambda: monitors[1]._daemons and len(monitors[0]._processes) == 2, timeout_s=60
    )
    daemon.kill()
    daemon.wait()
    for each in threads:
        each.join(timeout=60)
    assert [each.wait(timeout=10) for each in ranks] == [143, 143, -9]
    found = records(tmp_path)
    assert [each["class"] for each in found] == ["signal", "signal", "killed"]
    assert (found[2]["code"], found[2]["section"], found[2]["images"]) == (137, "train", 640)
    assert "slurmstepd" in found[2]["message"] and not (tmp_path / "stacks").exists()


def test_srun_of_a_job_is_ended_where_ranks_were_cut_off_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "srun"
    shutil.copy("/bin/sh", program)
    monkeypatch.setenv("SUBMITIT_FOLDER", "/runs/a/job")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")

    def srun(folder: str, node: str) -> subprocess.Popen[bytes]:
        command = [program, "-c", "read line", folder]
        return subprocess.Popen(
            command, env={"SLURMD_NODENAME": node}, stdin=subprocess.PIPE, start_new_session=True
        )

    started = [srun("/runs/a/job", "n1"), srun("/runs/b/job", "n1"), srun("/runs/a/job", "n2")]
    try:
        steps.end_srun(tmp_path)
        write_record(tmp_path / "hang.json", {"kind": "hang"})
        steps.end_srun(tmp_path)
        assert [each.poll() for each in started] == [None] * 3
        write_record(tmp_path / "hang.json", {"kind": "killed"}, replace=True)
        steps.end_srun(tmp_path)
        assert started[0].wait(timeout=10) == -9
        assert [each.poll() for each in started[1:]] == [None] * 2
    finally:
        for each in started:
            each.kill()
            each.wait()


def test_a_thread_is_found_in_stacks_of_py_spy_and_of_python() -> None:
    spy = (
        'Process 9: python\nPython v3.11.2\n\nThread 12 (idle): "worker"\n    run (a.py:1)\n'
        'Thread 9 (active): "MainThread"\n    spin (loop.py:57)\n    main (job.py:3)'
    )
    assert stacks.innermost(spy) == "spin (loop.py:57)"
    python = (
        'Thread 0x01 (most recent call first):\n  File "/a.py", line 1 in run\n\n'
        'Current thread 0x02 (most recent call first):\n  File "/b/loop.py", line 57 in spin\n'
        '  File "/b/job.py", line 3 in main'
    )
    assert stacks.innermost(python) == "spin (loop.py:57)"
    assert stacks.innermost("It does not say where it is.") is None


@dataclass(frozen=True)
class Moment:
    """What all ranks are at from a time on, in seconds; ranks that train move together."""

    time: float
    section: str
    images: int
    step_s: float


def life(seed: int, until_s: float) -> list[Moment]:
    """A healthy run: steps of any length, some of them long, some waits for data, and slow saves."""
    draw, step_s = random.Random(seed), 10 ** random.Random(seed).uniform(-1, 1.7)
    # the first step compiles
    found = [Moment(0.0, "starting", 0, 0.0), Moment(30.0, "train", 0, 0.0)]
    at, images = 30.0 + 20 * step_s, 128
    while at < until_s:
        took = step_s * draw.uniform(0.8, 1.2) * draw.choice([1] * 30 + [5])
        found.append(Moment(at, "train", images, took))
        images += 128
        if draw.random() < 0.03:
            section, limit = draw.choice([("data", SLOW.data), ("checkpoint", SLOW.save)])
            found.append(Moment(at, section, images, took))
            at += draw.uniform(0.1, 0.9) * limit
            found.append(Moment(at, "train", images, took))
        at += took
    return found


class Played:
    """A monitor of ranks 0 and 1 of four that sees a life through heartbeats, with a clock of its own."""

    def __init__(self, folder: Path, moments: list[Moment], hangs: dict[int, float]) -> None:
        """`hangs` is from when on a rank says nothing any more."""
        write_record(folder / "submission.json", {"world": 4})
        self.folder, self.moments, self.hangs = folder, moments, hangs
        self.monitor = Monitor(folder, range(2), os.getpid(), SLOW)

    def look(self, now: float) -> Verdict | None:
        for rank in range(4):
            # each beats at its own time
            said = min(now - (now + 3 * rank) % SLOW.beat_s, self.hangs.get(rank, now))
            text = json.dumps({"time": said, **self.record(said)})
            (self.folder / f"heartbeat-{rank}.json").write_text(text)
        self.monitor._clock = now
        return self.monitor._look()

    def record(self, at: float) -> dict[str, Any]:
        # where one hangs, all wait in that step
        stuck = min([at, *self.hangs.values()])
        passed = max(1, bisect_right(self.moments, stuck, key=lambda each: each.time))
        last = self.moments[passed - 1]
        return {
            "section": last.section,
            "images": last.images,
            "progressed": last.time,
            "step_s": last.step_s,
            "collectives": 3 * passed + (at > stuck),
        }


SLOW = Limits(step=60, start=1800, data=900, save=600, evaluation=60)


@pytest.mark.parametrize("seed", range(10))
def test_a_healthy_run_is_never_said_to_hang_and_one_rank_that_hangs_is(
    tmp_path: Path, seed: int
) -> None:
    moments = life(seed, 2000.0)
    healthy = Played(tmp_path / "healthy", moments, {})
    assert all(healthy.look(10.0 * look) is None for look in range(1, 200))
    # another node's rank, in a step
    steps = [a for a, b in pairwise(moments) if a.section == "train" and a.step_s < b.time - a.time]
    began = steps[len(steps) // 2]
    hung = Played(tmp_path / "hung", moments, {3: began.time + 0.1 * began.step_s})
    looks = ((at, hung.look(at)) for at in (began.time + 5.0 * look for look in range(1000)))
    at, verdict = next((at, verdict) for at, verdict in looks if verdict is not None)
    assert (verdict.rank, verdict.section, verdict.images) == (3, "train", began.images)
    limit = max(SLOW.step, 10 * median(each.step_s for each in moments if each.step_s))
    assert limit / 2 < at - began.time < 2 * limit + 4 * SLOW.beat_s


def test_a_disk_that_is_away_for_minutes_is_no_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No rank can write, and old files are still read; the ranks train on."""
    away = (600.0, 1000.0)
    steps = [Moment(float(step), "train", 128 * step, 1.0) for step in range(2000)]
    played = Played(tmp_path, steps, {})

    def write(*_: object, **__: object) -> None:
        if away[0] <= now < away[1]:
            raise OSError("the disk does not answer")

    monkeypatch.setattr("launcher.attempt.monitor.write_record", write)
    monkeypatch.setattr(Path, "unlink", lambda *_: None)
    refused = 0
    for now in (5.0 * look for look in range(1, 300)):
        played.hangs = dict.fromkeys(range(4), away[0]) if away[0] <= now < away[1] else {}
        try:
            assert played.look(now) is None
        except OSError:
            refused += 1
    assert refused > 10


def test_ranks_of_an_attempt_that_was_overtaken_are_ended_and_nobody_is_blamed(
    tmp_path: Path,
) -> None:
    for number in (1, 2):
        (tmp_path / "attempts" / str(number)).mkdir(parents=True)
    folder = tmp_path / "attempts" / "1"
    ranks = attempt(folder, "loops")
    Monitor(folder, range(3), ranks[0].pid, replace(LIMITS, start=6)).run()
    assert all(each.wait(timeout=10) for each in ranks)
    assert not (folder / "hang.json").exists()
    assert "hang" not in {(record or {}).get("class") for record in map(read_record, exits(folder))}


def exits(folder: Path) -> list[Path]:
    return [folder / f"exit-{rank}.json" for rank in range(3)]
