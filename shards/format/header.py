"""How stored values are normalised for a model, and which autoencoder made them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from shards.errors import UserError

Kind = Literal["image", "latent"]
Content = Literal["sample", "moments"]


@dataclass(frozen=True, kw_only=True)
class Header:
    """How stored values become what a model sees, (x - shift) * scale, and who encoded them.

    A latent is stored as a sample (C, H, W), or as the moments (2C, H, W) of its Gaussian, means before
    log-variances, to be sampled anew at every step. With `flips` a sample holds the image and its mirror
    image, (2, C or 2C, H, W): an autoencoder is not equivariant to flips, so each is encoded by itself.
    """

    kind: Kind
    shift: float | tuple[float, ...] = 0.0  # one for all, or one a channel of the model's input
    scale: float | tuple[float, ...] = 1.0
    encoder: str | None = None  # of latents: its name, and the sha256 of its weights
    encoder_sha256: str | None = None
    content: Content = "sample"
    flips: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"header kind={self.kind!r}: give 'image' or 'latent'")
        if self.content not in get_args(Content):
            raise UserError(f"header content={self.content!r}: give 'sample' or 'moments'")
        if self.kind == "image" and self.content == "moments":
            raise UserError("header content='moments' of kind='image': only latents have moments")
        shifts, scales = _each(self.shift), _each(self.scale)
        if not (shifts and scales and all(map(math.isfinite, (*shifts, *scales)))) or (
            min(scales) <= 0
        ):
            raise UserError(
                f"header scale={self.scale}, shift={self.shift}: a finite shift and scale > 0 are needed"
            )
        if len(self.lengths) > 1:
            raise UserError(
                f"header scale has {len(scales)} values and shift {len(shifts)}: give one for each channel"
            )
        if self.kind == "latent" and not self.encoder:
            raise UserError("header encoder=None: latents must say which encoder made them")

    @staticmethod
    def of(plain: Header | Mapping[str, Any]) -> Header:
        """From what a manifest or snapshot holds; what older ones do not say has its default."""
        if isinstance(plain, Header):
            return plain
        values = known(Header, plain)
        lists = {n: tuple(v) for n, v in values.items() if isinstance(v, list)}
        return Header(**values | lists)

    def plain(self) -> dict[str, Any]:
        """As JSON; fields that older data sets do not have are left out at their defaults."""
        values = {n: [*v] if isinstance(v, tuple) else v for n, v in asdict(self).items()}
        silent = {"content": "sample", "flips": False}
        return {n: v for n, v in values.items() if n not in silent or v != silent[n]}

    @property
    def lengths(self) -> set[int]:
        """How many channels the per-channel lists are for; empty without lists."""
        return {len(v) for v in (self.shift, self.scale) if isinstance(v, tuple)}

    def model_shape(self, stored: tuple[int, ...]) -> tuple[int, int, int]:
        """(C, H, W) that a model sees of samples stored in this shape.

        Raises:
            UserError: the header promises another form of samples.
        """
        if len(stored) != (4 if self.flips else 3) or (self.flips and stored[0] != 2):
            form = "(2, C, H, W), the image and its mirror image" if self.flips else "(C, H, W)"
            raise UserError(
                f"samples are {stored}; a header with flips={self.flips} promises {form}"
            )
        channels, height, width = stored[-3:]
        if self.content == "moments":
            if channels % 2:
                raise UserError(
                    f"samples have {channels} channels; moments are a mean and a log-variance for each "
                    "latent channel, so an even number"
                )
            channels //= 2
        if self.lengths - {channels}:
            raise UserError(
                f"header scale and shift are for {self.lengths.pop()} channels; a model sees {channels} "
                f"of samples stored as {stored}"
            )
        return channels, height, width


def known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that `kind` has fields for: a later writer may have added others."""
    return {f.name: values[f.name] for f in fields(kind) if f.name in values}


def _each(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


PIXELS = Header(kind="image", shift=127.5, scale=1 / 127.5)  # of uint8, to [-1, 1]
