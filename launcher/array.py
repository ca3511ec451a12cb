"""Arrays: jobs that share out one piece of work and need not run at the same time. `python -m launcher.array FOLDER`.

Every task has a folder with its request and what it left; the array's own says what was submitted and what to count:

    <runs>/<kind>/<id>/<number>/array.json  code/  logs/  tasks/00000/{request,submission,start-0,exit-0}.json

A task that dies leaves the others alone, for each ends by taking over what nobody has done. The same command again
joins an array that is at work, and submits the next one where it is not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher import clusters, code_copy, local
from launcher.clusters import Job, Record
from launcher.compose import compose_cluster, without_group
from launcher.lock import held
from launcher.status import tail
from selfguide.spec.config import ClusterConfig
from selfguide.spec.run import read_record, write_record
from shards import cli, storage
from shards.errors import UserError

RECORD = "array.json"
POLL_S = {"local": 0.5, "slurm": 5.0, "devcluster": 1.0}
ENDED = ("done", "failed", "lost")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is shared out: `function` is called in each task with the folder that holds its request."""

    kind: str  # the verb, which names the folder and the jobs
    id: str  # the same for the same work
    function: Callable[[str], None]
    requests: Sequence[Mapping[str, Any]]  # one a task, as JSON has them
    counted: (
        str  # a folder or s3:// prefix in which `of` records appear, *.json, as the work is done
    )
    of: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """Where one task stands."""

    number: int
    id: str  # of its job
    state: str  # queued, running, unknown, done, failed, or lost: ended without a word
    message: str
    log: str


def cluster_of(overrides: Sequence[str]) -> ClusterConfig:
    """The cluster that `cluster=NAME cluster.key=value ...` means; `auto` is decided as `launcher.submit` does.

    Raises:
        UserError: it cannot be read, or is for ranks of one job.
    """
    found = compose_cluster(overrides)
    if found.kind == "auto":
        kind = "slurm" if clusters.answers() else "local"
        found = compose_cluster([*without_group(overrides, "cluster"), f"cluster={kind}"])
    for name in ("gpus_per_node", "timeout_min"):
        if getattr(found, name) < 1:
            raise UserError(f"cluster.{name}={getattr(found, name)}: give at least 1")
    return found


def submit(work: Work, cluster: ClusterConfig, runs: Path) -> tuple[Path, bool]:
    """Submits or joins the array; its folder, and whether it is new.

    Raises:
        UserError: the cluster refuses it, or nobody can say whether the last one works. Nothing was queued.
    """
    root = runs.expanduser().resolve() / work.kind / work.id
    _check(work, cluster, root)
    root.mkdir(parents=True, exist_ok=True)
    with held(root / "submit.lock"):
        last = _newest(root)
        states = {task.state for task in tasks(last)} if last else set()
        if last and "unknown" in states:
            raise UserError(
                f"nobody can say whether the tasks of {last} still work: try again when their cluster answers"
            )
        if last and states - set(ENDED):
            return last, False
        return _new(work, cluster, root / str(max(_numbers(root), default=0) + 1)), True


def tasks(folder: Path) -> list[Task]:
    """Where each task of an array stands."""
    array = read(folder)
    records: list[Record] = array["jobs"]
    return [
        _task(folder, number, record, state)
        for number, (record, state) in enumerate(
            zip(records, clusters.states(records), strict=True)
        )
    ]


def counted(folder: Path) -> tuple[int, int]:
    """(records of finished work that are there, how many there will be)."""
    array = read(folder)
    names = storage.list(array["counted"])
    return min(sum(name.endswith(".json") for name in names), array["of"]), array["of"]


def cancel(folder: Path) -> int:
    """Ends all tasks; how many were there."""
    return clusters.cancel_all(read(folder)["jobs"])


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
    """Every finished piece as it appears, until no task is left; tells a log what a bar would show."""
    pause, seen, said = POLL_S[read(folder)["kind"]], 0, ""
    while True:
        found = tasks(folder)  # before counting: what they finished until then is counted
        done, of = counted(folder)
        now = f"{done} of {of} finished, tasks: {_summary(found)}"
        if now != said and not sys.stderr.isatty():
            print(now, flush=True)
        yield from range(seen, done)
        seen, said = max(seen, done), now
        if all(task.state in ENDED for task in found):
            return
        time.sleep(pause)


def sentences(folder: Path, new: bool) -> str:
    """What was submitted, and the commands to go on with."""
    array = read(folder)
    ids = [record["id"] for record in array["jobs"]]
    many = f"{len(ids)} task{'s' if len(ids) > 1 else ''}"
    lines = [
        f"{'submitted' if new else 'at work already:'} {many}, {array['kind']} {_together(ids)}",
        f"folder  {folder}",
        "",
        f"  {_command(folder)}            how they stand",
        f"  {_command(folder)} -f         and until they end",
        f"  {_command(folder)} --cancel   end them"
        + (f", or scancel {ids[0].partition('_')[0]}" if array["kind"] != "local" else ""),
        f"  tail -f {folder / 'logs'}/*_log.out",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher.array",
        description="Shows the tasks of an array, such as `tools.shards encode --tasks` submits.",
        epilog="example: python -m launcher.array runs/encode/3f2a91c05d77/1 -f",
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
        print(json.dumps({"done": done, "of": of, "tasks": [vars(task) for task in found]}))
        return 0
    for task in found:
        print(f"{task.number:5}  {task.id:14} {task.state:8} {task.message}".rstrip())
    print(f"{done} of {of} finished, tasks: {_summary(found)}")
    return 0


def _check(work: Work, cluster: ClusterConfig, root: Path) -> None:
    if not work.requests:
        raise UserError("tasks=0: give at least 1")
    clusters.check(_jobs(work, cluster, root / "1")[0], cluster)


def _new(work: Work, cluster: ClusterConfig, folder: Path) -> Path:
    """Writes the folder of an array and submits it. Once a job may run from it, it stays."""
    try:
        folder.mkdir()
        code_copy.copy(folder / "code")
        for number, request in enumerate(work.requests):
            at = _folder(folder, number)
            write_record(at / "submission.json", {"world": 1, "kind": cluster.kind})
            storage.publish(str(at / "request.json"), json.dumps(request, indent=1).encode())
        jobs = _jobs(work, cluster, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    try:
        records = clusters.submit_array(jobs, cluster)
    except UserError:
        shutil.rmtree(folder)
        raise
    about = {"work": work.kind, "kind": cluster.kind, "counted": work.counted, "of": work.of}
    write_record(folder / RECORD, {**about, "jobs": records})
    return folder


def _jobs(work: Work, cluster: ClusterConfig, folder: Path) -> list[Job]:
    """One a task. A Slurm task has a node's share to itself; local ones share out the GPUs."""
    count, gpus = len(work.requests), local.gpus()
    first = Job(
        function=work.function,
        argument="",
        folder=folder / "logs",
        code=folder / "code",
        name=f"sg-{work.kind}-{work.id}",
        comment=str(folder),
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
            argument=str(_folder(folder, number)),
            devices=tuple(gpus[number::count] or gpus[number % len(gpus) :][:1] if gpus else ()),
        )
        for number in range(count)
    ]


def _task(folder: Path, number: int, record: Record, state: str) -> Task:
    left = read_record(_folder(folder, number) / "exit-0.json")
    log = Path(record["folder"]) / f"{record['id']}_0_log.out"
    message = ""
    if state == "gone":
        state = "lost" if left is None else "done" if left["code"] == 0 else "failed"
        lines = tail(log).splitlines() if state == "lost" and log.exists() else []
        message = left["message"] if left else "".join(lines[-1:])
    return Task(number=number, id=record["id"], state=state, message=message, log=str(log))


def _summary(found: Sequence[Task]) -> str:
    states = [task.state for task in found]
    return ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))


def _together(ids: Sequence[str]) -> str:
    """12_[0-7] of the tasks of a Slurm array."""
    array = {id.partition("_")[0] for id in ids}
    if len(array) == 1 and len(ids) > 1:
        return f"array {array.pop()}_[0-{len(ids) - 1}]"
    return ", ".join(ids)


def _folder(folder: Path, number: int) -> Path:
    return folder / "tasks" / f"{number:05d}"


def _newest(root: Path) -> Path | None:
    """The last array that was submitted; a submission that died has no record."""
    complete = [n for n in _numbers(root) if (root / str(n) / RECORD).exists()]
    return root / str(max(complete)) if complete else None


def _numbers(root: Path) -> list[int]:
    return [int(path.name) for path in root.iterdir() if path.name.isdecimal()]


def read(folder: Path) -> Record:
    """What an array's folder says of it.

    Raises:
        UserError: it is none.
    """
    found = read_record(folder / RECORD)
    if found is None:
        raise UserError(f"{folder} is no folder of an array: it holds no {RECORD}")
    return found


def _command(folder: Path) -> str:
    return f"python -m launcher.array {folder}"


if __name__ == "__main__":
    cli.run(main)
