"""Waiting for what other processes do, and finding them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def until(condition: Callable[[], object], timeout: float = 180.0) -> None:
    """Waits for a condition, and fails the test where it does not come."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come about"
        time.sleep(0.02)


def processes(mark: str) -> list[int]:
    """Processes other than this one whose command or environment mentions `mark`."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                text = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            except OSError:
                continue
            if mark.encode() in text:
                found.append(int(folder.name))
    return found
