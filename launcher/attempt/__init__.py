"""What Submitit calls on every rank of a job, with one string that says which folder to work on.

Submitit pickles these functions by name, and a job imports them from its attempt's code copy, which may be of an older
commit. So `launcher.attempt.train`, `.evaluate` and `.encode` are defined here and keep their names and arguments.
They are the one place of the launcher from which torch is reached, inside functions.
"""

from __future__ import annotations

from pathlib import Path

from launcher.attempt.entry import run_rank
from selfguide.spec.rank_status import RankStatus

__all__ = ["encode", "evaluate", "train"]


def train(attempt: str) -> None:
    """Runs one rank of a training attempt; `attempt` is its folder."""
    folder, status = Path(attempt), RankStatus(section="joining")

    def work(rank: int, local_rank: int, world: int) -> None:
        from selfguide.training import job

        job.main(folder, rank, local_rank, world, status)

    def leave() -> None:
        from selfguide import distributed

        distributed.leave()

    run_rank(folder, work, status, leave)


def evaluate(request: str) -> None:
    """Runs the evaluation of one snapshot; `request` is a JSON file."""
    path = Path(request)

    def work(rank: int, local_rank: int, world: int) -> None:
        from selfguide.evaluation import job

        job.main(path)

    run_rank(path.parent, work)


def encode(task: str) -> None:
    """Runs one task of an array that encodes images; `task` is its folder."""
    folder = Path(task)

    def work(rank: int, local_rank: int, world: int) -> None:
        from selfguide.data.autoencoders.encode import take_share

        take_share(folder)

    run_rank(folder, work)
