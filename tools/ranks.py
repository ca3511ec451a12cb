"""Real gloo ranks as processes of this machine, for tests and benchmarks; they always end with their caller."""

from __future__ import annotations

import multiprocessing
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class RankFailed(RuntimeError):
    """A rank raised, or did not answer."""


def _rank(
    rank: int, world: int, meeting: str, function: Callable, arguments: tuple, results: Any
) -> None:
    import torch

    from selfguide.distributed import Place, join, leave

    torch.set_num_threads(1)
    os.environ["SELFGUIDE_HOST"] = "127.0.0.1"
    place = Place(rank, rank, world)
    try:
        join(place, Path(meeting), timeout_s=120)
        results.put((rank, True, function(place, *arguments)))
    except BaseException:  # noqa: BLE001 - the parent raises it, whatever it is
        results.put((rank, False, traceback.format_exc()))
    finally:
        leave()


def run_ranks(world: int, function: Callable, *arguments: Any, timeout: float = 240) -> list[Any]:
    """[function(place, *arguments) of each of `world` ranks]; `function` is module-level, answers are pickled.

    Raises:
        RankFailed: with the rank's traceback, or the ranks that did not answer within `timeout` seconds each.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        meeting = str(Path(folder) / "rendezvous.json")
        processes = [
            context.Process(target=_rank, args=(r, world, meeting, function, arguments, results))
            for r in range(world)
        ]
        try:
            for process in processes:
                process.start()
            return _collect(results, world, timeout)
        finally:
            for process in processes:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(results: Any, world: int, timeout: float) -> list[Any]:
    answers: dict[int, Any] = {}
    while len(answers) < world:
        try:
            rank, good, value = results.get(timeout=timeout)
        except queue.Empty:
            missing = sorted(set(range(world)) - set(answers))
            raise RankFailed(
                f"ranks {missing} of {world} did not answer within {timeout} s"
            ) from None
        if not good:
            raise RankFailed(f"rank {rank} of {world} failed:\n{value}")
        answers[rank] = value
    return [answers[r] for r in range(world)]
