"""The loop on real digits: resume is exact, checkpoints load at any world size, older attempts publish nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from selfguide import snapshot
from selfguide.distributed import RankInfo
from selfguide.spec.config import (
    Config,
    EngineConfig,
    ModelConfig,
    NoGuidance,
    PathConfig,
    TrainConfig,
)
from selfguide.spec.rank_status import RankStatus
from selfguide.spec.run import Fenced, Lease, RunFolder, image_folder, write_record
from selfguide.training import checkpoint
from selfguide.training.job import work
from selfguide.training.retention import prune
from selfguide.training.telemetry import Telemetry
from shards import storage
from shards.errors import UserError
from shards.format import manifest as manifests
from tests.selfguide.test_online import online_config

IMAGES = 512


def config(root: Path, backend: str = "torch", dtype: str = "fp32") -> Config:
    base = online_config(switch=0.5, teacher_refresh=128)
    return replace(
        base,
        data=replace(base.data, root=str(root), mode="global"),
        train=TrainConfig(
            images=IMAGES, batch=64, learning_rate=1e-3, ema_halflife=(2000,), log_every=128,
            snapshot_every=256, checkpoint_every=128, keep_checkpoints=8,
        ),
        engine=EngineConfig(backend=backend, dtype=dtype),  # type: ignore[arg-type]
    )  # fmt: skip


def attempt(rank_info: RankInfo, cfg: Config, root: str, status: RankStatus | None = None) -> int:
    """One attempt of the run in `root`."""
    run = RunFolder(Path(root))
    torch.distributed.barrier()
    if rank_info.rank == 0:
        number = run.open_attempt()
        if number == 1:
            data = {"manifest": manifests.load(cfg.data.root).hash}
            write_record(run.run_json, {"images": IMAGES, "identity": {"data": data}})
    torch.distributed.barrier()
    lease = Lease(run, run.attempt_numbers()[-1])
    telemetry = Telemetry(run, lease.number, rank_info, cfg.train.images, status)
    work(cfg, rank_info, lease, telemetry)
    return lease.number


def weights(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / "snapshots" / f"img-{IMAGES:09d}" / "ema-2000.safetensors")


def assert_same(
    a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 0.0
) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_resumed_run_ends_with_the_same_bits(ranks: Any, digits: Path, tmp_path: Path) -> None:
    for backend in ("torch", "deepspeed"):
        cfg = config(digits, backend)
        whole, parts = tmp_path / f"{backend}-whole", tmp_path / f"{backend}-parts"
        ranks(2, attempt, cfg, str(whole))
        ranks(2, attempt, cfg, str(parts))
        # forget what came after image 256: the next attempt finds an interrupted run
        for folder in [
            *(parts / "checkpoints").glob("img-*"),
            *(parts / "snapshots").glob("img-*"),
        ]:
            if int(folder.name[4:]) > 256:
                (folder / "MANIFEST.json").unlink()
        assert RunFolder(parts).saved()[-1] == 256
        assert ranks(2, attempt, cfg, str(parts)) == [2, 2]
        assert_same(weights(parts), weights(whole))
        ends = [
            snapshot.load(r / "snapshots" / f"img-{IMAGES:09d}").guidance for r in (whole, parts)
        ]
        assert ends[0] == ends[1] and ends[0]["told"] and ends[0]["label_free"]


def test_dropout_is_resumed_too(ranks: Any, digits: Path, tmp_path: Path) -> None:
    """On EDM's path and a UNet that drops; the snapshot at 256 is where the second attempt begins."""
    cfg = replace(
        config(digits),
        model=ModelConfig(name="unet_digits", dropout=0.3),
        path=PathConfig(name="edm", prediction="edm", weighting="edm", time_density="log_normal"),
        guidance=NoGuidance(),
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for root in (whole, parts):
        ranks(1, attempt, cfg, str(root))
    for folder in [*(parts / "checkpoints").glob("img-*"), *(parts / "snapshots").glob("img-*")]:
        if int(folder.name[4:]) > 256:
            (folder / "MANIFEST.json").unlink()
    assert ranks(1, attempt, cfg, str(parts)) == [2]
    assert_same(weights(parts), weights(whole))


def test_a_checkpoint_loads_at_other_world_sizes_and_engines(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    ranks(2, attempt, config(digits, "deepspeed"), str(whole))
    ranks(2, attempt, config(digits, "deepspeed"), str(moved))
    for folder in [*(moved / "checkpoints").glob("img-*"), *(moved / "snapshots").glob("img-*")]:
        if int(folder.name[4:]) > 384:
            (folder / "MANIFEST.json").unlink()
    ranks(1, attempt, config(digits, "torch"), str(moved))
    ends = [weights(run) for run in (moved, whole)]
    for end in ends:
        # a bias in front of a BatchNorm has no gradient but rounding, which Adam blows up to whole steps
        end.pop("head.hidden.bias"), end.pop("head.norm.running_mean")
    assert_same(*ends, tolerance=1e-3)


def test_a_run_killed_between_its_last_two_publishes_finishes(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    """The snapshot is published first, so whatever checkpoint exists, no snapshot before it is missing."""
    cfg, root = config(digits), tmp_path / "run"
    ranks(1, attempt, cfg, str(root))
    before = weights(root)
    (root / "checkpoints" / f"img-{IMAGES:09d}" / "MANIFEST.json").unlink()
    (root / "snapshots" / f"img-{IMAGES:09d}" / "MANIFEST.json").unlink()
    ranks(1, attempt, cfg, str(root))
    assert RunFolder(root).finished()
    assert_same(weights(root), before)
    times = [
        (root / kind / f"img-{IMAGES:09d}" / "MANIFEST.json").stat().st_mtime_ns
        for kind in ("snapshots", "checkpoints")
    ]
    assert times[0] < times[1]


def test_only_the_oldest_checkpoints_are_pruned_whatever_the_length_of_their_names(
    tmp_path: Path,
) -> None:
    for images in (999_999_999, 1_000_000_000, 2_000_000_000):
        folder = tmp_path / image_folder(images)
        folder.mkdir()
        (folder / "part").write_text("weights")
        storage.publish_folder(folder, extra={"images": images})
    prune(tmp_path, keep=2)
    left = sorted(int(p.name[4:]) for p in tmp_path.iterdir())
    assert left == [1_000_000_000, 2_000_000_000]


def test_an_overtaken_attempt_publishes_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    old = Lease(run, run.open_attempt())
    old.check()
    run.open_attempt()
    with pytest.raises(Fenced, match="overtaken by attempt 2"):
        old.check()


def test_a_checkpoint_of_another_model_is_refused(ranks: Any, digits: Path, tmp_path: Path) -> None:
    cfg = config(digits)
    ranks(1, attempt, cfg, str(tmp_path / "run"))
    deeper = replace(cfg, model=replace(cfg.model, depth=3))
    wider = replace(cfg, model=replace(cfg.model, width=48))
    for other, named in ((deeper, "backbone.blocks.3."), (wider, "backbone.patchify.weight is (")):
        (said,) = ranks(1, refused, other, str(tmp_path / "run"))
        assert said.startswith("UserError") and named in said


def test_a_buffer_that_a_checkpoint_lacks_or_holds_otherwise_is_named() -> None:
    module = torch.nn.BatchNorm1d(4)
    held = {f"buffer.{name}": buffer for name, buffer in module.named_buffers()}
    assert checkpoint._other_buffer(held, module) is None
    assert checkpoint._other_buffer(held, module, ["running_mean", "running_var"]) is None
    assert "holds the buffer center, which" in (
        checkpoint._other_buffer(held, module, ["center", "running_mean"]) or ""
    )
    wider = {**held, "buffer.running_var": torch.ones(8)}
    assert checkpoint._other_buffer(wider, module) == "running_var is (8,) there and (4,) here"
    del held["buffer.running_mean"]
    assert "lacks the buffer running_mean" in (checkpoint._other_buffer(held, module) or "")


def test_shards_that_changed_under_a_run_are_refused(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    from tools.shards import __main__ as command

    cfg, other = config(digits), tmp_path / "other"
    ranks(1, attempt, cfg, str(tmp_path / "run"))
    command.main(
        ["make", "synthetic", "--out", str(other), "--count", "64", "--shape", "1", "8", "8"]
    )
    moved = replace(cfg, data=replace(cfg.data, root=str(other)))
    assert "this run was begun on" in ranks(1, refused, moved, str(tmp_path / "run"))[0]


def refused(rank_info: RankInfo, cfg: Config, root: str) -> str:
    try:
        attempt(rank_info, cfg, root)
    except (RuntimeError, UserError) as error:
        return f"{type(error).__name__} {error}"
    return "accepted"
