"""Sweeps: which runs lists of values mean, and what a submission of them does, on one machine and on a Slurm."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from waiting import until

from launcher import cancel, folder, submission, submit, sweep
from launcher import runs as runs_command
from launcher.folder import Attempt
from launcher.reconcile import decide
from launcher.reconcile.view import read
from selfguide.spec.run import RunFolder
from shards.errors import UserError


def send(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    assert submit.main(["-m", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def state(row: dict) -> str:
    run = RunFolder(Path(row["folder"]))
    return decide.state(read(run)).word if run.run_json.exists() else "waiting"


@pytest.mark.parametrize(
    ("words", "swept"),
    [
        (["seed=0,1", "x=3"], [["seed=0"], ["seed=1"]]),
        (["seed=range(0,3)"], [["seed=0"], ["seed=1"], ["seed=2"]]),
        (["a=choice(x,y)", "seed=0,1"], [[a, s] for a in ("a=x", "a=y") for s in ("seed=0", "seed=1")]),
        (["guidance.interval=[0,1],[0.2,1]"], [["guidance.interval=[0,1]"], ["guidance.interval=[0.2,1]"]]),
        (["experiment=glob(digits_u*)"], [["experiment=digits_uncond"], ["experiment=digits_uvit"]]),
    ],
)  # fmt: skip
def test_combinations_of_lists_are_their_product(words: list[str], swept: list[list[str]]) -> None:
    assert [list(each) for _, each in sweep.combinations(words)] == swept


@pytest.mark.parametrize(
    "words",
    [["seed=0"], ["seed=interval(0,1)"], ["seed=[0"], ["runs=a,b"], ["cluster=local,slurm"]],
)
def test_combinations_of_what_is_no_list_are_refused(words: list[str]) -> None:
    with pytest.raises(UserError):
        sweep.combinations(words)


def test_sweep_of_one_run_twice_or_with_one_name_is_refused_before_anything_is_written(
    settings: list[str], runs: Path
) -> None:
    for words in (
        ["seed=1,1"],
        ["seed=0,1", "name=both"],
        ["seed=0,-1"],
        ["seed=0,1", "follow=true"],
    ):
        with pytest.raises(UserError):
            submit.main(["-m", *settings, *words])
    assert not runs.exists()


@pytest.mark.parametrize(
    ("swept", "beside", "why"),
    [
        ("cluster.timeout_min=60,90", [], True),
        ("train.log_every=128,256", ["train.warmup_images=0,64"], True),
        ("cluster.environment.A='x y','z'", [], True),
        ("evaluation=none,fd_digits", [], True),
        ("seed=1,1", ["train.warmup_images=0,64"], False),
        ("train.learning_rate=1e-3,0.001", [], False),
    ],
)
def test_sweep_of_one_run_twice_is_cured_as_printed(
    swept: str, beside: list[str], why: bool, settings: list[str]
) -> None:
    key = swept.partition("=")[0]
    plain = [text for text in settings if text.partition("=")[0] != key]
    with pytest.raises(UserError) as refused:
        sweep.plan([*plain, *beside, swept])
    message = str(refused.value)
    assert (f"{key} is no part of what a run is" in message) == why
    cure = re.split("give one value, |give each value once, ", message)[1]
    words = shlex.split(re.split(", and drop -m|, or submit", cure)[0])
    assert [word.partition("=")[0] for word in words] == [
        *(["train.warmup_images"] if beside else []),
        key,
    ]
    assert ("drop -m" in message) == (not beside)
    if beside:
        assert len(sweep.plan([*plain, *words])) == 2
    else:
        assert len(sweep.combinations([*plain, *words], several=False)) == 1
    if why:
        (named,) = re.findall("its own, (.*) name=NAME", message)
        names = [
            submission.meant(submission.resolve([*plain, *shlex.split(named), f"name={name}"])).run
            for name in "ab"
        ]
        assert names[0] != names[1]


def test_dry_sweep_tells_the_ids_that_the_submission_gives(
    settings: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*settings, "seed=0,1"]
    told = send([*words, "dry_run=true"], capsys)
    assert [row["action"] for row in told["runs"]] == ["new", "new"] and not runs.exists()
    done = send(words, capsys)
    assert done["sweep"] == told["sweep"]
    assert [row["run"] for row in done["runs"]] == [row["run"] for row in told["runs"]]


def test_local_sweep_runs_one_after_another_and_again_only_what_failed(
    settings: list[str], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # hours of training, whatever the machine: the test ends both. The sweep's process starts them, so no payload can
    # stand in for the trainer
    short = ("train.images=", "train.snapshot_every=")
    long = [text for text in settings if not text.startswith(short)]
    words = [*long, "train.images=12_800_000", "train.snapshot_every=12_800_000", "seed=0,1"]
    first, second = send(words, capsys)["runs"]
    assert {first["state"], second["state"]} == {"waiting"}
    until(lambda: state(first) == "running")
    # joined, and not queued twice
    again = send(words, capsys)
    assert [row["state"] for row in again["runs"]] == ["running", "waiting"]
    assert again["runner"] is not None and state(second) == "waiting"
    cancel.cancel(RunFolder(Path(first["folder"])))
    until(lambda: state(second) == "running")
    assert runs_command.main([again["sweep"], "--runs", str(runs), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["state"] for row in rows} == {"cancelled", "running"}
    assert {row["sweep"] for row in rows} == {again["sweep"]}
    # the one that was ended begins again, behind the one that works
    assert [row["state"] for row in send(words, capsys)["runs"]] == ["waiting", "running"]
    assert cancel.main([again["sweep"], "--runs", str(runs), "--json"]) == 0
    what = [each["what"] for each in json.loads(capsys.readouterr().out)["cancelled"]]
    assert what == ["queue of this machine", "training"]
    assert state(second) == "cancelled"
    assert [len(RunFolder(Path(r["folder"])).attempt_numbers()) for r in (first, second)] == [1, 1]


def test_slurm_sweep_asks_once_and_queues_every_run_with_jobs_of_its_own(
    settings: list[str],
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = fake_slurm(tmp_path, monkeypatch)
    words = [*settings, "cluster=slurm", "seed=0,1,2"]
    rows = send(words, capsys)["runs"]
    assert {row["state"] for row in rows} == {"submitted"}
    asked = calls.read_text().splitlines()
    assert sum("--test-only" in line for line in asked) == 1
    jobs = {
        path.read_text()
        for row in rows
        for path in (Attempt(Path(row["folder"]) / "attempts/0001").job,)
    }
    assert len(jobs) == len(rows) == len(folder.runs(runs)) == 3


def test_slurm_sweep_of_which_one_is_refused_queues_none(
    settings: list[str], runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_slurm(tmp_path, monkeypatch, takes=1)
    with pytest.raises(UserError):
        # of another size, and so with jobs of another kind
        submit.main(["-m", *settings, "cluster=slurm", "model.depth=4,6"])
    assert not folder.runs(runs)
    assert ["--test-only" in line for line in calls.read_text().splitlines()] == [True, True]


def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, takes: int = 99) -> Path:
    """Clients of a Slurm that would take only so many kinds of jobs; returns the log of sbatch."""
    bin, calls, count = tmp_path / "bin", tmp_path / "calls", tmp_path / "count"
    bin.mkdir()
    sbatch = f"""#!/bin/sh
echo "$@" >> {calls}
case "$*" in
  *--test-only*) [ $(wc -l < {calls}) -le {takes} ]; exit ;;
esac
echo x >> {count}
echo "Submitted batch job $(wc -l < {count})"
"""
    for name, text in {"sbatch": sbatch, "squeue": "#!/bin/sh\n", "scancel": "#!/bin/sh\n"}.items():
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:/usr/bin:/bin")
    return calls
