"""The watcher: every snapshot ends with one outcome, whatever its evaluations do."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path

import payloads
import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import until

from launcher import clusters, status, submit, watch
from launcher.folder import Attempt
from launcher.watch import Facts, decide
from selfguide.spec.files import read_config
from selfguide.spec.records import records
from selfguide.spec.run import RunFolder, read_record, write_record

SNAPSHOTS = range(1, 7)


@st.composite
def facts(draw: st.DrawFn) -> Facts:
    """Any state of a run of six snapshots."""
    published = draw(st.sets(st.sampled_from(SNAPSHOTS)))
    scored = draw(st.sets(st.sampled_from(sorted(published)))) if published else set()
    rest = sorted(published - scored)
    in_flight = draw(st.sets(st.sampled_from(rest))) if rest else set()
    return Facts(
        published=tuple(sorted(published)),
        final=max(SNAPSHOTS),
        scored=frozenset(scored),
        in_flight=frozenset(in_flight),
        tries=draw(st.dictionaries(st.sampled_from(SNAPSHOTS), st.integers(1, 4))),
        hopeless=frozenset(draw(st.sets(st.sampled_from(SNAPSHOTS)))),
        ended=draw(st.booleans()),
        cancelled=draw(st.booleans()),
        slots=draw(st.integers(1, 3)),
        limit=3,
    )


@given(facts())
def test_what_a_plan_may_do(now: Facts) -> None:
    plan = decide(now)
    settled = now.scored | now.in_flight
    assert not set(plan.start) & settled and not set(plan.give_up) & settled
    assert not set(plan.start) & set(plan.give_up)
    assert set(plan.start) | set(plan.give_up) <= set(now.published)
    assert len(plan.start) <= max(0, now.slots - len(now.in_flight))
    assert list(plan.start) == sorted(plan.start, reverse=True)  # newest first
    for images in plan.start:
        assert now.tries.get(images, 0) < now.limit and images not in now.hopeless
    if now.cancelled:
        assert plan.done and not plan.start
    elif plan.done:
        assert set(now.published) == set(now.scored) and (now.ended or now.final in now.published)


@given(
    chance=st.integers(0, 2**32).map(random.Random), upto=st.integers(0, 6), slots=st.integers(1, 3)
)
def test_it_always_ends_with_every_snapshot_settled(
    chance: random.Random, upto: int, slots: int
) -> None:
    """Plays the loop against evaluations that succeed, fail, or repeat a user error at random."""
    scored, in_flight, hopeless = set[int](), set[int](), set[int]()
    tries: dict[int, int] = {}
    appeared, rounds = 0, 0
    while True:
        appeared = min(upto, appeared + chance.randint(0, 2))
        now = Facts(
            published=tuple(range(1, appeared + 1)),
            final=6,
            scored=frozenset(scored),
            in_flight=frozenset(in_flight),
            tries=dict(tries),
            hopeless=frozenset(hopeless),
            ended=appeared == upto,
            cancelled=False,
            slots=slots,
            limit=3,
        )
        plan = decide(now)
        if plan.done:
            break
        scored |= set(plan.give_up)
        for images in plan.start:
            tries[images] = tries.get(images, 0) + 1
            in_flight.add(images)
        assert len(in_flight) <= slots and all(count <= 3 for count in tries.values())
        for images in sorted(in_flight):
            end = chance.choice(["works", "scores", "fails", "refuses"])
            if end != "works":
                in_flight.discard(images)
            if end == "scores":
                scored.add(images)
            if end == "refuses":
                hopeless.add(images)
        rounds += 1
        assert rounds < 1000  # by then even chance has let everything end
    assert scored == set(range(1, upto + 1)) and not in_flight


@pytest.fixture
def run(
    runs: Path, settings: list[str], payload: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> RunFolder:
    """A run of two snapshots whose training is over, with evaluation switched on and no watcher yet."""
    monkeypatch.setitem(watch.POLL_S, "local", 0.05)
    monkeypatch.setattr(watch, "launch", lambda at, config: {"kind": "local", "id": "none"})
    payload(train=payloads.publish_all)
    told = submit.submit(submit.resolve([*settings, "evaluation=fd_digits"]))
    made = RunFolder(Path(told["folder"]))
    until(lambda: clusters.state(read_record(Attempt(made.attempt(1)).job)) == "gone")
    assert made.published() == [640, 1280]
    return made


def outcome(run: RunFolder) -> list[tuple[int, str, int]]:
    return sorted((r.images, r.status, r.attempt) for r in records(run))


def test_every_snapshot_is_scored_once_in_a_process_of_its_own(
    run: RunFolder, payload: Callable[..., None]
) -> None:
    payload(evaluate=payloads.score)
    watch.watch(run.root)
    assert outcome(run) == [(640, "done", 1), (1280, "done", 1)]
    jobs = status.evaluation_jobs(run)
    assert len({read_record(job.folder / "job.json")["id"] for job in jobs}) == 2
    request = json.loads((jobs[0].folder / "request.json").read_text())
    assert request["images"] == 640 and request["config"]["evaluation"]["protocol"] == "fd_digits"
    assert status.read(run).state == "finished" and status.read(run).score == 7.0
    watch.watch(run.root)  # nothing is done twice
    assert len(status.evaluation_jobs(run)) == 2


def test_a_job_that_dies_is_tried_again(run: RunFolder, payload: Callable[..., None]) -> None:
    payload(evaluate=payloads.score_second_time)
    watch.watch(run.root)
    assert outcome(run) == [(640, "done", 2), (1280, "done", 2)]


def test_what_never_works_is_recorded_as_failed_with_the_log(
    run: RunFolder, payload: Callable[..., None]
) -> None:
    payload(evaluate=payloads.never_score)
    watch.watch(run.root)
    assert outcome(run) == [(640, "failed", 3), (1280, "failed", 3)]
    record = next(records(run))
    assert "no score today" in record.message and "Traceback" in record.log
    assert status.read(run).failed_evaluations == 2


def test_a_user_error_is_not_tried_again(run: RunFolder, payload: Callable[..., None]) -> None:
    payload(evaluate=payloads.refuse)
    watch.watch(run.root)
    assert outcome(run) == [(640, "failed", 1), (1280, "failed", 1)]


def test_two_watchers_do_the_work_of_one(run: RunFolder, payload: Callable[..., None]) -> None:
    payload(evaluate=payloads.score)
    both = [threading.Thread(target=watch.watch, args=(run.root,)) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join(timeout=60)
    assert outcome(run) == [(640, "done", 1), (1280, "done", 1)]
    assert len(status.evaluation_jobs(run)) == 2


def test_a_cancelled_run_is_left_alone(run: RunFolder, payload: Callable[..., None]) -> None:
    write_record(Attempt(run.attempt(1)).cancelled, {"by": "me"})
    watch.watch(run.root)
    assert status.evaluation_jobs(run) == []


def test_a_finished_run_without_scores_gets_its_watcher_back(
    run: RunFolder,
    settings: list[str],
    payload: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = []
    monkeypatch.setattr(watch, "launch", lambda at, config: started.append(at.number))
    assert (
        submit.submit(submit.resolve([*settings, "evaluation=fd_digits"]))["state"] == "evaluating"
    )
    assert started == [1] and run.attempt_numbers() == [1]
    config = read_config(Attempt(run.attempt(1)).config)
    assert config.evaluation.protocol == "fd_digits"
