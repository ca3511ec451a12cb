"""Where a run stands, derived from its folder and the cluster's answer each time anew; nothing is remembered."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from launcher import clusters
from launcher.folder import Attempt, evaluations
from selfguide.spec.config import Config
from selfguide.spec.files import read_config
from selfguide.spec.records import EvaluationRecord, Protocol, read_record_file, record_key, records
from selfguide.spec.run import RunFolder, read_record

Word = Literal[
    "new", "queued", "running", "evaluating", "finished", "failed", "cancelled", "unknown"
]

STARTING_S = 120.0  # a submission without a job this long was interrupted


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation job: a folder in `evals/jobs`."""

    folder: Path
    key: str
    images: int
    attempt: int
    state: clusters.State
    record: EvaluationRecord | None  # what it published
    exit: dict[str, Any] | None  # how its process ended


@dataclass(frozen=True, kw_only=True)
class Status:
    """One row of `launcher.runs`."""

    id: str
    experiment: str
    name: str | None
    folder: str
    state: Word
    section: str | None  # of training: joining ranks, starting, train, done
    images: int
    of: int
    images_per_s: float | None
    eta_s: float | None
    loss: float | None
    data_share: float | None  # of the time, what the slowest rank waited for data
    attempts: int
    job: str | None  # cluster and job id
    snapshots: int
    scored: int
    failed_evaluations: int
    score: float | None
    metric: str | None
    score_images: int | None
    message: str

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def read_many(runs: Sequence[RunFolder]) -> list[Status]:
    """The status of every run; each Slurm is asked once."""
    newest = [Attempt.newest(run) for run in runs]
    wanted = [path for at in newest if at for path in (at.job, at.watcher)]
    found = {path: record for path in wanted if (record := read_record(path)) is not None}
    states = dict(zip(found, clusters.states(list(found.values())), strict=True))
    return [_status(run, at, states) for run, at in zip(runs, newest, strict=True)]


def read(run: RunFolder) -> Status:
    return read_many([run])[0]


def training_state(at: Attempt) -> clusters.State:
    """Of the attempt's job; one that is just being submitted counts as queued."""
    record = read_record(at.job)
    return clusters.state(record) if record else _without_job(at)


def evaluation_jobs(run: RunFolder) -> list[Evaluation]:
    """Every evaluation job that was ever started, oldest first."""
    root = evaluations(run)
    folders = sorted(root.iterdir()) if root.is_dir() else []
    jobs = [read_record(folder / "job.json") for folder in folders]
    there = [job for job in jobs if job is not None]
    states = iter(clusters.states(there))
    # states first: a job that ends after this look has its record in place by the next
    found = [next(states) if job is not None else "gone" for job in jobs]
    made = []
    for folder, state in zip(folders, found, strict=True):
        key, _, attempt = folder.name.rpartition(".")
        path = run.evals / f"{folder.name}.json"
        record = read_record_file(path) if path.exists() else None
        ended = read_record(folder / "exit-0.json")
        images = int(key.split("-")[1])
        made.append(
            Evaluation(
                folder=folder,
                key=key,
                images=images,
                attempt=int(attempt),
                state=state,
                record=record,
                exit=ended,
            )
        )
    return made


def failure(at: Attempt) -> str:
    """Why the attempt failed, '' where no rank did: the first to fail speaks, those that were ended for it do not."""
    world = (read_record(at.submission) or {}).get("world", 0)
    named = [*range(world), "unknown"]
    starts = {rank for rank in named if (at.root / f"start-{rank}.json").exists()}
    exits = {
        rank: found
        for rank in named
        if (found := read_record(at.root / f"exit-{rank}.json")) is not None
    }
    killed = sorted(rank for rank in starts - set(exits) if rank != "unknown")
    bad = sorted(
        (r["time"], str(rank), r)
        for rank, r in exits.items()
        if r["code"] and r["class"] != "signal"
    )
    said = f"rank {bad[0][1]}: {bad[0][2]['message']}" if bad else ""
    if killed:
        silent = f"rank {killed[0]} ended without a word (killed from outside, for example out of memory)"
        return f"{silent}; {said}" if said else silent
    if said:
        return said
    if starts != set(range(world)):
        absent = next(rank for rank in range(world) if rank not in starts)
        return f"rank {absent} never started: see its log"
    ended = sorted((r["time"], str(rank), r) for rank, r in exits.items() if r["code"])
    return f"rank {ended[0][1]} was {ended[0][2]['message']}" if ended else ""


def _without_job(at: Attempt) -> clusters.State:
    submission = read_record(at.submission)
    if submission is None:  # the folder was made and nothing else yet, or never
        return "queued" if time.time() - at.root.stat().st_mtime < STARTING_S else "gone"
    return "queued" if time.time() - submission["time"] < STARTING_S else "gone"


def _status(run: RunFolder, at: Attempt | None, states: dict[Path, clusters.State]) -> Status:
    about = run.describe()
    progress = (read_record(at.root / "progress.json") if at else None) or {}
    published = run.published()
    done = list(records(run))
    training = states.get(at.job) or _without_job(at) if at else "gone"
    word, message = _word(
        run, at, training, states.get(at.watcher, "gone") if at else "gone", published, about
    )
    newest = max(
        (r for r in done if r.done),
        key=lambda r: (r.images, r.time),
        default=None,
    )
    job = read_record(at.job) if at else None
    live = word == "running"
    return Status(
        id=about["id"],
        experiment=about["experiment"],
        name=about.get("name"),
        folder=str(run.root),
        state=word,
        section=progress.get("section"),
        images=max([progress.get("images") or 0, *published[-1:]]),
        of=about["images"],
        images_per_s=progress.get("images_per_s") if live else None,
        eta_s=progress.get("eta_s") if live else None,
        loss=progress.get("loss"),
        data_share=progress.get("data_share") if live else None,
        attempts=len(run.attempt_numbers()),
        job=f"{job['kind']} {job['id']}" if job else None,
        snapshots=len(published),
        scored=len({r.key for r in done if r.done}),
        failed_evaluations=len({r.key for r in done if not r.done}),
        score=newest.score if newest else None,
        metric=newest.metric if newest else None,
        score_images=newest.images if newest else None,
        message=message,
    )


def _word(
    run: RunFolder,
    at: Attempt | None,
    training: clusters.State,
    watcher: clusters.State,
    published: list[int],
    about: dict[str, Any],
) -> tuple[Word, str]:
    """The state in one word, and why where it is not well."""
    if at is None:
        return "new", "no attempt yet"
    if about["images"] in published:
        waiting = unscored(run, at, published)
        if waiting and watcher in ("running", "queued"):
            return "evaluating", f"{counted(len(waiting), 'snapshot')} waiting for a score"
        return "finished", f"{counted(len(waiting), 'snapshot')} without a score" if waiting else ""
    if training == "queued":
        return "queued", _waits(at)
    if training == "running":
        return "running", ""
    if at.cancelled.exists():
        return "cancelled", ""
    if training == "unknown":
        return "unknown", "the cluster does not answer, or the job runs on another machine"
    return "failed", failure(at) or "ended before its last snapshot"


def unscored(run: RunFolder, at: Attempt, published: list[int]) -> list[int]:
    """Published snapshots that the attempt's protocol has no record of, done or failed."""
    if not at.config.exists():  # the attempt is being submitted
        return []
    config = read_config(at.config)
    if config.evaluation.protocol == "none":
        return []
    return unrecorded(run, config, published)


def unrecorded(run: RunFolder, config: Config, published: list[int]) -> list[int]:
    """Published snapshots without a record, done or failed, under the protocol of `config`."""
    known = {(record.images, record.protocol_key) for record in records(run)}
    return [i for i in published if (i, protocol_at(run, config, i).key) not in known]


def protocol_at(run: RunFolder, config: Config, images: int) -> Protocol:
    """How `config` scores the published snapshot at so many images."""
    return Protocol.of(config, run.snapshot_manifest(images))


def key_at(run: RunFolder, config: Config, images: int) -> str:
    """The key of the snapshot's record under the protocol of `config`."""
    return record_key(images, protocol_at(run, config, images))


def _waits(at: Attempt) -> str:
    job = read_record(at.job)
    return (
        "being submitted"
        if job is None
        else f"waits for {job['nodes']} x {job['tasks']} ranks on {job['kind']}"
    )


def counted(number: int, what: str) -> str:
    """'1 snapshot', '2 snapshots'."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def tail(path: Path, lines: int = 20) -> str:
    """The last lines of a log; '' where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64_000))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
