"""What Submitit calls on every rank of a job, with one string that says which folder to work on.

Submitit pickles these functions by name, and a job imports them from its attempt's code copy, which may be of an older
commit. So `launcher.attempt.train`, `.evaluate` and `.encode` are defined here and keep their names and arguments.
They are the one place of the launcher from which torch is reached, inside functions.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from launcher.attempt import own_code, preflight
from launcher.attempt.entry import run_rank
from launcher.attempt.signals import end_on_signals
from selfguide.spec.config import Config, build
from selfguide.spec.files import read_config
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.run import read_record
from shards.wait import wait_until

__all__ = ["encode", "evaluate", "examine", "succeed", "train"]

# a rank that has left its exit record must have ended after 15 s
DISMISS_S = 8.0


def train(attempt: str) -> None:
    """Runs one rank of a training attempt; `attempt` is its folder.

    A job that Slurm has started once more goes on with the run in a new attempt instead.
    """
    own_code.enter()
    folder = Path(attempt)
    run = folder.parent.parent
    if int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        succeed(str(run))
        return
    _train(folder)


def succeed(run: str) -> None:
    """Runs one rank of a job that waited for the run's training job to end; `run` is the run's folder.

    Rank 0 decides whether the run goes on and opens its next attempt; the others read what it decided. Where the run
    does not go on, all of them leave.
    """
    own_code.enter()
    end_on_signals()
    root = Path(run)
    decision = root / "successors" / f"{job_name(os.environ)}.json"
    if os.environ["SLURM_PROCID"] == "0":
        _ask_launcher(root).check_returncode()

    def decided() -> bool:
        # a listing refreshes what a network file system remembers of the folder
        return decision.parent.is_dir() and decision in set(decision.parent.iterdir())

    wait_until(decided, poll_s=0.2)
    found = read_record(decision)
    assert found is not None
    if found["attempt"] is None:
        print(f"this job leaves: {found['reason']}", flush=True)
        return
    _train(Path(found["attempt"]))


def job_name(environment: Mapping[str, str]) -> str:
    """Returns the id of this Slurm job and how often it was started before."""
    return f"{environment['SLURM_JOB_ID']}.{environment.get('SLURM_RESTART_COUNT') or 0}"


def _ask_launcher(
    run: Path, *options: str, timeout_s: float | None = None
) -> subprocess.CompletedProcess[bytes]:
    # a process of its own: it speaks to Slurm and imports all of the launcher, of which a rank's process knows nothing
    command = [sys.executable, "-m", "launcher.successor", str(run), *options]
    return subprocess.run(command, timeout=timeout_s)


def _train(folder: Path) -> None:
    """Trains as one rank of an attempt; where the run has finished, rank 0 ends what waits for its next attempt."""
    status = RankStatus(section="loading")

    def work(rank: int, local_rank: int, world: int) -> None:
        # not above: it is a program, too
        from launcher.attempt import monitor

        cluster = read_config(folder / "config.yaml").cluster
        monitor.begin(folder, rank, local_rank, cluster, status)
        if local_rank == 0:
            preflight.look(folder)

        from selfguide.training import job

        job.main(folder, rank, local_rank, world, status)

    def leave() -> None:
        from selfguide import distributed

        distributed.leave()

    run_rank(folder, work, status, leave)
    if os.environ.get("SLURM_PROCID") == "0":
        # what waits would leave by itself, once it has its nodes: no controller is waited for
        with contextlib.suppress(subprocess.TimeoutExpired):
            _ask_launcher(folder.parent.parent, "--dismiss", timeout_s=DISMISS_S)


def evaluate(request: str) -> None:
    """Runs the evaluation of one snapshot; `request` is a JSON file."""
    own_code.enter()
    path = Path(request)
    status = RankStatus(section="evaluate")

    def work(rank: int, local_rank: int, world: int) -> None:
        from launcher.attempt import monitor

        cluster = build(Config, json.loads(path.read_text())["config"]).cluster
        monitor.begin(path.parent, rank, local_rank, cluster, status)
        from selfguide.evaluation import job

        job.main(path, status, rank, local_rank, world)

    run_rank(path.parent, work, status)


def encode(task: str) -> None:
    """Runs one task of an array that encodes images; `task` is its folder."""
    own_code.enter()
    folder = Path(task)

    def work(rank: int, local_rank: int, world: int) -> None:
        from selfguide.data.autoencoders.encode import take_share

        take_share(folder)

    run_rank(folder, work)


def examine(check: str) -> None:
    """Runs one rank of a check of the cluster by `launcher.doctor`; `check` is its folder."""
    own_code.enter()
    folder = Path(check)

    def work(rank: int, local_rank: int, world: int) -> None:
        from launcher.attempt import node

        node.examine(folder, rank, local_rank, world)

    run_rank(folder, work)
