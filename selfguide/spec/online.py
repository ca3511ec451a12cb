"""The laws of online guidance that no single field shows: what reads what, and what a level needs."""

from __future__ import annotations

import math

from selfguide.spec.config import OnlineGuidance
from selfguide.spec.sizes import row
from selfguide.spec.unet import UNetArchitecture
from shards.errors import UserError

# field -> (the field that decides whether it is read, with which value)
_READERS = {
    "mask": ("view", "training"),
    "view_told": ("view", "training"),
    "codes_over": ("view", "training"),
    "mean_over": ("view", "training"),
    "pooling": ("level", "image"),
}


def validate_online(guidance: OnlineGuidance, model: str) -> None:
    """Before the network's sizes are asked for, which depend on it.

    Raises:
        UserError: the first law that does not hold, with its cure.
    """
    if guidance.level == "patch" and isinstance(row(model), UNetArchitecture):
        raise UserError(
            f"guidance.level=patch tells each patch of a transformer, and model.name={model!r} is a UNet; take "
            "guidance.level=image, or a DiT or U-ViT"
        )
    for field, (reader, wanted) in _READERS.items():
        value = getattr(guidance, field)
        if getattr(guidance, reader) != wanted and value != getattr(OnlineGuidance(), field):
            shown = list(value) if isinstance(value, tuple) else value
            raise UserError(
                f"guidance.{field}={shown} is read with guidance.{reader}={wanted} only; drop it or take that"
            )
    if guidance.queue < 0:
        raise UserError(f"guidance.queue={guidance.queue} counts features: take 0 or more")
    if not (math.isfinite(guidance.revive) and 0 <= guidance.revive < 1):
        raise UserError(
            f"guidance.revive={guidance.revive} is a part of an even share: take a number in [0, 1), such as 0.01"
        )
