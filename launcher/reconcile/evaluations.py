"""Which evaluations a run needs: published snapshots less those that have an outcome."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from launcher.reconcile.attempts import CRASHES, training_state
from launcher.reconcile.restart import backoff
from launcher.reconcile.view import EvaluationView, RunView
from selfguide.spec import recipe
from selfguide.spec.config import Config
from selfguide.spec.lacks import Lack, lacks_of
from selfguide.spec.metrics import FEATURES, higher_is_better
from selfguide.spec.records import EvaluationRecord, Protocol, label_policy, record_key
from selfguide.spec.score_sweep import ScoreSweep
from selfguide.spec.weak import weak_models

# ends of a snapshot's evaluation without a word, after which it counts as one that cannot be scored
KILLS = 5
# seconds in which a submission that was begun has a job, or has died
CLAIM_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """One snapshot under the config of one point of a sweep."""

    images: int
    config: Config
    # of its record
    key: str
    # of the sweep; "" where the run's own protocol is the same
    sweep: str
    # jobs of its sweep at once at most
    in_flight: int | None = None
    # name and sha256 of the nets by whose scores it was chosen among others
    selected: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which evaluations by one protocol to start, which to give up, and whether nothing is left to do."""

    start: tuple[int, ...]
    give_up: tuple[int, ...]
    done: bool
    # snapshots that need no score, see `left_out`
    skip: tuple[int, ...] = ()
    # snapshots whose evaluation works
    in_flight: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What all evaluations of a run need now."""

    # by each protocol that scores the run
    plans: tuple[tuple[Config, Plan], ...]
    # of sweeps, to start
    points: tuple[Point, ...]
    give_up: tuple[Point, ...]
    skip: tuple[Point, ...]
    # nothing is left to do
    done: bool


def all_wanted(view: RunView, config: Config) -> Wanted:
    """Returns what the evaluations of the run need now: its own by each protocol, and the points of its sweeps."""
    plans = tuple((each, evaluations_wanted(view, each)) for each in config.scored_by)
    taken = sum(len(plan.start) + len(plan.in_flight) for _, plan in plans)
    free = config.evaluation.in_flight - taken if config.cluster.one_machine else None
    points, lost, waits = _points_wanted(view, config, free)
    return Wanted(
        plans=plans,
        points=points,
        give_up=(*(point_of(view, c, i) for c, plan in plans for i in plan.give_up), *lost),
        skip=tuple(point_of(view, c, i) for c, plan in plans for i in plan.skip),
        # where old snapshots are deleted, also what still comes makes some of them old
        done=not waits
        and all(plan.done for _, plan in plans)
        and (config.train.keep_snapshots is None or evaluations_stopped(view) or over(view)),
    )


def evaluations_wanted(view: RunView, config: Config) -> Plan:
    """Returns what the evaluation of the run by one protocol needs now, newest snapshot first.

    So a backlog does not delay the score that somebody waits for, the final one.

    Args:
        config: of `scored_by`.
    """
    at = view.newest
    if at is None or evaluations_stopped(view) or config.evaluation.protocol == "none":
        return Plan(start=(), give_up=(), done=True)
    scored = set(view.published) - set(unscored(view, config))
    jobs = {images: jobs_of(view, config, images) for images in view.published}
    working = {i for i in view.published if i not in scored and at_work(view, jobs[i])}
    waiting = [i for i in reversed(view.published) if i not in scored | working]
    skip = tuple(i for i in waiting if not jobs[i] and left_out(view, config, i))
    waiting = [i for i in waiting if i not in skip]
    lost = tuple(i for i in waiting if _hopeless(view, jobs[i], config.evaluation.attempts))
    free = max(0, config.evaluation.in_flight - len(working))
    due = [i for i in waiting if i not in lost and view.time >= _not_before(view, jobs[i])]
    if lacks_of(view.lacks, config.evaluation):
        # whoever sees the run once the files are there starts its watcher again
        due, waiting = [], []
    return Plan(
        start=tuple(due[:free]),
        give_up=lost,
        done=over(view) and not waiting and not working,
        skip=skip,
        in_flight=tuple(sorted(working)),
    )


def over(view: RunView) -> bool:
    """Whether the run publishes nothing more by itself."""
    at = view.newest
    goes_on = at is not None and at.successor is not None and at.successor.works
    return view.finished or (training_state(view) == "gone" and not goes_on)


def _points_wanted(
    view: RunView, config: Config, free: int | None
) -> tuple[tuple[Point, ...], tuple[Point, ...], bool]:
    """Points of sweeps to start and to give up, and whether any is left.

    Args:
        free: evaluations that may be started on this machine; None where a cluster has room for any number.
    """
    if view.newest is None or evaluations_stopped(view):
        return (), (), False
    waiting = [each for each in unscored_points(view, config) if not lacked(view, each)]
    jobs = {each.key: _jobs_with(view, each.key) for each in waiting}
    working = [each for each in waiting if at_work(view, jobs[each.key])]
    busy = Counter(each.sweep for each in working)
    left = None if free is None else free - len(working)
    start: list[Point] = []
    lost: list[Point] = []
    for each in waiting:
        if each in working:
            continue
        tries = jobs[each.key]
        if _hopeless(view, tries, config.evaluation.attempts):
            lost.append(each)
        elif (
            (left is None or left > len(start))
            and (each.in_flight is None or busy[each.sweep] < each.in_flight)
            and view.time >= _not_before(view, tries)
        ):
            start.append(each)
            busy[each.sweep] += 1
    return tuple(start), tuple(lost), bool(waiting)


def lacked(view: RunView, point: Point) -> tuple[Lack, ...]:
    """Returns the files that a point of a sweep waits for."""
    wanted = point.config.evaluation

    def waits(lack: Lack) -> bool:
        by = lack.evaluation
        # what confirms a choice reads the same files
        return by is None or replace(by, samples=wanted.samples, seed=wanted.seed) == wanted

    return tuple(lack for lack in (*view.lacks, *view.sweep_lacks) if waits(lack))


def unscored_points(view: RunView, config: Config | None = None) -> list[Point]:
    """Returns the points of the run's sweeps that have no record, done or failed, in their order."""
    config = config or view.config
    if config is None or not view.sweeps:
        return []
    known = {each.key for each in view.records if each.done or each.time >= view.retry_asked}
    return [each for each in points(view, config) if each.key not in known]


def points(view: RunView, config: Config) -> list[Point]:
    """Returns every point of the run's sweeps once, and those that confirm a choice among them."""
    found: dict[str, Point] = {}
    for sweep in view.sweeps:
        if sweep.images not in view.snapshots:
            continue
        listed = [_point(view, config, sweep, each) for each in sweep.configs(config)]
        for each in [*listed, *_confirming(view, config, sweep, listed)]:
            found.setdefault(each.key, each)
    return list(found.values())


def point_of(view: RunView, config: Config, images: int) -> Point:
    """Returns a published snapshot under the run's own protocol."""
    key = record_key(images, protocol(view, config, images))
    return Point(images=images, config=config, key=key, sweep="")


def _point(
    view: RunView,
    config: Config,
    sweep: ScoreSweep,
    of: Config,
    selected: tuple[Mapping[str, str], ...] = (),
) -> Point:
    how = protocol(view, of, sweep.images)
    own = {protocol(view, each, sweep.images).key for each in config.scored_by}
    return Point(
        images=sweep.images,
        config=of,
        key=record_key(sweep.images, how),
        sweep="" if how.key in own else sweep.id,
        in_flight=sweep.in_flight,
        selected=selected,
    )


def _confirming(
    view: RunView, config: Config, sweep: ScoreSweep, listed: Sequence[Point]
) -> Iterator[Point]:
    """Yields the chosen point of each front once more, of more samples and other seeds: a winner's score flatters it.

    Once all of the sweep's points have an outcome.
    """
    by_key = {each.key: each for each in listed}
    known = [record for record in view.records if record.key in by_key]
    if sweep.confirm is None or {record.key for record in known} != by_key.keys():
        return
    for front in recipe.fronts(known):
        of = confirming(by_key[front.chosen].config, sweep.confirm)
        yield _point(view, config, sweep, of, (front.selected_by,))


def confirming(chosen: Config, samples: int) -> Config:
    """Returns how the chosen point is scored once more: of so many samples, from seeds behind those that chose it."""
    used = chosen.evaluation
    return replace(chosen, evaluation=replace(used, samples=samples, seed=used.next_seed))


def left_out(view: RunView, config: Config, images: int) -> str:
    """Returns why a snapshot needs no score; "" where it does.

    Guidance leads away from a snapshot that is no earlier one. Or by the config's policy: a newer one is published, and
    it is no milestone; not where somebody has asked since to score what was left out.
    """
    policy, sampler = config.evaluation, config.sampler
    if sampler.g != 1 and not FEATURES[policy.protocol].of_layers:
        for weak in weak_models(sampler.weak):
            if weak.images is not None and weak.images >= images:
                return f"sampler.weak={sampler.weak} is no earlier snapshot than this one"
    if policy.snapshots == "all" or images in (view.images, view.published[-1]):
        return ""
    if any(each.images == images and each.status == "skipped" for each in view.records):
        return ""
    published = (*view.published, *view.deleted)
    before = max((other for other in published if other < images), default=0)
    each = policy.milestone_images
    if each is not None and before // each != images // each:
        return ""
    return (
        f"the snapshot at {view.published[-1]:,} images was published before this one was scored "
        f"(evaluation.snapshots={policy.snapshots})"
    )


def evaluations_stopped(view: RunView) -> bool:
    """Whether somebody cancelled the run, and nobody has asked for its scores since."""
    at = view.newest
    return at is not None and at.cancelled and view.evaluation_asked <= at.cancel_asked


def at_work(view: RunView, jobs: Sequence[EvaluationView]) -> bool:
    """Whether one of these jobs is at work, or is being submitted by anybody."""
    return any(
        view.time < each.claimed + CLAIM_S if each.job is None else each.job.state != "gone"
        for each in jobs
    )


def _hopeless(view: RunView, jobs: Sequence[EvaluationView], attempts: int) -> bool:
    """The tries are used up, or one ended by a user error, which trying again repeats."""
    endings = [ending_of(each) for each in jobs if _counts(view, each)]
    tries = endings.count("failed")
    return "user" in endings or tries >= attempts or endings.count("killed") >= KILLS


def ending_of(each: EvaluationView) -> Literal["failed", "user", "killed", "interrupted"]:
    """Returns how an evaluation job that is gone ended.

    failed and user: by itself. interrupted: by the scheduler, somebody who asked it to end, or a time limit that its
    next try has less to do in. killed: without a word,
    as a node's memory or a lost node may do it.
    """
    ending = each.job.ending if each.job else {}
    word = str(ending.get("state", "")).partition(" ")[0]
    if each.exit and each.exit["class"] not in ("signal", "preempted"):
        return "user" if each.exit["class"] == "user" else "failed"
    # the next one goes on at its last block
    if word == "TIMEOUT" and each.advanced:
        return "interrupted"
    # its own time limit and its own memory
    if (
        word in ("TIMEOUT", "DEADLINE", "OUT_OF_MEMORY")
        or ending.get("signals", {}).get("0") in CRASHES
    ):
        return "failed"
    if each.exit or word in ("PREEMPTED", "CANCELLED", "NODE_FAIL", "BOOT_FAIL"):
        return "interrupted"
    return "killed"


def _counts(view: RunView, each: EvaluationView) -> bool:
    """Whether an evaluation job came after somebody last asked to try again what had failed."""
    return each.submitted >= view.retry_asked


def _not_before(view: RunView, jobs: Sequence[EvaluationView]) -> float:
    """When the next job of a snapshot may start: those that the cluster ends do not follow each other at once."""
    ends = [
        each
        for each in jobs
        if _counts(view, each) and ending_of(each) in ("killed", "interrupted")
    ]
    return ends[-1].submitted + backoff(len(ends) - 1) if ends else 0.0


def evaluating(view: RunView) -> bool | None:
    """Returns whether the run's watcher or an evaluation job works; None where nobody can say."""
    states = {job.state for job in (view.watcher, *(e.job for e in view.evaluations)) if job}
    if states & {"queued", "running"}:
        return True
    return None if "unknown" in states else False


def watched(view: RunView) -> bool:
    """Whether the run's watcher waits or runs."""
    return view.watcher is not None and view.watcher.works


def watcher_missing(view: RunView) -> bool:
    """Whether the watcher is gone though snapshots wait for a score, or more are to come."""
    watcher = view.watcher
    if watcher is None or watcher.state != "gone" or evaluations_stopped(view):
        return False
    return startable(view) or training_state(view) in ("queued", "running")


def startable(view: RunView) -> bool:
    """Whether a snapshot or a point of a sweep waits for a score that lacks no file."""
    if view.config is None:
        return not view.lacks and bool(unscored(view))
    waits = any(
        unscored(view, each)
        for each in view.config.scored_by
        if not lacks_of(view.lacks, each.evaluation)
    )
    return waits or any(not lacked(view, each) for each in unscored_points(view))


def unscored(view: RunView, config: Config | None = None) -> tuple[int, ...]:
    """Returns the images of published snapshots that a protocol has no record of, done or failed.

    Where the config cannot be read, any record of a snapshot counts. A failure that is to be tried again does not.
    """
    config = config or view.config
    known = [each for each in view.records if each.done or each.time >= view.retry_asked]
    if config is None:
        settled = {record.images for record in known}
        return tuple(images for images in view.published if images not in settled)
    # earlier records have keys of their own; of these, failures have no protocol's either
    keys = {record.key for record in known}
    scores = {(record.images, record.protocol_key) for record in known}

    # of most runs one for each protocol, and a key is a hash over all of it
    how: dict[tuple[int, str | None, str], Protocol] = {}

    def has_outcome(images: int, number: int, by: Config) -> bool:
        about = view.snapshots[images]
        policy = label_policy(about["guidance"], by.evaluation.prior)
        kind = (number, about["data"]["manifest"], policy)
        if kind not in how:
            how[kind] = protocol(view, by, images)
        return (images, how[kind].key) in scores or record_key(images, how[kind]) in keys

    wanted = tuple(enumerate(config.scored_by))
    return tuple(
        images for images in view.published if not all(has_outcome(images, *by) for by in wanted)
    )


def unscorable(view: RunView) -> tuple[int, ...]:
    """Returns the images of snapshots whose evaluation was given up, and that no other attempt scored."""
    return _without_score(view, "failed")


def skipped(view: RunView) -> tuple[int, ...]:
    """Returns the images of snapshots that the config's policy left out, and that nobody scored all the same."""
    return _without_score(view, "skipped")


def _without_score(view: RunView, status: str) -> tuple[int, ...]:
    # of a run with several protocols each is one; earlier records name none where they failed
    several = view.config is not None and len(view.config.scored_by) > 1

    def which(record: EvaluationRecord) -> set[tuple[int, str]]:
        # a score knows the content of a file that a failure before it knew by name
        keys = {record.protocol_key, record.asked} if several else {""}
        return {(record.images, key) for key in keys}

    own = [record for record in view.records if not record.sweep]
    scored = {each for record in own if record.done for each in which(record)}
    lost = [record for record in own if record.status == status]
    return tuple(sorted({record.images for record in lost if scored.isdisjoint(which(record))}))


def protocol(view: RunView, config: Config, images: int) -> Protocol:
    """Returns how `config` scores the published snapshot at so many images."""
    return Protocol.of(config, view.snapshots[images])


def jobs_of(view: RunView, config: Config, images: int) -> list[EvaluationView]:
    """Returns the evaluation jobs of a published snapshot under the protocol of `config`, first try first."""
    return _jobs_with(view, record_key(images, protocol(view, config, images)))


def _jobs_with(view: RunView, key: str) -> list[EvaluationView]:
    return sorted((e for e in view.evaluations if e.key == key), key=lambda e: e.attempt)


def newest_score(view: RunView) -> EvaluationRecord | None:
    """Returns the record of the latest snapshot that was scored, of several protocols by the first; no sweep's."""
    done = [record for record in view.records if record.done and not record.sweep]
    if view.config is not None and len(view.config.scored_by) > 1:
        first = view.config.evaluation.protocol
        done = [record for record in done if record.metric == first] or done
    return max(done, key=lambda r: (r.images, r.time), default=None)


def best_score(view: RunView) -> EvaluationRecord | None:
    """Returns the record of the best snapshot, of those scored under the protocol of the newest score."""
    newest = newest_score(view)
    if newest is None or newest.metric is None:
        return None
    sign = 1.0 if higher_is_better(newest.metric) else -1.0
    alike = [
        record
        for record in view.records
        if record.score is not None and record.protocol_key == newest.protocol_key
    ]
    return max(alike, key=lambda r: (sign * (r.score or 0.0), r.images), default=None)
