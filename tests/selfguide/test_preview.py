"""Pictures while a run trains: samples of the average, and every bit of training as it was without them."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from launcher import submission
from launcher.compose import compose
from selfguide import snapshot
from selfguide.data.autoencoders import load_autoencoder
from selfguide.data.normaliser import Normaliser
from selfguide.distributed import RankInfo
from selfguide.sampling.generate import generate
from selfguide.sampling.grid import png, sheet
from selfguide.spec.config import Config, EngineConfig
from selfguide.spec.identity import identity
from selfguide.spec.run import RunFolder
from selfguide.training import publish
from selfguide.training.loop import advance
from selfguide.training.preview import _picture, preview
from selfguide.training.work import Training
from shards.errors import UserError
from shards.format.header import Header
from tests.selfguide.test_loop import BATCH, SWITCH, begun
from tests.selfguide.test_training import IMAGES, assert_same, attempt, config, weights

COUNT = 6


def previewing(root: Path) -> Training:
    """A run a step behind its switch, which shows six samples."""
    job = begun(root, SWITCH - 2 * BATCH)
    job.config = replace(
        job.config,
        train=replace(job.config.train, preview=COUNT),
        sampler=replace(job.config.sampler, steps=4, g=2.0),
    )
    job.lease.run.open_attempt()
    for _ in range(3):
        advance(job)
    return job


def everything(job: Training) -> dict[str, torch.Tensor]:
    """Masters, averages, moments, live weights and buffers."""
    state, moments = job.state, job.state.engine.moments()
    shards = [state.engine.masters, moments.first, moments.second, *state.averages.shards]
    held = {str(number): torch.cat(shard) for number, shard in enumerate(shards)}
    return {n: t.clone() for n, t in (held | dict(state.engine.module.state_dict())).items()}


def levels(png: bytes, side: int) -> np.ndarray:
    """The images of a picture, (rows, columns, side, side), at their own size."""
    zoom = 32 // side
    picture = np.asarray(Image.open(io.BytesIO(png)))[::zoom, ::zoom]
    rows, columns = ((edge + 1) // (side + 1) for edge in picture.shape)
    whole = np.zeros((rows * (side + 1), columns * (side + 1)), np.uint8)
    whole[: picture.shape[0], : picture.shape[1]] = picture
    cut = whole.reshape(rows, side + 1, columns, side + 1)[:, :-1, :, :-1]
    return cut.transpose(0, 2, 1, 3)


def test_a_preview_shows_what_the_snapshot_of_then_draws_and_changes_no_bit(
    single: RankInfo, tmp_path: Path
) -> None:
    job, twin = previewing(tmp_path / "one"), previewing(tmp_path / "two")
    before, dropout = everything(job), torch.get_rng_state()
    preview(job)
    assert torch.equal(dropout, torch.get_rng_state())
    assert_same(everything(job), before)
    assert job.state.engine.module.training

    header = {"kind": "image", "shift": 8.0, "scale": 0.125}
    job.data = {"manifest": "", "header": header}
    folder = job.lease.run.snapshot(job.state.images)
    publish.publish(folder, job.state, job.config, job.data, job.rank_info, job.lease)
    drawn = generate(snapshot.load(folder), job.config.sampler, seed=0, count=COUNT, batch=COUNT)
    wanted = (Normaliser.of(header).pixels(next(drawn)[0]).float() * 255 / 16).round()
    shown = levels(job.lease.run.preview(job.state.images).read_bytes(), 8)
    assert shown.shape == (2, 3, 8, 8)
    assert np.array_equal(shown.reshape(COUNT, 8, 8), wanted[:, 0].numpy())
    assert wanted.std() > 0

    for each in (job, twin):
        advance(each)
    assert_same(everything(job), everything(twin))


def test_tensorboard_has_the_picture_at_its_image_count(single: RankInfo, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = previewing(tmp_path)
    job.telemetry.begin(job.config, job.state.teaching, job.state.images)
    preview(job)
    job.telemetry.close()
    read = EventAccumulator(str(job.lease.run.metrics / "tensorboard"))
    read.Reload()
    (event,) = read.Images("samples")
    picture = job.lease.run.preview(job.state.images).read_bytes()
    assert event.step == job.state.images and event.encoded_image_string == picture
    assert (event.width, event.height) == Image.open(io.BytesIO(picture)).size


def test_a_picture_of_latents_is_what_their_autoencoder_decodes(tmp_path: Path) -> None:
    job, codec = begun(tmp_path, 0), load_autoencoder("tiny")
    job.normaliser = Normaliser(codec.header())
    latents = job.normaliser.normalise(torch.randn(4, codec.channels, 4, 4))
    decoded = codec.decode(job.normaliser.decode(latents))
    zoom = max(1, 32 // decoded.shape[-1])
    wanted = png(sheet(decoded.permute(0, 2, 3, 1).numpy(), columns=2, zoom=zoom))
    assert _picture(job, latents) == wanted


def test_where_nothing_decodes_latents_the_log_says_so_and_training_goes_on(
    single: RankInfo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = previewing(tmp_path)
    monkeypatch.setenv("SELFGUIDE_SMALL", str(tmp_path / "none"))
    job.normaliser = Normaliser(Header(kind="latent", encoder="small", encoder_sha256="00" * 32))
    with caplog.at_level(logging.WARNING):
        preview(job)
    assert (
        f"no preview at {job.state.images:,} images" in caplog.text
        and "SELFGUIDE_SMALL" in caplog.text
    )
    assert job.lease.run.newest_preview() is None
    advance(job)


def test_where_no_memory_is_left_for_the_picture_the_log_says_so_and_training_goes_on(
    single: RankInfo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = previewing(tmp_path)

    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("selfguide.training.preview.to_images", full)
        preview(job)
    assert f"no preview at {job.state.images:,} images: CUDA out of memory" in caplog.text
    assert job.lease.run.newest_preview() is None
    advance(job)
    preview(job)
    assert job.lease.run.newest_preview() == job.state.images


def test_an_error_of_sampling_which_all_ranks_do_ends_training(
    single: RankInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = previewing(tmp_path)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("selfguide.training.preview.generate", full)
    with pytest.raises(torch.OutOfMemoryError):
        preview(job)


def test_a_preview_of_a_compiled_run_compiles_nothing(single: RankInfo, tmp_path: Path) -> None:
    job, plain = previewing(tmp_path / "compiled"), previewing(tmp_path / "plain")
    compiled: list[torch.fx.GraphModule] = []

    def noted(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    for block in job.state.engine.module.backbone.repeated():
        block.compile(backend=noted, fullgraph=True, dynamic=False)
    advance(job)
    before = len(compiled)
    assert before
    preview(job)
    assert len(compiled) == before, "its batches have another shape than those of training"
    advance(job)
    assert len(compiled) == before
    for _ in range(2):
        advance(plain)
    assert_same(everything(job), everything(plain))


def test_submission_refuses_previews_of_latents_that_nothing_here_decodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SELFGUIDE_SMALL", "/nowhere/small.safetensors")
    words = ["experiment=digits_uncond", "cluster=local", "evaluation=none"]
    made: Any = SimpleNamespace(header={"kind": "latent", "encoder": "small"})
    assert submission.check_files(compose(words), made) == ()
    with pytest.raises(UserError) as error:
        submission.check_files(compose([*words, "train.preview=4"]), made)
    assert "train.preview=4" in str(error.value) and "/nowhere" in str(error.value)
    assert "train.preview=0" in str(error.value)


def test_previews_are_no_part_of_a_run() -> None:
    words = ["experiment=digits_uncond", "cluster=local"]
    assert identity(compose(words), None) == identity(compose([*words, "train.preview=16"]), None)


def test_weights_that_zero_3_parts_are_whole_for_a_preview(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    """DeepSpeed keeps what has at most 100,000 numbers whole; these prototypes have more, and no module reads them."""
    cfg = config(digits)
    guidance = replace(cfg.guidance, groups=300, prototype_width=400)  # type: ignore[type-var,call-arg]
    cfg = replace(
        cfg,
        guidance=guidance,
        engine=EngineConfig(zero_stage=3),
        sampler=replace(cfg.sampler, steps=3),
        train=replace(cfg.train, preview=5),
    )
    root = tmp_path / "shown"
    ranks(2, attempt, cfg, str(root))
    assert RunFolder(root).preview(IMAGES).is_file()
    plain = replace(cfg, engine=EngineConfig(zero_stage=1))
    ranks(2, attempt, plain, str(tmp_path / "plain"))
    shown = [
        levels(RunFolder(at).preview(IMAGES).read_bytes(), 8) for at in (root, tmp_path / "plain")
    ]
    # both round in their own order
    assert np.abs(shown[0].astype(int) - shown[1]).max() <= 2


@pytest.mark.slow
def test_runs_on_ranks_of_zero_3_show_pictures_and_learn_the_same(
    ranks: Any, digits: Path, tmp_path: Path
) -> None:
    """A picture that is lost is drawn again where its attempt resumes."""
    cfg = config(digits)
    cfg = replace(cfg, engine=EngineConfig(zero_stage=3), sampler=replace(cfg.sampler, steps=3))
    shown: Config = replace(cfg, train=replace(cfg.train, preview=5))
    one, two = tmp_path / "one", tmp_path / "two"
    ranks(2, attempt, shown, str(one))
    ranks(2, attempt, cfg, str(two))
    assert_same(weights(one), weights(two))
    run = RunFolder(one)
    assert not RunFolder(two).newest_preview()
    assert [run.preview(images).is_file() for images in (256, 384, IMAGES)] == [True, False, True]
    last = run.preview(IMAGES).read_bytes()
    assert levels(last, 8).shape[:2] == (2, 3)
    run.preview(IMAGES).unlink()
    ranks(2, attempt, shown, str(one))
    assert run.preview(IMAGES).read_bytes() == last
