"""Where a rank's threads are: offered by each rank, collected from outside by the monitor of its node.

py-spy is used where it is installed and allowed to. Elsewhere a rank writes its stacks by itself when it gets SIGQUIT,
from a handler in C, into a piece of memory that others can read: it works while something holds the interpreter's lock.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from launcher.backends.local import process

_NAME = "selfguide-stacks"
# for all ranks of a node together
COLLECT_S = 8.0
# a frame, by faulthandler and by py-spy; both name the innermost first
_FRAME = re.compile(r'^ +(?:File "(.+)", line (\d+) in (.+)|(.+ \(.+:\d+\)))$', re.MULTILINE)


def offer() -> None:
    """Has this process write the stacks of its threads on SIGQUIT (`kill -QUIT`), where `collect` reads them."""
    file = os.memfd_create(_NAME)
    faulthandler.register(signal.SIGQUIT, file=file, all_threads=True)


def collect(pids: Mapping[int, int]) -> dict[int, str]:
    """Returns the stacks of ranks of this node, or why there are none.

    Args:
        pids: process of each rank.
    """
    found = _by_py_spy(pids)
    rest = {rank: pid for rank, pid in pids.items() if rank not in found}
    for pid in rest.values():
        if _offered(pid) is not None and not _stopped(pid):
            send(pid, signal.SIGQUIT)
    deadline = time.monotonic() + COLLECT_S
    for rank, pid in rest.items():
        found[rank] = _written(pid, deadline)
    return {rank: f"{_heading(rank, pids[rank])}\n\n{found[rank]}\n" for rank in sorted(found)}


def innermost(text: str) -> str | None:
    """Returns where the main thread is by its stacks, such as "wait (loop.py:57)"; None where they do not say."""
    threads = re.split(r"\n(?=Thread |Current thread )", text)
    # py-spy names it, and faulthandler has it last
    main = next((each for each in threads if "MainThread" in each), threads[-1])
    match = _FRAME.search(main)
    if match is None:
        return None
    file, line, name, whole = match.groups()
    return whole.strip() if whole else f"{name} ({Path(file).name}:{line})"


def send(pid: int, number: signal.Signals) -> None:
    """Sends a signal to a process that may just have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _by_py_spy(pids: Mapping[int, int]) -> dict[int, str]:
    beside = str(Path(sys.executable).parent)
    program = shutil.which("py-spy", path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if program is None:
        return {}
    # without stopping them: they do not move
    running = {
        rank: subprocess.Popen(
            [program, "dump", "--nonblocking", "--pid", str(pid)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank, pid in pids.items()
    }
    found, deadline = {}, time.monotonic() + COLLECT_S
    for rank, child in running.items():
        try:
            out, _ = child.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            continue
        # it may not be allowed to look into other processes
        if child.returncode == 0 and "Thread" in out:
            found[rank] = out.strip()
    return found


def _written(pid: int, deadline: float) -> str:
    """What the process writes of itself, once it writes no more."""
    if _stopped(pid):
        return "It is stopped by a signal (state T), and only one that goes on can say where it is."
    memory = _offered(pid)
    before = b""
    while memory is not None and time.monotonic() < deadline:
        try:
            text = memory.read_bytes()
        except OSError:
            break
        if text and text == before:
            return text.decode(errors="replace").strip()
        before = text
        time.sleep(0.2)
    return before.decode(errors="replace").strip() or "It does not say where it is."


def _offered(pid: int) -> Path | None:
    """The memory into which a process writes its stacks; None where it has ended, or has not come so far."""
    try:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            if _NAME in str(path.readlink()):
                return path
    except OSError:
        pass
    return None


def _stopped(pid: int) -> bool:
    found = process(pid)
    return found is not None and found[0] == "T"


def _heading(rank: int, pid: int) -> str:
    found = process(pid)
    return f"rank {rank}, process {pid}, state {found[0] if found else 'ended'}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
