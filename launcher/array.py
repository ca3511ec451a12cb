"""Arrays: tasks that share out one piece of work and need not run at the same time. `python -m launcher.array FOLDER`.

An array is an attempt at its work. It differs from an attempt of a run in that each task is a job of its own, with a
folder for its request and its exit record:

    <runs>/<kind>/<id>/attempts/0001/array.json  code/  job/  tasks/00000/{request,submission,start-0,exit-0}.json

A task that dies leaves the others alone, for each ends by taking over what nobody has done. The same command again
joins an array that is at work, and submits the next one where it is not.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher import backends, new_attempt
from launcher.attempt.exits import Exit, exit_path, start_path
from launcher.attempt.heartbeat import heartbeat_path
from launcher.backends import Job, Record
from launcher.backends.local import gpus
from launcher.compose import compose_cluster, without_group
from launcher.folder import Attempt, tail
from selfguide.spec.config import ClusterConfig
from selfguide.spec.config.cluster import check_cluster
from selfguide.spec.config.laws import check
from selfguide.spec.run import RunFolder, read_record, write_record
from shards import cli, storage
from shards.errors import UserError

RECORD = "array.json"
ENDED = ("done", "failed", "lost")
# patience with schedulers, of who only looks
LOOK_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is shared out: each task calls `function` with the folder that holds its request."""

    # the verb, which names the folder and the jobs
    kind: str
    # the same for the same work
    id: str
    function: Callable[[str], None]
    # one per task, as JSON
    requests: Sequence[Mapping[str, Any]]
    # a folder or s3:// prefix in which `of` records appear, *.json, as the work is done
    counted: str
    of: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """The state of one task."""

    number: int
    # of its job
    id: str
    # queued, running, unknown, done, failed, or lost: ended without an exit record
    state: str
    message: str
    log: str


def cluster_of(overrides: Sequence[str]) -> ClusterConfig:
    """Returns the cluster that `cluster=NAME cluster.key=value ...` means; `auto` is decided as in `launcher.submit`.

    Raises:
        UserError: it cannot be read, or a value is out of range.
    """
    found = compose_cluster(overrides)
    if found.kind == "auto":
        kind = backends.automatic()
        found = compose_cluster([*without_group(overrides, "cluster"), f"cluster={kind}"])
    check(found, "cluster")
    check_cluster(found, nodes=1)
    return found


def submit(work: Work, cluster: ClusterConfig, runs: Path) -> tuple[Path, bool]:
    """Submits or joins an array; returns its folder and whether it is new.

    Raises:
        UserError: the cluster refuses it, or nobody can say whether the last one works. Nothing was queued.
    """
    run = RunFolder(runs.expanduser().resolve() / work.kind / work.id)
    if not work.requests:
        raise UserError("tasks=0: give at least 1")
    for note in backends.of(cluster).check(_jobs(work, cluster, Attempt(run.attempt(1)))[0]):
        print(f"note: {note}", file=sys.stderr)
    with new_attempt.submitting(run):
        last = _newest(run)
        states = {task.state for task in tasks(last)} if last else set()
        if last and "unknown" in states:
            raise UserError(
                f"nobody can say whether the tasks of {last} still work: try again when their cluster answers"
            )
        if last and states - set(ENDED):
            return last, False
        at, jobs = new_attempt.start(run, cluster, lambda at: _prepare(work, cluster, at))
        about = {"work": work.kind, "kind": cluster.kind, "counted": work.counted, "of": work.of}
        write_record(at.root / RECORD, {**about, "jobs": jobs})
        return at.root, True


def tasks(folder: Path) -> list[Task]:
    """Returns the state of each task of an array."""
    records: list[Record] = read(folder)["jobs"]
    states = zip(records, backends.states(records), strict=True)
    return [_task(folder, number, *each) for number, each in enumerate(states)]


def counted(folder: Path) -> tuple[int, int]:
    """Returns how many records of finished work exist, and how many there will be."""
    array = read(folder)
    names = storage.list(array["counted"])
    return min(sum(name.endswith(".json") for name in names), array["of"]), array["of"]


def cost(folder: Path) -> dict[str, Any]:
    """Returns what the work of an array has taken, earlier arrays included: seconds of GPUs, or of ranks without."""
    arrays = [each for each in folder.parent.iterdir() if (each / RECORD).exists()]
    records = [(each, record) for each in arrays for record in enumerate(read(each)["jobs"])]
    states = backends.states([record for _, (_, record) in records], LOOK_S)
    seconds, unit = 0.0, "rank"
    for (each, (number, record)), state in zip(records, states, strict=True):
        ran = _ran(_folder(each, number), time.time() if state == "running" else None)
        gpus = record.get("gpus") or 0
        seconds += ran * (gpus or 1)
        unit = "GPU" if gpus else unit
    return {"seconds": round(seconds, 3), "unit": unit}


def _ran(task: Path, now: float | None) -> float:
    """For how many seconds a task's process ran, up to now or to the last that it said."""
    begin = read_record(start_path(task, 0))
    last = read_record(exit_path(task, 0)) or read_record(heartbeat_path(task, 0))
    if begin is None:
        return 0.0
    end = last["time"] if last and (now is None or "code" in last) else now
    return max(0.0, (end or begin["time"]) - begin["time"])


def cancel(folder: Path) -> int:
    """Ends all tasks; returns how many were queued or at work."""
    return backends.cancel_all(read(folder)["jobs"])


def follow(folder: Path) -> int:
    """Shows how the work goes until no task is left: 0 when all of it is there, 1 when it is not."""
    try:
        for _ in cli.track(_finished(folder), counted(folder)[1], "finished by all tasks"):
            pass
    except KeyboardInterrupt:
        print(f"\nno longer following; the tasks go on. End them: {_command(folder)} --cancel")
        return 130
    done, of = counted(folder)
    missing = f"{of - done} of {of} are missing: give the command that submitted the array again"
    print(missing if done < of else f"all {of} are there")
    for task in tasks(folder):
        if task.state in ("failed", "lost"):
            print(f"task {task.number} {task.state}: {task.message or 'see its log'} ({task.log})")
    return 0 if done == of else 1


def _finished(folder: Path) -> Iterator[int]:
    """Every finished piece as it appears, until no task is left; a log gets lines in place of a bar."""
    poll_s = backends.of_record(read(folder)["jobs"][0]).poll_s
    seen, shown = 0, ""
    while True:
        found = tasks(folder)  # before counting: what they finished until then is counted
        done, of = counted(folder)
        now = f"{done} of {of} finished, tasks: {_summary(found)}"
        if now != shown and not sys.stderr.isatty():
            print(now, flush=True)
        yield from range(seen, done)
        seen, shown = max(seen, done), now
        if all(task.state in ENDED for task in found):
            return
        time.sleep(poll_s)


def sentences(folder: Path, new: bool) -> str:
    """Returns what was submitted, and the commands to go on with."""
    array = read(folder)
    jobs: list[Record] = array["jobs"]
    many = f"{len(jobs)} task{'s' if len(jobs) > 1 else ''}"
    end = backends.of_record(jobs[0]).cancel_command(jobs)
    lines = [
        f"{'submitted' if new else 'at work already:'} {many}, {array['kind']} {_together(jobs)}",
        f"folder  {folder}",
        "",
        f"  {_command(folder)}            show the tasks",
        f"  {_command(folder)} -f         and follow them until they end",
        f"  {_command(folder)} --cancel   end them{f', or {end}' if end else ''}",
        f"  tail -f {jobs[0]['folder']}/*_log.out",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = cli.parser(
        "launcher.array",
        "Shows the tasks of an array, such as `tools.shards encode --tasks` submits.",
        "runs/encode/3f2a91c05d77/attempts/0001 -f",
    )
    parser.add_argument("folder", type=Path, help="of the array, as its submission printed it")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-f", "--follow", action="store_true", help="go on until all have ended")
    what.add_argument("--cancel", action="store_true", help="end all tasks; what is done is kept")
    what.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    folder = options.folder
    if options.cancel:
        print(f"ended {cancel(folder)} of {len(read(folder)['jobs'])} tasks")
        return 0
    if options.follow:
        return follow(folder)
    found, (done, of) = tasks(folder), counted(folder)
    if options.json:
        shown = {"done": done, "of": of, "cost": cost(folder)}
        print(json.dumps({**shown, "tasks": [vars(task) for task in found]}))
        return 0
    for task in found:
        print(f"{task.number:5}  {task.id:14} {task.state:8} {task.message}".rstrip())
    print(f"{done} of {of} finished, tasks: {_summary(found)}")
    spent = cost(folder)
    hours = spent["seconds"] / 3600
    print(f"took {hours:,.2f} {spent['unit']}-hours so far, in all arrays of this work")
    return 0


def _prepare(work: Work, cluster: ClusterConfig, at: Attempt) -> list[Job]:
    """Writes each task's request; returns the jobs."""
    for number, request in enumerate(work.requests):
        folder = _folder(at.root, number)
        write_record(folder / "submission.json", {"world": 1, "kind": cluster.kind})
        storage.publish(str(folder / "request.json"), json.dumps(request, indent=1).encode())
    return _jobs(work, cluster, at)


def _jobs(work: Work, cluster: ClusterConfig, at: Attempt) -> list[Job]:
    """One per task. A Slurm task has a node's share to itself; local ones share out the GPUs."""
    count, found = len(work.requests), gpus()
    first = Job(
        function=work.function,
        argument="",
        folder=at.logs,
        code=at.code,
        name=f"sg-{work.kind}-{work.id}",
        comment=str(at.root),
        gpus=cluster.gpus_per_node if cluster.request_gpus else 0,
        cpus_per_task=cluster.cpus_per_task,
        mem_gb=cluster.mem_gb,
        timeout_min=cluster.timeout_min,
        threads=max(1, len(os.sched_getaffinity(0)) // count),
        environment=cluster.environment,
    )
    return [
        replace(
            first,
            argument=str(_folder(at.root, number)),
            devices=tuple(
                found[number::count] or found[number % len(found) :][:1] if found else ()
            ),
        )
        for number in range(count)
    ]


def _task(folder: Path, number: int, record: Record, state: str) -> Task:
    log = Path(record["folder"]) / f"{record['id']}_0_log.out"
    message = ""
    if state == "gone":
        ended = Exit.read(_folder(folder, number))
        if ended is None:
            state, message = "lost", tail(log, lines=1)
        else:
            state, message = "failed" if ended.code else "done", ended.message
    return Task(number=number, id=record["id"], state=state, message=message, log=str(log))


def _summary(found: Sequence[Task]) -> str:
    states = [task.state for task in found]
    return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))


def _together(jobs: Sequence[Record]) -> str:
    """12_[0-7] of the tasks of a Slurm array."""
    ids = [job["id"] for job in jobs]
    array = {id.partition("_")[0] for id in ids}
    if len(array) == 1 and len(ids) > 1:
        return f"array {array.pop()}_[0-{len(ids) - 1}]"
    return ", ".join(ids)


def _folder(folder: Path, number: int) -> Path:
    return folder / "tasks" / f"{number:05d}"


def _newest(run: RunFolder) -> Path | None:
    """The last array that was submitted; a submission that died has no record."""
    # arrays of earlier versions are numbered in the work's own folder
    early = sorted(int(path.name) for path in run.root.iterdir() if path.name.isdecimal())
    folders = [run.root / str(number) for number in early]
    folders += [run.attempt(number) for number in run.attempt_numbers()]
    complete = [folder for folder in folders if (folder / RECORD).exists()]
    return complete[-1] if complete else None


def read(folder: Path) -> Record:
    """Returns the record of an array: its kind, its jobs, and what to count.

    Raises:
        UserError: the folder holds none.
    """
    found = read_record(folder / RECORD)
    if found is None:
        raise UserError(f"{folder} is no folder of an array: it holds no {RECORD}")
    return found


def _command(folder: Path) -> str:
    return f"python -m launcher.array {shlex.quote(str(folder))}"


if __name__ == "__main__":
    cli.run(main)
