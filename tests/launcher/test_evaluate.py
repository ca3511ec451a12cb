"""Evaluations that the cluster ends, that are asked for again, and watchers that are lost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import payloads
import pytest
from waiting import until

from launcher import backends, cancel, evaluate, submit, watch
from launcher import runs as runs_command
from launcher.backends.local import Local
from launcher.folder import Attempt
from launcher.reconcile import act, decide, evaluations
from launcher.reconcile.view import EvaluationView, JobView, ending_path, read
from selfguide.spec.records import records
from selfguide.spec.run import RunFolder, read_record, write_record
from shards.errors import UserError

Payload = Callable[..., None]


@pytest.fixture
def run(
    runs: Path, settings: list[str], payload: Payload, monkeypatch: pytest.MonkeyPatch
) -> RunFolder:
    """A run of two snapshots whose training is over, with evaluation switched on and a watcher that is gone."""
    monkeypatch.setattr(Local, "poll_s", 0.05)
    monkeypatch.setattr(evaluations, "backoff", lambda failures: 0.0)
    payload(train=payloads.publish_all)
    with monkeypatch.context() as patch:
        patch.setattr(act, "launch_watcher", lambda at, *_, **__: lost_watcher(at))
        told = submit.submit(submit.resolve([*settings, "evaluation=fd_digits"]))
    made = RunFolder(Path(told["folder"]))
    until(lambda: backends.state(read_record(Attempt(made.attempt(1)).job)) == "gone")
    return made


def lost_watcher(at: Attempt, submitted: float = 0.0) -> dict:
    """The record of a watcher that is no more."""
    record = {"kind": "local", "id": "1", "submitted": submitted, "host": "", "boot": ""}
    record |= {
        "host": Path("/proc/sys/kernel/hostname").read_text().strip(),
        "folder": str(at.root),
    }
    write_record(at.watcher, record, replace=True)
    return record


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Attempts whose watcher was started; nothing is."""
    found: list[int] = []

    def launch(at: Attempt, *_: object, **__: object) -> dict:
        found.append(at.number)
        return {"kind": "local", "id": "77"}

    monkeypatch.setattr(act, "launch_watcher", launch)
    return found


def outcome(run: RunFolder) -> list[tuple[int, str]]:
    return sorted((record.images, record.status) for record in records(run))


def test_evaluations_that_the_cluster_ends_are_no_tries(run: RunFolder, payload: Payload) -> None:
    payload(evaluate=payloads.preempted_evaluation)
    watch.watch(run.root)
    assert outcome(run) == [(640, "done"), (1280, "done")]
    assert len(read(run).evaluations) == 10
    assert str(decide.state(read(run))) == "finished"


@pytest.mark.parametrize(
    ("exit", "ending", "how"),
    [
        ({"code": 1, "class": "error"}, {}, "failed"),
        ({"code": 0, "class": "ok"}, {}, "failed"),
        ({"code": 2, "class": "user"}, {"state": "PREEMPTED"}, "user"),
        ({"code": 143, "class": "signal"}, {}, "interrupted"),
        ({"code": 76, "class": "preempted"}, {"state": "CANCELLED"}, "interrupted"),
        ({"code": 76, "class": "preempted"}, {"state": "TIMEOUT"}, "failed"),
        (None, {"state": "NODE_FAIL"}, "interrupted"),
        (None, {"state": "OUT_OF_MEMORY"}, "failed"),
        (None, {"signals": {"0": 11}}, "failed"),
        (None, {"signals": {"0": 9}}, "killed"),
        (None, {}, "killed"),
    ],
)
def test_ending_of_an_evaluation_tells_its_own_failure_from_the_clusters(
    exit: dict | None, ending: dict, how: str
) -> None:
    job = JobView(record={"submitted": 1.0}, state="gone", ending=ending)
    each = EvaluationView(folder=Path("e"), key="img-1-a", images=1, attempt=1, job=job, exit=exit)
    assert decide.ending_of(each) == how


def test_evaluate_retries_what_failed_only_where_it_is_asked_to(
    run: RunFolder, payload: Payload, launched: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    payload(evaluate=payloads.never_score)
    watch.watch(run.root)
    assert str(decide.state(read(run))) == "finished, 2 evaluations failed"
    assert evaluate.main([str(run.root), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["snapshots"], told["failed"], launched) == ([], [640, 1280], [])
    assert evaluate.main([str(run.root), "--retry"]) == 0
    assert "2 snapshots to score" in capsys.readouterr().out and launched == [1]
    payload(evaluate=payloads.score)
    watch.watch(run.root)
    assert [record.status for record in records(run)].count("done") == 2
    row = decide.summary(read(run))
    assert (row.state, row.message, row.failed_evaluations, row.scored) == ("finished", "", 0, 2)


def test_evaluate_of_a_run_without_evaluation_is_refused(
    settings: list[str], payload: Payload
) -> None:
    payload(train=payloads.publish_all)
    folder = submit.submit(submit.resolve(settings))["folder"]
    with pytest.raises(UserError, match="evaluation=none"):
        evaluate.evaluate(RunFolder(Path(folder)), retry=False)


def test_cancelled_evaluations_stay_ended_until_somebody_asks_again(
    run: RunFolder, payload: Payload, launched: list[int]
) -> None:
    at = Attempt(run.attempt(1))
    watcher = backends.of(read(run).config.cluster).submit(napping(at))
    write_record(at.watcher, watcher, replace=True)
    assert [each["what"] for each in cancel.cancel(run)] == ["watcher"]
    assert str(decide.state(read(run))) == "finished, 2 snapshots without a score"
    lost_watcher(at)
    assert watch.tend(read(run)) == [] and launched == []
    watch.watch(run.root)
    assert read(run).evaluations == ()
    evaluate.evaluate(run, retry=False)
    assert launched == [1]
    payload(evaluate=payloads.score)
    watch.watch(run.root)
    assert outcome(run) == [(640, "done"), (1280, "done")]


def napping(at: Attempt) -> backends.Job:
    return backends.Job(
        function=payloads.nap,
        argument="",
        folder=at.root / "watch",
        code=at.code,
        name="watch",
        comment=str(at.run.root),
        timeout_min=5,
        command=("sleep", "600"),
    )


def test_lost_watcher_is_replaced_by_any_command_that_sees_the_run(
    run: RunFolder, runs: Path, launched: list[int], settings: list[str]
) -> None:
    assert runs_command.main(["--runs", str(runs)]) == 0
    assert runs_command.main([str(run.root), "--json"]) == 0
    submit.submit(submit.resolve([*settings, "evaluation=fd_digits"]))
    assert launched == [1, 1, 1]
    # one that was only just submitted may be gone because it had nothing to do
    lost_watcher(Attempt(run.attempt(1)), time.time())
    assert watch.tend(read(run)) == []


def test_watcher_of_an_older_attempt_is_the_runs_watcher(run: RunFolder) -> None:
    write_record(run.attempt(2) / "submission.json", {"world": 2})
    view = read(run)
    assert view.newest.watcher is None and view.watcher.record["id"] == "1"


def test_watcher_starts_the_next_one_before_its_time_limit(
    run: RunFolder, payload: Payload, launched: list[int]
) -> None:
    config = read(run).config
    watch.watch(run.root, until=time.time() - 1)
    assert launched == [1] and read(run).evaluations == ()
    day = replace(config.cluster, timeout_min=24 * 60)
    assert watch.renewal(replace(config, cluster=day), 0.0) == 24 * 3600 - watch.RENEW_S
    short = replace(config.cluster, timeout_min=2)
    assert watch.renewal(replace(config, cluster=short), 0.0) == 60.0
    # one that has nothing left to do needs no next one
    payload(evaluate=payloads.score)
    watch.watch(run.root)
    watch.watch(run.root, until=time.time() - 1)
    assert launched == [1]


def test_cluster_that_refuses_for_long_leaves_snapshots_unscored_and_not_failed(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "REFUSED_S", 0.0)

    def refuse(*_: object) -> None:
        raise UserError("no more jobs for you")

    monkeypatch.setattr(act, "start_evaluation", refuse)
    watch.watch(run.root)
    assert outcome(run) == []
    assert str(decide.state(read(run))) == "finished, 2 snapshots without a score"


def test_scores_are_neither_missing_nor_under_way_where_nobody_knows(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "states", lambda records, *_: ["unknown"] * len(records))
    assert decide.state(read(run)).word == "unknown"
    assert decide.submission(read(run), read(run).identity).action == "join"


def test_cancel_that_fails_is_recorded_and_completed_by_the_next_command(
    settings: list[str],
    payload: Payload,
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    payload(train=payloads.nap)
    run = RunFolder(Path(submit.submit(submit.resolve(settings))["folder"]))
    until(lambda: len(read(run).newest.starts) == 2)
    with monkeypatch.context() as patch:
        patch.setattr(backends, "states", lambda records, *_: ["unknown"] * len(records))

        def fail(record: dict) -> None:
            raise UserError("Slurm did not cancel job 7: no answer")

        patch.setattr(backends, "cancel", fail)
        with pytest.raises(UserError, match="recorded") as raised:
            cancel.cancel(run)
        assert "\n" not in str(raised.value)
        assert decide.state(read(run)).word == "unknown"
        assert decide.next_attempt(read(run)).action == "stop"
    assert str(decide.state(read(run))) == "running: being cancelled"
    assert runs_command.main(["--runs", str(runs)]) == 0
    assert decide.state(read(run)).word == "cancelled" and read(run).newest.cancel_done
    # a cluster that does not answer later changes nothing about it
    monkeypatch.setattr(backends, "states", lambda records, *_: ["unknown"] * len(records))
    assert decide.state(read(run)).word == "cancelled"


def test_watcher_completes_a_cancellation(
    settings: list[str], payload: Payload, monkeypatch: pytest.MonkeyPatch, launched: list[int]
) -> None:
    payload(train=payloads.nap)
    told = submit.submit(submit.resolve([*settings, "evaluation=fd_digits"]))
    run = RunFolder(Path(told["folder"]))
    write_record(Attempt(run.attempt(1)).cancelled, {"by": "me", "done": None})
    watch.watch(run.root)
    assert decide.state(read(run)).word == "cancelled"


def test_endings_are_kept_for_when_the_scheduler_has_forgotten(
    settings: list[str], payload: Payload
) -> None:
    payload(train=payloads.crash)
    run = RunFolder(Path(submit.submit(submit.resolve(settings))["folder"]))
    at = Attempt(run.attempt(1))
    record = read_record(at.job)
    until(lambda: backends.state(record) == "gone")
    act.keep_endings(read(run))
    assert read_record(ending_path(at.job))["signals"] == {"1": 11}
    for path in at.logs.glob("*_ended.json"):
        path.unlink()
    assert decide.cause(read(run).newest).type == "SIGSEGV"
