"""A run whose disk is full while it trains: it goes on where it is asked to, or all ranks stop at once and say so."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from selfguide.distributed import RankInfo
from selfguide.spec.config import Config
from selfguide.spec.run import RunFolder, append_record
from selfguide.training import loop, roll_back, unstable
from selfguide.training.unstable import Unstable
from selfguide.training.work import Training
from shards import storage
from shards.errors import NoRoomError
from tests.selfguide.test_loop import BATCH
from tests.selfguide.test_roll_back import breaking, broken_once
from tests.selfguide.test_training import IMAGES, attempt, config
from tests.shards.disks import Disk, disk


def saving(root: Path, **train: Any) -> Config:
    made = config(root)
    settings: dict[str, Any] = {"log_every": BATCH, "keep_checkpoints": 1, "save_failed": "go_on"}
    return replace(made, train=replace(made.train, **(settings | train)))


class Heard(logging.Handler):
    """What a rank says."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def trained(
    rank_info: RankInfo, cfg: Config, small: Disk, full: int, free: int
) -> tuple[str | None, list[str]]:
    """One attempt, whose disk is full in the steps behind image `full`, up to that behind image `free`.

    Returns how it failed, and what was said.
    """
    advance, heard = loop.advance, Heard()

    def beside(job: Training) -> None:
        if rank_info.rank == 0 and job.state.images == full:
            small.fill()
        if rank_info.rank == 0 and job.state.images == free:
            (small.path / "filler").unlink()
        advance(job)

    with ExitStack() as stack:
        logging.getLogger("selfguide").addHandler(heard)
        stack.callback(logging.getLogger("selfguide").removeHandler, heard)
        stack.enter_context(patch.object(loop, "advance", beside))
        try:
            attempt(rank_info, cfg, str(small.path / "run"))
        except NoRoomError as error:
            return str(error), heard.said
    return None, heard.said


def test_a_disk_that_is_full_for_a_while_under_go_on_costs_what_was_due_meanwhile(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    with disk(tmp_path / "disk", 64 << 20) as small:
        cfg = saving(digits, snapshot_every=128, checkpoint_every=128)
        first, second = ranks(2, trained, cfg, small, BATCH, 4 * BATCH)
        assert first[0] is second[0] is None
        run = RunFolder(small.path / "run")
        assert run.published() == [6 * BATCH, IMAGES] and run.saved() == [IMAGES]
        assert storage.read_complete(run.snapshot(IMAGES), verify="hashes") is not None
        assert not run.snapshot(2 * BATCH).exists(), "what was written of it makes room"
        text = "\n".join(first[1])
        for images in (2 * BATCH, 4 * BATCH):
            assert text.count(f"no snapshot at {images} images: {small.path}") == 1
            assert text.count(f"no checkpoint at {images} images") == 1
        assert text.count("what the run says of itself is not written") == 1
        lines = [json.loads(line) for line in (run.metrics / "train-0001.jsonl").open()]
        seen = [line["images"] for line in lines]
        assert seen[0] == BATCH and seen[-4:] == [BATCH * step for step in (5, 6, 7, 8)]
        progress = json.loads((run.attempt(1) / "progress.json").read_text())
        assert (progress["section"], progress["images"]) == ("done", IMAGES)


def test_a_disk_that_is_full_at_the_end_under_go_on_leaves_no_run_that_counts_as_finished(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    with disk(tmp_path / "disk", 64 << 20) as small:
        cfg = saving(digits, snapshot_every=IMAGES, checkpoint_every=IMAGES)
        first, second = ranks(2, trained, cfg, small, 6 * BATCH, -1)
        assert first[0] == second[0] and f"img-{IMAGES:09d}" in first[0]
        run = RunFolder(small.path / "run")
        assert run.published() == [] and run.saved() == []


def test_a_disk_that_takes_no_metrics_under_stop_stops_all_ranks_alike(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    """Only rank 0 writes them, and the other would wait for it in the next step."""
    with disk(tmp_path / "disk", 64 << 20) as small:
        cfg = saving(digits, snapshot_every=IMAGES, checkpoint_every=IMAGES, save_failed="stop")
        first, second = ranks(2, trained, cfg, small, 2 * BATCH, -1)
        assert first[0] == second[0] and "No space left on device" in first[0]
        assert "make room there" in first[0]


def unkept(rank_info: RankInfo, cases: Sequence[tuple[Config, str]], small: Disk) -> list[str]:
    """Runs that their numbers break, one after the other, whose disk is full where rank 1 leaves what it read of that.

    Returns how each ended.
    """
    write, ends = unstable.write_record, []

    def full(path: Path, record: dict[str, Any], *, replace: bool) -> None:
        if rank_info.rank == 0:
            write(path, record, replace=replace)
        dist.barrier()
        if rank_info.rank == 1:
            small.fill()
            try:
                write(path, record, replace=replace)
            finally:
                (small.path / "filler").unlink()

    for cfg, name in cases:
        with patch.object(unstable, "write_record", full):
            try:
                broken_once(rank_info, cfg, str(small.path / name))
                ends.append("ended")
            except (Unstable, NoRoomError) as error:
                ends.append(f"{type(error).__name__}: {error}")
    return ends


def test_a_run_that_breaks_where_one_rank_has_no_room_to_say_so_ends_alike_on_all(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    """One that stops says why; one that is to go back does so without the record, or not, by train.save_failed."""
    policies = (("stop", "stop"), ("roll_back", "go_on"), ("roll_back", "stop"))
    cases = [
        (
            breaking(digits, unstable=does, save_failed=saves, keep_checkpoints=1),
            f"{does}-{saves}",
        )
        for does, saves in policies
    ]
    with disk(tmp_path / "disk", 160 << 20) as small:
        first, second = ranks(2, unkept, cases, small)
        stops, goes_on, refuses = first
        assert stops.startswith("Unstable: 2 steps in a row were skipped")
        assert "are not kept" in stops and "No space left on device" in stops
        assert "on rank 0 images at the ordinals" in stops, "and what broke it"
        assert goes_on == "ended"
        (record,) = roll_back.records(RunFolder(small.path / "roll_back-go_on"))
        assert "No space left on device" in record["reason"]
        assert refuses.startswith("NoRoomError") and "numeric-1.json" in refuses
        assert first == second
        for name in ("stop-stop", "roll_back-stop"):
            kept = RunFolder(small.path / name).attempt(1)
            assert (kept / "numeric-0.json").exists() and not (kept / "numeric-1.json").exists()


def test_a_line_that_finds_no_room_leaves_nothing_that_breaks_the_next(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", 1 << 20) as small:
        path = small.path / "lines.jsonl"
        append_record(path, {"line": 0})
        small.fill()
        # begins in the page that the file has, and ends in one that is not to be had
        with pytest.raises(NoRoomError, match=r"lines\.jsonl: .*No space left on device"):
            append_record(path, {"line": "long" * 2000})
        (small.path / "filler").unlink()
        append_record(path, {"line": 1})
        assert [json.loads(line)["line"] for line in path.open()] == [0, 1]
