"""This machine as a backend: jobs in sessions of their own, known by a token that all their processes carry.

Submitit starts the ranks. The rest is ours: the job outlives the shell that submitted it and that shell's Ctrl-C; one
failed rank ends the others, as `srun --kill-on-bad-exit` does (`launcher.local`); and a job is identified by an
environment variable that every descendant inherits, so a reused process id is never mistaken for it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.backends import submitit_names
from launcher.backends.protocol import (
    Ending,
    Job,
    Node,
    Record,
    Span,
    State,
    Waiting,
    clean,
    new_record,
)
from shards.errors import UserError
from shards.wait import wait_until

# seconds between asking a job to end and killing it: its ranks finish a step and save
SAVE_S = 60.0
# the same where one of its ranks has failed: nothing can be saved then, and the others end by themselves in 15 s
END_S = 16.0
# an index, or a name
_DEVICE = re.compile(r"\d|GPU-|MIG-")
TOKEN = "SELFGUIDE_JOB"
# of a record, to find its processes
_NEEDED = {"host", "boot", "pid", "start"}

# kept to be reaped when they end before us
_children: list[subprocess.Popen[bytes]] = []


class Local:
    """Implements `Backend` with processes of this machine, which run at once."""

    poll_s = 0.5
    queues = False

    def script(self, job: Job) -> None:
        return None

    def check(self, job: Job) -> list[str]:
        return []

    def free_nodes(self, job: Job) -> int:
        return 1

    def submit(self, job: Job) -> Record:
        return self.submit_array([job])[0]

    def submit_array(self, jobs: Sequence[Job]) -> list[Record]:
        started: list[Record] = []
        try:
            for job in jobs:
                started.append(new_record("local", job) | _start(job))
        except BaseException:
            self.cancel(started)
            raise
        return started

    def states(self, records: Sequence[Record], patience_s: float | None = None) -> list[State]:
        for child in _children:
            child.poll()
        tokens: set[str] | None = None
        found: list[State] = []
        for record in records:
            # a record that is torn names no machine
            if not record.keys() >= _NEEDED or record["host"] != socket.gethostname():
                found.append("unknown")
            elif record["boot"] != _boot():
                found.append("gone")
            elif _started(record["pid"]) == record["start"]:
                found.append("running")
            else:  # the controller is gone; its ranks may not be
                tokens = set(_tokens().values()) if tokens is None else tokens
                found.append("running" if record["token"] in tokens else "gone")
        return found

    def endings(
        self, records: Sequence[Record], patience_s: float | None = None, *, deep: bool = False
    ) -> list[Ending]:
        return [_ending(ending_path(Path(record["folder"]), record["id"])) for record in records]

    def waiting(self, records: Sequence[Record], patience_s: float | None = None) -> list[Waiting]:
        return [{} for _ in records]

    def spans(
        self, records: Sequence[Record], patience_s: float | None = None
    ) -> list[tuple[Span, ...]]:
        found: list[tuple[Span, ...]] = []
        for record in records:
            said = _ending(ending_path(Path(record["folder"]), record["id"]))
            found.append((Span(record["submitted"], said.get("time"), 0.0),))
        return found

    def cancel(self, records: Sequence[Record], grace_s: float = SAVE_S) -> int:
        """Sends SIGTERM to every process of the jobs, and SIGKILL to those left after the grace."""
        found = list(zip(records, self.states(records), strict=True))
        live = [record for record, state in found if state == "running"]
        _signal(live, signal.SIGTERM)
        wait_until(lambda: not _members(live), timeout_s=grace_s)
        while _members(live):  # a member may fork between the look and the kill
            _signal(live, signal.SIGKILL)
            time.sleep(0.05)
        # one that is about to be gone has no environment any more
        wait_until(lambda: "running" not in self.states(live), timeout_s=END_S)
        for record, state in found:
            if state == "unknown":
                raise UserError(f"job {record['id']} runs on {record['host']}: cancel it there")
        return len(live)

    def warn(self, record: Record) -> None:
        _signal([record], signal.SIGUSR2)

    def strays(self, comment: str) -> list[Record]:
        return []

    def nodes(self, patience_s: float | None = None) -> list[Node]:
        return []

    def notes(self, ranks: int) -> list[str]:
        count = len(gpus())
        if not 0 < count < ranks:
            return []
        return [
            f"{count} GPU for {ranks} ranks: training on CPU; cluster.gpus_per_node={count} uses it"
        ]

    def cancel_command(self, records: Sequence[Record]) -> None:
        return None


def gpus() -> list[str]:
    """Returns indices of the GPUs that jobs may use: CUDA_VISIBLE_DEVICES where it is set, else the device files."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        # at one that is none, such as -1, CUDA stops to read
        return [*itertools.takewhile(_DEVICE.match, chosen.replace(" ", "").split(","))]
    # CUDA counts what it sees from 0, whatever the device files of a container are called
    return [str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def _start(job: Job) -> dict[str, Any]:
    """Starts the processes of a job and returns at once; how to find them."""
    if job.command:
        return _spawn(job.command, _environment(job), job.code, job.folder.with_suffix(".log"))
    from submitit.local.local import LocalExecutor, LocalJob

    started: list[dict[str, Any]] = []
    environment = {
        **_environment(job),
        "CUDA_VISIBLE_DEVICES": ",".join(job.devices),
        "SUBMITIT_LOCAL_NTASKS": str(job.tasks),
        "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * job.timeout_min),
        "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "0",
        "SUBMITIT_LOCAL_NODEID": "0",
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_STDERR_TO_STDOUT": "1",
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_WITH_SHELL": "",
    }

    class Executor(LocalExecutor):
        """Submitit's, with a controller that leaves this session, for any folder."""

        @property
        def _submitit_command_str(self) -> str:
            return submitit_names.command(self.python, self.folder)

        def _submit_command(self, command: str) -> LocalJob[Any]:
            controller = (sys.executable, "-m", "launcher.local", str(self.folder))
            settings = {**environment, "SUBMITIT_LOCAL_COMMAND": command}
            started.append(_spawn(controller, settings, job.code, self.folder / "controller.log"))
            tasks = list(range(job.tasks))
            return LocalJob(folder=self.folder, job_id=started[0]["id"], tasks=tasks)

    job.folder.mkdir(parents=True, exist_ok=True)
    python = f"nice -n {job.nice} {shlex.quote(sys.executable)}" if job.nice else None
    submitit_names.install()
    executor = Executor(job.folder, python=python)
    executor.update_parameters(timeout_min=job.timeout_min, tasks_per_node=job.tasks)
    executor.submit(job.function, job.argument)
    return started[0]


def ending_path(folder: Path, id: str) -> Path:
    """Returns where the controller of a job's ranks says how they ended; jobs of an array share a folder."""
    return folder / f"{id}_ended.json"


def _ending(path: Path) -> Ending:
    try:
        found = json.loads(path.read_text())
    except (
        OSError,
        ValueError,
    ):  # its controller was killed, or is of an older version and writes none
        return {}
    return found if isinstance(found, dict) else {}


def _environment(job: Job) -> dict[str, str]:
    """This shell's variables less an outer job's, and where the code is."""
    environment = clean(os.environ)
    if job.nice:
        # it works beside others: threads that spin while they wait, as by default, take many times as long there, and
        # those that sleep a third longer on cores of their own (docs/performance.md)
        environment.setdefault("OMP_WAIT_POLICY", "passive")
    given = dict(job.environment)
    # a user's own comes behind the job's code, and before what is inherited
    paths = [str(job.code), given.pop("PYTHONPATH", ""), environment.get("PYTHONPATH", "")]
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(job.threads),
        # the machine's own name may not resolve
        "SELFGUIDE_HOST": "127.0.0.1",
    }
    return environment | given


def _spawn(
    command: Sequence[str], environment: Mapping[str, str], cwd: Path, log: Path
) -> dict[str, Any]:
    """Starts one detached process; how to find it and its descendants."""
    token = uuid.uuid4().hex
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            command,
            env={**environment, TOKEN: token},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # no terminal, no Ctrl-C, no SIGHUP
        )
    _children.append(process)
    return {
        "id": str(process.pid),
        "pid": process.pid,
        "start": _started(process.pid),
        "token": token,
        "host": socket.gethostname(),
        "boot": _boot(),
    }


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _started(pid: int) -> int | None:
    """The process's start in clock ticks since boot, which tells it from a later one with its id; None if dead."""
    found = process(pid)
    return found[1] if found else None


def process(pid: int) -> tuple[str, int] | None:
    """Returns the state of a process (R, S, D, T, ...) and its start in clock ticks since boot; None if dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else (fields[0], int(fields[19]))  # a zombie works no more


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


def _members(records: Sequence[Record]) -> list[int]:
    """Ids of all processes that belong to these jobs."""
    tokens = {record["token"] for record in records}
    return [pid for pid, token in _tokens().items() if token in tokens and _started(pid)]


def _signal(records: Sequence[Record], number: signal.Signals) -> None:
    for pid in _members(records):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue  # it ended by itself
