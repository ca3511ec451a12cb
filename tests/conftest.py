"""Fixtures for every test: real gloo ranks as processes, ended whatever happens."""

from __future__ import annotations

import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores, several ranks


def _rank(rank: int, world: int, meeting: str, function: Callable, arguments: tuple, results: Any) -> None:
    import torch

    from selfguide.distributed import Place, join, leave

    torch.set_num_threads(1)
    os.environ["SELFGUIDE_HOST"] = "127.0.0.1"
    place = Place(rank, rank, world)
    try:
        join(place, Path(meeting), timeout_s=120)
        results.put((rank, True, function(place, *arguments)))
    except BaseException:  # the parent re-raises it, whatever it is
        results.put((rank, False, traceback.format_exc()))
    finally:
        leave()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Callable[..., list[Any]]]:
    """ranks(world, function, *arguments) -> [function(place, *arguments) of each rank].

    `function` is module-level; what it returns is pickled (return plain values or CPU tensors' lists).
    """
    context = multiprocessing.get_context("spawn")
    started: list[Any] = []
    calls = iter(range(1000))

    def run(world: int, function: Callable, *arguments: Any, timeout: float = 240) -> list[Any]:
        results = context.Queue()
        meeting = tmp_path / f"meeting-{next(calls)}" / "rendezvous.json"
        meeting.parent.mkdir()
        mine = [
            context.Process(target=_rank, args=(r, world, str(meeting), function, arguments, results))
            for r in range(world)
        ]
        started.extend(mine)
        for process in mine:
            process.start()
        answers: dict[int, Any] = {}
        while len(answers) < world:
            try:
                rank, good, value = results.get(timeout=timeout)
            except queue.Empty:
                missing = sorted(set(range(world)) - set(answers))
                pytest.fail(f"ranks {missing} of {world} did not answer within {timeout} s")
            if not good:
                pytest.fail(f"rank {rank} of {world} failed:\n{value}")
            answers[rank] = value
        for process in mine:
            process.join(timeout=30)
        return [answers[r] for r in range(world)]

    yield run
    for process in started:
        if process.is_alive():
            process.kill()
        process.join(timeout=10)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real digits as shards, written once by the command a user runs."""
    from tools import shards as command

    root = tmp_path_factory.mktemp("data") / "digits"
    assert command.main(["make", "digits", "--out", str(root)]) == 0
    return root
