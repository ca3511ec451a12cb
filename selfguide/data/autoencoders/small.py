"""A small KL autoencoder of any images, which `python -m tools.vae SHARDS` fits: convolutions, no normalisation.

An image is folded to half its edge first and unfolded last (pixel shuffling, Shi et al. 2016), so that no convolution
works at full resolution. The file of weights states the architecture, beside the mean and std of the latents.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from selfguide.weights import put, read_weights
from shards.errors import UserError

Factor = Literal[2, 4, 8]
_STATED = "small_vae"  # what the file's metadata holds the architecture as
_BLOCKS = 2  # residual blocks of the decoder where the image is smallest; one everywhere else


@dataclass(frozen=True, kw_only=True)
class SmallArchitecture:
    """What decides the weights' shapes."""

    image_channels: int
    channels: int  # of a latent
    factor: Factor
    width: int  # at half the image's edge; doubled with each further halving

    def __post_init__(self) -> None:
        if self.factor not in get_args(Factor):
            raise UserError(f"factor={self.factor}: give 2, 4 or 8 image pixels to a latent pixel")
        for name in ("image_channels", "channels", "width"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: give at least 1")

    @property
    def widths(self) -> list[int]:
        """Of the grids at a half, a quarter, ... of the image's edge."""
        return [self.width << level for level in range(self.factor.bit_length() - 1)]


class SmallVAE(nn.Module):
    """The network, and the statistics of its latents over the images it was fitted on."""

    mean: Tensor
    std: Tensor

    def __init__(self, architecture: SmallArchitecture) -> None:
        super().__init__()
        self.architecture = a = architecture
        widths = a.widths
        near, far = widths[0], widths[-1]
        down: list[nn.Module] = [
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * a.image_channels, near, 3, padding=1),
            Residual(near),
        ]
        for width in widths[1:]:
            halve = nn.Conv2d(width // 2, width, 4, stride=2, padding=1)
            down += [nn.SiLU(), halve, Residual(width)]
        self.encoder = nn.Sequential(*down, nn.SiLU(), nn.Conv2d(far, 2 * a.channels, 1))
        up: list[nn.Module] = [nn.Conv2d(a.channels, far, 3, padding=1)]
        up += [Residual(far) for _ in range(_BLOCKS)]
        for width in widths[-2::-1]:
            up += [nn.SiLU(), nn.Conv2d(2 * width, 4 * width, 1), nn.PixelShuffle(2)]
            up.append(Residual(width))
        last = nn.Conv2d(near, 4 * a.image_channels, 3, padding=1)
        self.decoder = nn.Sequential(*up, nn.SiLU(), last, nn.PixelShuffle(2))
        self.register_buffer("mean", torch.zeros(a.channels))
        self.register_buffer("std", torch.ones(a.channels))

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> moments (B, 2c, H / factor, W / factor), means before log-variances."""
        return self.encoder(x)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, C, factor h, factor w), about [-1, 1]."""
        return self.decoder(latents)


class Residual(nn.Module):
    """x + two convolutions of it, the second of which begins at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.look = nn.Conv2d(width, width, 3, padding=1)
        self.add = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.add.weight)
        nn.init.zeros_(self.add.bias)  # type: ignore[arg-type]
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.add(self.act(self.look(self.act(x))))


def to_bytes(net: SmallVAE) -> bytes:
    """The network as a safetensors file."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in net.state_dict().items()}
    return save(tensors, {_STATED: json.dumps(asdict(net.architecture), sort_keys=True)})


def from_file(file: Path) -> SmallVAE:
    """The network that `to_bytes` wrote.

    Raises:
        UserError: it did not write this file, or it was changed.
    """
    tensors = read_weights(file, str(file))
    try:
        with safe_open(file, "pt") as opened:
            stated = json.loads((opened.metadata() or {})[_STATED])
        net = SmallVAE(SmallArchitecture(**stated))
    except (
        Exception
    ) as error:  # a torch file has no metadata, and another program's says something else
        raise UserError(
            f"weights={file} do not say of which architecture they are ({type(error).__name__}): "
            "fit them with `python -m tools.vae SHARDS --out FILE`"
        ) from error
    put(net, tensors, str(file))
    return net
