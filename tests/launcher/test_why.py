"""`launcher why`: the command, on runs of this machine and on run folders that faults left on a real Slurm."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import payloads
import pytest
from waiting import REPOSITORY, until

from launcher import backends, submit, why
from launcher.folder import Attempt
from launcher.reconcile.conclusion import conclude
from launcher.reconcile.timeline import events, verdict
from launcher.reconcile.view import RunView, read
from selfguide.spec.run import RunFolder, read_record
from shards.errors import UserError
from tests.cluster.corpus import Fault, check, restore

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.json"))
cells = pytest.mark.parametrize("entry", CORPUS, ids=[path.stem for path in CORPUS])


def restored(entry: Path, folder: Path, *, endings: bool = True) -> tuple[RunView, list[Fault]]:
    """The view of a run of the corpus, and what was done to it."""
    run = RunFolder(folder / "runs" / "digits_dit" / "run")
    faults = restore(entry, run, endings=endings)
    return read(run, evidence=True), faults


@cells
def test_verdict_names_the_fault_that_a_run_of_the_corpus_met(entry: Path, tmp_path: Path) -> None:
    view, faults = restored(entry, tmp_path)
    check(view, faults)
    told = events(view)
    began = [each.attempt for each in told if each.kind == "began"]
    assert began == [at.number for at in view.attempts if at.starts]
    assert len([each for each in told if each.kind == "cause"]) == len(faults)
    assert why.text(told, conclude(view, verdict(view)))[-1]


@cells
def test_without_the_schedulers_word_no_other_rank_is_blamed(entry: Path, tmp_path: Path) -> None:
    """As where nobody has asked it in time, and it does not know the jobs any more."""
    view, faults = restored(entry, tmp_path, endings=False)
    for fault in faults:
        found = verdict(view, fault.attempt)
        assert found is not None and fault.rank in (None, found.rank), found
    assert faults or verdict(view) is None


def test_corpus_holds_faults_and_runs_without_one() -> None:
    labels = [json.loads(entry.read_text())["faults"] for entry in CORPUS]
    assert [] in labels
    kinds = {fault["kind"] for label in labels for fault in label}
    assert kinds >= {"killed", "crash", "node", "preempted", "outside"}


def test_colours_are_for_terminals_only(tmp_path: Path) -> None:
    view, _ = restored(Path(__file__).parent / "corpus" / "a1.json", tmp_path)
    told, end = events(view), conclude(view, verdict(view))
    plain, coloured = why.text(told, end), why.text(told, end, colour=True)
    assert not any("\033" in line for line in plain) and any(
        "\033[31m" in line for line in coloured
    )
    assert [re.sub(r"\033\[\d+m", "", line) for line in coloured] == plain


def test_rank_that_raised_is_told_by_the_command_with_its_frames(
    runs: Path,
    settings: list[str],
    payload: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    payload(train=payloads.fall)
    run = RunFolder(Path(submit.submit(submit.resolve(settings))["folder"]))
    until(lambda: backends.state(read_record(Attempt.newest(run).job)) == "gone")
    capsys.readouterr()
    assert why.main([run.root.name, "--runs", str(runs), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["state"], said["cause"]["kind"], said["cause"]["rank"]) == ("failed", "error", "1")
    (cause,) = [each for each in said["events"] if each["kind"] == "cause"]
    assert cause["lines"][-1] == "RuntimeError: rank one fell" and cause["node"]
    assert why.main([str(run.root)]) == 0
    text = capsys.readouterr().out
    assert text.count("Traceback") == 0 and "\033" not in text
    assert text.endswith(f"    python -m launcher.resume {run.root}\n")
    with pytest.raises(UserError, match="--attempt 7"):
        why.main([str(run.root), "--attempt", "7"])


def put(path: Path, record: dict) -> None:
    # not made safe against a crash: these are a thousand
    path.write_text(json.dumps(record))


def test_fifty_attempts_need_one_question_and_no_torch(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "digits_dit" / "long")
    run.root.mkdir(parents=True)
    about = {"id": "long", "experiment": "digits_dit", "images": 1280, "created": 0.0}
    put(run.run_json, about | {"identity": {}})
    job = {"kind": "slurm", "conf": "/nowhere/slurm.conf", "comment": str(run.root), "name": "x"}
    job |= {"folder": str(tmp_path), "nodes": 2, "tasks": 4}
    killed = {"code": 143, "class": "signal", "message": "ended by SIGTERM", "images": 640}
    killed |= {"time": 100.0}
    for number in range(1, 51):
        at = Attempt(run.attempt(number))
        at.root.mkdir(parents=True)
        put(at.submission, {"world": 8, "time": 100.0 * number})
        put(at.job, {**job, "id": str(number)})
        for rank in range(8):
            put(at.root / f"start-{rank}.json", {"node": f"n{rank // 4}", "time": number})
            put(
                at.root / f"heartbeat-{rank}.json",
                {"section": "train", "images": 600, "time": number},
            )
            if rank != 5:
                put(at.root / f"exit-{rank}.json", killed)
    bin = tmp_path / "bin"
    bin.mkdir()
    for name in ("squeue", "sacct", "scontrol"):
        (bin / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/asked\n")
        (bin / name).chmod(0o755)
    command = "import sys; from launcher import why; why.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", command, str(run.root), "--json"],
        env={"PATH": f"{bin}:/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["cause"]["rank"] == "5" and said["cause"]["attempt"] == 50
    assert len([each for each in said["events"] if each["kind"] == "cause"]) == 50
    # whether they are there, how they ended, and what the accounting knows
    assert (tmp_path / "asked").read_text().split() == ["squeue", "squeue", "sacct"]
