"""What happens when, as functions of the images seen, so that a resumed run needs no scheduler."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selfguide.spec.config import Config


def switch_after(share: float, images: int, batch: int) -> int:
    """The image count nearest to a share of the steps that `images` take: whole batches, and one at least."""
    return max(1, round(share * (images // batch))) * batch


def learning_rate(config: Config, images: int) -> float:
    """Of the step that begins at `images`: linear warm-up, then constant, and falling if `train.rate_decay` says so."""
    train = config.train
    counted = images + train.batch if train.ramps_count == "after" else images
    warm = min(1.0, counted / train.warmup_images) if train.warmup_images else 1.0
    begin = train.cosine_from
    if begin is not None:
        passed = min(1.0, max(0.0, (images - begin) / (train.images - begin)))
        warm *= train.final_rate + (1 - train.final_rate) * (1 + math.cos(math.pi * passed)) / 2
    elif train.decay_images is not None:
        warm /= max(1.0, images / train.decay_images) ** 0.5
    return train.learning_rate * warm


def due(every: int, images: int, batch: int) -> bool:
    """Whether the step of `batch` images that ended at `images` reached or passed a multiple of `every`."""
    return images // every > (images - batch) // every
