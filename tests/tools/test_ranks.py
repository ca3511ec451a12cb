"""A rank that fails takes all down, with its own words, while others wait for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from shards.errors import UserError
from tools.ranks import RankFailed, run_ranks


def _raises(rank_info: Any) -> None:
    if rank_info.rank == 1:
        raise ValueError("the words of rank 1")
    time.sleep(600)


def _dies(rank_info: Any) -> None:
    if rank_info.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (_raises, "rank 1 of 2 failed:(.|\n)*_raises(.|\n)*the words of rank 1"),
        (_dies, "rank 1 of 2 died .* -9"),
    ],
)
def test_a_failing_rank_ends_all_without_a_timeout(function: Any, said: str) -> None:
    with pytest.raises(RankFailed, match=said):
        run_ranks(2, function, timeout=None)


def _waits_for_a_mistaken_rank(rank_info: Any) -> None:
    if rank_info.rank == 1:
        raise UserError("beta=0: take more")
    dist.barrier()


def test_a_users_mistake_is_the_users_in_a_rank_too() -> None:
    with pytest.raises(UserError, match=r"^beta=0: take more$"):
        run_ranks(2, _waits_for_a_mistaken_rank, timeout=None)


INTERRUPTED = """
import sys
from shards import cli
from tests.tools.test_ranks import _is_there
from tools.ranks import run_ranks
cli.run(lambda: run_ranks(2, _is_there, sys.argv[1], timeout=None))
"""


def _is_there(rank_info: Any, folder: str) -> None:
    (Path(folder) / f"{rank_info.rank}.new").write_text(str(os.getpid()))
    (Path(folder) / f"{rank_info.rank}.new").rename(Path(folder) / f"{rank_info.rank}.pid")
    time.sleep(600)


def test_ctrl_c_ends_all_ranks_and_says_one_word(tmp_path: Path) -> None:
    command = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        cwd=Path(__file__).parents[2], start_new_session=True, text=True, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        while command.poll() is None and len(list(tmp_path.glob("*.pid"))) < 2:
            time.sleep(0.1)
        for file in tmp_path.glob(
            "*.pid"
        ):  # a terminal tells all at once: here ranks hear of it first
            os.kill(int(file.read_text()), signal.SIGINT)
        time.sleep(3)
        command.send_signal(signal.SIGINT)
        _, said = command.communicate(timeout=60)
    finally:
        command.kill()
    assert (command.returncode, said) == (130, "interrupted\n")
    for file in tmp_path.glob("*.pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)
