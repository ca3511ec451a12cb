"""A record that is broken, in whichever way, is named and hides nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher import runs as runs_command
from launcher.board import __main__ as command
from launcher.board.read import Reader, read_runs
from selfguide.spec.run import RunFolder
from tests.board import fakes

HUGE = int("9" * 400)


def broken(run: RunFolder, **changes: Any) -> Path:
    """A record with these values beside the whole ones."""
    whole = next(path for path in sorted(run.evals.glob("*.json")))
    path = run.evals / "img-000192000-broken.1.json"
    path.write_text(json.dumps({**json.loads(whole.read_text()), **changes}))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"images": "many"},
        {"images": None},
        {"images": 1.5},
        {"attempt": True},
        {"seed": "0"},
        {"schema": 2},
        {"schema": "1"},
        {"status": "won"},
        {"protocol": "fd_digits"},
        {"protocol": {"metric": 7}},
        {"protocol": {}},
        {"protocol": {"metric": "fd_digits", "samples": "5000"}},
        {"protocol": {"metric": "fd_digits", "g": "1"}},
        {"protocol_key": 7},
        {"scores": [7.0]},
        {"scores": {"fd_digits": "7"}},
        {"scores": {"fd_digits": HUGE}},
        {"scores": {"fd_digits": -1e308}},
        {"images": -5},
        {"started": 1e30},
        {"time": -1},
        {"nfe": float("nan")},
        {"seconds": "40"},
        {"time": float("inf")},
        {"label_free": "yes"},
        {"nets": {"net": "a"}},
        {"nets": [{"net": "a"}]},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_record_of_wrong_values_is_quarantined(
    tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    path = broken(run, **changes)
    (found,), problems = read_runs(tmp_path)
    assert [r.images for r in found.records] == [128_000, 256_000]
    assert len(problems) == 1 and str(path) in problems[0]
    assert found.quarantined == problems
    assert command.main(["ls", "--runs", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told["tables"][0]["rows"][0]["score"]["mean"] == 7.0 and len(told["problems"]) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000, '{"schema": 1}', "\x00"])
def test_a_file_that_is_no_record_is_quarantined(tmp_path: Path, text: str) -> None:
    run = fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    (run.evals / "img-000192000-torn.1.json").write_text(text)
    (run.evals / "img-000192001-bytes.1.json").write_bytes(b"\xff\xfe")
    (run.evals / "img-000192002-folder.1.json").mkdir()
    (found,), problems = read_runs(tmp_path)
    assert len(found.records) == 2 and len(problems) == 3


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("attempts/0001/job.json", '{"kind": "local"}'),
        ("attempts/0001/job.json", '{"kind": "cloud", "id": "1"}'),
        ("attempts/0001/config.yaml", "a: [\n"),
        ("metrics/train-1.jsonl", '{"images": 1, "loss": "low"}\n'),
        ("attempts/0001/progress.json", '{"images": "x", "time": 1}'),
        ("attempts/0001/progress.json", '{"images": 5, "time": 1e30}'),
    ],
)
def test_other_broken_files_leave_the_scores(tmp_path: Path, name: str, text: str) -> None:
    run = fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    (run.root / name).write_text(text)
    (found,), problems = read_runs(tmp_path)
    assert len(found.records) == 2
    assert len(problems) == 1 and name in problems[0]


def test_a_refresh_opens_only_what_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import launcher.reconcile.parse as parse

    runs = [fakes.finished_run(tmp_path, "digits_dit", seed, 7.0) for seed in range(3)]
    age(tmp_path)
    opened: list[str] = []
    of_json, of_record = parse.json_object, parse.record
    monkeypatch.setattr(parse, "json_object", lambda path: opened.append(path) or of_json(path))
    monkeypatch.setattr(parse, "record", lambda path: opened.append(path) or of_record(path))
    reader = Reader()
    first = reader.read(tmp_path)
    assert opened
    opened.clear()
    assert reader.read(tmp_path) == first and opened == []
    fakes.add_record(runs[1], 192_000, {"fd_digits": 6.0})
    after, _ = reader.read(tmp_path)
    assert sorted(len(run.records) for run in after) == [2, 2, 3]
    assert opened and all(str(runs[1].root) in path for path in opened)
    # in place, with the same name
    opened.clear()
    (path,) = runs[2].evals.glob("img-000256000*.json")
    path.write_text(path.read_text().replace("7.0", "17.0"))
    after, _ = reader.read(tmp_path)
    assert 17.0 in [run.records[-1].scores["fd_digits"] for run in after]


def age(root: Path) -> None:
    """Makes all files as old as those of yesterday."""
    import os

    for folder, _, names in os.walk(root):
        for path in (folder, *(os.path.join(folder, name) for name in names)):  # noqa: PTH118
            os.utime(path, (1.75e9, 1.75e9))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("attempts/0001/progress.json", '{"images": "x", "images_per_s": 7, "time": 1}'),
        ("run.json", None),
    ],
)
def test_a_file_of_wrong_numbers_hides_no_other_run(
    tmp_path: Path, name: str, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = (fakes.finished_run(tmp_path, "digits_dit", seed, 7.0) for seed in range(2))
    path = run.root / name
    path.write_text(text or json.dumps({**json.loads(path.read_text()), "created": 1e30}))
    for main, words in ((runs_command.main, ()), (command.main, ("build",))):
        assert main([*words, "--runs", str(tmp_path), "--json"]) == 0
        told = capsys.readouterr()
        assert other.root.name in told.out and name in f"{told.out}{told.err}"
