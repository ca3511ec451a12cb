"""What of a stored image a model is shown: whether its shards allow that, and what of it changes a run's result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from selfguide.spec.config import DataConfig
from shards.errors import UserError

if TYPE_CHECKING:  # needs NumPy, and a dry run does not
    from shards.format.header import Header


def check_shown(data: DataConfig, header: Header, whole: tuple[int, int, int]) -> None:
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
    fits = whole == data.shape
    if data.crop:
        fits = whole[0] == data.shape[0] and min(whole[1:]) >= data.shape[1]
    if not fits:
        cure = ",".join(map(str, whole))
        smaller = ", or smaller," if data.crop else ""
        raise UserError(
            f"data.shape={list(data.shape)} and a model sees {list(whole)} of the shards in "
            f"{data.root}; set data.shape=[{cure}]{smaller} or another data.root"
        )


def shown_identity(data: DataConfig) -> dict[str, Any]:
    """What of it a run is named after; nothing where whole images are shown as they are."""
    shown: dict[str, Any] = {"flip": True} if data.flip else {}
    return shown | ({"crop": list(data.shape)} if data.crop else {})
