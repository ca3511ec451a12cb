"""An autoencoder by name, its weights by path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfguide.data.autoencoders import kl, small
from selfguide.data.autoencoders.autoencoder import Autoencoder, Identity, KLAutoencoder
from selfguide.data.autoencoders.tiny import CHANNELS, FACTOR, WEIGHTS, TinyVAE
from selfguide.spec.suggest import nearest
from selfguide.spec.weight_files import (
    DIFFUSERS,
    SD_VAE_HUB,
    VA_VAE_HUB,
    autoencoder_variable,
    from_hub_cache,
)
from selfguide.weights import put, read_weights
from shards import storage
from shards.errors import UserError

KNOWN = ("identity", "sd_vae", "va_vae", "tiny", "small")
SCALE = 0.18215  # of SD-VAE's latents (Rombach et al. 2022)
STATISTICS = "latents_stats.pt"  # beside VA-VAE's weights: mean and std of ImageNet's latents


def load_autoencoder(
    name: str,
    weights: str | Path | None = None,
    *,
    statistics: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Autoencoder:
    """The autoencoder `name`, in fp32 and frozen.

    Args:
        name: identity, sd_vae, va_vae, tiny or small.
        weights: a file, or a folder that diffusers saved. By default what SELFGUIDE_<NAME> names, then the local hub
            cache; tiny has its own, and small's are what `python -m tools.vae` fitted. Nothing is downloaded. A
            config.json beside the file states the architecture of sd_vae and va_vae.
        statistics: a file with `mean` and `std` of va_vae's latents, a value for each channel. By default the
            published one beside the weights; without it only data that carry their own can be decoded.

    Raises:
        UserError: unknown name, no weights, weights of another architecture or not finite, or no diffusers.
    """
    if name not in KNOWN:
        raise UserError(
            f"autoencoder={name!r} is unknown{nearest(name, KNOWN)}; known: {', '.join(KNOWN)}"
        )
    if name == "identity" and weights is not None:
        raise UserError(f"weights={weights}: identity has none; leave them out")
    if name != "va_vae" and statistics is not None:
        raise UserError(f"statistics={statistics}: only va_vae takes them; leave them out")
    at = torch.device(device)
    if name == "identity":
        return Identity(device=at)
    if name == "tiny":
        return _tiny(weights, at)
    if name == "small":
        return _small(_locate(name, weights, None), at)
    if name == "sd_vae":
        file = _locate(name, weights, SD_VAE_HUB)
        config = kl.settings(file, kl.SD_VAE)
        shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor", SCALE)
        return _published(name, file, config, shift, scale, at)
    file = _locate(name, weights, VA_VAE_HUB)
    config = kl.settings(file, kl.VA_VAE)
    return _published(name, file, config, *_statistics(file, config, statistics), at)


def _locate(name: str, given: str | Path | None, hub: tuple[str, Sequence[str]] | None) -> Path:
    """The file of weights: an explicit path, the environment variable, or the local hub cache.

    `hub` is a repository and the files of it that would do, None where nobody publishes them. A folder is one that
    diffusers saved.

    Raises:
        UserError: no weights at any of them; says where they are looked for.
    """
    variable = autoencoder_variable(name)
    setting = "weights" if given is not None else variable
    named = given if given is not None else os.environ.get(variable)
    if given is None and not named:
        if hub is None:
            raise UserError(
                f"no weights of {name}: give their file, or set {variable}; `python -m tools.vae SHARDS --out FILE` "
                "fits them"
            )
        repository, files = hub
        cached = from_hub_cache(repository, files)
        if cached is not None:
            return cached
        raise UserError(
            f"no weights of {name}: give their file or folder, set {variable}, or have {repository} in the local "
            "hub cache; nothing is downloaded"
        )
    path = Path(str(named)).expanduser()
    for file in (path, *(path / inside for inside in DIFFUSERS)):
        if file.is_file():
            return file
    lacks = f"the folder holds none of {', '.join(DIFFUSERS)}; name the file itself"
    raise UserError(f"{setting}={named}: {lacks if path.is_dir() else 'no such file or folder'}")


def _published(
    name: str, file: Path, config: dict[str, Any], shift: Any, scale: Any, device: torch.device
) -> Autoencoder:
    """SD-VAE or VA-VAE as diffusers runs it."""
    net, levels = kl.build(config), len(config["block_out_channels"])
    put(net, kl.in_diffusers_form(read_weights(file, str(file)), levels), str(file))
    net.float().eval().requires_grad_(False).to(device)
    return KLAutoencoder(
        name=name,
        sha256=storage.sha256(str(file)),
        channels=config.get("latent_channels", 4),
        factor=2 ** (levels - 1),
        image_channels=config.get("in_channels", 3),
        device=device,
        to_moments=lambda x: net.encode(x).latent_dist.parameters,
        to_images=lambda z: net.decode(z).sample,
        shift=shift,
        scale=scale,
    )


def _statistics(weights: Path, config: dict[str, Any], given: str | Path | None) -> tuple[Any, Any]:
    """(shift, scale) of each channel, z -> (z - mean) / std; None where nobody says."""
    file = Path(given).expanduser() if given is not None else weights.parent / STATISTICS
    if file.is_file():
        mean, std = read_statistics(file)
    elif given is not None:
        raise UserError(f"statistics={given}: no such file")
    elif config.get("latents_mean") and config.get("latents_std"):
        mean = torch.tensor(config["latents_mean"], dtype=torch.float64)
        std = torch.tensor(config["latents_std"], dtype=torch.float64)
    else:
        return None, None
    channels = config.get("latent_channels", 4)
    if not len(mean) == len(std) == channels:
        raise UserError(
            f"statistics of {weights.name} are for {len(mean)} and {len(std)} channels, not its {channels}"
        )
    return normal_of(mean, std)


def read_statistics(file: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of latents, fp64, as published beside VA-VAE's weights.

    Raises:
        UserError: the file cannot be read, or does not hold both.
    """
    found = read_weights(file, str(file))
    if not {"mean", "std"} <= found.keys():
        raise UserError(f"{file} holds {', '.join(sorted(found))}: give a file of mean and std")
    mean, std = found["mean"].double().flatten(), found["std"].double().flatten()
    if not (std > 0).all():
        raise UserError(f"{file} holds std {std.tolist()}: each must be more than 0")
    return mean, std


def _tiny(weights: str | Path | None, device: torch.device) -> Autoencoder:
    with resources.as_file(
        resources.files("selfguide.data.autoencoders") / "weights" / WEIGHTS
    ) as own:
        file = Path(weights).expanduser() if weights is not None else own
        if not file.is_file():
            raise UserError(f"weights={file}: no such file; fit it with `python -m tools.vae`")
        net = TinyVAE()
        put(net, read_weights(file, str(file)), str(file))
        sha256 = storage.sha256(str(file))
    return _fitted("tiny", net, sha256, CHANNELS, FACTOR, 1, device)


def _small(file: Path, device: torch.device) -> Autoencoder:
    net = small.from_file(file)
    a, sha256 = net.architecture, storage.sha256(str(file))
    return _fitted("small", net, sha256, a.channels, a.factor, a.image_channels, device)


def _fitted(
    name: str,
    net: TinyVAE | small.SmallVAE,
    sha256: str,
    channels: int,
    factor: int,
    image_channels: int,
    device: torch.device,
) -> Autoencoder:
    """A network of `tools.vae`, which holds the statistics of its latents."""
    shift, scale = normal_of(net.mean.double(), net.std.double())
    net.float().eval().requires_grad_(False).to(device)
    return KLAutoencoder(
        name=name,
        sha256=sha256,
        channels=channels,
        factor=factor,
        image_channels=image_channels,
        device=device,
        to_moments=net.encode,
        to_images=net.decode,
        shift=shift,
        scale=scale,
    )


def normal_of(mean: Tensor, std: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(shift, scale) that give channels of this mean and std zero mean and unit variance."""
    return tuple(mean.tolist()), tuple((1 / std).tolist())
