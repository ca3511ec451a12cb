"""Real jobs on this machine: a runs folder, payloads instead of a trainer, and nothing left alive afterwards."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from waiting import REPOSITORY, processes

from launcher import attempt
from shards.format.header import Header
from shards.sources.source import ArraySource
from shards.write.writer import write


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """A runs folder; whatever works for it when the test ends is killed."""
    yield tmp_path / "runs"
    deadline = time.monotonic() + 120  # a process in an fsync ends when the disk has answered
    while left := processes(str(tmp_path)):
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 256 small images with 10 classes."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 17, (256, 1, 8, 8)).astype(np.uint8)
    source = ArraySource.of("noise", x, labels=np.arange(256) % 10, classes=10)
    root = tmp_path_factory.mktemp("data") / "noise"
    write(root, source, header=Header(kind="image", shift=8.0, scale=0.125))
    return root


@pytest.fixture
def settings(runs: Path, data: Path) -> list[str]:
    """A small local digits run without evaluation."""
    return [
        "experiment=digits_dit",
        "cluster=local",
        f"data.root={data}",
        f"runs={runs}",
        "train.images=1280",
        "train.snapshot_every=640",
        "train.checkpoint_every=640",
        "train.log_every=640",
        "train.warmup_images=0",
        "evaluation=none",
    ]


@pytest.fixture
def payload(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """payload(train=f, evaluate=g): jobs call these functions of `payloads` in place of the trainer's."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{REPOSITORY}")

    def use(**functions: Callable[[str], None]) -> None:
        for name, function in functions.items():
            monkeypatch.setattr(attempt, name, function)

    return use
