"""When jobs had their nodes, and the command that says where the time went."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from launcher import ledger
from launcher.backends import Job, Record, Span, accounting
from launcher.compose import compose
from launcher.folder import Attempt
from launcher.reconcile import act
from launcher.reconcile.hours import CLASSES, hours
from launcher.reconcile.spans import measured
from launcher.reconcile.view import read
from selfguide.spec.run import RunFolder, write_record
from tests.board import fakes

NEW: Record = {"id": "7", "name": "sg-a-train", "submitted": 1000.0}


def answers(**said: str | None) -> accounting.Run:
    """Slurm's commands, each with its output; None exits with 1, and one that is not named is not there."""

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        if command[0] not in said:
            raise FileNotFoundError(command[0])
        text = said[command[0]]
        return subprocess.CompletedProcess(command, 1 if text is None else 0, text or "", "")

    return run


def test_spans_by_accounting_are_each_allocation_of_the_job_that_is_meant() -> None:
    said = [
        "7|1005|1010|1110|100|sg-a-train",
        # requeued, and suspended for 20 s
        "7|1200|1300|1350|30|sg-a-train",
        "7|1400|1400|Unknown|5|sg-a-train",
        "7_1|1000|1000|1001|1|sg-a-train",
        # of a Slurm that counted from 1 before
        "7|10|20|30|10|sg-a-train",
        "7|1005|1010|1110|100|other",
        "8|1005|Unknown|Unknown|0|sg-a-train",
    ]
    found = accounting.spans([NEW, NEW | {"id": "8"}], answers(sacct="\n".join(said)))
    times = (Span(1010, 1110, 5.0), Span(1300, 1330, 100.0), Span(1400, None, 0.0))
    assert found == [times, ()]


@pytest.mark.parametrize("accounted", [{}, {"sacct": None}])
def test_spans_without_accounting_are_what_the_queue_still_knows(
    accounted: dict[str, None],
) -> None:
    queue = "7|1010|4600|R|sg-a-train\n8|1010|1020|CD|sg-a-train\n9|4000|N/A|PD|sg-a-train\n"
    records = [NEW | {"id": id} for id in ("7", "8", "9")]
    found = accounting.spans(records, answers(squeue=queue, **accounted))
    assert found == [(Span(1010, None),), (Span(1010, 1020),), ()]
    assert accounting.spans(records, answers(**accounted)) == [(), (), ()]


def a_run(root: Path) -> RunFolder:
    """One attempt on a Slurm that is gone, with all that its ranks left."""
    run = fakes.finished_run(root, "digits_dit", 0, 7.0)
    at = run.attempt(1)
    job = NEW | {
        "kind": "devcluster",
        "comment": "",
        "nodes": 1,
        "tasks": 2,
        "gpus": 2,
        "folder": "/no",
    }
    write_record(at / "job.json", job | {"conf": str(root / "slurm.conf")})
    write_record(at / "submission.json", {"world": 2, "time": 1000.0, "spent_s": 0.0})
    for rank in range(2):
        write_record(at / f"start-{rank}.json", {"time": 1010.0})
        spent = {"seconds": {"start": 10.0, "train": 80.0}, "images": 256_000, "section": "done"}
        left = {"time": 1100.0, "code": 0, "class": "ok", "message": "", **spent}
        write_record(at / f"exit-{rank}.json", left)
    return run


def test_ledger_of_a_run_and_of_all_runs_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path)
    assert ledger.main([run.root.name, "--runs", str(tmp_path), "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["about"] and one["unit"] == "GPU" and one["total_s"] == 180.0
    assert set(one["seconds"]) == set(CLASSES) and one["seconds"]["train"] == 160.0
    assert [job["elapsed_s"] for job in one["jobs"]] == [90.0]
    assert ledger.main(["--runs", str(tmp_path), "--json"]) == 0
    (line,) = json.loads(capsys.readouterr().out)
    assert line == {name: one[name] for name in line}
    for words in ([run.root.name], []):
        assert ledger.main([*words, "--runs", str(tmp_path)]) == 0
        assert "about" in capsys.readouterr().out


def test_what_accounting_said_of_a_job_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path)
    kept = {"spans": [{"start": 1000.0, "end": 1103.0, "queued_s": 2.0}]}
    write_record(run.attempt(1) / "spans-job.json", kept)
    assert ledger.main([run.root.name, "--runs", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["about"] and found["total_s"] == 206.0 and found["queued_s"] == 2.0
    assert found["seconds"] == dict.fromkeys(CLASSES, 0.0) | {
        "start": 40.0,
        "train": 160.0,
        "idle": 6.0,
    }


def test_time_of_a_watcher_that_another_one_followed_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = Attempt(a_run(tmp_path).attempt(1))
    record = {"kind": "devcluster", "conf": str(tmp_path / "slurm.conf"), "folder": "/no"}
    record |= {"comment": "", "name": "sg-a-watch", "nodes": 1, "tasks": 1, "gpus": 0}
    ids = iter("789")

    class Cluster:
        def submit(self, job: Job) -> Record:
            return {**record, "id": next(ids)}

    monkeypatch.setattr(act.backends, "of", lambda cluster: Cluster())
    monkeypatch.setattr(act, "_current_code", lambda at: at.code)
    config = compose(["experiment=digits_dit", "cluster=slurm"])
    for number in range(3):
        act.launch_watcher(at, config, print)
        begin = 1000.0 + 100 * number
        span = {"start": begin, "end": begin + 50.0, "queued_s": 0.0}
        write_record(at.root / "spans-watcher.json", {"spans": [span]})
    (view,) = measured([read(at.run)])
    rows = {row.job: row for row in hours(view).jobs if row.kind == "watcher"}
    assert {name: (row.start, row.elapsed_s) for name, row in rows.items()} == {
        f"devcluster {id}": (1000.0 + 100 * number, 50.0) for number, id in enumerate("789")
    }
