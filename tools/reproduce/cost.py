"""What a row's training takes, from the FLOPs of its network."""

from __future__ import annotations

from selfguide.spec.config import Config
from selfguide.spec.sizes import architecture

# an H100's dense bf16 peak, and the share of it that training reaches
PEAK, REACHED = 989.4e12, 0.40


def gpu_hours(config: Config) -> float:
    """GPU-hours of an H100 at 40 % of its peak: three forward passes an image, and the teacher's one behind the switch,
    or of every image where a component beside guidance reads it.

    Evaluations, annotations and data are not in it, nor is what small images leave of that share.
    """
    forward = 2 * architecture(config).forward_macs()
    images = config.train.images
    named = images - config.guidance.switch_images(config.train)
    passes = 3 * images + (named if config.guidance.learns_online else 0)
    passes += images * sum(each.wants_teacher for each in config.components.values())
    return forward * passes / (REACHED * PEAK) / 3600
