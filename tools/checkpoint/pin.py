"""Pin a checkpoint or a snapshot: retention never deletes it, however many newer ones there are. --off lets it go.

A checkpoint that is copied to a store (train.checkpoint_store) is pinned there by the next copy, and let go at once.

examples:
  python -m tools.checkpoint pin runs/in1k_dit/3f2a --images 512000
  python -m tools.checkpoint pin runs/in1k_dit/3f2a --images 512000 --off
  python -m tools.checkpoint pin runs/in1k_dit/3f2a --images 512000 --snapshot
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from selfguide.spec.files import read_config
from selfguide.spec.find import find
from selfguide.spec.retention import deletion, holding, pin, pinned, unpin
from selfguide.spec.run import RunFolder, image_folder
from selfguide.training import store
from shards import storage
from shards.errors import UserError
from shards.storage import Url
from tools import flags
from tools.checkpoint import target


def add(parser: argparse.ArgumentParser) -> None:
    flags.add(
        parser,
        ("of RUN", str, None, "id, name or folder of a run"),
        ("--images N", int, flags.REQUIRED, "the one at N images seen"),
        ("--snapshot", bool, False, "the snapshot there, not the checkpoint"),
        ("--off", bool, False, "lets it go again"),
        flags.RUNS,
        flags.JSON,
    )


def run(options: argparse.Namespace) -> int:
    found = find(options.of, Path(options.runs))
    place = found.snapshots if options.snapshot else found.checkpoints
    folder = place / image_folder(options.images)
    if options.off:
        places: list[Url] = [place, *([] if options.snapshot else _stores(found))]
        holding_it = [each for each in places if folder.name in pinned(each)]
        if not holding_it:
            raise UserError(f"--off: {folder.name} is not pinned")
        for each in holding_it:
            unpin(each, folder.name)
    elif options.snapshot:
        # whoever would delete it sees the pin, or it is gone already
        with holding(found):
            known = found.published()
            if gone := deletion(folder):
                there = ", ".join(map(str, known))
                raise UserError(f"--images {options.images}: {gone}; snapshots are at {there}")
            target.chosen(options.images, known, "snapshots")
            pin(place, folder.name)
    else:
        target.chosen(options.images, found.checkpoint_folders())
        if storage.read_complete(folder) is None:
            raise UserError(f"{folder} is not complete; `verify` says why")
        pin(place, folder.name)
        if storage.read_complete(folder) is None:
            # by the run, which looked for pins just before
            unpin(place, folder.name)
            target.chosen(options.images, found.checkpoint_folders())
            raise UserError(f"{folder} was deleted meanwhile; pin a newer one")
    kept = sorted(pinned(place))
    if options.json:
        print(json.dumps({"pinned": kept}))
    else:
        print(f"{folder.name} is {'no longer ' if options.off else ''}pinned")
    return 0


def _stores(run: RunFolder) -> list[Url]:
    """Where the run's checkpoints are copied to, by its newest attempt; nothing where they are not."""
    for number in run.attempt_numbers()[-1:]:
        path = run.attempt(number) / "config.yaml"
        if path.is_file() and (place := read_config(path).train.checkpoint_store) is not None:
            return [store.place_of(place, run)]
    return []
