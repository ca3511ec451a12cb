"""The life of a rank: who it is, its signals and logging, its work, and the record of how it ended."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from launcher.attempt import logs, signals
from launcher.attempt.exits import Exit, exit_path, write_start
from selfguide.spec.run import read_record
from shards.errors import UserError

# global rank, local rank and world size, as the process that starts the ranks states them
_VARIABLES = {
    "local": ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_LOCALID", "SUBMITIT_LOCAL_NTASKS"),
    "slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
}


def run_rank(folder: Path, work: Callable[[int, int, int], None]) -> None:
    """Calls `work(rank, local_rank, world)` and leaves an exit record; ends the process unless all is well.

    Only a SIGKILL leaves no record, and a start record without one is read as that.
    """
    names = _VARIABLES.get(os.environ.get("SUBMITIT_EXECUTOR", ""), ("",))
    rank_name = os.environ.get(names[0], "unknown")
    exit_record = exit_path(folder, rank_name)
    signals.end_on_signals(exit_record)
    write_start(folder, rank_name)
    try:
        rank, local_rank, world = rank_info(os.environ)
        logs.configure(rank)
        submitted = (read_record(folder / "submission.json") or {}).get("world")
        if world != submitted:
            raise UserError(
                f"{world} ranks were started and {submitted} submitted; submit the run again"
            )
        work(rank, local_rank, world)
    except Exception as error:
        traceback.print_exc()
        ended = Exit.of(error)
        ended.write(exit_record)
        raise SystemExit(
            ended.code
        ) from error  # Submitit makes a 1 of every exception and keeps this
    Exit(code=0, kind="ok").write(exit_record)


def rank_info(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Returns (rank, local rank, world size) as Slurm or Submitit's controller states them.

    Raises:
        UserError: the environment is partial; a guess would train N worlds of one.
    """
    executor = environment.get("SUBMITIT_EXECUTOR", "")
    if executor not in _VARIABLES:
        raise UserError(
            f"SUBMITIT_EXECUTOR={executor!r}: a job is started by launcher.submit, not by hand"
        )
    missing = [name for name in _VARIABLES[executor] if not environment.get(name, "").isdigit()]
    if missing:
        raise UserError(
            f"this task's environment lacks {', '.join(missing)}; start it through launcher.submit"
        )
    rank, local_rank, world = (int(environment[name]) for name in _VARIABLES[executor])
    return rank, local_rank, world
