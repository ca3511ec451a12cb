"""The only names of the code that tests/guard imports; a refactoring that moves them changes them here."""

from launcher.choices import experiments, options
from launcher.choices import of_papers as papers
from launcher.compose import compose
from selfguide.spec.files import read_config, to_yaml
from selfguide.spec.identity import digest, identity
from shards import sidecar

__all__ = [
    "compose",
    "digest",
    "experiments",
    "identity",
    "options",
    "papers",
    "read_config",
    "sidecar",
    "to_yaml",
]
