"""Real gloo ranks as processes of this machine, for tests and benchmarks; they always end with their caller."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from shards.errors import DamagedError, StoreError, UserError

DAY = 24 * 3600


class RankFailed(RuntimeError):
    """A rank raised, or did not answer."""


def _rank(
    rank: int,
    world: int,
    meeting: str,
    timeout: float | None,
    variables: dict[str, str],
    folder: Path,
    on_cpu: bool,
    function: Callable,
    arguments: tuple,
    results: Any,
) -> None:
    # a fork server hands down those of the moment when it began
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    if on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    import torch

    from selfguide.distributed import RankInfo, join, leave

    torch.set_num_threads(1)
    os.environ["SELFGUIDE_HOST"] = "127.0.0.1"
    rank_info = RankInfo(rank, rank, world)
    try:
        join(rank_info, Path(meeting), timeout_s=int(timeout or DAY))
        results.put((rank, True, function(rank_info, *arguments)))
    except (UserError, DamagedError, StoreError) as error:
        _fail(results, rank, error)
    except BaseException:  # noqa: BLE001 - the parent raises it, whatever it is
        _fail(results, rank, traceback.format_exc())
    finally:
        leave()


def _fail(results: Any, rank: int, why: Exception | str) -> None:
    """Says it at once: when this rank leaves, those that wait for it fail too, and theirs is not the reason."""
    results.put((rank, False, why))
    results.close()
    results.join_thread()


def run_ranks(
    world: int,
    function: Callable,
    *arguments: Any,
    timeout: float | None = 240,
    start: Literal["spawn", "forkserver"] = "spawn",
    on_cpu: bool = False,
) -> list[Any]:
    """[function(rank_info, *arguments) of each of `world` ranks]; `function` is module-level, answers are pickled.

    Args:
        start: how the processes begin. A spawned one imports torch anew; those of multiprocessing's fork server share
            what it imported.
        on_cpu: the ranks see no GPU. Several cannot share one: NCCL refuses it.

    Raises:
        UserError, DamagedError, StoreError: a rank raised it.
        RankFailed: with the rank's traceback; a rank that died without a word, or those that did not answer within
            `timeout` seconds each (None waits as long as they live).
    """
    context: Any = multiprocessing.get_context(start)
    results = context.Queue()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        meeting, here = str(Path(folder) / "rendezvous.json"), (dict(os.environ), Path.cwd())
        processes = [
            context.Process(
                target=_rank,
                args=(r, world, meeting, timeout, *here, on_cpu, function, arguments, results),
            )
            for r in range(world)
        ]
        answered = False
        try:
            # Ctrl-C is withheld from them: their parent answers it and ends them, and says so once
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # ranks inherit it
            try:
                for process in processes:
                    process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            found = _collect(results, processes, timeout)
            answered = True
            return found
        finally:
            for process in processes:
                process.join(
                    timeout=5 if answered else 0
                )  # after a failure nobody waits for a collective
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(results: Any, processes: list[Any], timeout: float | None) -> list[Any]:
    answers: dict[int, Any] = {}
    world, heard = len(processes), time.monotonic()
    while len(answers) < world:
        missing = sorted(set(range(world)) - set(answers))
        # asked before the queue is: what a rank put there before it ended is still read
        ended = [r for r in missing if processes[r].exitcode is not None]
        try:
            rank, good, value = results.get(timeout=1)
        except queue.Empty:
            if ended:
                code = processes[ended[0]].exitcode
                raise RankFailed(
                    f"rank {ended[0]} of {world} died without an answer, exit code {code} (-9: often no memory)"
                ) from None
            if timeout is not None and time.monotonic() - heard > timeout:
                raise RankFailed(
                    f"ranks {missing} of {world} did not answer within {timeout} s"
                ) from None
            continue
        if not good:
            if isinstance(value, Exception):
                raise value
            raise RankFailed(f"rank {rank} of {world} failed:\n{value}")
        answers[rank], heard = value, time.monotonic()
    return [answers[r] for r in range(world)]
