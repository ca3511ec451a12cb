"""Everything that changes a run from outside: its watcher, evaluations, extensions, and its end; attempts are `launch`.

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
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from launcher import backends, code_copy, jobs
from launcher.backends import Record, settled
from launcher.folder import (
    Attempt,
    evaluation_arrays,
    evaluation_asked,
    evaluations,
    tail,
)
from launcher.reconcile import decide, nodes
from launcher.reconcile.spans import spans_path
from launcher.reconcile.view import LOOK_S, EvaluationView, JobView, RunView, ending_path, read
from selfguide.spec import recipe
from selfguide.spec.config import Config
from selfguide.spec.files import plain, to_yaml
from selfguide.spec.identity import digest
from selfguide.spec.records import EvaluationRecord
from selfguide.spec.run import RunFolder, read_record, write_record
from shards import storage
from shards.errors import UserError

log = logging.getLogger(__name__)

# the function that a watcher's job calls, with the run's folder; of `launcher.watch`, which calls this module
WatchEntry = Callable[[str], None]


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
    _keep_former(at)
    write_record(at.watcher, record, replace=True)
    return record


def _keep_former(at: Attempt) -> None:
    """Keeps the record of a watcher that another one follows: its time belongs to the run, too."""
    former = read_record(at.watcher)
    if former is None:
        return
    number = 1
    while at.former_watcher(number).exists():
        number += 1
    write_record(at.former_watcher(number), former)
    # what is kept beside the record is of the former as well
    for kept in (spans_path, ending_path):
        with contextlib.suppress(FileNotFoundError):
            kept(at.watcher).rename(kept(at.former_watcher(number)))


def _current_code(at: Attempt) -> Path:
    """A copy of the code that this process runs: the attempt's own where that is the same."""
    return code_copy.current(at.code, at.run.root / "code")


def start_evaluation(view: RunView, config: Config, images: int) -> list[str]:
    """Submits one more evaluation job of a published snapshot, unless somebody else does so; returns its name.

    Raises:
        UserError: the cluster refused it. The try does not count.
    """
    return _start(view, [decide.point_of(view, config, images)])


def start_points(view: RunView, points: Sequence[decide.Point]) -> list[str]:
    """Submits one more evaluation job of each of these points of sweeps, as one array; returns their names.

    Raises:
        UserError: the cluster refused them. The tries do not count.
    """
    # jobs of one array have the same resources
    shapes: dict[tuple[str, int], list[decide.Point]] = {}
    for each in points:
        evaluation = each.config.evaluation
        shapes.setdefault((evaluation.protocol, evaluation.ranks), []).append(each)
    return [name for alike in shapes.values() for name in _start(view, alike)]


def _start(view: RunView, points: Sequence[decide.Point]) -> list[str]:
    """Submits a job for each point that nobody else is submitting; they need the same resources."""
    assert view.newest is not None
    run, at, config = view.folder, view.newest.files, points[0].config
    # what may fail comes before a try is claimed
    exclude, code = nodes.names(nodes.barred(run, config)), _current_code(at)
    backend = backends.of(config.cluster)
    requests: list[Path] = []
    try:
        for each in points:
            if (request := _claim(view, each)) is not None:
                requests.append(request)
        if not requests:
            return []
        idle = decide.training_state(view) == "gone"
        final = all(each.images >= view.images for each in points)
        shape = jobs.evaluation(config, at, run.root.name, requests[0], idle=idle, final=final)
        shape = replace(shape, exclude=exclude, code=code)
        if len(requests) == 1:
            records = [backend.submit(shape)]
        else:
            id = digest([each.parent.name for each in requests], 8)
            together = replace(shape, folder=evaluation_arrays(run) / id)
            records = backend.submit_array(
                [replace(together, argument=str(request)) for request in requests]
            )
    except (UserError, OSError):
        # no job came of them
        for request in requests:
            shutil.rmtree(request.parent, ignore_errors=True)
        raise
    for request, record in zip(requests, records, strict=True):
        write_record(request.with_name("job.json"), record)
        log.info(f"evaluation {request.parent.name} is {record['kind']} job {record['id']}")
    return [request.parent.name for request in requests]


def _claim(view: RunView, point: decide.Point) -> Path | None:
    """Writes the request of a point's next try; None where somebody else has done so."""
    run = view.folder
    tries = [each.attempt for each in view.evaluations if each.key == point.key]
    # one that was skipped has a record without a try
    attempt = max(1 + max(tries, default=0), _next_record(view, point))
    folder = evaluations(run) / f"{point.key}.{attempt}"
    about: dict[str, Any] = {"run": str(run.root), "images": point.images}
    about |= {"key": point.key, "attempt": attempt}
    if point.sweep:
        about["sweep"] = point.sweep
    if point.selected:
        about["selected"] = [dict(net) for net in point.selected]
    config = point.config
    try:
        write_record(folder / "request.json", {**about, "config": plain(config)})
    except FileExistsError:
        return None
    submission = {"world": config.evaluation.ranks, "kind": config.cluster.kind}
    try:
        write_record(folder / "submission.json", submission)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder / "request.json"


def keep_recipe(view: RunView) -> tuple[recipe.Front, ...]:
    """Writes what the run's records say of how its snapshots are best sampled, where that is news; returns it."""
    return recipe.keep(view.folder, view.records)


def record_failure(view: RunView, point: decide.Point, reason: str = "") -> None:
    """Writes the record of a snapshot that no evaluation could score, so that nobody waits for it any longer."""
    tries = sorted((e for e in view.evaluations if e.key == point.key), key=lambda e: e.attempt)
    last = tries[-1] if tries else None
    said = last.exit["message"] if last and last.exit else "ended without a record"
    message = reason or said
    attempt = last.attempt if last else _next_record(view, point)
    if _without_score(view, point, "failed", attempt, message, _log(last)):
        log.info(f"{point.images:,} images: gave up after {attempt} tries: {message}")


def record_skip(view: RunView, point: decide.Point, reason: str) -> None:
    """Writes the record of a snapshot that is left out, and why."""
    if _without_score(view, point, "skipped", _next_record(view, point), reason):
        log.info(f"{point.images:,} images: skipped: {reason}")


def _next_record(view: RunView, point: decide.Point) -> int:
    earlier = [record.attempt for record in view.records if record.key == point.key]
    # one that is damaged keeps its number; as they were when the view was read, or two who act at once would differ
    numbers = (name.removeprefix(f"{point.key}.").partition(".")[0] for name in view.damaged)
    earlier += (int(number) for number in numbers if number.isdigit())
    return 1 + max(earlier, default=0)


def _log(each: EvaluationView | None) -> str:
    """The last lines of the log of an evaluation's first rank."""
    if each is None or each.job is None:
        return ""
    return tail(Path(each.job.record["folder"]) / f"{each.job.record['id']}_0_log.out")


def _without_score(
    view: RunView,
    point: decide.Point,
    status: Literal["failed", "skipped"],
    attempt: int,
    message: str,
    log: str = "",
) -> bool:
    """Publishes a record without a score; returns whether nobody else had published one."""
    config = point.config
    protocol = decide.protocol(view, config, point.images)
    record = EvaluationRecord(
        status=status,
        run=view.id,
        experiment=config.experiment,
        seed=config.seed,
        images=point.images,
        final=point.images >= view.images,
        key=point.key,
        attempt=attempt,
        protocol=protocol.plain(),
        protocol_key=protocol.key,
        sweep=point.sweep,
        message=message,
        log=log,
        host=socket.gethostname(),
        pid=os.getpid(),
    )
    # it published its score after all, or somebody else says the same
    with contextlib.suppress(FileExistsError):
        record.publish(view.folder)
        return True
    return False


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


def ask_for_scores(run: RunFolder, *, retry: bool) -> None:
    """Records that somebody wants the scores that are missing, also of a cancelled run.

    Args:
        retry: also where the evaluation itself has failed.
    """
    path, now = evaluation_asked(run), time.time()
    before = (read_record(path) or {}).get("retry", 0.0)
    asked = {"time": now, "retry": now if retry else before, "by": _who()}
    write_record(path, asked, replace=True)


def keep_endings(view: RunView) -> None:
    """Writes down how jobs ended, as long as their schedulers know: again where one has said the last word since."""
    jobs = [(at.files.job, at.job) for at in view.attempts]
    jobs += [(each.folder / "job.json", each.job) for each in view.evaluations]
    for path, job in jobs:
        if job is None or not job.ending:
            continue
        before = read_record(ending_path(path))
        if before is None or (settled(job.ending) and not settled(before)):
            # another command may do so at this moment
            with contextlib.suppress(FileExistsError):
                write_record(ending_path(path), dict(job.ending), replace=before is not None)


def cancel(run: RunFolder, *, watchers: bool = True) -> list[dict[str, Any]]:
    """Ends all jobs of the run, of every attempt; returns those that were there, as {"what", "kind", "id"}.

    That somebody asked for it is recorded first, so that nothing follows by itself, and that it is done at last.

    Args:
        watchers: ends them, too; the watcher that completes a cancellation ends by itself.

    Raises:
        UserError: one of them cannot be reached from here. Whoever sees the run next tries again.
    """
    done: list[dict[str, Any]] = []
    try:
        # again, until nothing new is found: a job that was about to open an attempt may have done so meanwhile
        while ended := _end_all(run, done, watchers):
            done += ended
    except UserError as error:
        raise UserError(
            f"{error} (it is recorded that run {run.root.name} is to end: the next command that sees it tries again)"
        ) from error
    view = read(run)
    keep_endings(view)
    for each in view.attempts:
        if each.cancelled and not each.cancel_done:
            asked = read_record(each.files.cancelled) or {}
            write_record(each.files.cancelled, {**asked, "done": time.time()}, replace=True)
    return done


def _end_all(
    run: RunFolder, before: Sequence[Mapping[str, Any]], watchers: bool
) -> list[dict[str, Any]]:
    """Ends the jobs that can be found now, but for those ended before."""
    view = read(run, patience_s=LOOK_S)
    at = view.newest
    if at and (not at.cancelled or at.cancel_done) and (before or _works(view)):
        # first: then nothing more is started
        write_record(at.files.cancelled, {"by": _who(), "done": None}, replace=True)
    done = _end("watcher", [each.watcher for each in view.attempts]) if watchers else []
    # before the job that it waits for
    done += _end("successor", [each.successor for each in view.attempts])
    done += _end("training", [each.job for each in view.attempts])
    # read again, now that the watcher can start no more of them
    done += _end("evaluation", [each.job for each in read(run).evaluations])
    if at and at.job:  # its submitter may have died before it wrote the record of a job
        for stray in backends.strays(str(run.root), at.job.record):
            if watchers or not stray["name"].endswith(jobs.WATCHER):
                done += _end("unrecorded job", [JobView(record=stray, state="running")])
    known = {(each["kind"], each["id"]) for each in before}
    return [each for each in done if (each["kind"], each["id"]) not in known]


def _works(view: RunView) -> bool:
    """Whether anything of the run is at work, or would follow by itself."""
    jobs = [view.watcher, *(each.job for each in view.evaluations)]
    jobs += [job for each in view.attempts for job in (each.successor, each.job)]
    known = any(job is not None and job.state != "gone" for job in jobs)
    return known or decide.training_state(view) != "gone"


def _end(what: str, found: Sequence[JobView | None]) -> list[dict[str, Any]]:
    # one that cannot be seen from here is tried all the same: `cancel` says why it cannot be reached
    return [
        {"what": what, "kind": job.record["kind"], "id": job.record["id"]}
        for job in found
        if job is not None and job.state != "gone" and backends.cancel(job.record)
    ]


def _who() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"
