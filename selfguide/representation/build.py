"""From a run's settings to the components that shape what its model represents."""

from __future__ import annotations

from selfguide.guidance.component import Component
from selfguide.representation.augment import Augmentation
from selfguide.spec.config import Config


def build_representation(config: Config) -> tuple[Component, ...]:
    """The components beside guidance, in the order in which they make a step's inputs."""
    probability = config.augment.probability
    return () if probability is None else (Augmentation(probability, config.seed),)
