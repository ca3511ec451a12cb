"""runs, logs, cancel, follow, help and completion, as a user meets them."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import payloads
import pytest
from waiting import REPOSITORY, until

from launcher import (
    backends,
    cancel,
    evaluate,
    folder,
    follow,
    logs,
    resume,
    status,
    submit,
    usage,
    watch,
)  # fmt: skip
from launcher import runs as runs_command
from launcher.backends.local import Local
from launcher.choices import experiments, options
from launcher.folder import Attempt
from launcher.reconcile import act, decide
from launcher.reconcile.view import read
from selfguide.spec.run import RunFolder, read_record, write_record
from shards.errors import UserError


@pytest.fixture
def napping(runs: Path, settings: list[str], payload: Callable[..., None]) -> RunFolder:
    """A run whose two ranks do nothing until they are ended."""
    payload(train=payloads.nap)
    run = RunFolder(Path(submit.submit(submit.resolve([*settings, "name=first"]))["folder"]))
    until(lambda: list(Attempt(run.attempt(1)).logs.glob("*_1_log.out")))
    return run


def test_runs_lists_state_and_progress(
    napping: RunFolder, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = {
        "images": 640,
        "of": 1280,
        "images_per_s": 64.0,
        "eta_s": 10.0,
        "loss": 0.5,
        "section": "train",
    }
    write_record(napping.attempt(1) / "progress.json", progress)
    assert runs_command.main(["--runs", str(runs)]) == 0
    said = capsys.readouterr().out
    for part in ("first", "digits_dit", "running", "640 / 1,280", "64", "0:10"):
        assert part in said
    assert runs_command.main(["--runs", str(runs), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["state"], told["images"], told["of"], told["attempts"]) == (
        "running",
        640,
        1280,
        1,
    )
    assert runs_command.main(["first", "--runs", str(runs)]) == 0
    assert "local" in capsys.readouterr().out
    beat = {"section": "train", "images": 640, "step_s": 0.2, "progressed": time.time() - 3000}
    write_record(napping.attempt(1) / "heartbeat-0.json", beat)
    assert runs_command.main(["--runs", str(runs)]) == 0
    said = capsys.readouterr().out
    assert "running, no progress for 5" in said and "0:10" not in said


def test_no_runs_says_how_to_start_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs_command.main(["--runs", str(tmp_path)]) == 0
    assert "launcher.submit" in capsys.readouterr().out


def test_a_run_is_found_by_folder_name_and_prefix(napping: RunFolder, runs: Path) -> None:
    for text in (str(napping.root), "first", "fir"):
        assert folder.find(text, runs).root == napping.root
    with pytest.raises(UserError, match="did you mean 'first'"):
        folder.find("frist", runs)
    other = runs / "digits_dit" / "fire"
    write_record(other / "run.json", {"id": "fire"})
    with pytest.raises(UserError, match="several runs"):
        folder.find("fir", runs)
    with pytest.raises(UserError, match="--runs"):
        folder.find("first", runs / "none")


def test_logs_show_rank_0_and_who_failed(
    runs: Path,
    settings: list[str],
    payload: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    payload(train=payloads.fall)
    run = RunFolder(Path(submit.submit(submit.resolve(settings))["folder"]))
    until(lambda: decide.state(read(run)).word == "failed")
    capsys.readouterr()
    assert logs.main([str(run.root)]) == 0
    said = capsys.readouterr().out
    assert "_0_log.out" in said and "_1_log.out" in said and "rank one fell" in said
    assert logs.main([str(run.root), "--rank", "1", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert "rank one fell" in told["text"]
    assert logs.main([str(run.root), "-f", "--rank", "1"]) == 0  # ends by itself: the job is over
    assert "rank one fell" in capsys.readouterr().out
    with pytest.raises(UserError, match="ranks 0 to 1"):
        logs.main([str(run.root), "--rank", "7"])


def test_logs_follow_until_the_job_ends(
    napping: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    at = Attempt(napping.attempt(1))
    stream = threading.Thread(target=logs.main, args=([str(napping.root), "-f"],))
    stream.start()
    (log,) = at.logs.glob("*_0_log.out")
    with log.open("a") as file:
        file.write("a line that came later\n")
    assert stream.is_alive()
    cancel.cancel(napping)
    stream.join(timeout=180)
    assert not stream.is_alive()
    assert capsys.readouterr().out.count("a line that came later") == 1


def test_logs_of_several_ranks_are_merged_by_time() -> None:
    texts = {
        "rank 0": ["2026-01-01 00:00:01 a", "  of a", "2026-01-01 00:00:03 c"],
        "rank 1": ["before", "2026-01-01 00:00:02 b"],
    }
    lines = [line.partition(" | ")[2] for line in logs.merged(texts)]
    whose = [line.partition(" | ")[0] for line in logs.merged(texts)]
    assert [line.strip() for line in lines] == [
        "before",
        "2026-01-01 00:00:01 a",
        "of a",
        "2026-01-01 00:00:02 b",
        "2026-01-01 00:00:03 c",
    ]
    assert whose == ["rank 1", "rank 0", "rank 0", "rank 1", "rank 0"]
    assert list(logs.merged({"rank 0": ["a"]})) == ["a"]


def test_logs_of_an_older_attempt_and_of_all_ranks(
    napping: RunFolder, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    cancel.cancel(napping)
    submit.submit(submit.resolve([*settings, "name=first"]))
    second = Attempt(napping.attempt(2))
    until(lambda: list(second.logs.glob("*_1_log.out")))
    capsys.readouterr()
    for number in (1, 2):
        words = [str(napping.root), "--attempt", str(number), "--rank", "all", "--json"]
        assert logs.main(words) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [(row["attempt"], row["of"]) for row in rows] == [
            (number, "rank 0"),
            (number, "rank 1"),
        ]
    for words in (["--attempt", "3"], ["--rank", "x"], ["-f", "--json"]):
        with pytest.raises(UserError):
            logs.main([str(napping.root), *words])


def test_logs_follow_into_the_next_attempt(
    napping: RunFolder,
    settings: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # as where a job waits behind the first one
    goes_on = threading.Event()
    monkeypatch.setattr(logs, "_goes_on", lambda *_: not goes_on.is_set())
    stream = threading.Thread(target=logs.main, args=([str(napping.root), "-f"],))
    stream.start()
    cancel.cancel(napping)
    submit.submit(submit.resolve([*settings, "name=first"]))
    second = Attempt(napping.attempt(2))
    until(lambda: list(second.logs.glob("*_0_log.out")))
    (log,) = second.logs.glob("*_0_log.out")
    with log.open("a") as file:
        file.write("of the second attempt\nand no end")
    goes_on.set()
    stream.join(timeout=180)
    said = capsys.readouterr().out
    assert not stream.is_alive()
    assert said.count("of the second attempt") == said.count("and no end") == 1


def test_leaving_logs_by_ctrl_c_ends_with_130_and_leaves_the_run(napping: RunFolder) -> None:
    command = [sys.executable, "-u", "-m", "launcher", "logs", str(napping.root), "-f"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    stream = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    (log,) = Attempt(napping.attempt(1)).logs.glob("*_0_log.out")
    with log.open("a") as file:
        file.write("a line to wait for\n")
    assert stream.stdout is not None
    assert any("a line to wait for" in line for line in stream.stdout)
    stream.send_signal(signal.SIGINT)
    _, said = stream.communicate(timeout=180)
    assert stream.returncode == 130 and "Traceback" not in said
    assert decide.state(read(napping)).word == "running"


def test_status_tells_everything_about_one_run_and_follows_it(
    napping: RunFolder, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    advice = {"name": "one_group", "images": 640, "text": "raise guidance.tau"}
    napping.metrics.mkdir()
    (napping.metrics / "advice-0001.jsonl").write_text(json.dumps(advice) + "\n")
    damaged = [{"images": 320}]
    write_record(napping.attempt(1) / "progress.json", {"images": 640, "damaged": damaged})
    assert status.main(["first", "--runs", str(runs), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["state"] == "running" and told["damaged_checkpoints"] == 1
    assert told["advice"] == [{"images": 640, "text": "raise guidance.tau"}]
    assert runs_command.main(["first", "--runs", str(runs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == told.keys()
    with pytest.raises(UserError):
        status.main(["first", "--runs", str(runs), "--json", "--follow"])
    codes: list[int] = []
    words = ["first", "--runs", str(runs), "--follow"]
    stream = threading.Thread(target=lambda: codes.append(status.main(words)))
    stream.start()
    cancel.cancel(napping)
    stream.join(timeout=180)
    assert codes == [1] and "raise guidance.tau" in capsys.readouterr().out


def test_cancel_says_what_it_ended(
    napping: RunFolder, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cancel.main(["first", "--runs", str(runs)]) == 0
    assert "cancelled training: local job" in capsys.readouterr().out
    assert cancel.main(["first", "--runs", str(runs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": "first", "cancelled": []}


def test_cancel_ends_watcher_and_evaluation_too(
    runs: Path, settings: list[str], payload: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watcher is the real one, in its own process; the evaluation a job that never ends."""
    payload(train=payloads.nap)
    run = RunFolder(
        Path(submit.submit(submit.resolve([*settings, "evaluation=fd_digits"]))["folder"])
    )
    at = Attempt(run.attempt(1))
    assert backends.state(read_record(at.watcher)) == "running"
    payload(evaluate=payloads.nap)
    payloads.publish(run, 640)
    until(lambda: (jobs := read(run).evaluations) and jobs[0].job)
    what = [each["what"] for each in cancel.cancel(run)]
    assert what[:2] == ["watcher", "training"] and set(what[2:]) <= {"evaluation"}
    there = [read_record(path) for path in run.root.rglob("job.json")] + [read_record(at.watcher)]
    assert set(backends.states(there)) == {"gone"}
    assert decide.state(read(run)).word == "cancelled" and cancel.cancel(run) == []


def test_follow_tells_the_story_and_ends_with_the_run(
    runs: Path, settings: list[str], payload: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(act, "launch_watcher", lambda *_, **__: {"kind": "local", "id": "none"})
    monkeypatch.setattr(Local, "poll_s", 0.05)
    payload(train=payloads.publish_all, evaluate=payloads.score)
    run = RunFolder(
        Path(submit.submit(submit.resolve([*settings, "evaluation=fd_digits"]))["folder"])
    )
    watcher = threading.Thread(target=watch.watch, args=(run.root,))
    watcher.start()
    watcher.join(timeout=180)
    out = io.StringIO()
    assert follow.follow(run, out) == 0
    for part in (
        "snapshot at 640 images",
        "evaluation of 1,280 images",
        "1,280 images: fd_digits 7",
        "finished",
    ):
        assert part in out.getvalue()


def test_follow_exits_1_with_the_failing_ranks_message(
    settings: list[str], payload: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    payload(train=payloads.fall)
    assert submit.main([*settings, "follow=true"]) == 1
    assert "failed: rank 1: RuntimeError: rank one fell" in capsys.readouterr().out


def test_leaving_follow_leaves_the_run(napping: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(run: RunFolder) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(follow, "read", interrupt)
    out = io.StringIO()
    assert follow.follow(napping, out) == 130
    assert "launcher.cancel" in out.getvalue()
    assert decide.state(read(napping)).word == "running"


def test_help_lists_every_experiment_with_its_line_and_an_example_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert submit.main(["--help"]) == 0
    said = capsys.readouterr().out
    for name, line in experiments().items():
        assert f"experiment={name}" in said and line and line in said
    for example, _ in usage.COMMON:
        assert example in said
    assert max(map(len, said.splitlines())) <= 130


@pytest.mark.parametrize(
    "main",
    [
        *(runs_command.main, logs.main, cancel.main, resume.main, evaluate.main),
        *(status.main, watch.main),
    ],
)
def test_every_command_has_help(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0 and "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("experiment=digits_u", ["digits_uncond", "digits_uvit"]),
        ("exper", [f"experiment={name}" for name in options("experiment")]),
        ("train.micro", ["train.micro_batch="]),
        ("cluster=dev", ["devcluster"]),
    ],
)
def test_bash_completes(typed: str, wanted: list[str]) -> None:
    line = f"python -m launcher.submit {typed}"
    program = (
        f"{usage.completion()}\nCOMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}; "
        '_selfguide_submit; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == wanted
