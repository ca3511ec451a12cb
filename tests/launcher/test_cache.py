"""What a list of runs keeps between commands: it is used while files are the same, and nobody needs it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from many_runs import build

from launcher import folder, ledger
from launcher import runs as runs_command
from launcher.reconcile import cache, lived, parse
from launcher.reconcile.cache import Cache, of_runs
from selfguide.spec.run import RunFolder, write_record


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder; also small caches of new files are kept there."""
    monkeypatch.setenv("SELFGUIDE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "LEAST", 1)
    monkeypatch.setattr(cache, "SETTLED_NS", 0)
    return tmp_path / "cache"


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twenty runs in all states, and the Slurm that has their jobs."""
    found = build(tmp_path, 20, snapshots=4, ranks=2, attempts=2)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return found


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of all files that are parsed and might have been remembered."""
    paths: list[str] = []

    def counted(parse: Callable[[str], object]) -> Callable[[str], object]:
        def call(path: str) -> object:
            paths.append(str(path))
            return parse(path)

        return call

    for name in ("record", "config", "without_p"):
        monkeypatch.setattr(parse, name, counted(getattr(parse, name)))
    return paths


def listed(runs: Path, capsys: pytest.CaptureFixture[str]) -> list[dict]:
    assert runs_command.main(["--runs", str(runs), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_second_list_parses_nothing_again_and_says_the_same(
    many: Path, kept: Path, parsed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = listed(many, capsys)
    assert parsed and {row["state"] for row in first} == {"finished", "failed", "running", "queued"}
    parsed.clear()
    assert listed(many, capsys) == first and parsed == []


def test_changed_file_is_parsed_again_and_no_other(
    many: Path, kept: Path, parsed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = listed(many, capsys)
    record = sorted(many.glob("*/*/evals/*.json"))[0]
    run = record.parent.parent
    # in place, and of the same length
    text = record.read_text()
    score = str(json.loads(text)["scores"]["fd_digits"])
    record.write_text(text.replace(score, "0" * (len(score) - 2) + ".1".zfill(2)[-2:], 1))
    lost = sorted(run.glob("snapshots/*/ema*"))[-1]
    lost.write_bytes(b"x")
    parsed.clear()
    after = {row["id"]: row for row in listed(many, capsys)}
    assert parsed == [str(record)]
    for row in before:
        same = row["id"] != run.name
        assert (after[row["id"]]["snapshots"] == row["snapshots"]) == same


@pytest.mark.parametrize("harm", ["torn", "foreign", "read-only"])
def test_cache_that_cannot_be_used_changes_no_answer(
    many: Path,
    kept: Path,
    harm: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = listed(many, capsys)
    (place,) = kept.iterdir()
    if harm == "torn":
        place.write_bytes(place.read_bytes()[:-100])
    elif harm == "foreign":
        monkeypatch.setattr(os, "getuid", lambda: 12345)
    else:
        place.unlink()
        kept.rmdir()
        kept.write_text("a file where a folder should be")
    assert [row["score"] for row in listed(many, capsys)] == [row["score"] for row in before]


def test_cache_writes_nothing_into_the_runs_folder(
    many: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def there() -> set[tuple[str, int]]:
        return {(str(p), p.stat().st_mtime_ns) for p in many.rglob("*")}

    before = there()
    listed(many, capsys)
    assert there() == before


def test_what_a_run_took_that_is_over_is_read_once_until_its_folders_change(
    many: Path, kept: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[set[Path]] = []
    read_many = lived.read_many

    def noted(runs: Sequence[RunFolder], **options: Any) -> Any:
        read.append({run.root for run in runs})
        return read_many(runs, **options)

    monkeypatch.setattr(lived, "read_many", noted)

    def told() -> dict[str, dict[str, Any]]:
        assert ledger.main(["--runs", str(many), "--json"]) == 0
        return {row["run"]: row for row in json.loads(capsys.readouterr().out)}

    first, second = told(), told()
    everyone = {run.root for run in folder.runs(many)}
    states = {row["id"]: row["state"] for row in listed(many, capsys)}
    works = {root for root in everyone if states[root.name] in ("running", "queued")}
    assert read == [everyone, works] and works and works != everyone
    assert all(second[run.name] == first[run.name] for run in everyone - works)
    # somebody went on with one of them
    run = min(everyone - works)
    write_record(run / "attempts/0002/heartbeat-0.json", {"section": "train"}, replace=True)
    told()
    assert read[-1] == works | {run}


def test_cache_of_other_code_is_not_used(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("1")
    with of_runs(tmp_path, "list") as one:
        assert one.get(str(tmp_path / "a"), lambda path: 1) == 1
    with of_runs(tmp_path, "list") as same:
        assert same.get(str(tmp_path / "a"), lambda path: 2) == 1
    monkeypatch.setattr(cache, "_version", lambda: "another")
    with of_runs(tmp_path, "list") as other:
        assert other.get(str(tmp_path / "a"), lambda path: 3) == 3


def test_file_that_has_just_changed_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    found = Cache()
    assert found.get(str(tmp_path / "a"), lambda path: 1) == 1 and found.added == 0
    os.utime(tmp_path / "a", (1.0, 1.0))
    assert found.get(str(tmp_path / "a"), lambda path: 1) == 1 and found.added == 1


def test_list_tells_best_score_and_why_a_job_waits(
    many: Path, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = listed(many, capsys)
    finished = next(row for row in rows if row["state"] == "finished")
    assert finished["best_score"] < finished["score"]
    assert finished["best_images"] < finished["score_images"] == finished["images"]
    queued = next(row for row in rows if row["state"] == "queued")
    assert queued["waits_for"] == "Priority" and queued["starts"] > 1.8e9
    assert len(folder.runs(many)) == len(rows) == 20


def test_records_under_one_protocol_share_it_and_one_that_differs_keeps_its_own(many: Path) -> None:
    first, second, third = sorted(many.glob("*/*/evals/img-*.json"))[:3]
    about = json.loads(third.read_text())
    about["protocol"]["samples"] += 1
    third.write_text(json.dumps(about))
    one, other, changed = (parse.record(str(path)) for path in (first, second, third))
    assert one.protocol_key == changed.protocol_key and one.protocol is other.protocol
    assert changed.protocol["samples"] == one.protocol["samples"] + 1


@pytest.mark.parametrize("more", [-1, 0, 1, parse._READ])
def test_a_file_that_is_longer_than_one_reading_is_read_whole(tmp_path: Path, more: int) -> None:
    data = os.urandom(parse._READ + more)
    (tmp_path / "file").write_bytes(data)
    assert parse.content(str(tmp_path / "file")) == data
