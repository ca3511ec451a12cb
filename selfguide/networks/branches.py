"""From the settings of a run to the branches of its network. A component that trains one registers it here."""

from __future__ import annotations

from selfguide.networks.branch import Branch
from selfguide.spec.architecture import Architecture
from selfguide.spec.config import Config


def build_branches(config: Config, net: Architecture) -> dict[str, Branch]:
    """The branches beside the backbone `net`, by the name of the component that trains each."""
    found: dict[str, Branch] = {}
    return found
