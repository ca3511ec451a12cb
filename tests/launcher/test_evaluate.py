"""Evaluations that the cluster ends, that are asked for again, watchers that are lost, cancellations that fail.

By a backend in memory, whose jobs are over as soon as they are submitted: no process is started here.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import payloads
import pytest

from launcher import backends, cancel, evaluate, submission, submit, watch
from launcher import runs as runs_command
from launcher.backends import Job, Record, State
from launcher.backends.protocol import new_record
from launcher.folder import Attempt
from launcher.reconcile import act, decide, evaluations
from launcher.reconcile.view import EvaluationView, JobView, ending_path, read
from selfguide.spec import recipe
from selfguide.spec.config import Config, build
from selfguide.spec.contamination import uses
from selfguide.spec.files import to_yaml
from selfguide.spec.identity import digest, identity
from selfguide.spec.records import (
    PART,
    PASS,
    REFERENCE,
    REFERENCES,
    EvaluationRecord,
    Protocol,
    parts_path,
    records,
)
from selfguide.spec.run import RunFolder, read_record, write_record
from selfguide.spec.weight_files import FOLDER, INCEPTION
from shards.errors import NoRoomError, UserError
from shards.format import manifest as manifests


class Memory:
    """A cluster in memory."""

    poll_s = 0.0
    queues = False

    def __init__(self) -> None:
        self.jobs: dict[str, State] = {}
        self.ends: dict[str, dict[str, Any]] = {}
        # what an evaluation does with its request, before it is over
        self.evaluate: Callable[[Path], None] = score
        self.silent = False
        # sizes of arrays
        self.arrays: list[int] = []

    def submit(self, job: Job) -> Record:
        if self.silent:
            raise UserError("no answer")
        record = new_record("local", job) | {"id": str(len(self.jobs) + 1)}
        self.jobs[record["id"]] = "gone"
        if job.argument.endswith("request.json"):
            self.evaluate(Path(job.argument))
        return record

    def submit_array(self, jobs: Sequence[Job]) -> list[Record]:
        self.arrays.append(len(jobs))
        return [self.submit(job) for job in jobs]

    def states(self, records: Sequence[Record], patience_s: float | None = None) -> list[State]:
        return ["unknown" if self.silent else self.jobs[record["id"]] for record in records]

    def endings(self, records: Sequence[Record], *_: Any, **__: Any) -> list[Any]:
        return [self.ends.get(record["id"], {}) for record in records]

    def cancel(self, records: Sequence[Record]) -> int:
        if self.silent:
            raise UserError("Slurm did not cancel job 7: no answer")
        live = [record["id"] for record in records if self.jobs[record["id"]] != "gone"]
        self.jobs |= dict.fromkeys(live, "gone")
        return len(live)

    def strays(self, comment: str) -> list[Record]:
        return []


def score(request: Path) -> None:
    payloads._score(request)


def ends(**record: Any) -> Callable[[Path], None]:
    """An evaluation that leaves this exit record."""
    return lambda request: write_record(request.with_name("exit-0.json"), {"message": "", **record})


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    found = Memory()
    monkeypatch.setitem(backends._BACKENDS, "local", lambda cluster, conf=None: found)
    monkeypatch.setattr(act, "_current_code", lambda at: at.code)
    monkeypatch.setattr(evaluations, "backoff", lambda failures: 0.0)
    return found


@pytest.fixture
def run(runs: Path, settings: list[str], memory: Memory) -> RunFolder:
    """A run of two snapshots whose training is over, with evaluation switched on and a watcher that is gone."""
    return a_run(runs, settings, memory, "evaluation=fd_digits", snapshots=(640, 1280))


def a_run(
    runs: Path, settings: list[str], memory: Memory, *more: str, snapshots: Sequence[int] = ()
) -> RunFolder:
    config = submission.absolute(submit.resolve([*settings, *more]))
    wanted = identity(config, submission.check_data(config))
    made = RunFolder(Path(config.runs) / config.experiment / digest(wanted))
    at = Attempt(made.attempt(1))
    act.write_run(made, config, wanted)
    at.root.mkdir(parents=True)
    at.config.write_text(to_yaml(config))
    write_record(at.submission, {"world": 2, "kind": "local"})
    write_record(at.job, memory.submit(a_job(at)))
    for images in snapshots:
        payloads.publish(made, images)
    lost_watcher(at, memory)
    return made


def a_job(at: Attempt) -> Job:
    return Job(
        function=payloads.nap,
        argument="",
        folder=at.logs,
        code=at.code,
        name="job",
        comment=str(at.run.root),
        timeout_min=5,
    )


def lost_watcher(at: Attempt, memory: Memory, submitted: float = 0.0) -> Record:
    """A watcher that is no more."""
    record = memory.submit(a_job(at)) | {"submitted": submitted}
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


def test_evaluations_that_the_cluster_ends_are_no_tries(run: RunFolder, memory: Memory) -> None:
    def preempted(request: Path) -> None:
        if json.loads(request.read_text())["attempt"] > 4:
            score(request)
        elif request.parent.name.endswith("2"):  # without a word of its own
            memory.ends[str(len(memory.jobs))] = {"state": "NODE_FAIL"}
        else:
            ends(code=76, **{"class": "preempted"})(request)

    memory.evaluate = preempted
    watch.watch(run.root)
    assert outcome(run) == [(640, "done"), (1280, "done")]
    assert len(read(run).evaluations) == 10
    assert str(decide.state(read(run))) == "finished"


def test_time_limit_is_a_try_only_where_no_block_of_samples_was_made(
    run: RunFolder, memory: Memory
) -> None:
    made: dict[str, int] = {}

    def limited(request: Path) -> None:
        wanted = json.loads(request.read_text())
        # of the first snapshot five jobs finish a block each, of the second none does
        if wanted["images"] == 640 and made.setdefault(wanted["key"], 0) == 5:
            score(request)
            return
        write_record(request.with_name("start-0.json"), {})
        memory.ends[str(len(memory.jobs))] = {"state": "TIMEOUT"}
        if wanted["images"] == 640:
            folder = parts_path(run, wanted["key"], "0" * 64)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{PART}{made[wanted['key']]:06d}.npy").touch()
            made[wanted["key"]] += 1

    memory.evaluate = limited
    watch.watch(run.root)
    assert outcome(run) == [(640, "done"), (1280, "failed")]
    assert len(read(run).evaluations) == 6 + 3


@pytest.mark.parametrize("made", ["set", "pass", "part", "reference"])
def test_time_limit_is_no_try_where_any_part_of_the_work_was_finished(
    run: RunFolder, memory: Memory, made: str
) -> None:
    def limited(request: Path) -> None:
        wanted = json.loads(request.read_text())
        if wanted["images"] == 1280 or wanted["attempt"] > 4:
            score(request)
            return
        write_record(request.with_name("start-0.json"), {})
        memory.ends[str(len(memory.jobs))] = {"state": "TIMEOUT"}
        folder = parts_path(run, wanted["key"], "0" * 64)
        known = run.root.parent.parent / REFERENCES / "0123"
        file = {
            "set": folder / "set-1" / f"{PART}000000.npy",
            "pass": folder / f"t0.2{PASS}",
            "part": known / "parts" / f"{PART}000000.npy",
            "reference": known / REFERENCE,
        }[made]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()

    memory.evaluate = limited
    watch.watch(run.root)
    assert outcome(run) == [(640, "done"), (1280, "done")]
    assert len(read(run).evaluations) == 5 + 1


@pytest.mark.parametrize(("kind", "tries"), [("user", 1), ("error", 3)])
def test_evaluation_whose_second_rank_fails_ends_as_that_rank_did(
    run: RunFolder, memory: Memory, kind: str, tries: int
) -> None:
    def fall(request: Path) -> None:
        # the others are ended for it
        ends(code=143, **{"class": "signal"})(request)
        said = {"code": 1, "class": kind, "message": "sample 7 of this snapshot is NaN"}
        write_record(request.with_name("exit-1.json"), said)
        write_record(request.with_name("exit-2.json"), {"code": 143, "class": "signal"})

    memory.evaluate = fall
    watch.watch(run.root)
    assert outcome(run) == [(640, "failed"), (1280, "failed")]
    assert len(read(run).evaluations) == 2 * tries
    assert {each.message for each in records(run)} == {"sample 7 of this snapshot is NaN"}


def test_evaluation_that_is_killed_each_time_is_given_up(run: RunFolder, memory: Memory) -> None:
    memory.evaluate = lambda request: None
    watch.watch(run.root)
    assert outcome(run) == [(640, "failed"), (1280, "failed")]
    assert len(read(run).evaluations) == 2 * evaluations.KILLS


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
    run: RunFolder, memory: Memory, launched: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    memory.evaluate = ends(code=1, **{"class": "error"})
    watch.watch(run.root)
    assert str(decide.state(read(run))) == "finished, 2 evaluations failed"
    assert evaluate.main([str(run.root), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["snapshots"], told["failed"], launched) == ([], [640, 1280], [])
    assert evaluate.main([str(run.root), "--retry"]) == 0
    assert "2 snapshots to score" in capsys.readouterr().out and launched == [1]
    memory.evaluate = score
    watch.watch(run.root)
    assert [record.status for record in records(run)].count("done") == 2
    row = decide.summary(read(run))
    assert (row.state, row.message, row.failed_evaluations, row.scored) == ("finished", "", 0, 2)


def test_evaluate_of_a_run_without_evaluation_is_refused(
    runs: Path, settings: list[str], memory: Memory
) -> None:
    made = a_run(runs, settings, memory, snapshots=(1280,))
    with pytest.raises(UserError, match="evaluation=none"):
        evaluate.evaluate(made, retry=False)


def test_cancelled_evaluations_stay_ended_until_somebody_asks_again(
    run: RunFolder, memory: Memory, launched: list[int]
) -> None:
    at = Attempt(run.attempt(1))
    memory.jobs[lost_watcher(at, memory)["id"]] = "running"
    assert [each["what"] for each in cancel.cancel(run)] == ["watcher"]
    assert str(decide.state(read(run))) == "finished, 2 snapshots without a score"
    assert watch.tend(read(run)) == [] and launched == []
    watch.watch(run.root)
    assert read(run).evaluations == ()
    evaluate.evaluate(run, retry=False)
    assert launched == [1]
    memory.evaluate = score
    watch.watch(run.root)
    assert outcome(run) == [(640, "done"), (1280, "done")]


def test_lost_watcher_is_replaced_by_any_command_that_sees_the_run(
    run: RunFolder, runs: Path, launched: list[int], settings: list[str], memory: Memory
) -> None:
    assert runs_command.main(["--runs", str(runs)]) == 0
    assert runs_command.main([str(run.root), "--json"]) == 0
    submit.submit(submit.resolve([*settings, "evaluation=fd_digits"]))
    assert launched == [1, 1, 1]
    # one that was only just submitted may be gone because it had nothing to do
    lost_watcher(Attempt(run.attempt(1)), memory, time.time())
    assert watch.tend(read(run)) == []


def test_watcher_of_an_older_attempt_is_the_runs_watcher(run: RunFolder) -> None:
    write_record(run.attempt(2) / "submission.json", {"world": 2})
    view = read(run)
    assert view.newest.watcher is None and view.watcher == view.attempts[0].watcher


def test_watcher_starts_the_next_one_before_its_time_limit(
    run: RunFolder, launched: list[int]
) -> None:
    config = read(run).config
    watch.watch(run.root, until=time.time() - 1)
    assert launched == [1] and read(run).evaluations == ()
    day = replace(config.cluster, timeout_min=24 * 60)
    assert watch.renewal(replace(config, cluster=day), 0.0) == 24 * 3600 - watch.RENEW_S
    short = replace(config.cluster, timeout_min=2)
    assert watch.renewal(replace(config, cluster=short), 0.0) == 60.0
    # one that has nothing left to do needs no next one
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
    run: RunFolder, memory: Memory
) -> None:
    memory.silent = True
    assert decide.state(read(run)).word == "unknown"
    assert decide.submission(read(run), read(run).identity).action == "join"


def test_cancel_that_fails_is_recorded_and_completed_by_the_next_command(
    runs: Path, settings: list[str], memory: Memory
) -> None:
    run = a_run(runs, settings, memory)
    memory.jobs[read(run).newest.job.record["id"]] = "running"
    memory.silent = True
    with pytest.raises(UserError, match="recorded") as raised:
        cancel.cancel(run)
    assert "\n" not in str(raised.value)
    assert decide.state(read(run)).word == "unknown"
    assert decide.next_attempt(read(run)).kind == "cancelled"
    # nothing can be done yet, and nothing is tried
    assert watch.tend(read(run)) == []
    memory.silent = False
    assert str(decide.state(read(run))) == "running: being cancelled"
    assert runs_command.main(["--runs", str(runs)]) == 0
    assert decide.state(read(run)).word == "cancelled" and read(run).newest.cancel_done
    # a cluster that does not answer later changes nothing about it
    memory.silent = True
    assert decide.state(read(run)).word == "cancelled"


def test_watcher_completes_a_cancellation(runs: Path, settings: list[str], memory: Memory) -> None:
    run = a_run(runs, settings, memory, "evaluation=fd_digits")
    memory.jobs[read(run).newest.job.record["id"]] = "running"
    write_record(read(run).newest.files.cancelled, {"by": "me", "done": None})
    watch.watch(run.root)
    assert decide.state(read(run)).word == "cancelled" and read(run).newest.cancel_done


def test_cancel_of_a_run_that_has_ended_records_nothing(run: RunFolder) -> None:
    assert cancel.cancel(run) == [] and not read(run).newest.cancelled


def test_endings_are_kept_for_when_the_scheduler_has_forgotten(
    runs: Path, settings: list[str], memory: Memory
) -> None:
    run = a_run(runs, settings, memory)
    job = read(run).newest.job.record["id"]
    memory.ends[job] = {"state": "NODE_FAIL"}
    act.keep_endings(read(run))
    act.keep_endings(read(run))
    del memory.ends[job]
    assert decide.cause(read(run).newest).kind == "node"
    assert ending_path(read(run).newest.files.job).name == "ended-job.json"


def test_last_word_on_a_job_replaces_what_was_said_while_it_completed(
    runs: Path, settings: list[str], memory: Memory
) -> None:
    run = a_run(runs, settings, memory)
    job = read(run).newest.job.record["id"]
    for word, kept in (
        ("COMPLETING", "COMPLETING"),
        ("PREEMPTED", "PREEMPTED"),
        ("FAILED", "PREEMPTED"),
    ):
        memory.ends[job] = {"state": word}
        act.keep_endings(read(run))
        assert read_record(ending_path(read(run).newest.files.job))["state"] == kept


def test_runs_of_other_users_are_left_alone(
    run: RunFolder, launched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert watch.tend(read(run)) == [] and launched == []


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for weights that holds none, and no others on this machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv(FOLDER, str(tmp_path / "weights"))
    return tmp_path / "weights"


def appear(folder: Path) -> None:
    folder.mkdir()
    (folder / INCEPTION.files[0]).touch()


def test_evaluation_without_its_weights_waits_and_starts_when_they_appear(
    runs: Path, settings: list[str], memory: Memory, nowhere: Path, launched: list[int]
) -> None:
    run = a_run(runs, settings, memory, "evaluation=fid_adm", snapshots=(640, 1280))
    view = read(run)
    assert [lack.what for lack in view.lacks] == ["inception weights"]
    assert view.config is not None
    plan = decide.evaluations_wanted(view, view.config)
    assert (plan.start, plan.give_up, plan.done) == ((), (), True)
    assert decide.unscored(view) == (640, 1280)
    assert decide.state(view).reason == "2 snapshots waiting: inception weights"
    assert watch.tend(view) == []
    told = evaluate.evaluate(run, retry=False)
    assert told["watcher"] is None
    assert INCEPTION.fetch in told["waits_for"][0]

    appear(nowhere)
    view = read(run)
    assert view.config is not None
    assert not view.lacks
    assert decide.evaluations_wanted(view, view.config).start == (1280,)
    assert evaluate.evaluate(run, retry=False)["watcher"] is not None
    assert launched == [1]


def test_submission_without_the_weights_says_which_file_where_and_how(
    settings: list[str], memory: Memory, nowhere: Path
) -> None:
    words = [*settings, "evaluation=fid_adm"]
    (sentence,) = submission.meant(submit.resolve(words)).warnings
    for part in (INCEPTION.files[0], str(nowhere), INCEPTION.fetch):
        assert part in sentence
    with pytest.raises(UserError, match=r"evaluation\.require=true"):
        submission.meant(submit.resolve([*words, "evaluation.require=true"]))
    appear(nowhere)
    assert submission.meant(submit.resolve([*words, "evaluation.require=true"])).warnings == ()


def test_submission_with_a_missing_reference_names_it(
    settings: list[str], memory: Memory, nowhere: Path
) -> None:
    appear(nowhere)
    words = [
        *settings,
        "evaluation=fid_adm",
        "evaluation.reference=VIRTUAL_imagenet256_labeled.npz",
    ]
    (sentence,) = submission.meant(submit.resolve(words)).warnings
    assert "tools.reference fetch VIRTUAL_imagenet256_labeled.npz" in sentence


def test_evaluation_of_images_is_no_part_of_a_runs_identity(
    settings: list[str], memory: Memory, data: Path
) -> None:
    names = {
        submission.meant(submit.resolve([*settings, *more])).run.root.name
        for more in (
            [],
            ["evaluation=fid_adm"],
            ["evaluation=fd_effnet", f"evaluation.shards={data}"],
        )
    }
    assert len(names) == 1


def test_shards_to_compare_with_are_known_by_their_manifest(
    settings: list[str], memory: Memory, data: Path
) -> None:
    words = [*settings, "evaluation=fd_effnet", f"evaluation.shards={data}"]
    config = submission.meant(submit.resolve(words)).config
    assert config.evaluation.manifest == manifests.load(data).hash


def statistics(file: Path, number: float = 0.0, width: int = 2048, **about: Any) -> None:
    """A file of statistics, as far as a submission reads it: each mean of its features is this number."""
    more = {"about": np.array(json.dumps(about))} if about else {}
    np.savez(file, mu=np.full(width, number), sigma=np.zeros((1, 1)), **more)


def test_point_of_a_sweep_waits_for_its_own_files_and_no_others(
    runs: Path,
    settings: list[str],
    memory: Memory,
    nowhere: Path,
    launched: list[int],
    tmp_path: Path,
) -> None:
    appear(nowhere)
    away, here = tmp_path / "away.npz", tmp_path / "here.npz"
    statistics(here)
    words = ("evaluation=fid_adm", f"evaluation.reference={away}", "evaluation.in_flight=9")
    run = a_run(runs, settings, memory, *words, snapshots=(640,))
    assert [lack.what for lack in read(run).lacks] == ["reference away.npz"]
    against = f"evaluation.reference={here}"
    told = evaluate.sweep(run, [against])
    assert told["waits_for"] == [] and [each["state"] for each in told["points"]] == ["done"]
    # the other way round: what a point that was ended needs is gone
    statistics(away)
    memory.evaluate = ends(code=76, **{"class": "preempted"})
    evaluate.sweep(run, [against, "sampler.steps=3"])
    here.unlink()
    view = read(run)
    (point,) = decide.unscored_points(view)
    assert [lack.what for lack in decide.lacked(view, point)] == ["reference here.npz"]
    assert decide.all_wanted(view, view.config).points == ()
    statistics(here)
    view = read(run)
    assert decide.all_wanted(view, view.config).points == (point,)


# ---- sweeps ------------------------------------------------------------------------------------------


def measure(request: Path) -> None:
    """A score that falls with the steps and is least at g = 1.5; each block of its jackknife says the same."""
    wanted = json.loads(request.read_text())
    run, config = RunFolder(Path(wanted["run"])), build(Config, wanted["config"])
    how = Protocol.of(config, run.snapshot_manifest(wanted["images"]))
    steps, g = config.sampler.steps, config.sampler.g
    value = 100.0 / steps + 10 * abs(g - 1.5) + (1.0 if config.evaluation.seed else 0.0)
    noise = [0.5 * (-1) ** block for block in range(10)]
    EvaluationRecord(
        status="done",
        key=wanted["key"],
        attempt=wanted["attempt"],
        images=wanted["images"],
        protocol=how.plain(),
        protocol_key=how.key,
        scores={"fd_digits": value},
        left_out=tuple(value + each for each in noise),
        nfe=float(steps),
        sweep=wanted.get("sweep", ""),
        nets=uses({}, {}, wanted.get("selected", ())) or None,
    ).publish(run)


SWEPT = ["sampler.g=1,1.5", "sampler.steps=5,10,100"]


@pytest.fixture
def scored_run(runs: Path, settings: list[str], memory: Memory, launched: list[int]) -> RunFolder:
    """A run whose two snapshots are scored, by ten steps without guidance."""
    memory.evaluate = measure
    more = ("evaluation=fd_digits", "evaluation.in_flight=9", "sampler.steps=10")
    run = a_run(runs, settings, memory, *more, snapshots=(640, 1280))
    watch.watch(run.root)
    return run


def test_sweep_scores_each_point_once_as_one_array_and_keeps_its_recipe(
    scored_run: RunFolder, memory: Memory, launched: list[int]
) -> None:
    told = evaluate.sweep(scored_run, SWEPT)
    # the run's own score is one of the points
    assert memory.arrays == [5]
    assert len(told["points"]) == 6 and launched == []
    made = [json.loads(path.read_text()) for path in scored_run.evals.glob("jobs/*/request.json")]
    assert {each["config"]["evaluation"]["seed"] for each in made} == {0}
    # of all points, and of nothing else: the other snapshot has one score
    again = evaluate.sweep(scored_run, SWEPT)
    assert [each["state"] for each in again["points"]] == ["done"] * 6
    assert again["sweep"] == told["sweep"] and memory.arrays == [5]
    (front,) = recipe.read(scored_run)
    assert [point.nfe for point in front.points] == [5, 5, 10, 10, 100, 100]
    shown = {point.key: (point.nfe, point.sampler["g"]) for point in front.points}
    assert [shown[key] for key in front.front] == [(5, 1.5), (10, 1.5), (100, 1.5)]
    assert shown[front.chosen] == (100, 1.5)
    assert front.selected_by["net"] == "fd_digits"
    # scores of other settings are none of the run's
    assert decide.newest_score(read(scored_run)).protocol["g"] == 1
    assert decide.summary(read(scored_run)).scored == 2


def test_sweep_that_is_confirmed_scores_its_choice_from_other_seeds(
    scored_run: RunFolder, memory: Memory
) -> None:
    evaluate.sweep(scored_run, [*SWEPT, "evaluation.samples=100"], confirm=700)
    evaluate.sweep(scored_run, [*SWEPT, "evaluation.samples=100"], confirm=700)
    told = evaluate.sweep(scored_run, [*SWEPT, "evaluation.samples=100"], confirm=700)
    *points, last = told["points"]
    assert len(points) == 6 and memory.arrays == [6]
    assert (last["confirms"], last["samples"], last["seed"]) == (True, 700, 100)
    (record,) = (each for each in records(scored_run) if each.key == last["key"])
    assert record.score == 1.0 + 1.0
    assert [(use.net, use.use) for use in record.nets] == [("fd_digits", "selected")]


def test_points_of_a_sweep_are_tried_again_by_class(scored_run: RunFolder, memory: Memory) -> None:
    def fall(request: Path) -> None:
        config = json.loads(request.read_text())["config"]
        kind = {5: "user", 10: "error", 100: "signal"}[config["sampler"]["steps"]]
        ends(code=1, **{"class": kind})(request)

    memory.evaluate = fall
    evaluate.sweep(scored_run, ["sampler.g=2", "sampler.steps=5,10,100"])
    for _ in range(5):
        evaluate.once([scored_run])
    tries = Counter(each.key for each in read(scored_run).evaluations if each.attempt > 1)
    assert sorted(tries.values()) == [2, 5]
    found = {r.protocol["steps"]: r for r in records(scored_run) if r.sweep}
    assert {steps: record.status for steps, record in found.items()} == {5: "failed", 10: "failed"}
    memory.evaluate = measure
    evaluate.once([scored_run], retry=True)
    assert [r.status for r in records(scored_run) if r.sweep].count("done") == 3


def test_sweep_of_what_was_trained_is_refused(scored_run: RunFolder) -> None:
    for words in (["train.batch=64,128"], ["sampler.g=interval(0,1)"], ["evaluation.average=5"]):
        with pytest.raises(UserError):
            evaluate.sweep(scored_run, words)
    with pytest.raises(UserError):
        evaluate.sweep(scored_run, SWEPT, images=7)


def test_settings_that_change_nothing_make_no_other_point(
    scored_run: RunFolder, memory: Memory
) -> None:
    told = evaluate.sweep(scored_run, ["sampler.g=1", "sampler.interval=[0,1],[0.2,0.8]"])
    assert len(told["points"]) == 1 and memory.arrays == []


def test_points_are_told_apart_by_every_setting_in_which_they_differ(
    scored_run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sampler.name=ddim", "sampler.eta=0,1", "evaluation.seed=0,100", "sampler.steps=5"]
    told = [each["label"] for each in evaluate.sweep(scored_run, words)["points"]]
    plain = "ddim 5 steps g=1"
    assert sorted(told) == [
        f"{plain} eta=1.0 seed=0", f"{plain} eta=1.0 seed=100", f"{plain} seed=0", f"{plain} seed=100",
    ]  # fmt: skip
    assert evaluate.main([str(scored_run.root), *words]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "evaluations" in line]
    assert any("eta=1.0" in row for row in rows) and any("eta" not in row for row in rows)


def test_sweep_over_weak_models_names_them_and_refuses_a_snapshot_that_is_not_there(
    scored_run: RunFolder,
) -> None:
    told = evaluate.sweep(scored_run, ["sampler.g=2", "sampler.weak=condition,snapshot-640"])
    plain, weak = (each["label"] for each in told["points"])
    assert weak == f"{plain} from snapshot-640"
    for word in ("snapshot-1280", "snapshot-641"):
        with pytest.raises(
            UserError, match=f"sampler.weak={word}.*take sampler.weak=snapshot-640$"
        ):
            evaluate.sweep(scored_run, ["sampler.g=2", f"sampler.weak={word}"])


def test_snapshots_that_are_not_later_than_the_one_guidance_leads_away_from_are_skipped(
    runs: Path, settings: list[str], memory: Memory
) -> None:
    more = ("evaluation=fd_digits", "sampler.g=2", "sampler.weak=condition+snapshot-640")
    run = a_run(runs, settings, memory, *more, snapshots=(320, 640, 1280))
    watch.watch(run.root)
    assert outcome(run) == [(320, "skipped"), (640, "skipped"), (1280, "done")]
    reasons = {each.message for each in records(run) if each.status == "skipped"}
    assert reasons == {"sampler.weak=condition+snapshot-640 is no earlier snapshot than this one"}
    # nobody can score them, however often that is asked for
    assert evaluate.main([str(run.root), "--retry"]) == 0
    watch.watch(run.root)
    assert sorted(set(outcome(run))) == [(320, "skipped"), (640, "skipped"), (1280, "done")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["sampler.g=1,2", "sampler.g=3"],
            "give each setting once, several values as sampler.g=A,B",
        ),
        (["sampler.g=1,"], "cannot read 'sampler.g=1,': give values as sampler.g=A,B"),
        (["sampler.interval=0.2"], "must be a list of 2; give 'sampler.interval=[0.2,0.2]'"),
        (["evaluation=[fd_digits,fd_digits_odd]"], "give evaluation=fd_digits,fd_digits_odd for a"),
        (["evaluation.in_flight=3"], "give --in-flight N"),
        (["evaluation.snapshots=newest"], "give --images N"),
        (["evaluation.attempts=9"], "drop it"),
        (["evaluation.reference=mine.npz"], "take evaluation.reference=null"),
        (["--once", "sampler.g=2"], "drop sampler.g=2, or drop --once"),
        (["--once", "--images", "640"], "--images is of a sweep"),
        (["--once", "--confirm", "0"], "--confirm is of a sweep"),
    ],
)
def test_evaluate_refuses_what_would_change_nothing(
    scored_run: RunFolder, memory: Memory, words: list[str], said: str
) -> None:
    begun = len(memory.jobs)
    with pytest.raises(UserError, match=re.escape(said)):
        evaluate.main([str(scored_run.root), *words])
    assert len(memory.jobs) == begun


def test_evaluate_of_settings_without_a_run_asks_for_one() -> None:
    with pytest.raises(UserError, match="name the run before it"):
        evaluate.main(["sampler.g=1,2"])


def test_evaluate_by_two_protocols_makes_a_point_of_each(scored_run: RunFolder) -> None:
    told = evaluate.sweep(scored_run, ["evaluation=fd_digits,fd_digits_odd"])
    assert [each["metric"] for each in told["points"]] == ["fd_digits", "fd_digits_odd"]


# ---- single looks ------------------------------------------------------------------------------------


def test_single_look_is_quiet_where_all_is_well_and_says_what_is_wrong(
    run: RunFolder, runs: Path, memory: Memory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--once", "--runs", str(runs), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["runs"]
    assert [name.partition("-")[2][:9] for name in told["started"]] == ["000001280", "000000640"]
    assert outcome(run) == [(640, "done"), (1280, "done")]
    assert evaluate.main(["--once", f"runs={runs}"]) == 0
    assert capsys.readouterr() == ("", "")
    payloads.publish(run, 960)
    memory.silent = True
    # jobs of which nobody knows are no reason to start another
    assert evaluate.main(["--once", "--runs", str(runs)]) == 1
    told = capsys.readouterr()
    assert told.out == "" and run.root.name in told.err
    memory.silent = False
    assert evaluate.main(["--once", "--runs", str(runs)]) == 0
    assert (960, "done") in outcome(run)


def test_request_that_another_process_wrote_first_is_its_own(
    run: RunFolder, memory: Memory
) -> None:
    view = read(run)
    begun = len(memory.jobs)
    assert watch.start(view, decide.all_wanted(view, view.config))
    # what is known is older than what has happened
    assert watch.start(view, decide.all_wanted(view, view.config)) == []
    assert len(memory.jobs) == begun + 2
    # while it is being submitted it is in flight; a submitter that died is followed in the end
    (folder,) = (each.folder for each in read(run).evaluations if each.images == 1280)
    for record in run.evals.glob("img-*.json"):
        record.unlink()
    (folder / "job.json").unlink()
    assert decide.all_wanted(read(run), view.config).plans[0][1].in_flight == (1280,)
    old = time.time() - 2 * evaluations.CLAIM_S
    os.utime(folder / "request.json", (old, old))
    assert decide.all_wanted(read(run), view.config).plans[0][1].start[:1] == (1280,)


def test_folder_without_a_request_is_no_try(run: RunFolder, memory: Memory) -> None:
    # another process is about to claim the first try, or died before it did
    view = read(run)
    assert view.config is not None
    key = decide.point_of(view, view.config, 1280).key
    (run.evals / "jobs" / f"{key}.1").mkdir(parents=True)
    view = read(run)
    assert view.evaluations == ()
    watch.start(view, decide.all_wanted(view, view.config))
    assert {each.attempt for each in read(run).evaluations} == {1}


def test_snapshot_whose_record_is_half_written_is_scored_again_beside_it(
    run: RunFolder, memory: Memory
) -> None:
    watch.watch(run.root)
    (record,) = run.evals.glob("img-000001280-*.json")
    whole = record.read_bytes()
    record.write_bytes(whole[: len(whole) // 2])
    # also where nothing else is left of the first try
    shutil.rmtree(run.evals / "jobs" / record.stem)
    watch.watch(run.root)
    assert outcome(run) == [(640, "done"), (1280, "done")]
    assert record.read_bytes() == whole[: len(whole) // 2]
    assert [path.name for path in sorted(run.evals.glob("img-000001280-*.json"))] == [
        record.name, record.name.replace(".1.json", ".2.json"),
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["code", "request", "submission", "submit"])
def test_try_that_a_full_disk_keeps_from_starting_does_not_count(
    run: RunFolder, memory: Memory, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise NoRoomError("no room")

    def write(path: Path, *of: Any, **more: Any) -> None:
        if path.name == f"{where}.json":
            path.parent.mkdir(parents=True, exist_ok=True)
            full()
        write_record(path, *of, **more)

    with monkeypatch.context() as patch:
        if where == "code":
            patch.setattr(act, "_current_code", full)
        elif where == "submit":
            patch.setattr(memory, "submit", full)
        else:
            patch.setattr(act, "write_record", write)
        for _ in range(evaluations.KILLS + 1):
            (told,) = evaluate.once([run])
            assert "no room" in told["problems"][0]
    assert read(run).evaluations == ()
    evaluate.once([run])
    evaluate.once([run])
    assert outcome(run) == [(640, "done"), (1280, "done")]


def test_single_look_goes_on_where_one_run_may_not_be_written(
    run: RunFolder, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = RunFolder(run.root.with_name("0000"))
    shutil.copytree(run.root, other.root)
    ask = act.ask_for_scores

    def refused(asked: RunFolder, **more: Any) -> None:
        if asked == other:
            raise PermissionError(errno.EACCES, "Permission denied", str(other.evals))
        ask(asked, **more)

    monkeypatch.setattr(act, "ask_for_scores", refused)
    told = evaluate.once([other, run], retry=True)
    assert any("0000" in each for found in told for each in found["problems"])
    assert (1280, "done") in outcome(run)


def test_policy_of_newest_snapshots_skips_others_but_milestones(
    runs: Path, settings: list[str], memory: Memory, launched: list[int]
) -> None:
    more = ("evaluation.snapshots=newest", "evaluation.milestone_images=500")
    run = a_run(
        runs, settings, memory, "evaluation=fd_digits", *more, snapshots=(128, 256, 512, 640, 896)
    )
    watch.watch(run.root)
    assert outcome(run) == [
        (128, "skipped"), (256, "skipped"), (512, "done"), (640, "skipped"), (896, "done"),
    ]  # fmt: skip
    (record,) = (each for each in records(run) if each.images == 640)
    assert "896" in record.message
    assert decide.skipped(read(run)) == (128, 256, 640)
    # by hand they are scored all the same
    evaluate.evaluate(run, retry=True)
    watch.watch(run.root)
    assert (640, "done") in outcome(run) and decide.skipped(read(run)) == ()
