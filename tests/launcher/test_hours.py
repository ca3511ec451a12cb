"""Where the time of jobs went: classes of each allocation add up to it, whatever its ranks left."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.backends import Span
from launcher.folder import Attempt
from launcher.reconcile.hours import CLASSES, Hours, hours, spent_s, trained_s
from launcher.reconcile.view import AttemptView, EvaluationView, JobView, RunView, read
from selfguide.spec.run import RunFolder
from tests.cluster.corpus import restore

RUN = RunFolder(Path("/runs/digits_dit/abc"))
SECTIONS = (
    None,
    "joining",
    "starting",
    "compile",
    "train",
    "data",
    "snapshot",
    "checkpoint",
    "done",
)
KINDS = ("ok", "error", "user", "hang", "signal", "preempted", "memory")
WORDS = ("", "COMPLETED", "FAILED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "CANCELLED by 0")


def a_job(id: str, *spans: Span, state: Any = "gone", **more: Any) -> JobView:
    ending = more.pop("ending", {})
    record = {"kind": "slurm", "id": id, "nodes": 1, "tasks": 2, "gpus": 2, "submitted": 0.0}
    return JobView(record=record | more, state=state, spans=spans, ending=ending)


def a_view(*attempts: AttemptView, now: float = 1e6, **more: Any) -> RunView:
    numbered = tuple(
        replace(at, files=Attempt(RUN.attempt(i))) for i, at in enumerate(attempts, start=1)
    )
    made = RunView(
        folder=RUN, time=now, id="abc", experiment="digits_dit", name=None, hash="", identity={}, images=1280,
        created=0.0, tries=len(attempts), attempts=numbered,
    )  # fmt: skip
    return replace(made, **more)


def an_attempt(
    job: JobView | None,
    *,
    begins: dict[str, float],
    exits: dict[str, dict[str, Any]] | None = None,
    heartbeats: dict[str, dict[str, Any]] | None = None,
    **more: Any,
) -> AttemptView:
    return AttemptView(
        files=Attempt(RUN.attempt(1)),
        opened=more.pop("opened", min(begins.values(), default=0.0)),
        world=2,
        job=job,
        began=min(begins.values(), default=None),
        starts=frozenset(begins),
        begins={rank: {"time": time} for rank, time in begins.items()},
        exits=exits or {},
        heartbeats=heartbeats or {},
        **more,
    )


def ended(time: float, kind: str = "ok", code: int = 0, **more: Any) -> dict[str, Any]:
    return {"time": time, "class": kind, "code": code, "message": kind, **more}


def only(found: Hours) -> dict[str, float]:
    (row,) = found.jobs
    assert sum(row.seconds.values()) == pytest.approx(row.elapsed_s)
    return {name: pytest.approx(value) for name, value in row.seconds.items()}


SPENT = {"start": 10.0, "compile": 5.0, "train": 60.0, "checkpoint": 4.0}


def test_hours_of_an_attempt_that_finished_are_those_of_its_ranks() -> None:
    seconds = {"seconds": SPENT, "section": "done", "images": 1280, "waited_s": 6.0}
    exits = {str(rank): ended(182.0, **seconds) for rank in range(2)}
    job = a_job("7", Span(100.0, 190.0, 30.0))
    found = hours(a_view(an_attempt(job, begins={"0": 102.0, "1": 102.0}, exits=exits)))
    # 2 s until ranks begin, 1 s from the last section on, 8 s to the end of the job
    assert only(found) == SPENT | {"start": 12.0, "idle": 9.0}
    assert (found.unit, found.total_s, found.jobs[0].queued_s) == ("GPU", 180.0, 30.0)
    assert found.seconds()["train"] == 120.0 and found.jobs[0].waited_s == 6.0
    assert found.effective == pytest.approx(60 / 90)


def test_hours_of_images_that_were_trained_again_are_replayed_in_the_attempt_that_lost_them() -> (
    None
):
    progress = {"section": "train", "time": 190.0}
    lost = {"seconds": {"start": 10.0, "train": 80.0}, "section": "train", "images": 800}
    first = an_attempt(
        a_job("7", Span(100.0, 200.0), ending={"state": "NODE_FAIL"}),
        begins={"0": 100.0, "1": 100.0},
        heartbeats={"0": lost | {"time": 190.0}, "1": lost | {"time": 190.0}},
        progress=progress,
    )
    second = replace(
        first,
        job=a_job("8", Span(300.0, 400.0)),
        began=300.0,
        opened=299.0,
        begins={rank: {"time": 300.0} for rank in "01"},
        exits={rank: ended(400.0, **lost | {"images": 1280}) for rank in "01"},
        heartbeats={},
        resumed_from=600,
    )
    found = hours(a_view(first, second))
    assert [row.seconds for row in found.jobs] == [
        {"start": 10.0, "train": 60.0, "replayed": 20.0, "failed": 10.0},
        {"start": 10.0, "train": 90.0},
    ]
    # an older checkpoint had to be taken, and from that on all is done again
    third = replace(second, job=a_job("9", Span(500.0, 600.0)), began=500.0, resumed_from=400)
    third = replace(third, opened=499.0, begins={rank: {"time": 500.0} for rank in "01"})
    again = hours(a_view(first, second, third)).jobs
    assert again[0].seconds["replayed"] == pytest.approx(40.0)
    assert again[1].seconds["replayed"] == pytest.approx(80.0)


def test_hours_of_a_hang_count_from_the_last_progress() -> None:
    beat = {"seconds": {"start": 10.0, "train": 30.0}, "section": "train", "images": 640}
    exits = {
        # of the monitor, which knows nothing of the rank's time
        "0": ended(200.0, "hang", 85, section="train", images=640),
        "1": ended(201.0, "signal", 143, **beat),
    }
    at = an_attempt(
        a_job("7", Span(100.0, 210.0)),
        begins={"0": 100.0, "1": 100.0},
        exits=exits,
        heartbeats={"0": beat | {"time": 141.0}},
    )
    assert only(hours(a_view(at))) == {"start": 10.0, "train": 30.0, "hung": 60.5, "failed": 9.5}


def test_hours_of_jobs_that_did_nothing_are_idle() -> None:
    exits = {str(rank): ended(190.0, seconds={"train": 90.0}, section="done") for rank in range(2)}
    at = an_attempt(a_job("7", Span(100.0, 190.0)), begins={"0": 100.0, "1": 100.0}, exits=exits)
    at = replace(
        at,
        successor=a_job("8", Span(190.0, 195.0)),
        watcher=a_job("9", Span(100.0, 250.0), tasks=1, gpus=0),
    )
    rows = {row.kind: row for row in hours(a_view(at)).jobs}
    assert rows["successor"].seconds == {"idle": 5.0} and rows["successor"].units == 2
    assert rows["watcher"].seconds == {"idle": 150.0} and rows["watcher"].units == 0


def test_hours_of_a_job_that_was_requeued_are_one_row_an_allocation() -> None:
    job = a_job("7", Span(100.0, 200.0), Span(300.0, 400.0), Span(500.0, 503.0))
    rows = [
        an_attempt(
            job,
            begins={"0": begin, "1": begin},
            exits={r: ended(begin + 90.0, seconds={"train": 90.0}, section="done") for r in "01"},
        )
        for begin in (101.0, 301.0)
    ]
    found = hours(a_view(*rows))
    assert [(row.kind, row.start, row.elapsed_s) for row in found.jobs] == [
        ("training", 100.0, 100.0),
        ("training", 300.0, 100.0),
        ("successor", 500.0, 3.0),
    ]


def test_hours_without_a_word_of_the_scheduler_are_those_of_the_ranks_and_say_so() -> None:
    exits = {r: ended(190.0, seconds={"train": 90.0}, section="done") for r in "01"}
    at = an_attempt(a_job("7", gpus=0), begins={"0": 100.0, "1": 101.0}, exits=exits)
    found = hours(a_view(at))
    assert found.about and found.unit == "rank" and found.total_s == 180.0
    assert only(found) == {"start": 0.5, "train": 89.5}


def test_hours_of_an_evaluation_are_lost_where_it_came_to_no_score() -> None:
    def one(attempt: int, exit: dict[str, Any] | None, state: str = "gone") -> EvaluationView:
        job = a_job(str(attempt), Span(100.0, 150.0), state=state, tasks=1, gpus=1)
        begin = {"time": 102.0}
        return EvaluationView(
            folder=RUN.evals, key="k", images=640, attempt=attempt, job=job, begin=begin, exit=exit
        )

    evaluations = (one(1, ended(149.0)), one(2, ended(149.0, "error", 1)), one(3, None))
    at = an_attempt(a_job("9", Span(0.0, 1.0)), begins={})
    rows = [r for r in hours(a_view(at, evaluations=evaluations)).jobs if r.kind == "evaluation"]
    assert [row.seconds for row in rows] == [
        {"start": 2.0, "evaluate": 47.0, "idle": 1.0},
        {"start": 2.0, "failed": 48.0},
        {"start": 2.0, "failed": 48.0},
    ]


def test_spent_needs_only_the_newest_attempt_where_it_says_what_went_before() -> None:
    exits = {r: ended(190.0, seconds={"train": 90.0}) for r in "01"}
    at = an_attempt(a_job("7"), begins={"0": 100.0, "1": 100.0}, exits=exits, spent_s=1000.0)
    newest = a_view(at, tries=3)
    assert spent_s(newest) == 1180.0
    older = a_view(replace(at, spent_s=None), replace(at, spent_s=180.0))
    assert trained_s(older) == 360.0
    assert spent_s(replace(newest, attempts=(replace(at, spent_s=None),))) is None


CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.json"))


@pytest.mark.parametrize("entry", CORPUS, ids=[path.stem for path in CORPUS])
def test_hours_of_runs_that_faults_met_on_a_real_slurm(entry: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "digits_dit" / "run")
    kinds = {fault.kind for fault in restore(entry, run)}
    view = read(run)
    found = hours(view)
    assert {row.attempt for row in found.jobs} >= {at.number for at in view.attempts if at.starts}
    for row in found.jobs:
        assert sum(row.seconds.values()) == pytest.approx(row.elapsed_s)
        assert all(value >= 0 for value in row.seconds.values())
    seconds = found.seconds()
    assert (seconds["hung"] > 0) == ("hang" in kinds)
    assert bool(kinds & {"killed", "crash", "node", "error", "hang"}) <= (seconds["failed"] > 0)


# ---- whatever happens ----------------------------------------------------------------------------------


def _any_rank(draw: random.Random, start: float, end: float) -> dict[str, Any]:
    """What a rank may have left, clocks that disagree included."""
    time = draw.uniform(start - 3, end + 3)
    known = {
        name: draw.uniform(0, (end - start) * draw.choice([0.1, 0.3, 2.0]))
        for name in draw.sample(
            ["start", "compile", "train", "checkpoint", "idle"], draw.randint(0, 5)
        )
    }
    record = {
        "time": time,
        "section": draw.choice(SECTIONS),
        "images": draw.choice([None, draw.randint(0, 2000)]),
    }
    if draw.random() < 0.8:
        record |= {"seconds": known, "waited_s": draw.uniform(0, 50)}
    return record


def _any_attempt(draw: random.Random, id: int, start: float, end: float) -> AttemptView:
    begins = {r: draw.uniform(start - 3, end) for r in "01" if draw.random() < 0.9}
    beats = {r: _any_rank(draw, start, end) for r in begins if draw.random() < 0.8}
    exits = {
        r: _any_rank(draw, start, end)
        | {"class": draw.choice(KINDS), "code": draw.choice([0, 1, 75, 143]), "message": ""}
        for r in begins
        if draw.random() < 0.7
    }
    state = draw.choice(["gone", "gone", "gone", "running"])
    spans = [Span(start, end if state == "gone" else None)] if draw.random() < 0.9 else []
    ending = {"state": draw.choice(WORDS)}
    return an_attempt(
        a_job(str(id), *spans, state=state, ending=ending, gpus=draw.choice([0, 2])),
        begins=begins,
        exits=exits,
        heartbeats=beats,
        opened=start - draw.uniform(0, 50),
        progress=draw.choice([{}, {"section": "train", "time": end}]),
        resumed_from=draw.choice([None, draw.randint(0, 2000)]),
    )


@pytest.mark.parametrize("seed", range(8))
def test_hours_of_random_attempts_add_up_to_their_allocations(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(150):
        attempts, clock = [], 1000.0
        for id in range(draw.randint(1, 5)):
            start = clock + draw.uniform(0, 100)
            clock = start + draw.choice([0.0, draw.uniform(0, 1000)])
            attempts.append(_any_attempt(draw, id, start, clock))
        view = a_view(*attempts, now=clock + draw.uniform(0, 10))
        found = hours(view)
        for row in found.jobs:
            assert set(row.seconds) <= set(CLASSES)
            assert all(value >= 0 for value in row.seconds.values())
            assert sum(row.seconds.values()) == pytest.approx(row.elapsed_s, abs=1e-6)
            assert 0 <= row.waited_s <= row.seconds.get("train", 0.0) + 1e-6
        spans = {
            (at.number, span.start): (view.time if span.end is None else span.end) - span.start
            for at in view.attempts
            if at.job
            for span in at.job.spans
        }
        rows = {(row.attempt, row.start): row.elapsed_s for row in found.jobs if not row.about}
        assert rows == {key: rows[key] for key in rows if key in spans}
        assert all(rows[key] == pytest.approx(spans[key]) for key in rows)
        # each second once: no allocation of a job that the scheduler tells of is missing
        assert len({(row.job, row.start) for row in found.jobs}) == len(found.jobs)
        told = [at.number for at in view.attempts if at.job and at.job.spans]
        assert set(told) <= {row.attempt for row in found.jobs}
        assert found.total_s == pytest.approx(sum(found.seconds().values()))
