"""This machine as a cluster: jobs in sessions of their own, known by a token that all their processes carry.

Submitit starts the tasks. What is ours: the controller outlives the shell that submitted it and that shell's
Ctrl-C; one failed rank ends the others, as `srun --kill-on-bad-exit` does; and a job is known by an environment
variable that every descendant inherits, so that a reused process id is never mistaken for it, nor killed for it.

`python -m launcher.local FOLDER` is the controller; it is started here and by nobody else.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

GRACE_S = 5.0  # between asking a process to end and killing it
TOKEN = "SELFGUIDE_JOB"

_children: list[subprocess.Popen[bytes]] = []  # kept to be reaped when they end before us


def submit(
    function: Any,
    argument: str,
    folder: Path,
    *,
    tasks: int,
    timeout_min: int,
    environment: Mapping[str, str],
    cwd: Path,
    nice: int = 0,
) -> dict[str, Any]:
    """Starts `tasks` processes that call `function(argument)`; returns at once with the job's record."""
    from submitit.local.local import LocalExecutor, LocalJob

    token = uuid.uuid4().hex
    settings = {
        "SUBMITIT_LOCAL_NTASKS": str(tasks),
        "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * timeout_min),
        "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "0",
        "SUBMITIT_LOCAL_NODEID": "0",
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_STDERR_TO_STDOUT": "1",
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_WITH_SHELL": "",
        TOKEN: token,
    }

    class Executor(LocalExecutor):
        """Submitit's, with a controller that leaves this session."""

        def _submit_command(self, command: str) -> LocalJob[Any]:
            env = {**environment, **settings, "SUBMITIT_LOCAL_COMMAND": command}
            controller = [sys.executable, "-m", "launcher.local", str(self.folder)]
            pid = _start(controller, env, cwd, self.folder / "controller.log")
            return LocalJob(folder=self.folder, job_id=str(pid), tasks=list(range(tasks)))

    python = f"nice -n {nice} {shlex.quote(sys.executable)}" if nice else None
    executor = Executor(folder, python=python)
    executor.update_parameters(timeout_min=timeout_min, tasks_per_node=tasks)
    return _record(int(executor.submit(function, argument).job_id), token)


def spawn(
    command: list[str], *, environment: Mapping[str, str], cwd: Path, log: Path
) -> dict[str, Any]:
    """One detached process, without Submitit; the job's record."""
    token = uuid.uuid4().hex
    return _record(_start(command, {**environment, TOKEN: token}, cwd, log), token)


def alive(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """'running', 'gone' or, for another machine's jobs, 'unknown'; one look at the process table for all."""
    for child in _children:
        child.poll()
    tokens: set[str] | None = None
    found = []
    for record in records:
        if record["host"] != socket.gethostname():
            found.append("unknown")
        elif record["boot"] != _boot():
            found.append("gone")
        elif _started(record["pid"]) == record["start"]:
            found.append("running")
        else:  # the controller is gone; its ranks may not be
            tokens = set(_tokens().values()) if tokens is None else tokens
            found.append("running" if record["token"] in tokens else "gone")
    return found


def kill(record: Mapping[str, Any], grace_s: float = GRACE_S) -> bool:
    """Ends every process of the job: SIGTERM, and SIGKILL to what is left after the grace.

    Returns whether anything was alive; of another machine's job nothing is known and nothing is done.
    """
    if alive([record]) != ["running"]:
        return False
    _signal(record, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while _members(record) and time.monotonic() < deadline:
        time.sleep(0.05)
    while _members(record):  # a member may fork between the look and the kill
        _signal(record, signal.SIGKILL)
        time.sleep(0.05)
    return True


def gpus() -> list[str]:
    """Indices of the GPUs that jobs may use: CUDA_VISIBLE_DEVICES where it is set, else the device files."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [part for part in chosen.split(",") if part]
    # CUDA counts what it sees from 0, whatever the device files of a container are called
    return [str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def _start(command: list[str], environment: Mapping[str, str], cwd: Path, log: Path) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # no terminal, no Ctrl-C, no SIGHUP
        )
    _children.append(process)
    return process.pid


def _record(pid: int, token: str) -> dict[str, Any]:
    return {
        "id": str(pid),
        "pid": pid,
        "start": _started(pid),
        "token": token,
        "host": socket.gethostname(),
        "boot": _boot(),
    }


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _started(pid: int) -> int | None:
    """The process's start in clock ticks since boot, which tells it from a later one with its id; None if dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # a zombie works no more


def _tokens() -> dict[int, str]:
    """Process id -> token, of every process here that carries one."""
    found = {}
    mark = f"{TOKEN}=".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            environ = (folder / "environ").read_bytes()
        except OSError:  # ended meanwhile, or somebody else's: not one of ours
            continue
        marked = [part for part in environ.split(b"\0") if part.startswith(mark)]
        if marked:
            found[int(folder.name)] = marked[0][len(mark) :].decode(errors="replace")
    return found


def _members(record: Mapping[str, Any]) -> list[int]:
    return [pid for pid, token in _tokens().items() if token == record["token"] and _started(pid)]


def _signal(record: Mapping[str, Any], number: signal.Signals) -> None:
    for pid in _members(record):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue  # it ended by itself


def control(folder: Path) -> None:
    """Runs a job's tasks; the first that fails ends the others."""
    from submitit.local.local import Controller

    class FirstFailureEndsAll(Controller):
        """Submitit's waits for every task: a rank whose peer has died would sit in a collective."""

        def wait(self, freq: int = 24) -> list[int | None]:
            deadline = time.monotonic() + self.timeout_s
            while True:
                codes = [task.poll() for task in self.tasks]
                if all(code is not None for code in codes):
                    return codes
                if any(code not in (None, 0) for code in codes) or time.monotonic() > deadline:
                    return self.end()
                time.sleep(1 / freq)

        def end(self) -> list[int | None]:
            self._forward_signal(signal.SIGTERM)
            deadline = time.monotonic() + GRACE_S
            while any(task.poll() is None for task in self.tasks) and time.monotonic() < deadline:
                time.sleep(0.05)
            return [task.poll() for task in self.tasks]  # `run` kills what is left

    FirstFailureEndsAll(folder).run(max_retry=1)


if __name__ == "__main__":
    control(Path(sys.argv[1]))
