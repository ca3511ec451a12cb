"""From `guidance=` to a training component. A new source registers its settings here."""

from __future__ import annotations

from functools import singledispatch

from selfguide.guidance.component import Component
from selfguide.guidance.labels import LabelSource
from selfguide.guidance.online import OnlineSource
from selfguide.guidance.sidecar import SidecarSource
from selfguide.spec.config import Config, LabelGuidance, OnlineGuidance, SidecarGuidance
from selfguide.spec.config.guidance import Guidance
from selfguide.spec.schedules import switch_images


def build_components(config: Config, histogram: list[float]) -> tuple[Component, ...]:
    """The components of a run, in the order in which they make a step's inputs; none trains unconditionally.

    `histogram` counts the labels of the shards, each data set by its weight.
    """
    guidance = build_source(config.guidance, config, histogram)
    return () if guidance is None else (guidance,)


@singledispatch
def build_source(guidance: Guidance, config: Config, histogram: list[float]) -> Component | None:
    """The component of these settings; None of those that condition on nothing."""
    return None


@build_source.register
def _(guidance: OnlineGuidance, config: Config, histogram: list[float]) -> Component:
    return OnlineSource(guidance, config.path, config.seed, switch_images(config))


@build_source.register
def _(guidance: LabelGuidance, config: Config, histogram: list[float]) -> Component:
    return LabelSource(guidance, histogram, config.seed)


@build_source.register
def _(guidance: SidecarGuidance, config: Config, histogram: list[float]) -> Component:
    return SidecarSource(guidance, config.seed)
