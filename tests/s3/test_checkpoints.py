"""A run's checkpoints in a real store: copied and fetched through faults, verified, and refused where none can be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from launcher import submit
from selfguide.distributed import RankInfo
from selfguide.spec.config import TrainConfig
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.retention import pin
from selfguide.spec.run import Lease, image_folder
from selfguide.training import resume, store
from selfguide.training.mirror import Mirror
from shards import storage
from shards.errors import UserError
from tests.s3.proxy import Proxy
from tests.selfguide.test_store import KEEP, bytes_of, copied, held, new_run, save
from tools.checkpoint import __main__ as command

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def single() -> Iterator[RankInfo]:
    """This process as the only rank of a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield RankInfo(0, 0, 1)
    dist.destroy_process_group()


@pytest.fixture
def lease(tmp_path: Path) -> Lease:
    return new_run(tmp_path / "runs")


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    code = command.main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_run_whose_folder_is_purged_goes_on_from_the_store(
    root: str, lease: Lease, tmp_path: Path, single: RankInfo
) -> None:
    place = store.place_of(root, lease.run)
    for images in (32, 64, 96):
        copied(lease, place, images)
    assert held(place) == [64, 96]
    written = bytes_of(lease.run.checkpoint(96))
    shutil.rmtree(lease.run.root)
    again = new_run(tmp_path / "runs")
    train = TrainConfig(images=128, batch=32, checkpoint_store=root)
    found = resume.find_or_fetch(again, single, train)
    assert found.folder == again.run.checkpoint(96) and bytes_of(found.folder) == written
    # it is the first attempt of a new folder, and copies as every other
    copied(again, place, 128)
    assert held(place) == [96, 128]


@pytest.mark.parametrize("fault", ["unavailable", "cut", "flip_sent", "lost"])
def test_a_copy_survives_what_passes_and_is_whole(
    root: str, lease: Lease, proxy: Proxy, fault: Any
) -> None:
    place = store.place_of(root, lease.run)
    method = "GET" if fault == "cut" else "PUT"
    copied(lease, place, 32)
    proxy.fail(fault, times=3, every=2, method=method)
    copied(lease, place, 64)
    assert proxy.count(fault) and held(place) == [32, 64]
    shutil.rmtree(lease.run.checkpoints)
    assert store.fetch(lease, place, 64) == 64


def test_a_store_that_goes_away_is_said_and_the_next_checkpoint_is_copied(
    root: str, lease: Lease, proxy: Proxy, single: RankInfo, caplog: pytest.LogCaptureFixture
) -> None:
    """The process that copies has the environment's own patience, so it is refused rather than left waiting."""
    place = store.place_of(root, lease.run)
    mirror = Mirror(place, single, lease, RankStatus())
    try:
        proxy.fail("expired", times=float("inf"), method="PUT")
        save(lease, 32)
        mirror.wait(32, KEEP)
        assert "the checkpoint at 32 images is not in" in caplog.text
        proxy.heal()
        save(lease, 64)
        mirror.wait(64, KEEP)
    finally:
        mirror.close(wait=True)
    assert held(place) == [64] and lease.run.saved() == [32, 64]


def test_the_commands_verify_and_show_what_lies_in_a_store(
    root: str, lease: Lease, capsys: pytest.CaptureFixture[str]
) -> None:
    place = store.place_of(root, lease.run)
    for images in (32, 64):
        copied(lease, place, images)
    pin(place, image_folder(32))
    _, found = said(capsys, "show", place)
    rows = found["checkpoints"]
    assert [row["images"] for row in rows] == [32, 64] and rows[0]["state"] == "whole"
    assert [row["pinned"] for row in rows] == [True, False]
    code, found = said(capsys, "verify", place)
    assert code == 0 and [each["state"] for each in found["checkpoints"]] == ["whole"] * 2
    storage.publish(
        storage.join(place, image_folder(64), "replicated.safetensors"), b"x", replace=True
    )
    code, found = said(capsys, "verify", place)
    assert code == 1 and found["checkpoints"][1]["damaged"][0][0] == "replicated.safetensors"
    code, found = said(capsys, "verify", f"{place}/{image_folder(32)}/")
    assert code == 0 and [each["checkpoint"] for each in found["checkpoints"]] == [image_folder(32)]
    with pytest.raises(UserError, match="holds no checkpoint, but digits"):
        command.main(["verify", root])


def test_a_store_that_cannot_be_reached_refuses_the_submission(
    root: str, digits: Path, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    words = ["experiment=digits_dit", "cluster=local", f"data.root={digits}", f"runs={runs}"]

    def refused(address: str) -> str:
        with pytest.raises(UserError) as raised:
            submit.main([*words, f"train.checkpoint_store={address}"])
        assert not runs.exists() and "\n" not in str(raised.value)
        return str(raised.value)

    told = refused("s3://no-such-bucket/checkpoints")
    assert "train.checkpoint_store=s3://no-such-bucket/checkpoints" in told
    assert "there is no bucket 'no-such-bucket'" in told
    assert "give s3://BUCKET/FOLDER" in refused("checkpoints")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    storage.reconnect()
    assert "are refused" in refused(root)
