"""What the two stores share while they start: a folder with its ports and secrets, and its programs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from string import Template

from slurm.service import Programs

ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8"}
BUCKET = "selfguide"


@dataclass(kw_only=True)
class StoreFolder(Programs):
    """A store's folder while it is being filled. `secrets` maps access keys to their secrets."""

    ports: Mapping[str, int]
    secrets: Mapping[str, str] = field(repr=False)

    def fill(self, template: str, **values: object) -> Path:
        """Writes templates/<template> into the folder, for its owner's eyes only."""
        path = self.state / template
        path.touch(mode=0o600)
        text = (resources.files("tools.s3") / "templates" / template).read_text()
        path.write_text(Template(text).substitute(values))
        return path
