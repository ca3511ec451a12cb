"""SD-VAE and VA-VAE from files: names of both code bases, the forward re-derived plainly, weights where they lie."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfguide.data.autoencoders import (
    check_header,
    from_images,
    kl,
    load_autoencoder,
    to_images,
)
from selfguide.data.normaliser import Normaliser
from shards.errors import UserError

GROUPS, EDGE = 4, 16
# small, and unlike each other level by level; attention at the last level, as VA-VAE has it
CONFIG: dict[str, Any] = {
    "block_out_channels": [8, 12, 16],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
    "layers_per_block": 2,
    "latent_channels": 5,
    "norm_num_groups": GROUPS,
}


class Plain:
    """The autoencoder of latent diffusion (Rombach et al. 2022); its tensors are drawn when first asked for."""

    def __init__(
        self, config: dict[str, Any] = CONFIG, groups: int = GROUPS, attends: bool = True
    ) -> None:
        self.config, self.groups, self.attends = config, groups, attends
        self.tensors: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    def tensor(self, name: str, *shape: int) -> Tensor:
        if name not in self.tensors:
            drawn = torch.randn(*shape, generator=self.generator)
            fan = max(1, drawn[0].numel()) if len(shape) > 1 else 100
            self.tensors[name] = drawn / fan**0.5 + (name.endswith("norm.weight"))
        return self.tensors[name]

    def conv(self, name: str, x: Tensor, out: int, edge: int = 3, **options: Any) -> Tensor:
        options.setdefault("padding", edge // 2)
        weight = self.tensor(f"{name}.weight", out, x.shape[1], edge, edge)
        return F.conv2d(x, weight, self.tensor(f"{name}.bias", out), **options)

    def norm(self, name: str, x: Tensor) -> Tensor:
        channels = x.shape[1]
        weight, bias = (self.tensor(f"{name}.{part}", channels) for part in ("weight", "bias"))
        return F.group_norm(x, self.groups, weight, bias, eps=1e-6)

    def block(self, name: str, x: Tensor, out: int) -> Tensor:
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), out)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), out)
        return h + (x if x.shape[1] == out else self.conv(f"{name}.nin_shortcut", x, out, 1))

    def attention(self, name: str, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h, channels, 1).flatten(2) for part in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k / channels**0.5, dim=2)  # (B, query, key)
        mixed = (v @ weights.transpose(1, 2)).view(batch, channels, height, width)
        return x + self.conv(f"{name}.proj_out", mixed, channels, 1)

    def middle(self, side: str, x: Tensor) -> Tensor:
        x = self.block(f"{side}.mid.block_1", x, x.shape[1])
        x = self.attention(f"{side}.mid.attn_1", x)
        return self.block(f"{side}.mid.block_2", x, x.shape[1])

    def moments(self, x: Tensor) -> Tensor:
        widths, latents = self.config["block_out_channels"], self.config["latent_channels"]
        x = self.conv("encoder.conv_in", x, widths[0])
        for level, width in enumerate(widths):
            for number in range(self.config["layers_per_block"]):
                x = self.block(f"encoder.down.{level}.block.{number}", x, width)
                if self.attends and level == len(widths) - 1:
                    x = self.attention(f"encoder.down.{level}.attn.{number}", x)
            if level < len(widths) - 1:
                x = F.pad(x, (0, 1, 0, 1))
                x = self.conv(
                    f"encoder.down.{level}.downsample.conv", x, width, stride=2, padding=0
                )
        x = self.middle("encoder", x)
        x = F.silu(self.norm("encoder.norm_out", x))
        x = self.conv("encoder.conv_out", x, 2 * latents)
        return self.conv("quant_conv", x, 2 * latents, 1)

    def images(self, z: Tensor) -> Tensor:
        widths = self.config["block_out_channels"]
        x = self.conv("post_quant_conv", z, z.shape[1], 1)
        x = self.middle("decoder", self.conv("decoder.conv_in", x, widths[-1]))
        for level in reversed(range(len(widths))):
            for number in range(self.config["layers_per_block"] + 1):
                x = self.block(f"decoder.up.{level}.block.{number}", x, widths[level])
                if self.attends and level == len(widths) - 1:
                    x = self.attention(f"decoder.up.{level}.attn.{number}", x)
            if level:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(f"decoder.up.{level}.upsample.conv", x, widths[level])
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)), 3)


PHOTOS = torch.randint(0, 256, (2, 3, EDGE, EDGE), generator=torch.Generator().manual_seed(1))
PHOTOS = PHOTOS.to(torch.uint8)
MEAN = torch.linspace(-1, 1, 5).view(1, 5, 1, 1)
STD = torch.linspace(0.5, 4, 5).view(1, 5, 1, 1)


@pytest.fixture(scope="module")
def plain() -> Plain:
    made = Plain()
    made.images(made.moments(torch.zeros(1, 3, EDGE, EDGE))[:, :5])
    return made


@pytest.fixture
def released(plain: Plain, tmp_path: Path) -> Path:
    """A training run's checkpoint in the names of latent diffusion, as VA-VAE is published, with its statistics."""
    kept = {"loss.logvar": torch.zeros(()), "linear_proj.weight": torch.zeros(2, 2)}
    torch.save({"state_dict": plain.tensors | kept, "epoch": 3}, tmp_path / "vae.pt")
    torch.save({"mean": MEAN, "std": STD}, tmp_path / "latents_stats.pt")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "vae.pt"


def test_names_and_forward_are_those_of_the_release(plain: Plain, released: Path) -> None:
    codec = load_autoencoder("va_vae", released)
    assert (codec.factor, codec.channels) == (4, 5)
    found, expected = codec.encode(PHOTOS), plain.moments(PHOTOS.float() / 127.5 - 1)
    assert found.shape == (2, 10, EDGE // 4, EDGE // 4)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    z = found[:, :5]
    made = codec.decode(z).int()
    expected = ((plain.images(z) + 1) * 127.5).round().clamp(0, 255).int()
    assert (made - expected).abs().max() <= 1  # a rounding either way
    assert (made - expected).abs().float().mean() < 0.01 and made.float().std() > 5


def test_a_folder_of_diffusers_is_the_same_autoencoder(
    plain: Plain, released: Path, tmp_path: Path
) -> None:
    from diffusers import AutoencoderKL

    net = AutoencoderKL.from_config(CONFIG)
    net.load_state_dict(kl.in_diffusers_form(plain.tensors, 3))
    for safe, name in ((True, "x.safetensors"), (False, "x.bin")):
        folder = tmp_path / name
        net.save_pretrained(folder, safe_serialization=safe)
        codec = load_autoencoder("sd_vae", folder)
        file = next(folder.glob("diffusion_pytorch_model.*"))
        assert codec.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert torch.equal(
            codec.encode(PHOTOS), load_autoencoder("va_vae", released).encode(PHOTOS)
        )
        with torch.no_grad():
            theirs = net.encode(PHOTOS.float() / 127.5 - 1).latent_dist
        torch.testing.assert_close(codec.encode(PHOTOS)[:, :5], theirs.mode())


def test_attention_of_the_first_releases_is_read(
    plain: Plain, released: Path, tmp_path: Path
) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = kl.in_diffusers_form(plain.tensors, 3)
    for now, before in old.items():
        tensors = {n.replace(f".{now}.", f".{before}."): t for n, t in tensors.items()}
    assert any(".query." in name for name in tensors)
    save_file(tensors, tmp_path / "old.safetensors")
    codec = load_autoencoder("sd_vae", tmp_path / "old.safetensors")
    assert torch.equal(codec.encode(PHOTOS), load_autoencoder("va_vae", released).encode(PHOTOS))


def test_sd_vae_has_the_scale_of_its_paper_or_of_its_file(released: Path) -> None:
    codec = load_autoencoder("sd_vae", released)
    header = codec.header()
    assert (header.shift, header.scale, header.content) == (0.0, 0.18215, "moments")
    seen = from_images(header, PHOTOS, codec)
    torch.testing.assert_close(seen, codec.encode(PHOTOS)[:, :5] * 0.18215)
    assert torch.equal(to_images(header, seen, codec), codec.decode(seen / 0.18215))
    stated = CONFIG | {"scaling_factor": 0.5, "shift_factor": 0.25}
    (released.parent / "config.json").write_text(json.dumps(stated))
    header = load_autoencoder("sd_vae", released).header()
    assert (header.shift, header.scale) == (0.25, 0.5)


def test_va_vae_is_normalised_by_channel(released: Path) -> None:
    codec = load_autoencoder("va_vae", released)
    seen = from_images(codec.header(), PHOTOS, codec)
    torch.testing.assert_close(
        seen, (codec.encode(PHOTOS)[:, :5] - MEAN) / STD, atol=1e-5, rtol=1e-5
    )
    back = Normaliser.of(codec.header()).decode(seen)
    torch.testing.assert_close(back, codec.encode(PHOTOS)[:, :5], atol=1e-5, rtol=1e-5)


def test_statistics_come_from_path_file_beside_or_config(released: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"mean": torch.zeros(5), "std": torch.full((5,), 2.0)}, other)
    given = load_autoencoder("va_vae", released, statistics=other).header()
    assert (given.shift, given.scale) == ((0.0,) * 5, (0.5,) * 5)
    (released.parent / "latents_stats.pt").unlink()
    stated = CONFIG | {"latents_mean": [1.0] * 5, "latents_std": [4.0] * 5}
    (released.parent / "config.json").write_text(json.dumps(stated))
    stated_header = load_autoencoder("va_vae", released).header()
    assert (stated_header.shift, stated_header.scale) == ((1.0,) * 5, (0.25,) * 5)


def test_without_statistics_the_datas_own_are_taken(released: Path) -> None:
    header = load_autoencoder("va_vae", released).header()
    (released.parent / "latents_stats.pt").unlink()
    codec = load_autoencoder("va_vae", released)
    with pytest.raises(UserError, match="without the mean and std of its latents"):
        codec.header()
    check_header(codec, header)
    assert to_images(header, torch.zeros(1, 5, 4, 4), codec).shape == (1, 3, EDGE, EDGE)
    with pytest.raises(UserError, match="for 4 channels, and latents of va_vae have 5"):
        check_header(codec, replace(header, shift=(0.0,) * 4, scale=1.0))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"mean": torch.zeros(5)}, "holds mean: give a file of mean and std"),
        ({"mean": torch.zeros(4), "std": torch.ones(5)}, "for 4 and 5 channels, not its 5"),
    ],
)
def test_wrong_statistics_are_named(
    released: Path, tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / "s.safetensors")
    with pytest.raises(UserError, match=message):
        load_autoencoder("va_vae", released, statistics=tmp_path / "s.safetensors")
    with pytest.raises(UserError, match="no such file"):
        load_autoencoder("va_vae", released, statistics=tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["quant_conv.bias"].fill_(torch.nan), "quant_conv.bias has 10 of 10"),
        (lambda t: t.pop("encoder.conv_in.bias"), "lacks encoder.conv_in.bias,"),
        (
            lambda t: t.update({"encoder.mid.attn_1.q.weight": torch.zeros(2, 2, 1, 1)}),
            r"encoder.mid_block.attentions.0.to_q.weight is \(2, 2\)",
        ),
        (lambda t: t.update({"encoder.more": torch.zeros(1)}), "holds encoder.more,"),
    ],
)
def test_a_release_that_does_not_fit_is_named(
    plain: Plain, released: Path, change: Any, message: str
) -> None:
    tensors = {name: tensor.clone() for name, tensor in plain.tensors.items()}
    change(tensors)
    torch.save(tensors, released)
    with pytest.raises(UserError, match=message):
        load_autoencoder("va_vae", released)


def test_an_architecture_that_is_none_is_named(released: Path) -> None:
    for text, message in (("{", "is not JSON"), ('{"a": 1}', "does not describe")):
        (released.parent / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load_autoencoder("sd_vae", released)


@pytest.mark.parametrize(
    ("published", "parameters", "levels"),
    [(kl.SD_VAE, 83_653_863, 4), (kl.VA_VAE, None, 5)],
)
def test_published_architectures(
    published: dict[str, Any], parameters: int | None, levels: int
) -> None:
    """SD-VAE's count is that of its weights; no name of either is left in the old form."""
    with torch.device("meta"):
        net = kl.build(published)
    own = net.state_dict()
    if parameters is not None:
        assert sum(t.numel() for t in own.values()) == parameters
    assert own["quant_conv.weight"].shape[0] == 2 * published["latent_channels"]
    assert len(published["block_out_channels"]) == levels
    assert {kl.renamed(name, levels) for name in own} == own.keys()  # names of now stay


@pytest.mark.parametrize(
    ("published", "attends"),
    # attention in the middle alone, and at the last level as well
    [(kl.SD_VAE, False), (kl.VA_VAE, True)],
    ids=["sd_vae", "va_vae"],
)
def test_published_sizes_are_the_plain_forward(
    published: dict[str, Any], attends: bool, agree: Any
) -> None:
    """32 groups of eps 1e-6, an odd pad before each halving, the nearest pixel before each doubling."""
    plain = Plain(published, groups=32, attends=attends)
    x = 2 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)) - 1
    with torch.no_grad():
        moments = plain.moments(x)
        latents = moments[:, : published["latent_channels"]]
        images = plain.images(latents)
        net = kl.build(published)
        levels = len(published["block_out_channels"])
        net.load_state_dict(kl.in_diffusers_form(plain.tensors, levels))
        agree(net.encode(x).latent_dist.parameters, moments, 1e-4)
        agree(net.decode(latents).sample, images, 1e-4)


# --- where weights are looked for ----------------------------------------------------------------


def test_no_weights_is_an_error_and_no_download(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.socket.connect", None)  # whoever calls it fails otherwise
    for name in ("sd_vae", "va_vae"):
        monkeypatch.delenv(f"SELFGUIDE_{name.upper()}", raising=False)
        with pytest.raises(UserError, match=f"set SELFGUIDE_{name.upper()}, .* nothing is downlo"):
            load_autoencoder(name)
    for given, message in (("nowhere", "no such file"), ("", "folder holds none of")):
        with pytest.raises(UserError, match=rf"weights={tmp_path / given}: .*{message}"):
            load_autoencoder("sd_vae", tmp_path / given)


def test_path_then_variable_then_hub_cache(
    plain: Plain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache, revision = tmp_path / "hub", "a" * 40
    repository = cache / "models--stabilityai--sd-vae-ft-ema"
    snapshot = repository / "snapshots" / revision
    for number, folder in enumerate((snapshot, tmp_path / "variable", tmp_path / "path")):
        folder.mkdir(parents=True)
        tensors = kl.in_diffusers_form(plain.tensors, 3)
        tensors["quant_conv.bias"] = torch.full((10,), float(number))
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text(json.dumps(CONFIG))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.delenv("SELFGUIDE_SD_VAE", raising=False)

    def sha256(folder: Path) -> str:
        data = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
        return hashlib.sha256(data).hexdigest()

    assert load_autoencoder("sd_vae").sha256 == sha256(snapshot)
    monkeypatch.setenv("SELFGUIDE_SD_VAE", str(tmp_path / "variable"))
    assert load_autoencoder("sd_vae").sha256 == sha256(tmp_path / "variable")
    found = load_autoencoder("sd_vae", tmp_path / "path").sha256
    assert found == sha256(tmp_path / "path") != sha256(snapshot)


def test_without_the_extra_the_cure_is_named(
    released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # what an import of what is missing does
    with pytest.raises(UserError, match=r"pip install 'selfguide\[vae\]'"):
        load_autoencoder("sd_vae", released)


def test_diffusers_is_imported_only_by_who_needs_it() -> None:
    code = (
        "import sys, selfguide.data.autoencoders as a\n"
        "a.load_autoencoder('tiny'), a.load_autoencoder('identity')\n"
        "assert not {'diffusers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_safetensors_file_of_the_release_is_read_too(plain: Plain, released: Path) -> None:
    other = released.with_suffix(".safetensors")
    save_file(plain.tensors, other)
    assert load_file(other).keys() == plain.tensors.keys()
    found = load_autoencoder("va_vae", other).encode(PHOTOS)
    assert torch.equal(found, load_autoencoder("va_vae", released).encode(PHOTOS))
