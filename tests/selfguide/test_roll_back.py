"""`train.unstable=roll_back`: back to a checkpoint from before the break, on with other images, a few times."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.distributed import distributed_c10d

from selfguide.distributed import RankInfo
from selfguide.spec import tuning
from selfguide.spec.config import Config
from selfguide.spec.lines import ascending
from selfguide.spec.run import Lease, RunFolder
from selfguide.training import checkpoint, loop, roll_back, work
from selfguide.training.loop import advance
from selfguide.training.unstable import RollBackError, Unstable, judge
from selfguide.training.work import Training
from shards import storage
from tests.selfguide.test_loop import BATCH, Given, begun, masters
from tests.selfguide.test_training import IMAGES, attempt, config, weights


class Stream(Given):
    """Images by their position, of which some are not finite; it remembers what it gave."""

    def __init__(self, position: int, broken: set[int]) -> None:
        super().__init__(self._batches(position, broken))
        self.given: list[int] = []

    def _batches(self, position: int, broken: set[int]) -> Iterator[dict[str, np.ndarray]]:
        while True:
            ordinal = np.arange(position, position + BATCH)
            x = np.random.default_rng(position).uniform(0, 16, (BATCH, 1, 8, 8)).astype(np.float32)
            if position in broken:
                x[3, 0, 4, 4] = np.nan
            self.given.append(position)
            yield {"x": x, "ordinal": ordinal, "position": ordinal}
            position += BATCH

    def close(self) -> None:
        pass


class Run:
    """A run that reports after every step and saves after every second one, as the loop would."""

    def __init__(self, root: Path, broken: set[int], **train: Any) -> None:
        self.job = begun(root / "run", 0)
        self.job.lease.run.attempt(1).mkdir(parents=True, exist_ok=True)
        settings: dict[str, Any] = {"unstable": "roll_back", "skips": 2, "keep_checkpoints": 1}
        self.broken = broken
        self.streams: list[Stream] = []
        job = self.job
        job.config = replace(job.config, train=replace(job.config.train, **(settings | train)))
        job.state.stability.limits = job.config.train
        job.stream = self.open()

    def open(self) -> Any:
        self.streams.append(Stream(self.job.state.images + self.job.state.passed, self.broken))
        return self.streams[-1]

    def train(self, job: Training) -> None:
        """What `loop.train` does of it."""
        while job.state.images < job.config.train.images:
            advance(job)
            judge(job, job.telemetry.report(job.state.images).get("loss"))
            if job.state.images % (2 * BATCH) == 0:
                loop.save_checkpoint(job, _Epochs(), wait=True)  # type: ignore[arg-type]


class _Epochs:
    def carried(self) -> None:
        return None


def test_a_run_goes_back_passes_over_what_broke_it_and_ends(
    single: RankInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, {6 * BATCH, 7 * BATCH})
    monkeypatch.setattr(loop, "train", run.train)
    roll_back.train(run.job, run.open)
    folder, state = run.job.lease.run, run.job.state
    assert state.images == 1024 and masters(run.job).isfinite().all()
    (record,) = roll_back.records(folder)
    assert (record["from"], record["to"], record["passed"]) == (8 * BATCH, 6 * BATCH, 2 * BATCH)
    # the positions that broke it are those of no other step
    assert run.streams[0].given == [BATCH * step for step in range(8)]
    assert run.streams[1].given[:3] == [BATCH * step for step in (8, 9, 10)]
    assert storage.read_complete(folder.checkpoint(1024)) is not None


def test_a_run_that_went_back_is_resumed_behind_what_it_passed_over(
    single: RankInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, {6 * BATCH, 7 * BATCH})
    job, folder = run.job, run.job.lease.run
    with pytest.raises(RollBackError) as error:
        run.train(job)
    # an attempt that dies right behind it has lost the newer checkpoints, and its own memory
    roll_back.go_back(job, error.value, run.open)
    assert folder.saved() == [6 * BATCH] and job.state.images == 6 * BATCH
    assert roll_back.passed(folder, 6 * BATCH) == (2 * BATCH, True)
    assert roll_back.passed(folder, 8 * BATCH) == (2 * BATCH, False)
    # where the checkpoint that it went back to is lost, it goes on behind the break all the same
    assert roll_back.passed(folder, 4 * BATCH) == (4 * BATCH, True)
    again = Run(tmp_path, set())
    checkpoint.load(folder.checkpoint(6 * BATCH), again.job.state, single)
    again.job.state.passed, _ = roll_back.passed(folder, 6 * BATCH)
    again.job.stream = again.open()
    for one in (job, again.job):
        advance(one)
    assert torch.equal(masters(job), masters(again.job))


def test_a_run_that_breaks_again_and_again_stops_after_its_last_time(
    single: RankInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, {BATCH * step for step in range(4, 40)}, roll_backs=2)
    monkeypatch.setattr(loop, "train", run.train)
    with pytest.raises(Unstable, match=r"went back 2 times") as error:
        roll_back.train(run.job, run.open)
    assert not isinstance(error.value, RollBackError)
    assert [each["to"] for each in roll_back.records(run.job.lease.run)] == [4 * BATCH] * 2
    assert run.job.lease.run.saved() == [4 * BATCH], "and its checkpoint stays"


def test_a_run_whose_weights_broke_goes_back_to_before_they_did(
    single: RankInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reports and checkpoints that lie between the break and the verdict are none from before."""
    run = Run(tmp_path, set(), skips=5, skipped_share=None, keep_checkpoints=2)
    train = run.train

    def breaks(job: Training) -> None:
        step = job.state.engine.step

        def spoiled(learning_rate: float) -> Any:
            done = step(learning_rate)
            if job.state.images == 4 * BATCH and len(run.streams) == 1:
                job.state.engine.masters[0].fill_(torch.nan)
                job.state.engine.refresh()
            return done

        monkeypatch.setattr(job.state.engine, "step", spoiled)
        train(job)

    monkeypatch.setattr(loop, "train", breaks)
    roll_back.train(run.job, run.open)
    (record,) = roll_back.records(run.job.lease.run)
    # the step from 4 to 5 broke them, and the five behind it were skipped
    assert (record["from"], record["to"]) == (10 * BATCH, 4 * BATCH)
    assert masters(run.job).isfinite().all()


def test_a_run_that_breaks_before_its_first_checkpoint_stops(
    single: RankInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, {0, BATCH})
    monkeypatch.setattr(loop, "train", run.train)
    with pytest.raises(Unstable, match="no checkpoint from before"):
        roll_back.train(run.job, run.open)


def test_what_was_published_after_the_break_is_set_aside(single: RankInfo, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    lease = Lease(folder, folder.open_attempt())
    for place in (folder.checkpoint, folder.snapshot):
        for images in (128, 256):
            storage.publish(place(images) / "part", b"weights")
            lease.publish(place(images), extra={})
    for images in (128, 256):
        storage.publish(folder.preview(images), b"picture")
    roll_back._forget(lease, 128, [{"to": 128}])
    assert folder.saved() == folder.published() == folder.previewed() == [128]
    assert (folder.snapshots / "damaged" / "img-000000256.0001" / "part").read_bytes() == b"weights"


# steps of the real loop whose images are not finite: the run breaks at the second, and goes back to before the first
BROKEN = (4 * BATCH, 5 * BATCH)


def breaking(root: Path, **train: Any) -> Config:
    """Of a run on the digits that is to go back once."""
    made = config(root)
    settings: dict[str, Any] = {"unstable": "roll_back", "skips": 2, "log_every": BATCH}
    return replace(made, train=replace(made.train, **(settings | train)))


def broken_once(
    rank_info: RankInfo, cfg: Config, root: str, broken: tuple[int, ...] = BROKEN
) -> list[int]:
    """One attempt by the real loop; returns the first position of each micro-batch that this rank took."""
    given: list[int] = []
    place = work.crop_and_flip

    def spoiled(x0: torch.Tensor, made: Config, header: Any, position: torch.Tensor) -> Any:
        given.append(int(position[0]))
        if given[-1] // BATCH * BATCH in broken:
            x0 = torch.full_like(x0, torch.nan)
        return place(x0, made, header, position)

    with patch.object(work, "crop_and_flip", spoiled):
        attempt(rank_info, cfg, root)
    return given


def test_a_run_that_goes_back_applies_no_request_a_second_time(
    single: RankInfo, digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFolder(tmp_path / "run")
    tuning.ask(run, 1, {"trace": 1000, "save": True, "log_every": BATCH})
    with caplog.at_level(logging.INFO):
        broken_once(single, breaking(digits, log_every=6 * BATCH), str(run.root))
    (record,) = roll_back.records(run)
    assert (record["from"], record["to"]) == (6 * BATCH, 4 * BATCH)
    assert caplog.text.count("request 1 at") == 1
    (asked,) = tuning.requests(run)
    assert asked["applied"]["images"] < 4 * BATCH
    # the trace ended where the run broke, and none followed it
    traces = [path.name for path in (run.root / "traces").iterdir()]
    assert traces == [f"img-{6 * BATCH:012d}-rank-0.json.gz"]
    lines = [json.loads(line) for line in (run.metrics / "train-0001.jsonl").open()]
    after = [line["images"] for line in lines][-4:]
    assert after == [BATCH * step for step in (5, 6, 7, 8)], "the cadence that was asked for"
    assert all(line["data_wait"] >= 0 for line in lines), "counted by each stream from 0"
    # TensorBoard, which the run names, has no line of before the break either
    read = EventAccumulator(str(run.metrics / "tensorboard"))
    read.Reload()
    steps = [each.step for each in read.Scalars("data_wait")]
    assert steps == [line["images"] for line in ascending(lines)]


def test_two_ranks_that_break_go_back_together_and_end(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    first, second = ranks(2, broken_once, breaking(digits), str(run.root))
    (record,) = roll_back.records(run)
    assert (record["from"], record["to"], record["passed"]) == (6 * BATCH, 4 * BATCH, 2 * BATCH)
    # the evidence of the break is prepared once more
    taken = [step * BATCH for step in (0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9)]
    assert first == taken
    assert second == [each + BATCH // 2 for each in taken]
    assert run.saved()[-1] == run.published()[-1] == IMAGES
    assert all(weight.isfinite().all() for weight in weights(run.root).values())


def counted(rank_info: RankInfo, cfg: Config, root: str, broken: tuple[int, ...]) -> list[int]:
    """The process groups that this rank is in at each step of an attempt."""
    groups: list[int] = []
    step = loop.advance

    def noted(job: Training) -> None:
        groups.append(len(distributed_c10d._world.pg_map))
        step(job)

    with patch.object(loop, "advance", noted):
        broken_once(rank_info, cfg, root, broken)
    return groups


def test_a_run_that_goes_back_again_and_again_makes_no_group_anew(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    broken = (*BROKEN, 6 * BATCH, 7 * BATCH)
    first, second = ranks(2, counted, breaking(digits), str(run.root), broken)
    assert [each["to"] for each in roll_back.records(run)] == [4 * BATCH] * 2
    assert first == second and {*first} == {first[0]}, "as many in the last step as in the first"
    assert len(first) == 12
