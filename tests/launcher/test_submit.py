"""A run is what is learned: the same settings join it, resume it, or find it finished."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import payloads
import pytest
from waiting import REPOSITORY, until

from launcher import backends, cancel, submit
from launcher.compose import compose
from launcher.folder import Attempt
from launcher.reconcile import decide
from launcher.reconcile.view import read
from selfguide.spec.files import read_config
from selfguide.spec.identity import digest, identity
from selfguide.spec.run import RunFolder, read_record
from shards.errors import NoRoomError, UserError
from tests.shards.disks import disk


def send(settings: list[str], *more: str) -> dict:
    """Submits as the command does; what it tells."""
    return submit.submit(submit.resolve([*settings, *more]))


def only_run(runs: Path) -> RunFolder:
    (found,) = runs.glob("*/*/run.json")
    return RunFolder(found.parent)


def test_a_submission_returns_at_once_with_a_whole_run_folder(
    payload: Callable[..., None],
    settings: list[str],
    runs: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    payload(train=payloads.look_around)
    assert submit.main(settings) == 0
    run = only_run(runs)
    at = Attempt(run.attempt(1))
    said = capsys.readouterr().out
    for part in (
        run.root.name,
        str(run.root),
        "launcher.runs",
        "launcher.logs",
        "launcher.cancel",
        str(runs),
    ):
        assert part in said
    about = run.describe()
    assert about["id"] == about["hash"] == run.root.name == digest(about["identity"])
    assert about["images"] == 1280 and about["experiment"] == "digits_dit"
    config = read_config(at.config)
    assert config.data.root == str(data) and config.runs == str(runs)
    assert read_record(at.submission)["world"] == 2
    until(lambda: backends.state(read_record(at.job)) == "gone")
    for rank in range(2):
        told = json.loads((at.root / f"place-{rank}.json").read_text())
        assert told["launcher"] == str(at.code / "launcher" / "__init__.py")
        assert told["cwd"] == str(at.code)


def test_the_same_run_again_joins_it_while_it_works(
    payload: Callable[..., None], settings: list[str], runs: Path
) -> None:
    payload(train=payloads.nap)
    first = send(settings)
    second = send(settings)
    assert (first["state"], second["state"], second["run"]) == (
        "submitted",
        "running",
        first["run"],
    )
    assert only_run(runs).attempt_numbers() == [1]
    # nothing was typed otherwise
    assert second["notes"] == []


@pytest.mark.parametrize(
    ("typed", "kept", "command"),
    [
        (["evaluation.samples=64"], "evaluation.samples=32, not 64", " evaluation.samples=64"),
        (["train.log_every=128"], "train.log_every=640, not 128", None),
        (
            ["evaluation.seed=3", "nodes=2", "cluster=slurm"],
            "evaluation.seed=0, not 3, nodes=1, not 2",
            " evaluation.seed=3",
        ),
        (["follow=true"], None, None),
    ],
)
def test_what_a_run_that_is_joined_does_not_take_is_named(
    payload: Callable[..., None],
    settings: list[str],
    typed: list[str],
    kept: str | None,
    command: str | None,
) -> None:
    payload(train=payloads.nap)
    settings = [*settings, "evaluation=fd_digits", "evaluation.samples=32"]
    first = send(settings)
    notes = send(settings, *typed)["notes"]
    assert any(kept in note for note in notes) if kept else notes == []
    ends = [note for note in notes if "launcher.evaluate" in note]
    assert [note.endswith(f"{first['folder']}{command}") for note in ends] == [True] * bool(command)


def test_two_shells_at_once_make_one_attempt(settings: list[str], runs: Path) -> None:
    program = (
        "import sys, payloads\n"
        "from launcher import attempt, submit\n"
        "attempt.train = payloads.nap\n"
        "sys.exit(submit.main(sys.argv[1:]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{REPOSITORY}"}
    shells = [
        subprocess.Popen(
            [sys.executable, "-c", program, *settings, "--json"],
            env=environment,
            stdout=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    told = [json.loads(shell.communicate(timeout=180)[0]) for shell in shells]
    assert sorted(each["state"] for each in told) == ["running", "running", "submitted"]
    assert only_run(runs).attempt_numbers() == [1]


def test_a_submitter_that_died_on_the_way_does_not_block_the_run(
    payload: Callable[..., None], settings: list[str], runs: Path
) -> None:
    payload(train=payloads.nap)
    send(settings)
    run = only_run(runs)
    cancel.cancel(run)
    Attempt(run.attempt(run.open_attempt())).code.mkdir()  # as far as it came
    assert decide.state(read(run)).word == "queued"
    assert send(settings)["attempt"] == 3


def test_a_run_that_stopped_gets_its_next_attempt(
    payload: Callable[..., None], settings: list[str], runs: Path
) -> None:
    payload(train=payloads.fall)
    send(settings)
    run = only_run(runs)
    until(lambda: decide.state(read(run)).word == "failed")
    assert decide.state(read(run)).reason == "rank 1: RuntimeError: rank one fell"
    payload(train=payloads.publish_all)
    told = send(settings, "cluster.gpus_per_node=1", "train.snapshot_every=1280")
    assert (told["state"], told["attempt"], told["run"]) == ("submitted", 2, run.root.name)
    until(lambda: decide.state(read(run)).word == "finished")
    assert run.published() == [1280]
    assert send(settings)["state"] == "finished"
    assert run.attempt_numbers() == [1, 2]


@pytest.mark.parametrize("how", ["lost", "flip"])
def test_a_finished_run_whose_last_snapshot_is_lost_or_damaged_gets_an_attempt(
    payload: Callable[..., None], settings: list[str], runs: Path, how: str
) -> None:
    payload(train=payloads.publish_all)
    send(settings)
    run = only_run(runs)
    until(lambda: decide.state(read(run)).word == "finished")
    until(lambda: backends.state(read_record(Attempt.newest(run).job)) == "gone")
    assert send(settings)["attempt"] == 1, "what holds is left alone"
    if how == "lost":
        shutil.rmtree(run.snapshot(1280))
    else:
        (run.snapshot(1280) / "weights").write_bytes(b"y" * 10)
    told = send(settings)
    assert (told["state"], told["attempt"]) == ("submitted", 2)


@pytest.mark.parametrize("room", [64 << 10, 600 << 10])
def test_a_full_disk_at_submission_is_one_line_and_leaves_nothing(
    payload: Callable[..., None],
    settings: list[str],
    runs: Path,
    room: int,
) -> None:
    """Full while the code is copied, early and late."""
    payload(train=payloads.nap)
    runs.parent.mkdir(exist_ok=True)
    with disk(runs, room) as small:
        with pytest.raises(NoRoomError) as raised:
            send(settings)
        told = str(raised.value)
        assert len(told.splitlines()) == 1 and len(told) < 400
        assert "No space left on device" in told and "make room there" in told
        assert [p.name for p in runs.glob("*/*/*")] == []
        small.resize(64 << 20)
        assert send(settings)["attempt"] == 1
        assert cancel.main([str(only_run(runs).root)]) == 0


def test_only_what_changes_the_result_changes_the_id() -> None:
    def name(*more: str) -> str:
        return digest(identity(compose(["experiment=digits_dit", *more]), "manifest"))

    base = name()
    for same in (
        "nodes=4",
        "cluster=slurm",
        "cluster.partition=gpu",
        "runs=/elsewhere",
        "follow=true",
        "train.log_every=2560",
        "train.snapshot_every=128",
        "train.checkpoint_every=128",
        "engine.timeout_s=5",
        "name=x",
        "evaluation=none",
        "data.root=/other/copy",
        "data.threads=9",
        "data.cache=/nvme/shards",
        "data.damaged=0.5",
    ):
        assert name(same) == base, same
    others = [
        "seed=1",
        "model.depth=2",
        "train.batch=256",
        "guidance.groups=10",
        "data.on_damage=substitute",  # an image may be another
        "guidance=none",
        "engine=torch",
        "train.micro_batch=8",  # half the batch at once: other statistics for Sinkhorn
    ]
    found = {name(other) for other in others} | {base}
    assert len(found) == len(others) + 1
    assert digest(identity(compose(["experiment=digits_dit"]), "other data")) != base
    assert name("guidance=none", "train.micro_batch=8") == name("guidance=none")


def test_a_name_that_holds_another_run_is_refused_with_the_difference(
    payload: Callable[..., None], settings: list[str], runs: Path
) -> None:
    payload(train=payloads.look_around)
    told = send(settings, "name=first")
    assert told["run"] == "first" and (runs / "digits_dit" / "first").is_dir()
    with pytest.raises(UserError) as raised:
        send(settings, "name=first", "seed=5", "guidance.groups=12")
    message = str(raised.value)
    for part in (
        "run first",
        "seed was 0 and is 5",
        "guidance.groups was 30 and is 12",
        "another name",
    ):
        assert part in message
    assert "learning_rate" not in message
    assert RunFolder(runs / "digits_dit" / "first").attempt_numbers() == [1]


def test_guidance_away_from_a_snapshot_that_the_run_will_not_have_is_refused_with_the_nearest(
    settings: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guided = [*settings, "train.images=2560", "sampler.g=2", "auxiliary.weight=0.5"]
    for word, one, other in (
        ("snapshot-641", "snapshot-640", "snapshot-1280"),
        ("snapshot-2500", "snapshot-1280", "snapshot-1920"),
        ("snapshot-640+snapshot-600", "snapshot-640+snapshot-1280", "snapshot-640+snapshot-1920"),
        ("head:0.2+snapshot-900:0.8", "head:0.2+snapshot-640:0.8", "head:0.2+snapshot-1280:0.8"),
    ):
        cure = f"sampler.weak={one} or sampler.weak={other}"
        for dry in ([], ["dry_run=true"]):
            with pytest.raises(UserError, match=f"{re.escape(cure)}$"):
                submit.main([*guided, f"sampler.weak={word}", *dry])
        with pytest.raises(
            UserError, match=f"sampler.weak={re.escape(word)}: .*{re.escape(cure)}$"
        ):
            submit.main(["-m", *guided, "seed=0,1", f"sampler.weak={word}"])
        for each in cure.split(" or "):
            assert submit.main([*guided, each, "dry_run=true"]) == 0
    # the last is no earlier one, though it is published
    with pytest.raises(
        UserError, match="snapshot at 1000 images, and no other one before that at 1280"
    ):
        send([*settings, "train.snapshot_every=1280", "sampler.g=2", "sampler.weak=snapshot-1000"])
    # nothing is guided
    assert submit.main([*settings, "sampler.g=1", "sampler.weak=snapshot-641", "dry_run=true"]) == 0
    assert not runs.exists() and "sampler.weak" not in capsys.readouterr().err


def test_data_that_disagrees_is_refused_before_anything_is_written(
    settings: list[str], runs: Path
) -> None:
    for wrong, parts in {
        "data.shape=[1,16,16]": ["data.shape=[1, 16, 16]", "[1,8,8]"],
        "data.classes=7": ["data.classes=7", "data.classes=10"],
        f"data.root={runs / 'none'}": ["tools.shards make"],
    }.items():
        with pytest.raises(UserError) as raised:
            send(settings, wrong)
        for part in parts:
            assert part in str(raised.value)
    assert not runs.exists()


def test_a_submission_that_fails_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, settings: list[str], runs: Path, tmp_path: Path
) -> None:
    """A cluster that takes the test and refuses the job: the attempt, and a run that is new, disappear again."""
    for name, script in {
        "sbatch": 'case "$1" in --test-only) exit 0;; esac; echo "sbatch: error: quota" >&2; exit 1',
        "srun": "exit 0",
        "squeue": "exit 0",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match="quota"):
        send(settings, "cluster=slurm", "cluster.gpus_per_node=2")
    assert list(runs.glob("*/*")) == []


def test_a_runs_folder_that_cannot_be_written_is_named(settings: list[str], runs: Path) -> None:
    runs.write_text("a file")
    with pytest.raises(UserError, match=r"runs=.*another runs=FOLDER"):
        send(settings)


def test_cancel_ends_all_and_the_run_can_go_on(
    payload: Callable[..., None], settings: list[str], runs: Path
) -> None:
    payload(train=payloads.nap)
    send(settings)
    run = only_run(runs)
    done = cancel.cancel(run)
    assert [each["what"] for each in done] == ["training"]
    assert decide.state(read(run)).word == "cancelled"
    assert cancel.cancel(run) == []
    assert send(settings)["attempt"] == 2
