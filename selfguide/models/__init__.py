"""Backbones by name: `build(name, **overrides)` is what model=NAME chooses, with its overrides."""

from __future__ import annotations

from typing import Any

from selfguide.models.backbone import Backbone
from selfguide.models.dit import DiT
from selfguide.models.unet import UNet
from selfguide.models.uvit import UViT
from selfguide.spec.architecture import Architecture
from selfguide.spec.dit import DiTArchitecture
from selfguide.spec.sizes import preset
from selfguide.spec.unet import UNetArchitecture
from selfguide.spec.uvit import UViTArchitecture

FAMILIES: dict[type[Architecture], type[Backbone]] = {
    DiTArchitecture: DiT,
    UNetArchitecture: UNet,
    UViTArchitecture: UViT,
}


def build(name: str, **overrides: Any) -> Backbone:
    """The backbone of that preset of `selfguide.spec.sizes`; overrides are fields of its architecture.

    Raises:
        UserError: an unknown name or field, or sizes that cannot be built.
    """
    return assemble(preset(name, **overrides))


def assemble(net: Architecture) -> Backbone:
    """The backbone of that architecture, freshly initialised."""
    return FAMILIES[type(net)](net)
