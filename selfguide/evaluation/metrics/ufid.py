"""uFID: how far a conditioned model's samples are from those of an unconditional one, rather than from real images.

Adaloglou et al. 2024 (arXiv 2403.00570, section 5).
"""

from __future__ import annotations

from selfguide.evaluation.metrics.frechet import FrechetScore, Reference, frechet
from selfguide.evaluation.metrics.moments import Moments


def ufid(unconditional: Reference, made: Moments) -> FrechetScore:
    """The Frechet distance of samples to those of the run that the reference names as `about["run"]`.

    Raises:
        ValueError: it names none, so that nobody could say what the number means.
    """
    if not unconditional.about.get("run"):
        raise ValueError("a reference of unconditional samples names their run, as about['run']")
    return frechet(unconditional, made)
