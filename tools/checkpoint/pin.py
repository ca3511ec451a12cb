"""Pin a checkpoint: retention never deletes it, however many newer ones there are. --off lets it go again.

examples:
  python -m tools.checkpoint pin runs/in1k_dit/3f2a --images 512000
  python -m tools.checkpoint pin runs/in1k_dit/3f2a --images 512000 --off
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from selfguide.spec.find import find
from selfguide.training.retention import pin, pinned, unpin
from shards import storage
from shards.errors import UserError
from tools import flags
from tools.checkpoint import target


def add(parser: argparse.ArgumentParser) -> None:
    flags.add(
        parser,
        ("of RUN", str, None, "id, name or folder of a run"),
        ("--images N", int, flags.REQUIRED, "the checkpoint at N images seen"),
        ("--off", bool, False, "lets it go again"),
        flags.RUNS,
        flags.JSON,
    )


def run(options: argparse.Namespace) -> int:
    found = find(options.of, Path(options.runs))
    folder = found.checkpoint(options.images)
    if options.off:
        if folder.name not in pinned(found.checkpoints):
            raise UserError(f"--off: {folder.name} is not pinned")
        unpin(found.checkpoints, folder.name)
    else:
        target.chosen(options.images, found.checkpoint_folders())
        if storage.read_complete(folder) is None:
            raise UserError(f"{folder} is not complete; `verify` says why")
        pin(found.checkpoints, folder.name)
    kept = sorted(pinned(found.checkpoints))
    if options.json:
        print(json.dumps({"pinned": kept}))
    else:
        print(f"{folder.name} is {'no longer ' if options.off else ''}pinned")
    return 0
