"""A monitor over processes that stand for ranks: whom it blames, what it collects, and that nothing is left."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from launcher.attempt import stacks
from launcher.attempt.hang import Limits
from launcher.attempt.monitor import Monitor
from selfguide.spec.run import read_record, write_record
from shards.wait import wait_until

LIMITS = Limits(step=6, start=60, data=60, save=60)

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
    monitors = [
        threading.Thread(target=Monitor(tmp_path / how, range(3), ranks[how][0].pid, LIMITS).run)
        for how in words
    ]
    for each in monitors:
        each.start()
    for each in monitors:
        each.join(timeout=90)
    codes = {how: [process.wait(timeout=10) for process in ranks[how]] for how in words}
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
    assert all(text.count("in waits") == 1 for how in words for text in texts[how][:2])
    for how in ("loops", "holds"):
        assert str(stacks.innermost(texts[how][2])).startswith(f"{how} (")
    assert "state T" in texts["stops"][2]


def records(folder: Path) -> list[dict[str, Any]]:
    found = [read_record(folder / f"exit-{rank}.json") for rank in range(3)]
    assert None not in found
    return found  # type: ignore[return-value]


def stack(folder: Path, rank: int) -> str:
    return (folder / "stacks" / f"rank-{rank}.txt").read_text()


def test_a_monitor_ends_with_its_ranks(tmp_path: Path) -> None:
    ranks = attempt(tmp_path, "waits")
    monitor = threading.Thread(target=Monitor(tmp_path, range(3), ranks[0].pid, LIMITS).run)
    monitor.start()
    for process in ranks:
        process.kill()
        process.wait()
    monitor.join(timeout=30)
    assert not monitor.is_alive() and not (tmp_path / "hang.json").exists()


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
