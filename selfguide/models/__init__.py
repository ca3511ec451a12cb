"""Backbones by name: `build(name, **overrides)` is the published architecture and its overrides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from selfguide.models.dit import DiT
from selfguide.spec.sizes import row


def build(name: str, **overrides: Any) -> DiT:
    """The backbone of that row of `selfguide.spec.sizes`; overrides are fields of `Architecture`."""
    return DiT(replace(row(name), **overrides))
