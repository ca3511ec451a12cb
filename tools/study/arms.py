"""What the study compares: each arm is one way to find a condition, trained on the same images by the same network.

An arm that needs groups beforehand has them from features of the unconditional arm's first seed, so that no training of
it has seen a label. Labels of the digits did choose two settings, on which docs/study.md says more: the layer, pooling
and noise-time of these features, and the temperature at which groups are found online.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.annotate.__main__ import main as annotate

# the layer, pooling and noise-time of the digits' features whose groups are nearest to the labels (docs/measured.md)
_FEATURES = ("--layer", "4", "--pooling", "flat", "--noise-time", "0.1")
_GROUPS = 30
# fits of TEMI's size for a thousand images (docs/guidance.md)
_TEMI = ("--heads", "8", "--epochs", "30", "--step-images", "64", "--learning-rate", "2e-3")
FEATURES = "features"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to condition a model."""

    name: str
    # of what the model is conditioned on, in words
    title: str
    settings: tuple[str, ...]
    # words of `tools.annotate` that find its groups beforehand
    groups_by: tuple[str, ...] = ()
    # whether no training of it has seen a human label
    label_free: bool = True
    data: str = "digits"


UNCONDITIONAL = Arm(name="unconditional", title="nothing", settings=("experiment=digits_uncond",))
CLASS = Arm(
    name="class", title="human labels", settings=("experiment=digits_class",), label_free=False
)
ONLINE = Arm(name="online", title="groups found online", settings=("experiment=digits_dit",))
_SIDECAR = ("experiment=digits_kmeans", f"guidance.groups={_GROUPS}")
KMEANS = Arm(
    name="kmeans",
    title="k-means of its features",
    settings=_SIDECAR,
    groups_by=("kmeans", "--groups", str(_GROUPS)),
)
# the feature of a middle layer joins what later ones read (DDAE++, Xiang et al. 2025, arXiv 2505.10999)
_SELF = ("experiment=digits_uncond", "model.self_condition=block_2")
# its contrastive loss with its weight, and heads as small as the network
_CONTRASTIVE = (
    "contrastive.weight=0.01",
    "contrastive.layer=block_2",
    "contrastive.noise_time=0.1",
    "contrastive.hidden=256",
    "contrastive.width=64",
)

ARMS = (
    UNCONDITIONAL,
    CLASS,
    KMEANS,
    Arm(
        name="temi",
        title="TEMI on its features",
        settings=_SIDECAR,
        groups_by=("temi", "--groups", str(_GROUPS), *_TEMI),
    ),
    ONLINE,
    Arm(
        name="patch",
        title="groups of patches found online",
        settings=("experiment=digits_dit", "guidance=digits_patch"),
    ),
    Arm(name="self-conditioned", title="its own feature", settings=_SELF),
    Arm(
        name="contrastive",
        title="its own feature, contrasted with others'",
        settings=(*_SELF, *_CONTRASTIVE),
    ),
)
EMOJI = tuple(
    Arm(
        name=f"emoji-{name}",
        title=title,
        settings=(f"experiment={experiment}",),
        label_free=name != "class",
        data="emoji",
    )
    for name, title, experiment in (
        ("unconditional", "nothing", "emoji_uncond"),
        ("class", "Unicode's groups", "emoji_class"),
        ("online", "groups found online", "emoji_dit"),
    )
)
BY_NAME = {arm.name: arm for arm in (*ARMS, *EMOJI)}


def find_groups(arms: Sequence[Arm], root: str, unconditional: Path, notes: Path) -> None:
    """Groups of each arm that needs some, as sidecars in `notes`; those that are there stay.

    Args:
        root: the shards.
        unconditional: the snapshot whose features they are found in.

    Raises:
        UserError: `tools.annotate` refuses.
    """
    if not (wanted := [arm for arm in arms if arm.groups_by]):
        return
    features = notes / FEATURES
    _annotate("features", root, "--snapshot", str(unconditional), *_FEATURES, out=features)
    for arm in wanted:
        verb, *words = arm.groups_by
        _annotate(verb, root, "--features", str(features), *words, out=notes / arm.name)


def _annotate(verb: str, root: str, *words: str, out: Path) -> None:
    if (out / "MANIFEST.json").exists():
        return
    # what it says is no part of what the study says
    with contextlib.redirect_stdout(sys.stderr):
        annotate([verb, root, *words, "--out", str(out)])
