"""The flags of every command that measures in a feature net."""

from __future__ import annotations

from selfguide.spec.metrics import FEATURES
from tools.flags import REQUIRED, Flag

PROTOCOLS = tuple(name for name, features in FEATURES.items() if features.of_images)
NET: tuple[Flag, ...] = (
    ("--protocol P", PROTOCOLS, REQUIRED, "the protocol whose net and resize are used"),
    ("--weights FILE", str, None, "its weights, where they lie in none of the usual places"),
    ("--net NAME", str, None, "fd_timm: a net of timm, such as resnet50.a1_in1k"),
    ("--sha256 HEX", str, None, "fd_timm: what its weights must have (as those here have)"),
    ("--batch N", int, 50, "images that the net sees at once (50)"),
    ("--device D", str, None, "cpu or cuda (a GPU where there is one)"),
)
