"""The decisions over a run's view: one answer about every view, however strange."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.compose import compose
from launcher.folder import Attempt
from launcher.reconcile import decide
from launcher.reconcile.decide import Plan, evaluations_wanted, state, submission
from launcher.reconcile.view import AttemptView, EvaluationView, JobView, RunView
from selfguide.spec.identity import digest, identity
from selfguide.spec.records import EvaluationRecord, Protocol, record_key
from selfguide.spec.run import RunFolder

RUN = RunFolder(Path("/runs/digits_dit/abc"))
SNAPSHOTS = range(1, 7)
CONFIG = compose(
    ["experiment=digits_dit", "cluster=local", "train.images=1280", "guidance.switch=0.5"]
)
NEVER = replace(CONFIG, evaluation=replace(CONFIG.evaluation, protocol="none"))
SHAPE = {"data": {"manifest": "m"}, "guidance": {}}
PROTOCOL = Protocol.of(CONFIG, SHAPE)
# as run.json holds it
IDENTITY = json.loads(json.dumps(identity(CONFIG, "m")))
LONGER = IDENTITY | {"train": IDENTITY["train"] | {"images": 2560}}
OTHER = IDENTITY | {"seed": 7}

BEAT = {"progressed": 800.0, "step_s": 1.0, "section": "data"}

states = st.sampled_from(["queued", "running", "gone", "unknown"])
EXITS = {
    "ok": {"code": 0, "class": "ok", "message": ""},
    "error": {"code": 1, "class": "error", "message": "it fell"},
    "user": {"code": 2, "class": "user", "message": "a key is wrong"},
    "signal": {"code": 143, "class": "signal", "message": "ended by SIGTERM"},
}
exits = st.sampled_from(sorted(EXITS)).map(lambda name: {"time": 1.0, **EXITS[name]})


@st.composite
def jobs(draw: st.DrawFn) -> JobView | None:
    record = {"kind": "local", "id": "1", "nodes": 1, "tasks": 2}
    return draw(st.none() | states.map(lambda state: JobView(record=record, state=state)))


@st.composite
def attempts(draw: st.DrawFn) -> AttemptView:
    ranks = st.sampled_from(["0", "1", "unknown"])
    cancelled = draw(st.booleans())
    return AttemptView(
        files=Attempt(RUN.attempt(1)),
        opened=draw(st.sampled_from([0.0, 990.0])),
        world=draw(st.sampled_from([0, 2])),
        job=draw(jobs()),
        successor=draw(jobs()),
        cancelled=cancelled,
        cancel_done=cancelled and draw(st.booleans()),
        by_hand=draw(st.booleans()),
        resumed_from=draw(st.sampled_from([None, 0, 2])),
        starts=frozenset(draw(st.sets(ranks))),
        exits=draw(st.dictionaries(ranks, exits)),
        progress=draw(st.sampled_from([{}, {"images": 2, "images_per_s": 4.0, "eta_s": 1.0}])),
        heartbeats=draw(st.sampled_from([{}, {"0": BEAT}])),
    )


def evaluation_of(images: int, attempt: int, **more: object) -> EvaluationView:
    made = EvaluationView(
        folder=Path("evals"), key=record_key(images, PROTOCOL), images=images, attempt=attempt
    )
    return replace(made, **more)  # type: ignore[arg-type]


@st.composite
def evaluations(draw: st.DrawFn) -> EvaluationView:
    return evaluation_of(
        draw(st.sampled_from(SNAPSHOTS)),
        draw(st.integers(1, 4)),
        job=draw(jobs()),
        exit=draw(st.none() | exits),
    )


def record_of(images: int, status: str) -> EvaluationRecord:
    return EvaluationRecord(
        status=status,  # type: ignore[arg-type]
        key=record_key(images, PROTOCOL),
        attempt=1,
        images=images,
        protocol_key=PROTOCOL.key,
    )


@st.composite
def views(draw: st.DrawFn) -> RunView:
    """Any state of a run of six snapshots."""
    published = sorted(draw(st.sets(st.sampled_from(SNAPSHOTS))))
    scored = draw(st.sets(st.sampled_from(published))) if published else set()
    found = tuple(draw(st.lists(attempts(), max_size=2)))
    return RunView(
        folder=RUN,
        time=1000.0,
        id="abc",
        experiment="digits_dit",
        name=None,
        hash=digest(IDENTITY),
        identity=IDENTITY,
        images=6,
        created=0.0,
        tries=len(found),
        attempts=found,
        watcher=draw(jobs()),
        checkpoints=draw(st.sampled_from([(), (2,), (2, 4)])),
        config=draw(st.sampled_from([CONFIG, NEVER, None])),
        snapshots=dict.fromkeys(published, SHAPE),
        evaluations=tuple(draw(st.lists(evaluations(), max_size=6))),
        records=tuple(
            record_of(images, draw(st.sampled_from(["done", "failed"])))
            for images in sorted(scored)
        ),
    )


@given(views())
def test_state_of_any_view_is_one_word_that_the_files_support(view: RunView) -> None:
    found = state(view)
    assert (found.word == "new") == (not view.attempts)
    progress = decide.progress(view)
    assert (progress.eta_s is None) or found.word == "running"
    assert progress.images >= max(view.published, default=0)
    job = decide.training_state(view)
    if view.finished and view.attempts:
        assert found.word in ("finished", "evaluating", "unknown")
        # scores are neither missing nor under way where nobody knows
        unknown = decide.evaluating(view) is None and bool(decide.unscored(view))
        assert (found.word == "unknown") == unknown
        return
    assert found.word not in ("finished", "evaluating")
    if found.word in ("cancelled", "failed", "unknown"):
        assert job in ("gone", "unknown")
        assert view.newest is not None
        # a cancel wins over every other ending, and one that nobody has confirmed is no ending
        ended = job == "gone" or view.newest.cancel_done
        assert (found.word == "cancelled") == (view.newest.cancelled and ended)
        assert found.word != "unknown" or job == "unknown"
        assert found.word == "cancelled" or found.reason


@given(views())
def test_answers_about_a_job_that_is_not_known_are_never_that_it_has_ended(view: RunView) -> None:
    at = view.newest
    if at is None or at.job is None or at.job.state != "unknown" or {"0", "1"} <= set(at.exits):
        return
    assert decide.training_state(view) == "unknown"
    assert state(view).word not in ("failed", "queued", "running")
    assert decide.next_attempt(view).action != "start"
    if not (view.finished or at.cancel_done):
        assert submission(view, IDENTITY).action == "refuse"


@given(views())
def test_plan_of_any_view_starts_only_what_may_be_started(view: RunView) -> None:
    plan = evaluations_wanted(view, CONFIG)
    unscored = set(decide.unscored(view, CONFIG))
    limits = CONFIG.evaluation
    at = view.newest
    if at is None or at.cancelled:
        assert plan == Plan(start=(), give_up=(), done=True)
        return
    working = {
        images
        for images in unscored
        if any(e.images == images and e.job and e.job.state != "gone" for e in view.evaluations)
    }
    assert set(plan.start) | set(plan.give_up) <= unscored - working
    successor = at.successor is not None and at.successor.works
    assert not set(plan.start) & set(plan.give_up)
    assert len(plan.start) <= max(0, limits.in_flight - len(working))
    assert list(plan.start) == sorted(plan.start, reverse=True)  # newest first
    for images in plan.start:
        tried = [e for e in view.evaluations if e.images == images]
        ends = [decide.ending_of(e) for e in tried]
        assert ends.count("failed") < limits.attempts
        assert not any(e.exit and e.exit["class"] == "user" for e in tried)
    if plan.done:
        assert not unscored
        assert view.finished or (decide.training_state(view) == "gone" and not successor)
    assert evaluations_wanted(view, NEVER).done


@given(views(), st.sampled_from([IDENTITY, LONGER, OTHER]))
def test_submission_to_any_view_has_one_action(view: RunView, wanted: dict) -> None:
    found = submission(view, wanted)
    at = view.newest
    assert found.action in ("resume", "join", "refuse")
    assert (found.action == "refuse") == bool(found.reason)
    if wanted is OTHER:
        assert found.action == "refuse" and "seed was 0 and is 7" in found.reason
    if found.action == "resume":
        # never beside an attempt whose job may work
        works = decide.training_state(view) in ("queued", "running")
        assert at is None or at.job is None or not works
        assert not view.finished or found.extends_to
    if found.extends_to:
        assert found.action == "resume" and found.extends_to > view.images
    if found.evaluate:
        assert view.finished and not decide.watched(view) and decide.unscored(view)


def test_submission_without_a_run_is_new() -> None:
    assert submission(None, IDENTITY).action == "new"


@given(
    chance=st.integers(0, 2**32).map(random.Random), upto=st.integers(0, 6), slots=st.integers(1, 3)
)
def test_evaluations_that_end_anyhow_leave_every_snapshot_settled(
    chance: random.Random, upto: int, slots: int
) -> None:
    """Plays the watcher's loop against jobs that succeed, fail, are ended by the cluster, or repeat a user error."""
    config = replace(CONFIG, evaluation=replace(CONFIG.evaluation, in_flight=slots))
    records: dict[int, EvaluationRecord] = {}
    tries: dict[int, list[EvaluationView]] = {}
    appeared, rounds = 0, 0
    job = {"kind": "local", "id": "1", "nodes": 1, "tasks": 1}
    while True:
        appeared = min(upto, appeared + chance.randint(0, 2))
        training = JobView(record=job, state="gone" if appeared == upto else "running")
        view = a_view(
            job=training,
            snapshots=dict.fromkeys(range(1, appeared + 1), SHAPE),
            evaluations=tuple(each for of in tries.values() for each in of),
            records=tuple(records.values()),
            images=6,
        )
        plan = evaluations_wanted(view, config)
        if plan.done:
            break
        for images in plan.give_up:
            records[images] = record_of(images, "failed")
        for images in plan.start:
            of = tries.setdefault(images, [])
            of.append(evaluation_of(images, len(of) + 1, job=JobView(record=job, state="running")))
        working = [i for i, of in tries.items() if of[-1].job and of[-1].job.works]
        assert len(working) <= slots
        for images in working:
            end = chance.choice(["works", "ok", "error", "user", "PREEMPTED", "NODE_FAIL"])
            if end == "ok":
                records[images] = record_of(images, "done")
            if end != "works":
                gone = JobView(record=job, state="gone", ending={"state": end})
                tries[images][-1] = replace(tries[images][-1], job=gone, exit=EXITS.get(end))
            ends = [decide.ending_of(each) for each in tries[images] if not each.job.works]
            assert ends.count("failed") <= 3 and ends.count("user") <= 1
        rounds += 1
        assert rounds < 1000  # by then even chance has let everything end
    assert set(records) == set(range(1, upto + 1))


def a_view(
    job: JobView | None = None, *, images: int = 1280, cancelled: bool = False, **more: object
) -> RunView:
    at = AttemptView(files=Attempt(RUN.attempt(1)), opened=0.0, world=2, job=job)
    made = RunView(
        folder=RUN,
        time=1000.0,
        id="abc",
        experiment="digits_dit",
        name=None,
        hash=digest(IDENTITY),
        identity=IDENTITY,
        images=images,
        created=0.0,
        tries=1,
        attempts=(replace(at, cancelled=cancelled),),
        config=CONFIG,
    )
    return replace(made, **more)  # type: ignore[arg-type]


GONE = JobView(record={"kind": "local", "id": "1", "nodes": 1, "tasks": 2}, state="gone")


@pytest.mark.parametrize(
    ("beat", "said"),
    [
        ({"progressed": 864.0, "step_s": 0.2, "section": "train"}, "no progress for 2:16"),
        (
            {"progressed": 864.0, "step_s": 0.2, "section": "checkpoint"},
            "no progress for 2:16 in section checkpoint",
        ),
        ({"progressed": 950.0, "step_s": 0.2, "section": "train"}, ""),
        # steps that are long by themselves
        ({"progressed": 864.0, "step_s": 20.0, "section": "train"}, ""),
        # of an earlier version, or before the first
        ({}, ""),
    ],
)
def test_a_run_that_does_not_move_runs_and_says_for_how_long_instead_of_a_rate(
    beat: dict[str, object], said: str
) -> None:
    view = a_view(replace(GONE, state="running"))
    (at,) = view.attempts
    report = {"images": 640, "images_per_s": 424.0, "eta_s": 1.5, "data_share": 0.1}
    view = replace(view, attempts=(replace(at, heartbeats={"0": beat}, progress=report),))
    assert (state(view).word, state(view).reason) == ("running", said)
    shown = decide.progress(view)
    rates = (shown.images_per_s, shown.eta_s, shown.data_share)
    assert rates == ((None, None, None) if said else (424.0, 1.5, 0.1))


def test_finished_run_with_failed_evaluations_says_so() -> None:
    view = a_view(GONE, snapshots={640: SHAPE, 1280: SHAPE}, records=(record_of(640, "failed"),))
    assert str(state(view)) == "finished, 1 snapshot without a score, 1 evaluation failed"
    assert str(state(replace(view, config=NEVER))) == "finished, 1 evaluation failed"


def test_failure_of_an_earlier_version_names_no_protocol_and_settles_its_snapshot() -> None:
    before = replace(record_of(1280, "failed"), protocol_key="", time=5.0)
    view = a_view(GONE, snapshots={1280: SHAPE}, records=(before,))
    assert decide.unscored(view) == () and evaluations_wanted(view, CONFIG).done
    # until somebody wants it tried again
    again = replace(view, retry_asked=6.0)
    assert decide.unscored(again) == (1280,) and evaluations_wanted(again, CONFIG).start == (1280,)


def test_extension_of_online_guidance_is_refused_once_the_switch_has_set_a_weight() -> None:
    """The weight of L_SK is the images seen over those at the switch: 0 at the first step, and then another."""
    assert IDENTITY["guidance"]["source"] == "online" and IDENTITY["guidance"]["switch"] == 0.5
    for reached in ((), (IDENTITY["train"]["batch"],)):
        found = submission(a_view(GONE, checkpoints=reached), LONGER)
        assert found == decide.Submission(action="resume", extends_to=2560)
    for reached in ((512,), (640,)):
        found = submission(a_view(GONE, checkpoints=reached), LONGER)
        assert found.action == "refuse" and "guidance.switch=0.5" in found.reason


def test_extension_of_online_guidance_without_a_loss_is_taken_until_the_switch() -> None:
    mine = IDENTITY | {"guidance": IDENTITY["guidance"] | {"weight": 0.0}}
    longer = mine | {"train": mine["train"] | {"images": 2560}}
    for reached, action in ((512, "resume"), (640, "refuse")):
        assert (
            submission(a_view(GONE, checkpoints=(reached,), identity=mine), longer).action == action
        )


def test_extension_past_uniform_after_is_refused() -> None:
    path = IDENTITY["path"] | {"uniform_after": 0.5}
    mine = IDENTITY | {"guidance": {"source": "none"}, "path": path}
    longer = mine | {"train": mine["train"] | {"images": 2560}}
    batch = IDENTITY["train"]["batch"]
    # the step that ended at 640 began before it
    for reached, action in ((640, "resume"), (640 + batch, "refuse")):
        view = a_view(GONE, checkpoints=(reached,), identity=mine)
        assert submission(view, longer).action == action


def test_extension_of_a_rate_that_falls_along_a_cosine_is_refused() -> None:
    batch = IDENTITY["train"]["batch"]
    train = IDENTITY["train"] | {"rate_decay": "cosine", "decay_images": 512}
    mine = IDENTITY | {"guidance": {"source": "none"}, "train": train}
    longer = mine | {"train": train | {"images": 2560}}
    # the step that began at 512 had the whole rate in any run
    for reached, action in ((512 + batch, "resume"), (512 + 2 * batch, "refuse")):
        view = a_view(GONE, checkpoints=(reached,), identity=mine)
        assert submission(view, longer).action == action


@pytest.mark.parametrize("job", ["queued", "running"])
def test_extension_of_a_run_at_work_is_refused(job: str) -> None:
    found = submission(a_view(replace(GONE, state=job)), LONGER)  # type: ignore[arg-type]
    assert found.action == "refuse" and "launcher.cancel" in found.reason


def test_shorter_run_of_the_same_name_is_refused_and_the_command_of_before_an_extension_is_not() -> (
    None
):
    extended = a_view(GONE, images=2560, snapshots={1280: SHAPE})
    shorter = IDENTITY | {"train": IDENTITY["train"] | {"images": 640}}
    assert submission(extended, shorter).action == "refuse"
    for wanted in (IDENTITY, LONGER):
        assert submission(extended, wanted) == decide.Submission(action="resume")


def test_extendable_is_the_longest_run_that_differs_in_images_only() -> None:
    free = IDENTITY | {"guidance": {"source": "none"}}
    runs = [
        a_view(GONE, identity=free | {"train": free["train"] | {"images": n}}, images=n)
        for n in (640, 1280)
    ]
    wanted = free | {"train": free["train"] | {"images": 2560}}
    assert decide.extendable([*runs, a_view(GONE, identity=OTHER)], wanted) == runs[1]
    assert decide.extendable(runs[:1], OTHER) is None
