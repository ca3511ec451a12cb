"""The entry of a job: what Submitit calls on every rank, with one string that says which folder to work on.

Whatever happens to a rank, it leaves `exit-<rank>.json`: code, class and message. Only a SIGKILL leaves nothing,
and that absence is read as one. This is the one module of the launcher from which torch is reached, inside functions.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selfguide.spec.run import Fenced, read_record, write_record
from shards.errors import UserError

_ENDING = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
_VARIABLES = {
    "local": ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_LOCALID", "SUBMITIT_LOCAL_NTASKS"),
    "slurm": ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
}


def train(attempt: str) -> None:
    """One rank of a training attempt."""
    folder = Path(attempt)

    def work(rank: int, local_rank: int, world: int) -> None:
        from selfguide.training import job

        job.main(folder, rank, local_rank, world)

    run_rank(folder, work)


def evaluate(request: str) -> None:
    """The evaluation of one snapshot; `request` is a JSON file."""
    path = Path(request)

    def work(rank: int, local_rank: int, world: int) -> None:
        from selfguide.evaluation import job

        job.main(path)

    run_rank(path.parent, work)


def encode(task: str) -> None:
    """One task of an array that encodes images; `task` is its folder."""
    folder = Path(task)

    def work(rank: int, local_rank: int, world: int) -> None:
        from selfguide.data.autoencoders.encode import take_share

        take_share(folder)

    run_rank(folder, work)


def place(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, local rank, world) as Submitit's cluster states them.

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


def run_rank(folder: Path, work: Callable[[int, int, int], None]) -> None:
    """Finds this rank's place, runs `work` and leaves an exit record; ends the process unless all is well."""
    names = _VARIABLES.get(os.environ.get("SUBMITIT_EXECUTOR", ""), ("",))
    who = os.environ.get(names[0], "unknown")
    exit_record = folder / f"exit-{who}.json"
    end_on_signals(exit_record)
    _write_once(
        folder / f"start-{who}.json", {}
    )  # tells a rank that was killed from one that never came this far
    try:
        rank, local_rank, world = place(os.environ)
        submitted = (read_record(folder / "submission.json") or {}).get("world")
        if world != submitted:
            raise UserError(
                f"{world} ranks were started and {submitted} submitted; submit the run again"
            )
        work(rank, local_rank, world)
    except Exception as error:
        traceback.print_exc()
        code, kind = _classify(error)
        _leave(exit_record, code, kind, f"{type(error).__name__}: {error}", traceback.format_exc())
        raise SystemExit(code) from error  # Submitit makes a 1 of every exception and keeps this
    _leave(exit_record, 0, "ok", "")


def _classify(error: Exception) -> tuple[int, str]:
    if isinstance(error, UserError):
        return UserError.exit_code, "user"
    if isinstance(error, Fenced):
        return 1, "fenced"
    return 1, "error"


def _leave(path: Path, code: int, kind: str, message: str, trace: str = "") -> None:
    _write_once(path, {"code": code, "class": kind, "message": message, "traceback": trace})


def _write_once(path: Path, record: dict[str, Any]) -> None:
    try:
        write_record(path, {**record, "host": os.uname().nodename, "pid": os.getpid()})
    except FileExistsError:
        print(f"{path} stands already", flush=True)  # a signal that arrived while leaving


def end_on_signals(exit_record: Path | None) -> None:
    """SIGTERM, SIGUSR2 and SIGINT end the process at once, with a record.

    Submitit's own handlers ignore the first and requeue on the second. A Python handler alone would wait for the
    collective that the main thread sits in, so a thread reads the signal from the wake-up pipe.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def end() -> None:
        number = signal.Signals(os.read(reader, 1)[0])
        while number not in _ENDING:  # a library's own handler writes to the same pipe
            number = signal.Signals(os.read(reader, 1)[0])
        if exit_record is not None:
            _leave(exit_record, 128 + number, "signal", f"ended by {number.name}")
        os._exit(128 + number)

    for each in _ENDING:
        signal.signal(
            each, lambda *_: None
        )  # the thread acts; a handler must exist for the pipe to be written
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=end, name="signals", daemon=True).start()
    os.register_at_fork(after_in_child=_forget_signals)  # a worker's SIGTERM is its own, not ours


def _forget_signals() -> None:
    signal.set_wakeup_fd(-1)
    for each in _ENDING:
        signal.signal(each, signal.SIG_DFL)
