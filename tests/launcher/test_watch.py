"""The watcher: every snapshot ends with one outcome, whatever its evaluations do."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path

import payloads
import pytest
from waiting import until

from launcher import backends, evaluate, submit, watch
from launcher.backends.local import Local
from launcher.folder import Attempt
from launcher.reconcile import act, decide
from launcher.reconcile import restart as restart_rules
from launcher.reconcile.view import read
from selfguide.spec.files import read_config
from selfguide.spec.records import records
from selfguide.spec.run import RunFolder, read_record, write_record


def no_watcher(*_: object, **__: object) -> dict:
    """In place of `act.launch_watcher`, where the test watches itself."""
    return {"kind": "local", "id": "none"}


@pytest.fixture
def run(
    runs: Path, settings: list[str], payload: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> RunFolder:
    """A run of two snapshots whose training is over, with evaluation switched on and no watcher yet."""
    monkeypatch.setattr(Local, "poll_s", 0.05)
    monkeypatch.setattr(act, "launch_watcher", no_watcher)
    payload(train=payloads.publish_all)
    told = submit.submit(submit.resolve([*settings, "evaluation=fd_digits"]))
    made = RunFolder(Path(told["folder"]))
    until(lambda: backends.state(read_record(Attempt(made.attempt(1)).job)) == "gone")
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
    jobs = read(run).evaluations
    assert len({job.job.record["id"] for job in jobs}) == 2
    request = json.loads((jobs[0].folder / "request.json").read_text())
    assert request["images"] == 640 and request["config"]["evaluation"]["protocol"] == "fd_digits"
    row = decide.summary(read(run))
    assert (row.state, row.score) == ("finished", 7.0)
    watch.watch(run.root)  # nothing is done twice
    assert len(read(run).evaluations) == 2


@pytest.mark.parametrize("typed", [(), ("OMP_NUM_THREADS=1", "COLOUR=blue")])
def test_evaluations_on_this_machine_have_the_variables_and_threads_that_the_user_gave(
    settings: list[str],
    payload: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    typed: tuple[str, ...],
) -> None:
    monkeypatch.setattr(Local, "poll_s", 0.05)
    monkeypatch.setattr(act, "launch_watcher", no_watcher)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(4)})
    payload(train=payloads.publish_all, evaluate=payloads.score_telling_threads)
    words = ["evaluation=fd_digits", *(f"cluster.environment.{each}" for each in typed)]
    made = RunFolder(Path(submit.submit(submit.resolve([*settings, *words]))["folder"]))
    until(lambda: backends.state(read_record(Attempt(made.attempt(1)).job)) == "gone")
    watch.watch(made.root)
    assert outcome(made) == [(640, "done", 1), (1280, "done", 1)]
    told = [json.loads((each.folder / "told.json").read_text()) for each in read(made).evaluations]
    # a rank's share beside training of two ranks, and all of four cores behind it
    assert [each["threads"] for each in told] == ([1, 1] if typed else [2, 4])
    assert {each["colour"] for each in told} == {"blue" if typed else None}


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
    assert str(decide.state(read(run))) == "finished, 2 evaluations failed"


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
        each.join(timeout=180)
    assert outcome(run) == [(640, "done", 1), (1280, "done", 1)]
    assert len(read(run).evaluations) == 2


def test_a_cancelled_run_is_left_alone(run: RunFolder, payload: Callable[..., None]) -> None:
    write_record(Attempt(run.attempt(1)).cancelled, {"by": "me"})
    watch.watch(run.root)
    assert read(run).evaluations == ()


def test_a_finished_run_without_scores_gets_its_watcher_back(
    run: RunFolder,
    settings: list[str],
    payload: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = []
    monkeypatch.setattr(act, "launch_watcher", lambda at, *_: started.append(at.number))
    assert (
        submit.submit(submit.resolve([*settings, "evaluation=fd_digits"]))["state"] == "evaluating"
    )
    assert started == [1] and run.attempt_numbers() == [1]
    config = read_config(Attempt(run.attempt(1)).config)
    assert config.evaluation.protocol == "fd_digits"


@pytest.mark.parametrize("restart", ["watcher", "successor"])
def test_run_on_one_machine_goes_on_after_a_killed_rank_where_its_watcher_may(
    restart: str,
    runs: Path,
    settings: list[str],
    payload: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Local, "poll_s", 0.05)
    monkeypatch.setattr(restart_rules, "BACKOFF_S", 0.1)
    started = []
    monkeypatch.setattr(act, "launch_watcher", lambda *_, **__: started.append(1) or no_watcher())
    payload(train=payloads.vanish)
    words = [*settings, f"cluster.restart={restart}"]
    made = RunFolder(Path(submit.submit(submit.resolve(words))["folder"]))
    until(lambda: decide.training_state(read(made)) == "gone")
    payload(train=payloads.publish_all)
    watch.watch(made.root)
    until(lambda: decide.training_state(read(made)) == "gone")
    view = read(made)
    kinds = [decide.cause(at).kind for at in view.attempts]
    wanted = {
        "watcher": (["killed", "ok"], "finished", [1]),
        "successor": (["killed"], "failed", []),
    }
    assert (kinds, decide.state(view).word, started) == wanted[restart]
    assert not view.attempts[-1].by_hand or restart == "successor"


def test_watcher_on_one_machine_stops_where_the_budget_or_the_code_says_so(
    runs: Path, settings: list[str], payload: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Local, "poll_s", 0.05)
    monkeypatch.setattr(restart_rules, "BACKOFF_S", 0.1)
    monkeypatch.setattr(act, "launch_watcher", no_watcher)
    payload(train=payloads.vanish)
    words = [*settings, "cluster.restart=watcher"]
    made = RunFolder(Path(submit.submit(submit.resolve(words))["folder"]))
    watch.watch(made.root)
    # three without a newer checkpoint
    assert made.attempt_numbers() == [1, 2, 3]
    assert decide.state(read(made)).word == "failed"


def test_two_single_looks_at_once_start_every_evaluation_once(
    run: RunFolder, payload: Callable[..., None]
) -> None:
    """As two crontabs of two machines would, in processes of their own; none of them holds a lock."""
    payload(evaluate=payloads.score)
    here = multiprocessing.get_context("fork")
    begin = here.Barrier(2)

    def look() -> None:
        begin.wait()
        for _ in range(20):
            assert evaluate.main(["--once", str(run.root)]) == 0

    both = [here.Process(target=look) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]

    def settled() -> bool:
        evaluate.once([run])
        return len(list(records(run))) == 2

    until(settled)
    assert outcome(run) == [(640, "done", 1), (1280, "done", 1)]
    jobs = read(run).evaluations
    assert sorted(job.images for job in jobs) == [640, 1280]
    # what has no job of its own was started by nobody
    assert all(job.job is not None for job in jobs)
