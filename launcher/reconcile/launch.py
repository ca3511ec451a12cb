"""Attempts of a run: submitted by a user, followed by the next one in a job that waited for that, or by the watcher.

Behind every training job on Slurm waits a second one of the same name, its successor, which Slurm starts when the
first is over. It asks `decide.next_attempt` whether the run goes on, and becomes the next attempt itself or leaves.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher import backends, code_copy, jobs, new_attempt
from launcher.backends import Job, Record
from launcher.folder import Attempt
from launcher.reconcile import act, decide, nodes
from launcher.reconcile.act import WatchEntry
from launcher.reconcile.hours import trained_s
from launcher.reconcile.view import AttemptView, RunView, read
from selfguide.spec.accumulation import node_counts
from selfguide.spec.config import Config
from selfguide.spec.files import to_yaml
from selfguide.spec.run import RunFolder, write_record
from shards import storage
from shards.errors import UserError

log = logging.getLogger(__name__)

# between two looks of a job that waits to open an attempt
LONGEST_NAP_S = 5.0
# for ranks of the job before that were asked to end and still save: sites kill them after KillWait, mostly 30 s
SAVING_S = 60.0


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
    jobs.check_limit(config, run.slowest_save_s())
    at, name = Attempt(run.attempt(1)), run.root.name
    training = jobs.training(config, at, name, run.slowest_save_s())
    wanted = [replace(training, exclude=nodes.names(nodes.barred(run, config)))]
    if config.evaluation.protocol != "none":
        wanted.append(jobs.evaluation(config, at, name, run.evals / "request.json"))
    if _watched(config):
        wanted.append(jobs.watcher(config, at, name, watch_entry, None))
    # of all jobs the first says most
    notes = [note for job in wanted for note in backends.of(config.cluster).check(job)]
    return notes[:1]


def launch_attempt(run: RunFolder, config: Config, watch_entry: WatchEntry) -> Launched:
    """Opens the run's next attempt, and submits its training job, that job's successor and the run's watcher.

    Raises:
        UserError: the cluster refused them. Then nothing is queued.
    """
    before = read(run)
    act.keep_endings(before)
    nodes.keep_evidence(before)
    # what waits behind an older attempt has nothing to follow any more
    dismiss(before)
    at, record = _submit_training(before, config, by_hand=True)
    notes = tuple(nodes.sentences(nodes.barred(run, config)))
    watcher = None
    if _watched(config):
        try:
            watcher = act.launch_watcher(at, config, watch_entry, after=record)
        except BaseException:
            backends.cancel(record)
            raise
    try:
        _queue_successor(at, config)
    except UserError as error:
        if watcher is not None:
            note = f"no second job may wait behind this one, so the run's watcher looks after it: {error}"
            return Launched(at=at, job=record, watcher=watcher, notes=(*notes, note))
        backends.cancel(record)
        shutil.rmtree(at.root)
        cluster = replace(config.cluster, restart="requeue")
        done = launch_attempt(run, replace(config, cluster=cluster), watch_entry)
        note = (
            f"no second job may wait behind this one, so cluster.restart=requeue was taken: {error}"
        )
        return replace(done, notes=(*done.notes, note))
    return Launched(at=at, job=record, watcher=watcher, notes=notes)


def tend(view: RunView) -> bool:
    """Has the run go on where it should and no job of it sees to that; returns whether it goes on by itself.

    Raises:
        UserError: the cluster refused its next attempt.
    """
    what = decide.next_attempt(view)
    if what.action == "stop" or view.config is None or not _restarts(view.config):
        nodes.keep_evidence(view)
        dismiss(view)
        return False
    if what.action == "start":
        go_on(view.folder)
    look_for_nodes(view)
    return True


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
        act.keep_endings(view)
        nodes.keep_evidence(view)
        opened, _ = _submit_training(view, config, by_hand=False, count=_free(at.files, config))
        log.info(f"attempt {opened.number} follows: {following.reason}")
        with _said(opened):
            _queue_successor(opened, config)
        return opened


def look_for_nodes(view: RunView) -> None:
    """Has a run that may also train on fewer nodes go on with those that are free, or go back to all of them.

    The job that waits behind an attempt asks for all nodes. Where these are not to be had, one that asks for fewer
    takes its place; an attempt on fewer is asked to save and end when the others are free again, which loses no step.

    Raises:
        UserError: the cluster does not do it now.
    """
    what, run = decide.resize(view), view.folder
    if what is None:
        return
    with new_attempt.submitting(run):
        view = read(run)
        at, config = view.newest, view.config
        if at is None or config is None or at.successor is None or decide.resize(view) != what:
            return
        if what == "fewer":
            count = _free(at.files, config)
            if count not in (None, at.successor.record["nodes"]):
                backends.cancel(at.successor.record)
                _queue_successor(at.files, config, count=count)
                log.info(f"the next attempt takes {count} nodes of {config.nodes}")
            return
        room = _room(at.files, config, at.nodes.values())
        if at.job is not None and room >= config.nodes - at.node_count:
            log.info(f"{room} more nodes are free: attempt {at.number} makes way for all")
            backends.of(config.cluster).warn(at.job.record)


def _free(at: Attempt, config: Config) -> int | None:
    """The largest number of nodes on which the run could train now; None where too few are free.

    Of a run that takes no fewer than it asks for nobody asks.
    """
    if not config.elastic:
        return None
    room = _room(at, config)
    return max((count for count in node_counts(config) if count <= room), default=None)


def _room(at: Attempt, config: Config, held: Iterable[str] = ()) -> int:
    """How many nodes are free for ranks of the run, of those that are not excluded and not `held`."""
    without = {*nodes.names(nodes.barred(at.run, config)), *held}
    job = jobs.training(config, at, at.run.root.name)
    return backends.of(config.cluster).free_nodes(replace(job, exclude=tuple(sorted(without))))


def read_in(run: RunFolder, job_id: str) -> RunView | None:
    """Returns the view that the job of this id has of its run (`decide.seen_by`), with how the job before it ended."""
    view = decide.seen_by(read(run), job_id)
    at = view.newest if view else None
    if view is None or at is None or at.job is None or at.job.ending:
        return view
    (ending,) = backends.endings([at.job.record])
    known = replace(at, job=replace(at.job, ending=ending))
    return replace(view, attempts=(*view.attempts[:-1], known))


def take_over(
    run: RunFolder, job_id: str, logs: Path, hosts: Sequence[str] = ()
) -> tuple[Attempt | None, str]:
    """Opens the run's next attempt in the job of this id, which runs already and writes its logs into `logs`.

    It waits where the next attempt is not to begin at once, and where ranks of the one before still save: Slurm starts
    a successor as soon as the job before it begins to end. Where one of its nodes is excluded, by what the attempt
    before came to there, say, another job is queued in its place.

    Args:
        hosts: the nodes of this job; none where it has as many as the config asks for.

    Returns:
        The attempt, None where none follows, and the reason.
    """
    began = time.monotonic()
    while True:
        with new_attempt.submitting(run):
            view = read_in(run, job_id)
            if view is None or view.newest is None:
                return None, "another job follows the newest attempt"
            what, at = decide.next_attempt(view), view.newest
            if what.action != "start":
                nodes.keep_evidence(view)
                return None, what.reason
            if view.config is None:
                return None, "; ".join(view.problems)
            works = node_counts(view.config)
            if hosts and len(hosts) not in works:
                return None, f"this job has {len(hosts)} nodes, and the run trains on {works}"
            left = decide.ended(at) + what.after_s - time.time()
            if _ends(at) and time.monotonic() < began + SAVING_S:
                left = max(left, 0.5)
            if left <= 0:
                act.keep_endings(view)
                nodes.keep_evidence(view)
                if why := _hand_over(view, view.config, hosts):
                    return None, why
                return _open_in(view, view.config, job_id, logs, len(hosts) or None), what.reason
        log.info(f"attempt {at.number + 1} begins in {left:.0f} s: {what.reason}")
        time.sleep(min(left, LONGEST_NAP_S))


def _ends(at: AttemptView) -> bool:
    """Whether ranks of an attempt may still work, whose job Slurm is ending."""
    state = at.job.ending.get("state") if at.job else None
    return state == "COMPLETING" and bool(at.starts - set(at.exits))


def _hand_over(view: RunView, config: Config, hosts: Sequence[str]) -> str:
    """Queues another job in place of this one where one of its nodes is excluded; returns why, "" where none is.

    This job waited since before anybody knew, and Slurm moves no job that has begun.
    """
    at = view.newest
    assert at is not None
    bad = [each for each in nodes.barred(view.folder, config) if each.node in hosts]
    if not bad or config.cluster.restart != "successor":
        return ""
    try:
        _queue_successor(at.files, config, more=_where(at))
    except UserError as error:
        log.warning(f"this job goes on although it should leave: {error}")
        return ""
    if at.files.cancelled.exists():
        dismiss(read(view.folder))
    return f"another job goes on elsewhere: {'; '.join(nodes.sentences(bad))}"


def _where(at: AttemptView) -> dict[str, Any]:
    """Where the Slurm of an attempt is, as a submitter saw it: a node may have the configuration elsewhere."""
    return {"conf": at.job.record.get("conf")} if at.job else {}


def _open_in(
    view: RunView, config: Config, job_id: str, logs: Path, count: int | None
) -> Attempt | None:
    """The next attempt in a job that runs already; None where the run has been cancelled meanwhile."""
    run, before = view.folder, view.newest
    assert before is not None
    at = Attempt(run.attempt(run.open_attempt()))
    code_copy.share(before.files.code, at.code)
    at.logs.symlink_to(os.path.relpath(logs, at.root))
    job = _prepare_training(view, at, config, by_hand=False, count=count)
    conf = _where(before)
    about = backends.new_record(config.cluster.kind, replace(job, folder=logs))
    write_record(at.job, {**about, **conf, "id": job_id})
    with _said(at):
        _queue_successor(at, config, more=conf)
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


def _submit_training(
    view: RunView, config: Config, *, by_hand: bool, count: int | None = None
) -> tuple[Attempt, Record]:
    """The next attempt of the run that was looked at, and the record of its training job."""
    at, (record,) = new_attempt.start(
        view.folder,
        config.cluster,
        lambda at: [_prepare_training(view, at, config, by_hand=by_hand, count=count)],
    )
    write_record(at.job, record)
    return at, record


def _prepare_training(
    view: RunView, at: Attempt, config: Config, *, by_hand: bool, count: int | None = None
) -> Job:
    """Writes what the ranks read; returns their job, on `count` nodes where not on all."""
    storage.publish(str(at.config), to_yaml(config).encode())
    without = nodes.barred(at.run, config)
    job = jobs.training(config, at, at.run.root.name, at.run.slowest_save_s(), count)
    job = replace(job, exclude=nodes.names(without))
    asked: dict[str, Any] = {"kind": config.cluster.kind, "nodes": job.nodes, "tasks": job.tasks}
    asked |= {"world": job.nodes * job.tasks, "timeout_min": job.timeout_min, "by_hand": by_hand}
    asked["full_nodes"] = config.nodes
    if without:
        asked["excluded"] = {each.node: each.why for each in without}
    # so that a list of runs need not read all attempts
    asked["spent_s"] = trained_s(view)
    write_record(at.submission, asked)
    return job


def _queue_successor(
    at: Attempt,
    config: Config,
    *,
    count: int | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Queues the job that waits behind attempt `at`, where runs go on in that way here; in the place of an earlier one.

    Raises:
        UserError: the cluster refused it.
    """
    if _restarts(config) and config.cluster.restart == "successor":
        job = jobs.successor(config, at, at.run.root.name, at.run.slowest_save_s(), count)
        job = replace(job, exclude=nodes.names(nodes.barred(at.run, config)))
        record = backends.of(config.cluster).submit(job)
        write_record(at.successor, {**record, **(more or {})}, replace=True)


def _watched(config: Config) -> bool:
    """Whether a run needs a watcher: for its scores, to delete old snapshots, to find nodes, or to go on."""
    by_watcher = config.cluster.restart == "watcher" or config.elastic
    deletes = config.train.keep_snapshots is not None
    return config.evaluation.protocol != "none" or deletes or by_watcher


def _restarts(config: Config) -> bool:
    """Whether runs go on by themselves where this config submits them."""
    # on one machine no job waits for the end of another
    restart, queues = config.cluster.restart, backends.of(config.cluster).queues
    return restart == "watcher" or (queues and restart != "none")


@contextlib.contextmanager
def _said(at: Attempt) -> Iterator[None]:
    """In the run's own jobs a refused successor is no error: the watcher and the next submission look after it."""
    try:
        yield
    except UserError as error:
        log.warning(f"no job waits behind attempt {at.number}: {error}")
