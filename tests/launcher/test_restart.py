"""Why attempts ended, and what follows them by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.folder import Attempt
from launcher.reconcile.attempts import cause
from launcher.reconcile.restart import BUDGETS, ended, next_attempt
from launcher.reconcile.view import AttemptView, JobView, RunView
from selfguide.spec.run import RunFolder

RUN = RunFolder(Path("/runs/digits_dit/abc"))
RECORD = {"kind": "slurm", "id": "7", "nodes": 1, "tasks": 2}
FELL = {"code": 1, "class": "error", "message": "ValueError: it fell", "type": "ValueError"}
USER = {"code": 2, "class": "user", "message": "UserError: a key is wrong"}
TERM = {"code": 143, "class": "signal", "message": "ended by SIGTERM"}
SAVED = {"code": 75, "class": "preempted", "message": "asked to end by SIGTERM", "saved": 640}
NOTHING = SAVED | {"code": 76, "saved": None}
WARNED = SAVED | {"message": "asked to end by SIGUSR2"}


def an_attempt(*exits: dict[str, Any] | None, **more: Any) -> AttemptView:
    """One of two ranks that both began, and ended like this at their 1st and 2nd second; None left nothing."""
    records = {
        str(rank): {"time": float(rank), "images": 700, "section": "train"} | record
        for rank, record in enumerate(exits)
        if record is not None
    }
    job = JobView(record=RECORD, state=more.pop("state", "gone"), ending=more.pop("ending", {}))
    starts = frozenset(str(rank) for rank in range(len(exits)))
    at = AttemptView(files=Attempt(RUN.attempt(1)), opened=0.0, world=2, job=job, exits=records)
    return replace(at, starts=starts, **more)


def a_view(*attempts: AttemptView, **more: Any) -> RunView:
    numbered = [
        replace(at, files=Attempt(RUN.attempt(i))) for i, at in enumerate(attempts, start=1)
    ]
    made = RunView(
        folder=RUN,
        time=1000.0,
        id="abc",
        experiment="digits_dit",
        name=None,
        hash="",
        identity={},
        images=1280,
        created=0.0,
        tries=len(attempts),
        attempts=tuple(numbered),
    )
    return replace(made, **more)


SIGNALLED = {"first": "1", "signals": {"1": 11}}
CAUSES = [
    ("error", "1", an_attempt(TERM, FELL)),
    ("user", "0", an_attempt(USER, TERM)),
    # the first to fail is the cause, though the others complain, too
    ("error", "1", an_attempt(FELL | {"time": 9.0}, FELL)),
    ("stop", "1", an_attempt(FELL, FELL | {"code": 93})),
    # a rank that left nothing was killed; what its peers say is of that
    ("killed", "1", an_attempt(FELL, None)),
    ("crash", "1", an_attempt(FELL, None, ending={"state": "FAILED"} | SIGNALLED)),
    ("killed", "1", an_attempt(TERM, None, ending={"first": "1", "signals": {"1": 9}})),
    # one that failed first, and others killed because they did not end in time
    ("error", "0", an_attempt(FELL, None, ending={"first": "0", "signals": {}})),
    ("error", "1", an_attempt(TERM, None, ending={"first": "1", "codes": {"1": 7, "0": 1}})),
    ("memory", "1", an_attempt(TERM, None, ending={"state": "OUT_OF_MEMORY"})),
    ("memory", "0", an_attempt(FELL | {"class": "memory", "code": 84}, None)),
    ("node", "1", an_attempt(FELL, None, ending={"state": "NODE_FAIL"})),
    ("limit", None, an_attempt(TERM, TERM, ending={"state": "TIMEOUT"})),
    ("preempted", None, an_attempt(TERM, TERM, ending={"state": "PREEMPTED"})),
    ("outside", None, an_attempt(TERM, TERM, ending={"state": "CANCELLED by 1000"})),
    # cancelled while it waited: no rank ever was
    ("outside", None, an_attempt(ending={"state": "CANCELLED"})),
    ("user", "0", an_attempt(USER, TERM, ending={"state": "TIMEOUT"})),
    ("preempted", "0", an_attempt(TERM, TERM)),
    ("preempted", "0", an_attempt(SAVED, SAVED)),
    ("preempted", "0", an_attempt(SAVED, None)),
    ("killed", "1", an_attempt(NOTHING, None)),
    ("limit", "0", an_attempt(WARNED, WARNED, began=-3500.0, limit_s=3600.0)),
    ("preempted", "0", an_attempt(WARNED, WARNED, began=-60.0, limit_s=3600.0)),
    ("hang", "0", an_attempt(FELL | {"class": "hang", "code": 85}, None)),
    ("numeric", "1", an_attempt(TERM, FELL | {"class": "numeric", "code": 86})),
    ("storage", "1", an_attempt(TERM, FELL | {"class": "storage", "code": 87})),
    # who complains of a lost peer is not the cause, even if srun names it first
    ("error", "1", an_attempt(FELL | {"peer_gone": True}, FELL)),
    ("killed", "1", an_attempt(FELL | {"peer_gone": True}, None, ending={"first": "0"})),
    ("preempted", "1", an_attempt(FELL | {"peer_gone": True}, NOTHING)),
    ("lost", "0", an_attempt(FELL | {"peer_gone": True}, TERM)),
    ("lost", "1", an_attempt(TERM)),
    ("lost", None, an_attempt(world=0)),
]


@pytest.mark.parametrize(("kind", "rank", "at"), CAUSES)
def test_cause_of_an_attempt_names_class_and_rank(
    kind: str, rank: str | None, at: AttemptView
) -> None:
    found = cause(at)
    assert (found.kind, found.rank) == (kind, rank)
    assert found.message or found.kind == "lost"


def test_cause_of_a_crash_names_the_signal_and_what_peers_said() -> None:
    found = cause(an_attempt(FELL, None, ending=SIGNALLED))
    assert (found.type, found.images) == ("SIGSEGV", 700)
    assert "SIGSEGV" in found.message and "it fell" in found.message


@pytest.mark.parametrize("state", ["queued", "running", "unknown"])
def test_next_attempt_of_a_job_that_may_work_waits(state: str) -> None:
    assert next_attempt(a_view(an_attempt(FELL, state=state))).action == "wait"


@pytest.mark.parametrize("at", [an_attempt(USER, TERM), an_attempt(FELL | {"code": 93}, TERM)])
def test_next_attempt_after_what_trying_again_repeats_stops(at: AttemptView) -> None:
    assert next_attempt(a_view(at)).action == "stop"


def test_next_attempt_of_a_cancelled_or_finished_run_stops() -> None:
    cancelled = a_view(an_attempt(SAVED, SAVED, cancelled=True))
    assert (next_attempt(cancelled).action, next_attempt(cancelled).kind) == ("stop", "cancelled")
    finished = a_view(an_attempt(FELL, FELL), snapshots={1280: {}})
    assert (next_attempt(finished).action, next_attempt(finished).kind) == ("stop", "finished")
    assert next_attempt(a_view()).action == "stop"


@pytest.mark.parametrize(
    ("at", "after_s"), [(an_attempt(SAVED, SAVED), 0.0), (an_attempt(TERM, FELL), 2.0)]
)
def test_next_attempt_follows_a_preemption_at_once_and_a_failure_after_a_while(
    at: AttemptView, after_s: float
) -> None:
    found = next_attempt(a_view(at))
    assert (found.action, found.after_s, found.kind) == ("start", after_s, cause(at).kind)


def test_same_exception_at_the_same_image_count_is_not_tried_a_third_time() -> None:
    first = an_attempt(TERM, FELL, resumed_from=640)
    preempted = an_attempt(SAVED, SAVED, resumed_from=640)
    assert next_attempt(a_view(first, preempted)).action == "start"
    assert next_attempt(a_view(first, preempted, first, checkpoints=(690,))).action == "stop"
    later = an_attempt(TERM, FELL | {"images": 800}, resumed_from=640)
    other = an_attempt(TERM, FELL | {"type": "KeyError"}, resumed_from=640)
    for third in (later, other):
        assert next_attempt(a_view(first, third, checkpoints=(690,))).action == "start"


@pytest.mark.parametrize("kind", sorted(set(BUDGETS) - {"numeric"}))
def test_three_attempts_in_a_row_without_a_newer_checkpoint_stop_the_run(kind: str) -> None:
    def fell(images: int, resumed_from: int | None = 640) -> AttemptView:
        record = FELL | {"class": kind, "images": images}
        return an_attempt(TERM, record, resumed_from=resumed_from)

    two = [fell(700), fell(710)]
    newer = {"checkpoints": (320, 640)}
    assert next_attempt(a_view(*two, **newer)).after_s == 4.0
    assert next_attempt(a_view(*two, fell(720), **newer)).action == "stop"
    # also where training never began
    assert next_attempt(a_view(*two, fell(0, None), **newer)).action == "stop"
    # preemptions neither count nor make up for it
    between = an_attempt(NOTHING, NOTHING, resumed_from=640)
    assert next_attempt(a_view(*two, between, fell(720), **newer)).action == "stop"
    assert next_attempt(a_view(*[between] * 9, **newer)).action == "start"
    # a newer checkpoint does, and so does somebody who tries again
    assert next_attempt(a_view(*two, fell(720), checkpoints=(700,))).action == "start"
    by_hand = replace(fell(720), by_hand=True)
    assert next_attempt(a_view(*two, by_hand, **newer)).after_s == 2.0


def test_budget_of_a_class_is_used_by_failures_and_paid_back_by_checkpoints() -> None:
    def killed(resumed_from: int) -> AttemptView:
        return an_attempt(TERM, None, resumed_from=resumed_from)

    # a checkpoint at every third attempt: each time two of the budget are used, and one is paid back
    crawl = [killed(100 * (i // 3)) for i in range(60)]
    actions = [
        next_attempt(a_view(*crawl[:i], checkpoints=(100 * (i // 3),))).action
        for i in range(1, len(crawl))
    ]
    assert actions.index("stop") > 2 * BUDGETS["killed"]
    # one that every attempt leaves behind: nothing is ever used up
    walk = [killed(100 * i) for i in range(60)]
    found = next_attempt(a_view(*walk, checkpoints=(6000,)))
    assert (found.action, found.after_s) == ("start", 2.0)
    # another class has its own
    mixed = [killed(0), an_attempt(TERM, FELL | {"class": "storage"}, resumed_from=0)]
    assert next_attempt(a_view(*mixed)).after_s == 2.0


def test_end_of_an_attempt_is_its_last_record() -> None:
    assert ended(an_attempt(TERM, FELL, opened=0.5)) == 1.0
    assert ended(an_attempt(TERM, FELL, ending={"time": 7.0})) == 7.0
    assert ended(an_attempt(opened=5.0)) == 5.0
