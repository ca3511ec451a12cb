"""Runs with `min_nodes`: when they look for nodes, what they then ask Slurm for, and what the laws refuse."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import describe, submit
from launcher.compose import compose
from launcher.folder import Attempt
from launcher.reconcile import decide, launch
from launcher.reconcile.view import RunView, read
from selfguide.spec.accumulation import Cut, cut_batch, node_counts
from selfguide.spec.identity import identity
from selfguide.spec.run import RunFolder, read_record, write_record
from selfguide.spec.validate import validate
from shards.errors import UserError

WORDS = ["experiment=digits_dit", "cluster=slurm", "cluster.gpus_per_node=1", "nodes=4"]


def config(*words: str) -> Any:
    made = compose([*WORDS, *words])
    validate(made)
    return made


# ---- laws


def test_fewer_nodes_take_more_micro_batches_of_the_same_size() -> None:
    found = config("min_nodes=1")
    assert node_counts(found) == (1, 2, 4)
    assert [cut_batch(found, nodes) for nodes in (4, 2, 1)] == [
        Cut(32, 1, 1),
        Cut(32, 2, 2),
        Cut(32, 4, 4),
    ]
    # what shares statistics is no more than it is on all nodes
    pieces = config("min_nodes=1", "train.micro_batch=8")
    assert [cut_batch(pieces, nodes) for nodes in (4, 2, 1)] == [
        Cut(8, 4, 1),
        Cut(8, 8, 2),
        Cut(8, 16, 4),
    ]
    assert cut_batch(config("min_nodes=2", "guidance=none"), 2) == Cut(32, 2, 1)


def test_micro_batches_may_be_a_little_smaller_where_that_divides() -> None:
    words = (
        "nodes=4",
        "train.batch=96",
        "train.images=9600",
        "train.warmup_images=0",
        "evaluation=none",
    )
    cadence = [f"train.{name}_every=960" for name in ("log", "snapshot", "checkpoint")]
    found = config(*words, *cadence, "min_nodes=3", "guidance=none")
    assert node_counts(found) == (3, 4)
    assert [cut_batch(found, nodes) for nodes in (4, 3)] == [Cut(24, 1, 1), Cut(16, 2, 1)]


def test_without_min_nodes_a_batch_is_cut_as_ever() -> None:
    found = config()
    assert not found.elastic and node_counts(found) == (4,)
    assert [cut_batch(found, world) for world in (1, 2, 4)] == [
        Cut(128, 1, 1),
        Cut(64, 1, 1),
        Cut(32, 1, 1),
    ]


@pytest.mark.parametrize(
    ("words", "field", "cure"),
    [
        (["min_nodes=5"], "min_nodes=5", "4 or less"),
        (["min_nodes=0"], "min_nodes=0", "1 or more"),
        (["min_nodes=3"], "min_nodes=3", "1 or 2 or 4"),
        (["min_nodes=2", "guidance.queue=64"], "guidance.queue=64", "guidance.queue=0"),
        (["min_nodes=2", "cluster.restart=requeue"], "cluster.restart=requeue", "=successor"),
        (["min_nodes=2", "cluster.restart=none"], "cluster.restart=none", "=successor"),
    ],
)
def test_what_cannot_be_on_fewer_nodes_is_refused_with_the_cure(
    words: list[str], field: str, cure: str
) -> None:
    with pytest.raises(UserError) as raised:
        config(*words)
    assert field in str(raised.value) and cure in str(raised.value)


def test_min_nodes_is_no_part_of_a_runs_identity() -> None:
    assert identity(config("min_nodes=2"), "data") == identity(config(), "data")


def test_a_dry_run_says_what_fewer_nodes_would_do() -> None:
    told = describe.facts(config("min_nodes=1"))
    assert told["fewer_nodes"] == {
        1: {"micro_batch": 32, "accumulation": 4, "together": 4},
        2: {"micro_batch": 32, "accumulation": 2, "together": 2},
    }
    assert describe.facts(config())["fewer_nodes"] == {}


# ---- when, and what for


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], Path]:
    """slurm(free, queue): a Slurm with so many free nodes and this answer of squeue; its folder, with `calls`."""
    bin = tmp_path / "bin"
    bin.mkdir()
    calls = tmp_path / "calls"

    def make(free: int, queue: str = "") -> Path:
        # n1, n2, ... have room; one is full, one drained, and one another partition's
        rows = [
            f"n{i}|mix|1/63/0/64|512000|1000|gpu:h100:8|gpu:h100:0(IDX:N/A)|p*"
            for i in range(1, free + 1)
        ]
        rows += ["x1|mix|8/56/0/64|512000|1000|gpu:h100:8|gpu:h100:8(IDX:0-7)|p*"]
        rows += ["x2|drain|0/0/64/64|512000|0|gpu:h100:8|gpu:0|p*"]
        rows += ["x3|idle|0/64/0/64|512000|0|gpu:h100:8|gpu:0|q"]
        told = "".join(f"{row}|\\n" for row in rows)
        programs = {
            "sbatch": f"""case "$1" in --test-only) exit 0;; esac
echo "batch $(sed -n 's/^#SBATCH --nodes=//p' "$1") $(sed -n 's/^#SBATCH --job-name=//p' "$1")" >> {calls}
echo "Submitted batch job $(grep -c '^batch' {calls})" """,
            "sinfo": f"printf '{told}'",
            "srun": "exit 0",
            "squeue": f"printf '{queue}'",
            "scancel": f'echo "scancel $*" >> {calls}',
        }
        for name, text in programs.items():
            (bin / name).write_text(f"#!/bin/sh\n{text}\n")
            (bin / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
        return calls

    return make


@pytest.fixture
def run(slurm: Callable[..., Path], settings: list[str]) -> RunFolder:
    """Submitted to four nodes; the first is of training, the second its watcher, the third its successor."""
    calls = slurm(4)
    words = [*settings, *WORDS[1:], "min_nodes=2", "evaluation=none"]
    folder = RunFolder(Path(submit.submit(submit.resolve(words))["folder"]))
    batches = [line.split()[1] for line in calls.read_text().splitlines() if line[:5] == "batch"]
    # a watcher even without scores: somebody has to find nodes
    assert batches == ["4", "1", "4"]
    calls.unlink()
    return folder


def preempted(run: RunFolder) -> None:
    for rank in range(4):
        write_record(run.attempt(1) / f"start-{rank}.json", {})
        record = {"code": 75, "class": "preempted", "message": "ended by SIGUSR2"}
        write_record(run.attempt(1) / f"exit-{rank}.json", record)


def later(view: RunView, seconds: float) -> RunView:
    return replace(view, time=view.time + seconds)


def waits(run: RunFolder, id: str = "3") -> str:
    return f"{id}|PENDING|x|{run.root}\\n"


def test_a_job_that_finds_no_nodes_is_replaced_by_one_for_those_that_are_free(
    slurm: Callable[..., Path], run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    preempted(run)
    calls = slurm(3, waits(run))
    view = read(run)
    assert decide.resize(view) is None, "it has only begun to wait"
    assert decide.resize(later(view, 61)) == "fewer"
    monkeypatch.setattr("launcher.reconcile.reader.time.time", lambda: view.time + 61)
    monkeypatch.setattr("launcher.backends.slurm.wait_until", lambda *_, **__: None)
    launch.look_for_nodes(later(view, 61))
    said = calls.read_text().splitlines()
    assert said[0] == "scancel 3" and said[1].startswith("batch 2 ") and len(said) == 2
    successor = read_record(Attempt(run.attempt(1)).successor)
    assert successor is not None and successor["nodes"] == 2
    # it is given as long again
    monkeypatch.undo()


def test_a_job_that_started_meanwhile_is_left_alone(
    slurm: Callable[..., Path], run: RunFolder
) -> None:
    preempted(run)
    slurm(2, waits(run))
    old = later(read(run), 61)
    calls = slurm(2, waits(run).replace("PENDING", "RUNNING"))
    launch.look_for_nodes(old)
    assert not calls.exists()


def on_two(run: RunFolder, slurm: Callable[..., Path], free: int) -> Path:
    """Attempt 2 trains on two nodes, with a successor behind it."""
    preempted(run)
    slurm(2)
    at, _ = launch.take_over(run, "3", run.attempt(1) / "successor", hosts=("n1", "n2"))
    assert at is not None
    record, waiting = read_record(at.submission), read_record(at.successor)
    assert record is not None and waiting is not None
    assert (record["nodes"], record["full_nodes"], record["world"]) == (2, 4, 2)
    assert waiting["nodes"] == 4, "what follows asks for all of them again"
    for rank, node in enumerate(("n1", "n2")):
        write_record(at.root / f"start-{rank}.json", {"node": node})
    write_record(at.root / "progress.json", {"section": "train", "images": 128})
    queue = f"3|RUNNING|x|{run.root}\\n" + waits(run, waiting["id"])
    return slurm(free, queue)


def test_a_job_with_another_number_of_nodes_opens_no_attempt(
    slurm: Callable[..., Path], run: RunFolder
) -> None:
    preempted(run)
    slurm(3)
    at, reason = launch.take_over(run, "3", run.attempt(1) / "successor", hosts=("n1", "n2", "n3"))
    assert at is None and "3 nodes" in reason


# beside the two that it has
@pytest.mark.parametrize("free", [4, 3])
def test_an_attempt_on_fewer_nodes_makes_way_when_the_others_are_free(
    slurm: Callable[..., Path], run: RunFolder, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    calls = on_two(run, slurm, free)
    calls.unlink(missing_ok=True)
    view = read(run)
    assert decide.summary(view).nodes == "2 of 4"
    assert decide.resize(later(view, 1700)) is None, "no more than once in half an hour"
    assert decide.resize(later(view, 1810)) == "more"
    monkeypatch.setattr("launcher.reconcile.reader.time.time", lambda: view.time + 1810)
    launch.look_for_nodes(later(view, 1810))
    ended = calls.read_text().splitlines() if calls.exists() else []
    assert ended == (["scancel --signal=USR2 3"] if free == 4 else [])


def test_the_watcher_opens_an_attempt_on_the_nodes_that_are_free(
    slurm: Callable[..., Path], run: RunFolder
) -> None:
    preempted(run)
    calls = slurm(2)
    opened = launch.go_on(run)
    assert opened is not None
    record = read_record(opened.submission)
    assert record is not None and (record["nodes"], record["world"]) == (2, 2)
    assert [line.split()[1] for line in calls.read_text().splitlines() if line[:5] == "batch"] == [
        "2",
        "4",
    ]
