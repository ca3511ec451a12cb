"""Everything that changes a run from outside: its attempts, watcher, evaluations, extensions, and its end.

What to do is decided in `decide`; the commands call these functions and nothing else of the launcher writes into a
run folder or speaks to a scheduler in order to change something.
"""

from __future__ import annotations

import contextlib
import getpass
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launcher import backends, code_copy, jobs, new_attempt
from launcher.backends import Job, Record
from launcher.folder import Attempt, evaluations, tail
from launcher.reconcile import decide
from launcher.reconcile.view import JobView, RunView, read
from selfguide.spec.config import Config
from selfguide.spec.files import plain, to_yaml
from selfguide.spec.identity import digest
from selfguide.spec.records import EvaluationRecord, record_key
from selfguide.spec.run import RunFolder, read_record, write_record
from shards import storage
from shards.errors import UserError

log = logging.getLogger(__name__)

# between two looks of a job that waits to open an attempt
LONGEST_NAP_S = 5.0

# the function that a watcher's job calls, with the run's folder; of `launcher.watch`, which calls this module
WatchEntry = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Launched:
    """An attempt that was submitted."""

    at: Attempt
    job: Record
    # None without evaluation
    watcher: Record | None
    # sentences for the user
    notes: tuple[str, ...] = ()


def check_jobs(config: Config, run: RunFolder, watch_entry: WatchEntry) -> list[str]:
    """Asks the cluster about every job of the run before the first is queued; returns why they would wait, if they do.

    Raises:
        UserError: it would refuse one.
    """
    at, name = Attempt(run.attempt(1)), run.root.name
    wanted = [jobs.training(config, at, name, _save_s(run))]
    if config.evaluation.protocol != "none":
        wanted.append(jobs.evaluation(config, at, name, run.evals / "request.json"))
        wanted.append(jobs.watcher(config, at, name, watch_entry, None))
    # of all jobs the first says most
    notes = [note for job in wanted for note in backends.of(config.cluster).check(job)]
    return notes[:1]


def launch_attempt(run: RunFolder, config: Config, watch_entry: WatchEntry) -> Launched:
    """Opens the run's next attempt, and submits its training job, that job's successor and the run's watcher.

    Raises:
        UserError: the cluster refused them. Then nothing is queued.
    """
    if run.attempt_numbers():
        dismiss(read(run))  # what waits behind an older attempt has nothing to follow any more
    at, record = _submit_training(run, config, by_hand=True)
    watcher = None
    if config.evaluation.protocol != "none":
        try:
            watcher = launch_watcher(at, config, watch_entry, after=record)
        except BaseException:
            backends.cancel(record)
            raise
    try:
        _queue_successor(at, config)
    except UserError as error:
        if watcher is not None:
            note = f"no second job may wait behind this one, so the run's watcher looks after it: {error}"
            return Launched(at=at, job=record, watcher=watcher, notes=(note,))
        backends.cancel(record)
        shutil.rmtree(at.root)
        cluster = replace(config.cluster, restart="requeue")
        done = launch_attempt(run, replace(config, cluster=cluster), watch_entry)
        note = (
            f"no second job may wait behind this one, so cluster.restart=requeue was taken: {error}"
        )
        return replace(done, notes=(*done.notes, note))
    return Launched(at=at, job=record, watcher=watcher)


def go_on(run: RunFolder) -> Attempt | None:
    """Submits the run's next attempt where one is due and no job of the run waits to open it.

    Raises:
        UserError: the cluster refused it.
    """
    with new_attempt.submitting(run):
        view = read(run)
        at, config = view.newest, view.config
        if at is None or config is None or not _restarts(config):
            return None
        following = decide.next_attempt(view)
        early = decide.ended(at) + following.after_s > time.time()
        # one that cannot be seen may be there
        waits = at.successor is not None and at.successor.state != "gone"
        if following.action != "start" or early or waits:
            return None
        opened, _ = _submit_training(run, config, by_hand=False)
        log.info(f"attempt {opened.number} follows: {following.reason}")
        with _said(opened):
            _queue_successor(opened, config)
        return opened


def following(view: RunView, job_id: str) -> decide.Next:
    """Returns what follows the newest attempt, by the job of this id, which runs only because that one is over."""
    at = view.newest
    known = [] if at is None else [job for job in (at.job, at.successor) if job is not None]
    mine = [job for job in known if job.record["id"] == job_id]
    if at is not None and at.successor is not None and not mine:
        return decide.Next(
            "stop", reason=f"another job, {at.successor.label}, follows attempt {at.number}"
        )
    if at is not None and mine:
        gone = replace(at, job=replace(at.job or mine[0], state="gone"))
        view = replace(view, attempts=(*view.attempts[:-1], gone))
    return decide.next_attempt(view)


def take_over(run: RunFolder, job_id: str, logs: Path) -> tuple[Attempt | None, str]:
    """Opens the run's next attempt in the job of this id, which runs already and writes its logs into `logs`.

    It waits where the next attempt is not to begin at once.

    Returns:
        The attempt, None where none follows, and the reason.
    """
    while True:
        with new_attempt.submitting(run):
            view = read(run)
            what, at = following(view, job_id), view.newest
            if what.action != "start" or at is None:
                return None, what.reason
            if view.config is None:
                return None, "; ".join(view.problems)
            left = decide.ended(at) + what.after_s - time.time()
            if left <= 0:
                return _open_in(view, view.config, job_id, logs), what.reason
        log.info(f"attempt {at.number + 1} begins in {left:.0f} s: {what.reason}")
        time.sleep(min(left, LONGEST_NAP_S))


def _open_in(view: RunView, config: Config, job_id: str, logs: Path) -> Attempt | None:
    """The next attempt in a job that runs already; None where the run has been cancelled meanwhile."""
    run, before = view.folder, view.newest
    assert before is not None
    at = Attempt(run.attempt(run.open_attempt()))
    code_copy.share(before.files.code, at.code)
    at.logs.symlink_to(os.path.relpath(logs, at.root))
    job = _prepare_training(at, config, by_hand=False)
    # where its Slurm is, as a submitter saw it: a node may have the configuration elsewhere
    conf = {"conf": before.job.record.get("conf")} if before.job else {}
    about = backends.new_record(config.cluster.kind, replace(job, folder=logs))
    write_record(at.job, {**about, **conf, "id": job_id})
    with _said(at):
        _queue_successor(at, config, conf)
    if not before.files.cancelled.exists():
        return at
    write_record(at.cancelled, {"by": "the cancellation of the attempt before"}, replace=True)
    dismiss(read(run))
    return None


def dismiss(view: RunView) -> None:
    """Cancels the jobs that wait behind training jobs of the run."""
    for at in view.attempts:
        if at.successor is not None and at.successor.state == "queued":
            backends.cancel(at.successor.record)


def _submit_training(run: RunFolder, config: Config, *, by_hand: bool) -> tuple[Attempt, Record]:
    """The next attempt, and the record of its training job."""
    at, (record,) = new_attempt.start(
        run, config.cluster, lambda at: [_prepare_training(at, config, by_hand=by_hand)]
    )
    write_record(at.job, record)
    return at, record


def _prepare_training(at: Attempt, config: Config, *, by_hand: bool) -> Job:
    """Writes what the ranks read; returns their job."""
    storage.publish(str(at.config), to_yaml(config).encode())
    job = jobs.training(config, at, at.run.root.name, _save_s(at.run))
    asked = {"kind": config.cluster.kind, "nodes": job.nodes, "tasks": job.tasks}
    asked |= {"world": job.nodes * job.tasks, "timeout_min": job.timeout_min, "by_hand": by_hand}
    write_record(at.submission, asked)
    return job


def _queue_successor(at: Attempt, config: Config, more: Mapping[str, Any] | None = None) -> None:
    """Queues the job that waits behind attempt `at`, where runs go on in that way here.

    Raises:
        UserError: the cluster refused it.
    """
    if _restarts(config) and config.cluster.restart == "successor":
        job = jobs.successor(config, at, at.run.root.name, _save_s(at.run))
        record = backends.of(config.cluster).submit(job)
        write_record(at.successor, {**record, **(more or {})})


def _restarts(config: Config) -> bool:
    return backends.of(config.cluster).queues and config.cluster.restart != "none"


@contextlib.contextmanager
def _said(at: Attempt) -> Iterator[None]:
    """In the run's own jobs a refused successor is no error: the watcher and the next submission look after it."""
    try:
        yield
    except UserError as error:
        log.warning(f"no job waits behind attempt {at.number}: {error}")


def _save_s(run: RunFolder) -> float | None:
    """Seconds of the slowest checkpoint of all attempts so far; None before the first."""
    reports = [
        read_record(run.attempt(number) / "progress.json") for number in run.attempt_numbers()
    ]
    return max((r["save_s"] for r in reports if r and r.get("save_s") is not None), default=None)


def launch_watcher(
    at: Attempt, config: Config, watch_entry: WatchEntry, after: Record | None = None
) -> Record:
    """Starts the watcher of the attempt's run: a detached process on this machine, a small job on Slurm.

    Args:
        after: the training job that must have begun, so that the watcher's time does not run while training is queued.

    Raises:
        UserError: the cluster refused it.
    """
    job = jobs.watcher(config, at, at.run.root.name, watch_entry, after["id"] if after else None)
    record = backends.of(config.cluster).submit(replace(job, code=_current_code(at)))
    write_record(at.watcher, record, replace=True)
    return record


def _current_code(at: Attempt) -> Path:
    """A copy of the code that this process runs: the attempt's own where that is the same."""
    return code_copy.current(at.code, at.run.root / "code")


def start_evaluation(view: RunView, config: Config, images: int) -> None:
    """Submits one more evaluation job of a published snapshot.

    Raises:
        UserError: the cluster refused it. The try does not count.
    """
    assert view.newest is not None
    run, at = view.folder, view.newest.files
    key = record_key(images, decide.protocol(view, config, images))
    tries = decide.jobs_of(view, config, images)
    attempt = 1 + max((each.attempt for each in tries), default=0)
    folder = evaluations(run) / f"{key}.{attempt}"
    request = folder / "request.json"
    about = {"run": str(run.root), "images": images, "key": key, "attempt": attempt}
    write_record(request, {**about, "config": plain(config)})
    write_record(folder / "submission.json", {"world": 1, "kind": config.cluster.kind})
    job = jobs.evaluation(config, at, run.root.name, request)
    try:
        record = backends.of(config.cluster).submit(replace(job, code=_current_code(at)))
    except UserError:
        shutil.rmtree(folder)
        raise
    write_record(folder / "job.json", record)
    log.info(f"{images:,} images: evaluation {attempt} is {record['kind']} job {record['id']}")


def record_failure(view: RunView, config: Config, images: int, reason: str = "") -> None:
    """Writes the record of a snapshot that no evaluation could score, so that nobody waits for it any longer."""
    protocol = decide.protocol(view, config, images)
    tries = decide.jobs_of(view, config, images)
    last = tries[-1] if tries else None
    logs = sorted(last.folder.glob("*_log.out")) if last else []
    message = reason or (last.exit["message"] if last and last.exit else "ended without a record")
    attempt = last.attempt if last else 1
    record = EvaluationRecord(
        status="failed",
        run=view.id,
        experiment=config.experiment,
        seed=config.seed,
        images=images,
        final=images >= view.images,
        key=record_key(images, protocol),
        attempt=attempt,
        protocol=asdict(protocol),
        protocol_key=protocol.key,
        message=message,
        log=tail(logs[-1]) if logs else "",
        host=socket.gethostname(),
        pid=os.getpid(),
    )
    with contextlib.suppress(FileExistsError):  # it published its score after all
        record.publish(view.folder)
        log.info(f"{images:,} images: gave up after {attempt} tries: {message}")


def write_run(run: RunFolder, config: Config, identity: Mapping[str, Any]) -> None:
    """Writes what a new run is, and its first config."""
    storage.publish(str(run.root / "config.yaml"), to_yaml(config).encode(), replace=True)
    about: dict[str, Any] = {
        "id": run.root.name,
        "name": config.name,
        "experiment": config.experiment,
    }
    about |= {"hash": digest(identity), "identity": identity, "images": config.train.images}
    write_record(run.run_json, {**about, "created": time.time()})


@contextlib.contextmanager
def extended(run: RunFolder, images: int) -> Iterator[None]:
    """Makes `images` the run's target, and records who did so and when; takes it back where the block fails."""
    before = run.describe()
    extension = {"from": before["images"], "to": images, "time": time.time(), "by": _who()}
    extensions = [*before.get("extensions", []), extension]
    write_record(run.run_json, {**before, "images": images, "extensions": extensions}, replace=True)
    try:
        yield
    except BaseException:
        write_record(run.run_json, before, replace=True)
        raise


def cancel(run: RunFolder) -> list[dict[str, Any]]:
    """Ends all jobs of the run, of every attempt; returns those that were there, as {"what", "kind", "id"}.

    Raises:
        UserError: one of them cannot be reached from here.
    """
    done: list[dict[str, Any]] = []
    # again, until nothing new is found: a job that was about to open an attempt may have done so meanwhile
    while ended := _end_all(run, done):
        done += ended
    return done


def _end_all(run: RunFolder, before: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Ends the jobs that can be found now, but for those ended before."""
    view = read(run)
    at = view.newest
    if at and not at.cancelled and _works(view):
        # first: then nothing more is started
        write_record(at.files.cancelled, {"by": _who()}, replace=True)
    done = _end("watcher", [each.watcher for each in view.attempts])
    # before the job that it waits for
    done += _end("successor", [each.successor for each in view.attempts])
    done += _end("training", [each.job for each in view.attempts])
    # read again, now that the watcher can start no more of them
    done += _end("evaluation", [each.job for each in read(run).evaluations])
    if at and at.job:  # its submitter may have died before it wrote the record of a job
        for stray in backends.strays(str(run.root), at.job.record):
            done += _end("unrecorded job", [JobView(record=stray, state="running")])
    known = {(each["kind"], each["id"]) for each in before}
    return [each for each in done if (each["kind"], each["id"]) not in known]


def _works(view: RunView) -> bool:
    """Whether the run would go on by itself."""
    at = view.newest
    waits = at is not None and at.successor is not None and at.successor.state != "gone"
    return waits or decide.training_state(view) != "gone"


def _end(what: str, found: Sequence[JobView | None]) -> list[dict[str, Any]]:
    # one that cannot be seen from here is tried all the same: `cancel` says why it cannot be reached
    return [
        {"what": what, "kind": job.record["kind"], "id": job.record["id"]}
        for job in found
        if job is not None and job.state != "gone" and backends.cancel(job.record)
    ]


def _who() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"
