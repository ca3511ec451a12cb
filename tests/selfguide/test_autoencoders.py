"""What a model sees of stored values, the tiny autoencoder, and headers that must agree before anything is decoded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import stats

import shards
from launcher.submission import check_data
from selfguide import snapshot
from selfguide.data.autoencoders import (
    check_header,
    from_images,
    load_autoencoder,
    to_images,
)
from selfguide.data.autoencoders import tiny as tiny_module
from selfguide.data.autoencoders.autoencoder import KLAutoencoder, levels
from selfguide.data.autoencoders.tiny import WEIGHTS
from selfguide.data.normaliser import Normaliser
from selfguide.diffusion.objectives import build_objective
from selfguide.distributed import RankInfo
from selfguide.evaluation.features.digitnet import half
from selfguide.randomness import normal, uniform
from selfguide.sampling.generate import generate
from selfguide.spec.config import Config, ModelConfig, NoGuidance, TrainConfig
from selfguide.spec.run import Lease, RunFolder, write_record
from selfguide.training.components import Components
from selfguide.training.job import work
from selfguide.training.telemetry import Telemetry
from selfguide.training.work import Training, prepare_batch
from shards.errors import UserError
from shards.format import manifest as manifests
from shards.format.header import Header
from shards.sources.source import ArraySource
from shards.write import writer
from tests.selfguide.test_online import online_config
from tools import digit_vae, vae

DIGITS = Header(kind="image", shift=8.0, scale=0.125)


def latent(**changes: object) -> Header:
    return Header(**{"kind": "latent", "encoder": "test", **changes})


# --- what a model sees -------------------------------------------------------------------------

affine = st.one_of(st.floats(0.05, 20.0), st.tuples(*[st.floats(0.05, 20.0)] * 3))


@given(affine, affine, st.integers(0, 2**31))
def test_decoding_undoes_encoding(shift: Any, scale: Any, seed: int) -> None:
    normaliser = Normaliser.of(latent(shift=shift, scale=scale))
    x = 5 * torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(normaliser.decode(normaliser.encode(x)), x, rtol=1e-4, atol=1e-4)


def test_each_channel_has_its_own_shift_and_scale() -> None:
    normaliser = Normaliser.of(latent(shift=(1.0, -2.0), scale=(0.5, 4.0)).plain())
    x = torch.randn(3, 2, 4, 4).half()
    seen = normaliser.encode(x)
    assert seen.dtype == torch.float32
    for channel, (shift, scale) in enumerate([(1.0, 0.5), (-2.0, 4.0)]):
        expected = (x[:, channel].float() - shift) * scale
        torch.testing.assert_close(seen[:, channel], expected, rtol=0, atol=0)


def test_stored_levels_survive_the_way_to_the_model_and_back() -> None:
    levels = torch.arange(17, dtype=torch.uint8).view(1, 1, 1, 17)
    normaliser = Normaliser.of(DIGITS)
    seen = normaliser.encode(levels)
    assert (seen.min(), seen.max(), normaliser.top) == (-1, 1, 16)
    assert torch.equal(normaliser.pixels(seen), levels)
    beyond = normaliser.pixels(3 * seen).flatten()  # clamped, never wrapped around
    assert beyond.tolist() == sorted(beyond.tolist()) and (beyond[0], beyond[-1]) == (0, 16)


@pytest.mark.parametrize("top", [16, 255])
def test_output_between_two_levels_becomes_the_nearer(top: int) -> None:
    header = Header(kind="image", shift=top / 2, scale=2 / top)
    at = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    nearest = np.clip(np.rint((at.double().numpy() + 1) * top / 2), 0, top)
    assert np.array_equal(Normaliser.of(header).pixels(at).numpy(), nearest)
    shown = np.rint(nearest * (255 / top))
    assert np.array_equal(to_images(header.plain(), at).numpy(), shown)


def test_levels_of_a_decoder_are_the_nearest() -> None:
    values = torch.tensor([-3.0, -0.2, 0.4, 0.6, 100.49, 100.51, 254.7, 255.4, 300.0])
    assert levels(values).tolist() == [0, 0, 0, 1, 100, 101, 255, 255, 255]


@pytest.mark.parametrize(
    "header",
    [
        Header(kind="image"),
        Header(kind="image", shift=0.5, scale=1.0),
        Header(kind="image", shift=(8.0,), scale=(0.125,)),
        Header(kind="image", shift=32767.5, scale=1 / 32767.5),
        latent(),
    ],
)
def test_images_whose_levels_nobody_knows_are_refused(header: Header) -> None:
    with pytest.raises(UserError, match=r"levels"):
        Normaliser.of(header).pixels(torch.zeros(1, 1, 2, 2))


MOMENTS = latent(content="moments", shift=(0.5, -1.0), scale=(2.0, 0.25))


def test_sampled_moments_have_their_mean_and_deviation() -> None:
    mean, log_variance = torch.tensor([3.0, -1.0]), torch.tensor([-2.0, 1.0])
    moments = torch.cat((mean, log_variance))[None, :, None, None].expand(20_000, 4, 1, 2)
    drawn = Normaliser.of(latent(content="moments")).encode(moments, 7, torch.arange(20_000))
    std = (log_variance / 2).exp()
    unit = (drawn - mean[:, None, None]) / std[:, None, None]
    for channel in range(2):
        assert stats.kstest(unit[:, channel].flatten().numpy(), "norm").pvalue > 1e-3
    flat = np.corrcoef(unit.flatten(1).T.numpy())
    assert np.abs(flat - np.eye(4)).max() < 0.03  # 4 sigma of 20,000 draws is 0.028
    torch.testing.assert_close(drawn.mean((0, 2, 3)), mean, atol=0.04, rtol=0)
    seen = Normaliser.of(MOMENTS).encode(moments, 7, torch.arange(20_000))
    torch.testing.assert_close(seen[:, 0], (drawn[:, 0] - 0.5) * 2)
    torch.testing.assert_close(seen[:, 1], (drawn[:, 1] + 1.0) * 0.25)


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    header = replace(MOMENTS, flips=True)
    stored, position = torch.randn(32, 2, 4, 3, 3), 2**33 + torch.arange(32)
    normaliser = Normaliser.of(header)
    whole = normaliser.encode(stored, 1, position)
    order = torch.randperm(32)
    parts = [normaliser.encode(stored[i : i + 5], 1, position[i : i + 5]) for i in range(0, 32, 5)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole[order], normaliser.encode(stored[order], 1, position[order]))
    assert not torch.equal(whole, normaliser.encode(stored, 2, position))
    assert not torch.equal(whole, normaliser.encode(stored, 1, position + 1))


def test_the_latents_noise_is_not_the_trainings_noise() -> None:
    moments, position = torch.zeros(5000, 4, 1, 1), torch.arange(5000)
    drawn = Normaliser.of(latent(content="moments")).encode(moments, 3, position).flatten()
    eps = normal(3, "noise", position, (2, 1, 1)).flatten()
    assert abs(np.corrcoef(drawn.numpy(), eps.numpy())[0, 1]) < 0.04


def test_variances_beyond_fp32_stay_finite() -> None:
    moments = torch.tensor([0.0, 1e4]).view(1, 2, 1, 1)
    drawn = Normaliser.of(latent(content="moments")).encode(moments, 0, torch.zeros(1))
    assert drawn.isfinite().all()


def test_either_mirror_image_is_seen_half_of_the_time() -> None:
    count = 40_000
    stored = torch.stack((torch.zeros(count), torch.ones(count)), dim=1).view(count, 2, 1, 1, 1)
    picked = Normaliser.of(latent(flips=True)).encode(stored, 5, torch.arange(count)).flatten()
    assert set(picked.tolist()) == {0.0, 1.0}
    assert abs(picked.mean().item() - 0.5) < 4 * 0.5 / count**0.5
    runs = picked.view(-1, 2).mean(1)  # neighbours are independent of each other
    assert abs((runs == 0.5).float().mean().item() - 0.5) < 4 * 0.5 / (count / 2) ** 0.5


def test_both_halves_of_a_pair_belong_to_one_image() -> None:
    stored = torch.arange(64.0).view(64, 1, 1, 1, 1) + torch.tensor([0.0, 0.5]).view(2, 1, 1, 1)
    picked = Normaliser.of(latent(flips=True)).encode(stored, 0, torch.arange(64)).flatten()
    assert torch.equal(picked.floor(), torch.arange(64.0))


def test_without_a_place_in_the_run_the_image_is_seen_as_it_is() -> None:
    stored = torch.randn(4, 2, 4, 3, 3)
    header = replace(MOMENTS, flips=True)
    seen = Normaliser.of(header).encode(stored)
    torch.testing.assert_close(Normaliser.of(header).decode(seen), stored[:, 0, :2])


# --- the tiny autoencoder ----------------------------------------------------------------------


def test_the_committed_autoencoder_shows_digits_it_never_saw() -> None:
    pictures = digit_vae.images()
    even, odd = half(len(pictures))
    codec = load_autoencoder("tiny")
    made = codec.decode(codec.encode(pictures[odd])[:, :2])
    error = (made.double() - pictures[odd].double()).square().mean()
    blind = pictures[even].double().mean(0, keepdim=True)
    baseline = (blind - pictures[odd].double()).square().mean()
    assert 10 * torch.log10(255**2 / error) >= digit_vae.LEAST
    assert error < baseline / 30
    assert digit_vae.test(codec, pictures)["psnr"] == pytest.approx(
        (10 * torch.log10(255**2 / error)).item(), abs=1e-3
    )


def test_the_committed_weights_are_small_and_named_by_their_hash() -> None:
    data = (resources.files("selfguide.data.autoencoders") / "weights" / WEIGHTS).read_bytes()
    codec = load_autoencoder("tiny")
    assert len(data) < 300_000 and codec.sha256 == hashlib.sha256(data).hexdigest()
    header = codec.header()
    assert (header.encoder, header.encoder_sha256) == ("tiny", codec.sha256)
    assert header.model_shape((4, 4, 4)) == (codec.channels, 8 // codec.factor, 8 // codec.factor)


def test_its_header_makes_latents_standard() -> None:
    codec, pictures = load_autoencoder("tiny"), digit_vae.images()
    seen = Normaliser.of(codec.header()).encode(
        codec.encode(pictures), 0, torch.arange(len(pictures))
    )
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(2), atol=0.03, rtol=0)
    torch.testing.assert_close(seen.std((0, 2, 3)), torch.ones(2), atol=0.03, rtol=0)


def test_an_image_decodes_alone_as_in_a_batch() -> None:
    codec, pictures = load_autoencoder("tiny"), digit_vae.images()[:9]
    found = codec.encode(pictures)
    torch.testing.assert_close(found[4:5], codec.encode(pictures[4:5]), atol=1e-5, rtol=1e-5)


def test_the_command_fits_from_nothing_and_keeps_what_is_good(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_module, "__file__", str(tmp_path / "package" / "tiny.py"))
    assert vae.main(["--epochs", "1", "--json"]) == 1  # too short to be good
    assert not (tmp_path / "package").exists()
    out = tmp_path / "made" / "tiny.safetensors"
    assert vae.main(["--epochs", "6", "--out", str(out), "--json"]) == 1
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["psnr"] > said["psnr_of_mean_image"] + 1 and said["file"] == str(out)
    assert load_autoencoder("tiny", out).sha256 == said["sha256"]
    assert vae.main(["--check", "--out", str(out)]) == 1
    assert vae.main(["--check"]) == 0 and "dB on the other half" in capsys.readouterr().out


def test_the_command_refuses_what_it_cannot_write() -> None:
    with pytest.raises(UserError, match="--epochs 0"):
        vae.main(["--epochs", "0"])
    with pytest.raises(UserError, match=r"must end in .safetensors"):
        vae.main(["--out", "tiny.pt"])


# --- to images and back ------------------------------------------------------------------------


def test_image_data_needs_no_autoencoder() -> None:
    pictures = digit_vae.images()[:50]
    seen = from_images(DIGITS, pictures)
    assert torch.equal(seen, Normaliser.of(DIGITS).encode((pictures * (16 / 255)).round()))
    assert torch.equal(to_images(DIGITS.plain(), seen), pictures)
    assert to_images(DIGITS, 0.03 + seen).unique().numel() <= 17  # the data's own levels
    photos = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    identity = load_autoencoder("identity")
    assert torch.equal(identity.decode(identity.encode(photos)), photos)
    seen = from_images(identity.header(), photos, identity)
    assert (seen.abs() <= 1).all() and torch.equal(to_images(identity.header(), seen), photos)


def test_latents_pass_through_their_autoencoder() -> None:
    codec, pictures = load_autoencoder("tiny"), digit_vae.images()[:50]
    seen = from_images(codec.header(), pictures, codec)
    assert seen.shape == (50, 2, 4, 4)
    assert torch.equal(
        to_images(codec.header(), seen, codec), codec.decode(codec.encode(pictures)[:, :2])
    )
    # data written as samples, not moments, mean the same to a model
    sampled = replace(codec.header(), content="sample", flips=True)
    assert torch.equal(from_images(sampled, pictures, codec), seen)


def test_latents_are_not_shown_without_their_autoencoder() -> None:
    header = load_autoencoder("tiny").header()
    with pytest.raises(UserError, match="latents of tiny: load that autoencoder"):
        to_images(header, torch.zeros(1, 2, 4, 4))
    with pytest.raises(UserError, match="latents of tiny"):
        from_images(header, digit_vae.images()[:1])


DISAGREEMENTS: list[tuple[dict[str, Any], str]] = [
    ({"encoder": "sd_vae"}, "the data's encoder is sd_vae, not tiny"),
    ({"kind": "image", "content": "sample"}, "the data's encoder is identity, not tiny"),
    ({"encoder_sha256": "0" * 64}, "encoder_sha256=000000000000, and the weights of tiny have"),
    ({"encoder_sha256": None}, "encoder_sha256=None"),
    ({"scale": 0.18215}, "header scale=0.18215, and latents of tiny have scale="),
    ({"shift": 0.0}, "header shift=0.0, and latents of tiny have shift="),
    ({"shift": 0.0, "scale": (1.0,) * 4}, "for 4 channels, and latents of tiny have 2"),
]


@pytest.mark.parametrize(("change", "message"), DISAGREEMENTS)
def test_data_that_disagree_are_refused(change: dict[str, Any], message: str) -> None:
    codec = load_autoencoder("tiny")
    check_header(codec, codec.header())
    wrong = replace(codec.header(), **change)
    for use in (
        lambda: check_header(codec, wrong.plain()),
        lambda: to_images(wrong, torch.zeros(1, 2, 4, 4), codec),
        lambda: from_images(wrong, digit_vae.images()[:1], codec),
    ):
        with pytest.raises(UserError, match=message):
            use()


def test_moments_from_an_encoder_that_makes_none_are_refused() -> None:
    codec = replace(load_autoencoder("tiny"), moments=False)
    assert isinstance(codec, KLAutoencoder)
    with pytest.raises(UserError, match="content='moments', and tiny encodes to samples"):
        check_header(codec, codec.header())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 1, 8, 8), "float32: give uint8"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), r"\(1, 8, 8\) torch.uint8: give uint8 \(B, C"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "3 channels; tiny encodes 1"),
        (torch.zeros(1, 1, 8, 7, dtype=torch.uint8), "8 x 7; tiny makes a latent pixel of 2 x 2"),
    ],
)
def test_images_it_cannot_encode_are_named(images: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_autoencoder("tiny").encode(images)


def test_moments_are_not_decoded_as_latents() -> None:
    codec = load_autoencoder("tiny")
    with pytest.raises(UserError, match=r"latents are \(2, 4, 4, 4\); tiny decodes \(B, 2, h, w\)"):
        codec.decode(codec.encode(digit_vae.images()[:2]))


# --- weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sdvae", {}, "'sdvae' is unknown; did you mean 'sd_vae'"),
        ("identity", {"weights": "x"}, "identity has none"),
        ("tiny", {"weights": "/nowhere/x.safetensors"}, "no such file; fit it with"),
        ("tiny", {"statistics": "x"}, "only va_vae takes them"),
    ],
)
def test_wrong_requests_are_named(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_autoencoder(name, **options)


def damaged(tmp_path: Path, change: Any) -> Path:
    tensors = load_file(Path(tiny_module.__file__).parent / "weights" / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["paint.weight"][0, 0, 0].fill_(torch.nan), "paint.weight has 3 of"),
        (lambda t: t["up.bias"][0].fill_(torch.inf), "up.bias has 1 of"),
        (lambda t: t.update({"look.bias": torch.zeros(3)}), r"look.bias is \(3,\), and .* \(20,\)"),
        (lambda t: t.pop("mean"), "lacks mean,"),
        (lambda t: t.update({"extra": torch.zeros(1)}), "holds extra,"),
    ],
)
def test_weights_that_cannot_be_are_named(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_autoencoder("tiny", damaged(tmp_path, change))


def test_a_file_that_is_no_weights_is_named(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.pt"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(UserError, match=rf"{name} cannot be read as tensors only"):
            load_autoencoder("tiny", tmp_path / name)


class Runs:
    """Restored by running a function: what a file of weights must not be able to do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_a_file_that_runs_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    torch.save({"state_dict": Runs(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil.pt cannot be read as tensors only"):
        load_autoencoder("tiny", tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


# --- through shards and training ---------------------------------------------------------------


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as moments of both mirror images."""
    codec, pictures = load_autoencoder("tiny"), digit_vae.images()
    pairs = torch.stack((codec.encode(pictures), codec.encode(pictures.flip(3))), dim=1)
    root = tmp_path_factory.mktemp("latents")
    source = ArraySource.of("digits", pairs.numpy().astype(np.float16))
    writer.write(root, source, header=replace(codec.header(), flips=True))
    return root


def latent_config(root: Path) -> Config:
    base = online_config()
    return replace(
        base,
        model=ModelConfig(name="dit_digits"),
        guidance=NoGuidance(),
        data=replace(base.data, root=str(root), shape=(2, 4, 4), classes=0),
        train=TrainConfig(
            images=256, batch=64, learning_rate=1e-3, ema_halflife=(500,), log_every=64,
            snapshot_every=256, checkpoint_every=256,
        ),
    )  # fmt: skip


def test_shards_of_latents_become_model_input_whoever_reads_them(latents: Path) -> None:
    normaliser = Normaliser.of(manifests.load(latents).header)

    def seen(world: int) -> dict[int, torch.Tensor]:
        found = {}
        for rank in range(world):
            with shards.open(
                latents, global_batch=64, micro_batch=32, rank=rank, world=world, seed=1
            ) as stream:
                for _ in range(4 // world):
                    arrays = next(stream)
                    position = torch.as_tensor(arrays["position"])
                    x = normaliser.encode(torch.as_tensor(arrays["x"]), 1, position)
                    found |= dict(zip(position.tolist(), x, strict=True))
        return found

    one, two = seen(1), seen(2)
    assert one.keys() == two.keys() and len(one) == 128
    assert all(torch.equal(one[p], two[p]) for p in one)


def test_a_submission_compares_the_shape_that_a_model_sees(latents: Path) -> None:
    config = latent_config(latents)
    assert check_data(config) == manifests.load(latents).hash
    stored = replace(config, data=replace(config.data, shape=(4, 4, 4)))
    with pytest.raises(UserError, match=r"a model sees \[2, 4, 4\] .* set data.shape=\[2,4,4\]"):
        check_data(stored)


def test_training_draws_latents_by_the_runs_seed_and_place(latents: Path) -> None:
    config, header = replace(latent_config(latents), seed=11), manifests.load(latents).header
    arrays = shards.read_all(latents) | {"position": 10_000 + np.arange(1797)}
    job = Training(
        config=config, rank_info=RankInfo(0, 0, 1), state=SimpleNamespace(images=0, components=Components()),  # type: ignore[arg-type]
        stream=iter(()), objective=build_objective(config.path), normaliser=Normaliser.of(header),
        data={}, telemetry=None, lease=None,  # type: ignore[arg-type]
    )  # fmt: skip
    x0 = prepare_batch(job, arrays).x0.cpu()
    mirrored = uniform(11, "flip", torch.as_tensor(arrays["position"]), 1)[:, 0] < 0.5
    stored = torch.as_tensor(arrays["x"])[torch.arange(1797), mirrored.long()].float()
    noise = normal(11, "latent-sample", torch.as_tensor(arrays["position"]), (2, 4, 4))
    z = stored[:, :2] + torch.exp(stored[:, 2:] / 2) * noise
    shift, scale = (torch.tensor(header[name])[:, None, None] for name in ("shift", "scale"))
    torch.testing.assert_close(x0, (z - shift) * scale, atol=1e-5, rtol=1e-5)


def attempt(rank_info: RankInfo, config: Config, root: str) -> None:
    run = RunFolder(Path(root))
    data = {"manifest": manifests.load(config.data.root).hash}
    write_record(run.run_json, {"images": config.train.images, "identity": {"data": data}})
    lease = Lease(run, run.open_attempt())
    work(config, rank_info, lease, Telemetry(run, lease.number, rank_info, config.train.images))


@pytest.mark.slow
def test_a_run_on_latents_publishes_what_becomes_images(
    latents: Path, ranks: Any, tmp_path: Path
) -> None:
    config = latent_config(latents)
    ranks(1, attempt, config, str(tmp_path))
    published = snapshot.load(RunFolder(tmp_path).snapshot(256))
    sampler = replace(config.sampler, steps=2)
    made = torch.cat([x for x, _ in generate(published, sampler, seed=0, count=8, batch=8)])
    codec = load_autoencoder(published.data["header"]["encoder"])
    images = to_images(published.data["header"], made, codec)
    assert images.shape == (8, 1, 8, 8) and images.dtype == torch.uint8
    assert images.float().std() > 10
