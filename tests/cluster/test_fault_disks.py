"""Cells D of the fault matrix: full disks, killed saves, bytes that turn, files that come late, stores that fail."""

from __future__ import annotations

import random
import shutil
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.drill import faults
from launcher.reconcile import decide
from selfguide.spec.run import RunFolder, image_folder, read_record
from shards import storage
from tests.cluster.bed import BATCH, Bed, attempts, lost, same_end, trains, until
from tests.s3.proxy import Proxy
from tests.shards.disks import disk
from tools.s3.server import Server
from tools.shards import __main__ as shards_command

pytestmark = [pytest.mark.cluster, pytest.mark.faults]


def progress(run: RunFolder, attempt: int) -> dict[str, Any]:
    return read_record(run.attempt(attempt) / "progress.json") or {}


@pytest.mark.parametrize("writer", ["here", "process"])
def test_d1_a_full_disk_at_a_checkpoint_is_waited_for_and_the_old_one_stays(
    bed: Bed, unharmed: dict[str, Any], tmp_path: Path, writer: str
) -> None:
    """A process beside a rank tells it of the disk at a later step, at the next checkpoint at the latest."""
    with disk(tmp_path / "disk", 200 << 20, files=100_000) as small:
        bed = replace(bed, runs=small.path / "runs")
        run = bed.submit("d1", f"train.checkpoint_writer={writer}")
        faults.slow(bed, 0.2)
        trains(bed, run)
        save = sum(path.stat().st_size for path in faults.newest(run).iterdir())
        # for records, and for half of another checkpoint
        small.leave(save // 2)
        until(lambda: (run.attempt(1) / "exit-0.json").exists(), "it notices")
        assert run.saved() == [20 * BATCH]
        small.resize(200 << 20)
        view = same_end(bed, run, unharmed)
        cause = decide.cause(view.attempts[0])
        assert (cause.kind, cause.type) == ("storage", "NoRoomError")
        assert cause.images in range(40 * BATCH, (41 if writer == "here" else 61) * BATCH, BATCH)
        assert progress(run, 2)["resumed_from"] == 20 * BATCH


@pytest.mark.parametrize("kills", [pytest.param(2, marks=pytest.mark.quick), 10])
def test_d2_a_rank_killed_in_a_save_at_a_random_offset_loads_nothing_in_part(
    bed: Bed, unharmed: dict[str, Any], kills: int
) -> None:
    draw = random.Random(kills)
    shares = {attempt: draw.random() for attempt in range(1, kills + 1)}
    for rank in (0, 1):
        faults.kill_in_saves(bed, rank, {a: s for a, s in shares.items() if a % 2 == rank})
    run = bed.submit("d2", f"train.checkpoint_every={5 * BATCH}")
    view = same_end(bed, run, unharmed, tries=kills + 1, seconds=60 * kills)
    assert attempts(view)[:-1] == ["killed"] * kills
    ranks = [decide.cause(at).rank for at in view.attempts[:-1]]
    assert ranks == [str(attempt % 2) for attempt in shares]
    assert not any(progress(run, number).get("damaged") for number in run.attempt_numbers())
    assert all(each <= 5 * BATCH for each in lost(run))


def test_d2_a_process_that_writes_checkpoints_is_killed_and_costs_nothing(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    run = bed.submit("d2-writer", "train.checkpoint_writer=process")
    faults.slow(bed, 0.05)
    trains(bed, run)
    for rank in (0, 1):
        faults.kill_writer(bed, rank)
    same_end(bed, run, unharmed, tries=1)
    logs = (run.attempt(1) / "job").rglob("*log.*")
    log = "".join(path.read_text() for path in logs)
    assert "the process that writes checkpoints ended by SIGKILL" in log


@pytest.mark.quick
def test_d3_a_flipped_bit_of_the_newest_is_named_and_the_one_before_is_used(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    run = bed.submit("d3")
    faults.slow(bed, 0.05)
    trains(bed, run, images=44 * BATCH)
    path = faults.flip_newest(run)
    faults.kill_rank(bed, 0)
    same_end(bed, run, unharmed)
    (told,) = progress(run, 2)["damaged"]
    (flaw,) = told["flaws"]
    assert (told["images"], flaw["file"], flaw["rank"]) == (40 * BATCH, path.name, 1)
    assert progress(run, 2)["resumed_from"] == 20 * BATCH
    assert Path(told["kept"]) == run.checkpoints / "damaged" / f"{image_folder(40 * BATCH)}.0002"


def test_d4_without_a_readable_manifest_of_the_newest_the_one_before_is_used(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    """An empty one says that something was published, a missing one that nothing was."""
    faults.slow(bed, 0.05, always=True)
    run = bed.submit("d4")
    trains(bed, run, images=44 * BATCH)
    faults.tear_manifest(run)
    faults.kill_rank(bed, 0)
    trains(bed, run, 2, 44 * BATCH)
    assert progress(run, 2)["resumed_from"] == 20 * BATCH
    faults.tear_manifest(run, delete=True)
    faults.kill_rank(bed, 0)
    same_end(bed, run, unharmed, tries=3)
    assert [each["images"] for each in progress(run, 2)["damaged"]] == [40 * BATCH]
    assert progress(run, 3)["resumed_from"] == 20 * BATCH and "damaged" not in progress(run, 3)


def test_d5_a_run_folder_that_is_visible_late_is_waited_for(
    bed: Bed, unharmed: dict[str, Any], tmp_path: Path
) -> None:
    """What a network file system may do: the folder of the logs is there, and nothing that was written beside it."""
    job = faults.preempt(bed, seconds=600)
    run = bed.submit("d5")
    training = bed.job(run)
    with faults.hidden(run.attempt(1), tmp_path / "elsewhere"):
        # not the code of the checkout, which Python finds in its stead
        copied = tmp_path / "elsewhere/code/launcher/__init__.py"
        copied.write_text(f"{copied.read_text()}\nprint('this is the copy', flush=True)\n")
        bed.ask("scancel", job)
        until(lambda: bed.jobs(run)[training] == "RUNNING", "it runs")
        time.sleep(20)
        assert bed.jobs(run)[training] == "RUNNING"
    same_end(bed, run, unharmed, tries=1)
    for log in (run.attempt(1) / "job").glob("*_log.out"):
        assert "this is the copy" in log.read_text()


def test_d6_what_killed_attempts_left_is_ignored_and_removed(
    bed: Bed, unharmed: dict[str, Any]
) -> None:
    run = bed.submit("d6")
    trains(bed, run)
    faults.slow(bed, 1.0)
    paths = faults.litter(run)
    faults.kill_rank(bed, 1)
    same_end(bed, run, unharmed)
    assert [path.name for path in paths if path.exists()] == ["latest"]
    assert not run.checkpoint(1_000_000_000).exists()


def test_d7_a_store_that_fails_now_and_then_changes_no_sample(
    bed: Bed,
    unharmed: dict[str, Any],
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    remote = f"s3://{server.bucket}/d7-{uuid.uuid4().hex[:8]}"
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    storage.reconnect()
    assert shards_command.main(["copy", str(bed.digits), remote]) == 0
    proxy = Proxy(server.endpoint)
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage.reconnect()
        run = bed.submit("d7", f"data.root={remote}")
        proxy.fail("unavailable", times=float("inf"), every=4, method="GET")
        proxy.fail("cut", times=float("inf"), every=5, method="GET")
        proxy.fail("short", times=float("inf"), every=7, method="GET", path=".tar")
        proxy.fail("delay", times=1, seconds=15.0, method="GET", path=".tar")
        same_end(bed, run, unharmed, tries=1, seconds=240)
        assert all(proxy.count(kind) for kind in ("unavailable", "cut", "delay"))
    finally:
        proxy.close()
        storage.reconnect()


def test_d7_a_truncated_tar_is_no_data_and_the_run_goes_on_once_it_is_whole(
    bed: Bed, unharmed: dict[str, Any], tmp_path: Path
) -> None:
    data = tmp_path / "digits"
    shutil.copytree(bed.digits, data)
    tar = max(data.rglob("*.tar"), key=lambda path: path.stat().st_size)
    whole = tar.read_bytes()
    job = faults.preempt(bed, seconds=600)
    run = bed.submit("d7-tar", f"data.root={data}")
    tar.write_bytes(whole[: len(whole) // 2])
    bed.ask("scancel", job)
    until(lambda: [*run.attempt(1).glob("exit-*.json")], "it notices")
    tar.write_bytes(whole)
    view = same_end(bed, run, unharmed, tries=2)
    assert attempts(view)[0] == "storage"
    assert tar.name in decide.cause(view.attempts[0]).message
