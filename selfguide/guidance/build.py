"""From the configured source to the object the loop meets."""

from __future__ import annotations

from selfguide.guidance.online import OnlineSource
from selfguide.guidance.sidecar import SidecarSource
from selfguide.guidance.source import LabelSource, NoSource, Source
from selfguide.spec.config import Config, LabelGuidance, OnlineGuidance, SidecarGuidance


def build_source(config: Config, histogram: list[float], switch: int) -> Source:
    """The configured source; `switch` is the image count from which an online source tells its groups."""
    guidance = config.guidance
    if isinstance(guidance, OnlineGuidance):
        return OnlineSource(guidance, config.path, config.seed, switch)
    if isinstance(guidance, LabelGuidance):
        return LabelSource(guidance, histogram, config.seed)
    if isinstance(guidance, SidecarGuidance):
        return SidecarSource(guidance, config.seed)
    return NoSource()
