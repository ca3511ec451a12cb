"""The life of a rank: who it is, its signals and logging, its work, and the record of how it ended."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from launcher.attempt import heartbeat, logs, signals, stacks, steps
from launcher.attempt.exits import Exit, exit_path, peer_failed, write_start
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.run import read_record
from shards.errors import UserError

# global rank, local rank and world size, as the process that starts the ranks states them
_VARIABLES = {
    "local": ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_LOCALID", "SUBMITIT_LOCAL_NTASKS"),
    "slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
}


# seconds after its exit record in which a rank must have ended: leaving a group may wait for ranks that are gone
END_S = 15.0


def run_rank(
    folder: Path,
    work: Callable[[int, int, int], None],
    status: RankStatus | None = None,
    leave: Callable[[], None] | None = None,
) -> None:
    """Calls `work(rank, local_rank, world)` and leaves an exit record; ends the process unless all is well.

    Only a SIGKILL leaves no record, and a start record without one is read as that.

    Args:
        status: what `work` says of itself; without one a signal ends it at once.
        leave: called after the record of an end that all ranks come to together.
    """
    names = _VARIABLES.get(os.environ.get("SUBMITIT_EXECUTOR", ""), ("",))
    rank_name = os.environ.get(names[0], "unknown")
    status = status or RankStatus()
    ended: Exit | None = None

    def end(error: BaseException | None) -> Exit:
        """Records how this rank ends, once; from then on it has `END_S` seconds, whatever it hangs in."""
        nonlocal ended
        if ended is None:
            ended = _ending(error, folder, rank_name, status)
            status.ending = True
            ended.write(exit_path(folder, rank_name))
            # by a thread of C: what hangs may hold the interpreter's lock
            faulthandler.dump_traceback_later(END_S, exit=True)
        return ended

    # where an error unwinds, stores and ranks may be waited for that are gone
    status.fails = end
    # where it was when it crashes in C, and where it is when it is asked
    faulthandler.enable()
    stacks.offer()
    signals.stop_on_signals(folder, rank_name, status)
    write_start(folder, rank_name)
    heartbeat.begin(folder, rank_name, status)
    try:
        rank, local_rank, world = rank_info(os.environ)
        logs.configure(rank)
        submitted = (read_record(folder / "submission.json") or {}).get("world")
        if world != submitted:
            raise UserError(
                f"{world} ranks were started and {submitted} submitted; submit the run again"
            )
        work(rank, local_rank, world)
        end(None)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - any kind: the record names it
        kind = end(error).kind
        if kind == "node":
            print(error, file=sys.stderr)
        elif kind != "preempted":
            traceback.print_exc()
    assert ended is not None
    if leave is not None and ended.kind in ("ok", "preempted"):
        leave()
    if ended.code:
        # not through Submitit, which makes a 1 of every exception, and past everything that may hang at exit
        with contextlib.ExitStack() as last:
            last.callback(os._exit, ended.code)
            sys.stdout.flush()
            sys.stderr.flush()
            # it may wait for ranks of another node of which it hears nothing any more
            steps.end_srun(folder)


def _ending(error: BaseException | None, folder: Path, rank: str, status: RankStatus) -> Exit:
    """How a rank ends by this error, or without one."""
    if error is None:
        return Exit.well(status)
    found = Exit.of(error, status)
    if found.kind != "preempted" and status.stop and peer_failed(folder, rank):
        # the cause is in that record
        return Exit.signalled(status.stop, status, preempted=False)
    return found


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
