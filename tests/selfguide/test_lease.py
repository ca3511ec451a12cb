"""Once an attempt has begun, nothing that an older one publishes appears in the run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from selfguide.spec.run import Fenced, Lease, RunFolder, write_record
from shards import storage


def _folder(run: RunFolder, place: str, images: int) -> Path:
    folder = run.checkpoint(images) if place == "checkpoints" else run.snapshot(images)
    storage.publish(folder / "part", b"weights")
    return folder


@pytest.mark.parametrize("place", ["checkpoints", "snapshots"])
def test_publish_overtaken_between_look_and_appearance_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    run = RunFolder(tmp_path)
    old = Lease(run, run.open_attempt())
    old.publish(_folder(run, place, 1), extra={"images": 1})
    folder, link = _folder(run, place, 2), os.link
    opened: list[int] = []

    def overtaken(*paths: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        opened.append(run.open_attempt())
        Lease(run, opened[0]).begin()
        link(*paths)

    old.check()
    monkeypatch.setattr(os, "link", overtaken)
    with pytest.raises(Fenced):
        old.publish(folder, extra={"images": 2})
    assert opened == [2]
    assert storage.read_complete(folder) is None
    Lease(run, 2).publish(folder, extra={"images": 2})
    assert storage.newest_complete(folder.parent) == str(folder)


def test_a_run_of_which_an_attempt_died_before_it_began_goes_on(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.attempt(1).mkdir(parents=True)  # it took its number and no more
    lease = Lease(run, run.open_attempt())
    lease.begin()
    lease.publish(_folder(run, "checkpoints", 5), extra={})
    with pytest.raises(Fenced):
        Lease(run, 1).publish(_folder(run, "checkpoints", 6), extra={})


def test_an_attempt_whose_submission_failed_ends_no_right(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    old = Lease(run, run.open_attempt())
    failed, folder = run.attempt(run.open_attempt()), _folder(run, "checkpoints", 5)
    with pytest.raises(Fenced):
        old.publish(folder, extra={})
    failed.rmdir()
    old.publish(folder, extra={})
    assert storage.read_complete(folder) is not None


def test_a_record_that_a_killed_rank_was_writing_goes_when_the_next_attempt_begins(
    tmp_path: Path,
) -> None:
    run = RunFolder(tmp_path)
    old, kept = run.attempt(run.open_attempt()), '{"section": "train"}'
    (old / "heartbeat-0.json").write_text(kept)
    pid = os.fork()
    if not pid:
        # in the middle of what replaces it
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        write_record(old / "heartbeat-0.json", {"section": "checkpoint"}, replace=True)
        os._exit(0)
    os.waitpid(pid, 0)
    assert len(list(old.glob(".*.tmp"))) == 1
    Lease(run, run.open_attempt()).begin()
    assert [path.name for path in old.iterdir()] == ["heartbeat-0.json"]
    assert (old / "heartbeat-0.json").read_text() == kept
