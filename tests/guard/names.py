"""The only names of the code that tests/guard imports; a refactoring that moves them changes them here."""

import configs
from launcher.compose import compose, experiments, options
from selfguide.spec.files import read_config
from selfguide.spec.identity import digest, identity
from shards import sidecar

__all__ = [
    "compose",
    "configs",
    "digest",
    "experiments",
    "identity",
    "options",
    "read_config",
    "sidecar",
]
