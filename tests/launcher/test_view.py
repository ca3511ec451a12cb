"""What a run's view holds, and that every command and the board draw the same from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import payloads
import pytest
from waiting import until

from launcher import backends, cancel, submit
from launcher import runs as runs_command
from launcher.board.read import Run, read_runs
from launcher.board.states import chips
from launcher.folder import Attempt
from launcher.folder import runs as all_runs
from launcher.reconcile import decide, parse
from launcher.reconcile.view import read, read_many
from selfguide.spec.run import RunFolder, read_record, write_record
from shards.errors import DamagedError


def send(settings: list[str], *more: str) -> RunFolder:
    return RunFolder(Path(submit.submit(submit.resolve([*settings, *more]))["folder"]))


def ended(run: RunFolder) -> bool:
    return backends.state(read_record(Attempt.newest(run).job)) == "gone"


def on_board(runs: Path) -> Run:
    (found,), problems = read_runs(runs)
    assert problems == ()
    return found


def listed(runs: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    assert runs_command.main(["--runs", str(runs), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    return row


def test_cancelled_run_is_cancelled_on_the_board_too(
    runs: Path,
    settings: list[str],
    payload: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    payload(train=payloads.nap)
    run = send(settings)
    until(lambda: len(read(run).newest.starts) == 2)
    cancel.cancel(run)
    assert listed(runs, capsys)["state"] == "cancelled"
    assert [(chip.kind, chip.text) for chip in chips(on_board(runs))] == [("pending", "cancelled")]


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_rank_is_named_by_runs_and_by_the_board(
    runs: Path,
    settings: list[str],
    payload: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    ranks: int,
) -> None:
    payload(train=payloads.vanish if ranks == 2 else payloads.vanish_alone)
    run = send(settings, f"cluster.gpus_per_node={ranks}")
    until(lambda: ended(run))
    row, shown = listed(runs, capsys), on_board(runs)
    assert row["state"] == shown.state.word == "failed"
    assert row["message"] == shown.failure
    assert f"rank {ranks - 1} " in shown.failure
    assert [chip.text for chip in chips(shown)] == ["failed"]


def test_silent_cluster_leaves_a_killed_rank_unknown_and_a_whole_set_of_exit_records_ended(
    runs: Path,
    settings: list[str],
    payload: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    payload(train=payloads.vanish)
    run = send(settings)
    until(lambda: ended(run))
    monkeypatch.setattr(backends, "states", lambda records, *_: ["unknown"] * len(records))
    row, shown = listed(runs, capsys), on_board(runs)
    assert row["state"] == shown.state.word == "unknown"
    assert [chip.text for chip in chips(shown)] == ["unknown"]
    # rank 1 was killed, and might as well work
    write_record(
        run.attempt(1) / "exit-1.json", {"code": 1, "class": "error", "message": "it fell"}
    )
    row, shown = listed(runs, capsys), on_board(runs)
    assert row["state"] == shown.state.word == "failed"


def test_finished_run_without_evaluation_waits_for_no_score(
    runs: Path, settings: list[str], payload: Callable[..., None]
) -> None:
    payload(train=payloads.publish_all)
    run = send(settings)
    until(lambda: ended(run))
    (chip,) = chips(on_board(runs))
    assert chip.text == "finished" and "score" not in chip.detail
    assert str(decide.state(read(run))) == "finished"


def test_jobs_of_many_runs_are_asked_for_at_once(
    runs: Path,
    settings: list[str],
    payload: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    payload(train=payloads.nap)
    for seed in range(3):
        send(settings, f"seed={seed}")
    asked: list[int] = []

    def states(records: list, patience_s: float) -> list[str]:
        assert patience_s <= 3.0
        asked.append(len(records))
        return ["unknown"] * len(records)

    monkeypatch.setattr(backends, "states", states)
    views, problems = read_many(all_runs(runs))
    assert asked == [3] and problems == []
    assert {decide.state(view).word for view in views} == {"unknown"}


def test_history_holds_every_attempt_and_a_list_the_newest(
    runs: Path, settings: list[str], payload: Callable[..., None]
) -> None:
    payload(train=payloads.nap)
    run = send(settings)
    cancel.cancel(run)
    send(settings)
    assert [at.number for at in read(run).attempts] == [1, 2]
    assert [at.cancelled for at in read(run).attempts] == [True, False]
    ((view,), _) = read_many([run])
    assert [at.number for at in view.attempts] == [2] and view.tries == 2
    assert replace(view, attempts=()).newest is None


def test_files_that_cannot_be_read_are_named_and_hide_no_other_run(
    runs: Path,
    settings: list[str],
    payload: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    payload(train=payloads.look_around)
    run = send(settings)
    until(lambda: ended(run))
    (run.attempt(1) / "progress.json").write_text("{")
    write_record(runs / "digits_dit" / "torn" / "run.json", {"id": "torn"})
    assert runs_command.main(["--runs", str(runs), "--json"]) == 0
    done = capsys.readouterr()
    assert [row["id"] for row in json.loads(done.out[done.out.index("[") :])] == [run.root.name]
    assert "torn" in done.err and "progress.json" in done.err


def test_manifest_is_read_without_p_whatever_else_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "MANIFEST.json"
    parts = [{"name": "a", "bytes": 1, "sha256": "0"}]
    for extra in (
        {"guidance": {"source": "online", "p": [0.5, 0.5]}, "data": {"root": 'a "p": [1'}},
        {"guidance": {"source": "none"}, "p": [[1], [2]]},
        {"p": [], "guidance": {"p": [1.0]}},
        {},
    ):
        path.write_text(json.dumps({"files": parts, **extra}, indent=1))
        found = parse.without_p(str(path))
        guidance = {k: v for k, v in extra.get("guidance", {}).items() if k != "p"}
        assert (found["files"], found["guidance"]) == (parts, guidance)
        assert found.get("data") == extra.get("data")
    path.write_text(path.read_text()[:-3])
    with pytest.raises(DamagedError):
        parse.without_p(str(path))
