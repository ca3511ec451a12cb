"""Rows of four papers train: every one two steps at toy size, thirteen of different families ten steps."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from launcher.compose import compose
from launcher.submission import meant
from selfguide.distributed import RankInfo
from selfguide.spec.published import ROWS, Row
from selfguide.spec.run import Lease, write_record
from selfguide.spec.validate import validate
from selfguide.training.job import work
from selfguide.training.telemetry import Telemetry
from tests.tools.test_reproduce import FAMILIES, RUNS
from tools.reproduce.shrink import BATCH, Toy

# losses by what was typed: rows that differ only in what the toy replaces are one run
TRAINED: dict[tuple[str, ...], list[float]] = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("toy")
    Toy(made, BATCH).prepare()
    return made


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A world of this process."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(row: Row, steps: int, folder: Path, runs: Path) -> list[float]:
    """The losses of the row at toy size, one a step."""
    words = Toy(folder, steps * BATCH).settings(row)
    config = compose([*words, f"runs={runs}"])
    validate(config)
    found = meant(config)
    write_record(found.run.run_json, {"images": config.train.images, "identity": found.identity})
    lease, rank_info = Lease(found.run, found.run.open_attempt()), RankInfo(0, 0, 1)
    telemetry = Telemetry(found.run, lease.number, rank_info, config.train.images)
    work(found.config, rank_info, lease, telemetry)
    assert list(found.run.snapshots.glob("*/MANIFEST.json"))
    lines = (found.run.root / "metrics").glob("train-*.jsonl")
    rows = [json.loads(line) for path in lines for line in path.read_text().splitlines()]
    return [each["loss"] for each in rows if "loss" in each]


@pytest.mark.slow
@pytest.mark.parametrize("row", RUNS, ids=[row.key for row in RUNS])
def test_every_row_trains_two_steps(row: Row, folder: Path, tmp_path: Path) -> None:
    words = tuple(Toy(folder, 2 * BATCH).settings(row))
    if words not in TRAINED:
        TRAINED[words] = trained(row, 2, folder, tmp_path)
    assert TRAINED[words] and all(map(math.isfinite, TRAINED[words]))


@pytest.mark.slow
@pytest.mark.parametrize("key", FAMILIES)
def test_a_row_of_each_family_trains_ten_steps(key: str, folder: Path, tmp_path: Path) -> None:
    (row,) = (row for row in ROWS if row.key == key)
    losses = trained(row, 10, folder, tmp_path)
    assert len(losses) >= 9 and all(map(math.isfinite, losses))
    assert min(losses[5:]) < losses[0]


@pytest.mark.slow
def test_a_table_that_is_interrupted_goes_on_with_the_row_that_it_was_at(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tools.reproduce", "sgdm", "figure4", "--shrink", "digits"]
    words += ["--images", "256", "--toy", str(tmp_path / "toy"), "--runs", str(tmp_path / "runs")]
    first = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert first.stderr is not None
    second_row = next(line for line in first.stderr if line.startswith("row 2 of 2"))
    assert " left" in second_row
    # as Ctrl-C does, to the command and to what it called
    os.killpg(first.pid, signal.SIGINT)
    assert first.wait() == 130

    drawn = tmp_path / "figure.png"
    again = subprocess.run(
        [*words, "--json", "--figure", str(drawn)], capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "1 of 2 rows have their score already\nrow 2 of 2: " in again.stderr
    assert drawn.exists() and json.loads(again.stdout)["waiting"] == []
    attempts = sorted(each.parent.parent.name for each in tmp_path.glob("runs/*/*/attempts/*"))
    assert len(set(attempts)) == len(attempts) == 2

    # all is done: nothing is submitted
    third = subprocess.run(words, capture_output=True, text=True)
    assert "2 of 2 rows have their score already" in third.stderr and "row 2" not in third.stderr
    assert third.returncode == 0
