"""The run's watcher: snapshots that exist, minus scores that exist, are evaluation jobs.

A loop of three steps. `observe` reads the folder and the cluster, `decide` is pure, `act` submits and records. It
never speaks to the trainer; killing it loses nothing, since the next one finds the same files.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher import clusters, jobs, status
from launcher.attempt import end_on_signals
from launcher.folder import Attempt, evaluations
from launcher.lock import held
from selfguide.spec.config import Config
from selfguide.spec.files import plain, read_config
from selfguide.spec.records import EvaluationRecord, record_key
from selfguide.spec.run import RunFolder, read_record, write_record
from shards import cli
from shards.errors import UserError

POLL_S = {"local": 1.0, "slurm": 5.0, "devcluster": 2.0}
REFUSED_S = 30.0  # before asking again a cluster that refused an evaluation
REFUSALS = 60  # half an hour of them, and the evaluation counts as failed


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One look at a run."""

    published: tuple[int, ...]  # images of the complete snapshots
    final: int
    scored: frozenset[int]  # have a record, done or failed
    in_flight: frozenset[int]
    tries: Mapping[int, int]  # evaluation jobs started so far
    hopeless: frozenset[int]  # ended by a user error, which trying again repeats
    ended: bool  # no attempt works on the run
    cancelled: bool
    slots: int
    limit: int  # tries per snapshot


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What follows from a look."""

    start: tuple[int, ...]
    give_up: tuple[int, ...]
    done: bool


def decide(facts: Facts) -> Plan:
    """Newest first, so that a backlog does not delay what one waits for; the final snapshot is the newest."""
    if facts.cancelled:
        return Plan(start=(), give_up=(), done=True)
    waiting = [
        i for i in sorted(facts.published, reverse=True) if i not in facts.scored | facts.in_flight
    ]
    lost = tuple(i for i in waiting if i in facts.hopeless or facts.tries.get(i, 0) >= facts.limit)
    free = max(0, facts.slots - len(facts.in_flight))
    start = tuple([i for i in waiting if i not in lost][:free])
    over = facts.ended or facts.final in facts.published
    return Plan(start=start, give_up=lost, done=over and not waiting and not facts.in_flight)


def observe(run: RunFolder, at: Attempt, config: Config) -> Facts:
    """Reads the cluster before the files: what ended before the look has its files in place."""
    ended = status.training_state(at) == "gone"
    published = run.published()
    keys = {status.key_at(run, config, images) for images in published}
    started = [e for e in status.evaluation_jobs(run) if e.key in keys]
    scored = frozenset(published) - set(status.unrecorded(run, config, published))
    return Facts(
        published=tuple(published),
        final=run.describe()["images"],
        scored=scored,
        in_flight=frozenset(
            e.images for e in started if e.state != "gone" and e.images not in scored
        ),
        tries={
            i: max(e.attempt for e in started if e.images == i) for i in {e.images for e in started}
        },
        hopeless=frozenset(e.images for e in started if e.exit and e.exit["class"] == "user"),
        ended=ended,
        cancelled=at.cancelled.exists(),
        slots=config.evaluation.in_flight,
        limit=config.evaluation.attempts,
    )


def watch(root: Path) -> None:
    """Watches until the run needs nothing more. A second watcher of a run waits here for the first to end."""
    run = RunFolder(root)
    with held(root / "watch.lock"):
        refused = 0
        while True:
            at = Attempt.newest(run)
            if at is None:
                return
            if not at.config.exists():  # a newer attempt is being submitted
                time.sleep(1.0)
                continue
            config = read_config(at.config)
            if config.evaluation.protocol == "none":
                return
            plan = decide(observe(run, at, config))
            for images in plan.give_up:
                _record_failure(run, config, images)
            if plan.done:
                _say("nothing left to evaluate")
                return
            try:
                for images in plan.start:
                    start(run, at, config, images)
                refused = 0 if plan.start else refused
            except UserError as error:
                refused += 1
                _say(f"the cluster refused an evaluation ({refused} of {REFUSALS}): {error}")
                if refused >= REFUSALS:
                    for images in plan.start:
                        _record_failure(run, config, images, str(error))
            time.sleep(REFUSED_S if refused else POLL_S[config.cluster.kind])


def entry(run: str) -> None:
    """What Submitit calls where the watcher is a Slurm job."""
    end_on_signals(None)
    watch(Path(run))


def start(run: RunFolder, at: Attempt, config: Config, images: int) -> None:
    """Submits one more evaluation job of a snapshot."""
    key = status.key_at(run, config, images)
    attempt = 1 + max((e.attempt for e in status.evaluation_jobs(run) if e.key == key), default=0)
    folder = evaluations(run) / f"{key}.{attempt}"
    request = folder / "request.json"
    about = {"run": str(run.root), "images": images, "key": key, "attempt": attempt}
    write_record(request, {**about, "config": plain(config)})
    write_record(folder / "submission.json", {"world": 1, "kind": config.cluster.kind})
    try:
        record = clusters.submit(
            jobs.evaluation(config, at, run.root.name, request), config.cluster
        )
    except UserError:
        for path in folder.iterdir():  # nothing was queued: the try does not count
            path.unlink()
        folder.rmdir()
        raise
    write_record(folder / "job.json", record)
    _say(f"{images:,} images: evaluation {attempt} is {record['kind']} job {record['id']}")


def launch(at: Attempt, config: Config) -> clusters.Record:
    """Starts the watcher of the run that `at` belongs to: a detached process here, a small job on Slurm."""
    training = read_record(at.job)
    # its time must not run while training waits in the queue
    after = training["id"] if training else None
    job = jobs.watcher(config, at, at.run.root.name, entry, after)
    record = clusters.submit(job, config.cluster)
    write_record(at.watcher, record, replace=True)
    return record


def _record_failure(run: RunFolder, config: Config, images: int, reason: str = "") -> None:
    """The record of a snapshot that no attempt could score, so that nobody waits for it any longer."""
    protocol = status.protocol_at(run, config, images)
    key = record_key(images, protocol)
    tried = [e for e in status.evaluation_jobs(run) if e.key == key]
    attempt = max((e.attempt for e in tried), default=1)
    last = tried[-1] if tried else None
    logs = sorted(last.folder.glob("*_log.out")) if last else []
    message = reason or (last.exit["message"] if last and last.exit else "ended without a record")
    record = EvaluationRecord(
        status="failed",
        run=run.describe()["id"],
        experiment=config.experiment,
        seed=config.seed,
        images=images,
        final=images >= run.describe()["images"],
        key=key,
        attempt=attempt,
        protocol=asdict(protocol),
        protocol_key=protocol.key,
        message=message,
        log=status.tail(logs[-1]) if logs else "",
        host=socket.gethostname(),
        pid=os.getpid(),
    )
    with contextlib.suppress(FileExistsError):  # it published its score after all
        record.publish(run)
        _say(f"{images:,} images: gave up after {attempt} tries: {message}")


def _say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launcher.watch",
        description="Turns the snapshots of a run that have no score into evaluation jobs, until none is left. "
        "`launcher.submit` starts it; by hand it is of use when a watcher was lost.",
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    arguments = parser.parse_args()
    if not (arguments.run / "run.json").is_file():
        raise UserError(
            f"run={str(arguments.run)!r} is no run folder; `python -m launcher.runs` lists them"
        )
    watch(arguments.run.resolve())
    return 0


if __name__ == "__main__":
    cli.run(main)
