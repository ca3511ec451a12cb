"""The three places a job can run, behind one `submit`, `states` and `cancel`: local, slurm, devcluster.

A `Job` says what to run; its record, a plain dict that lives in the run folder, is all that later commands need,
from any process. What Slurm does not answer is `unknown`, never `gone`: a job that is thought dead gets a successor.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from launcher import local
from selfguide.spec.config import ClusterConfig
from shards.errors import UserError

State = Literal["queued", "running", "gone", "unknown"]
Record = dict[str, Any]

PING_S = 2.0  # a controller that needs longer is not the one to wait for
ANSWER_S = 20.0  # patience with sbatch, squeue and scancel
_LEAKS = re.compile(
    r"SLURM|SBATCH_|SRUN_|SLURMD_|PMI|SUBMITIT_"
)  # an outer job's, wrong for an inner one
_RANKS = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "GROUP_RANK",
}
_QUEUED = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One function of `launcher.attempt` with one string, and what it needs."""

    function: Callable[[str], None]
    argument: str
    folder: Path  # of Submitit's files and the ranks' logs
    code: Path  # the code copy it runs from
    name: str
    comment: str  # the run folder: finds a run's jobs without any record
    nodes: int = 1
    tasks: int = 1  # per node
    gpus: int = 0  # per node, asked of Slurm
    devices: tuple[str, ...] = ()  # GPUs of this machine, local only
    cpus_per_task: int | None = None
    mem_gb: float | None = None
    timeout_min: int
    threads: int = 1  # of each local task
    nice: int = 0  # local only
    singleton: bool = False  # Slurm starts one of a name at a time
    after: str | None = None  # Slurm job that must have begun
    environment: Mapping[str, str] = field(default_factory=dict)


def answers() -> bool:
    """Whether a Slurm controller answers from here within 2 s."""
    if shutil.which("scontrol") is None:
        return False
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=PING_S)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and " UP" in done.stdout


def sbatch_script(job: Job, cluster: ClusterConfig) -> str:
    """The batch script, from Submitit's own generator; needs no Slurm."""
    from submitit.slurm import slurm

    command = (
        f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(job.folder))}"
    )
    return slurm._make_sbatch_string(
        command=command, folder=job.folder, **_parameters(job, cluster)
    )


def check(job: Job, cluster: ClusterConfig) -> None:
    """Asks the cluster whether it would take this job, with the real flags; queues nothing.

    Raises:
        UserError: it would not, or nobody answers.
    """
    if cluster.kind == "local":
        return
    client = _client(cluster.kind)
    script = sbatch_script(job, cluster)
    try:
        done = _run(["sbatch", "--test-only"], client, stdin=script)
    except FileNotFoundError:
        raise UserError(
            f"cluster={cluster.kind}: no sbatch on this machine; submit from a login node, or take cluster=local"
        ) from None
    if done is None:
        raise UserError(
            f"cluster={cluster.kind}: Slurm did not answer within {ANSWER_S:.0f} s; try again later"
        )
    if done.returncode:
        reason = (
            re.sub(r"(sbatch: |error: |allocation failure: )", "", done.stderr)
            .strip()
            .replace("\n", "; ")
        )
        raise UserError(
            f"Slurm would refuse this job ({_asked(job, cluster)}): {reason}{_partitions(client)}"
        )


def submit(job: Job, cluster: ClusterConfig) -> Record:
    """Starts or queues `job`; its record, ready for `states` and `cancel`.

    Raises:
        UserError: the cluster refused it.
    """
    return submit_array([job], cluster)[0]


def submit_array(jobs: Sequence[Job], cluster: ClusterConfig) -> list[Record]:
    """Starts or queues jobs that are alike but for their arguments, and need not run together: a record each.

    On Slurm they are one array. A job that fails leaves the others alone. Where not all of them come to be, those that
    did are ended; a Slurm that does not answer may still have some.

    Raises:
        UserError: the cluster refused them; none is there.
    """
    first = jobs[0]
    first.folder.mkdir(parents=True, exist_ok=True)
    if cluster.kind == "local":
        return _start_all(jobs, cluster)
    from submitit.core.utils import FailedJobError
    from submitit.slurm.slurm import SlurmExecutor

    client = _client(cluster.kind)
    with _environment(client):
        executor = SlurmExecutor(first.folder, max_num_timeout=0)
        executor.update_parameters(**_parameters(first, cluster))
        about = _about(first, cluster) | {"conf": client.get("SLURM_CONF")}
        try:
            done = executor.map_array(first.function, [job.argument for job in jobs])
        except FailedJobError as error:
            raise UserError(f"sbatch refused {first.name}: {error}") from error
        except BaseException:  # Ctrl-C, say, after Slurm took them and before it said so
            cancel_all(stray(first.comment, about))
            raise
    return [about | {"id": each.job_id} for each in done]


def _start_all(jobs: Sequence[Job], cluster: ClusterConfig) -> list[Record]:
    """Jobs on this machine: all of them, or none."""
    started: list[Record] = []
    try:
        started.extend(_about(job, cluster) | _start(job) for job in jobs)
    except BaseException:
        cancel_all(started)
        raise
    return started


def _about(job: Job, cluster: ClusterConfig) -> Record:
    about: Record = {"name": job.name, "kind": cluster.kind, "folder": str(job.folder)}
    about |= {"comment": job.comment, "nodes": job.nodes, "tasks": job.tasks}
    return about | {"submitted": time.time()}


def _start(job: Job) -> Record:
    """A job on this machine."""
    return local.submit(
        job.function,
        job.argument,
        job.folder,
        tasks=job.tasks,
        timeout_min=job.timeout_min,
        environment=local_environment(job) | {"CUDA_VISIBLE_DEVICES": ",".join(job.devices)},
        cwd=job.code,
        nice=job.nice,
    )


def states(records: Sequence[Record]) -> list[State]:
    """Where each job stands. One `squeue` for each Slurm, one look at the process table, however many records."""
    found: dict[int, State] = {}
    here = [i for i, record in enumerate(records) if record["kind"] == "local"]
    for i, state in zip(here, local.alive(records[i] for i in here), strict=True):
        found[i] = state  # type: ignore[assignment]
    queues: dict[str | None, dict[str, tuple[str, str]] | None] = {}
    for i, record in enumerate(records):
        if i in found:
            continue
        conf = record["conf"]
        if record["kind"] == "devcluster" and not Path(conf).exists():
            found[i] = "gone"  # taken down, and its jobs with it
            continue
        if conf not in queues:
            queues[conf] = _queue(conf)
        found[i] = _state(record, queues[conf])
    return [found[i] for i in range(len(records))]


def state(record: Record) -> State:
    return states([record])[0]


def cancel(record: Record) -> bool:
    """Ends the job and returns once it is gone; whether it was there. Safe to call again.

    Raises:
        UserError: it cannot be reached from here.
    """
    return bool(cancel_all([record]))


def cancel_all(records: Sequence[Record]) -> int:
    """`cancel` of many, by one `scancel` for each Slurm; how many were there."""
    queues: dict[str | None, list[Record]] = {}
    there = 0
    for record, before in zip(records, states(records), strict=True):
        if before == "gone":
            continue
        if record["kind"] != "local":
            queues.setdefault(record["conf"], []).append(record)
        elif before == "unknown":
            raise UserError(f"job {record['id']} runs on {record['host']}: cancel it there")
        else:
            there += local.kill(record)
    for conf, jobs in queues.items():
        _scancel(conf, jobs)
        there += len(jobs)
    return there


def _scancel(conf: str | None, jobs: Sequence[Record]) -> None:
    """Ends jobs of one Slurm and waits for a minute until they are gone."""
    ids = [job["id"] for job in jobs]
    done = _run(["scancel", *ids], _conf(conf))
    if done is None or done.returncode:
        reason = done.stderr.strip() if done else "no answer"
        raise UserError(f"Slurm did not cancel job {', '.join(ids)}: {reason}; try again")
    deadline = time.monotonic() + 60
    while {*states(jobs)} != {"gone"} and time.monotonic() < deadline:
        time.sleep(0.2)


def stray(comment: str, record: Record) -> list[Record]:
    """Slurm jobs of this run that no record names, in the Slurm of `record`: a submitter died in between."""
    if record["kind"] == "local":
        return []
    queue = _queue(record["conf"]) or {}
    same = {"kind": record["kind"], "conf": record["conf"], "comment": comment}
    return [{**same, "id": id, "name": "job"} for id, (_, text) in queue.items() if text == comment]


def local_environment(job: Job) -> dict[str, str]:
    """What a local process sees: this shell's variables less an outer job's, and where its code is."""
    environment = clean(os.environ)
    inherited = environment.get("PYTHONPATH")
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(job.code), *([inherited] if inherited else [])]),
        "OMP_NUM_THREADS": str(job.threads),
        "SELFGUIDE_HOST": "127.0.0.1",  # the machine's own name may not resolve
    }
    return environment | dict(job.environment)


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what an outer Slurm or Submitit job left; SLURM_CONF says which Slurm is meant and stays."""
    kept = {k: v for k, v in environment.items() if not _LEAKS.match(k) and k not in _RANKS}
    if "SLURM_CONF" in environment:
        kept["SLURM_CONF"] = environment["SLURM_CONF"]
    return kept


def _parameters(job: Job, cluster: ClusterConfig) -> dict[str, Any]:
    """In sbatch's own names, as Submitit's generator takes them; what is None is not written."""
    srun = [
        "--kill-on-bad-exit=1",
        "--wait=60",
    ]  # a dead rank ends the others, which would wait for it
    exports = {name: shlex.quote(value) for name, value in job.environment.items()}
    exports["PYTHONPATH"] = f"{shlex.quote(str(job.code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    if job.cpus_per_task:
        srun.append(
            f"--cpus-per-task={job.cpus_per_task}"
        )  # since 22.05 srun does not take the job's
        exports.setdefault("OMP_NUM_THREADS", str(job.cpus_per_task))
    parameters = {
        "job_name": job.name,
        "comment": job.comment,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": job.timeout_min,
        "nodes": job.nodes,
        "ntasks_per_node": job.tasks,
        "gpus_per_node": job.gpus or None,
        "cpus_per_task": job.cpus_per_task,
        "mem": f"{int(job.mem_gb * 1024)}MB" if job.mem_gb else None,
        "dependency": ",".join(
            [
                *(["singleton"] if job.singleton else []),
                *([f"after:{job.after}"] if job.after else []),
            ]
        )
        or None,
        "stderr_to_stdout": True,
        # a second start of one attempt is what the run folder forbids: a restart is a new attempt
        "additional_parameters": {"no-requeue": True},
        "setup": [f"export {name}={value}" for name, value in exports.items()]
        + [f"cd {shlex.quote(str(job.code))}"],
        "srun_args": srun,
    }
    given = {key: value for key, value in parameters.items() if value is not None}
    return {**given, "wckey": None}  # Submitit's default is a key that a site may not know


def _client(kind: str) -> dict[str, str]:
    """The environment in which sbatch and its like speak to the cluster of that kind."""
    environment = clean(os.environ)
    if kind == "devcluster":
        from slurm import devcluster

        found = devcluster.find()
        if found is None:
            raise UserError(
                "cluster=devcluster: no development cluster is up; start it with `make cluster-up`"
            )
        environment |= found.environment()
    return environment


def _conf(conf: str | None) -> dict[str, str]:
    """The same for a job that was submitted: the Slurm it was given to, whatever this shell means now."""
    environment = clean(os.environ)
    environment.pop("SLURM_CONF", None)
    return environment | ({"SLURM_CONF": conf} if conf else {})


@contextlib.contextmanager
def _environment(environment: Mapping[str, str]) -> Iterator[None]:
    """Submitit hands sbatch its own process's environment, so that is what changes."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(
    command: list[str], environment: Mapping[str, str], stdin: str | None = None
) -> subprocess.CompletedProcess[str] | None:
    """None when it does not answer in time."""
    try:
        return subprocess.run(
            command,
            env=dict(environment),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
        )
    except subprocess.TimeoutExpired:
        return None


def _queue(conf: str | None) -> dict[str, tuple[str, str]] | None:
    """Job id -> (Slurm's state, comment) of this user's jobs; None when nobody answers."""
    try:
        asked = ["squeue", "--me", "--array", "--noheader", "--format=%i|%T|%k"]  # a line a task
        done = _run(asked, _conf(conf))
    except FileNotFoundError:
        return None
    if done is None or done.returncode:
        return None
    rows = (line.split("|", 2) for line in done.stdout.splitlines() if line.count("|") >= 2)
    return {id: (word, comment.strip()) for id, word, comment in rows}


def _state(record: Record, queue: dict[str, tuple[str, str]] | None) -> State:
    if queue is None:
        return "unknown"
    word, comment = queue.get(record["id"], ("", ""))
    if not word or comment != record["comment"]:  # a fresh Slurm counts its jobs from 1 again
        return "gone"
    return "queued" if word in _QUEUED else "running"


def _asked(job: Job, cluster: ClusterConfig) -> str:
    asked: dict[str, Any] = {
        "cluster.partition": cluster.partition,
        "cluster.account": cluster.account,
        "cluster.qos": cluster.qos,
    }
    asked |= {"nodes": job.nodes, "ranks per node": job.tasks, "GPUs per node": job.gpus or None}
    return ", ".join(f"{key}={value}" for key, value in asked.items() if value is not None)


def _partitions(client: Mapping[str, str]) -> str:
    """'; partitions here: a, b', which is what one needs most often."""
    try:
        done = _run(["sinfo", "--noheader", "--format=%R"], client)
    except FileNotFoundError:
        return ""
    names = sorted(set(done.stdout.split())) if done and done.returncode == 0 else []
    return f"; partitions here: {', '.join(names)}" if names else ""
