"""The former address of `selfguide.diffusion.samplers`, kept for one release."""

import warnings

from selfguide.diffusion.samplers import *  # noqa: F403
from selfguide.diffusion.samplers import sample  # noqa: F401

warnings.warn(
    "selfguide.samplers is now selfguide.diffusion.samplers; the old name goes with the next release",
    FutureWarning,
    stacklevel=2,
)
