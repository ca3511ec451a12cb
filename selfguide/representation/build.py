"""From the settings of a run to the training components beside its guidance. A new component registers here."""

from __future__ import annotations

from selfguide.guidance.component import Component
from selfguide.representation.align import Align
from selfguide.representation.augment import Augmentation
from selfguide.representation.auxiliary import Auxiliary
from selfguide.representation.contrastive import Contrastive
from selfguide.spec.config import Config


def build_representation(config: Config) -> tuple[Component, ...]:
    """The components of a run beside guidance, in the order in which they follow it; none where all are off."""
    found: list[Component] = []
    if config.augment.probability is not None:
        found.append(Augmentation(config.augment.probability, config.seed))
    if config.auxiliary.on:
        found.append(Auxiliary(config))
    if config.align.on:
        found.append(Align(config))
    if config.contrastive.on:
        found.append(Contrastive(config))
    return tuple(found)
