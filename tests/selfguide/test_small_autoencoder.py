"""The small autoencoder of any images: its file, and the command that fits it to shards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from selfguide.data.autoencoders import load_autoencoder
from selfguide.data.autoencoders.encoding import EncodedSource, Encoding
from selfguide.data.autoencoders.small import SmallArchitecture, SmallVAE, to_bytes
from selfguide.data.normaliser import Normaliser
from shards.errors import UserError
from shards.format.header import PIXELS, Header
from shards.sources.source import ArraySource
from shards.write import writer
from tools import small_vae, vae

ARCHITECTURE = SmallArchitecture(image_channels=3, channels=4, factor=4, width=8)
QUICK = ["--width", "8", "--batch", "16", "--images", "320"]


def waves(count: int, shape: tuple[int, int, int] = (3, 16, 16)) -> np.ndarray:
    """Smooth colour images, each of two random numbers a channel."""
    channels, height, width = shape
    rng = np.random.default_rng(0)
    at = np.arange(height)[:, None] / height + np.arange(width)[None] / width
    phase, speed = rng.uniform(0, 6, (2, count, channels, 1, 1))
    return (127.5 + 127 * np.sin(phase + speed * at)).astype(np.uint8)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    writer.write(root, ArraySource.of("waves", waves(200)), header=PIXELS)
    return root


def fit(images: Path, out: Path, *words: str) -> int:
    return vae.main([str(images), "--out", str(out), *QUICK, *words])


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_of_any_factor_keeps_the_image_size(factor: int, channels: int) -> None:
    made = replace(ARCHITECTURE, image_channels=channels, factor=factor)
    net, x = SmallVAE(made), torch.zeros(2, channels, 16, 24)
    moments = net.encode(x)
    assert moments.shape == (2, 8, 16 // factor, 24 // factor)
    assert net.decode(moments[:, :4]).shape == x.shape


def test_a_file_of_weights_is_the_network_that_was_written(tmp_path: Path) -> None:
    net, file = SmallVAE(ARCHITECTURE), tmp_path / "a.safetensors"
    net.std.fill_(2.0)
    file.write_bytes(to_bytes(net))
    codec = load_autoencoder("small", file)
    assert (codec.image_channels, codec.channels, codec.factor) == (3, 4, 4)
    header = codec.header()
    assert (header.encoder, header.encoder_sha256, header.scale) == (
        "small", codec.sha256, (0.5,) * 4,
    )  # fmt: skip
    x = torch.from_numpy(waves(3))
    torch.testing.assert_close(codec.encode(x), net.encode(x.float() / 127.5 - 1).detach())


def test_weights_that_state_no_architecture_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(2)}, file)
    with pytest.raises(UserError, match=r"which architecture.*tools\.vae"):
        load_autoencoder("small", file)
    monkeypatch.delenv("SELFGUIDE_SMALL", raising=False)
    with pytest.raises(UserError, match=r"set SELFGUIDE_SMALL"):
        load_autoencoder("small")
    with pytest.raises(UserError, match="factor=3"):
        replace(ARCHITECTURE, factor=3)


def test_a_fit_reports_what_held_out_images_become(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.safetensors"
    assert fit(images, out, "--json", "--images", "1600", "--rate", "1e-2") == 0
    said = json.loads(capsys.readouterr().out)
    unseen = torch.from_numpy(waves(200))  # about the middle level, an image is 9 dB
    assert said["psnr"] > 13 and said["held_out"] == 20 and said["latent"] == [4, 4, 4]
    with Image.open(said["picture"]) as picture:
        assert picture.size == (3 * (16 * 17 - 1), 3 * (2 * 17 - 1))
    codec = load_autoencoder("small", out)
    seen = Normaliser.of(codec.header()).encode(codec.encode(unseen), 0, torch.arange(200))
    torch.testing.assert_close(seen.std((0, 2, 3)), torch.ones(4), atol=0.2, rtol=0)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.png", "a.safetensors"]
    source = EncodedSource.of(str(images), Encoding(encoder="small", weights=str(out)))
    assert source.shape == (8, 4, 4) and source.images(np.arange(3)).dtype == np.float16


def test_a_fit_that_was_interrupted_goes_on_to_the_same_weights(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one" / "a.safetensors", tmp_path / "other" / "a.safetensors"
    assert fit(images, one) == 0
    real, calls = small_vae.step, iter(range(100))

    def interrupted(*given: object) -> torch.Tensor:
        if next(calls) == 7:
            raise KeyboardInterrupt
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(small_vae, "step", interrupted)
    monkeypatch.setattr(small_vae, "KEPT_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        fit(images, other)
    assert not other.exists() and len(list(other.parent.iterdir())) == 1
    assert fit(images, other) == 0
    assert other.read_bytes() == one.read_bytes()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--factor", "8", "--out", "a.pt"], "must end in .safetensors"),
        (["--out", "a.safetensors", "--check"], "--check is of the digits"),
        (["--out", "a.safetensors", "--epochs", "9"], "--epochs is of the digits"),
        (["--out", "a.safetensors", "--images", "0"], "--images 0"),
        (["--out", "a.safetensors", "--rate", "0"], "--rate 0"),
        (["--out", "a.safetensors", "--images", "64", "--batch", "65"], "take 64 or less"),
        (["--out", "a.safetensors", "--device", "bogus"], "--device bogus: .*give cpu"),
        ([], "--out is missing"),
    ],
)
def test_a_fit_refuses_what_it_cannot_do(images: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        vae.main([str(images), *words])


def test_a_fit_that_diverges_leaves_the_file_as_it_was(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    assert fit(images, out) == 0
    before = out.read_bytes()
    with pytest.raises(UserError, match="diverged at --rate 1e\\+09"):
        fit(images, out, "--rate", "1e9")
    assert out.read_bytes() == before
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.png", "a.safetensors"]


def test_a_fit_of_one_image_or_into_a_folder_is_refused_before_it_begins(tmp_path: Path) -> None:
    one, out = tmp_path / "one", tmp_path / "a.safetensors"
    writer.write(one, ArraySource.of("one", waves(1)), header=PIXELS)
    with pytest.raises(UserError, match="holds one image"):
        fit(one, out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(UserError, match="is a folder: name a file"):
        fit(one, out)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_of_any_channels_are_fitted_and_drawn(tmp_path: Path, channels: int) -> None:
    root, out = tmp_path / "images", tmp_path / "a.safetensors"
    stored = ArraySource.of("waves", waves(20, (channels, 8, 16)))
    writer.write(root, stored, header=PIXELS)
    assert fit(root, out, "--images", "32", "--factor", "2") == 0
    assert load_autoencoder("small", out).image_channels == channels
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == ("RGB" if channels >= 3 else "L")


def test_a_fit_whose_last_images_are_all_held_out_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = tmp_path / "images", tmp_path / "a.safetensors"
    writer.write(root, ArraySource.of("waves", waves(8)), header=PIXELS)
    monkeypatch.setattr(small_vae, "held_out", np.arange)
    with pytest.raises(UserError, match=r"--images 16: .*larger --batch"):
        fit(root, out, "--images", "16", "--batch", "4")
    assert not out.exists()


def test_a_rate_that_is_no_number_is_refused_by_the_command_line(images: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        vae.main([str(images), "--out", "a.safetensors", "--rate", "nan"])
    assert ended.value.code == 2


def test_the_digits_refuse_what_is_of_shards() -> None:
    with pytest.raises(UserError, match="--width is of SHARDS"):
        vae.main(["--width", "8"])


def test_a_fit_refuses_latents_and_sizes_that_do_not_divide(tmp_path: Path) -> None:
    odd, latents = tmp_path / "odd", tmp_path / "latents"
    writer.write(odd, ArraySource.of("odd", waves(4, (3, 12, 12))), header=PIXELS)
    values = np.zeros((4, 4, 4, 4), np.float32)
    writer.write(latents, ArraySource.of("z", values), header=Header(kind="latent", encoder="tiny"))
    for root, message in ((odd, "--factor 8"), (latents, "holds no plain images")):
        with pytest.raises(UserError, match=message):
            fit(root, tmp_path / "a.safetensors", "--factor", "8")
