"""`data=`: the shards, what the experiment expects to find there, and what of a stored image a model sees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from selfguide.spec.config.laws import AtLeast, Neutral, NotIdentity, ReadWith, Within
from shards.errors import UserError

if TYPE_CHECKING:  # needs NumPy, and a dry run does not
    from shards.format.header import Header


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A folder or s3:// prefix of shards. The manifest's hash, not where it lies, belongs to a run's identity."""

    root: Annotated[str, NotIdentity()]
    # (C, H, W)
    shape: Annotated[tuple[int, int, int], NotIdentity()]
    # further roots that are mixed with `root`, and weights of it and of each of them
    mix: Annotated[tuple[str, ...], NotIdentity()] = ()
    weights: Annotated[tuple[float, ...], NotIdentity()] = ()
    classes: Annotated[int, AtLeast(0), NotIdentity()] = 0
    mode: Literal["window", "global"] = "window"
    # each visit shows the image or its mirror image; a latent cannot be mirrored or cropped, but shards may hold it
    # with its mirror image's
    flip: Annotated[bool, Neutral(False)] = False
    # each visit shows another window of `shape`, of stored images that are larger
    crop: Annotated[bool, NotIdentity()] = False
    # at a damaged block reading ends, or samples of a sound one stand in, up to a share `damaged` of all samples
    on_damage: Annotated[Literal["fail", "substitute"], Neutral("fail")] = "fail"
    damaged: Annotated[float, Within(0.0, 1.0), ReadWith("on_damage=substitute"), NotIdentity()] = (
        0.01
    )
    # of each rank
    threads: Annotated[int, AtLeast(1), NotIdentity()] = 4
    # processes of each rank that decode pictures; 0 decodes in its thread
    decoders: Annotated[int, AtLeast(0), NotIdentity()] = 0
    # where a node keeps blocks of remote shards, up to how many bytes
    cache: Annotated[str | None, NotIdentity()] = None
    cache_bytes: Annotated[int, AtLeast(1), ReadWith("cache=FOLDER"), NotIdentity()] = 64 << 30

    @property
    def roots(self) -> str | tuple[str, ...]:
        """As `shards.open` takes it, beside `shares`."""
        return (self.root, *self.mix) if self.mix else self.root

    @property
    def shares(self) -> tuple[float, ...] | None:
        return self.weights if self.mix else None


def check_data(data: DataConfig) -> None:
    """The laws between the fields; touches no file.

    Raises:
        UserError: the first that does not hold, with its cure.
    """
    if not data.root.strip():
        raise UserError("data.root is empty: give data.root=FOLDER")
    channels, height, width = data.shape
    if height != width or min(channels, height) < 1:
        raise UserError(f"data.shape={list(data.shape)} must be (C, H, W), positive, with H = W")
    if data.cache is not None and not data.cache.strip():
        raise UserError("data.cache is empty: give data.cache=FOLDER on a disk of each node")
    if not data.mix and not data.weights:
        return
    if len(data.weights) != len(data.mix) + 1 or not data.mix:
        raise UserError(
            f"data.weights={list(data.weights)} with data.mix={list(data.mix)}: give a weight to data.root and one to "
            "each of data.mix"
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in data.weights):
        raise UserError(f"data.weights={list(data.weights)} must be positive numbers")


def fits(data: DataConfig, whole: tuple[int, int, int]) -> bool:
    """Whether images (C, H, W) have the size that the model sees, or can be cropped to it where it sees windows."""
    if data.crop:
        return whole[0] == data.shape[0] and min(whole[1:]) >= data.shape[1]
    return whole == data.shape


def check_stored(data: DataConfig, header: Header, whole: tuple[int, int, int]) -> None:
    """Returns when images that a model would see whole as (C, H, W) can be shown as the experiment asks.

    Raises:
        UserError: another shape, or a flip or crop that these shards do not allow.
    """
    if header.kind == "latent" and data.flip:
        raise UserError(
            f"data.flip=true, and the shards in {data.root} hold latents: a mirrored latent is not the latent of the "
            "mirror image; set data.flip=false, or write shards that hold both (header flips=True)"
        )
    if header.kind == "latent" and data.crop:
        raise UserError(
            f"data.crop=true, and the shards in {data.root} hold latents: a piece of a latent is not the latent of a "
            "piece; set data.crop=false, or crop the images before they are encoded"
        )
    if header.flips and data.flip:
        raise UserError(
            f"data.flip=true, and the shards in {data.root} hold every image with its mirror image, one of which is "
            "picked at each visit already; set data.flip=false"
        )
    if not fits(data, whole):
        cure = ",".join(map(str, whole))
        smaller = ", or smaller," if data.crop else ""
        raise UserError(
            f"data.shape={list(data.shape)} and a model sees {list(whole)} of the shards in "
            f"{data.root}; set data.shape=[{cure}]{smaller} or another data.root"
        )
