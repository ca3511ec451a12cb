"""Checkpoints in a store beside the run's folder: what is copied there, what stays, and what an attempt gets back.

Stores here are folders, which `shards.storage` treats as it treats S3; tests/s3 does the same with a real one.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfguide.distributed import RankInfo
from selfguide.spec.config import Config, TrainConfig
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.retention import pin
from selfguide.spec.run import Lease, RunFolder, image_folder, read_record, write_record
from selfguide.training import resume, retention, roll_back, store
from selfguide.training.mirror import Mirror
from shards import storage
from shards.errors import FencedError, UserError
from tests.selfguide.test_stop import WHO, ask, asked_after, ended, never_late, rarely_saved
from tests.selfguide.test_training import IMAGES, assert_same, attempt, weights
from tests.shards.data import flip

ONE = RankInfo(0, 0, 1)


def new_run(root: Path, name: str = "a1b2") -> Lease:
    """A run and its first attempt."""
    run = RunFolder(root / name)
    write_record(run.run_json, {"id": name, "hash": "a1b2", "experiment": "digits"})
    return Lease(run, run.open_attempt())


def save(lease: Lease, images: int) -> None:
    """A checkpoint in the run's folder: two files that no other holds."""
    folder = lease.run.checkpoint(images)
    parts = [
        storage.write_part(folder, name, [name.encode() * images], lease.fence(folder))
        for name in ("rank-00000.safetensors", "replicated.safetensors")
    ]
    extra = {
        "images": images, "attempt": lease.number, "engine": "torch", "steps": images // 32, "total": 4,
        "averages": ["500"], "ema_since": 0, "ranges": [[[0, 4]]],
    }  # fmt: skip
    lease.publish(folder, extra=extra, parts=parts)


def copied(lease: Lease, place: str, images: int, **keep: int | None) -> None:
    save(lease, images)
    store.put(str(lease.run.root), lease.number, place, images, {"keep": 2, **keep})


def held(place: str) -> list[int]:
    """Images of what is whole in a store."""
    whole = [
        images
        for images, name in retention.numbered(place)
        if storage.read_complete(storage.join(place, name), "hashes")
    ]
    assert len(whole) == len(retention.numbered(place)), "what is there is whole"
    return whole


def bytes_of(folder: str | Path) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(folder, name)) for name in storage.files(folder)}


@pytest.fixture
def lease(tmp_path: Path) -> Lease:
    return new_run(tmp_path / "runs")


@pytest.fixture
def place(tmp_path: Path, lease: Lease) -> str:
    return store.place_of(str(tmp_path / "store"), lease.run)


def test_what_is_copied_is_what_was_published_and_comes_back_to_the_byte(
    lease: Lease, place: str, tmp_path: Path, single: RankInfo
) -> None:
    copied(lease, place, 64)
    folder = lease.run.checkpoint(64)
    written = bytes_of(folder)
    assert bytes_of(storage.join(place, folder.name)) == written
    shutil.rmtree(lease.run.root)
    again = new_run(tmp_path / "runs")
    train = TrainConfig(images=128, batch=32, checkpoint_store=str(tmp_path / "store"))
    assert resume.find(again, single, "newest").folder is None
    assert resume.find_or_fetch(again, single, train) == resume.Resume(folder)
    assert bytes_of(folder) == written


def test_a_checkpoint_of_a_longer_training_is_refused_with_the_command_that_goes_on(
    lease: Lease, place: str, tmp_path: Path, single: RankInfo
) -> None:
    """A run that was extended, lost its folder, and was submitted again as it was at first."""
    copied(lease, place, 256)
    shutil.rmtree(lease.run.root)
    again = new_run(tmp_path / "runs")
    train = TrainConfig(images=128, batch=32, checkpoint_store=str(tmp_path / "store"))
    with pytest.raises(UserError, match=f"{again.run.root} train.images=256"):
        resume.find_or_fetch(again, single, train)
    assert not again.run.checkpoint_folders()
    longer = replace(train, images=256)
    assert resume.find_or_fetch(again, single, longer).folder == again.run.checkpoint(256)


def test_a_run_that_has_a_checkpoint_of_its_own_asks_no_store(
    lease: Lease, single: RankInfo
) -> None:
    save(lease, 32)
    train = TrainConfig(images=128, batch=32, checkpoint_store="s3://no bucket")
    assert resume.find_or_fetch(lease, single, train).folder == lease.run.checkpoint(32)


def test_what_is_damaged_in_the_store_is_passed_over_and_nothing_of_it_stays(
    lease: Lease, place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for images in (32, 64, 96):
        copied(lease, place, images, keep=3)
    flip(Path(place) / image_folder(96) / "replicated.safetensors", 100)
    (Path(place) / image_folder(64) / "rank-00000.safetensors").unlink()
    shutil.rmtree(lease.run.root)
    again = new_run(tmp_path / "runs")
    assert store.fetch(again, place, 128) == 32
    assert again.run.saved() == again.run.checkpoint_folders() == [32]
    assert "replicated.safetensors has other bytes" in caplog.text and "is missing" in caplog.text


def test_retention_deletes_from_the_store_what_no_pin_and_no_rule_keeps(
    lease: Lease, place: str
) -> None:
    for images in range(32, 321, 32):
        copied(lease, place, images, every=160)
        if images == 64:
            pin(lease.run.checkpoints, image_folder(64))
    assert held(place) == [64, 160, 288, 320]


def test_what_the_run_went_back_behind_leaves_the_store(
    lease: Lease, place: str, tmp_path: Path
) -> None:
    for images in (32, 64, 96):
        copied(lease, place, images, keep=3)
    record = {"from": 100, "to": 32, "passed": 68, "reason": "it broke"}
    roll_back._forget(lease, 32, [record])
    store.put(str(lease.run.root), lease.number, place, 32, {"keep": 3})
    assert held(place) == [32]
    shutil.rmtree(lease.run.root)
    again = new_run(tmp_path / "runs")
    assert store.fetch(again, place, 128) == 32
    assert roll_back.records(again.run) == [record] and roll_back.passed(again.run, 32) == (
        68,
        True,
    )


def test_a_newer_copy_outlives_the_loss_of_its_original(lease: Lease, place: str) -> None:
    """The attempt goes on from the checkpoint before, and comes by again: the last copy is of then."""
    for images in (32, 64):
        copied(lease, place, images)
    shutil.rmtree(lease.run.checkpoint(64))
    store.put(str(lease.run.root), lease.number, place, 32, {"keep": 2})
    assert held(place) == [32, 64]
    copied(lease, place, 64)
    assert held(place) == [32, 64]


def test_what_a_kill_left_in_the_store_is_none_and_is_deleted(lease: Lease, place: str) -> None:
    copied(lease, place, 32)
    storage.publish(storage.join(place, image_folder(48), "rank-00000.safetensors"), b"half")
    assert store.fetch(new_run(Path(lease.run.root).parent, "c3d4"), place, 128) == 32
    copied(lease, place, 64)
    assert held(place) == [32, 64]


def test_an_attempt_that_was_overtaken_copies_nothing(lease: Lease, place: str) -> None:
    save(lease, 32)
    lease.run.open_attempt()
    with pytest.raises(FencedError):
        store.put(str(lease.run.root), lease.number, place, 32, {"keep": 2})
    assert storage.list(place) == []


def test_runs_that_learn_different_things_never_share_a_place(tmp_path: Path) -> None:
    places = set()
    for name, key in (("a1b2", "a1b2"), ("mine", "a1b2"), ("mine", "c3d4"), ("c3d4", "c3d4")):
        run = RunFolder(tmp_path / key / name)
        write_record(run.run_json, {"id": name, "hash": key, "experiment": "digits"})
        places.add(store.place_of("s3://bucket/folder", run))
    assert len(places) == 4
    assert "s3://bucket/folder/digits/a1b2" in places


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def mirrored(lease: Lease, place: str, closing: ExitStack) -> Mirror:
    mirror = Mirror(place, ONE, lease, RankStatus())
    closing.callback(mirror.close, wait=True)
    return mirror


KEEP = {"keep": 2, "every": None, "back_to": None, "busy": None}


def test_copies_are_made_beside_training_and_the_newest_at_the_end(
    single: RankInfo, lease: Lease, place: str, closing: ExitStack
) -> None:
    """While the process is stopped no call waits, and retention keeps what is being copied."""
    mirror = mirrored(lease, place, closing)
    assert mirror._writer is not None and mirror._writer._process is not None
    pid = mirror._writer._process.pid
    os.kill(pid, signal.SIGSTOP)
    for images in (32, 64, 96, 128):
        save(lease, images)
        mirror.poll(images, KEEP)
        retention.prune(lease.run.checkpoints, keep=1, busy=mirror.busy)
    assert mirror.busy == 32 and lease.run.saved() == [32, 128] and storage.list(place) == []
    os.kill(pid, signal.SIGCONT)
    mirror.wait(128, KEEP)
    assert held(place) == [32, 128] and mirror.busy is None


def test_a_store_that_fails_is_said_and_harms_nothing_and_the_next_checkpoint_is_copied(
    single: RankInfo, lease: Lease, place: str, closing: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    """A file lies where the store's folder would be."""
    Path(place).parent.mkdir(parents=True)
    Path(place).write_text("in the way")
    mirror = mirrored(lease, place, closing)
    save(lease, 32)
    mirror.wait(32, KEEP)
    assert (
        "the checkpoint at 32 images is not in" in caplog.text and "Training goes on" in caplog.text
    )
    Path(place).unlink()
    save(lease, 64)
    mirror.poll(64, KEEP)
    mirror.wait(64, KEEP)
    assert held(place) == [64] and lease.run.saved() == [32, 64]
    caplog.clear()
    mirror.poll(64, KEEP)
    mirror.wait(64, KEEP)
    assert not caplog.records, "it is there, so nothing is copied again"


def test_a_checkpoint_that_made_room_before_it_was_copied_is_not_said_to_be_there(
    single: RankInfo, lease: Lease, place: str, closing: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    mirror = mirrored(lease, place, closing)
    assert mirror._writer is not None and mirror._writer._process is not None
    pid = mirror._writer._process.pid
    os.kill(pid, signal.SIGSTOP)
    save(lease, 32)
    mirror.poll(32, KEEP)
    storage.delete(lease.run.checkpoint(32))
    save(lease, 64)
    os.kill(pid, signal.SIGCONT)
    mirror.wait(64, KEEP)
    assert held(place) == [64]
    assert [each.split(" images")[0] for each in caplog.messages] == [
        "the checkpoint at 32",
        "the checkpoint at 64",
    ]
    assert "was gone before it was copied" in caplog.messages[0]
    assert caplog.messages[1].endswith(f"is in {place}")


def test_a_process_that_dies_while_it_copies_is_replaced(
    single: RankInfo, lease: Lease, place: str, closing: ExitStack
) -> None:
    mirror = mirrored(lease, place, closing)
    assert mirror._writer is not None and mirror._writer._process is not None
    pid = mirror._writer._process.pid
    os.kill(pid, signal.SIGSTOP)
    save(lease, 32)
    mirror.poll(32, KEEP)
    os.kill(pid, signal.SIGKILL)
    mirror.wait(32, KEEP)
    assert held(place) == [32]


def test_the_keys_of_retention_are_those_that_prune_takes() -> None:
    train = replace(TrainConfig(images=64, batch=32), keep_checkpoints=3, keep_every=64)
    assert retention.rules(train, 32, 16) == {"keep": 3, "every": 64, "back_to": 32, "busy": 16}


def stopped(rank_info: RankInfo, cfg: Config, root: str, folder: str) -> tuple[int | None, int]:
    """An attempt with a store of its own place, one rank of which is asked to stop behind 256 images."""
    never_late()
    store.place_of = lambda place, run: place
    if rank_info.rank == WHO:
        asked_after(256, ask)
    return ended(rank_info, cfg, root, folder)


def goes_on(rank_info: RankInfo, cfg: Config, root: str) -> int:
    store.place_of = lambda place, run: place
    return attempt(rank_info, cfg, root)


def test_two_ranks_whose_folder_is_purged_go_on_from_the_store_and_end_with_the_same_bits(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    cfg, whole, parts = rarely_saved(digits), tmp_path / "whole", tmp_path / "parts"
    place = str(tmp_path / "store")
    kept = replace(cfg, train=replace(cfg.train, checkpoint_store=place))
    ranks(2, attempt, cfg, str(whole))
    first, second = ranks(2, stopped, kept, str(parts), str(tmp_path / "exits"))
    assert first == second == (320, 320)
    assert held(place) == [320], "a rank that was asked to stop leaves once that is copied"
    shutil.rmtree(parts)
    assert ranks(2, goes_on, kept, str(parts)) == [1, 1], "the first attempt of a new folder"
    progress = read_record(RunFolder(parts).attempt(1) / "progress.json")
    assert progress is not None and progress["resumed_from"] == 320
    assert_same(weights(parts), weights(whole))
    assert held(place)[-1] == IMAGES


def test_what_a_run_passed_over_comes_back_before_its_checkpoint(
    lease: Lease, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that is killed in between finds the checkpoint, and asks the store for nothing more."""
    copied(lease, place, 32)
    record = {"from": 100, "to": 32, "passed": 68, "reason": "it broke"}
    roll_back._forget(lease, 32, [record])
    copied(lease, place, 128)
    shutil.rmtree(lease.run.root)
    again = new_run(tmp_path / "runs")
    publish = Lease.publish

    def killed(*arguments: Any, **words: Any) -> None:
        publish(*arguments, **words)
        raise KeyboardInterrupt

    monkeypatch.setattr(Lease, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        store.fetch(again, place, 128)
    assert again.run.saved() == [128] and roll_back.records(again.run) == [record]


def test_what_a_run_passed_over_is_in_the_store_before_its_checkpoint(
    lease: Lease, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"from": 100, "to": 32, "passed": 68, "reason": "it broke"}
    copied(lease, place, 32)
    roll_back._forget(lease, 32, [record])

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    save(lease, 128)
    monkeypatch.setattr(storage, "publish_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        store.put(str(lease.run.root), lease.number, place, 128, {"keep": 2})
    assert storage.exists(storage.join(place, "roll_backs.json"))
