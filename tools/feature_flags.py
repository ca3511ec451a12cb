"""The flags of every command that measures in a feature net."""

from __future__ import annotations

from selfguide.spec.metrics import FEATURES
from tools.flags import REQUIRED, Flag

PROTOCOLS = tuple(name for name, features in FEATURES.items() if features.of_images)
NET: tuple[Flag, ...] = (
    ("--protocol P", PROTOCOLS, REQUIRED, f"whose net and resize are used: {', '.join(PROTOCOLS)}"),
    (
        "--weights FILE",
        str,
        None,
        "the net's weights (looked for in SELFGUIDE_WEIGHTS_DIR, then in the local caches)",
    ),
    ("--net NAME", str, None, "fd_timm: a net of timm, such as resnet50.a1_in1k"),
    (
        "--sha256 HEX",
        str,
        None,
        "fd_timm: the sha256 that its weights must have (that of those here)",
    ),
    ("--batch N", int, 50, "images that the net sees at once (50)"),
    ("--device D", str, None, "cpu or cuda (a GPU where there is one)"),
)
