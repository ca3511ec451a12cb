"""What is asked of a run while it trains: read as typed, applied once, at one image count, and recorded."""

from __future__ import annotations

import gzip
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from launcher import tune
from selfguide.distributed import RankInfo
from selfguide.spec import tuning
from selfguide.spec.files import to_yaml
from selfguide.spec.rank_status import Preempted, RankStatus
from selfguide.spec.run import Lease, RunFolder, read_record
from selfguide.training import loop
from selfguide.training.stop import StopVote
from selfguide.training.trace import Trace
from selfguide.training.tuning import Tuning
from selfguide.training.work import Training
from shards.errors import UserError
from tests.selfguide.test_loop import BATCH, begun
from tests.selfguide.test_online import online_config
from tests.selfguide.test_training import attempt, config


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["log_every=1_280"], {"log_every": 1280}),
        (["trace=5", "save=now"], {"trace": 5, "save": True}),
        (["stop=after_save"], {"stop": True}),
    ],
)
def test_settings_are_read_as_typed(words: list[str], found: dict[str, Any]) -> None:
    assert tuning.parse(words, 128) == found


@pytest.mark.parametrize(
    "words",
    [
        ["log_evry=128"], ["log_every=100"], ["log_every=0"], ["log_every=-128"], ["log_every="], ["trace=1.5"],
        ["trace=1001"], ["save=later"], ["stop=now"], ["trace"], ["save=now", "save=now"], ["learning_rate=1"], [""],
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(words: list[str]) -> None:
    with pytest.raises(UserError):
        tuning.parse(words, 128)


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(UserError, match="log_every"):
        tuning.parse(["log_evry=128"], 128)


def test_requests_are_numbered_and_kept(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert tuning.newest(run) == 0 and tuning.requests(run) == []
    assert [tuning.ask(run, 1, {"trace": steps}) for steps in (3, 4)] == [1, 2]
    tuning.record_applied(run, 1, 1, 640)
    first, second = tuning.requests(run)
    assert first["settings"] == {"trace": 3} and first["applied"]["images"] == 640
    assert second["number"] == 2 and second["applied"] is None
    assert [each["number"] for each in tuning.requests(run, after=1)] == [2]


class Saved:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


def test_a_request_is_applied_once_and_a_cadence_outlives_its_attempt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, save = RunFolder(tmp_path), Saved()
    for number in (1, 2):
        run.attempt(number).mkdir(parents=True)
    first = Tuning(Lease(run, 1), RankInfo(0, 0, 1), 640)
    assert first.newest() == 0 and not first.apply(0, 64, save)
    tuning.ask(run, 1, {"log_every": 128})
    tuning.ask(run, 1, {"save": True, "log_every": 256})
    assert not first.apply(2, 128, save) and not first.apply(2, 192, save)
    assert first.log_every == 256 and save.count == 1
    assert [each["applied"]["images"] for each in tuning.requests(run)] == [128, 128]
    # asked of an attempt that ended before it saw it
    tuning.ask(run, 1, {"stop": True})
    second = Tuning(Lease(run, 2), RankInfo(0, 0, 1), 640)
    assert second.log_every == 256 and second.settled == 3
    (said,) = caplog.messages
    assert said.startswith("request 3 (stop) is not applied, since attempt 1 ended")
    assert second.newest() == 3 and not second.apply(3, 256, save)
    tuning.ask(run, 2, {"stop": True})
    assert second.apply(4, 320, save)


def test_a_cadence_that_a_later_attempt_is_given_goes_before_one_that_was_asked_for(
    tmp_path: Path,
) -> None:
    """`launcher.resume RUN train.log_every=...` would say so and change nothing."""
    run = RunFolder(tmp_path)
    made = online_config()

    def began(number: int, log_every: int) -> Tuning:
        run.attempt(number).mkdir(parents=True)
        train = replace(made.train, log_every=log_every)
        text = to_yaml(replace(made, train=train))
        (run.attempt(number) / "config.yaml").write_text(text)
        return Tuning(Lease(run, number), RankInfo(0, 0, 1), log_every)

    first = began(1, 640)
    tuning.ask(run, 1, {"log_every": 64})
    first.apply(1, 64, Saved())
    assert first.log_every == 64
    assert [began(2, 640).log_every, began(3, 128).log_every, began(4, 128).log_every] == [
        64,
        128,
        128,
    ]
    tuning.ask(run, 4, {"log_every": 256})
    assert began(5, 128).log_every == 256


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{", "cannot be read"),
        ("", "cannot be read"),
        ('"text"', "names no attempt"),
        ("[1]", "names no attempt"),
        ('{"log_every": 64}', "names no attempt"),
        ('{"attempt": 1, "settings": {"log_evry": 64}}', "did you mean 'log_every'"),
        ('{"attempt": 1, "settings": {"log_every": 0}}', "log_every=0 is nothing"),
        ('{"attempt": 1, "settings": {"log_every": "64"}}', "log_every='64' is nothing"),
        ('{"attempt": 1, "settings": {"trace": 5, "save": "now"}}', "save='now' is nothing"),
        ('{"attempt": 1, "settings": {"trace": 1000000}}', "too many steps"),
    ],
)
def test_a_request_that_was_written_by_hand_and_is_none_stops_no_training(
    tmp_path: Path, written: str, said: str, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    run, save = RunFolder(tmp_path), Saved()
    run.attempt(1).mkdir(parents=True)
    tuned = Tuning(Lease(run, 1), RankInfo(0, 0, 1), 640)
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune" / "0001.json").write_text(written)
    # beside it what is no request at all, one that an editor numbered, and one that is well
    for name in ("0001", "2.json", "99999999999.json", "notes.json"):
        (tmp_path / "tune" / name).write_text("?")
    (tmp_path / "tune" / "70000000.json").write_text('{"attempt": 1, "settings": {"save": true}}')
    assert tuning.ask(run, 1, {"log_every": 128}) == 70_000_001
    assert not tuned.apply(tuned.newest(), 64, save)
    assert tuned.log_every == 128 and save.count == 1 and tuned.trace._profile is None
    assert "request 1 at 64 images asks for nothing" in caplog.text and said in caplog.text
    found = tuning.requests(run)
    assert [each["number"] for each in found] == [1, 70_000_000, 70_000_001]
    assert all(each["applied"]["images"] == 64 for each in found)
    tune._list(run, as_json=False)
    assert f"refused: {found[0]['refused']}" in capsys.readouterr().out
    # a later attempt goes on behind all of them
    assert Tuning(Lease(run, 2), RankInfo(0, 0, 1), 640).settled == 70_000_001


def test_a_request_in_a_folder_that_denies_the_run_stops_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another account has made it."""
    run, save = RunFolder(tmp_path), Saved()
    run.attempt(1).mkdir(parents=True)
    tuned = Tuning(Lease(run, 1), RankInfo(0, 0, 1), 640)
    monkeypatch.setattr("selfguide.training.tuning.LOOK_S", 0.0)
    assert tuning.ask(run, 1, {"log_every": 128}) == 1

    def denied(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(tmp_path / "tune"))

    with monkeypatch.context() as patch:
        # a test that runs as root is denied nothing
        patch.setattr(tuning, "record_applied", denied)
        assert not tuned.apply(tuned.newest(), 64, save)
        assert tuned.log_every == 128
    assert tuning.ask(run, 1, {"save": True}) == 2
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "newest", denied)
        patch.setattr(tuning, "requests", denied)
        assert tuned.newest() == 1 and not tuned.apply(2, 128, save)
        assert Tuning(Lease(run, 2), RankInfo(0, 0, 1), 640).log_every == 640
    assert save.count == 0 and caplog.text.count("Permission denied") == 2
    # what could not be read is read the next time
    assert not tuned.apply(tuned.newest(), 192, save) and save.count == 1


class Ready:
    def ready(self, batches: int, timeout_s: float = 0.0) -> bool:
        return True


def voted(rank_info: RankInfo, folder: str) -> list[tuple[int, int]]:
    """(request that the vote names, cadence after it) at each of six step boundaries."""
    run = RunFolder(Path(folder))
    tuned = Tuning(Lease(run, 1), rank_info, 640)
    vote = StopVote(RankStatus(), Ready(), tuned.newest)  # type: ignore[arg-type]
    found = []
    for step in range(6):
        if step == 2 and rank_info.rank == 0:
            tuning.ask(run, 1, {"log_every": 64})
            tuned._looked = -float("inf")
        assert vote.stop(at_once=False) == 0
        tuned.apply(vote.request, 64 * step, Saved())
        found.append((vote.request, tuned.log_every))
    return found


def test_all_ranks_apply_a_request_at_one_step(ranks: Any, tmp_path: Path) -> None:
    (tmp_path / "attempts" / "0001").mkdir(parents=True)
    first, second = ranks(2, voted, str(tmp_path))
    assert first == second
    assert first[1] == (0, 640) and first[-1] == (1, 64)
    (asked,) = tuning.requests(RunFolder(tmp_path))
    assert asked["applied"]["images"] == 64 * first.index((1, 64))


def test_a_trace_holds_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    job = begun(tmp_path, 0)
    trace = Trace(tmp_path / "traces", 0)
    assert trace.stepped(0) is None and trace.end(0) is None
    trace.begin(2)
    loop.advance(job)
    assert trace.stepped(BATCH) is None
    loop.advance(job)
    path = trace.stepped(2 * BATCH)
    assert path is not None and trace.stepped(3 * BATCH) is None
    names = {
        each.get("name") for each in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    }
    assert "aten::mm" in names or "aten::addmm" in names
    assert [each.name for each in (tmp_path / "traces").iterdir()] == [path.name]


@pytest.mark.parametrize("ends", ["by a signal", "by an error"])
def test_a_trace_under_way_is_written_where_an_attempt_ends_early(
    ends: str, single: RankInfo, digits: Path, tmp_path: Path
) -> None:
    """Of a hundred steps that were asked for, an attempt does four; it says how it ends before it writes them."""
    run, status, told = RunFolder(tmp_path / "run"), RankStatus(), []
    tuning.ask(run, 1, {"trace": 100})
    step = loop.advance

    def traces() -> list[str]:
        return [each.name for each in (run.root / "traces").glob("*")]

    def fails(error: BaseException) -> None:
        told.append((type(error), traces(), run.saved()))

    def ending(job: Training) -> None:
        step(job)
        if job.state.images == 4 * BATCH:
            if ends == "by an error":
                raise ZeroDivisionError
            status.stop = signal.SIGTERM

    status.fails = fails
    kind = ZeroDivisionError if ends == "by an error" else Preempted
    with patch.object(loop, "advance", ending), pytest.raises(kind):
        attempt(single, config(digits), str(run.root), status)
    reached = 4 * BATCH if ends == "by an error" else run.saved()[-1]
    assert traces() == [f"img-{reached:012d}-rank-0.json.gz"]
    assert told == [(kind, [], run.saved())]


def test_a_trace_that_finds_no_room_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "traces").write_text("a file where the folder should be")
    trace = Trace(tmp_path / "traces", 0)
    trace.begin(1)
    assert trace.stepped(64) is None


def test_stop_after_save_leaves_a_record_that_nothing_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = begun(tmp_path, BATCH)
    job.lease.run.attempt(1).mkdir(parents=True)
    monkeypatch.setattr(loop, "save_if_new", lambda job, epochs: True)
    with pytest.raises(Preempted) as stopped:
        loop.stop_here(job, None, "launcher.tune", goes_on=False)  # type: ignore[arg-type]
    assert stopped.value.saved == BATCH
    assert read_record(job.lease.run.cancelled(1))["by"] == "launcher.tune"  # type: ignore[index]
