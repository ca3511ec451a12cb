"""A record that is broken, in whichever way, is named and hides nothing."""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from launcher import runs as runs_command
from launcher.board import __main__ as command
from launcher.board import detail
from launcher.board.read import Reader, read_runs
from selfguide.spec.run import RunFolder
from selfguide.spec.selections import select
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
        {"images": HUGE},
        {"attempt": HUGE},
        {"seed": HUGE},
        {"nfe": HUGE},
        {"nfe": -1},
        {"seconds": 1e300},
        {"key": "../../elsewhere"},
        {"key": "k" * 300},
        {"key": "k\0"},
        {"sweep": 5},
        {"left_out": "0123456789"},
        {"left_out": {"1": 2.0}},
        {"left_out": ["7"] * 10},
        {"protocol": None},
        {"protocol": {"metric": "fd_digits", "g": HUGE}},
        {"protocol": {"metric": "fd_digits", "interval": ["low", 1.0]}},
        {"protocol": {"metric": "fd_digits", "interval": [0.0, 0.5, 1.0]}},
        {"protocol": {"metric": "fd_digits", "tolerance": "tight"}},
        {"protocol": {"metric": "fd_digits", "sampler": None}},
        {"protocol": {"metric": "fd_digits", "settings": None}},
        {"protocol": {"metric": "probe", "settings": {"noise_times": ["early"]}}},
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e308])
def test_blocks_that_nobody_measured_leave_the_score(
    tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without them the error of a difference is that of samples not paired."""
    run = fakes.make_run(tmp_path)
    fakes.add_record(run, 256_000, {"fd_digits": 7.0}, left_out=[7.0] * 9 + [value])
    (found,), problems = read_runs(tmp_path)
    assert problems == () and found.records[0].scores["fd_digits"] == 7.0
    assert found.records[0].left_out == ()
    assert command.main(["--runs", str(tmp_path)]) == 0


def test_text_that_is_none_is_shown_with_question_marks(tmp_path: Path) -> None:
    """Messages name files, and names of files need not be UTF-8."""
    run = fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    lost = "cannot read /data/\udcff.tar"
    fakes.add_failure(run, 192_000, lost, log=lost)
    fakes.add_record(
        run, 256_000, {"fd_digits": 7.0, "\udcff": 1.0}, attempt=2, host="n\ud800", log=lost
    )
    assert command.main(["--runs", str(tmp_path)]) == 0
    page = (tmp_path / "board.html").read_text()
    assert "cannot read /data/?.tar" in page and "n?" in page
    for form in ("csv", "json", "parquet"):
        out = tmp_path / f"board.{form}"
        assert command.main(
            ["export", "--format", form, "--out", str(out), "--runs", str(tmp_path)]
        ) == 0  # fmt: skip
        assert out.stat().st_size


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
        ("attempts/0001/progress.json", f'{{"images": {HUGE}, "time": 1}}'),
        ("attempts/0001/progress.json", '{"images": 1e300, "time": 1}'),
    ],
)
def test_other_broken_files_leave_the_scores(tmp_path: Path, name: str, text: str) -> None:
    run = fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    (run.root / name).write_text(text)
    (found,), problems = read_runs(tmp_path)
    assert len(found.records) == 2
    assert len(problems) == 1 and name in problems[0]


@pytest.mark.parametrize(
    "losses", [(1e308, -1e308), (1e308,) * 600, (5e-324, 1.0), (float("nan"), float("-inf"))]
)
def test_losses_of_any_size_leave_the_page(tmp_path: Path, losses: tuple[float, ...]) -> None:
    run = fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    lines = [{"images": 10 * n, "loss": loss, "nmi": loss} for n, loss in enumerate(losses, 1)]
    (run.metrics / "train-1.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert command.main(["--runs", str(tmp_path)]) == 0
    svg = "".join(re.findall("<svg.*?</svg>", (tmp_path / "board.html").read_text(), re.DOTALL))
    assert svg and "nan" not in svg and "inf" not in svg.replace("inference", "")


@pytest.mark.parametrize("score", [5e-324, -1e99, 1e99, 0])
def test_scores_of_any_size_are_drawn(tmp_path: Path, score: float) -> None:
    run = fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    scores = {"fd_digits": score, "fd_digits_se": abs(score)}
    fakes.add_record(run, 256_000, scores, attempt=2)
    assert command.main(["--runs", str(tmp_path)]) == 0


def test_names_that_are_no_evaluations_are_left_alone(tmp_path: Path) -> None:
    """NFS keeps what was deleted and is open under such a name, and file managers leave theirs."""
    run = fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    for name in (".nfs00000001", "notes", "img-000000005-a.b"):
        (run.evals / "jobs" / name).mkdir(parents=True)
        (run.evals / "jobs" / name / "job.json").write_text('{"kind": "local"}')
    (found,), problems = read_runs(tmp_path)
    assert len(found.records) == 2 and problems == ()


@pytest.mark.parametrize("part", ["evals", "attempts", "attempts/0001", "metrics", "snapshots"])
def test_a_run_that_is_not_open_to_us_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    run, other = (fakes.finished_run(tmp_path, "digits_dit", seed, 7.0) for seed in (0, 1))
    real, closed = os.listdir, str(run.root / part)

    def listdir(path: Any) -> list[str]:
        if str(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", closed)
        return real(path)

    # a superuser may open all
    monkeypatch.setattr(os, "listdir", listdir)
    found, problems = read_runs(tmp_path)
    assert [each.root for each in found] == [other.root]
    assert len(problems) == 1 and "Permission denied" in problems[0] and closed in problems[0]


def test_a_log_that_is_not_open_to_us_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    (run.attempt(1) / "job").mkdir()

    def closed(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(detail, "names_in", closed)
    assert command.main(["--runs", str(tmp_path)]) == 0


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


def test_a_refresh_sees_that_a_finished_run_was_selected(tmp_path: Path) -> None:
    run = fakes.finished_run(tmp_path, "digits_dit", 0, 7.0)
    age(tmp_path)
    reader = Reader()
    (before,), _ = reader.read(tmp_path)
    assert before.state.word == "finished" and not any(r.nets for r in before.records)
    select(run, asdict(fakes.PROTOCOL), by="launcher.tune")
    (after,), _ = reader.read(tmp_path)
    assert {use.use for record in after.records for use in record.nets or ()} == {"selected"}


def age(root: Path) -> None:
    """Makes all files as old as those of yesterday."""
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
