"""From `guidance=` to a training component. A new source registers its settings here."""

from __future__ import annotations

from selfguide.guidance.component import Component
from selfguide.guidance.labels import LabelSource
from selfguide.guidance.online import OnlineSource
from selfguide.guidance.sidecar import SidecarSource
from selfguide.spec.config import Config, LabelGuidance, OnlineGuidance, SidecarGuidance


def build_components(config: Config, histogram: list[float]) -> tuple[Component, ...]:
    """The components of a run, in the order in which they make a step's inputs; none trains unconditionally.

    `histogram` counts the labels of the shards, each data set by its weight.
    """
    match config.guidance:
        case OnlineGuidance() as online:
            return (
                OnlineSource(online, config.path, config.seed, online.switch_images(config.train)),
            )
        case LabelGuidance() as labels:
            return (LabelSource(labels, histogram, config.seed),)
        case SidecarGuidance() as sidecar:
            return (SidecarSource(sidecar, config.seed),)
    return ()
