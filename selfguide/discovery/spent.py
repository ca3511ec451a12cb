"""What work on an annotation has cost: seconds of all ranks, kept beside its parts, so that a kill loses no more."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

_PREFIX = "spent-"


def cost(seconds: float, ranks: int, device: torch.device | str | None = None) -> dict[str, Any]:
    """Returns a sidecar's cost: seconds of all ranks together, how many they were, and on what they worked.

    Args:
        device: the GPU where this process uses one and nothing else is said.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_initialized() else "cpu")).type
    name = torch.cuda.get_device_name() if kind == "cuda" else kind
    return {"seconds": seconds, "ranks": ranks, "device": name}


@contextmanager
def spending(
    folder: Path, ranks: int = 1, device: torch.device | str | None = None
) -> Iterator[None]:
    """Adds the seconds of the block to what this thread has spent on the work in `folder`, also where it fails."""
    started = time.monotonic()
    try:
        yield
    finally:
        # ranks may be threads of one process: a file for each thread has one writer
        name = f"{_PREFIX}{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}.json"
        file = folder / name
        seconds = time.monotonic() - started
        # where the folder is gone, somebody else has published
        with suppress(FileNotFoundError):
            before = json.loads(file.read_text())["seconds"] if file.exists() else 0.0
            draft = file.with_suffix(".tmp")
            draft.write_text(json.dumps(cost(before + seconds, ranks, device)))
            draft.replace(file)


def total(folder: Path) -> dict[str, Any] | None:
    """Returns the cost of all work in `folder`; None where nobody wrote any down, as earlier versions did."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{_PREFIX}*.json"))]
    if not found:
        return None
    seconds = sum(each["seconds"] for each in found)
    devices = ", ".join(sorted({each["device"] for each in found}))
    return {"seconds": seconds, "ranks": max(each["ranks"] for each in found), "device": devices}
